"""Pairs of a completion of the policy and one of the prior: how they stand in a batch, and what is logged of them."""

from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.functional import pad

from ..estimators import PairTerms, PreferenceLoss
from .batches import own_tokens


_OF_PROMPT = ("prompt_ids", "prompt_mask")


def by_pairs(values: torch.Tensor) -> torch.Tensor:
    """`(M, 2, ...)` from the rows `(2M, ...)` of a generated batch, the policy's first."""
    return values.unflatten(0, (-1, 2))


def pair_terms(output: dict[str, Any]) -> PairTerms:
    """What the loss needs of the pairs of a generated batch; that it does not need the policy's score."""
    if "usable" in output:
        return PairTerms(*(output[name] for name in PairTerms._fields))
    log_prior = (output["ref_per_token_logps"].float() * own_tokens(output)).sum(dim=1)  # (2M,)
    known = ~output["preference"].isnan()
    return PairTerms(by_pairs(log_prior), output["preference"].nan_to_num(nan=0.5), known)


def batch_of_pairs(output: dict[str, Any]) -> dict[str, torch.Tensor]:
    """
    A generated batch with a pair as one row, so that TRL's shuffle keeps pairs together: `M` rows instead of `2M`.

    Args:
        output (`dict`): a generated batch. If it has a `row` the update scores the policy, and then all of it is kept
            for [`generated_batch`].
    """
    sides: tuple[str, ...] = ("completion_ids", "completion_mask")
    if "row" in output:
        number = len(output["row"])
        named = (name for name, value in output.items() if isinstance(value, torch.Tensor) and value.dim() > 0)
        sides = tuple(name for name in named if len(output[name]) == number and name not in (*_OF_PROMPT, "row"))
    pairs = {name: output[name][0::2] for name in (*_OF_PROMPT, *sides)}
    pairs |= {f"prior_{name}": output[name][1::2] for name in sides}
    if "row" in output:
        pairs["row"] = output["row"][: len(output["row"]) // 2]
    return pairs | pair_terms(output)._asdict()


def generated_batch(pairs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The batch of which [`batch_of_pairs`] has made these pairs, `2M` rows in the order of their generation."""
    order = pairs["row"].argsort()
    sides = [name for name in pairs if f"prior_{name}" in pairs]
    batch = {name: pairs[name][order].repeat_interleave(2, dim=0) for name in _OF_PROMPT}
    batch |= {name: _alternating(pairs[name][order], pairs[f"prior_{name}"][order]) for name in sides}
    return batch | {name: pairs[name][order] for name in PairTerms._fields}


def in_generated_order(values: torch.Tensor, pairs: dict[str, Any]) -> torch.Tensor:
    """`(2M, T)` of the rows of [`generated_batch`], from `(2M, T)` of those of [`completions_of`]."""
    own, of_prior = values.unflatten(0, (2, -1))
    order = pairs["row"].argsort()
    return _alternating(own[order], of_prior[order])


def _alternating(own: torch.Tensor, of_prior: torch.Tensor) -> torch.Tensor:
    return torch.stack([own, of_prior], dim=1).flatten(0, 1)


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


def _means(values: dict[str, torch.Tensor], accelerator: Accelerator) -> dict[str, float]:
    """The mean of each over all processes, without what is `NaN`; one that is `NaN` everywhere is left out."""
    stacked = torch.stack([value.float() for value in values.values()])  # (N, M)
    known = ~stacked.isnan()
    sums = torch.stack([stacked.nan_to_num(nan=0.0).sum(dim=1), known.sum(dim=1).float()])
    totals, counts = accelerator.reduce(sums, reduction="sum").tolist()
    found = zip(values, totals, counts, strict=True)
    return {name: total / count for name, total, count in found if count > 0}
