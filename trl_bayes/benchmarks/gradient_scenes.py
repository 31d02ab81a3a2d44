"""Where the gradient laboratory looks: policies on the way to the posterior, and away from the prior of long texts."""

import math
import string
import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import RLOOConfig, RLOOTrainer

from ..divergences import get_divergence
from ..language_models.generation import evaluating, generate, seeded
from ..language_models.settings import SamplingSettings
from .exact_training import ExactProblem, default_arguments, ready_trainer
from .gradient_estimators import ScoredGroup
from .noise_free import NoiseFree
from .tiny import EnumerableTask, build_tiny_model


STEPS = (0, 10, 40, 160)
"""Steps on the exact gradient of the reverse KL after which a policy on the path is looked at."""

DISTANCES = (0.0, 0.05, 0.1, 0.2)
"""Standard deviations of the noise in the weights of a policy away from its prior, as shares of the weights' own."""


@dataclass(frozen=True)
class Scene:
    """
    A policy, its prior and a target, from which groups are drawn.

    Args:
        task, policy (`str`): for the table.
        model, prior ([`~transformers.PreTrainedModel`]): with one vocabulary.
        prompts (`list[list[int]]`): a draw has a group of each.
        settings ([`~trl_bayes.language_models.settings.SamplingSettings`]): of the groups.
        log_potential (`Callable`, *optional*): phi of completions `(G,)` from their tokens; `None` is the target that
            the policy itself is the posterior of.
        log_z (`list[float]`, *optional*): of each prompt.
        exact_gradient (`Callable`, *optional*): the gradient `(D,)` for a divergence by name.
        hard (`bool`, *optional*, defaults to `False`): phi can be `-inf`.
    """

    task: str
    policy: str
    model: PreTrainedModel
    prior: PreTrainedModel
    prompts: Sequence[list[int]]
    settings: SamplingSettings
    log_potential: Callable[[list[list[int]]], Tensor] | None
    log_z: Sequence[float] | None = None
    exact_gradient: Callable[[str], Tensor] | None = None
    hard: bool = False

    def draw(self, number: int, group_size: int, seed: int) -> list[list[list[list[int]]]]:
        """Tokens of completions: `number` draws, each with a group of every prompt."""
        with evaluating(self.model), seeded(seed, self.model.device):
            drawn = [generate(self.model, [prompt] * (number * group_size), self.settings) for prompt in self.prompts]
        starts = range(0, number * group_size, group_size)
        return [[of_prompt[start : start + group_size] for of_prompt in drawn] for start in starts]

    def score(self, which: int, completions: list[list[int]]) -> ScoredGroup:
        """A group of the prompt of a number, with the gradient of the policy."""
        prompt = self.prompts[which]
        longest = max(map(len, completions))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in completions])  # (G, T)
        own = torch.tensor([[place < len(row) for place in range(longest)] for row in completions])
        inputs = torch.cat([torch.tensor(prompt).expand(len(ids), -1), ids], dim=1)[:, :-1]
        policy = _log_probs(self.model, inputs, longest)  # (G, T, V)
        with torch.no_grad():
            prior = _log_probs(self.prior, inputs, longest)
        chosen, of_prior = (each.gather(2, ids.unsqueeze(2)).squeeze(2).where(own, 0.0) for each in (policy, prior))
        kl = (policy.exp() * (policy - prior)).sum(dim=2).where(own, 0.0)
        itself = (chosen.detach() - of_prior).sum(dim=1)
        phi = itself if self.log_potential is None else self.log_potential(completions).double()
        return ScoredGroup(chosen, of_prior, kl, phi, None if self.log_z is None else self.log_z[which])


def _log_probs(model: nn.Module, inputs: Tensor, length: int) -> Tensor:
    """Of every next token at the last `length` positions, `(G, T, V)`, float64."""
    return torch.log_softmax(model(input_ids=inputs).logits[:, -length:].double(), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks whose completions are known


def path(problem: ExactProblem, steps: Sequence[int] = STEPS) -> Iterator[Scene]:
    """The policy after some exact steps, and one that is its own posterior: the last of these with another target."""
    task = problem.task
    divergence = get_divergence("forward_kl" if problem.target.hard else "reverse_kl")
    arguments = {**default_arguments(task), "beta": 0.1, **problem.settings}
    with ready_trainer(task, RLOOTrainer, RLOOConfig, arguments, reward_funcs=task.reward_func) as ready:
        training, tokenizer = NoiseFree(ready, task, problem.log_potential, divergence), ready.tokenizer
        prompts: Any = tokenizer(text=list(task.prompts))["input_ids"]

        def log_potential(completions: list[list[int]]) -> Tensor:
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
            return problem.log_potential(torch.tensor(task.reward(texts), dtype=torch.float64))

        scene = Scene(
            problem.name,
            "prior",
            training.model,
            _loaded(task),
            prompts,
            SamplingSettings(task.max_completion_length, stop_ids=(tokenizer.eos_token_id,)),
            log_potential,
            [posterior.log_z for posterior in training.posteriors],
            training.gradient,
            problem.target.hard,
        )
        for step in steps:
            while training.step < step:
                training.advance()
            yield replace(scene, policy="prior" if step == 0 else f"{step} steps")
        nothing = torch.zeros_like(training.gradient("forward_kl"))
        at_p = replace(scene, policy="at p", hard=False, log_potential=None, log_z=[0.0] * len(prompts))
        yield replace(at_p, exact_gradient=lambda name: nothing)


def _loaded(task: EnumerableTask) -> PreTrainedModel:
    """The task's prior; a copy of a trainer's model would not do, since TRL has bound its `forward` to the model."""
    with tempfile.TemporaryDirectory() as folder:
        return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(task.build_model(folder))).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Long completions, of which samples are all there is


_LETTERS = string.ascii_letters[:50]


def far_away(length: int) -> Iterator[Scene]:
    """
    Policies away from a random model of 50 tokens, in a random direction; and one that is its own posterior.

    The log-potential is a sum of random weights of the tokens, of standard deviation 1 over a long completion.
    """
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(folder, letters=_LETTERS)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        prior = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(folder)).eval()
    generator = torch.Generator().manual_seed(0)
    worth = torch.randn(len(tokenizer), generator=generator, dtype=torch.float64) / math.sqrt(length)

    def log_potential(completions: list[list[int]]) -> Tensor:
        return torch.stack([worth[row].sum() for row in completions])

    settings = SamplingSettings(length, stop_ids=(tokenizer.eos_token_id,))
    prompts = [tokenizer(text="a b")["input_ids"]]
    direction = [torch.randn(weight.shape, generator=generator) for weight in prior.parameters()]
    for distance in DISTANCES:
        model = deepcopy(prior)
        with torch.no_grad():
            for weight, towards in zip(model.parameters(), direction, strict=True):
                if weight.ndim > 1:
                    weight += distance * weight.std() * towards
        name = "prior" if distance == 0 else f"weights moved by {distance:g}"
        yield Scene(f"random, T={length}", name, model, prior, prompts, settings, log_potential)
    yield Scene(f"random, T={length}", "at p", model, prior, prompts, settings, None, [0.0])
