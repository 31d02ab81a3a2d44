"""The data that a trainer knows: what it was constructed with, and what it is asked to evaluate on afterwards."""

from typing import Any

from .learning_from_prior import RowsOfData
from .refusals import refuse_data, refuse_early


def known_data(trainer: Any) -> list[Any]:
    """
    The data sets of a trainer that has just been constructed, each of several that are evaluated on by itself.

    Raises:
        ValueError: one of them cannot be trained or evaluated on; one sentence.
    """
    found = all_data(trainer.train_dataset, trainer.eval_dataset)
    refuse_data(trainer, found)
    if trainer.target.needs_prior_samples or trainer.partition.needs_prior_samples:
        trainer.target.warn_of_too_few_samples(trainer.args.num_prior_samples)
    return found


def all_data(train_dataset: Any, eval_dataset: Any) -> list[Any]:
    """The data sets that a trainer is given, each of several that are evaluated on by itself."""
    return [each for each in (train_dataset, *_each(eval_dataset)) if each is not None]


def rows_of(trainer: Any, only_trained: bool = False) -> RowsOfData:
    """The different rows of all data that a trainer knows, or of what it trains on."""
    data = [dataset for dataset in trainer.data if not only_trained or dataset is trainer.train_dataset]
    return RowsOfData.of(
        [trainer._remove_unused_columns(dataset) for dataset in data],  # as TRL gives them
        is_trained=[dataset is trainer.train_dataset for dataset in data],
    )


def learn_of_further_data(trainer: Any, given: Any) -> None:
    """
    Prepares an evaluation on data that the trainer does not know yet, as its constructor prepares that on its own.

    What it has learned from samples of the prior it learns for the new prompts as well. If these are not kept already
    the policy draws them, which it can before its first update only.

    Args:
        trainer ([`~trl_bayes.trainers.posterior_trainer.PosteriorTrainer`]): that is to evaluate.
        given (`Dataset`, `dict` of them or `str`): the argument of its `evaluate`; `None` for `trainer.eval_dataset`.

    Raises:
        PriorSamplesError: samples are missing, and the policy is no longer the prior; a `ValueError`, one sentence.
        ValueError: the data cannot be evaluated on; one sentence.
    """
    refuse_broken_groups(trainer)
    data = trainer.eval_dataset if given is None else given
    named = isinstance(data, str)  # one of the trainer's own
    further = [each for each in ([] if named else _each(data)) if not any(each is known for known in trainer.data)]
    if not further:
        return
    refuse_early(trainer, trainer.args, further, trainer.environment_factories is not None)
    refuse_data(trainer, further)
    before = trainer.data
    learns = trainer.partition.needs_prior_samples or trainer.target.needs_prior_samples
    # What has not been learned yet will be, before the first completion
    known = len(rows_of(trainer).rows) if learns and trainer.has_learned else None
    trainer.data = [*before, *further]
    if known is not None and len(rows_of(trainer).rows) > known:
        try:
            trainer.learn_from_prior(again=True)
        except BaseException:
            trainer.data = before
            raise


def refuse_broken_groups(trainer: Any) -> None:
    """
    Refuses an evaluation whose batches do not hold whole groups; TRL looks for it only where it evaluates by itself.

    Raises:
        ValueError: one sentence.
    """
    number = trainer.args.per_device_eval_batch_size * trainer.accelerator.num_processes
    if number % trainer.num_generations_eval:
        raise ValueError(
            f"An evaluation takes {number} completions at a time (`per_device_eval_batch_size` x the number of "
            f"processes), which are no whole groups of {trainer.num_generations_eval}: set "
            "`per_device_eval_batch_size` to a multiple of it, or `num_generations_eval` to a divisor."
        )


def _each(data: Any) -> list[Any]:
    return list(data.values()) if isinstance(data, dict) else [] if data is None else [data]
