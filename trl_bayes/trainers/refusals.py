"""What cannot be trained: a target, divergence, model or data that do not go together, each in one sentence."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import GenerationConfig
from trl.trainer.utils import get_config_model_id

from ..divergences import Divergence
from ..language_models.noise import adds_noise
from ..language_models.prompts import check_prompts
from ..partitions import Partition
from ..rewards.calling import check_columns, refuse_same_names
from ..targets import Target
from .exactness import Inexact, distribution_altering_settings
from .posterior_config import PosteriorConfig
from .warnings_of_users import warn


_OF_ADAPTERS = ("modules_to_save", "trainable_tokens_", "prompt_encoder")
"""What weights are called that PEFT switches off with an adapter, besides the prefix of its kind."""


def check_arguments(trainer_class: Any, args: PosteriorConfig | None, model: Any, target: Any) -> PosteriorConfig:
    """
    The configuration of a trainer, by default one that writes beside the model's name, as TRL's.

    Args:
        trainer_class (`type`): of the trainer.
        args ([`PosteriorConfig`], *optional*): as the user gave it.
        model (`str` or `PreTrainedModel`): to be trained.
        target ([`~trl_bayes.targets.Target`], *optional*): the trainer's argument.

    Raises:
        TypeError: a configuration of another class.
        ValueError: two targets, or an adapter that cannot be trained; one sentence.
    """
    config_class: type[PosteriorConfig] = trainer_class.config_class
    if args is None:
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        args = config_class(f"{model_id.split('/')[-1]}-{trainer_class._name.replace(' ', '-')}")
    if not isinstance(args, config_class):
        raise TypeError(
            f"`{trainer_class.__name__}` takes a `{config_class.__name__}` as `args`, got `{type(args).__name__}`: "
            "change the class name, the fields are the same."
        )
    if not isinstance(model, str) and is_peft_model(model):
        _refuse_untrainable(model, args)
    if target is not None and trainer_class.makes_target:
        raise ValueError(
            f"{trainer_class.__name__} makes its target from its configuration: use KLRLTrainer for another."
        )
    if target is not None and args.target is not None:
        raise ValueError("The target is given twice, as `target=` and as `args.target`: leave one of them out.")
    return args


def _refuse_untrainable(model: Any, args: PosteriorConfig) -> None:
    """An adapter is loaded for inference by default, and TRL copies the one that is called "default" as the prior."""
    is_copied = args.beta != 0 and args.prior_model_name_or_path is None
    if is_copied and "default" not in model.peft_config:
        raise ValueError(
            f"The model's adapter is called {next(iter(model.peft_config))!r}, and TRL trains the one called "
            "'default': load it without `adapter_name`."
        )
    if not any(each.requires_grad for each in model.parameters()):
        raise ValueError(
            "No weight of the model's adapter can be trained: load it with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`."
        )


def refuse_infinite_divergence(target: Target, divergence: Divergence) -> None:
    """
    Refuses a divergence that is infinite for every policy that ever leaves the target's support.

    Raises:
        ValueError: one sentence.
    """
    if target.hard and not divergence.allows_hard_constraints:
        raise ValueError(
            f"The target {target!r} gives some completions no probability, and {divergence.name} is infinite for a "
            "policy that produces them: use DPGTrainer, or FDPGTrainer or TrajectoryBalanceTrainer with `divergence` "
            "'forward_kl' or 'jensen_shannon', or a `tilt` target."
        )


def check_constructed(trainer: Any) -> None:
    """
    What can be said once there is a model: whether it can be trained, whether the prior stays what it is, and which of
    the model's own settings move the fixed point. Warns of what is allowed and not what it seems.

    Args:
        trainer ([`~trl.GRPOTrainer`]): constructed.

    Raises:
        ValueError: one sentence.
    """
    args = trainer.args
    refuse_moving_prior(trainer)
    _refuse_cast_weights(trainer)
    if args.check_log_probs and not args.disable_dropout and adds_noise(trainer.model):
        raise ValueError(
            "The model adds noise in training mode, such as dropout, and `disable_dropout=False` leaves it on: what "
            "is scored is not what was sampled. Leave `disable_dropout` at True; `check_log_probs=False` trains "
            "all the same."
        )
    if args.num_generations_eval == 1 and args.num_generations != 1 and trainer.eval_dataset is not None:
        warn(
            "With `num_generations_eval=1` a completion has no siblings to compare it with, so `eval_loss` says "
            "nothing unless `log Z` is known otherwise: set it to 2 or more, or choose by another metric."
        )
    if not trainer.use_vllm:  # which is given TRL's settings only
        refuse_inexact_model_defaults(trainer.model.generation_config, trainer.generation_kwargs, args)
    further = []
    if trainer.aux_loss_enabled:
        further.append(
            Inexact(
                "",
                "The router's loss of this mixture of experts is added to the divergence, "
                f"`router_aux_loss_coef={trainer.router_aux_loss_coef}` times: training goes to a compromise of both, "
                "and the logged `loss` is their sum (`router_aux_loss_coef=0.0` leaves it out).",
            )
        )
    if args.weight_decay > 0:
        further.append(
            Inexact(
                "",
                f"`weight_decay={args.weight_decay}` pulls weights, or those of an adapter, to zero, so training ends "
                "a little off the posterior.",
            )
        )
    # Another trainer with this configuration may have added them already
    args.inexact += [each for each in further if each not in args.inexact]
    if ineffective := args.ineffective_settings():
        warn(ineffective)
    if args.inexact:
        warn(" ".join(inexact.fixed_point for inexact in args.inexact))


def _refuse_cast_weights(trainer: Any) -> None:
    """TRL casts the policy itself for continuous batching, and small steps are then rounded away."""
    args = trainer.args
    if not (trainer.use_transformers_continuous_batching and (args.bf16 or args.fp16)):
        return
    if any(each.requires_grad and each.dtype == torch.float32 for each in trainer.model.parameters()):
        raise ValueError(
            "`use_transformers_continuous_batching=True` with mixed precision casts the float32 weights that are "
            "trained to half precision, where small updates are lost: set `bf16=False` and `fp16=False`, or leave it "
            "out."
        )


def refuse_moving_prior(trainer: Any) -> None:
    """
    Refuses weights that are trained and that the prior, which is the policy without its adapter, has too.

    Args:
        trainer ([`~trl.GRPOTrainer`]): constructed.

    Raises:
        ValueError: one sentence.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.beta == 0 or trainer.ref_model is not None or not is_peft_model(model):
        return
    own = {*_OF_ADAPTERS, getattr(model.base_model, "prefix", _OF_ADAPTERS[0])}
    shared = [
        name for name, each in model.named_parameters() if each.requires_grad and not any(part in name for part in own)
    ]
    if shared:
        raise ValueError(
            f"{len(shared)} weights that are trained, such as `{shared[0]}`, are no part of the adapter, so the "
            "prior, which is the model without it, would move with the policy: set `bias='none'` in the adapter's "
            "configuration and train nothing else, or name the prior in `prior_model_name_or_path`."
        )


