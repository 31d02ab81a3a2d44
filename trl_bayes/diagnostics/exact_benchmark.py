"""Trainers side by side on tasks whose posterior is known exactly: where each run ends, in nats, and what it cost."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
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
from .exact import PolicyFit
from .tiny import EnumerableTask, balance_task, bigram_task, hard_constraint_task, letter_count_task


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

    def log_evidence(self, rewards: torch.Tensor) -> torch.Tensor:
        """`phi` of all completions, `(N,)`."""
        return self.target.log_evidence(rewards.unsqueeze(1))


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
    """Where a run ended; `curve` maps generated samples to the fit at that point."""

    problem: str
    method: str
    seed: int
    samples: int
    seconds: float
    fit: PolicyFit
    curve: dict[int, PolicyFit] = field(default_factory=dict)


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
    """Our trainers that can reach the problem's posterior and, as yardsticks for a tilt, TRL's."""
    finite_outside_the_support = [
        Method("DPGTrainer", DPGTrainer, DPGConfig),
        Method("FDPGTrainer jensen_shannon", FDPGTrainer, FDPGConfig, {"divergence": "jensen_shannon"}),
        Method("FDPGTrainer forward_kl", FDPGTrainer, FDPGConfig, {"divergence": "forward_kl"}),
    ]
    if problem.target.hard:
        return finite_outside_the_support
    return [
        Method("TRL GRPOTrainer", GRPOTrainer, GRPOConfig),
        Method("TRL RLOOTrainer", RLOOTrainer, RLOOConfig),
        Method("KLRLTrainer", KLRLTrainer, KLRLConfig),
        Method("TrajectoryBalanceTrainer", TrajectoryBalanceTrainer, TrajectoryBalanceConfig),
        *finite_outside_the_support,
    ]


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
        evaluate_at (`Iterable[int]`, *optional*): steps after which to record the fit in the curve.
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
            "per_device_train_batch_size": 256,
            "num_generations": 16,
            "max_completion_length": task.max_completion_length,
            "max_steps": 400,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "linear",
            "beta": 0.1 if problem.beta is None else problem.beta,
            "seed": seed,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
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
            return task.evaluate(cast(PreTrainedModel, trainer.model), tokenizer, log_prior, problem.log_evidence)

        recorder = _Recorder(fit, evaluate_at)
        trainer.add_callback(recorder)
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start - recorder.seconds
        per_step = arguments["per_device_train_batch_size"] / arguments.get("num_iterations", 1)
        curve = {round(step * per_step): value for step, value in recorder.fits.items()}
        return Run(problem.name, method.name, seed, round(arguments["max_steps"] * per_step), seconds, fit(), curve)


class _Recorder(TrainerCallback):
    """Evaluates the policy exactly after some steps, and knows how long that took."""

    def __init__(self, fit: Callable[[], PolicyFit], steps: Iterable[int]):
        self.fit = fit
        self.steps = set(steps)
        self.fits: dict[int, PolicyFit] = {}
        self.seconds = 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step in self.steps:
            start = time.perf_counter()
            self.fits[state.global_step] = self.fit()
            self.seconds += time.perf_counter() - start


def to_markdown(runs: Sequence[Run]) -> str:
    """A table with a row per problem and method: means over seeds, and the worst seed of `KL(p||pi)`."""
    lines = [
        "| problem | method | samples | KL(p‖π) mean | worst seed | KL(π‖p) | TV | mass outside | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for problem, method in dict.fromkeys((run.problem, run.method) for run in runs):
        group = [run for run in runs if (run.problem, run.method) == (problem, method)]
        for samples in [*sorted(group[0].curve), group[0].samples]:
            fits = [run.curve.get(samples, run.fit) for run in group]
            forward, reverse, variation, outside = (
                [getattr(fit, name) for fit in fits]
                for name in ("forward_kl", "reverse_kl", "total_variation", "mass_outside")
            )
            seconds = statistics.mean(run.seconds * samples / run.samples for run in group)
            lines.append(
                f"| {problem} | {method} | {samples:,} | {statistics.mean(forward):.4f} | {max(forward):.4f} | "
                f"{statistics.mean(reverse):.4f} | {statistics.mean(variation):.4f} | "
                f"{statistics.mean(outside):.4f} | {seconds:.0f} |"
            )
    return "\n".join(lines) + "\n"


def write(runs: Sequence[Run], folder: Path) -> None:
    """Writes `exact.json` (every run) and `exact.md` (the table)."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {**vars(run), "fit": run.fit._asdict(), "curve": {k: v._asdict() for k, v in run.curve.items()}}
        for run in runs
    ]
    (folder / "exact.json").write_text(json.dumps(records, indent=1))
    (folder / "exact.md").write_text(to_markdown(runs))
