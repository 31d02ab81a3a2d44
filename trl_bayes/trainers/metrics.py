"""What is logged of a generated batch: where the policy stands, and what completions are worth."""

from collections import deque

import torch
from accelerate import Accelerator

from ..estimators import Estimator, Terms, divergence_estimates
from ..groups import NEG_INF, Group, effective_sample_size
from ..partitions import LogZ


def group_metrics(group: Group, terms: Terms, log_z: LogZ, estimator: Estimator) -> dict[str, float]:
    """
    Means over prompts; a prompt for which a quantity is unknown is left out, and so is a metric unknown for all.

    Args:
        group ([`~trl_bayes.groups.Group`]): the completions, `(P, G)`.
        terms ([`~trl_bayes.estimators.Terms`]): of the loss, `(P, G)`.
        log_z ([`~trl_bayes.partitions.LogZ`]): what the partition says.
        estimator ([`~trl_bayes.estimators.Estimator`]): of the gradient.

    Returns:
        `dict[str, float]`: names as the trackers show them.
    """
    pseudo_reward = estimator.pseudo_reward(terms.sequences(group.log_policy))[terms.usable]
    metrics = {
        "posterior/frac_unscored": (~group.valid).float().mean(),
        "posterior/pseudo_reward_mean": pseudo_reward.mean(),
        "posterior/pseudo_reward_std": (pseudo_reward - pseudo_reward.mean()).square().mean().sqrt(),
    }
    if estimator.has_posterior:
        metrics |= _distances(group, log_z.of_prompt)
    values = torch.stack([value.double() for value in metrics.values()])
    return {name: value for name, value in zip(metrics, values.tolist(), strict=True) if value == value}


def _distances(group: Group, log_z: torch.Tensor) -> dict[str, torch.Tensor]:
    weights, valid = group.log_weights, group.valid
    known = log_z.masked_fill(~log_z.isfinite(), torch.nan)  # (P,)
    fit = divergence_estimates(group.log_policy, group.log_prior, group.log_target, group.log_proposal, known, valid)
    no_evidence = (weights.masked_fill(~valid, NEG_INF) == NEG_INF).all(dim=1)
    return {
        "posterior/log_z": known.nanmean(),
        "posterior/ess": effective_sample_size(weights, valid).mean(),
        "posterior/frac_no_evidence": no_evidence.float().mean(),
        **{f"posterior/{name}": estimate.nanmean() for name, estimate in fit._asdict().items()},
    }


def loss_metrics(
    entropies: torch.Tensor, mask: torch.Tensor, capped: torch.Tensor, accelerator: Accelerator
) -> dict[str, float]:
    """
    What is logged of a micro-batch, over all processes.

    Args:
        entropies (`torch.Tensor`): of the policy at each token, `(B, T)`, in nats.
        mask (`torch.Tensor`): the policy's own tokens, `(B, T)`.
        capped (`torch.Tensor`): boolean `(B,)`, on which completions the cap acts.
        accelerator ([`~accelerate.Accelerator`]): of the trainer.
    """
    sums = torch.stack([(entropies * mask).sum(), mask.sum(), capped.sum(), mask.new_tensor(capped.numel())])
    entropy, tokens, num_capped, num_sequences = accelerator.reduce(sums.float(), reduction="sum").tolist()
    return {"entropy": entropy / max(tokens, 1.0), "posterior/capped_frac": num_capped / num_sequences}


def show_advantages(table: deque[float], advantages: torch.Tensor) -> None:
    """
    Replaces TRL's own advantages by ours in its table of completions, which ends with the same batch.

    Args:
        table (`deque[float]`): the table's column.
        advantages (`torch.Tensor`): of all completions, in the order of their generation.
    """
    for _ in range(min(advantages.numel(), len(table))):
        table.pop()
    table.extend(advantages.flatten().tolist())