def refuse_inexact_model_defaults(
    config: GenerationConfig, set_by_trl: Mapping[str, Any], args: PosteriorConfig
) -> None:
    """
    Refuses what a model's own `generation_config` fills in where TRL leaves a setting open (`no_repeat_ngram_size`).

    With `inexact_settings="warn"` it is added to what the configuration knows to be inexact.

    Args:
        config ([`~transformers.GenerationConfig`]): the model's.
        set_by_trl (`Mapping[str, Any]`): settings that TRL gives; `None` leaves one open.
        args ([`PosteriorConfig`]): of the trainer.

    Raises:
        ValueError: one sentence.
    """
    given = {"do_sample", *(name for name, value in set_by_trl.items() if value is not None)}
    own = {name: value for name, value in config.to_dict().items() if name not in given}
    for name, advice in distribution_altering_settings(own).items():
        what = f"The model's generation_config has `{name}={own[name]}`"
        inexact = Inexact(
            f"{what}, which changes the distribution that completions are sampled from, but not the one that is "
            f"scored: {advice} in `model.generation_config`.",
            f"{what}, with which the policy is corrected only where it is sampled.",
            changes_samples=True,
        )
        if args.inexact_settings == "refuse":
            raise ValueError(inexact.refusal)
        if inexact not in args.inexact:
            args.inexact.append(inexact)


def refuse_data(trainer: Any, datasets: Sequence[Any]) -> None:
    """
    Refuses rewards that cannot be told apart, and prompts that the model cannot continue to the length asked for.

    Prompts that are streamed, or written by an environment, are not known yet. What can be said without a model is
    said by [`refuse_early`].

    Args:
        trainer ([`~trl.GRPOTrainer`]): constructed.
        datasets (`Sequence`): those that are trained or evaluated on.

    Raises:
        ValueError: one sentence.
    """
    refuse_same_names(trainer.reward_func_names)
    if trainer._tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has neither a pad token nor an EOS token: set `tokenizer.pad_token`.")
    if None in trainer.eos_token_ids:
        raise ValueError(
            "The tokenizer has no EOS token, by which a completion is known to have ended: set `tokenizer.eos_token`."
        )
    if trainer._is_vlm and (setting := trainer.args.keeps_text) is not None:
        raise ValueError(
            f"{setting} keeps completions as text, without their images: it cannot be used with a vision-language "
            "model."
        )
    for dataset in datasets:
        if trainer.environment_factories is None and isinstance(dataset, Dataset):
            check_prompts(
                dataset["prompt"],
                trainer.processing_class,
                trainer.accelerator.unwrap_model(trainer.model),
                max_completion_length=trainer.max_completion_length,
                chat_template_kwargs=trainer.chat_template_kwargs,
                allow_scaling=not trainer.args.check_log_probs,
            )


