"""Are samples that were found this prior's? A few are scored by it, since a model in memory can have changed."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from ..language_models.generation import evaluating
from ..prior import PriorSamples, PriorSamplesError
from .log_prob_check import NUM_CHECKED, TOLERANCE_OF_ROUNDING, as_prior, plain_log_probs


def refuse_samples_of_another_model(trainer: Any, samples: PriorSamples, rows: Sequence[dict[str, Any]]) -> None:
    """
    Compares the `log pi_0` that is kept of one completion of each of the first prompts with that of a forward pass.

    Samples are known by the files of the model that has drawn them. A model that was changed after it was loaded, such
    as by merging an adapter into it, has the files of another. A model whose weights are spread over processes
    (ZeRO-3, FSDP) is not checked: its forward passes must come in the order of the first. Every process calls it.

    Args:
        trainer ([`~trl.GRPOTrainer`]): whose prior it is.
        samples ([`~trl_bayes.prior.PriorSamples`]): of which some may be there already.
        rows (`Sequence[dict]`): of the data, in the order of the samples.

    Raises:
        PriorSamplesError: they differ by more than rounding; one sentence.
    """
    if is_deepspeed_zero3_enabled() or trainer.is_fsdp_enabled:
        return
    prompts, images, _ = trainer._tokenize_prompts([row["prompt"] for row in rows[:NUM_CHECKED]])
    if images is not None or trainer.tools or trainer.rollout_func is not None:
        return  # what the model sees besides, or tokens that are not its own
    indices = [place * samples.num_samples for place in range(len(prompts))]
    missing = set(samples.missing().tolist())
    found = {index: prompt for index, prompt in zip(indices, prompts, strict=True) if index not in missing}
    if not found:
        return
    kept = samples.completions(torch.tensor(list(found)))
    prior = trainer.model if trainer.ref_model is None else trainer.ref_model
    distance = 0.0
    with as_prior(trainer), evaluating(prior):
        for prompt, ids, log_prior in zip(found.values(), kept.completion_ids, kept.log_prior.tolist(), strict=True):
            batch = _alone(prompt, ids, trainer.accelerator.device)
            own = plain_log_probs(prior, batch, torch.tensor([0]), trainer.temperature)
            distance += abs(own.sum().item() - log_prior)
    distance /= sum(len(ids) for ids in kept.completion_ids)
    if not distance <= TOLERANCE_OF_ROUNDING:
        raise PriorSamplesError(
            f"The samples in {samples.folder} differ by {distance:.2g} nats per token from what this prior gives "
            "them, so another model has drawn them, or this one was changed after it was loaded: use another "
            "`prior_samples_dir`."
        )


def _alone(prompt: Sequence[int], completion: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
    """A completion as a batch of its own."""
    parts = {"prompt": prompt, "completion": completion}
    ids = {f"{name}_ids": torch.tensor([list(part)], device=device) for name, part in parts.items()}
    return ids | {f"{name}_mask": torch.ones(1, len(part), device=device) for name, part in parts.items()}
