"""Samples of the prior, drawn once and kept on disk, with the rewards of whatever functions have scored them."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy
import torch

from ..language_models.progress import progress_bar
from .identity import DrawIdentity, stable_hash
from .scores import PriorScores
from .store import KeptCompletions, SampleIndex, SampleStore


Row = TypeVar("Row")


class Draw(NamedTuple):
    """`B` completions that a draw returns, one for each row that it was given, in their order."""

    completions: KeptCompletions
    rewards: torch.Tensor
    """Rewards, `NaN` where a function does not apply: of the rows of all processes, in their order, `(W * B, K)`."""


class Work(NamedTuple):
    """Whose share of the work it is, where several processes draw and score together."""

    process_index: int = 0
    num_processes: int = 1
    wait_for_everyone: Callable[[], None] = lambda: None
    """A barrier, such as `accelerator.wait_for_everyone`."""
    from_first: Callable[[bool], bool] = lambda value: value
    """Gives all processes what process 0 has."""
    progress: bool = True
    """Whether process 0 shows a progress bar."""
    what: str = "prior samples"
    """What is drawn, as the bar has it."""


class _ToDo(NamedTuple):
    """What the folder has, where in it each sample stands `(R * N,)`, and which are to be drawn and to be scored."""

    found: SampleIndex
    places: torch.Tensor
    missing: torch.Tensor
    unscored: torch.Tensor


class PriorSamples:
    """
    `num_samples` completions of the prior for each row of the data, with their rewards, in a folder of Parquet files.

    What targets learn from ([`~PriorSamples.scores`]) and what log Z is estimated from. The folder keeps draws of any
    kind beside each other, each in a folder of its own by its [`DrawIdentity`]: a run finds what was drawn with the
    same model, temperature, limit, stop tokens and seed, whoever drew it, and draws only what is missing, for new
    prompts or because more samples are asked for. Rewards are known by what their functions are
    ([`~trl_bayes.prior.callable_fingerprint`]): for other functions the kept completions are scored again.

    Each finished chunk is a file that appears at once and whole, so a run that is killed loses only the chunks that it
    was working on, and the next one draws what is missing ([`~PriorSamples.missing`]), whatever its number of
    processes. What a chunk contains depends on the seed and its first sample alone, so a restarted run does not repeat
    random numbers.

    Rows with the same prompt take different samples of it. Samples have an index: a row's place times `num_samples`
    plus the number of the sample.

    Args:
        folder (`str` or `Path`): where to keep them; made if it is not there. All processes must see it.
        identity ([`DrawIdentity`]): what is drawn.
        prompt_keys (`torch.Tensor`): identity of each row's prompt ([`prompt_key`]), int64 of shape `(R,)`.
        row_keys (`torch.Tensor`, *optional*): identity of each row for the rewards ([`row_key`]), int64 of shape
            `(R,)`. Defaults to that of the prompt.
        rewards (`Sequence[str | None]`): fingerprint of each of the `K` reward functions; `None` for one that cannot
            be recognized, which scores all samples in each run.
        num_samples (`int`): completions for each row, at least 2.
        chunk_size (`int`): completions that a process draws at a time.

    Raises:
        ValueError: arguments out of range.
        PriorSamplesError: a folder with something else in it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        identity: DrawIdentity,
        prompt_keys: torch.Tensor,
        row_keys: torch.Tensor | None = None,
        *,
        rewards: Sequence[str | None],
        num_samples: int,
        chunk_size: int,
    ):
        if num_samples < 2:
            raise ValueError(f"`num_samples={num_samples}` is too few to learn from: set it to 2 or more.")
        if chunk_size < 1:
            raise ValueError(f"`chunk_size={chunk_size}` draws nothing: set it to 1 or more.")
        self.prompt_keys = prompt_keys.detach().cpu().to(torch.int64)
        if self.prompt_keys.dim() != 1 or len(self.prompt_keys) == 0:
            raise ValueError("There is no prompt to draw samples for: give keys of shape (R,) with R of at least 1.")
        self.row_keys = self.prompt_keys if row_keys is None else row_keys.detach().cpu().to(torch.int64)
        if self.row_keys.shape != self.prompt_keys.shape:
            raise ValueError("`prompt_keys` and `row_keys` must have one entry for each row.")
        self.identity, self.reward_fingerprints = identity, list(rewards)
        self.num_samples, self.chunk_size = num_samples, chunk_size
        self._store = SampleStore(Path(folder).expanduser(), identity)
        self._numbers = _numbers(self.prompt_keys, num_samples)  # (R * N,)
        # Rewards of functions that cannot be recognized: for this run only, so in memory
        self._unrecognized = [column for column, each in enumerate(self.reward_fingerprints) if each is None]
        self._recognized = [column for column, each in enumerate(self.reward_fingerprints) if each is not None]
        self._scored_now = torch.full((len(self), len(self._unrecognized)), torch.nan, dtype=torch.float64)
        self._is_scored_now = torch.zeros(len(self), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.prompt_keys) * self.num_samples

    @property
    def folder(self) -> Path:
        """Where the files of this draw are."""
        return self._store.folder

    # ---------------------------------------------------------------------------------------------------------------
    # What is there

    def missing(self) -> torch.Tensor:
        """Indices of the samples still to be drawn, int64 in ascending order."""
        return (self._places(self._store.samples()) < 0).nonzero().squeeze(1)

    def _places(self, index: SampleIndex) -> torch.Tensor:
        """Where each sample `(R * N,)` stands in the index; -1 for one that is not there."""
        wanted = _joint_key(self._of_rows(self.prompt_keys), self._numbers)
        return _look_up(wanted, _joint_key(index.prompt_key, index.number))

    def _of_rows(self, values: torch.Tensor) -> torch.Tensor:
        """A value of each row, for each of its samples: `(R * N,)` from `(R,)`."""
        return values.repeat_interleave(self.num_samples)

    def _rewards(self, index: SampleIndex, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rewards of all samples that are known, `(R * N, K)`, and whether all of a sample are, `(R * N,)`."""
        values = torch.full((len(self), len(self.reward_fingerprints)), torch.nan, dtype=torch.float64)
        values[:, self._unrecognized] = self._scored_now
        known = (places >= 0) & (self._is_scored_now if self._unrecognized else True)
        wanted = _joint_key(
            self._of_rows(self.row_keys)[known], self._numbers[known], index.completion_key[places[known]]
        )
        kept = self._store.rewards([str(self.reward_fingerprints[column]) for column in self._recognized])
        samples = known.nonzero().squeeze(1)
        for column in self._recognized:
            found = kept[str(self.reward_fingerprints[column])]
            at = _look_up(wanted, _joint_key(found.row_key, found.number, found.completion_key))
            values[samples[at >= 0], column] = found.value[at[at >= 0]]
            known[samples[at < 0]] = False
        return values, known

    # ---------------------------------------------------------------------------------------------------------------
    # Drawing and scoring

    def collect(
        self,
        draw: Callable[[list[Row], int], Draw],
        score: Callable[[list[Row], KeptCompletions], torch.Tensor],
        rows: Sequence[Row],
        work: Work | None = None,
    ) -> None:
        """
        Draws what is missing and scores what has no rewards; returns when this process has done its share.

        Another run that adds to the same folder is waited for, and its samples are found.

        Several processes call `draw` and `score` equally often, each time with `chunk_size` rows, so these may contain
        collective operations (sharded models, gathered rewards). Where there is less to do, rows are repeated and
        what is returned for them is thrown away.

        Args:
            draw (`Callable`):
                `draw(rows, seed)` samples one completion of the prior for each row and scores it, [`Draw`]. torch's
                generators are seeded with `seed` before each call, and restored in the end; a backend with random
                numbers of its own must be given it.
            score (`Callable`):
                `score(rows, completions)` gives the rewards of completions that were kept, as [`Draw`] has them.
            rows (`Sequence`): the `R` rows of the data, in whatever form these take.
            work ([`Work`], *optional*): whose share it is. Defaults to all of it.

        Raises:
            ValueError: rows that are not those of the keys, or something else is returned than asked for.
        """
        if len(rows) != len(self.prompt_keys):
            raise ValueError(f"There are {len(rows)} rows and {len(self.prompt_keys)} keys: give one for each.")
        work = work or Work()
        try:
            to_do = self._to_do() if work.process_index == 0 else None
            if work.from_first(to_do is not None and len(to_do.missing) + len(to_do.unscored) > 0):
                self._hold_folder(work)
                to_do = None  # another run may have done it meanwhile
            self._collect(draw, score, rows, work, to_do or self._to_do())
        finally:
            self._store.release()

    def _to_do(self) -> _ToDo:
        index = self._store.samples()
        places = self._places(index)
        _, known = self._rewards(index, places)
        missing, unscored = ((places < 0).nonzero(), ((places >= 0) & ~known).nonzero())
        return _ToDo(index, places, missing.squeeze(1), unscored.squeeze(1))

    def _hold_folder(self, work: Work) -> None:
        """Process 0 holds the folder; all wait for it, in turns that are shorter than any collective's patience."""
        seconds = 0.0
        while not work.from_first(work.process_index != 0 or self._store.hold(seconds)):
            if work.process_index == 0 and not seconds:
                print(
                    f"Another run adds to the prior samples in {self.folder}: waiting for it.",
                    file=sys.stderr,
                    flush=True,
                )
            seconds = 30.0

    def _collect(
        self,
        draw: Callable[[list[Row], int], Draw],
        score: Callable[[list[Row], KeptCompletions], torch.Tensor],
        rows: Sequence[Row],
        work: Work,
        to_do: _ToDo,
    ) -> None:
        index, places, missing, unscored = to_do
        shown = work.progress and work.process_index == 0
        work.wait_for_everyone()  # before anybody adds to the folder: all must agree on what is missing
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            # A process without a chunk of its own repeats the last one, and throws it away
            for of_all in self._rounds(missing, work.what, work, shown=shown):
                mine = of_all[min(work.process_index, len(of_all) - 1)]
                drawn = self._draw(draw, rows, mine, work)
                if work.process_index < len(of_all):
                    self._save(mine, drawn, work)
                self._remember(of_all, drawn.rewards, work)
            for of_all in self._rounds(unscored, f"scoring {work.what}", work, shown=shown and len(unscored) > 0):
                mine = of_all[min(work.process_index, len(of_all) - 1)]
                whole = self._whole_chunk(mine, work)
                kept = self._store.completions(index, places[whole])
                rewards = self._checked(score(self._rows_of(rows, whole), kept), whole, work)
                if work.process_index < len(of_all):
                    self._save_rewards(mine, index.completion_key[places[mine]], rewards, work)
                self._remember(of_all, rewards, work)
        work.wait_for_everyone()
        if work.process_index == 0:
            self._store.remove_unfinished()

    def _rounds(
        self, samples: torch.Tensor, name: str, work: Work, *, shown: bool
    ) -> Iterator[Sequence[torch.Tensor]]:
        """The chunks of each round, one for each process that has something left to do."""
        chunks = samples.split(self.chunk_size) if len(samples) else ()
        with progress_bar(name, len(self), done=len(self) - len(samples), shown=shown) as bar:
            for start in range(0, len(chunks), work.num_processes):
                of_all = chunks[start : start + work.num_processes]
                yield of_all
                bar.update(sum(map(len, of_all)))

    def _whole_chunk(self, samples: torch.Tensor, work: Work) -> torch.Tensor:
        """With several processes as many samples as all others have: the last one is repeated."""
        missing = self.chunk_size - len(samples) if work.num_processes > 1 else 0
        return torch.cat([samples, samples[-1:].expand(missing)])

    def _rows_of(self, rows: Sequence[Row], samples: torch.Tensor) -> list[Row]:
        return [rows[place] for place in (samples // self.num_samples).tolist()]

    def _draw(
        self, draw: Callable[[list[Row], int], Draw], rows: Sequence[Row], samples: torch.Tensor, work: Work
    ) -> Draw:
        whole = self._whole_chunk(samples, work)
        first = (int(self._of_rows(self.prompt_keys)[samples[0]]), int(self._numbers[samples[0]]))
        seed = stable_hash([self.identity.seed, *first])
        torch.manual_seed(seed)
        drawn = draw(self._rows_of(rows, whole), seed % 2**31)
        lengths = [len(part) for part in drawn.completions]
        if any(length != len(whole) for length in lengths) or drawn.completions.log_prior.dim() != 1:
            raise ValueError(
                f"`draw` was given {len(whole)} rows and returned {lengths} completions, texts, messages and "
                "log-probabilities: return one of each for every row."
            )
        return drawn._replace(rewards=self._checked(drawn.rewards, whole, work))

    def _checked(self, rewards: torch.Tensor, samples: torch.Tensor, work: Work) -> torch.Tensor:
        shape = (work.num_processes * len(samples), len(self.reward_fingerprints))
        if tuple(rewards.shape) != shape:
            raise ValueError(
                f"The rewards of a chunk of prior samples have shape {tuple(rewards.shape)}: return those of all "
                f"processes, {shape}."
            )
        return rewards.cpu()

    def _save(self, samples: torch.Tensor, drawn: Draw, work: Work) -> None:
        own = KeptCompletions(*(part[: len(samples)] for part in drawn.completions))  # type: ignore[arg-type]
        prompt_keys = self._of_rows(self.prompt_keys)[samples]
        keys = self._store.add_samples(prompt_keys, self._numbers[samples], own)
        self._save_rewards(samples, keys, drawn.rewards, work)

    def _save_rewards(
        self, samples: torch.Tensor, completion_keys: torch.Tensor, rewards: torch.Tensor, work: Work
    ) -> None:
        if not self._recognized:
            return
        own = rewards.unflatten(0, (work.num_processes, -1))[work.process_index, : len(samples)]
        fingerprints = [str(self.reward_fingerprints[column]) for column in self._recognized]
        row_keys = self._of_rows(self.row_keys)[samples]
        numbers = self._numbers[samples]
        self._store.add_rewards(fingerprints, row_keys, numbers, completion_keys, own[:, self._recognized])

    def _remember(self, of_all: Sequence[torch.Tensor], rewards: torch.Tensor, work: Work) -> None:
        """Keeps the rewards of functions that cannot be recognized, on every process."""
        for samples, own in zip(of_all, rewards.unflatten(0, (work.num_processes, -1)), strict=False):
            self._scored_now[samples] = own[: len(samples), self._unrecognized].double()
            self._is_scored_now[samples] = True

    # ---------------------------------------------------------------------------------------------------------------
    # Using

    def scores(
        self,
        keys: torch.Tensor,
        multiplicity: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> PriorScores:
        """
        All samples as tensors: rewards `(R, N, K)`, `log pi_0` `(R, N)` and the rows' keys `(R,)`.

        Args:
            keys (`torch.Tensor`): by which a target knows the rows, int64 of shape `(R,)`, all different.
            multiplicity (`torch.Tensor`, *optional*): how often each is in the training data, see [`PriorScores`].
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
                That of the rewards in training, which targets compare them with.

        Raises:
            ValueError: if samples are missing, or have not been scored.
        """
        index = self._store.samples()
        places = self._places(index)
        rewards, known = self._rewards(index, places)
        if missing := int((~known).sum()):
            raise ValueError(
                f"{missing:,} of the {len(self):,} prior samples in {self.folder} have not been drawn and scored yet: "
                "call `collect` first."
            )
        shape = (len(self.prompt_keys), self.num_samples)
        rewards = rewards.view(*shape, len(self.reward_fingerprints)).to(dtype)
        log_prior = index.log_prior[places].view(shape).to(dtype)
        return PriorScores(rewards, log_prior, keys, torch.ones(len(keys)) if multiplicity is None else multiplicity)

    def completions(self, chosen: torch.Tensor | None = None) -> KeptCompletions:
        """
        Samples in the order of their indices.

        Args:
            chosen (`torch.Tensor`, *optional*): indices, int64; all by default.

        Raises:
            ValueError: if some of them are missing.
        """
        index = self._store.samples()
        places = self._places(index) if chosen is None else self._places(index)[chosen]
        if (places < 0).any():
            raise ValueError(f"Some prior samples in {self.folder} have not been drawn yet: call `collect` first.")
        return self._store.completions(index, places)


def _numbers(prompt_keys: torch.Tensor, num_samples: int) -> torch.Tensor:
    """The number of each sample among those of its prompt, `(R * N,)`: rows with the same prompt share none."""
    seen: dict[int, int] = {}
    first = []
    for key in prompt_keys.tolist():
        first.append(seen.get(key, 0) * num_samples)
        seen[key] = seen.get(key, 0) + 1
    return (torch.tensor(first).unsqueeze(1) + torch.arange(num_samples)).flatten()


def _joint_key(*parts: torch.Tensor) -> torch.Tensor:
    """One int64 for several, `(S,)` each, by mixing their bits: of a billion, two are the same by chance in 1e-2."""
    mixed = numpy.zeros(len(parts[0]), dtype=numpy.uint64)
    for part in parts:
        mixed = (mixed ^ part.numpy().astype(numpy.uint64)) * numpy.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> numpy.uint64(32)
    return torch.from_numpy(mixed.astype(numpy.int64))


def _look_up(wanted: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Where each key `(D,)` stands among others `(S,)`, the last place of several; -1 where it does not."""
    if not len(there):
        return torch.full((len(wanted),), -1)
    ascending, order = there.sort(stable=True)
    last = torch.searchsorted(ascending, wanted, right=True) - 1
    found = (last >= 0) & (ascending[last.clamp(min=0)] == wanted)
    return torch.where(found, order[last.clamp(min=0)], -1)
