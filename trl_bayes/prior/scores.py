"""Scored samples of the prior as tensors: what targets learn from, and what they say about the marginal likelihood."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..groups import pooled_log_z
from ..rewards.calling import without_infinite
from .context import Context, LogPotential


@dataclass(frozen=True, eq=False)
class PriorScores:
    """
    `N` samples of the prior for each of `P` prompts, with the `K` rewards of each.

    A prompt with fewer samples, or a sample that could not be scored, is filled up with `NaN`. A sample with an
    infinite reward is left out, as it is in training. The tensors are kept on the CPU.

    Args:
        rewards (`torch.Tensor`): shape `(P, N, K)`; `NaN` where a reward is missing.
        log_prior (`torch.Tensor`): `log pi_0(y|x)` of shape `(P, N)`, in nats.
        keys (`torch.Tensor`): identity of each prompt, int64 of shape `(P,)`, all different.
        multiplicity (`torch.Tensor`, *optional*):
            How often each prompt occurs in the training data, `(P,)`: its weight in what a target learns across
            prompts. 0 for a prompt of the evaluation alone, of which a target only learns what concerns that prompt.
            Defaults to ones.
        log_weights (`torch.Tensor`, *optional*):
            Log-potential that is already there, `(P, N)` in nats: that of the other factors of a product. Defaults to
            none.
        scored (`torch.Tensor`, *optional*):
            Boolean `(P, N)`: which samples the other factors can score, so that they count without rewards of one's
            own. Defaults to none.

    Raises:
        ValueError: shapes that do not match, fewer than two samples, a prompt twice, or a multiplicity that is none.
    """

    rewards: torch.Tensor
    log_prior: torch.Tensor
    keys: torch.Tensor
    multiplicity: torch.Tensor = None  # type: ignore[assignment]  # a tensor from `__post_init__` on
    log_weights: torch.Tensor | None = None
    scored: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.rewards.shape)
        if len(shape) != 3 or tuple(self.log_prior.shape) != shape[:2] or tuple(self.keys.shape) != shape[:1]:
            raise ValueError(
                "`PriorScores` takes rewards (P, N, K), log_prior (P, N) and keys (P,), got "
                f"{shape}, {tuple(self.log_prior.shape)} and {tuple(self.keys.shape)}."
            )
        if shape[0] == 0 or shape[1] < 2:
            raise ValueError(
                f"Learning from the prior takes at least 1 prompt and 2 samples of each, got {shape[0]} and "
                f"{shape[1]}: draw more prior samples."
            )
        if len(self.keys.unique()) != shape[0]:
            raise ValueError("The prompts of `PriorScores` must have different keys: give each prompt once.")
        weights = torch.ones(shape[0]) if self.multiplicity is None else self.multiplicity
        if weights.shape != shape[:1] or not (weights.isfinite() & (weights >= 0)).all() or not weights.any():
            raise ValueError(
                "`multiplicity` says how often each prompt occurs in the training data: give one number of 0 or more "
                f"for each of the {shape[0]} prompts, not all of them 0, not {weights.tolist()}."
            )
        object.__setattr__(self, "multiplicity", weights.double())
        for name in ("rewards", "log_prior", "keys", "multiplicity", "log_weights", "scored"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, values.detach().cpu())
        object.__setattr__(self, "rewards", without_infinite(self.rewards)[0])

    def context(self, prompt: int) -> Context:
        """The context of one prompt's samples."""
        return Context(self.log_prior[prompt], self.keys[prompt].expand(self.log_prior.size(1)))

    def log_potential(self, target: LogPotential) -> torch.Tensor:
        """`phi` of all samples, `(P, N)` in nats; `NaN` where a sample has no reward."""
        # Prompt by prompt: a target may compare each completion with all samples of its prompt
        return torch.stack([target(rewards, self.context(i)) for i, rewards in enumerate(self.rewards)])

    def under(self, phi: torch.Tensor, scored: torch.Tensor) -> "PriorScores":
        """The same samples weighted by `exp(phi)` besides; `phi` and whom it scores, both `(P, N)`."""
        return replace(
            self,
            log_weights=phi if self.log_weights is None else self.log_weights + phi,
            scored=scored if self.scored is None else self.scored | scored,
        )


def log_z_from_prior(phi: torch.Tensor) -> torch.Tensor:
    """
    The marginal likelihood from samples of the prior: `log Z = log mean_i exp(phi_i)`.

    `Z` is estimated without bias. [`~trl_bayes.statistics.log_z.log_z_per_prompt`] has the error as well.

    Args:
        phi (`torch.Tensor`): log-potential `(P, N)` of samples of the prior, in nats; `NaN` leaves a sample out.

    Returns:
        `torch.Tensor`: `log Z` of each prompt, `(P,)` in nats; `-inf` where all samples have `phi = -inf`, `NaN` where
        none was scored.
    """
    valid = ~phi.isnan()
    return torch.where(valid.any(dim=1), pooled_log_z(phi.double(), valid), torch.nan)


class PromptTable(NamedTuple):
    """A row of values for each prompt, found by the prompt's key."""

    keys: torch.Tensor  # (P,) int64, ascending
    values: torch.Tensor  # (P, ...)

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> "PromptTable":
        """The table of `keys` `(P,)` and `values` `(P, ...)`, in any order."""
        keys, order = keys.detach().cpu().sort()
        return cls(keys, values.detach().cpu()[order])

    def lookup(self, keys: torch.Tensor) -> torch.Tensor:
        """
        The values of some prompts, `(B, ...)` for `keys` of shape `(B,)`, on their device.

        Raises:
            ValueError: if a prompt is not in the table.
        """
        return self.values[self.rows(keys)].to(keys.device)

    def rows(self, keys: torch.Tensor) -> torch.Tensor:
        """Where some prompts stand in the table, `(B,)` on the CPU; raises as `lookup`."""
        wanted = keys.detach().cpu().to(torch.int64).contiguous()
        rows = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        unknown = self.keys[rows] != wanted
        if unknown.any():
            raise ValueError(
                f"{len(wanted[unknown].unique())} of {len(wanted.unique())} prompts have no prior samples: draw them "
                "for every prompt that is trained or evaluated on, from the same dataset."
            )
        return rows

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The table for a checkpoint; restored with `PromptTable(**state)`."""
        return self._asdict()
