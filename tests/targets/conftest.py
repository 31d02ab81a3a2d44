"""An enumerated prior: every completion with its probability, so that what a target learns can be checked exactly."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bayes.diagnostics.tiny import letter_count_task
from trl_bayes.targets import Context, PriorScores


class Enumerated(NamedTuple):
    """The letters task: `log pi_0` (P, M) of all M completions of P prompts, their letters, the prompts' keys."""

    log_prior: Tensor
    ids: Tensor  # (M, T)
    keys: Tensor  # (P,)

    def feature(self, letter: str, place: int | None = None) -> Tensor:
        """1[the completion has the letter, at a place if one is given], `(M,)`."""
        is_letter = self.ids == "abcdef".index(letter)
        return (is_letter.any(dim=1) if place is None else is_letter[:, place]).float()

    def sample(self, rewards: Tensor, num_samples: int, seed: int) -> PriorScores:
        """Samples of the prior with the rewards `(M, K)` of each."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(self.log_prior.exp(), num_samples, replacement=True, generator=generator)  # (P, N)
        return PriorScores(rewards[drawn], self.log_prior.gather(1, drawn).float(), self.keys)

    def context(self, prompt: int) -> Context:
        """The context of all completions of a prompt."""
        return Context(self.log_prior[prompt].float(), self.keys[prompt].expand(len(self.ids)))


@pytest.fixture(scope="session")
def enumerated(tmp_path_factory: pytest.TempPathFactory) -> Enumerated:
    task = letter_count_task()
    folder = task.build_model(tmp_path_factory.mktemp("letters"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    log_prior = task.log_probs(AutoModelForCausalLM.from_pretrained(folder), tokenizer)
    keys = torch.tensor([7, 2**59 + 3, 5, 2**59 + 2])  # far apart and not in order, as hashes are
    return Enumerated(log_prior, task.completions(tokenizer).ids, keys)
