"""Trainers side by side on tasks whose posterior is known exactly: where each run ends, in nats, and what it cost."""

import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback, TrainingArguments
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
)
from ..targets import Constraint, Target, Tilt
from .enumeration import PolicyFit
from .learning_curve import Point, Recorder
from .tiny import EnumerableTask, balance_task, bigram_task, hard_constraint_task, letter_count_task


_BUDGET = {"per_device_train_batch_size": 256, "max_steps": 400}


@dataclass(frozen=True)
class Problem:
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

    def steps(self, samples: int) -> int:
        """Steps in which a training draws so many completions: at least one, at most the problem's own number."""
        budget = {**_BUDGET, **self.settings}
        return min(budget["max_steps"], max(1, samples // budget["per_device_train_batch_size"]))

    def log_potential(self, rewards: torch.Tensor) -> torch.Tensor:
        """`phi` of all completions, `(N,)`."""
        return self.target.log_potential(rewards.unsqueeze(1))


@dataclass(frozen=True)
class Method:
    """A trainer with its configuration, as one row of the table."""

    name: str
    trainer: Callable[..., GRPOTrainer | RLOOTrainer]
    config: Callable[..., TrainingArguments]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether the trainer takes a `target`."""
        return self.trainer not in (GRPOTrainer, RLOOTrainer)


@dataclass(frozen=True)
class Run:
    """Where a run ended, after how many generated samples and seconds of training; `curve` is its way there."""

    problem: str
    method: str
    seed: int
    samples: int
    seconds: float
    fit: PolicyFit
    curve: tuple[Point[PolicyFit], ...] = ()


def problems() -> dict[str, Problem]:
    """Tilts of tiny priors, and a rare event to condition on with two budgets."""
    # A rare event is far from the prior: many small steps, all the more where samples are few
    short = {"adam_beta2": 0.99, "learning_rate": 5e-3, "per_device_train_batch_size": 32, "max_steps": 640}
    long = {"adam_beta2": 0.99, "learning_rate": 4e-3, "per_device_train_batch_size": 128, "max_steps": 800}
    return {
        problem.name: problem
        for problem in (
            Problem("letters", letter_count_task(), beta=0.7),
            Problem("bigrams", bigram_task(), beta=0.5),
            Problem("balance", balance_task(), beta=0.6),
            Problem("hard-20k", hard_constraint_task(), settings=short),
            Problem("hard-100k", hard_constraint_task(), settings=long),
        )
    }


def methods(problem: Problem) -> list[Method]:
    """
    TRL's trainers as yardsticks, and those of ours that can reach the problem's posterior.

    TRL's have no hard target. On one they maximize the reward, 0 or 1, with the beta of [`train`], whose optimum is
    the posterior but for `exp(-1/beta)` of the odds: 5e-5 at 0.1.
    """
    theirs = [
        Method("TRL GRPOTrainer", GRPOTrainer, GRPOConfig),
        Method("TRL RLOOTrainer", RLOOTrainer, RLOOConfig),
    ]
    finite_outside_the_support = [
        Method("DPGTrainer", DPGTrainer, DPGConfig),
        Method("FDPGTrainer jensen_shannon", FDPGTrainer, FDPGConfig, {"divergence": "jensen_shannon"}),
        Method("FDPGTrainer forward_kl", FDPGTrainer, FDPGConfig, {"divergence": "forward_kl"}),
    ]
    if problem.target.hard:
        return [*theirs, *finite_outside_the_support]
    return [
        *theirs,
        Method("KLRLTrainer", KLRLTrainer, KLRLConfig),
        Method("TrajectoryBalanceTrainer", TrajectoryBalanceTrainer, TrajectoryBalanceConfig),
        *finite_outside_the_support,
    ]


def default_arguments(task: EnumerableTask) -> dict[str, Any]:
    """Training arguments that reach the posterior of an enumerable task: 400 steps of 256 completions on the CPU."""
    return {
        **_BUDGET,
        "num_generations": 16,
        "max_completion_length": task.max_completion_length,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def train(
    problem: Problem,
    method: Method,
    *,
    seed: int = 0,
    start_seed: int | None = None,
    evaluate_at: Iterable[int] = (),
    **settings: Any,
) -> Run:
    """
    Trains one method on one problem and compares the result with the exact posterior.

    Args:
        problem ([`Problem`]), method ([`Method`]): what to run.
        seed (`int`, *optional*, defaults to `0`): of the training run; the prior is the problem's.
        start_seed (`int`, *optional*): trains from a tiny model of this seed and keeps the problem's as the prior.
        evaluate_at (`Iterable[int]`, *optional*): steps after which to record the fit in the curve; 0 is the start.
        settings: training arguments that differ from the defaults here, 400 steps of 256 completions in groups of 16.

    Returns:
        [`Run`]
    """
    task = problem.task
    with tempfile.TemporaryDirectory() as folder:
        model_path = task.build_model(f"{folder}/prior")
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        log_prior = task.log_probs(AutoModelForCausalLM.from_pretrained(model_path), tokenizer)
        arguments = {
            **default_arguments(task),
            "beta": 0.1 if problem.beta is None else problem.beta,
            "seed": seed,
            **problem.settings,
            **method.settings,
            **settings,
        }
        start_path = model_path
        if start_seed is not None:
            start_path = replace(task, seed=start_seed).build_model(f"{folder}/start")
            arguments["prior_model_name_or_path"] = model_path
        trainer = method.trainer(
            model=start_path,
            reward_funcs=task.reward_func,
            args=method.config(output_dir=f"{folder}/out", **arguments),
            train_dataset=task.dataset(arguments["per_device_train_batch_size"]),
            processing_class=tokenizer,
            **({"target": problem.target} if method.is_ours else {}),
        )

        def fit() -> PolicyFit:
            return task.evaluate(cast(PreTrainedModel, trainer.model), tokenizer, log_prior, problem.log_potential)

        per_step = arguments["per_device_train_batch_size"] / arguments.get("num_iterations", 1)
        recorder = Recorder(fit, evaluate_at, per_step)
        trainer.add_callback(recorder)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        seconds, samples = recorder.seconds, round(arguments["max_steps"] * per_step)
        return Run(problem.name, method.name, seed, samples, seconds, fit(), tuple(recorder.points))


def _groups(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    """The seeds of each problem and method, in the order in which these come."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.problem, run.method), []).append(run)
    return groups


def to_markdown(runs: Sequence[Run]) -> str:
    """A table with a row per problem and method: means over seeds, and the worst seed of `KL(p||pi)`."""
    lines = [
        "| problem | trainer | samples | KL(p‖π) mean | worst seed | KL(π‖p) | TV | mass outside | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (problem, method), group in _groups(runs).items():
        forward, reverse, variation, outside = (
            [getattr(run.fit, name) for run in group]
            for name in ("forward_kl", "reverse_kl", "total_variation", "mass_outside")
        )
        lines.append(
            f"| {problem} | {method} | {group[0].samples:,} | {statistics.mean(forward):.4f} | {max(forward):.4f} | "
            f"{_number(statistics.mean(reverse))} | {statistics.mean(variation):.4f} | "
            f"{statistics.mean(outside):.4f} | {statistics.mean(run.seconds for run in group):.1f} |"
        )
    return "\n".join(lines) + "\n"


def curves_to_markdown(runs: Sequence[Run]) -> str:
    """For each problem a table of `KL(p||pi)`, mean over seeds: a row per method, a column per number of samples."""
    tables = []
    for name in dict.fromkeys(run.problem for run in runs):
        groups = _groups(run for run in runs if run.problem == name)
        columns = sorted({point.samples for group in groups.values() for run in group for point in run.curve})
        lines = [
            f"| {name}: KL(p‖π) after | {' | '.join(f'{samples:,}' for samples in columns)} |",
            f"|---|{'---|' * len(columns)}",
        ]
        for (_, method), group in groups.items():
            found: dict[int, list[float]] = {}
            for point in (point for run in group for point in run.curve):
                found.setdefault(point.samples, []).append(point.value.forward_kl)
            cells = [f"{statistics.mean(found[samples]):.4f}" if samples in found else "" for samples in columns]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "∞"


def to_record(run: Run) -> dict[str, Any]:
    """A run as strict JSON: an infinite divergence is `null`."""
    points = [{"samples": at.samples, "seconds": at.seconds, **_finite(at.value)} for at in run.curve]
    return {**vars(run), "fit": _finite(run.fit), "curve": points}


def _finite(fit: PolicyFit) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in fit._asdict().items()}
