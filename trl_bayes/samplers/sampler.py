"""The sampler: a method applied to language models."""

import copy
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..language_models.completions import Completions, Prompt
from ..language_models.mixed import MixedModel
from ..language_models.settings import SamplingSettings, at_least
from ..language_models.vocabulary import check_same_vocabulary
from ..prior.reference import draw_prior
from ..rewards.calling import RewardFunction, reward_names
from ..targets import Target
from .base import Method
from .language_model import LanguageModelSource
from .source import check_support


class Sampler:
    """
    Samples the posterior `p(y|x) ∝ pi_0(y|x) exp(phi(x, y))` without training.

        settings = SamplingSettings(max_new_tokens=32)
        sampler = Sampler(prior, tokenizer, [parses], Constraint(), Rejection(), settings)
        draws = sampler.sample(["x = ", "return "], n=100)
        draws.to_dataset()  # for `SFTTrainer`: maximum likelihood on posterior samples minimizes KL(p||pi)

    Args:
        prior ([`~transformers.PreTrainedModel`]): pi_0.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the prior.
        reward_funcs (`list`): sync or async functions, as TRL's trainers call them.
        target ([`~trl_bayes.targets.Target`]):
            Gives `phi`. It is bound to these rewards here. One that learns from the prior and has not yet done so
            is fitted, for each call of `sample`, to `num_prior_samples` samples of each prompt.
        method ([`Method`]): the algorithm and its settings.
        settings ([`~trl_bayes.language_models.settings.SamplingSettings`]):
            How completions are drawn, of prior and proposal. The same ones give the same draws.
        proposal ([`~transformers.PreTrainedModel`], *optional*):
            Policy with the prior's vocabulary from which completions are proposed. Defaults to the prior.
        proposal_base ([`~transformers.PreTrainedModel`], *optional*):
            What the proposal was trained from, for a method that reads it ([`Proxy`]).
        reward_weights (`torch.Tensor`, *optional*): (K,), as the trainers'.
        num_prior_samples (`int`, *optional*, defaults to `100`): see `target`.
        prior_samples_dir (`str`, *optional*): folder in which these are kept and found, see
            [`~trl_bayes.prior.reference.draw_prior`].
        prior_name (`str`, *optional*): folder or id that the prior was loaded from, by which they are found.
        prior_seed (`int`, *optional*): of these samples. Defaults to that of the settings.

    Raises:
        ValueError: settings out of range, or that do not go together; one sentence.
    """

    def __init__(
        self,
        prior: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reward_funcs: Sequence[RewardFunction],
        target: Target,
        method: Method,
        settings: SamplingSettings,
        *,
        proposal: PreTrainedModel | None = None,
        proposal_base: PreTrainedModel | None = None,
        reward_weights: Tensor | None = None,
        num_prior_samples: int = 100,
        prior_samples_dir: str | None = None,
        prior_name: str | None = None,
        prior_seed: int | None = None,
    ):
        at_least("num_prior_samples", num_prior_samples, 2)
        if not reward_funcs and target.reads_rewards:
            raise ValueError(f"The target {target!r} reads rewards: give at least one reward function.")
        if reward_weights is not None and len(reward_weights) != len(reward_funcs):
            raise ValueError(
                f"There are {len(reward_weights)} reward weights for {len(reward_funcs)} reward functions: give one "
                "for each."
            )
        target.bind(reward_names(reward_funcs), reward_weights)
        method.check(target, proposal is not None)
        check_base(method, proposal_base is not None)
        for role, model in (("proposal", proposal), ("proposal's base", proposal_base)):
            if model is not None:
                check_same_vocabulary(role, model.config._name_or_path, model.config, prior.config, tokenizer)
        self.prior, self.tokenizer = prior, tokenizer
        self.proposal = mixed_proposal(method, prior, proposal, proposal_base)
        self.reward_funcs, self.target, self.method = list(reward_funcs), target, method
        self.settings, self.num_prior_samples = settings, num_prior_samples
        self.prior_samples_dir, self.prior_name, self.prior_seed = prior_samples_dir, prior_name, prior_seed

    def sample(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
        prompt_keys: Tensor | None = None,
    ) -> Completions:
        """
        Draws completions of each prompt.

        Args:
            prompts (`list`): texts, or lists of messages to which the chat template is applied.
            n (`int`): completions of each prompt. A method that cannot find so many returns fewer, with a warning.
            columns (`dict`, *optional*): further columns for the reward functions, an entry per prompt.
            prompt_keys (`torch.Tensor`, *optional*):
                (P,) int64, by which a fitted target knows the prompts. Defaults to 0, 1, ...

        Returns:
            [`~trl_bayes.language_models.completions.Completions`]: ordered by prompt, with `rewards`, `phi`,
            `log_weights` and the method's `diagnostics`.

        Raises:
            ValueError: no prompts, `n` below 1, or a proposal that cannot produce what the posterior can.
        """
        at_least("n", n)
        if not prompts:
            raise ValueError("There are no prompts to sample from: give at least one.")
        start = time.perf_counter()
        keys = torch.arange(len(prompts)) if prompt_keys is None else prompt_keys
        source = LanguageModelSource(
            self.prior,
            self.tokenizer,
            self.reward_funcs,
            self._fitted_target(prompts, columns or {}, keys),
            prompts,
            self.settings,
            proposal=self.proposal,
            columns=columns or {},
            prompt_keys=keys,
        )
        if self.proposal is not None:
            check_support(source)
        # Seeds of their own for the models, the fit and the method: decisions must not follow what was drawn
        draws = self.method.draw(source, n, numpy.random.default_rng([self.settings.seed, 1]))
        warn_of_shortfall(draws, n)
        common = {
            "method": self.method.name,
            "num_prompts": len(prompts),
            "num_draws": len(draws),
            "num_missing": n * len(prompts) - len(draws),
            "num_generated": source.num_generated,
            "num_tokens": source.num_tokens,
            "seconds": round(time.perf_counter() - start, 3),
        }
        return replace(draws, diagnostics={**common, **draws.diagnostics})

    def _fitted_target(self, prompts: Sequence[Prompt], columns: Mapping[str, Sequence[Any]], keys: Tensor) -> Target:
        """The target; if it must learn from these prompts first, a copy that has done so."""
        if self.target.is_fitted:
            return self.target
        self.target.warn_of_too_few_samples(self.num_prior_samples)
        reference = draw_prior(
            self.prior,
            self.tokenizer,
            prompts,
            self.reward_funcs,
            self.num_prior_samples,
            self.settings if self.prior_seed is None else replace(self.settings, seed=self.prior_seed),
            columns,
            folder=self.prior_samples_dir,
            prior_name=self.prior_name,
        )
        target = copy.deepcopy(self.target)
        target.fit(reference.scores(keys))
        return target


