"""A source of completions in which every probability is known: two letters, at most three tokens, two prompts."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from tests.helpers.chi_square import chi_square_p_value
from trl_bayes.samplers import Completions, CompletionSource
from trl_bayes.samplers.source import log_weights_of
from trl_bayes.targets import Context, Target, Tilt


EOS, LENGTH, LETTERS = 2, 3, "ab"


def distribution(seed: int) -> dict[tuple[int, ...], Tensor]:
    """Probabilities of a, b and EOS after each unfinished completion."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [p for length in range(LENGTH) for p in itertools.product(range(2), repeat=length)]
    return {p: torch.randn(3, generator=generator, dtype=torch.float64).softmax(dim=0) for p in prefixes}


class TableSource(CompletionSource):
    """Prior and proposal are tables, one for each prompt; the reward is #a - #b/2, shifted by the prompt's number."""

    def __init__(self, target: Target, proposal_seed: int | None = None, seed: int = 0, num_prompts: int = 2):
        self.prompts = [str(p) for p in range(num_prompts)]
        self.prompt_ids = [[0]] * num_prompts
        self.max_new_tokens, self.target = LENGTH, target
        target.bind(["r"])
        self.prior = [distribution(p) for p in range(num_prompts)]
        self.has_proposal = proposal_seed is not None
        self.proposal = (
            [distribution(proposal_seed + p) for p in range(num_prompts)] if self.has_proposal else self.prior
        )
        self.generator = torch.Generator().manual_seed(1000 + seed)

    def extend(
        self,
        prompt_index: Tensor,
        prefixes: Sequence[list[int]],
        num_tokens: int | None = None,
        *,
        from_prior: bool = False,
    ) -> list[list[int]]:
        ids = [tuple(prefix) for prefix in prefixes]
        tables = self.prior if from_prior else self.proposal
        for _ in range(LENGTH if num_tokens is None else num_tokens):
            groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
            for place, (p, row) in enumerate(zip(prompt_index.tolist(), ids, strict=True)):
                if not self.is_finished(list(row)):
                    groups.setdefault((p, row), []).append(place)
            for (p, row), places in groups.items():
                drawn = torch.multinomial(tables[p][row], len(places), replacement=True, generator=self.generator)
                for place, token in zip(places, drawn.tolist(), strict=True):
                    ids[place] = (*row, token)
        self.num_generated += len(ids)
        return [list(row) for row in ids]

    def is_finished(self, completion_ids: list[int]) -> bool:
        return len(completion_ids) == LENGTH or completion_ids[-1:] == [EOS]

    def decode(self, completion_ids: list[list[int]]) -> list[str]:
        return ["".join(LETTERS[i] for i in ids if i != EOS) for ids in completion_ids]

    def log_probs(self, tables: list[dict[tuple[int, ...], Tensor]], index: Tensor, rows: list[list[int]]) -> Tensor:
        values = [
            sum(tables[p][tuple(row[:t])][row[t]].log().item() for t in range(len(row)))
            for p, row in zip(index.tolist(), rows, strict=True)
        ]
        return torch.tensor(values, dtype=torch.float64)

    def log_ratio(self, prompt_index: Tensor, completion_ids: list[list[int]]) -> Tensor:
        if not self.has_proposal:
            return torch.zeros(len(completion_ids), dtype=torch.float64)
        prior, proposal = (self.log_probs(t, prompt_index, completion_ids) for t in (self.prior, self.proposal))
        return prior - proposal

    def evaluate(self, prompt_index: Tensor, completion_ids: list[list[int]]) -> Completions:
        texts = self.decode(completion_ids)
        rewards = torch.tensor([text.count("a") - text.count("b") / 2 for text in texts], dtype=torch.float64)
        rewards = (rewards + prompt_index).unsqueeze(1)
        phi = self.target(rewards, Context(torch.zeros(len(texts)), prompt_index))
        ended = torch.tensor([row[-1:] == [EOS] for row in completion_ids], dtype=torch.bool)
        log_weights = log_weights_of(phi, self.log_ratio(prompt_index, completion_ids))
        known = {"rewards": rewards, "phi": phi, "log_weights": log_weights}
        return Completions(self.prompts, self.prompt_ids, prompt_index, completion_ids, texts, ended, known)

    # --- what is known of it ---------------------------------------------------------------------------------------

    def outcomes(self) -> list[tuple[int, ...]]:
        """All 15 completions."""
        ended = [(*p, EOS) for length in range(LENGTH) for p in itertools.product(range(2), repeat=length)]
        return ended + list(itertools.product(range(2), repeat=LENGTH))

    def all_candidates(self, prompt: int) -> Completions:
        rows = [list(row) for row in self.outcomes()]
        return self.evaluate(torch.full((len(rows),), prompt), rows)

    def log_proposal(self, prompt: int) -> Tensor:
        rows = [list(row) for row in self.outcomes()]
        return self.log_probs(self.proposal, torch.full((len(rows),), prompt), rows)

    def log_unnormalized(self, prompt: int) -> Tensor:
        """log P of all outcomes."""
        return self.log_proposal(prompt) + self.all_candidates(prompt).log_weights

    def posterior(self, prompt: int) -> Tensor:
        return self.log_unnormalized(prompt).softmax(dim=0)

    def log_z(self, prompt: int) -> float:
        return self.log_unnormalized(prompt).logsumexp(dim=0).item()

    def of_prompt(self, draws: Any, prompt: int) -> list[list[int]]:
        """The completions that were drawn of one prompt."""
        pairs = zip(draws.completion_ids, draws.prompt_index.tolist(), strict=True)
        return [row for row, p in pairs if p == prompt]

    def frequencies(self, completion_ids: Sequence[Sequence[int]]) -> Tensor:
        """Numbers of each outcome (15,)."""
        place = {row: i for i, row in enumerate(self.outcomes())}
        return torch.bincount(
            torch.tensor([place[tuple(row)] for row in completion_ids]), minlength=len(place)
        ).double()


@pytest.fixture
def table_source() -> type[TableSource]:
    return TableSource


@pytest.fixture
def p_value() -> Callable[[Tensor, Tensor], float]:
    """That counts `(K,)` come from a law `(K,)`."""
    return lambda observed, law: chi_square_p_value(observed, law * observed.sum())


@pytest.fixture
def rng() -> numpy.random.Generator:
    return numpy.random.default_rng(7)


@pytest.fixture
def tilt() -> Tilt:
    return Tilt(beta=0.7)
