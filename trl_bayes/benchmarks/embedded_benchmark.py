"""Trainers side by side on the embedded prior: lines of Python that parse, measured against exact samples.

The target of all is the prior given that the line parses. Settings are those of `recipes/python_syntax`. KL-RL and
TRL's trainers have no hard target: they maximize the reward, 0 or 1, with the KL penalty of `kl_rl.yaml`. All take
plain gradient steps, and TRL's losses have scales of their own: RLOO's is that of KL-RL times beta, so that it gets
the learning rate divided by beta; GRPO divides by the rewards' deviation and by the number of tokens, and has its own.
"""

import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
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
from .exact_benchmark import Method
from .learning_curve import Point, Recorder


PROBLEM = "python-lines"
_POSTERIOR_SAMPLES = 200  # of each prompt: a policy is scored at them, again and again for its curve
_GRPO_LEARNING_RATE = 0.05  # the better of 0.01 and 0.05
_METRICS = ("reward", "forward_kl", "total_variation", "kl_prior")


@dataclass(frozen=True)
class EmbeddedRun:
    """Where a training ended, after how many completions and seconds; `curve` is `KL(p||pi)` on its way there."""

    method: str
    seed: int
    samples: int
    seconds: float
    evaluation: Evaluation
    curve: tuple[Point[Estimate], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        points = [
            {"samples": at.samples, "seconds": at.seconds, "forward_kl": at.value.to_dict()} for at in self.curve
        ]
        return {**vars(self), "evaluation": self.evaluation.to_dict(), "curve": points}


def recipe(name: str) -> dict[str, Any]:
    """What `recipes/python_syntax/<name>.yaml` says."""
    return yaml.safe_load(shipped_file(f"recipes/python_syntax/{name}.yaml").read_text(encoding="utf-8"))


def methods() -> list[Method]:
    """The trainers, each with the settings of its recipe; TRL's have those of KL-RL, but for the learning rate."""

    def method(name: str, trainer: Callable[..., Any], config: Any, recipe_name: str, **other: Any) -> Method:
        known = {field.name for field in dataclasses.fields(config)}
        settings = {key: value for key, value in recipe(recipe_name).items() if key in known}
        return Method(name, trainer, config, settings | other)

    kl_rl = recipe("kl_rl")
    rloo_learning_rate = kl_rl["learning_rate"] / kl_rl["beta"]
    return [
        method("TRL GRPOTrainer", GRPOTrainer, GRPOConfig, "kl_rl", learning_rate=_GRPO_LEARNING_RATE),
        method("TRL RLOOTrainer", RLOOTrainer, RLOOConfig, "kl_rl", learning_rate=rloo_learning_rate),
        method("KLRLTrainer", KLRLTrainer, KLRLConfig, "kl_rl"),
        method("DPGTrainer", DPGTrainer, DPGConfig, "dpg"),
        method("FDPGTrainer jensen_shannon", FDPGTrainer, FDPGConfig, "f_dpg"),
    ]


def steps(method: Method, samples: int) -> int:
    """Steps in which a training draws so many completions: at least one, at most the recipe's number."""
    return min(method.settings["max_steps"], max(1, samples // method.settings["per_device_train_batch_size"]))


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
    method: Method,
    posterior: Posterior,
    *,
    seed: int = 0,
    num_per_prompt: int = 400,
    evaluate_at: Iterable[int] = (),
    **settings: Any,
) -> EmbeddedRun:
    """
    Trains one method on the embedded prior and measures how far it is from the posterior.

    Args:
        method ([`~trl_bayes.benchmarks.exact_benchmark.Method`]): one of [`methods`].
        posterior ([`~trl_bayes.evaluation.posterior.Posterior`]): from [`reference`].
        seed (`int`, *optional*, defaults to `0`): of the training and of the policy's samples.
        num_per_prompt (`int`, *optional*, defaults to `400`): samples of the policy for each prompt, at the end.
        evaluate_at (`Iterable[int]`, *optional*): steps after which to record `KL(p||pi)`; 0 is the start.
        settings: training arguments that differ from the recipe's.

    Returns:
        [`EmbeddedRun`]
    """
    arguments = {
        **method.settings,
        "seed": seed,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }
    prior, tokenizer = _load_prior(arguments["use_cpu"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = method.trainer(
            model=prior_path(),
            reward_funcs=[parses],
            args=method.config(**{**arguments, "output_dir": folder}),
            train_dataset=Dataset.from_dict({"prompt": prompts()}),
            processing_class=tokenizer,
        )
        policy = cast(PreTrainedModel, trainer.model)
        exact = posterior.exact

        def distance() -> Estimate:
            log_policy = log_probs(policy, exact, posterior.prior.settings)
            return forward_kl(exact.log_prior + exact.phi, log_policy, exact.prompt_index, posterior.z)

        per_step = arguments["per_device_train_batch_size"] / arguments.get("num_iterations", 1)
        recorder = Recorder(distance, evaluate_at, per_step)
        trainer.add_callback(recorder)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        seconds = recorder.seconds
        evaluation, _ = evaluate(
            policy,
            prior,
            tokenizer,
            [parses],
            posterior,
            num_per_prompt=num_per_prompt,
            name=method.name,
            diversity=False,
            seed=seed + 1,  # 0 is that of the prior's samples
        )
    samples = round(arguments["max_steps"] * per_step)
    return EmbeddedRun(method.name, seed, samples, seconds, evaluation, tuple(recorder.points))


def prior_evaluation(posterior: Posterior) -> Evaluation:
    """Of the prior itself: where every training starts."""
    return evaluate_prior(posterior, diversity=False)


def to_markdown(runs: Sequence[EmbeddedRun], prior: Evaluation) -> str:
    """A row for the prior, and one for each method: means over seeds, standard errors, and the seeds' range."""
    lines = [
        "| trainer | samples | lines that parse | KL(p‖π) | TV(p, π) | KL(π‖π₀) | seconds |",
        "|---|---|---|---|---|---|---|",
        f"| the prior | 0 | {' | '.join(_cell([prior.metrics[name]], name) for name in _METRICS)} | |",
    ]
    for method in dict.fromkeys(run.method for run in runs):
        group = [run for run in runs if run.method == method]
        cells = [_cell([run.evaluation.metrics[name] for run in group], name) for name in _METRICS]
        seconds = statistics.mean(run.seconds for run in group)
        lines.append(f"| {method} | {group[0].samples:,} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


def _cell(estimates: Sequence[Estimate], metric: str) -> str:
    """The mean over seeds ± the standard error of one seed's estimate, and the seeds' range if there are several."""
    if not all(estimate.trusted for estimate in estimates):
        return "unsure"
    values = [estimate.value for estimate in estimates]
    if not all(map(math.isfinite, values)):
        return "∞"
    error = statistics.mean(estimate.standard_error for estimate in estimates)
    scale, digits, unit = (100.0, 1, " %") if metric == "reward" else (1.0, 3, "")

    def number(value: float) -> str:
        return f"{scale * value:.{digits}f}"

    spread = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    return f"{number(statistics.mean(values))} ± {number(error)}{unit}{spread}"
