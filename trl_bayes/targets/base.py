"""What a target is: log-evidence phi(x, y) computed from rewards."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch


class Target(ABC):
    """
    A distribution to approximate: the prior updated by evidence, `p(y|x) ∝ pi_0(y|x) exp(phi(x, y))`.

    A target turns the rewards of a completion into its log-evidence `phi` in nats. It knows no model and no trainer;
    the trainer tells it the names and weights of the reward functions with [`~Target.bind`] before it is used. See
    [RL with KL penalties is better viewed as Bayesian inference](https://huggingface.co/papers/2205.11275).

    Write your own by subclassing: implement [`~Target.log_evidence`], and set `hard = True` if `phi` can be `-inf`.

    Args:
        rewards (`str` or `list[str]`, *optional*):
            Names of the reward functions that this target reads (a function's `__name__`, or the last part of a reward
            model's id). Defaults to all of them.
    """

    hard: bool = False
    """Whether `phi` can be `-inf`, i.e. the posterior gives zero probability to some completions."""

    def __init__(self, rewards: str | Sequence[str] | None = None):
        self.rewards = [rewards] if isinstance(rewards, str) else None if rewards is None else list(rewards)
        if self.rewards is not None and not self.rewards:
            raise ValueError(
                f"`{type(self).__name__}(rewards=[])` reads no reward: name at least one, or leave it out."
            )
        self._columns: list[int] | None = None
        self._weights: torch.Tensor | None = None

    @abstractmethod
    def log_evidence(self, rewards: torch.Tensor) -> torch.Tensor:
        """
        Log-evidence of each completion.

        Args:
            rewards (`torch.Tensor`):
                Rewards of shape `(N, K)`, one column per reward function; `NaN` where a function does not apply.

        Returns:
            `torch.Tensor`: `phi` of shape `(N,)` in nats, in `[-inf, inf)`; `NaN` marks a completion that has no
            reward at all and is left out of the update.
        """

    def bind(self, reward_names: Sequence[str], reward_weights: torch.Tensor | None = None) -> None:
        """
        Resolves the names of the reward functions to columns.

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
        self._columns = None if self.rewards is None else [names.index(name) for name in self.rewards]
        self._weights = reward_weights

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

    def settings(self) -> dict[str, Any]:
        """What defines this target, for its `repr` and to recognise a checkpoint of another target."""
        return {} if self.rewards is None else {"rewards": self.rewards}

    def state_dict(self) -> dict[str, Any]:
        """What this target has learnt and must survive a checkpoint; empty for a closed-form target."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - nothing to restore by default
        """Restores what [`~Target.state_dict`] saved."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.settings().items())})"
