"""What targets and log Z learn from samples of the prior, which the policy draws before its first update."""

import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from trl.trainer.utils import get_config_model_id

from ..language_models.fingerprint import model_fingerprint, parameters_fingerprint
from ..partitions import Partition
from ..prior import (
    Draw,
    DrawIdentity,
    KeptCompletions,
    PriorSamples,
    PriorSamplesError,
    PriorScores,
    Work,
    callable_fingerprint,
    prompt_key,
    row_key,
)
from ..prior.drawing import MOVED
from ..targets import Target
from .batches import own_tokens, row_hash, sequence_log_probs
from .kept_samples_check import refuse_samples_of_another_model
from .prior_model import adapter_of_prior
from .warnings_of_users import warn


GIVEN = "trl_bayes_completion"
"""Under which what reward functions are given travels in a row of the data."""

REWARDS = "trl_bayes_rewards"
"""Under which the rewards of a completion travel in its row of the data, until the batch has them."""


class RowsOfData(NamedTuple):
    """The different rows of all data sets, in the order of their first occurrence."""

    rows: list[dict[str, Any]]
    keys: torch.Tensor
    """Identity of each, int64 `(R,)`."""
    multiplicity: torch.Tensor
    """How often each is in the training data, `(R,)`: what is learned across prompts is learned from these."""

    @classmethod
    def of(cls, datasets: Sequence[Any], is_trained: Sequence[bool]) -> "RowsOfData":
        """The rows of some data sets, of which one is trained on."""
        rows: dict[int, dict[str, Any]] = {}
        number: Counter[int] = Counter()
        for dataset, trained in zip(datasets, is_trained, strict=True):
            for row in dataset:
                rows.setdefault(key := row_hash(row), row)
                number[key] += trained
        return cls(list(rows.values()), torch.tensor(list(rows)), torch.tensor([number[key] for key in rows]))


def prior_samples_of(trainer: Any, data: RowsOfData) -> PriorSamples:
    """
    The folder with samples of the prior for some rows.

    Args:
        trainer ([`~trl.GRPOTrainer`]): that draws them.
        data ([`RowsOfData`]): what for.

    Raises:
        PriorSamplesError: a folder with something else in it.
    """
    args = trainer.args
    pairs = zip(trainer.reward_funcs, trainer.reward_processing_classes, strict=True)
    rewards = [callable_fingerprint(function, tokenizer) for function, tokenizer in pairs]
    keys = [row_key(row) for row in data.rows]
    prompts, images, _ = trainer._tokenize_prompts([row["prompt"] for row in data.rows])
    sees_row = images is not None or any({"image", "images"} & row.keys() for row in data.rows)
    prompt_keys = [prompt_key(ids, key if sees_row else 0) for ids, key in zip(prompts, keys, strict=True)]
    with _as_prior_samples_error():
        return PriorSamples(
            args.prior_samples_dir or Path(str(args.output_dir)) / "prior_samples",
            _draw_identity(trainer, rewards),
            torch.tensor(prompt_keys, dtype=torch.int64),
            torch.tensor(keys, dtype=torch.int64),
            rewards=rewards,
            num_samples=args.num_prior_samples,
            chunk_size=args.per_device_train_batch_size * (args.steps_per_generation or 1),
        )


def _draw_identity(trainer: Any, rewards: list[str | None]) -> DrawIdentity:
    """What is drawn; where that cannot be told, something that no other run has."""
    args, model_id = trainer.args, get_config_model_id(trainer.model.config)
    parts = [model_fingerprint(model_id, trainer.model), *(callable_fingerprint(tool) for tool in trainer.tools or [])]
    if adapter := adapter_of_prior(trainer):
        parts.append(parameters_fingerprint(adapter))
    if trainer.rollout_func is not None:  # it may give the reward functions more than is kept
        parts += [callable_fingerprint(trainer.rollout_func), *rewards]
    # An exact run is not to find what these have cut
    parts += [inexact.refusal for inexact in args.inexact if inexact.changes_samples]
    once = broadcast_object_list([uuid.uuid4().hex])[0]
    weights, *tools = [once if part is None else part for part in parts]
    length = args.max_completion_length
    return DrawIdentity(model_id, weights, args.temperature, length, trainer.eos_token_ids, args.seed, tools)


def learn(trainer: Any, rows: RowsOfData, again: bool = False) -> PriorSamples:
    """
    Draws what is missing of a trainer's samples of the prior, and fits its target and its `log Z` to all of them.

    Args:
        trainer ([`~trl_bayes.trainers.posterior_trainer.PosteriorTrainer`]): that learns; it draws and scores.
        rows ([`RowsOfData`]): whose prompts are sampled.
        again (`bool`, *optional*, defaults to `False`): see [`fit`].

    Raises:
        PriorSamplesError: as [`collect`] and [`fit`].
    """
    samples = prior_samples_of(trainer, rows)
    if trainer.args.check_log_probs:
        refuse_samples_of_another_model(trainer, samples, rows.rows)
    collect(samples, rows, trainer._draw_prior, trainer._score_prior_samples, trainer)
    fit(trainer.target, trainer.partition, samples.scores(rows.keys, rows.multiplicity), again)
    if trainer.partition.warning is not None and trainer.estimator.learns_from_log_z:
        warn(trainer.partition.warning)
    return samples


