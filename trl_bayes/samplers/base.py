"""What all samplers share: the draws that they return, what a method is, and the sampler that applies it to models."""

import copy
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..language_models.samples import Prompt, RewardFunction
from ..language_models.vocabulary import check_same_vocabulary
from ..prior import PriorModel, PriorScores, sample_prior
from ..targets import Target
from .language_model import LanguageModelSource
from .source import Candidates, CompletionSource, check_support, concatenate


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, eq=False)
class Draws:
    """
    Samples of (an approximation of) the posterior, ordered by prompt.

    Attributes:
        prompts (`list`): the P prompts.
        prompt_ids (`list[list[int]]`): their tokens.
        prompt_index (`torch.Tensor`): (M,) int64, which prompt a completion continues.
        completion_ids (`list[list[int]]`): M lists of tokens, the terminal EOS included.
        texts (`list[str]`): the M completions as text, without special tokens.
        ended (`torch.Tensor`): (M,) bool, False for a completion that was cut at the limit.
        log_weights (`torch.Tensor`):
            (M,) float64, in nats, up to a constant for each prompt: weighted by them, the draws approximate the
            posterior better than the law they were drawn from. 0 where there is nothing to correct.
        rewards (`torch.Tensor`): (M, K) float64; NaN where a reward is missing.
        phi (`torch.Tensor`): (M,) float64, log-potential in nats.
        diagnostics (`dict[str, Any]`): what the method says about its draws; strict JSON.
    """

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    prompt_index: Tensor
    completion_ids: list[list[int]]
    texts: list[str]
    ended: Tensor
    log_weights: Tensor
    rewards: Tensor
    phi: Tensor
    diagnostics: dict[str, Any]

    def __len__(self) -> int:
        return len(self.completion_ids)

    def to_dataset(self, tokens: bool = False) -> "Dataset":
        """
        A data set in TRL's prompt-completion format, which [`~trl.SFTTrainer`] reads as it is.

        The columns are `prompt`, `completion` (a list with the assistant's message where the prompt is one of
        messages), `log_weight`, `rewards` (a list, null where one is missing), `log_potential` and `ended`.

        From texts `SFTTrainer` makes tokens again, which need not be those that were drawn, and it ends each
        completion with EOS, also one that was cut.

        Args:
            tokens (`bool`, *optional*, defaults to `False`):
                Adds `input_ids` and `completion_mask`, the tokens as they were drawn, which `SFTTrainer` then uses:
                maximum likelihood of exactly these draws, by a model with the prior's tokenizer.
        """
        from datasets import Dataset  # only whoever writes a data set needs it

        index = self.prompt_index.tolist()
        prompts = [self.prompts[i] for i in index]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, self.texts, strict=True)
        ]
        columns: dict[str, list[Any]] = {
            "prompt": prompts,
            "completion": completions,
            "log_weight": self.log_weights.tolist(),
            "rewards": [[None if math.isnan(value) else value for value in row] for row in self.rewards.tolist()],
            "log_potential": self.phi.tolist(),
            "ended": self.ended.tolist(),
        }
        if tokens:
            pairs = [(self.prompt_ids[i], ids) for i, ids in zip(index, self.completion_ids, strict=True)]
            columns["input_ids"] = [prompt + ids for prompt, ids in pairs]
            columns["completion_mask"] = [[0] * len(prompt) + [1] * len(ids) for prompt, ids in pairs]
        return Dataset.from_dict(columns)


class Method(ABC):
    """
    A way to sample the posterior: an algorithm on completions and their weights that knows no model.

    A subclass is a frozen dataclass of the algorithm's settings, which it checks when it is made.
    """

    name: ClassVar[str]

    def check(self, target: Target, has_proposal: bool) -> None:  # noqa: B027 - most methods take any target
        """Raises `ValueError`, one sentence, for a target or a proposal that the method cannot work with."""

    @abstractmethod
    def draw(self, source: CompletionSource, n: int, rng: numpy.random.Generator) -> Draws:
        """
        Draws `n` completions of each prompt, or fewer where the method could not find them.

        Args:
            source ([`CompletionSource`]): where completions come from.
            n (`int`): at least 1.
            rng (`numpy.random.Generator`): of the method's own decisions.
        """


