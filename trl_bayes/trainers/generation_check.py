"""Is what is sampled what is scored? A few tokens are generated once, and compared with a plain forward pass."""

from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from ..language_models.batching import largest_difference, short_rows, tolerance
from ..language_models.generation import evaluating


_HOW_IT_COMPUTES = ("use_cache", "cache_implementation", "cache_config")  # settings of generation; the rest choose


def refuse_other_generation(trainer: Any, batch: dict[str, Any]) -> None:
    """
    Refuses to train where `generate` gives a token another distribution than a forward pass, which scores it.

    The shortest and the longest prompt of a batch, cut to a few tokens, are continued by three, as the trainer
    generates: behind padding, from the cache. Not checked are models spread over several processes, what others sample
    (vLLM, `rollout_func`, continuous batching), and rows with images. Every process must call it.

    Args:
        trainer ([`~trl.GRPOTrainer`]): whose policy is checked.
        batch (`dict`): a generated batch.

    Raises:
        ValueError: one sentence that says by how much they differ, and the likely cause.
    """
    is_sharded = is_deepspeed_zero3_enabled() or trainer.is_fsdp_enabled
    by_others = trainer.use_vllm or trainer.use_transformers_continuous_batching or trainer.rollout_func is not None
    if is_sharded or by_others or batch.get("num_images") is not None:
        return
    model, rows = trainer.model, _choose_rows(batch)
    given = {name: getattr(trainer.generation_config, name, None) for name in _HOW_IT_COMPUTES}
    settings = {"disable_compile": True, **{name: value for name, value in given.items() if value is not None}}

    def difference(rows: list[list[int]], **changes: Any) -> float:
        with evaluating(model):
            own = largest_difference(model, rows, trainer._tokenizer.pad_token_id, {**settings, **changes})
        return float(trainer.accelerator.gather(torch.tensor([own], device=trainer.accelerator.device)).max())

    allowed = tolerance(model, autocast=trainer.accelerator.mixed_precision != "no")
    found = difference(rows)
    if found <= allowed:
        return
    # What helps is the cause; NaN differs
    cause = "inputs"
    if difference(rows[:1]) <= allowed:
        cause = "padding"
    elif difference(rows[:1], use_cache=False) <= allowed:
        cause = "cache"
    raise ValueError(
        f"The model {type(trainer.accelerator.unwrap_model(model)).__name__} generates from another distribution than "
        f"a forward pass gives (total variation {found:.2g} at one token; rounding explains {allowed:.2g}), so the "
        f"result would not be the posterior: {CAUSES[cause]} `check_log_probs=False` trains all the same."
    )


def _choose_rows(batch: dict[str, Any]) -> list[list[int]]:
    lengths = batch["prompt_mask"].sum(dim=1)
    ends = [int(lengths.argmin()), int(lengths.argmax())]
    shortest, longest = (batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist() for i in ends)
    return short_rows(shortest, longest)


CAUSES = {
    "padding": "behind padding it continues a prompt as if the padding were part of it; use prompts of equal length, "
    "one prompt per device and batch, or another architecture.",
    "cache": "its cache of keys and values, or of states, is wrong; set `generation_kwargs={'use_cache': False}`.",
    "inputs": "its `generate` gives the model other inputs than its tokens; use another architecture.",
}
"""What is likely wrong, and what to do about it."""
