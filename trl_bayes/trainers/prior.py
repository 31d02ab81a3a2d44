"""The prior pi_0 as a model of its own, when it is not the policy that training starts from."""

from typing import TYPE_CHECKING, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, disable_dropout_in_model

from .exactness import as_mapping


if TYPE_CHECKING:
    from .posterior_config import PosteriorConfig


def load_prior(trainer: GRPOTrainer, args: "PosteriorConfig") -> torch.nn.Module:
    """
    Loads `args.prior_model_name_or_path` and prepares it for scoring, as TRL prepares its own reference model.

    Args:
        trainer ([`~trl.GRPOTrainer`]): initialised trainer, whose policy and accelerator the prior must fit.
        args ([`PosteriorConfig`]): with `prior_model_name_or_path` set.

    Returns:
        `torch.nn.Module`: the prior, on the trainer's device(s) for evaluation, wrapped where the run is distributed.

    Raises:
        ValueError: if the prior does not speak the policy's vocabulary.
    """
    assert args.prior_model_name_or_path is not None  # the caller's condition
    policy = cast(PreTrainedModel, trainer.model)
    kwargs = as_mapping(args.model_init_kwargs)
    if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
        kwargs["device_map"] = None
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    kwargs.setdefault("dtype", policy.dtype)
    prior = create_model_from_path(args.prior_model_name_or_path, **kwargs)
    check_same_vocabulary(prior, policy, trainer._tokenizer)
    if args.disable_dropout:
        disable_dropout_in_model(prior)
    add_fused_lm_head(prior, temperature=args.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(prior, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return cast(torch.nn.Module, prepare_fsdp(prior, trainer.accelerator))
    return trainer.accelerator.prepare_model(prior, evaluation_mode=True)


def check_same_vocabulary(prior: PreTrainedModel, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Refuses a prior that gives no probability to the policy's tokens, or reads them as other tokens.

    Tokenizers are compared where the prior comes with one: models of one family may pad their embeddings to different
    sizes and still share the vocabulary. Otherwise the sizes must agree.

    Raises:
        ValueError: saying what differs.
    """
    advice = "set `prior_model_name_or_path` to a model with the policy's tokenizer."
    try:
        prior_vocabulary = AutoTokenizer.from_pretrained(prior.config._name_or_path).get_vocab()
    except (OSError, ValueError):  # no tokenizer beside the prior's weights
        prior_vocabulary = None
    if prior_vocabulary is not None and prior_vocabulary != tokenizer.get_vocab():
        raise ValueError(f"The prior's tokenizer has another vocabulary than the policy's: {advice}")
    prior_size, policy_size = (model.config.get_text_config().vocab_size for model in (prior, policy))
    if prior_vocabulary is None and prior_size != policy_size:
        raise ValueError(
            f"The prior has a vocabulary of {prior_size} tokens and the policy one of {policy_size}: {advice}"
        )
