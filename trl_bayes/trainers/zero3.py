"""What DeepSpeed's ZeRO-3 must be told of how TRL reads a model's weights."""

from typing import Any

from accelerate.utils import is_peft_model
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig


def announce_lm_head(model: Any, args: GRPOConfig) -> None:
    """
    TRL's scorer reads the LM head's weight from outside its module, and ungathered generation does not: ZeRO-3 refuses
    a model that fetches its weights in another order than the last time, unless it knows of this.
    """
    if is_deepspeed_zero3_enabled() and not args.ds3_gather_for_generation:
        import deepspeed

        base = model.get_base_model() if is_peft_model(model) else model
        deepspeed.zero.register_external_parameter(base, base.get_output_embeddings().weight)
