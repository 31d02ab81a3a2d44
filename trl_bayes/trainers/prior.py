"""The prior pi_0 as a model of its own, when it is not the policy that training starts from."""

from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, disable_dropout_in_model

from ..language_models.adapters import base_of_adapter
from ..language_models.vocabulary import check_same_vocabulary
from .exactness import as_mapping


if TYPE_CHECKING:
    from .posterior_config import PosteriorConfig


def load_prior(trainer: GRPOTrainer, args: "PosteriorConfig") -> torch.nn.Module:
    """
    Loads `args.prior_model_name_or_path` and prepares it for scoring, as TRL prepares its own reference model.

    Args:
        trainer ([`~trl.GRPOTrainer`]): initialized trainer, whose policy and accelerator the prior must fit.
        args ([`PosteriorConfig`]): with `prior_model_name_or_path` set.

    Returns:
        `torch.nn.Module`: the prior, on the trainer's device(s) for evaluation, wrapped where the run is distributed.

    Raises:
        ValueError: if the prior does not speak the policy's vocabulary.
    """
    assert args.prior_model_name_or_path is not None  # the caller's condition
    policy = cast(PreTrainedModel, trainer.model)
    kwargs = as_mapping(args.model_init_kwargs)
    kwargs.pop("revision", None)  # of the policy's repository
    if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
        kwargs["device_map"] = None
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    kwargs.setdefault("dtype", policy.dtype)
    architecture: Any = None if base_of_adapter(args.prior_model_name_or_path) is None else AutoModelForCausalLM
    prior = create_model_from_path(args.prior_model_name_or_path, architecture, **kwargs)
    check_same_vocabulary(
        "prior",
        args.prior_model_name_or_path,
        prior.config,
        policy.config,
        trainer._tokenizer,
        bool(kwargs["trust_remote_code"]),
        reference="policy",
        advice="set `prior_model_name_or_path` to a model with the policy's tokenizer.",
    )
    if args.disable_dropout:
        disable_dropout_in_model(prior)
    add_fused_lm_head(prior, temperature=args.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(prior, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return cast(torch.nn.Module, prepare_fsdp(prior, trainer.accelerator))
    return trainer.accelerator.prepare_model(prior, evaluation_mode=True)
