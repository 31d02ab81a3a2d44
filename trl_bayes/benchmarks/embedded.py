"""Trainers side by side on the embedded prior: lines of Python that parse, measured against exact samples.

The target of all is the prior given that the line parses. Settings are those of `recipes/python_syntax`. KL-RL and
TRL's trainers have no hard target: they maximize the reward, 0 or 1, with the KL penalty of `kl_rl.yaml`. All take
plain gradient steps, and TRL's losses have scales of their own: RLOO's is that of KL-RL times beta, so that it gets
the learning rate divided by beta; GRPO divides by the rewards' deviation and by the number of tokens, and has its own.
"""

import dataclasses
import json
import math
import pickle
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from datasets import Dataset
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from .. import DPGConfig, DPGTrainer, FDPGConfig, FDPGTrainer, KLRLConfig, KLRLTrainer
from ..assets import embedded_path, shipped_file
from ..evaluation.distances import forward_kl
from ..evaluation.evaluate import Evaluation, evaluate, evaluate_prior
from ..evaluation.posterior import Posterior, condition
from ..language_models.scoring import log_probs
from ..language_models.settings import SamplingSettings
from ..prior.reference import draw_prior
from ..rewards import parses
from ..statistics.estimate import Estimate
from ..targets import Constraint
from .jobs import in_order, quiet
from .learning_curve import log_spaced, train_recorded
from .section import Findings
from .tables import markdown_table
from .trainings import SILENT, TrainerSetup, TrainingRun, TrainingsArguments, check_parts, chosen, curves_of


EmbeddedRun = TrainingRun[Estimate, Evaluation]
PROBLEM = "python-lines"
_POSTERIOR_SAMPLES = 200  # of each prompt: a policy is scored at them, again and again for its curve
_GRPO_LEARNING_RATE = 0.05  # the better of 0.01 and 0.05
_METRICS = ("reward", "forward_kl", "total_variation", "kl_prior")


@dataclass
class EmbeddedArguments(TrainingsArguments):
    r"""
    Arguments of the section: those of [`~trl_bayes.benchmarks.trainings.TrainingsArguments`].

    `samples` defaults to 4,000, and the recipes have a budget of 19,200.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_parts(trainers(), self.methods)

    @property
    def most_samples(self) -> int:
        """Completions of a training, at most."""
        return self.samples or (160 if self.quick else 4_000)

    @property
    def prior_samples(self) -> int:
        """Samples of the prior for each prompt."""
        return 100 if self.quick else 1100

    @property
    def policy_samples(self) -> int:
        """Samples of a trained policy for each prompt."""
        return 60 if self.quick else 400


def run(args: EmbeddedArguments, progress: Progress) -> Iterator[Findings]:
    """Trains every chosen trainer with every seed."""
    quiet()
    posterior = reference(args.prior_samples, use_cpu=args.use_cpu)
    prior = prior_evaluation(posterior)
    for runs in in_order(jobs(args, posterior), args.num_parallel, progress, "embedded prior"):
        record = {"prior": prior.to_dict(), "runs": [to_record(run) for run in runs]}
        curves = curves_of(runs, _drawable, prior.metrics["forward_kl"].value)
        yield Findings(record, to_markdown(runs, prior, args.how()), [curves])


def jobs(args: EmbeddedArguments, posterior: Posterior) -> list[Callable[[], EmbeddedRun]]:
    """A training for each trainer and seed; they get the posterior pickled, since tensors would be shared."""
    pickled = pickle.dumps(posterior)
    found: list[Callable[[], EmbeddedRun]] = []
    for setup in chosen(trainers(), args.methods):
        number = steps(setup, args.most_samples)
        settings = {"evaluate_at": log_spaced(number, 6), "max_steps": number, "use_cpu": args.use_cpu}
        settings["num_per_prompt"] = args.policy_samples
        found += [partial(_train_pickled, setup, pickled, seed=seed, **settings) for seed in args.seeds]
    return found


def _train_pickled(setup: TrainerSetup, pickled: bytes, **settings: Any) -> EmbeddedRun:
    return train(setup, pickle.loads(pickled), **settings)


def _drawable(estimate: Estimate) -> float:
    return estimate.value if estimate.trusted else math.nan


def recipe(name: str) -> dict[str, Any]:
    """What `recipes/python_syntax/<name>.yaml` says."""
    return yaml.safe_load(shipped_file(f"recipes/python_syntax/{name}.yaml").read_text(encoding="utf-8"))


def trainers() -> list[TrainerSetup]:
    """The trainers, each with the settings of its recipe; TRL's have those of KL-RL, but for the learning rate."""

    def setup(name: str, trainer: Callable[..., Any], config: Any, recipe_name: str, **other: Any) -> TrainerSetup:
        known = {field.name for field in dataclasses.fields(config)}
        settings = {key: value for key, value in recipe(recipe_name).items() if key in known}
        return TrainerSetup(name, trainer, config, settings | other)

    kl_rl = recipe("kl_rl")
    rloo_learning_rate = kl_rl["learning_rate"] / kl_rl["beta"]
    return [
        setup("TRL GRPOTrainer", GRPOTrainer, GRPOConfig, "kl_rl", learning_rate=_GRPO_LEARNING_RATE),
        setup("TRL RLOOTrainer", RLOOTrainer, RLOOConfig, "kl_rl", learning_rate=rloo_learning_rate),
        setup("KLRLTrainer", KLRLTrainer, KLRLConfig, "kl_rl"),
        setup("DPGTrainer", DPGTrainer, DPGConfig, "dpg"),
        setup("FDPGTrainer jensen_shannon", FDPGTrainer, FDPGConfig, "f_dpg"),
    ]


