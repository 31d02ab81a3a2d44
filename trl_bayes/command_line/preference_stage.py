"""The stage between: a reward model is fitted to preferences over the clone's completions."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from trl import ModelConfig, RewardTrainer, get_peft_config, get_quantization_config

from ..language_models.completions import Completions
from ..language_models.samples import sample, score
from ..language_models.settings import SamplingSettings
from ..rewards import build_rewards
from ..rewards.calling import without_infinite
from ..rewards.whole_models import whole_models
from ..targets.base import weighted_sum
from .cloning import load_jsonl, release_memory, write_rows
from .demonstration_data import load_preferences, tokenized
from .demonstration_recipe import DemonstrationRecipe, PreferenceArguments
from .models import find_config, find_tokenizer, load_model, load_tokenizer, loading_arguments, model_path
from .stages import Stage, StageError, is_first, wait_for_all


PREFERENCES = "preferences.jsonl"


def check_preferences(recipe: DemonstrationRecipe, clone: str) -> Dataset | None:
    """
    What can be said of the stage without a model.

    Args:
        recipe ([`DemonstrationRecipe`]): with a section `reward`.
        clone (`str`): id or folder of the model that learns to clone, whose tokenizer the clone has.

    Returns:
        [`~datasets.Dataset`], *optional*: the preferences, if they are there already.

    Raises:
        ValueError: they have no column `chosen` or `rejected`, or too many tokens, or a function does not exist; one
            sentence.
    """
    args, training, model = recipe.reward(output_dir=recipe.arguments.output_dir)
    if model.model_name_or_path is not None:
        name = model_path(model.model_name_or_path)
        find_config("model_name_or_path", name, training.trust_remote_code, model.model_revision)
    if args.dataset_name is None:
        preference_functions(args)
        return None
    rows = load_preferences(args)
    own = model.model_name_or_path
    arguments = loading_arguments(model, cast(Any, training))
    tokenized(rows, find_tokenizer(clone if own is None else model_path(own), arguments), training.max_length)
    return rows


def preference_functions(args: PreferenceArguments) -> list[Any]:
    """
    The functions that prefer.

    Raises:
        ValueError: one does not exist, or is a model; one sentence.
    """
    found = build_rewards(args.preference_funcs)
    if models := [each for each in found if isinstance(each, str)]:
        raise ValueError(f"`preference_funcs` must be functions, but {models[0]!r} is a model: use it as the reward.")
    return found


def train_reward(
    recipe: DemonstrationRecipe, stage: Stage, clone: Path, prompts: list[Any], preferences: Dataset | None
) -> dict[str, Any]:
    """
    Trains with TRL's `RewardTrainer`: maximum likelihood of the Bradley-Terry model.

    Returns:
        `dict`: what was measured, for [`Stage.finish`].

    Raises:
        StageError: no two completions of a prompt differ in what they are worth, or some are longer than the section's
            `max_length`; one sentence.
    """
    args, training, model = recipe.reward(output_dir=str(stage.folder))
    name = str(clone) if model.model_name_or_path is None else model_path(model.model_name_or_path)
    settings = loading_arguments(model, cast(Any, training))
    if preferences is None:
        file = stage.folder / PREFERENCES
        if is_first() and not file.is_file():
            draw_preferences(file, args, model, training, clone, prompts)
        wait_for_all()
        preferences = load_jsonl(file)
    training.model_init_kwargs = settings
    tokenizer = load_tokenizer(name, settings)
    try:
        pairs_of_tokens = tokenized(preferences, tokenizer, training.max_length)
    except ValueError as error:
        raise StageError(str(error)) from None
    trainer = RewardTrainer(
        model=name,
        args=training,
        train_dataset=pairs_of_tokens,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    trainer.train(resume_from_checkpoint=stage.checkpoint)
    trainer.save_model(str(stage.folder))
    trainer.save_state()
    accuracies = [entry["accuracy"] for entry in trainer.state.log_history if "accuracy" in entry]
    trainer.accelerator.free_memory()
    del trainer
    release_memory()
    return {"pairs": len(preferences), "accuracy": accuracies[-1] if accuracies else None}


@whole_models()
def draw_preferences(
    file: Path, args: PreferenceArguments, model: ModelConfig, training: Any, clone: Path, prompts: list[Any]
) -> None:
    """Pairs of the clone's completions, the better one first; two that are worth the same make none."""
    policy = load_model(str(clone), model, training, quantized=False)
    tokenizer = load_tokenizer(str(clone), {})
    repeated = [prompts[place % len(prompts)] for place in range(args.num_pairs)]
    drawn = sample(policy, tokenizer, repeated, 2, SamplingSettings(args.max_completion_length, seed=training.seed))
    rewards, _ = without_infinite(score(preference_functions(args), drawn, tokenizer))  # (2 * pairs, K)
    weights = torch.tensor(args.preference_weights or [1.0] * rewards.size(1), dtype=torch.float64)
    worth = weighted_sum(rewards, weights).view(-1, 2)  # (pairs, 2); NaN where no function says anything
    rows = pairs(drawn, worth)
    if not rows:
        raise StageError(
            f"In none of {args.num_pairs} pairs of the clone's completions is one preferred: choose other "
            "`preference_funcs`, or more pairs."
        )
    write_rows(file, rows)


def pairs(drawn: Completions, worth: torch.Tensor) -> list[dict[str, Any]]:
    """
    Rows with `prompt`, `chosen` and `rejected`.

    Args:
        drawn ([`Completions`]): 2 of each of n prompts, in their order.
        worth (`torch.Tensor`): `(n, 2)`.
    """
    rows = drawn.to_dataset()
    found = []
    for place, (first, second) in enumerate(worth.tolist()):
        if first == second or math.isnan(first + second):  # what cannot be compared makes no pair
            continue
        better, worse = (0, 1) if first > second else (1, 0)
        chosen, rejected = rows[2 * place + better], rows[2 * place + worse]
        found.append({"prompt": chosen["prompt"], "chosen": chosen["completion"], "rejected": rejected["completion"]})
    return found