def collect(
    samples: PriorSamples,
    data: RowsOfData,
    draw: Callable[[list[dict[str, Any]], int], Draw],
    score: Callable[[list[dict[str, Any]], KeptCompletions], torch.Tensor],
    trainer: Any,
) -> None:
    """
    Draws what is missing and scores what has no rewards of these functions.

    Args:
        samples ([`~trl_bayes.prior.PriorSamples`]): from [`prior_samples_of`].
        data ([`RowsOfData`]): the same.
        draw, score (`Callable`): see [`~trl_bayes.prior.PriorSamples.collect`].
        trainer ([`~trl.GRPOTrainer`]): that draws and scores.

    Raises:
        PriorSamplesError: some are missing in the middle of a run, so that the policy is no longer the prior.
    """
    if len(samples.missing()) and trainer.state.global_step > 0:
        raise PriorSamplesError(
            f"Samples of the prior are missing in {samples.folder}, and the policy has been trained since: give the "
            "trainer all data as `train_dataset` and `eval_dataset` before it trains, or resume from a checkpoint "
            "with its `posterior_state` files; where the chat template writes the date, fix it by "
            "`chat_template_kwargs`."
        )
    accelerator = trainer.accelerator
    work = Work(
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.wait_for_everyone,
        lambda value: bool(broadcast_object_list([value])[0]),
        progress=not trainer.args.disable_tqdm,
    )
    samples.collect(draw, score, data.rows, work)


def as_draw(output: dict[str, Any], policy: torch.Tensor, rows: Sequence[dict[str, Any]], trainer: Any) -> Draw:
    """
    A generated batch as samples of the prior.

    Args:
        output (`dict`): the batch, with `rewards` `(B, K)`.
        policy (`torch.Tensor`): the policy's per-token log-probabilities `(B, T)`.
        rows (`Sequence[dict]`): of the batch, with the completions that reward functions were given.
        trainer ([`~trl.GRPOTrainer`]): that has generated it.

    Raises:
        ValueError: the policy is not the prior any more.
    """
    log_policy, _, log_prior = sequence_log_probs(output, policy).unbind(dim=1)
    distance = (log_policy - log_prior).sum() / own_tokens(output).sum()
    refuse_policy_that_has_moved(distance, get_config_model_id(trainer.model.config))
    pairs = zip(output["completion_ids"], output["completion_mask"].bool(), strict=True)
    ids = [row[kept].tolist() for row, kept in pairs]
    texts = trainer._tokenizer.batch_decode(ids, skip_special_tokens=True)
    messages = [None if isinstance(row[GIVEN], str) else row[GIVEN] for row in rows]
    return Draw(KeptCompletions(ids, texts, messages, log_prior), trainer.accelerator.gather(output["rewards"]))


def fit(target: Target, partition: Partition, prior: PriorScores, again: bool = False) -> None:
    """
    Fits the target, unless it is fitted, and then `log Z` under it.

    Args:
        target ([`~trl_bayes.targets.Target`]), partition ([`~trl_bayes.partitions.Partition`]): that learn.
        prior ([`~trl_bayes.prior.PriorScores`]): from which.
        again (`bool`, *optional*, defaults to `False`): for more prompts than before, of which a target that learns
            something of each does not know the new ones. What was learned from the training data stays as it is.

    Raises:
        PriorSamplesError: the target cannot be fitted to these samples.
    """
    if target.needs_prior_samples and (not target.is_fitted or again and target.needs_context):
        with _as_prior_samples_error():
            target.fit(prior)
    partition.learn(prior, target)


def refuse_policy_that_has_moved(distance: torch.Tensor, model_id: str) -> None:
    """
    By its distance from the prior per token, in nats: what it samples must be samples of the prior.

    Raises:
        ValueError: one sentence.
    """
    if not distance <= MOVED:  # NaN has moved
        raise ValueError(
            f"The policy is {distance:.2g} nats per token from the prior, so it cannot draw samples of the prior: "
            f"start from the weights of {model_id!r} as they were loaded, with adapters that begin at zero."
        )


@contextmanager
def unrecorded(trainer: Any) -> Iterator[None]:
    """
    Generation of one completion for each row, that metrics, tables and counters do not show.

    Args:
        trainer ([`~trl.GRPOTrainer`]): that generates.
    """
    mode = "train" if trainer.model.training else "eval"
    metrics, logs = deepcopy(trainer._metrics[mode]), deepcopy(trainer._logs)
    pending = deepcopy((trainer._pending_metrics, trainer._pending_extra_logs))  # what reward functions have logged
    tokens, group_sizes = trainer.state.num_input_tokens_seen, (trainer.num_generations, trainer.num_generations_eval)
    # Rows are of any prompts and of any number, where TRL's vLLM client samples one prompt for each group
    trainer.num_generations = trainer.num_generations_eval = 1
    try:
        yield
    finally:
        trainer.num_generations, trainer.num_generations_eval = group_sizes
        trainer._metrics[mode], trainer._logs, trainer.state.num_input_tokens_seen = metrics, logs, tokens
        trainer._pending_metrics, trainer._pending_extra_logs = pending


@contextmanager
def _as_prior_samples_error() -> Iterator[None]:
    """Tells what a user can set right, for the command line to say in one sentence, from errors in the code."""
    try:
        yield
    except ValueError as error:
        raise PriorSamplesError(str(error)) from error
