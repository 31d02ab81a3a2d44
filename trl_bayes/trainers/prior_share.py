"""A share of the prior's completions in every group, taken from samples that are kept of it."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..prior import PriorSamples
from ..prior.trained_on import mark_trained_on
from .batches import row_hashes
from .further_data import rows_of
from .learning_from_prior import learn
from .posterior_trainer import PosteriorTrainer


T = TypeVar("T")


class PriorShareTrainer(PosteriorTrainer):
    """
    A [`PosteriorTrainer`] in whose groups a fixed number of completions is the prior's.

    They are drawn before the first update and kept (`num_prior_samples` for each prompt): while the policy is the
    prior, by the same backend, so that they are the prior's with adapters and vLLM too. From then on each group takes
    some of its prompt's, and the policy samples the others. All are weighted by the density of the mixture, of whoever
    drew them (the balance heuristic).
    """

    _prior_completions: Sequence[Sequence[int]] = ()  # of all rows, once they are drawn
    _place: dict[int, int] | None = None  # of a row of the data, by its key, among these
    _of_prior: list[list[int]] | None = None  # that join the batch which is being generated
    _unmarked: PriorSamples | None = None  # until the first of them does

    @property
    def _num_of_prior(self) -> int:
        """Completions of each group that are the prior's, in this mode."""
        return 0

    @property
    def _samples_prior(self) -> bool:
        """Whether samples of the prior are needed, in any mode."""
        return self._num_of_prior > 0

    @property
    def has_learned(self) -> bool:
        # The completions themselves are no part of a checkpoint
        return super().has_learned and (self._place is not None or not self._samples_prior)

    def learn_from_prior(self, again: bool = False) -> None:
        if not self._samples_prior:
            super().learn_from_prior(again)
            return
        learns_more = self.target.needs_prior_samples or self.partition.needs_prior_samples
        rows = rows_of(self, only_trained=not learns_more)
        samples = learn(self, rows, again)
        self._unmarked = samples
        self._prior_completions = samples.completions().completion_ids
        self._place = {key: place for place, key in enumerate(rows.keys.tolist())}

    def _is_of_prior(self, num_rows: int, group_size: int) -> list[bool]:
        """Whether each of this process's rows is the prior's: spread over a group, so that processes have as many."""
        number, start = self._num_of_prior, self.accelerator.process_index * num_rows
        return spread(number, group_size, range(start, start + num_rows))

    def _choose_of_prior(self, inputs: list[dict[str, Any]]) -> list[list[int]]:
        """A completion for each of the prior's rows: different ones for the rows of a prompt, while there are any."""
        assert self._place is not None  # `learn_from_prior` comes first
        hashes = row_hashes(inputs, self.accelerator.process_index * len(inputs), self._group_size)
        of_prior = self._is_of_prior(len(inputs), self._group_size)
        keys = [key for key, is_of_prior in zip(hashes, of_prior, strict=True) if is_of_prior]
        number, chosen = self.args.num_prior_samples, []
        for key, rows in groupby(keys):
            count = len(list(rows))
            order = torch.cat([torch.randperm(number) for _ in range(-(-count // number))])[:count]
            chosen += [list(self._prior_completions[self._place[key] * number + one]) for one in order.tolist()]
        return chosen

    def _generate_single_turn(
        self, prompt_ids: list, images: Any, multimodal_fields: dict, num_generations: int, *others: Any, **named: Any
    ) -> tuple[list[list[int]], list | None]:
        if self._of_prior is None:  # samples of the prior are drawn, or there is no share of it
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, *others, **named
            )
        of_prior = self._is_of_prior(len(prompt_ids), num_generations)
        own = [ids for ids, is_of_prior in zip(prompt_ids, of_prior, strict=True) if not is_of_prior]
        number = num_generations - self._num_of_prior
        ids, log_probs = super()._generate_single_turn(own, images, multimodal_fields, number, *others, **named)
        if log_probs is not None:  # of vLLM, which has not sampled the prior's
            log_probs = merge(log_probs, [[None] * len(each) for each in self._of_prior], of_prior)
        return merge(ids, self._of_prior, of_prior), log_probs

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._num_of_prior:
            return super()._generate_and_score_completions(inputs)
        if not self.has_learned:
            self.learn_from_prior()
        self._of_prior = self._choose_of_prior(inputs)
        if self.model.training:
            self._mark_as_trained_on()
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._of_prior = None

    def _mark_as_trained_on(self) -> None:
        """Says so beside the policy and beside the samples, once, for those who measure it by samples of the prior."""
        samples, self._unmarked = self._unmarked, None
        if samples is not None and self.accelerator.is_main_process:
            for folder in (Path(str(self.args.output_dir)), samples.folder):
                mark_trained_on(folder, samples.identity.fingerprint, type(self).__name__)

    def _generate_with_rewards(self, inputs: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        output, rows = super()._generate_with_rewards(inputs)
        if self._of_prior is not None:
            of_prior = self._is_of_prior(len(inputs), self._group_size)
            output["from_prior"] = torch.tensor(of_prior, device=output["completion_ids"].device)
        return output, rows


def spread(number: int, group_size: int, rows: range) -> list[bool]:
    """Which rows of a batch are chosen if `number` of every `group_size` are, as evenly as they can be."""
    places = (row % group_size for row in rows)
    return [(place + 1) * number // group_size > place * number // group_size for place in places]


def merge(of_policy: Sequence[T], of_prior: Sequence[T], is_of_prior: Sequence[bool]) -> list[T]:
    """The rows of a batch from those of the policy and those of the prior, each in their order."""
    own, others = iter(of_policy), iter(of_prior)
    return [next(others if each else own) for each in is_of_prior]
