"""What a target is: log-potential phi(x, y) computed from rewards."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..language_models.completions import Prompt
from ..prior import Context, PriorScores


def weighted_sum(rewards: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """
    The reward `sum_k w_k r_k` of each completion, `(N,)`; `NaN` only where no reward applies.

    It is added up in double precision and then rounded, so that the order of the terms, which may depend on the size
    of the batch, does not tell completions with the same rewards apart: ranks depend on it.

    Args:
        rewards (`torch.Tensor`): shape `(N, K)`, `NaN` where a reward does not apply.
        weights (`torch.Tensor`, *optional*): shape `(K,)`; ones by default.
    """
    weighted = rewards.double() if weights is None else rewards.double() * weights.to(rewards.device).double()
    return weighted.nansum(dim=1).to(rewards.dtype).masked_fill(rewards.isnan().all(dim=1), torch.nan)


class LogPotentialError(ValueError):
    """A target returned what no log-potential can be."""


class Target(ABC):
    """
    A distribution to approximate: the prior updated by evidence, `p(y|x) ∝ pi_0(y|x) exp(phi(x, y))`.

    A target turns the rewards of a completion into its log-potential `phi` in nats. It knows no model and no trainer;
    the trainer tells it the names and weights of the reward functions with [`~Target.bind`] before it is used. See
    [RL with KL penalties is better viewed as Bayesian inference](https://huggingface.co/papers/2205.11275).

    Write your own by subclassing, and check it with [`assert_target_contract`]:

    - implement `log_potential(rewards)`, and set `hard = True` if `phi` can be `-inf`. For most targets this is all.
    - If `phi` depends on the prompt or on the prior's probability, set `needs_context = True` and implement
      `log_potential(rewards, context=None)`: it is then called with a [`Context`].
    - If it learns from the prior, set `needs_prior_samples = True` and implement [`~Target.fit`],
      [`~Target.is_fitted`], [`~Target.state_dict`] and [`~Target.load_state_dict`].
    - If `phi` has an upper bound, say so in [`~Target.max_log_potential`]: it can then be sampled by rejection.

    Whoever evaluates a target calls it, `target(rewards, context)`, which works for all of them and refuses what no
    log-potential can be. In `trl_bayes.targets`, a recipe finds it by the name of its class (`my_target` for
    `MyTarget`).

    Args:
        rewards (`str` or `list[str]`, *optional*):
            Names of the reward functions that this target reads (a function's `__name__`, or the last part of a reward
            model's id). Defaults to all but those of weight 0.
    """

    hard: bool = False
    """Whether `phi` can be `-inf`, i.e. the posterior gives zero probability to some completions."""

    reads_rewards: bool = True
    """Whether `phi` depends on rewards, so that a completion without any cannot be scored."""

    needs_context: bool = False
    """Whether `log_potential` takes a [`Context`] as its second argument."""

    needs_prior_samples: bool = False
    """Whether [`~Target.fit`] must be called with scored samples of the prior before the target is used."""

    learns_its_bound: bool = False
    """Whether [`~Target.max_log_potential`] is known once the target is fitted, and not before."""

    fits_under_others: bool = False
    """Whether what is learned depends on the other factors of a [`Product`]: it is then fitted last, under theirs."""

    default_beta: ClassVar[float] = 1.0
    """Temperature, for a target that takes one, where neither its entries in a recipe nor the run give any."""

    def __init__(self, rewards: str | Sequence[str] | None = None):
        self.rewards = [rewards] if isinstance(rewards, str) else None if rewards is None else list(rewards)
        if self.rewards is not None and not self.rewards:
            raise ValueError(
                f"`{type(self).__name__}(rewards=[])` reads no reward: name at least one, or leave it out."
            )
        self._columns: list[int] | None = None
        self._weights: torch.Tensor | None = None

    @classmethod
    def arguments_from_config(cls, given: Mapping[str, Any], beta: float | None) -> dict[str, Any]:
        """
        The constructor's arguments from a target's entries in a recipe.

        A constructor with a parameter `beta` that must be given gets the run's temperature where the entries have
        none, and [`~Target.default_beta`] where the run has none either.

        Args:
            given (`Mapping`): the entries, without the name.
            beta (`float`, *optional*): the run's temperature, if it has one.
        """
        parameter = inspect.signature(cls).parameters.get("beta")
        takes_the_run_s = parameter is not None and parameter.default is inspect.Parameter.empty
        return {"beta": cls.default_beta if beta is None else beta, **given} if takes_the_run_s else dict(given)

    # ---------------------------------------------------------------------------------------------------------------
    # The log-potential

    @abstractmethod
    def log_potential(self, rewards: torch.Tensor) -> torch.Tensor:
        """
        Log-potential of each completion.

        A target with `needs_context = True` takes a second argument, `context: Context | None = None`.

        Args:
            rewards (`torch.Tensor`):
                Rewards of shape `(N, K)`, one column per reward function; `NaN` where a function does not apply.

        Returns:
            `torch.Tensor`: `phi` of shape `(N,)` in nats, in `[-inf, inf)`; `NaN` marks a completion that has no
            reward at all and is left out of the update.
        """

    def __call__(self, rewards: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        """
        `phi` of shape `(N,)`, in nats: [`~Target.log_potential`] with the context if this target needs it, checked.

        Raises:
            LogPotentialError: it is not one value for each completion, or is `+inf` for one.
        """
        if self.needs_context:
            # One signature in the base class, so that targets without a context need not mention it
            phi = self.log_potential(rewards, self.require_context(context))  # type: ignore[call-arg]
        else:
            phi = self.log_potential(rewards)
        if not isinstance(phi, torch.Tensor) or phi.shape != rewards.shape[:1]:
            got = tuple(phi.shape) if isinstance(phi, torch.Tensor) else type(phi).__name__
            raise LogPotentialError(
                f"The target {self!r} returned {got} as log-potential: return one value per completion, a tensor of "
                f"shape {tuple(rewards.shape[:1])}."
            )
        if (phi == torch.inf).any():
            raise LogPotentialError(
                f"The target {self!r} returned +inf as log-potential, which no posterior can have: bound it."
            )
        return phi

    def max_log_potential(self) -> float | None:
        """
        An upper bound on `phi` over all completions, in nats, if it is known from the target alone; else `None`.

        With it samples of the prior become exact samples of the posterior by rejection. A target that learns may know
        it only once it is fitted.
        """
        return None

    @property
    def will_know_its_bound(self) -> bool:
        """Whether [`~Target.max_log_potential`] will be known, once the target is fitted."""
        return self.learns_its_bound and not self.is_fitted

    def partial_log_potential(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> torch.Tensor:
        """
        `log psi`, a guess of how much evidence a completion that begins so will have, `(N,)` in nats; 0 by default.

        It guides [`~trl_bayes.samplers.SequentialMonteCarlo`]. Any guess leaves the result correct, as long as it is
        `-inf` only where no continuation can have evidence.
        """
        return torch.zeros(len(texts))

    @property
    def guesses_early(self) -> bool:
        """Whether [`~Target.partial_log_potential`] says anything: where a subclass implements it."""
        return type(self).partial_log_potential is not Target.partial_log_potential

    def require_context(self, context: Context | None) -> Context:
        """The context, which a target that needs it must have been given."""
        if context is None:
            raise ValueError(
                f"{type(self).__name__} needs to know the prompts and the prior's probabilities: call it as "
                "`target(rewards, Context(log_prior, prompt_key))`."
            )
        return context

    # ---------------------------------------------------------------------------------------------------------------
    # Reward functions by name

    def bind(self, reward_names: Sequence[str], reward_weights: torch.Tensor | None = None) -> None:
        """
        Resolves the names of the reward functions to columns.

        A target that names no rewards reads all but those of weight 0, which are only logged, as in TRL.

        Args:
            reward_names (`Sequence[str]`): names of the columns of `rewards`.
            reward_weights (`torch.Tensor`, *optional*): the trainer's `reward_weights` of shape `(K,)`.

        Raises:
            ValueError: if this target reads a reward that is not there.
        """
        names = list(reward_names)
        for name in self.rewards or []:
            if name not in names:
                raise ValueError(
                    f"The target {type(self).__name__} reads the reward {name!r}, but the reward functions are "
                    f"{names}: use one of these names."
                )
        if self.rewards is not None:
            self._columns = [names.index(name) for name in self.rewards]
        else:
            self._columns = None if reward_weights is None else reward_weights.nonzero().flatten().tolist() or None
        self._weights = reward_weights

    def names_read(self) -> list[str]:
        """Names of the reward functions that this target asks for; empty if it takes whatever there is."""
        return list(self.rewards or [])

    def select(self, rewards: torch.Tensor) -> torch.Tensor:
        """The columns of `rewards` that this target reads, `(N, K')`."""
        if self._columns is None:
            if self.rewards is not None:
                raise ValueError(f"Call `bind(reward_names)` first: {type(self).__name__} reads rewards by name.")
            return rewards
        return rewards[:, self._columns]

    def select_weights(self, rewards: torch.Tensor) -> torch.Tensor:
        """The weights of the selected columns, `(K',)`; ones if the trainer gave none."""
        if self._weights is None:
            return rewards.new_ones(self.select(rewards[:1]).size(1))
        weights = self._weights.to(rewards)
        return weights if self._columns is None else weights[self._columns]

    def weighted_sum(self, rewards: torch.Tensor) -> torch.Tensor:
        """[`weighted_sum`] of the selected rewards, `(N,)`."""
        return weighted_sum(self.select(rewards), self.select_weights(rewards))

    # ---------------------------------------------------------------------------------------------------------------
    # What is learned from the prior

    def fit(self, prior: PriorScores) -> None:  # noqa: B027 - nothing to learn by default
        """
        Learns from samples of the prior that the bound reward functions have scored.

        What is learned of each prompt by itself is learned of all of them; what is learned across prompts is an
        average over those of the training data, each as often as it occurs there (`prior.multiplicity`).

        Args:
            prior ([`PriorScores`]): rewards `(P, N, K)`, `log pi_0` `(P, N)` and keys `(P,)` of `P` prompts.

        Raises:
            ValueError: if the samples do not allow what the target asks for.
        """

    def warn_of_too_few_samples(self, num_samples: int) -> None:  # noqa: B027 - nothing to learn by default
        """
        Warns if so many samples of the prior for each prompt are too few for what this target learns from them.

        To be called before any is drawn: unlike `fit`, this needs none.
        """

    @property
    def is_fitted(self) -> bool:
        """Whether the target can be used: nothing is to be learned, or it has been (by a fit or from a checkpoint)."""
        return not self.needs_prior_samples

    def require_fitted(self) -> None:
        """Raises where the target is used before [`~Target.fit`]."""
        if not self.is_fitted:
            raise ValueError(
                f"Call `fit(prior_scores)` first: {type(self).__name__} learns from samples of the prior."
            )

    def log_z(self, keys: torch.Tensor) -> torch.Tensor | None:
        """
        The log marginal likelihood `log Z` of some prompts in closed form, for `partition="known"`.

        Args:
            keys (`torch.Tensor`): prompt keys, int64 of shape `(P,)`.

        Returns:
            `torch.Tensor`, *optional*: shape `(P,)` in nats, `NaN` for a prompt where nothing could be learned; `None`
            for a target whose `Z` has to be estimated.
        """
        return None

    def diagnostics(self) -> dict[str, float]:
        """What the fit gave, as named numbers to log and to save; empty for a target that does not learn."""
        return {}

    # ---------------------------------------------------------------------------------------------------------------
    # Identity and state

    def settings(self) -> dict[str, Any]:
        """What defines this target, for its `repr` and to recognize a checkpoint of another target."""
        return {} if self.rewards is None else {"rewards": self.rewards}

    def state_dict(self) -> dict[str, Any]:
        """What this target has learned and must survive a checkpoint; empty for a closed-form target."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - nothing to restore by default
        """Restores what [`~Target.state_dict`] saved."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.settings().items())})"
