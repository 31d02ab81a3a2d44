"""Demonstration-regularized RL: a clone of demonstrations, then RL with the clone as prior and start, in stages."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict
from rich.console import Console

from ..language_models.fingerprint import path_fingerprint
from ..prior import callable_fingerprint
from ..rewards.calling import reward_name
from ..statistics.demonstrations import temperature_by_rule
from ..statistics.estimate import Estimate
from ..targets import build_target
from ..trainers.refusals import refuse_infinite_divergence
from .arguments import Arguments
from .cloning import PROMPTS, check_clone, train_clone, write_rows
from .data import load_data
from .demonstration_data import distinct_prompts
from .demonstration_recipe import DemonstrationArguments, DemonstrationRecipe, read_demonstration_recipe
from .extras import check_extras
from .folders import prepare_folder
from .preference_stage import check_preferences, preference_functions, train_reward
from .refusals import one_sentence
from .rewards import check_reward_models, find_rewards
from .stages import Stage, StageError, fingerprint, is_first, wait_for_all
from .training import check_trackers, make_trainer, splits_of, train


PROGRAM = "trl-bayes demo-rl"


class Job(NamedTuple):
    """A recipe that has been checked, with its data and its stages."""

    recipe: DemonstrationRecipe
    rows: Dataset
    preferences: Dataset | None
    stages: dict[str, Stage]


# ---------------------------------------------------------------------------------------------------------------------
# What can be checked without a model


def prepare(arguments: DemonstrationArguments, source: str) -> Job:
    """
    Checks all sections, their data, and the folders of all stages; makes `output_dir`.

    Raises:
        ValueError: one sentence.
    """
    recipe = read_demonstration_recipe(arguments, source)
    rows, held_out, model_name = check_clone(recipe)
    if recipe.rule is not None and not len(held_out):
        raise ValueError(
            "The rule for `beta` needs held-out demonstrations: set `held_out` above 0, or `beta` to a number."
        )
    preferences = check_preferences(recipe, model_name) if "reward" in recipe.sections else None
    prompts, functions = _check_rl(recipe, distinct_prompts(rows))
    stages = _stages(
        recipe, [fingerprint(rows), path_fingerprint(model_name) or model_name], preferences, prompts, functions
    )
    if not recipe.arguments.overwrite:
        for stage in stages.values():
            stage.check_folder()
    prepare_folder(recipe.arguments.output_dir, overwrite=True)
    return Job(recipe, rows, preferences, stages)


def _check_rl(recipe: DemonstrationRecipe, prompts: Sequence[Any]) -> tuple[str, str]:
    """
    The last stage's rewards, target and data, which are the prompts of the demonstrations if it names none: all that
    its trainer will refuse without a model, before the hours of the stages before it.

    Returns:
        `tuple[str, str]`: fingerprints of its prompts, empty where they are those of the demonstrations, and of its
        rewards.
    """
    arguments = _rl_arguments(recipe, recipe.arguments.output_dir, None)
    rewards, names = find_rewards(arguments.script)
    if not rewards and "reward" not in recipe.sections:
        raise ValueError(
            "`reward_funcs` is missing in the section `rl`: name a reward function, or add a section `reward`."
        )
    check_extras(arguments.model, arguments.training)
    check_trackers(arguments.training)
    check_reward_models(rewards, arguments)
    target = build_target(arguments.training.target, arguments.training.beta or None)
    refuse_infinite_divergence(target, arguments.training.make_divergence())
    if "reward" not in recipe.sections:  # whose model has a name that is not known yet
        target.bind(names)
    functions = _of_functions(rewards)
    if arguments.script.dataset_name is None and not arguments.mixture.datasets:
        splits_of(DatasetDict(train=Dataset.from_list([{"prompt": each} for each in prompts])), arguments, rewards)
        return "", functions
    rows, _ = splits_of(load_data(arguments.script, arguments.mixture), arguments, rewards)
    return fingerprint(rows if isinstance(rows, Dataset) else [arguments.script.dataset_name]), functions


def _of_functions(rewards: Sequence[Any]) -> str:
    """What reward functions and models are; of what cannot be looked into, its name."""
    return fingerprint(
        (path_fingerprint(each) if isinstance(each, str) else callable_fingerprint(each)) or reward_name(each)
        for each in rewards
    )


def _rl_arguments(recipe: DemonstrationRecipe, folder: str, beta: float | None, **settings: Any) -> Arguments:
    """The last stage's objects, with a number for `beta` where the recipe has the rule."""
    changed: dict[str, Any] = {"output_dir": folder, **settings}
    if recipe.rule is not None:
        changed["beta"] = 1.0 if beta is None else beta
    return Arguments(*recipe.rl(**changed))