def refuse_early(
    trainer: Any, args: PosteriorConfig, datasets: Sequence[Any], writes_prompts: Any, writers: Any = None
) -> None:
    """
    What can be said of the data before a model is loaded: that it has prompts, and that their prior can be sampled.

    Args:
        trainer ([`~trl.GRPOTrainer`]): that has its target and its partition.
        args ([`PosteriorConfig`]), datasets (`Sequence`): as of [`refuse_unsampled_prior`].
        writes_prompts: whether an environment may write prompts, or what makes such environments.
        writers (*optional*): tools or a rollout function, which write into completions.

    Raises:
        ValueError: one sentence.
    """
    if writers and args.share_of_prior is not None:
        raise ValueError(
            f"`{args.share_of_prior}` takes completions of the prior that are its own tokens alone, and `tools` or a "
            "`rollout_func` would write others into them: leave them out, or leave it at 0."
        )
    for dataset in datasets:
        if isinstance(dataset, Mapping):
            raise ValueError(f"The data has the splits {list(dataset)}: give one of them, such as `dataset['train']`.")
        columns = dataset.column_names  # of a stream they may not be known
        if not args.remove_unused_columns:  # else no function is given any
            check_columns(columns)
        if not writes_prompts and columns is not None and "prompt" not in columns:
            raise ValueError(f"The data has no column 'prompt': it has {columns}.")
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError("The data has no rows: give at least one prompt.")
    refuse_unsampled_prior(trainer.target, trainer.partition, args, datasets, bool(writes_prompts))


def refuse_too_few_prompts(dataset: Any, args: PosteriorConfig) -> None:
    """
    Refuses data that do not fill one generation: TRL leaves out what is no whole one, so nothing would be trained.

    Args:
        dataset (`Dataset`): the prompts that are trained on; a stream goes on as long as it has any.
        args ([`PosteriorConfig`]): of the trainer.

    Raises:
        ValueError: one sentence.
    """
    group_size = cast(int, args.num_generations)
    needed = (args.generation_batch_size or 0) // group_size
    if isinstance(dataset, Dataset) and len(dataset) < needed:
        raise ValueError(
            f"The data has {len(dataset)} prompts, and one generation takes {needed} "
            f"(`generation_batch_size={args.generation_batch_size}` completions, by default "
            "`per_device_train_batch_size` x `gradient_accumulation_steps` x the number of processes, "
            f"`num_generations={group_size}` of each), so nothing would be trained: set "
            f"`per_device_train_batch_size` such that one generation has at most "
            f"{len(dataset) * group_size} completions, or give more prompts."
        )


def refuse_unsampled_prior(
    target: Target, partition: Partition, args: PosteriorConfig, datasets: Sequence[Any], writes_prompts: bool
) -> None:
    """
    Refuses to learn from samples of the prior where the policy cannot draw them before its first update.

    Args:
        target ([`~trl_bayes.targets.Target`]), partition ([`~trl_bayes.partitions.Partition`]): who may need them.
        args ([`PosteriorConfig`]): of the trainer.
        datasets (`Sequence`): those whose prompts are trained or evaluated on.
        writes_prompts (`bool`): whether an environment may write prompts that the data does not have.

    Raises:
        ValueError: one sentence.
    """
    if target.needs_prior_samples or partition.needs_prior_samples:
        needs = f"The target {target!r}" if target.needs_prior_samples else f"`partition={partition.name!r}`"
        other = "use a target and a `partition` that learn nothing from the prior"
    elif (share := args.share_of_prior) is not None:
        needs, other = f"`{share}`", f"leave `{share.partition('=')[0]}` at 0"
    else:
        return
    if args.beta == 0:
        raise ValueError(
            f"{needs} needs samples of the prior, and `beta=0` is pure RL, which has none: set `beta` > 0, or use "
            "`partition='running'` and no target."
        )
    if args.mask_truncated_completions:
        raise ValueError(
            f"{needs} needs samples of the prior, and `mask_truncated_completions=True` empties those that are cut: "
            "set it to False."
        )
    if args.prior_model_name_or_path is not None:
        raise ValueError(
            f"{needs} needs samples of the prior, which the policy draws before its first update: leave "
            "`prior_model_name_or_path` unset."
        )
    if writes_prompts:
        raise ValueError(
            f"{needs} needs samples of the prior for each prompt, and an environment may write prompts that the data "
            f"does not have: {other}."
        )
    if not all(isinstance(dataset, Dataset) for dataset in datasets):
        raise ValueError(
            f"{needs} needs samples of the prior for each prompt, so all prompts must be known: use a data set that "
            "is not streamed."
        )


def refuse_infinite_potential(phi: torch.Tensor, target: Target, divergence: Divergence) -> None:
    """
    Refuses a target that is harder than it says, with a divergence that is infinite there.

    Raises:
        ValueError: one sentence.
    """
    if (phi == -torch.inf).any() and not divergence.allows_hard_constraints:
        raise ValueError(
            f"The target {target!r} returned -inf as log-potential, where {divergence.name} is infinite: choose a "
            "divergence that allows it ('forward_kl', 'jensen_shannon'), or a finite penalty."
        )
