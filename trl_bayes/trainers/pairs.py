"""Pairs of a completion of the policy and one of the prior: how they stand in a batch, and what is logged of them."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch.nn.functional import pad

from ..estimators import PairTerms, PreferenceLoss
from .batches import own_tokens


T = TypeVar("T")


def alternate(of_policy: Sequence[T], of_prior: Sequence[T]) -> list[T]:
    """The rows of a generated batch: one of the policy, one of the prior, and so on, so that pairs stand together."""
    return [each for pair in zip(of_policy, of_prior, strict=True) for each in pair]


def by_pairs(values: torch.Tensor) -> torch.Tensor:
    """`(M, 2, ...)` from the rows `(2M, ...)` of a generated batch, the policy's first."""
    return values.unflatten(0, (-1, 2))


def batch_of_pairs(output: dict[str, Any]) -> dict[str, torch.Tensor]:
    """
    A generated batch with a pair as one row, so that TRL's shuffle keeps pairs together: `M` rows instead of `2M`.

    Args:
        output (`dict`): a generated batch and the [`~trl_bayes.estimators.PairTerms`] of its pairs.
    """
    pairs = {name: output[name][0::2] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    pairs |= {f"prior_{name}": output[name][1::2] for name in ("completion_ids", "completion_mask")}
    return pairs | {name: output[name] for name in PairTerms._fields}


def completions_of(pairs: dict[str, Any], pad_token_id: int) -> dict[str, torch.Tensor]:
    """The `2M` completions of `M` pairs as a batch for TRL's scorer: the policy's, and then the prior's."""
    width = max(pairs["completion_ids"].size(1), pairs["prior_completion_ids"].size(1))

    def both(name: str, value: int) -> torch.Tensor:
        two = [pairs[f"completion_{name}"], pairs[f"prior_completion_{name}"]]
        return torch.cat([pad(each, (0, width - each.size(1)), value=value) for each in two])

    return {
        **{name: pairs[name].repeat(2, 1) for name in ("prompt_ids", "prompt_mask")},
        "completion_ids": both("ids", pad_token_id),
        "completion_mask": both("mask", 0),
    }


def generation_metrics(
    output: dict[str, Any], log_ratio: torch.Tensor, log_policy: torch.Tensor, accelerator: Accelerator
) -> dict[str, float]:
    """
    What is logged of a generated batch, over all processes, under the names of TRL's XPOTrainer.

    Args:
        output (`dict`): a generated batch, with `scores` `(B,)`, `NaN` where there is none, and `ended` `(B,)`.
        log_ratio, log_policy (`torch.Tensor`): `log pi - log pi_0` and `log pi` of both of each pair, `(M, 2)`.
        accelerator ([`~accelerate.Accelerator`]): of the trainer.
    """
    scores, ended = by_pairs(output["scores"]), by_pairs(output["ended"]).float()
    values = {
        "objective/kl": log_ratio[:, 0],
        "objective/entropy": -log_policy[:, 0],
        "objective/model_scores": scores[:, 0],
        "objective/ref_scores": scores[:, 1],
        "objective/scores_margin": scores[:, 0] - scores[:, 1],
        "val/model_contain_eos_token": ended[:, 0],
        "val/ref_contain_eos_token": ended[:, 1],
        "pairs/judged_frac": output["usable"].float(),
    }
    return _means(values, accelerator)


def loss_metrics(
    log_policy: torch.Tensor,
    terms: PairTerms,
    parts: tuple[torch.Tensor, torch.Tensor],
    loss: PreferenceLoss,
    accelerator: Accelerator,
) -> dict[str, float]:
    """
    What is logged of a micro-batch of pairs, over all processes, under the names of TRL's XPOTrainer.

    Args:
        log_policy (`torch.Tensor`): `log pi` of both of each pair, `(M, 2)`, in nats.
        terms ([`~trl_bayes.estimators.PairTerms`]): of the pairs.
        parts (`tuple`): from [`~trl_bayes.estimators.PreferenceLoss.losses`], `(M,)` each.
        loss ([`~trl_bayes.estimators.PreferenceLoss`]): the loss.
        accelerator ([`~accelerate.Accelerator`]): of the trainer.
    """
    log_policy, usable = log_policy.detach(), terms.usable
    preferred = terms.preference >= 0.5  # the policy's
    implicit = loss.beta * (log_policy - terms.log_prior)  # (M, 2), the reward that the policy stands for

    def of(values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        chosen = torch.where(place, values[:, 0], values[:, 1])
        return chosen.masked_fill(~usable, torch.nan)

    margins = of(implicit, preferred) - of(implicit, ~preferred)
    certain = (terms.preference - 0.5).abs() * 2  # how much the label says
    values = {
        "loss/dpo": parts[0].detach(),
        "loss/xpo": parts[1].detach(),
        "logps/chosen": of(log_policy, preferred),
        "logps/rejected": of(log_policy, ~preferred),
        "rewards/chosen": of(implicit, preferred),
        "rewards/rejected": of(implicit, ~preferred),
        "rewards/margins": margins,
        "rewards/accuracies": torch.where(margins.isnan() | (certain == 0), torch.nan, (margins > 0).float()),
    }
    return _means(values, accelerator)


def entropy_metric(entropies: torch.Tensor, inputs: dict[str, Any], accelerator: Accelerator) -> dict[str, float]:
    """The policy's entropy per token, in nats, over the tokens `(B, T)` of all completions."""
    mask = own_tokens(inputs)
    sums = torch.stack([(entropies * mask).sum(), mask.sum().float()])
    total, tokens = accelerator.reduce(sums.detach(), reduction="sum").tolist()
    return {"entropy": total / max(tokens, 1.0)}


def _means(values: dict[str, torch.Tensor], accelerator: Accelerator) -> dict[str, float]:
    """The mean of each over all processes, without what is `NaN`; one that is `NaN` everywhere is left out."""
    stacked = torch.stack([value.float() for value in values.values()])  # (N, M)
    known = ~stacked.isnan()
    sums = torch.stack([stacked.nan_to_num(nan=0.0).sum(dim=1), known.sum(dim=1).float()])
    totals, counts = accelerator.reduce(sums, reduction="sum").tolist()
    found = zip(values, totals, counts, strict=True)
    return {name: total / count for name, total, count in found if count > 0}
