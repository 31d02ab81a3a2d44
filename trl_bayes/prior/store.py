"""The files of one draw: Parquet tables of samples and of rewards, each of which appears at once and whole."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout

from .identity import DrawIdentity, stable_hash
from .writing import write_whole


_SETTINGS_FILE = "settings.json"
_SAMPLES = pa.schema(
    [
        ("prompt_key", pa.int64()),
        ("number", pa.int64()),  # of the sample, among those of its prompt
        ("completion_key", pa.int64()),
        ("completion_ids", pa.list_(pa.int64())),
        ("text", pa.string()),
        ("messages", pa.string()),  # JSON; null where the completion is the text
        ("log_prior", pa.float64()),
    ]
)
_REWARD_KEYS = [("row_key", pa.int64()), ("number", pa.int64()), ("completion_key", pa.int64())]
_DAY = 24 * 3600.0  # seconds
_NOT_KEPT = "[not kept by trl_bayes: "


class PriorSamplesError(ValueError):
    """Samples of the prior that cannot be used, or that a target cannot be fitted to: for the user to set right."""


class KeptCompletions(NamedTuple):
    """`B` completions, with all that is needed to score them again."""

    completion_ids: Sequence[Sequence[int]]
    """Their tokens, the terminal EOS included."""
    texts: Sequence[str]
    """Their texts."""
    messages: Sequence[Sequence[Mapping[str, Any]] | None]
    """What reward functions are given instead of the text, for a prompt of messages; else `None`."""
    log_prior: torch.Tensor
    """`log pi_0(y|x)` of shape `(B,)`, in nats, at the sampling temperature."""

    @property
    def given(self) -> list[Any]:
        """What reward functions are given as `completions`."""
        pairs = zip(self.texts, self.messages, strict=True)
        return [text if messages is None else list(messages) for text, messages in pairs]


class SampleIndex(NamedTuple):
    """Which samples there are, in the order of the files; all of shape `(S,)`."""

    prompt_key: torch.Tensor
    number: torch.Tensor
    completion_key: torch.Tensor
    log_prior: torch.Tensor
    file: torch.Tensor
    """Which of `files` a sample is in."""
    row: torch.Tensor
    """Where in its file."""
    files: list[Path]


class RewardIndex(NamedTuple):
    """The rewards of one function that there are; all of shape `(S,)`, a missing reward as `NaN`."""

    row_key: torch.Tensor
    number: torch.Tensor
    completion_key: torch.Tensor
    value: torch.Tensor


class SampleStore:
    """
    A folder of one draw of the prior: `samples-*.parquet`, `rewards-*.parquet` and `settings.json`.

    Args:
        folder (`Path`): of many draws; that of this one is made in it.
        identity ([`DrawIdentity`]): what is drawn.

    Raises:
        PriorSamplesError: the folder has something else in it.
    """

    def __init__(self, folder: Path, identity: DrawIdentity):
        self.folder = folder / identity.fingerprint
        self._lock = FileLock(self.folder / ".lock")
        file = self.folder / _SETTINGS_FILE
        if not file.exists():
            try:
                write_whole(file, lambda path: path.write_text(json.dumps(identity.to_dict(), indent=1) + "\n"))
            except OSError as error:
                raise PriorSamplesError(
                    f"Samples of the prior cannot be kept in {folder} ({error.strerror or error}): set "
                    "`prior_samples_dir` to a folder that can be written to."
                ) from None
            return
        try:
            found = DrawIdentity(**json.loads(file.read_text()))
        except (json.JSONDecodeError, TypeError):
            found = None
        if found is None or found.fingerprint != identity.fingerprint:
            raise PriorSamplesError(f"{file} does not say what the samples beside it are of: delete {self.folder}.")

    # ---------------------------------------------------------------------------------------------------------------
    # Samples

    def add_samples(self, prompt_keys: torch.Tensor, numbers: torch.Tensor, drawn: KeptCompletions) -> torch.Tensor:
        """Adds samples, at least one, and returns the key of each completion `(B,)`."""
        messages = [None if each is None else json.dumps(each, default=_placeholder) for each in drawn.messages]
        ids = [list(each) for each in drawn.completion_ids]
        triples = zip(ids, drawn.texts, messages, strict=True)
        keys = [stable_hash(triple) for triple in triples]
        columns = {
            "prompt_key": prompt_keys.tolist(),
            "number": numbers.tolist(),
            "completion_key": keys,
            "completion_ids": ids,
            "text": list(drawn.texts),
            "messages": messages,
            "log_prior": drawn.log_prior.double().tolist(),
        }
        name = f"samples-{int(prompt_keys[0]):016x}-{int(numbers[0]):09d}.parquet"
        table = pa.table(columns, schema=_SAMPLES)
        write_whole(self.folder / name, lambda path: pq.write_table(table, path))
        return torch.tensor(keys)

    def samples(self) -> SampleIndex:
        """Which samples there are."""
        files = sorted(self.folder.glob("samples-*.parquet"))
        tables = [self._read(file, ["prompt_key", "number", "completion_key", "log_prior"]) for file in files]
        return SampleIndex(
            prompt_key=_joined(tables, "prompt_key"),
            number=_joined(tables, "number"),
            completion_key=_joined(tables, "completion_key"),
            log_prior=_joined(tables, "log_prior", torch.float64),
            file=torch.cat([torch.full((len(table),), i) for i, table in enumerate(tables)] or [torch.arange(0)]),
            row=torch.cat([torch.arange(len(table)) for table in tables] or [torch.arange(0)]),
            files=files,
        )

    def completions(self, index: SampleIndex, chosen: torch.Tensor) -> KeptCompletions:
        """
        Some of the samples `(B,)`, places in the index, in their order.

        Raises:
            PriorSamplesError: a completion could not be kept whole.
        """
        names = ["completion_ids", "text", "messages", "log_prior"]
        needed = index.file[chosen].unique()  # ascending
        tables = [self._read(index.files[file], names) for file in needed.tolist()]
        starts = torch.tensor([0, *(len(table) for table in tables)]).cumsum(dim=0)
        rows = starts[torch.searchsorted(needed, index.file[chosen])] + index.row[chosen]
        table = pa.concat_tables(tables).take(pa.array(rows.numpy())) if tables else _SAMPLES.empty_table()
        messages = table["messages"].to_pylist()
        if any(each is not None and _NOT_KEPT in each for each in messages):
            raise PriorSamplesError(
                f"Completions in {self.folder} have contents that cannot be kept, such as images, so other rewards "
                "cannot score them again: use another folder."
            )
        return KeptCompletions(
            table["completion_ids"].to_pylist(),
            table["text"].to_pylist(),
            [None if each is None else json.loads(each) for each in messages],
            _tensor(table["log_prior"], torch.float64),
        )

    # ---------------------------------------------------------------------------------------------------------------
    # Rewards

    def add_rewards(
        self,
        fingerprints: Sequence[str],
        row_keys: torch.Tensor,
        numbers: torch.Tensor,
        completion_keys: torch.Tensor,
        rewards: torch.Tensor,
    ) -> None:
        """
        Adds the rewards of samples, at least one.

        Args:
            fingerprints (`Sequence[str]`): of the `K` reward functions.
            row_keys, numbers, completion_keys (`torch.Tensor`): `(B,)`, of the rows of the data and the samples.
            rewards (`torch.Tensor`): `(B, K)`; NaN is missing. Each function's own, whatever the others say.
        """
        columns: dict[str, Any] = {
            "row_key": row_keys.tolist(),
            "number": numbers.tolist(),
            "completion_key": completion_keys.tolist(),
        }
        for fingerprint, values in zip(fingerprints, rewards.double().T.tolist(), strict=True):
            # A missing reward is null, so that other readers need not know what NaN means
            columns[fingerprint] = [None if math.isnan(value) else value for value in values]
        schema = pa.schema([*_REWARD_KEYS, *((name, pa.float64()) for name in columns if name in fingerprints)])
        functions = stable_hash(sorted(set(fingerprints)))
        name = f"rewards-{functions:015x}-{int(row_keys[0]):016x}-{int(numbers[0]):09d}.parquet"
        table = pa.table(columns, schema=schema)
        write_whole(self.folder / name, lambda path: pq.write_table(table, path))

    def rewards(self, fingerprints: Sequence[str]) -> dict[str, RewardIndex]:
        """What there is of the rewards of some functions."""
        found: dict[str, list[pa.Table]] = {fingerprint: [] for fingerprint in fingerprints}
        keys = [name for name, _ in _REWARD_KEYS]
        for file in sorted(self.folder.glob("rewards-*.parquet")):
            table = self._read(file, None)
            for fingerprint in found.keys() & set(table.column_names):
                found[fingerprint].append(table.select([*keys, fingerprint]))
        return {
            fingerprint: RewardIndex(
                row_key=_joined(tables, "row_key"),
                number=_joined(tables, "number"),
                completion_key=_joined(tables, "completion_key"),
                value=_joined(tables, fingerprint, torch.float64),
            )
            for fingerprint, tables in found.items()
        }

    # ---------------------------------------------------------------------------------------------------------------

    def hold(self, seconds: float) -> bool:
        """Whether this run may add to the folder, which it has waited for so long; another one adds to it if not."""
        try:
            self._lock.acquire(timeout=seconds)
        except Timeout:
            return False
        except OSError:  # what can only be read has no other writer either
            pass
        return True

    def release(self) -> None:
        """Lets other runs add to the folder."""
        self._lock.release()

    def remove_unfinished(self) -> None:
        """Files that a killed run has not finished; those of the last day may be of a run that goes on."""
        for unfinished in self.folder.glob(".*.parquet.*"):
            with suppress(FileNotFoundError):  # another run removes them too
                if time.time() - unfinished.stat().st_mtime > _DAY:
                    unfinished.unlink()

    def _read(self, file: Path, columns: list[str] | None) -> pa.Table:
        try:
            return pq.read_table(file, columns=columns)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise PriorSamplesError(f"{file} cannot be read ({error}): delete it, and it is made again.") from None


def _placeholder(value: Any) -> str:
    return f"{_NOT_KEPT}{type(value).__name__}]"


def _joined(tables: Sequence[pa.Table], name: str, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.cat([_tensor(table[name], dtype) for table in tables] or [torch.zeros(0, dtype=dtype)])


def _tensor(column: pa.ChunkedArray, dtype: torch.dtype) -> torch.Tensor:
    """A column of numbers, null as NaN; a copy, because Arrow's memory is read-only."""
    filled = pc.fill_null(column, math.nan) if dtype.is_floating_point else column
    return torch.tensor(filled.to_numpy(), dtype=dtype)