def _stages(
    recipe: DemonstrationRecipe, clone: Sequence[str], preferences: Dataset | None, prompts: str, functions: str
) -> dict[str, Stage]:
    """Each stage with what its result depends on."""
    folder = Path(recipe.arguments.output_dir).expanduser()
    data = {"clone": fingerprint(clone), "reward": fingerprint(preferences or []), "rl": prompts}
    called = {"rl": functions}
    if "reward" in recipe.sections:
        args, _, _ = recipe.reward(output_dir=recipe.arguments.output_dir)
        called["reward"] = _of_functions(preference_functions(args))
    stages: dict[str, Stage] = {}
    before = ""
    for name, section in recipe.sections.items():
        stages[name] = Stage(name, folder / name, section, data[name], before, called.get(name, ""))
        before = stages[name].fingerprint
    return stages


# ---------------------------------------------------------------------------------------------------------------------
# The stages, one after the other


def run_stages(job: Job) -> None:
    """Does what is not done yet; what was interrupted goes on from its last checkpoint."""
    console = Console(stderr=True, quiet=not is_first())
    wait_for_all()  # nothing is written before all have looked
    _clear_others(job)
    wait_for_all()
    for name, stage in job.stages.items():
        if stage.finished:
            console.print(f"Stage {name}: {stage.folder} has it, nothing changed.", soft_wrap=True)
            continue
        if is_first():
            stage.begin()
        wait_for_all()
        console.print(f"Stage {name}: {stage.folder}", soft_wrap=True)
        figures = _train(job, name, stage)
        wait_for_all()
        if is_first():
            stage.finish(figures)
        console.print(f"Stage {name}: {_in_words(figures)}", soft_wrap=True)


def _train(job: Job, name: str, stage: Stage) -> dict[str, Any]:
    clone = job.stages["clone"].folder
    if name == "clone":
        return train_clone(job.recipe, stage, job.rows)
    if name == "reward":
        return train_reward(job.recipe, stage, clone, distinct_prompts(job.rows), job.preferences)
    return _train_policy(job, stage, clone)


def _clear_others(job: Job) -> None:
    """With `overwrite`, what is of another run goes, and with it all that followed."""
    if not job.recipe.arguments.overwrite or not is_first():
        return
    for stage in job.stages.values():
        try:
            stage.check_folder()
        except ValueError:
            stage.clear()


def _train_policy(job: Job, stage: Stage, clone: Path) -> dict[str, Any]:
    """Stage 2: one of our trainers, for which the clone is where it starts, and so its prior."""
    recipe = job.recipe
    figures: dict[str, Any] = {}
    beta = None
    if recipe.rule is not None:
        kl = Estimate.from_dict(job.stages["clone"].figures["cross_entropy"]).value - recipe.rule.expert_entropy
        try:
            beta = temperature_by_rule(recipe.rule.epsilon, kl)
        except ValueError as error:
            raise StageError(str(error)) from None
        figures = {"kl": kl, "beta": beta}
    settings: dict[str, Any] = {"model_name_or_path": str(clone)}
    section = recipe.sections["rl"]
    if section.get("dataset_name") is None and not section.get("datasets"):
        file = stage.folder / PROMPTS
        if is_first():
            write_rows(file, [{"prompt": prompt} for prompt in distinct_prompts(job.rows)])
        wait_for_all()
        settings["dataset_name"] = str(file)
    if "reward" in job.stages:
        settings["reward_model_name_or_path"] = str(job.stages["reward"].folder)
    arguments = _rl_arguments(recipe, str(stage.folder), beta, **settings)
    with one_sentence(PROGRAM):
        trainer = make_trainer(recipe.trainer, arguments)
    train(trainer, arguments, stage.checkpoint)
    return figures


def _in_words(figures: Mapping[str, Any]) -> str:
    """What a stage has measured, on a line."""
    return json.dumps(figures) if figures else "done."
