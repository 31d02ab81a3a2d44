"""Samples of the prior, drawn once, scored once and kept on disk."""

import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from .scores import PriorScores


Row = TypeVar("Row")

_SCHEMA = pa.schema(
    [
        ("sample", pa.int64()),  # prompt's place * num_samples + number of the sample
        ("prompt_key", pa.int64()),
        ("completion_ids", pa.list_(pa.int64())),
        ("text", pa.string()),
        ("log_prior", pa.float64()),
        ("rewards", pa.list_(pa.float64())),
    ]
)
_SETTINGS_FILE = "settings.json"


class PriorSamplesError(ValueError):
    """Samples of the prior that are not those of this run, or that a target cannot be fitted to."""


class Draw(NamedTuple):
    """`B` completions that a draw returns, one for each row that it was given, in their order."""

    completion_ids: Sequence[Sequence[int]]
    """Their tokens, the terminal EOS included."""
    log_prior: torch.Tensor
    """`log pi_0(y|x)` of shape `(B,)`, in nats, at the sampling temperature."""
    rewards: torch.Tensor
    """Rewards `(B, K)`; `NaN` where a reward function does not apply."""
    texts: Sequence[str] | None = None
    """Their texts, for whoever reads the files."""


class PriorSamples:
    """
    `num_samples` completions of the prior for each prompt, with their rewards, in a folder of Parquet files.

    What targets learn from ([`~PriorSamples.scores`]) and what log Z is estimated from. Each finished chunk is a file
    that appears at once and whole, so a run that is killed loses only the chunks that it was working on, and the next
    one draws what is missing ([`~PriorSamples.missing`]), whatever its number of processes. What a chunk contains
    depends on the seed and its first sample alone, so a restarted run does not repeat random numbers.

    `settings.json` in the folder says what the samples are of. They are used again when it says the same, and refused
    when it does not.

    Args:
        folder (`str` or `Path`): where to keep them; made if it is not there. All processes must see it.
        settings (`dict[str, Any]`):
            What the samples depend on: model, reward names, temperature, `max_completion_length`, seed. Anything that
            JSON can hold. `seed` is used for drawing. The prompts and `num_samples` are added.
        prompt_keys (`torch.Tensor`): identity of each prompt, int64 of shape `(P,)`, all different.
        num_samples (`int`, *optional*, defaults to `100`): completions per prompt, at least 2.
        chunk_size (`int`, *optional*, defaults to `256`): completions that a process draws at a time.

    Raises:
        ValueError: a folder with other samples, or arguments out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: Mapping[str, Any],
        prompt_keys: torch.Tensor,
        num_samples: int = 100,
        chunk_size: int = 256,
    ):
        if num_samples < 2:
            raise ValueError(f"`num_samples={num_samples}` is too few to learn from: set it to 2 or more.")
        if chunk_size < 1:
            raise ValueError(f"`chunk_size={chunk_size}` draws nothing: set it to 1 or more.")
        self.prompt_keys = prompt_keys.detach().cpu().to(torch.int64)
        if self.prompt_keys.dim() != 1 or len(self.prompt_keys) == 0:
            raise ValueError("There is no prompt to draw samples for: give keys of shape (P,) with P of at least 1.")
        if len(self.prompt_keys.unique()) != len(self.prompt_keys):
            raise ValueError("A prompt occurs twice in `prompt_keys`: give each prompt once.")
        self.folder = Path(folder)
        self.num_samples = num_samples
        self.chunk_size = chunk_size
        self.settings = _plain(
            {**settings, "prompts": _fingerprint(self.prompt_keys.tolist()), "num_samples": num_samples}
        )
        self._reuse_or_start()

    def __len__(self) -> int:
        return len(self.prompt_keys) * self.num_samples

    def _reuse_or_start(self) -> None:
        file = self.folder / _SETTINGS_FILE
        if not file.exists():
            if self._chunk_files():
                raise ValueError(
                    f"{self.folder} has samples but no {_SETTINGS_FILE} that says of what: use another folder."
                )
            _write(file, lambda path: path.write_text(json.dumps(self.settings, indent=1) + "\n"))
            return
        try:
            found = json.loads(file.read_text())
        except json.JSONDecodeError:
            raise ValueError(f"{file} is not valid JSON: use another folder.") from None
        differ = [name for name in {**found, **self.settings} if found.get(name) != self.settings.get(name)]
        if differ:
            theirs, ours = (", ".join(f"{name}={of.get(name)!r}" for name in differ) for of in (found, self.settings))
            raise ValueError(
                f"The prior samples in {self.folder} are of {theirs}, but this run has {ours}: use another folder, or "
                "delete this one."
            )

    # ---------------------------------------------------------------------------------------------------------------
    # Drawing

    def missing(self) -> torch.Tensor:
        """The samples still to be drawn, int64 in ascending order: a prompt's place times `num_samples` + number."""
        present = torch.zeros(len(self), dtype=torch.bool)
        for file in self._chunk_files():
            present[_tensor(self._read(file, ["sample"])["sample"])] = True
        return (~present).nonzero().squeeze(1)

    def collect(
        self,
        draw: Callable[[list[Row], int], Draw],
        prompts: Sequence[Row],
        process_index: int = 0,
        num_processes: int = 1,
        wait_for_everyone: Callable[[], None] = lambda: None,
        progress: bool = True,
    ) -> None:
        """
        Draws what is missing, and returns when this process has done its share.

        Every process calls `draw` equally often, each time with `chunk_size` rows, so it may contain collective
        operations (sharded models, gathered rewards). Where there is less to do, rows are repeated and what is drawn
        for them is thrown away.

        Args:
            draw (`Callable`):
                `draw(rows, seed)` samples one completion of the prior for each row and scores it, [`Draw`]. torch's
                generators are seeded with `seed` before each call, and restored in the end; a backend with random
                numbers of its own must be given it.
            prompts (`Sequence`): the `P` prompts in the order of their keys, in whatever form `draw` takes.
            process_index, num_processes (`int`): which share of the work is this process's.
            wait_for_everyone (`Callable`, *optional*):
                A barrier, such as `accelerator.wait_for_everyone`, needed with several processes.
            progress (`bool`, *optional*, defaults to `True`): whether process 0 shows a progress bar.

        Raises:
            ValueError: prompts that are not those of the keys, or a draw that returns something else than asked for.
        """
        if len(prompts) != len(self.prompt_keys):
            raise ValueError(f"There are {len(prompts)} prompts and {len(self.prompt_keys)} keys: give one for each.")
        missing = self.missing()
        wait_for_everyone()  # before anybody adds to the folder: all must agree on what is missing
        chunks = missing.split(self.chunk_size) if len(missing) else ()
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with (
            torch.random.fork_rng(devices),
            tqdm(
                total=len(self),
                initial=len(self) - len(missing),
                desc="prior samples",
                unit=" completions",
                disable=not progress or process_index != 0,
            ) as bar,
        ):
            for start in range(0, len(chunks), num_processes):
                round_of_chunks = chunks[start : start + num_processes]
                mine = round_of_chunks[min(process_index, len(round_of_chunks) - 1)]
                drawn = self._draw(draw, prompts, mine)
                if process_index < len(round_of_chunks):
                    self._save(mine, drawn)
                bar.update(sum(map(len, round_of_chunks)))
        wait_for_everyone()
        if process_index == 0:
            for unfinished in self.folder.glob(".samples-*"):  # what a killed run has left
                unfinished.unlink(missing_ok=True)

    def _draw(self, draw: Callable[[list[Row], int], Draw], prompts: Sequence[Row], samples: torch.Tensor) -> Draw:
        rows = [prompts[place] for place in (samples // self.num_samples).tolist()]
        rows += rows[-1:] * (self.chunk_size - len(rows))
        seed = _fingerprint([self.settings.get("seed"), int(samples[0])])
        torch.manual_seed(int(seed, 16) % 2**63)
        drawn = draw(rows, int(seed, 16) % 2**31)
        lengths = [len(part) for part in drawn if part is not None]
        if any(length != len(rows) for length in lengths) or drawn.rewards.dim() != 2 or drawn.log_prior.dim() != 1:
            raise ValueError(
                f"`draw` was given {len(rows)} rows and returned {lengths} completions, log-probabilities, rewards "
                "and texts: return one of each for every row, rewards of shape (B, K)."
            )
        return drawn

    def _save(self, samples: torch.Tensor, drawn: Draw) -> None:
        count = len(samples)
        columns = {
            "sample": samples.tolist(),
            "prompt_key": self.prompt_keys[samples // self.num_samples].tolist(),
            "completion_ids": [list(ids) for ids in drawn.completion_ids[:count]],
            "text": [None] * count if drawn.texts is None else list(drawn.texts[:count]),
            "log_prior": drawn.log_prior[:count].double().tolist(),
            # A missing reward is null, so that other readers need not know what NaN means
            "rewards": [
                [value if math.isfinite(value) else None for value in row]
                for row in drawn.rewards[:count].double().tolist()
            ],
        }
        table = pa.table(columns, schema=_SCHEMA)
        _write(self.folder / f"samples-{int(samples[0]):012d}.parquet", lambda path: pq.write_table(table, path))

    # ---------------------------------------------------------------------------------------------------------------
    # Using

    def scores(self, dtype: torch.dtype = torch.float32) -> PriorScores:
        """
        All samples as tensors: rewards `(P, N, K)`, `log pi_0` `(P, N)` and the prompts' keys `(P,)`.

        Args:
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
                That of the rewards in training, which targets compare them with.

        Raises:
            ValueError: if samples are missing.
        """
        if len(missing := self.missing()):
            raise ValueError(
                f"{len(missing):,} of the {len(self):,} prior samples in {self.folder} have not been drawn yet: call "
                "`collect` first."
            )
        tables = [self._read(file, ["sample", "log_prior", "rewards"]) for file in self._chunk_files()]
        table = pa.concat_tables(tables)
        order = _tensor(table["sample"])  # (P * N,), or more where two runs overlapped
        flat = table["rewards"].combine_chunks()
        values = _tensor(flat.flatten())
        if len(numbers := pc.list_value_length(flat).unique()) > 1:
            raise ValueError(
                f"The prior samples in {self.folder} have {sorted(numbers.to_pylist())} rewards each, which do not go "
                "together: use another folder."
            )
        rewards = values.new_empty(len(self), len(values) // len(flat))
        rewards[order] = values.view(len(flat), -1)
        log_prior = values.new_empty(len(self))
        log_prior[order] = _tensor(table["log_prior"])
        shape = (len(self.prompt_keys), self.num_samples)
        return PriorScores(rewards.view(*shape, -1).to(dtype), log_prior.view(shape).to(dtype), self.prompt_keys)

    def _chunk_files(self) -> list[Path]:
        return sorted(self.folder.glob("samples-*.parquet"))

    def _read(self, file: Path, columns: list[str]) -> pa.Table:
        try:
            table = pq.read_table(file, columns=columns)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"{file} cannot be read ({error}): delete it, and it is drawn again.") from None
        samples = table["sample"]
        if len(samples) and not 0 <= pc.min(samples).as_py() <= pc.max(samples).as_py() < len(self):
            raise ValueError(f"{file} has samples of other prompts: delete it, and what is missing is drawn again.")
        return table


def _tensor(column: pa.Array | pa.ChunkedArray) -> torch.Tensor:
    """A column of numbers, null as NaN; a copy, because Arrow's memory is read-only."""
    return torch.tensor(column.to_pandas().to_numpy())


def _write(file: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file that others see whole or not at all, and that survives a loss of power."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}")  # hidden from `_chunk_files`
    try:
        write(unfinished)
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as JSON gives them back, so that they compare equal to saved ones (tuples are lists, ...)."""
    try:
        return json.loads(json.dumps(settings))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The settings of prior samples must be plain values (numbers, strings, lists): {error}."
        ) from None


def _fingerprint(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
