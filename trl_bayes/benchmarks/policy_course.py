"""A training whose policy is kept as a vector after some steps, so that anything can be computed of it later."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from .. import KLRLConfig, KLRLTrainer
from ..targets import Target
from ..trainers.posterior_trainer import PosteriorTrainer
from .exact_training import default_arguments, ready_trainer
from .learning_curve import train_recorded
from .tiny import EnumerableTask


class PolicyCourse(NamedTuple):
    """Where a training went, `log pi` of all completions of each prompt."""

    log_prior: torch.Tensor
    """`(P, N)`, in nats."""
    samples: tuple[int, ...]
    """Completions drawn until each measurement."""
    log_policies: torch.Tensor
    """`(M, P, N)`, in nats."""
    seconds: float
    """Of training, without those of measuring."""


def train_course(
    task: EnumerableTask,
    trainer_class: Callable[..., PosteriorTrainer] = KLRLTrainer,
    config_class: Callable[..., Any] = KLRLConfig,
    target: Target | None = None,
    reward_funcs: Callable[..., list[float]] | Sequence[Callable[..., list[float]]] | None = None,
    evaluate_at: Iterable[int] = (),
    **settings: Any,
) -> PolicyCourse:
    """
    Trains on an enumerable task and scores all completions on the way.

    Args:
        task ([`EnumerableTask`]): prompts, prior and reward.
        trainer_class, config_class (`Callable`, *optional*): defaults to KL-RL.
        target ([`~trl_bayes.targets.Target`], *optional*): as the trainer's.
        reward_funcs (`list[Callable]`, *optional*): as the trainer's. Defaults to the task's reward.
        evaluate_at (`Iterable[int]`, *optional*): steps after which to keep the policy; the last is always kept.
        settings: training arguments that differ from those of
            [`~trl_bayes.benchmarks.exact_training.default_arguments`].
    """
    arguments = {**default_arguments(task), **settings}
    others: dict[str, Any] = {} if target is None else {"target": target}
    rewards = task.reward_func if reward_funcs is None else reward_funcs
    with ready_trainer(task, trainer_class, config_class, arguments, reward_funcs=rewards, **others) as ready:

        def policy() -> torch.Tensor:
            return task.log_probs(ready.trainer.model, ready.tokenizer)

        course = train_recorded(ready.trainer, policy, {*evaluate_at, arguments["max_steps"]})
    return PolicyCourse(
        ready.log_prior,
        tuple(point.samples for point in course.curve),
        torch.stack([point.value for point in course.curve]),
        course.seconds,
    )