def steps(setup: TrainerSetup, samples: int) -> int:
    """Steps in which a training draws so many completions: at least one, at most the recipe's number."""
    return min(setup.settings["max_steps"], max(1, samples // setup.settings["per_device_train_batch_size"]))


def prior_path() -> str:
    """Folder of the prior that the recipes train."""
    return embedded_path(recipe("dpg")["model_name_or_path"])


def prompts() -> list[str]:
    """The prompts that come with the prior."""
    path = embedded_path(recipe("dpg")["dataset_name"], "prompts.jsonl")
    return [json.loads(line)["prompt"] for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _load_prior(use_cpu: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    device = "cpu" if use_cpu or not torch.cuda.is_available() else "cuda"
    prior = AutoModelForCausalLM.from_pretrained(prior_path()).eval().to(device)
    return prior, AutoTokenizer.from_pretrained(prior_path())


def reference(num_per_prompt: int, *, seed: int = 0, use_cpu: bool = True) -> Posterior:
    """
    The prior's samples conditioned on lines that parse: exact samples of the posterior, and its log Z.

    Args:
        num_per_prompt (`int`): samples of the prior for each prompt.
        seed (`int`, *optional*, defaults to `0`): of the samples.
        use_cpu (`bool`, *optional*, defaults to `True`): not the GPU, if there is one.
    """
    prior, tokenizer = _load_prior(use_cpu)
    settings = SamplingSettings(recipe("dpg")["max_completion_length"], seed=seed)
    drawn = draw_prior(prior, tokenizer, prompts(), [parses], num_per_prompt, settings)
    return condition(drawn, Constraint(), max_per_prompt=_POSTERIOR_SAMPLES)


def train(
    setup: TrainerSetup,
    posterior: Posterior,
    *,
    seed: int = 0,
    num_per_prompt: int = 400,
    evaluate_at: Iterable[int] = (),
    **settings: Any,
) -> EmbeddedRun:
    """
    Trains on the embedded prior and measures how far the policy is from the posterior.

    Args:
        setup ([`~trl_bayes.benchmarks.trainings.TrainerSetup`]): one of [`trainers`].
        posterior ([`~trl_bayes.evaluation.posterior.Posterior`]): from [`reference`].
        seed (`int`, *optional*, defaults to `0`): of the training and of the policy's samples.
        num_per_prompt (`int`, *optional*, defaults to `400`): samples of the policy for each prompt, at the end.
        evaluate_at (`Iterable[int]`, *optional*): steps after which to record `KL(p||pi)`; 0 is the start.
        settings: training arguments that differ from the recipe's.
    """
    arguments = {**setup.settings, "seed": seed, "use_cpu": True, **SILENT, **settings}
    prior, tokenizer = _load_prior(arguments["use_cpu"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = setup.trainer(
            model=prior_path(),
            reward_funcs=[parses],
            args=setup.config(**{**arguments, "output_dir": folder}),
            train_dataset=Dataset.from_dict({"prompt": prompts()}),
            processing_class=tokenizer,
        )
        policy = cast(PreTrainedModel, trainer.model)
        samples, seconds, curve = train_recorded(trainer, _distance(policy, posterior), evaluate_at)
        evaluation, _ = evaluate(
            policy,
            prior,
            tokenizer,
            [parses],
            posterior,
            num_per_prompt=num_per_prompt,
            name=setup.name,
            diversity=False,
            seed=seed + 1,  # 0 is that of the prior's samples
        )
    return TrainingRun(PROBLEM, setup.name, seed, samples, seconds, evaluation, curve)


def _distance(policy: PreTrainedModel, posterior: Posterior) -> Callable[[], Estimate]:
    """`KL(p||pi)` of the policy as it is when asked."""

    def distance() -> Estimate:
        log_policy = log_probs(policy, posterior.points, posterior.prior.settings)
        return forward_kl(posterior.samples(log_policy), posterior.z)

    return distance


def prior_evaluation(posterior: Posterior) -> Evaluation:
    """Of the prior itself: where every training starts."""
    return evaluate_prior(posterior, diversity=False)


def to_record(run: EmbeddedRun) -> dict[str, Any]:
    """A run as JSON."""
    return run.to_record("evaluation", Evaluation.to_dict, lambda estimate: {"forward_kl": estimate.to_dict()})


def to_markdown(runs: Sequence[EmbeddedRun], prior: Evaluation, how: str) -> str:
    """The section's part of the page."""
    text = (
        f"Lines of Python; p is the prior given that the line parses. Means over {how}; ± the standard error of one "
        "seed's estimate, in brackets the smallest and the largest seed. The error of KL(p‖π) and TV is mostly "
        "that of log Z and of the posterior's samples, which all rows share: rows differ by less."
    )
    return "\n\n".join(["## The embedded prior", text, table(runs, prior)])


def table(runs: Sequence[EmbeddedRun], prior: Evaluation) -> str:
    """A row for the prior, and one for each trainer: means over seeds, standard errors, and the seeds' range."""
    rows = [["the prior", "0", *(_cell([prior.metrics[name]], name) for name in _METRICS), ""]]
    for method in dict.fromkeys(run.method for run in runs):
        group = [run for run in runs if run.method == method]
        cells = [_cell([run.final.metrics[name] for run in group], name) for name in _METRICS]
        seconds = statistics.mean(run.seconds for run in group)
        rows.append([method, f"{group[0].samples:,}", *cells, f"{seconds:.1f}"])
    columns = ["trainer", "samples", "lines that parse", "KL(p‖π)", "TV(p, π)", "KL(π‖π₀)", "seconds"]
    return markdown_table(columns, rows)


def _cell(estimates: Sequence[Estimate], metric: str) -> str:
    """The mean over seeds ± the standard error of one seed's estimate, and the seeds' range if there are several."""
    if not all(estimate.trusted for estimate in estimates):
        return "not reliable"
    values = [estimate.value for estimate in estimates]
    if not all(map(math.isfinite, values)):
        return "∞"
    error = statistics.mean(estimate.standard_error for estimate in estimates)
    scale, digits, unit = (100.0, 1, " %") if metric == "reward" else (1.0, 3, "")

    def number(value: float) -> str:
        return f"{scale * value:.{digits}f}"

    spread = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    return f"{number(statistics.mean(values))} ± {number(error)}{unit}{spread}"
