"""Stage 1 of demonstration-regularized RL: demonstrations are cloned, over a floor that the prior gives."""

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset, concatenate_datasets, load_dataset
from trl import ModelConfig, SFTTrainer, get_peft_config, get_quantization_config

from ..language_models.completions import Completions
from ..language_models.samples import sample
from ..language_models.scoring import log_probs
from ..language_models.settings import SamplingSettings
from ..prior.writing import write_whole
from ..rewards.whole_models import whole_models
from ..statistics.demonstrations import kl_from_expert
from ..statistics.estimate import Estimate
from .demonstration_data import check_tokens, cut, load_demonstrations, split_held_out
from .demonstration_recipe import CloneArguments, DemonstrationRecipe
from .models import find_config, find_tokenizer, load_model, load_tokenizer, loading_arguments, model_path
from .stages import Stage, StageError, is_first, wait_for_all


FLOOR = "prior_demonstrations.jsonl"
PROMPTS = "prompts.jsonl"


# ---------------------------------------------------------------------------------------------------------------------
# The stage


def train_clone(recipe: DemonstrationRecipe, stage: Stage, rows: Dataset) -> dict[str, Any]:
    """
    Trains with TRL's `SFTTrainer` and measures the clone on demonstrations that it has not read.

    Returns:
        `dict`: what was measured, for [`Stage.finish`].
    """
    args, training, model = recipe.clone(output_dir=str(stage.folder))
    settings = loading_arguments(model, cast(Any, training))
    name = model_path(str(model.model_name_or_path))
    cloned, held_out = split_held_out(rows, args.held_out, training.seed)
    floor = stage.folder / FLOOR
    if args.prior_demonstrations and is_first() and not floor.is_file():
        draw_floor(floor, args, model, training, cloned)
    wait_for_all()
    training.model_init_kwargs = settings
    trainer = SFTTrainer(
        model=name,
        args=training,
        train_dataset=cloned,
        eval_dataset=held_out if len(held_out) else None,
        processing_class=load_tokenizer(name, settings),
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    refuse_cut(trainer, (cloned, held_out), training.max_length)
    if args.prior_demonstrations:
        trainer.train_dataset = with_floor(cast(Dataset, trainer.train_dataset), floor)
    number = len(cast(Dataset, trainer.train_dataset))
    trainer.train(resume_from_checkpoint=stage.checkpoint)
    trainer.save_model(str(stage.folder))
    trainer.save_state()
    prepared = cast("Dataset | None", trainer.eval_dataset)
    tokens = None if prepared is None else _tokens(prepared)
    trainer.accelerator.free_memory()
    del trainer
    release_memory()
    figures: dict[str, Any] = {"demonstrations": len(cloned), "prior_demonstrations": number - len(cloned)}
    if tokens is not None and is_first():
        kl = measure(stage.folder, model, training, tokens)
        figures["cross_entropy"] = {**kl.to_dict(), "held_out": len(tokens)}
    wait_for_all()
    return figures


def refuse_cut(trainer: SFTTrainer, given: Sequence[Dataset], max_length: int | None) -> None:
    """
    Refuses demonstrations of which `SFTTrainer` keeps the beginning only: the clone would be one of cut completions,
    and the cross-entropy no bound.

    Raises:
        StageError: one sentence.
    """
    for rows, made in zip(given, (trainer.train_dataset, trainer.eval_dataset), strict=True):
        if made is None or max_length is None:
            continue
        prepared = cast(Dataset, made)
        if len(prepared) < len(rows) or any(len(ids) >= max_length for ids in prepared["input_ids"]):
            raise StageError(cut(max_length))


def release_memory() -> None:
    """What a stage has used, before the next begins; which may set up DeepSpeed in another way."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@whole_models()
def draw_floor(file: Path, args: CloneArguments, model: ModelConfig, training: Any, rows: Dataset) -> None:
    """
    Completions of the prior that are cloned like demonstrations: a floor under what the clone may exclude.

    With N demonstrations and M of these, maximum likelihood is `(N expert + M prior) / (N + M)`, so no completion has
    less than the prior's probability times `M / (N + M)`. As in the paper, where one count is added to every action,
    M stays when N grows.
    """
    name = model_path(str(model.model_name_or_path))
    prior = load_model(name, model, training, revision=model.model_revision)
    tokenizer = load_tokenizer(name, loading_arguments(model, training))
    prompts = rows.shuffle(seed=training.seed)["prompt"]  # as often as among the demonstrations
    repeated = [prompts[place % len(prompts)] for place in range(args.prior_demonstrations)]
    drawn = sample(prior, tokenizer, repeated, 1, SamplingSettings(args.max_completion_length, seed=training.seed))
    write_rows(file, list(drawn.to_dataset(tokens=True)))


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes JSON lines; a kill leaves the whole file or none."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))


def load_jsonl(file: Path) -> Dataset:
    """A file that [`write_rows`] has written."""
    return load_dataset("json", data_files=str(file), split="train")


def with_floor(prepared: Dataset, floor: Path) -> Dataset:
    """
    The demonstrations as `SFTTrainer` has tokenized them, and the prior's completions in the tokens that were drawn.

    From texts it would make other tokens, and it would end what was cut.
    """
    drawn = load_jsonl(floor)
    rows = [
        {
            "input_ids": row["input_ids"],
            "labels": [t if own else -100 for t, own in zip(row["input_ids"], row["completion_mask"], strict=True)],
        }
        for row in drawn
    ]
    kept = prepared.select_columns(["input_ids", "labels"])
    return concatenate_datasets([kept, Dataset.from_list(rows, features=kept.features)])


# ---------------------------------------------------------------------------------------------------------------------
# The measurement


def _tokens(prepared: Dataset) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each row, in the tokens that `SFTTrainer` has made of them."""
    pairs = []
    for row in prepared:
        own = [label != -100 for label in row["labels"]]
        start = own.index(True) if True in own else len(own)
        pairs.append((list(row["input_ids"][:start]), list(row["input_ids"][start:])))
    return pairs


@whole_models()
def measure(
    folder: Path, model: ModelConfig, training: Any, tokens: Sequence[tuple[list[int], list[int]]]
) -> Estimate:
    """The cross-entropy of the clone on held-out demonstrations, in nats a completion."""
    clone = load_model(str(folder), model, training, quantized=False)
    completions = Completions(
        prompts=[""] * len(tokens),
        prompt_ids=[prompt for prompt, _ in tokens],
        prompt_index=torch.arange(len(tokens)),
        completion_ids=[completion for _, completion in tokens],
        texts=[""] * len(tokens),
        ended=torch.ones(len(tokens), dtype=torch.bool),
    )
    return kl_from_expert(log_probs(clone, completions, SamplingSettings(max_new_tokens=1)))


def check_clone(recipe: DemonstrationRecipe) -> tuple[Dataset, Dataset, str]:
    """
    What can be said of the first stage without its model.

    Returns:
        Its demonstrations, those that are held out, and its model's id or folder.

    Raises:
        ValueError: one sentence.
    """
    args, training, model = recipe.clone(output_dir=recipe.arguments.output_dir)
    if model.model_name_or_path is None:
        raise ValueError(
            "`model_name_or_path` is missing in the section `clone`: name the model that learns to clone."
        )
    if training.packing:
        raise ValueError(
            "`packing` in the section `clone` would let a completion see others, which stage 2 does not: leave it out."
        )
    if training.loss_type != "nll" or training.label_smoothing_factor > 0 or training.neftune_noise_alpha is not None:
        raise ValueError(
            "`loss_type`, `label_smoothing_factor` and `neftune_noise_alpha` in the section `clone` would make it "
            "another clone than the likeliest, which the floor is about: leave them out."
        )
    if training.completion_only_loss is False or training.assistant_only_loss:
        setting = "assistant_only_loss" if training.assistant_only_loss else "completion_only_loss"
        raise ValueError(
            f"`{setting}` in the section `clone` would clone other tokens than those of the completions, which the "
            "rule for `beta` and the floor are about: leave it out."
        )
    name = model_path(model.model_name_or_path)
    find_config("model_name_or_path", name, training.trust_remote_code, model.model_revision)
    rows = load_demonstrations(args)
    _, held_out = split_held_out(rows, args.held_out, training.seed)
    if training.chat_template_path is None:  # else the tokenizer is not yet what it will be
        check_tokens(rows, find_tokenizer(name, loading_arguments(model, cast(Any, training))), training.max_length)
    return rows, held_out, name
