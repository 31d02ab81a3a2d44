"""The prior pi_0 as a model of its own; and what makes it, and the policy, score as generation samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, create_model_from_path

from ..language_models.adapters import base_of_adapter
from ..language_models.generation import find_stop_ids, refuse_encoder_decoder
from ..language_models.noise import disable_noise
from ..language_models.positions import give_positions
from ..language_models.vocabulary import check_same_vocabulary
from .exactness import as_mapping


if TYPE_CHECKING:
    from .posterior_config import PosteriorConfig


@contextmanager
def prior_of_its_own(trainer: Any, args: "PosteriorConfig") -> Iterator[None]:
    """
    The constructor of TRL's trainer, with the prior that `args` names, if it names one.

    TRL loads a copy of the starting policy as the prior unless beta is zero, and takes no model of the user's. So it
    is told that beta is zero, for as long as it constructs, and is given prior and beta afterwards.

    Args:
        trainer ([`~trl.GRPOTrainer`]): that is constructed.
        args ([`PosteriorConfig`]): its configuration.
    """
    if args.prior_model_name_or_path is None or args.beta == 0:
        yield
        return
    beta, args.beta = args.beta, 0.0
    try:
        yield
    finally:
        args.beta = beta
    trainer.beta = beta
    trainer.ref_model = load_prior(trainer, args)


def load_prior(trainer: GRPOTrainer, args: "PosteriorConfig") -> torch.nn.Module:
    """
    Loads `args.prior_model_name_or_path` and prepares it for scoring, as TRL prepares its own reference model.

    Args:
        trainer ([`~trl.GRPOTrainer`]): initialized trainer, whose policy and accelerator the prior must fit.
        args ([`PosteriorConfig`]): with `prior_model_name_or_path` set.

    Returns:
        `torch.nn.Module`: the prior, on the trainer's device(s) for evaluation, wrapped where the run is distributed.

    Raises:
        ValueError: if the prior does not speak the policy's vocabulary, or ends at other tokens.
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
    rows, rows_of_policy = (model.config.get_text_config().vocab_size for model in (prior, policy))
    if rows < rows_of_policy:
        raise ValueError(
            f"The policy may write {rows_of_policy} tokens, and the prior has embeddings for {rows}, so that its "
            f"posterior has none of the others: give the policy as many (`resize_token_embeddings({rows})`)."
        )
    _refuse_other_ends(trainer, args.prior_model_name_or_path, prior, bool(kwargs["trust_remote_code"]))
    add_fused_lm_head(prior, temperature=args.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(prior, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return cast(torch.nn.Module, prepare_fsdp(prior, trainer.accelerator))
    return trainer.accelerator.prepare_model(prior, evaluation_mode=True)


def adapter_of_prior(trainer: Any) -> dict[str, torch.nn.Parameter]:
    """
    The weights of the adapter that training has started from, which TRL keeps as part of the prior; often none.

    Args:
        trainer ([`~trl.GRPOTrainer`]): constructed.
    """
    return {name: each for name, each in trainer.model.named_parameters() if ".ref." in name}


def _refuse_other_ends(trainer: GRPOTrainer, name: str, prior: Any, trust_remote_code: bool) -> None:
    """
    Refuses a prior that ends its completions at other tokens than the policy that is sampled.

    What is evaluated and sampled without a trainer is a posterior of completions as the prior ends them.

    Raises:
        ValueError: one sentence.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):  # no tokenizer beside the weights
        tokenizer = trainer._tokenizer
    ends, own = sorted(find_stop_ids(prior, tokenizer)), sorted(set(trainer.eos_token_ids))
    if ends != own:
        raise ValueError(
            f"The prior {name!r} ends a completion at the tokens {ends} and the policy at {own}, so their completions "
            "are not the same outcomes: set the same `eos_token_id` in `generation_config.json` and in the tokenizer "
            "of both."
        )


def make_exact(
    policy: torch.nn.Module, prior: torch.nn.Module | None, accelerator: Accelerator, without_noise: bool
) -> None:
    """
    Makes models score a completion as `generate` samples it: with the positions of an unpadded prompt, without noise.

    Args:
        policy, prior (`torch.nn.Module`): of a trainer; there is no prior where it is the policy without its adapters.
        accelerator ([`~accelerate.Accelerator`]): by which they may be wrapped.
        without_noise (`bool`): whether to switch off dropout and the like, too.

    Raises:
        ValueError: a model that is scored otherwise than it samples in any case; one sentence.
    """
    for wrapped in (policy, prior):
        if wrapped is None:
            continue
        model: Any = accelerator.unwrap_model(wrapped, keep_torch_compile=False)
        refuse_encoder_decoder(model)
        give_positions(model.get_base_model() if is_peft_model(model) else model)
        if without_noise:
            disable_noise(model)
