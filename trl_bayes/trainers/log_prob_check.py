"""Is the scored distribution the sampled one? The first completions are scored again, each alone and unpadded."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from trl.trainer.utils import use_adapter

from ..language_models.batching import is_exact
from ..language_models.generation import evaluating
from ..prior.drawing import MOVED
from .batches import own_tokens
from .generation_check import refuse_other_generation
from .metrics import mean_over_processes


NUM_CHECKED = 4
"""Completions that each process checks, once."""

TOLERANCE = 0.003
"""Largest mean difference of a token's log-probability, in nats, for float32."""

TOLERANCE_OF_ROUNDING = 0.1
"""The same for bfloat16 and float16, and between vLLM's kernels and transformers'."""


class Check(NamedTuple):
    """Log-probabilities that are to be those of a model."""

    whose: str
    """For the message, such as `"policy's"`."""
    model: Any
    scored: torch.Tensor
    """Per-token log-probabilities of the whole batch, `(B, T)`, in nats; NaN where there is none."""
    using: Callable[[], AbstractContextManager[Any]] = nullcontext
    """In which the model is the one that was scored, such as an adapter switched off."""
    source: str | None = None
    """What has scored, if not the trainer: where the cause of a difference then is, one of [`CAUSES`]."""


Batch = dict[str, Any]
Scorer = Callable[[torch.nn.Module, Batch], torch.Tensor]
"""The trainer's own scoring of a batch: per-token log-probabilities `(B, T)`."""


def refuse_inexact(trainer: Any, score: Scorer, batch: Batch, policy: torch.Tensor) -> None:
    """
    Refuses to train where a trainer's scores of a few completions differ from those of a plain forward pass.

    Nor may those that `generate` samples from: [`~trl_bayes.trainers.generation_check.refuse_other_generation`] is
    called too. Every process must call it, with as many completions.

    Args:
        trainer ([`~trl.GRPOTrainer`]): whose policy, prior and vLLM are checked.
        score (`Callable`): its scorer, to find the cause of a difference.
        batch (`dict`): a generated batch.
        policy (`torch.Tensor`): the policy's per-token log-probabilities `(B, T)`.

    Raises:
        ValueError: one sentence that says what differs, by how much, and the likely cause.
    """
    checks = [Check("policy's", trainer.model, policy)]
    if "sampling_per_token_logps" in batch:
        whose, source = ("vLLM's", "vllm") if trainer.rollout_func is None else ("`rollout_func`'s", "rollout_func")
        checks.append(Check(whose, trainer.model, batch["sampling_per_token_logps"], source=source))
    if "ref_per_token_logps" in batch:
        prior = trainer.model if trainer.ref_model is None else trainer.ref_model
        checks.append(Check("prior's", prior, batch["ref_per_token_logps"], lambda: as_prior(trainer)))
    rows = choose_rows(batch)
    own = own_tokens(batch)[rows].bool()
    for check in checks:
        _refuse_one(check, trainer, score, batch, rows, own)
    _refuse_other_start(trainer, batch, policy)
    refuse_other_generation(trainer, batch)


def _refuse_one(
    check: Check, trainer: Any, score: Scorer, batch: Batch, rows: torch.Tensor, own: torch.Tensor
) -> None:
    """Refuses one of the checks, of these rows `(C,)` and their own tokens `(C, T)`."""
    with check.using(), evaluating(check.model):
        plain = plain_log_probs(check.model, batch, rows, trainer.temperature)
    exact = check.source is None and trainer.accelerator.mixed_precision == "no" and is_exact(check.model)
    allowed = TOLERANCE if exact else TOLERANCE_OF_ROUNDING

    def difference(scored: torch.Tensor) -> float:
        own_part = mean_difference(scored.float(), plain, own).unsqueeze(0)
        return float(trainer.accelerator.gather(own_part).max())

    found = difference(check.scored[rows])
    if not found <= allowed:  # NaN differs
        cause = check.source or _find_cause(check, batch, rows, score, difference, allowed)
        raise ValueError(
            f"The {check.whose} log-probabilities differ by {found:.2g} nats per token from those of a plain forward "
            f"pass (rounding explains {allowed:.2g}), so the result would not be the posterior: {CAUSES[cause]} "
            "`check_log_probs=False` trains all the same."
        )


def _refuse_other_start(trainer: Any, batch: Batch, policy: torch.Tensor) -> None:
    """
    Refuses to begin where policy and prior differ and no prior was named: TRL takes the prior from where the model was
    loaded from, and not as it is in memory.

    Raises:
        ValueError: one sentence.
    """
    named = trainer.args.prior_model_name_or_path is not None
    if named or trainer.state.global_step > 0 or "ref_per_token_logps" not in batch or _learns_a_prompt(trainer):
        return
    # An estimate of KL(pi||pi_0), which rounding does not raise
    difference = (policy - batch["ref_per_token_logps"]).float()
    distance = mean_over_processes(difference, own_tokens(batch), trainer.accelerator)
    if not distance <= MOVED:  # NaN differs
        raise ValueError(
            f"Before the first update the policy is {distance:.2g} nats per token from the prior, which is what the "
            "model was loaded from: save a model that was changed in memory (by a merged adapter, for instance) and "
            "load it from there, give an adapter an `init_lora_weights` that leaves the model as it is (`True`), or "
            "name the prior in `prior_model_name_or_path`. `check_log_probs=False` trains all the same."
        )


