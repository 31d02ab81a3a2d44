"""What is logged of a generated batch: where the policy stands, and what completions are worth."""

import math
from collections import deque
from typing import Any

import torch
from accelerate import Accelerator

from ..estimators import Estimator, Terms
from ..groups import NEG_INF, Group, effective_sample_size, finite_exp
from ..partitions import LogZ
from ..statistics.second_order import second_order_divergences
from ..targets import Target
from .batches import own_tokens


def group_metrics(group: Group, terms: Terms, log_z: LogZ, estimator: Estimator, target: Target) -> dict[str, float]:
    """
    Means over prompts; a prompt for which a quantity is unknown is left out, and so is a metric unknown for all.

    Args:
        group ([`~trl_bayes.groups.Group`]): the completions, `(P, G)`.
        terms ([`~trl_bayes.estimators.Terms`]): of the loss, `(P, G)`.
        log_z ([`~trl_bayes.partitions.LogZ`]): what the partition says.
        estimator ([`~trl_bayes.estimators.Estimator`]): of the gradient.
        target ([`~trl_bayes.targets.Target`]): that the policy is trained towards.

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
        metrics |= _distances(group, log_z, target.max_log_potential())
    values = torch.stack([value.double() for value in metrics.values()])
    known = {name: value for name, value in zip(metrics, values.tolist(), strict=True) if not math.isnan(value)}
    return known | {f"posterior/target/{name}": value for name, value in target.diagnostics().items()}


def _distances(group: Group, log_z: LogZ, max_log_potential: float | None) -> dict[str, torch.Tensor]:
    """
    Where the policy stands, as far as it is known.

    A group whose log-potentials are all the same has equal weights at the prior as at the posterior: it says nothing
    of Z, unless other groups of the prompt did, or no completion could have more. And a batch that has missed most of
    the posterior (the mean of p/q is not near 1) says nothing of what the policy misses. This is asked of the batch,
    not of each group: groups that are chosen by their own samples have another mean, which hides a lost mode.
    """
    weights, valid = group.log_weights, group.valid
    at_bound = (group.phi == max_log_potential).any(dim=1) if max_log_potential is not None else torch.tensor(False)
    is_known = (group.tells_z | log_z.is_informed | at_bound.to(weights.device)) & log_z.of_prompt.isfinite()
    known = log_z.of_prompt.masked_fill(~is_known, torch.nan)  # (P,)
    policy, proposal, prior, target = (
        each.double() for each in (group.log_policy, group.log_proposal, group.log_prior, group.log_target)
    )
    posterior = target - known.double().unsqueeze(1)
    fit = second_order_divergences(policy, posterior, proposal, valid & is_known.unsqueeze(1))
    kl_prior = second_order_divergences(policy, prior, proposal, valid).reverse_kl
    # A group that is on its own has missed nothing that it knows of
    from_elsewhere = torch.where(log_z.is_informed, known, NEG_INF).nan_to_num(nan=NEG_INF)
    seen = finite_exp(posterior - proposal)[valid & (is_known & log_z.is_informed).unsqueeze(1)].mean()
    missed = log_z.is_informed & ~((seen >= 0.5) & (seen <= 2))
    no_evidence = (weights.masked_fill(~valid, NEG_INF) == NEG_INF).all(dim=1)
    ess = effective_sample_size(weights, valid, from_elsewhere, group.log_policy - group.log_proposal)
    return {
        "posterior/log_z": known.nanmean(),
        "posterior/ess": ess.masked_fill(~is_known, torch.nan).nanmean(),
        "posterior/frac_no_evidence": no_evidence.float().mean(),
        "posterior/kl_prior": kl_prior.nanmean(),
        "posterior/reverse_kl": fit.reverse_kl.nanmean(),
        "posterior/forward_kl": fit.forward_kl.masked_fill(missed, torch.nan).nanmean(),
    }


def token_kl(policy: torch.Tensor, output: dict[str, Any], accelerator: Accelerator) -> dict[str, float]:
    """
    GRPO's metric `kl` from the prior, where there is one: the mean over tokens of `e^d - d - 1`, `d` the difference of
    the prior's and the policy's log-probabilities, in nats per token.

    Args:
        policy (`torch.Tensor`): per-token log-probabilities `(B, T)`.
        output (`dict`): a generated batch.
        accelerator ([`~accelerate.Accelerator`]): of the trainer.
    """
    if "ref_per_token_logps" not in output:
        return {}
    mask = own_tokens(output)
    if "from_prior" in output:
        mask = mask * ~output["from_prior"].unsqueeze(1)
    difference = output["ref_per_token_logps"].float() - policy.float()
    return {"kl": mean_over_processes(finite_exp(difference) - difference - 1, mask, accelerator)}


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
    entropy, capped_frac = means_over_processes(accelerator, (entropies, mask), (capped, torch.ones_like(capped)))
    return {"entropy": entropy, "posterior/capped_frac": capped_frac}


def mean_over_processes(values: torch.Tensor, mask: torch.Tensor, accelerator: Accelerator) -> float:
    """
    The mean of what a mask marks, over all processes; 0 where it marks nothing.

    Args:
        values (`torch.Tensor`): such as of tokens, `(B, T)`.
        mask (`torch.Tensor`): what counts, of the same shape.
        accelerator ([`~accelerate.Accelerator`]): of the trainer.
    """
    return means_over_processes(accelerator, (values, mask))[0]


def means_over_processes(accelerator: Accelerator, *marked: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    """[`mean_over_processes`] of several values with their masks, in one reduction."""
    sums = [
        torch.stack([values.masked_fill(~mask.bool(), 0).sum().float(), mask.bool().sum().float()]).detach()
        for values, mask in marked
    ]
    return [total / max(number, 1.0) for total, number in accelerator.reduce(torch.stack(sums), "sum").tolist()]


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