class Sampler:
    """
    Samples the posterior `p(y|x) ∝ pi_0(y|x) exp(phi(x, y))` without training.

        sampler = Sampler(prior, tokenizer, [parses], Constraint(), Rejection(), max_new_tokens=32)
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
        proposal ([`~transformers.PreTrainedModel`], *optional*):
            Policy with the prior's vocabulary from which completions are proposed. Defaults to the prior.
        max_new_tokens (`int`): a completion without EOS is cut after so many tokens.
        temperature (`float`, *optional*, defaults to `1.0`): of the softmax of prior and proposal.
        batch_size (`int`, *optional*, defaults to `256`): completions generated at once.
        seed (`int`, *optional*, defaults to `0`): the same seed and batch size give the same draws.
        reward_weights (`torch.Tensor`, *optional*): (K,), as the trainers'.
        num_prior_samples (`int`, *optional*, defaults to `100`): see `target`.
        prior_samples_dir (`str`, *optional*): folder in which these are kept and found, see
            [`~trl_bayes.prior.sample_prior`].
        prior_name (`str`, *optional*): folder or id that the prior was loaded from, by which they are found.
        progress (`bool`, *optional*, defaults to `False`): shows a progress bar.

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
        *,
        max_new_tokens: int,
        proposal: PreTrainedModel | None = None,
        temperature: float = 1.0,
        batch_size: int = 256,
        seed: int = 0,
        reward_weights: Tensor | None = None,
        num_prior_samples: int = 100,
        prior_samples_dir: str | None = None,
        prior_name: str | None = None,
        progress: bool = False,
    ):
        at_least("max_new_tokens", max_new_tokens)
        at_least("batch_size", batch_size)
        at_least("num_prior_samples", num_prior_samples, 2)
        at_least("seed", seed, 0)
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"`temperature` must be positive and finite, got {temperature}.")
        if not reward_funcs and target.reads_rewards:
            raise ValueError(f"The target {target!r} reads rewards: give at least one reward function.")
        if reward_weights is not None and len(reward_weights) != len(reward_funcs):
            raise ValueError(
                f"There are {len(reward_weights)} reward weights for {len(reward_funcs)} reward functions: give one "
                "for each."
            )
        target.bind([getattr(f, "__name__", f"reward_{k}") for k, f in enumerate(reward_funcs)], reward_weights)
        method.check(target, proposal is not None)
        if proposal is not None:
            check_same_vocabulary("proposal", proposal.config._name_or_path, proposal.config, prior.config, tokenizer)
        self.prior, self.proposal, self.tokenizer = prior, proposal, tokenizer
        self.reward_funcs, self.target, self.method = list(reward_funcs), target, method
        self.max_new_tokens, self.temperature, self.batch_size = max_new_tokens, temperature, batch_size
        self.seed, self.num_prior_samples, self.progress = seed, num_prior_samples, progress
        self.prior_samples_dir, self.prior_name = prior_samples_dir, prior_name

    def sample(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
        prompt_keys: Tensor | None = None,
    ) -> Draws:
        """
        Draws completions of each prompt.

        Args:
            prompts (`list`): texts, or lists of messages to which the chat template is applied.
            n (`int`): completions of each prompt. A method that cannot find so many returns fewer, with a warning.
            columns (`dict`, *optional*): further columns for the reward functions, an entry per prompt.
            prompt_keys (`torch.Tensor`, *optional*):
                (P,) int64, by which a fitted target knows the prompts. Defaults to 0, 1, ...

        Returns:
            [`Draws`]

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
            proposal=self.proposal,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            batch_size=self.batch_size,
            seed=self.seed,
            columns=columns or {},
            prompt_keys=keys,
            progress=self.progress,
        )
        if self.proposal is not None:
            check_support(source)
        # Seeds of their own for the models, the fit and the method: decisions must not follow what was drawn
        draws = self.method.draw(source, n, numpy.random.default_rng([self.seed, 1]))
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
        return replace(draws, diagnostics=common | draws.diagnostics)

    def _fitted_target(self, prompts: Sequence[Prompt], columns: Mapping[str, Sequence[Any]], keys: Tensor) -> Target:
        """The target; if it must learn from these prompts first, a copy that has done so."""
        if self.target.is_fitted:
            return self.target
        self.target.warn_of_too_few_samples(self.num_prior_samples)
        prior = PriorModel(
            self.prior,
            self.tokenizer,
            self.max_new_tokens,
            self.temperature,
            self.batch_size,
            self.seed,
            self.prior_name,
            self.progress,
        )
        scored = sample_prior(
            prior,
            prompts,
            self.reward_funcs,
            self.num_prior_samples,
            columns=columns,
            folder=self.prior_samples_dir,
        )
        shape = (len(prompts), self.num_prior_samples)
        target = copy.deepcopy(self.target)
        target.fit(PriorScores(scored.rewards.view(*shape, -1), scored.log_prior.view(shape), keys))
        return target


