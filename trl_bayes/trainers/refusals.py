"""What cannot be trained: a target, divergence, model or data that do not go together, each in one sentence."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import GenerationConfig
from trl.trainer.utils import get_config_model_id

from ..divergences import Divergence
from ..language_models.prompts import check_prompts
from ..partitions import Partition
from ..rewards.calling import refuse_same_names
from ..targets import Target
from .exactness import Inexact, distribution_altering_settings
from .posterior_config import PosteriorConfig
from .warnings_of_users import warn


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
        ValueError: two targets.
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
    if target is not None and trainer_class.makes_target:
        raise ValueError(
            f"{trainer_class.__name__} makes its target from its configuration: use KLRLTrainer for another."
        )
    if target is not None and args.target is not None:
        raise ValueError("The target is given twice, as `target=` and as `args.target`: leave one of them out.")
    return args


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
    if trainer.args.share_of_prior is not None and trainer._is_vlm:
        raise ValueError(
            f"`{trainer.args.share_of_prior}` keeps completions of the prior as text: leave it at 0 with a "
            "vision-language model."
        )
    for dataset in datasets:
        if trainer.environment_factories is None and isinstance(dataset, Dataset):
            check_prompts(
                dataset["prompt"],
                trainer.processing_class,
                trainer.accelerator.unwrap_model(trainer.model),
                max_completion_length=trainer.max_completion_length,
                chat_template_kwargs=trainer.chat_template_kwargs,
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
        columns = dataset.column_names  # of a stream they may not be known
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


def warn_of_settings(args: PosteriorConfig) -> None:
    """Warns once of settings that do nothing here, and once of those that move the fixed point."""
    if ineffective := args.ineffective_settings():
        warn(ineffective)
    if args.inexact:
        warn(" ".join(inexact.fixed_point for inexact in args.inexact))


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
