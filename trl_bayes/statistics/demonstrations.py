"""How far a clone is from the expert whose demonstrations it has read, and the temperature that follows from it."""

import math

import torch

from .estimate import Estimate


def kl_from_expert(log_clone: torch.Tensor, expert_entropy: float = 0.0) -> Estimate:
    """
    `KL(expert||clone) = -E[log clone(y)] - H(expert)`, from demonstrations that the clone has not read.

    The entropy of the expert is not in its demonstrations. With 0, which it is for an expert that has one completion
    for a prompt, the estimate is the cross-entropy and so an upper bound; with any lower bound of H it is one too.

    Args:
        log_clone (`torch.Tensor`): `log clone(y|x)` of held-out demonstrations, `(N,)`, in nats.
        expert_entropy (`float`, *optional*, defaults to `0.0`): H, in nats a completion.

    Returns:
        [`~trl_bayes.statistics.estimate.Estimate`]: in nats a completion; infinite if the clone excludes one of them.

    Raises:
        ValueError: there are none.
    """
    if not len(log_clone):
        raise ValueError("There is no held-out demonstration to measure the clone by: set `held_out` above 0.")
    losses = -log_clone.double()
    error = losses.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return Estimate(losses.mean().item() - expert_entropy, error)


def temperature_by_rule(epsilon: float, kl: float) -> float:
    """
    The paper's `lambda = epsilon / KL(expert||clone)`: then what the penalty costs the expert is `epsilon`.

    With a reward r and the clone as prior, the maximum of `E[r] - lambda KL(pi||clone)`, found to accuracy `epsilon`,
    is at most `2 epsilon` below the expert. A larger KL, such as an upper bound, gives a smaller lambda and keeps
    that: [Demonstration-Regularized RL](https://huggingface.co/papers/2310.17303).

    Args:
        epsilon (`float`): how much reward may be lost, positive, in units of the reward.
        kl (`float`): in nats a completion.

    Returns:
        `float`: in units of reward per nat: a trainer's `beta`.

    Raises:
        ValueError: `epsilon` is not positive, or the KL is infinite or not positive; one sentence.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"`epsilon={epsilon}` must be a positive amount of reward.")
    if not math.isfinite(kl):
        raise ValueError(
            "The clone excludes a held-out demonstration, so KL(expert||clone) is infinite and no `beta` follows from "
            "it: give the clone a floor by `prior_demonstrations`."
        )
    if not kl > 0:
        raise ValueError(
            f"KL(expert||clone) is measured as {kl:.4g}, from which no `beta` follows: lower `expert_entropy`, hold "
            "out more demonstrations, or set `beta` to a number."
        )
    return epsilon / kl
