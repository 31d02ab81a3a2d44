"""Training where all completions are known: tasks with their target and budget, and how close a trainer comes."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from .. import (
    DPGConfig,
    DPGTrainer,
    FDPGConfig,
    FDPGTrainer,
    KLRLConfig,
    KLRLTrainer,
    TrajectoryBalanceConfig,
    TrajectoryBalanceTrainer,
    XPOConfig,
    XPOTrainer,
)
from ..targets import Constraint, Target, Tilt
from ..trainers.posterior_trainer import PosteriorTrainer
from .enumeration import PolicyFit
from .learning_curve import train_recorded
from .tiny import EnumerableTask, balance_task, bigram_task, hard_constraint_task, letter_count_task
from .trainings import SILENT, TrainerSetup, TrainingRun


ExactRun = TrainingRun[PolicyFit, PolicyFit]
_BUDGET = {"per_device_train_batch_size": 256, "max_steps": 400}
_REPLAY: dict[str, Any] = {"replay_buffer_size": 8192, "replay_ratio": 3.0}
_UPDATES: dict[str, Any] = {"num_iterations": 4}
_OFF_POLICY: tuple[tuple[str, Any, Any, dict[str, Any]], ...] = (
    ("dpg", DPGTrainer, DPGConfig, {}),
    ("f-dpg jensen_shannon", FDPGTrainer, FDPGConfig, {"divergence": "jensen_shannon"}),
)
_MAIN = ("TRL RLOOTrainer", "KLRLTrainer", "DPGTrainer", "FDPGTrainer jensen_shannon")


@dataclass(frozen=True)
class ExactProblem:
    """
    A task with its target and the budget to reach it.

    Args:
        name (`str`): for the table.
        task ([`EnumerableTask`]): prompts, reward and prior.
        beta (`float`, *optional*): temperature of the tilt; `None` for the hard constraint.
        settings (`dict`, *optional*): training arguments that differ from [`train`]'s.
    """

    name: str
    task: EnumerableTask
    beta: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> Target:
        """The posterior of this problem."""
        return Constraint() if self.beta is None else Tilt(self.beta)

    @property
    def batch_size(self) -> int:
        """Completions of a step."""
        return int({**_BUDGET, **self.settings}["per_device_train_batch_size"])

    def steps(self, samples: int) -> int:
        """Steps in which a training draws so many completions: at least one, at most the problem's own number."""
        return min({**_BUDGET, **self.settings}["max_steps"], max(1, samples // self.batch_size))

    def updates(self, steps: int, setup: TrainerSetup) -> int:
        """Updates in which a trainer, with its own batches, draws what the others draw in so many steps."""
        batch_size = setup.settings.get("per_device_train_batch_size", self.batch_size)
        return steps * (self.batch_size // batch_size) * int(setup.settings.get("num_iterations", 1))

    def log_potential(self, rewards: torch.Tensor) -> torch.Tensor:
        """`phi` of all completions, `(N,)`."""
        return self.target.log_potential(rewards.unsqueeze(1))


def problems() -> dict[str, ExactProblem]:
    """Tilts of tiny priors, and a rare event to condition on with two budgets."""
    # A rare event is far from the prior: many small steps, all the more where samples are few
    short = {"adam_beta2": 0.99, "learning_rate": 5e-3, "per_device_train_batch_size": 32, "max_steps": 640}
    long = {"adam_beta2": 0.99, "learning_rate": 4e-3, "per_device_train_batch_size": 128, "max_steps": 800}
    return {
        problem.name: problem
        for problem in (
            ExactProblem("letters", letter_count_task(), beta=0.7),
            ExactProblem("bigrams", bigram_task(), beta=0.5),
            ExactProblem("balance", balance_task(), beta=0.6),
            ExactProblem("hard-20k", hard_constraint_task(), settings=short),
            ExactProblem("hard-100k", hard_constraint_task(), settings=long),
        )
    }


def trainers(problem: ExactProblem) -> list[TrainerSetup]:
    """
    TRL's trainers as yardsticks, and those of ours that can reach the problem's posterior.

    TRL's have no hard target. On one they maximize the reward, 0 or 1, with the beta of [`train`], whose optimum is
    the posterior but for `exp(-1/beta)` of the odds: 5e-5 at 0.1.
    """
    theirs = [
        TrainerSetup("TRL GRPOTrainer", GRPOTrainer, GRPOConfig),
        TrainerSetup("TRL RLOOTrainer", RLOOTrainer, RLOOConfig),
    ]
    finite_outside_the_support = [
        TrainerSetup("DPGTrainer", DPGTrainer, DPGConfig),
        TrainerSetup("FDPGTrainer jensen_shannon", FDPGTrainer, FDPGConfig, {"divergence": "jensen_shannon"}),
        TrainerSetup("FDPGTrainer forward_kl", FDPGTrainer, FDPGConfig, {"divergence": "forward_kl"}),
    ]
    if problem.target.hard:
        return [*theirs, *finite_outside_the_support]
    return [
        *theirs,
        TrainerSetup("KLRLTrainer", KLRLTrainer, KLRLConfig),
        TrainerSetup("TrajectoryBalanceTrainer", TrajectoryBalanceTrainer, TrajectoryBalanceConfig),
        *finite_outside_the_support,
    ]


def replaying(problem: ExactProblem) -> list[TrainerSetup]:
    """
    Trainers that use three completions of earlier policies for each fresh one: no more are drawn, and an update takes
    four times as long.

    With the reverse KL f-DPG is KL-RL with a `Z`.
    """
    divergences = ["jensen_shannon"] if problem.target.hard else ["jensen_shannon", "reverse_kl"]
    return [
        TrainerSetup("dpg, replay 3", DPGTrainer, DPGConfig, _REPLAY),
        *(
            TrainerSetup(f"f-dpg {name}, replay 3", FDPGTrainer, FDPGConfig, {"divergence": name, **_REPLAY})
            for name in divergences
        ),
    ]


def reusing(problem: ExactProblem) -> list[TrainerSetup]:
    """Trainers that use each batch for four updates: no more are drawn, and an update costs what it did."""
    return [
        TrainerSetup(f"{name}, 4 updates", trainer, config, {**own, **_UPDATES})
        for name, trainer, config, own in _OFF_POLICY
    ]


def smaller(problem: ExactProblem) -> list[TrainerSetup]:
    """
    Trainers with a quarter of the batch and four times as many updates: no more are drawn, and none used again. Each
    quarter by the policy as it is by then, or four at once, of which three are older.
    """
    quarter = {"per_device_train_batch_size": problem.batch_size // 4}
    return [
        TrainerSetup(f"{setup.name}, {name}", setup.trainer, setup.config, {**setup.settings, **quarter, **settings})
        for setup in trainers(problem)
        for name, settings in (("quarter batches", {}), ("quarter batches, four at once", {"steps_per_generation": 4}))
        if setup.name in _MAIN
    ]


def mixing(problem: ExactProblem) -> list[TrainerSetup]:
    """
    Trainers a quarter of whose groups is the prior's, which the policy does not draw then: alone, with replay, and
    with four updates.

    The prior's are taken from 1,000 for each prompt, which are drawn besides.
    """
    mixture = {"prior_fraction": 0.25, "num_prior_samples": 1000}
    return [
        TrainerSetup(f"{name}, a quarter from the prior{further}", trainer, config, {**own, **mixture, **settings})
        for name, trainer, config, own in _OFF_POLICY
        for further, settings in (("", {}), (", replay 3", _REPLAY), (", 4 updates", _UPDATES))
    ]


def preferring(problem: ExactProblem) -> list[TrainerSetup]:
    """
    XPO without its bonus, whose fixed point is the tilt: with pairs that accumulate, and with fresh ones only.

    Half of the completions that it compares are the prior's, taken from 2,000 for each prompt. It has no hard target.
    """
    if problem.target.hard:
        return []
    without_bonus = {"alpha": 0.0, "num_prior_samples": 2000}
    return [
        TrainerSetup("XPO, all pairs", XPOTrainer, XPOConfig, without_bonus),
        TrainerSetup("XPO, fresh pairs", XPOTrainer, XPOConfig, {**without_bonus, "replay_buffer_size": 0}),
    ]


def default_arguments(task: EnumerableTask) -> dict[str, Any]:
    """Training arguments that reach the posterior of an enumerable task: 400 steps of 256 completions on the CPU."""
    return {
        **_BUDGET,
        **SILENT,
        "num_generations": 16,
        "max_completion_length": task.max_completion_length,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
    }


class Ready(NamedTuple):
    """A trainer on an enumerable task that has not begun, its tokenizer, and the prior's log-probabilities (P, N)."""

    trainer: Any
    tokenizer: PreTrainedTokenizerBase
    log_prior: torch.Tensor


@contextmanager
def ready_trainer(
    task: EnumerableTask,
    trainer: Callable[..., Any],
    config: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    start_seed: int | None = None,
    **others: Any,
) -> Iterator[Ready]:
    """
    Builds the task's prior in a folder that is there until the context ends, and a trainer that starts from it.

    Args:
        task ([`EnumerableTask`]): prompts and prior.
        trainer, config (`Callable`): their classes.
        arguments (`dict`): training arguments; `output_dir` is given here.
        start_seed (`int`, *optional*): starts from a tiny model of this seed and keeps the task's as the prior.
        others: of the trainer, such as `reward_funcs` and `target`.
    """
    with tempfile.TemporaryDirectory() as folder:
        model_path = task.build_model(f"{folder}/prior")
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        log_prior = task.log_probs(AutoModelForCausalLM.from_pretrained(model_path), tokenizer)
        start_path = model_path
        if start_seed is not None:
            start_path = replace(task, seed=start_seed).build_model(f"{folder}/start")
            arguments = {**arguments, "prior_model_name_or_path": model_path}
        made = trainer(
            model=start_path,
            args=config(output_dir=f"{folder}/out", **arguments),
            train_dataset=task.dataset(arguments["per_device_train_batch_size"]),
            processing_class=tokenizer,
            **others,
        )
        yield Ready(made, tokenizer, log_prior)


def train(
    problem: ExactProblem,
    setup: TrainerSetup,
    *,
    seed: int = 0,
    start_seed: int | None = None,
    evaluate_at: Iterable[int] = (),
    **settings: Any,
) -> ExactRun:
    """
    Trains on one problem and compares the result with the exact posterior.

    Args:
        problem ([`ExactProblem`]), setup ([`~trl_bayes.benchmarks.trainings.TrainerSetup`]): what to run.
        seed (`int`, *optional*, defaults to `0`): of the training run; the prior is the problem's.
        start_seed (`int`, *optional*): trains from a tiny model of this seed and keeps the problem's as the prior.
        evaluate_at (`Iterable[int]`, *optional*): steps after which to record the fit in the curve; 0 is the start.
        settings: training arguments that differ from the defaults here, 400 steps of 256 completions in groups of 16.
    """
    task = problem.task
    arguments = {
        **default_arguments(task),
        "beta": 0.1 if problem.beta is None else problem.beta,
        "seed": seed,
        **problem.settings,
        **setup.settings,
        **settings,
    }
    target = {"target": problem.target} if setup.takes_target else {}
    with ready_trainer(
        task,
        setup.trainer,
        setup.config,
        arguments,
        start_seed=start_seed,
        reward_funcs=task.reward_func,
        **target,
    ) as (trainer, tokenizer, log_prior):

        def fit() -> PolicyFit:
            return task.evaluate(cast(PreTrainedModel, trainer.model), tokenizer, log_prior, problem.log_potential)

        samples, seconds, curve = train_recorded(trainer, fit, evaluate_at)
        return TrainingRun(problem.name, setup.name, seed, samples, seconds, fit(), curve)


class Trained(NamedTuple):
    """A training run on an enumerable task, for all completions of each prompt."""

    trainer: PosteriorTrainer
    rewards: torch.Tensor
    """`(N, K)`, float64."""
    log_prior: torch.Tensor
    """`(P, N)`, in nats."""
    log_policy: torch.Tensor
    """`(P, N)`, in nats."""


def train_on(
    task: EnumerableTask,
    trainer_class: Callable[..., PosteriorTrainer] = KLRLTrainer,
    config_class: Callable[..., Any] = KLRLConfig,
    target: Target | dict[str, Any] | None = None,
    features: Sequence[Callable[[list[str]], list[float]]] | None = None,
    **settings: Any,
) -> Trained:
    """
    Trains on an enumerable task, whatever the target, and scores all its completions under the policy.

    Args:
        task ([`EnumerableTask`]): prompts, prior and reward.
        trainer_class, config_class (`Callable`, *optional*): defaults to KL-RL.
        target (`Target` or `dict`, *optional*): as the trainer's.
        features (`list[Callable]`, *optional*):
            Functions of the texts that become reward functions with their names. Defaults to the task's reward.
        settings: training arguments that differ from the defaults here, 400 steps of 256 completions in groups of 16
            with 2,000 prior samples a prompt.
    """
    features = [task.reward] if features is None else list(features)
    arguments = {**default_arguments(task), "num_prior_samples": 2000, **settings}
    others: dict[str, Any] = {} if target is None else {"target": target}
    rewards = [_as_reward_function(feature) for feature in features]
    with ready_trainer(task, trainer_class, config_class, arguments, reward_funcs=rewards, **others) as (
        trainer,
        tokenizer,
        log_prior,
    ):
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        log_policy = task.log_probs(trainer.model, tokenizer)
        texts = _texts(task, tokenizer)
        values = torch.tensor([feature(texts) for feature in features], dtype=torch.float64).T
        return Trained(trainer, values, log_prior, log_policy)


def _as_reward_function(feature: Callable[[list[str]], list[float]]) -> Callable[..., list[float]]:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return feature(completions)

    reward.__name__ = feature.__name__
    return reward


def _texts(task: EnumerableTask, tokenizer: Any) -> list[str]:
    completions = task.completions(tokenizer)
    pairs = zip(completions.ids, completions.mask, strict=True)
    return tokenizer.batch_decode([ids[mask] for ids, mask in pairs], skip_special_tokens=True)
