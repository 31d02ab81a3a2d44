"""What targets and log Z learn from samples of the prior, which the policy draws before its first update."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from ..language_models.fingerprint import weights_fingerprint
from ..partitions import Partition
from ..prior import Draw, PriorSamples, PriorSamplesError, PriorScores
from ..targets import Target
from .batches import own_tokens, row_hash, sequence_log_probs
from .posterior_config import PosteriorConfig


_MOVED = 0.02  # nats per token from the prior: more than rounding, much less than another model


def prior_sample_settings(trainer: Any) -> dict[str, Any]:
    """
    What samples of the prior depend on, besides the prompts: kept with them, and compared when they are found.

    Args:
        trainer ([`~trl.GRPOTrainer`]): that draws them.
    """
    args, model_id = trainer.args, get_config_model_id(trainer.model.config)
    return {
        "model": model_id,
        "weights": weights_fingerprint(model_id) or getattr(trainer.model.config, "_commit_hash", None),
        "reward_functions": trainer.reward_func_names,
        "tools": sorted(tool.__name__ for tool in trainer.tools or []),
        "chat_template_kwargs": trainer.chat_template_kwargs,
        "temperature": args.temperature,
        "max_completion_length": args.max_completion_length,
        "seed": args.seed,
    }


def collect_prior_samples(
    args: PosteriorConfig,
    settings: dict[str, Any],
    datasets: Sequence[Any],
    draw: Callable[[list[dict[str, Any]], int], Draw],
    accelerator: Accelerator,
    may_draw: bool,
) -> PriorSamples:
    """
    Samples of the prior for every prompt, from the folder that keeps them or drawn now.

    Args:
        args ([`PosteriorConfig`]): of the trainer.
        settings (`dict`): from [`prior_sample_settings`].
        datasets (`Sequence`): those whose rows need samples.
        draw (`Callable`): see [`~trl_bayes.prior.PriorSamples.collect`].
        accelerator ([`~accelerate.Accelerator`]): of the trainer.
        may_draw (`bool`): whether the policy is still the prior.

    Raises:
        PriorSamplesError: the samples that are kept are of something else, or some are missing in the middle of a run.
    """
    rows = {row_hash(row): row for dataset in datasets for row in dataset}
    with _as_prior_samples_error():
        samples = PriorSamples(
            args.prior_samples_dir or Path(str(args.output_dir)) / "prior_samples",
            settings,
            torch.tensor(list(rows), dtype=torch.int64),
            num_samples=args.num_prior_samples,
            chunk_size=args.per_device_train_batch_size * (args.steps_per_generation or 1),
        )
    if len(samples.missing()) and not may_draw:
        raise PriorSamplesError(
            f"Samples of the prior are missing in {samples.folder}, and the policy has been trained since: start "
            "again, or resume from a checkpoint with its `posterior_state` files."
        )
    samples.collect(
        draw,
        list(rows.values()),
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.wait_for_everyone,
        progress=not args.disable_tqdm,
    )
    return samples


def as_draw(output: dict[str, Any], policy: torch.Tensor, tokenizer: PreTrainedTokenizerBase, model_id: str) -> Draw:
    """
    A generated batch as samples of the prior.

    Args:
        output (`dict`): the batch, with `rewards` `(B, K)`.
        policy (`torch.Tensor`): the policy's per-token log-probabilities `(B, T)`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the policy.
        model_id (`str`): of the policy, for the message.

    Raises:
        ValueError: the policy is not the prior any more.
    """
    log_policy, _, log_prior = sequence_log_probs(output, policy).unbind(dim=1)
    refuse_policy_that_has_moved((log_policy - log_prior).sum() / own_tokens(output).sum(), model_id)
    pairs = zip(output["completion_ids"], output["completion_mask"].bool(), strict=True)
    ids = [row[kept].tolist() for row, kept in pairs]
    return Draw(ids, log_prior, output["rewards"], tokenizer.batch_decode(ids, skip_special_tokens=True))


def fit(target: Target, partition: Partition, prior: PriorScores) -> None:
    """
    Fits the target, unless it is fitted, and then `log Z` under it.

    Raises:
        PriorSamplesError: the target cannot be fitted to these samples.
    """
    if target.needs_prior_samples and not target.is_fitted:
        with _as_prior_samples_error():
            target.fit(prior)
    partition.learn(prior, target)


def refuse_policy_that_has_moved(distance: torch.Tensor, model_id: str) -> None:
    """
    By its distance from the prior per token, in nats: what it samples must be samples of the prior.

    Raises:
        ValueError: one sentence.
    """
    if distance > _MOVED:
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
    tokens, group_sizes = trainer.state.num_input_tokens_seen, (trainer.num_generations, trainer.num_generations_eval)
    # Rows are of any prompts and of any number, where TRL's vLLM client samples one prompt for each group
    trainer.num_generations = trainer.num_generations_eval = 1
    try:
        yield
    finally:
        trainer.num_generations, trainer.num_generations_eval = group_sizes
        trainer._metrics[mode], trainer._logs, trainer.state.num_input_tokens_seen = metrics, logs, tokens


@contextmanager
def _as_prior_samples_error() -> Iterator[None]:
    """Tells what a user can set right, for the command line to say in one sentence, from errors in the code."""
    try:
        yield
    except ValueError as error:
        raise PriorSamplesError(str(error)) from error