def _learns_a_prompt(trainer: Any) -> bool:
    """Whether the adapter is virtual tokens, which change the model from the beginning, and what they start from is
    no prior of anybody's."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return is_peft_model(model) and model.active_peft_config.is_prompt_learning


@contextmanager
def as_prior(trainer: Any) -> Iterator[None]:
    """
    The prior's adapters, or none, where prior and policy share a model.

    Args:
        trainer ([`~trl.GRPOTrainer`]): of the two.
    """
    if trainer.ref_model is not None:
        yield
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
        yield


def choose_rows(batch: Batch) -> torch.Tensor:
    """
    The rows to check, at most [`NUM_CHECKED`]: those with the shortest prompts, so the most padding, come first.

    Rows with images are not checked: they need more than their tokens.
    """
    lengths = batch["prompt_mask"].sum(dim=1)
    return lengths.argsort(stable=True)[: 0 if batch.get("num_images") is not None else NUM_CHECKED]


@torch.no_grad()
def plain_log_probs(model: Callable[..., Any], batch: Batch, rows: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    Per-token log-probabilities of some completions, each by a forward pass of its own without padding, `(C, T)`.

    Args:
        model (`Callable`): the model, in evaluation mode.
        batch (`dict`): a generated batch.
        rows (`torch.Tensor`): which of its completions, `(C,)`.
        temperature (`float`): of the softmax.
    """
    found = torch.zeros(len(rows), batch["completion_ids"].size(1), device=batch["completion_ids"].device)
    for place, row in enumerate(rows.tolist()):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        logits = model(input_ids=torch.cat([prompt, completion]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        logps = (logits.float() / temperature).log_softmax(dim=1).gather(1, completion.unsqueeze(1)).squeeze(1)
        found[place, : len(completion)] = logps
    return found


def mean_difference(scored: torch.Tensor, plain: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """
    The mean absolute difference of a token's log-probability, a scalar in nats.

    Args:
        scored, plain (`torch.Tensor`): per-token log-probabilities `(C, T)`; tokens that could not be scored (NaN) are
            left out.
        own (`torch.Tensor`): boolean `(C, T)`, the policy's own tokens.
    """
    differences = (scored - plain).abs()[own & ~scored.isnan()]
    return differences.mean() if differences.numel() else plain.new_zeros(())


def _find_cause(
    check: Check,
    batch: Batch,
    rows: torch.Tensor,
    score: Scorer,
    difference: Callable[[torch.Tensor], float],
    allowed: float,
) -> str:
    """Scores again, first without noise, then without padding: what helps is the cause."""
    with torch.no_grad(), check.using(), evaluating(check.model):
        if difference(score(check.model, batch)[rows]) <= allowed:
            return "noise"
        alone = torch.zeros(len(rows), batch["completion_ids"].size(1), device=batch["completion_ids"].device)
        for place, row in enumerate(rows.tolist()):
            unpadded = _unpadded(batch, row)
            alone[place, : unpadded["completion_ids"].size(1)] = score(check.model, unpadded)[0]
        return "padding" if difference(alone) <= allowed else "head"


def _unpadded(batch: Batch, row: int) -> Batch:
    """One completion as a batch of its own."""
    masks = {name: batch[f"{name}_mask"][row].bool() for name in ("prompt", "completion")}
    return {
        f"{name}_{what}": batch[f"{name}_{what}"][row : row + 1, kept]
        for name, kept in masks.items()
        for what in ("ids", "mask")
    }


CAUSES = {
    "noise": "the model adds noise in training mode, such as dropout; set `disable_dropout=True`, or the rates in the "
    "model's configuration to 0.",
    "padding": "the model reads a padded prompt differently, for instance by positions that count the padding; use "
    "prompts of equal length, or a model that `generate` gives positions to.",
    "head": "the model transforms its logits in a way that TRL's fused language-model head does not know; use another "
    "architecture.",
    "vllm": "the sampler reports them before the temperature is applied, or has other weights; start a vLLM server "
    "with `--logprobs-mode processed_logprobs`, or set `temperature=1.0`.",
    "rollout_func": "as `logprobs` it must return those of the tokens that it has sampled, by the policy's present "
    "weights at `temperature`; return these, or `None` where it samples from exactly these.",
}
"""What is likely wrong, and what to do about it."""