def check_base(method: Method, has_base: bool) -> None:
    """
    Checks that the model which the proposal was trained from is there if the method reads it, and only then.

    Raises:
        ValueError: one sentence.
    """
    if method.needs_base and not has_base:
        raise ValueError(
            f"The method {method.name!r} compares the proposal with what it was trained from: set "
            "`proposal_base_model_name_or_path`."
        )
    if has_base and not method.needs_base:
        raise ValueError(
            f"The method {method.name!r} does not read what the proposal was trained from: leave "
            "`proposal_base_model_name_or_path` out, or use the method 'proxy'."
        )


def mixed_proposal(
    method: Method, prior: PreTrainedModel, proposal: PreTrainedModel | None, base: PreTrainedModel | None
) -> PreTrainedModel | None:
    """What a method samples: the proposal, or the mixture that it makes of the models."""
    mixture = method.mixture()
    if mixture is None or proposal is None:
        return proposal
    parts = [(prior, mixture.prior), (proposal, mixture.proposal)]
    if base is not None:
        parts.append((base, mixture.base))
    return cast(PreTrainedModel, MixedModel(*zip(*parts, strict=True)))  # called and sampled as one


def warn_of_shortfall(draws: Completions, n: int) -> None:
    """Says so if some prompt has fewer than `n` draws."""
    number = draws.number_per_prompt()
    short, missing = int((number < n).sum()), n * len(draws.prompts) - len(draws)
    if short:
        warnings.warn(
            f"{short} of {len(draws.prompts)} prompts have fewer than {n} draws, {missing} are missing: "
            "their evidence is too rare for this method with this proposal and budget.",
            stacklevel=3,
        )