def as_draws(
    source: CompletionSource,
    candidates: Candidates,
    diagnostics: Mapping[str, Any],
    log_weights: Tensor | None = None,
    n: int | None = None,
) -> Draws:
    """Completions as draws, ordered by prompt; at most the first `n` of each, if it is given."""
    order = candidates.prompt_index.argsort(stable=True)
    if n is not None:
        order = order[_rank_in_prompt(candidates.prompt_index[order], len(source.prompts)) < n]
    chosen = candidates.select(order)
    weights = torch.zeros(len(candidates), dtype=torch.float64) if log_weights is None else log_weights
    return Draws(
        source.prompts,
        source.prompt_ids,
        chosen.prompt_index,
        chosen.completion_ids,
        chosen.texts,
        chosen.ended,
        weights[order],
        chosen.rewards,
        chosen.phi,
        plain(diagnostics),
    )


def _rank_in_prompt(sorted_index: Tensor, num_prompts: int) -> Tensor:
    """The place of each completion among those of its prompt, (M,) for an ascending index (M,)."""
    number = torch.bincount(sorted_index, minlength=num_prompts)
    return torch.arange(len(sorted_index)) - (number.cumsum(dim=0) - number)[sorted_index]


def no_candidates(source: CompletionSource) -> Candidates:
    """An empty set, with as many columns of rewards as any other."""
    return source.evaluate(torch.zeros(0, dtype=torch.int64), [])


def gather(source: CompletionSource, parts: Sequence[Candidates]) -> Candidates:
    """All parts, of which there may be none."""
    return concatenate(parts) if parts else no_candidates(source)


def warn_of_shortfall(draws: Draws, n: int) -> None:
    """Says so if some prompt has fewer than `n` draws."""
    number = torch.bincount(draws.prompt_index, minlength=len(draws.prompts))
    short, missing = int((number < n).sum()), n * len(draws.prompts) - len(draws)
    if short:
        warnings.warn(
            f"{short} of {len(draws.prompts)} prompts have fewer than {n} draws, {missing} are missing: "
            "their evidence is too rare for this method with this proposal and budget.",
            stacklevel=3,
        )


def at_least(name: str, number: int, least: int = 1) -> None:
    """Refuses a number below `least`."""
    if number < least:
        raise ValueError(f"`{name}` must be at least {least}, got {number}.")


def plain(value: Any) -> Any:
    """As strict JSON: a number that is not finite is `None`."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Tensor | numpy.generic):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
