"""Decoding-time realignment and proxy tuning: exact distances to the posteriors that they stand in for.

Realigned (2402.02992): one policy that was trained at beta = 1, moved to other temperatures. Proxy (2310.12962,
2401.08565): what training did to a small model, added to a large prior. Nothing is trained: policies are the exact
posteriors, and the laws of both samplers are enumerated.
"""

import math
import tempfile
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bayes.benchmarks.fitted import fitted
from trl_bayes.benchmarks.laws import kl, mixed_by_token, tilt
from trl_bayes.benchmarks.paper import Setting, Shown, mean_and_spread
from trl_bayes.benchmarks.paper_figure import curve, finish, panels
from trl_bayes.benchmarks.tables import markdown_table
from trl_bayes.benchmarks.tiny import bigram_task, build_tiny_model, letter_count_task


BETA = 1.0
"""Temperature of training."""
BETAS = [0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0]
"""Temperatures of the target."""
FITS = {"unrelated": None, "fitted, 20 steps": 20, "fitted, 150 steps": 150}
"""How the small model came to be: random, or fitted to the large prior."""
TASKS = {"#a - #b/2": letter_count_task, "+1 for each a b, -1 if cut": bigram_task}


class Case:
    """A task with its prior, of one seed."""

    def __init__(self, name: str, seed: int):
        self.task = replace(TASKS[name](), seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            path = self.task.build_model(folder)
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.log_prior = self.task.log_probs(AutoModelForCausalLM.from_pretrained(path), self.tokenizer)
        self.rewards = self.task.rewards(self.tokenizer)
        self.completions = self.task.completions(self.tokenizer)

    def small(self, seed: int, steps: int | None) -> Tensor:
        """The law of a model with a layer of 8 dimensions, which knows of the prior what it learns in some steps."""
        with tempfile.TemporaryDirectory() as folder:
            build_tiny_model(folder, self.task.letters, 100 + seed, hidden_size=8, num_layers=1, num_heads=1)
            model = AutoModelForCausalLM.from_pretrained(folder)
        if steps is not None:
            model = fitted(model, self.task, self.tokenizer, self.log_prior, steps, learning_rate=0.02)
        return self.task.log_probs(model, self.tokenizer)

    def mixed(self, laws: list[Tensor], coefficients: list[float]) -> Tensor:
        return mixed_by_token(self.completions, laws, coefficients)


def realigned(name: str, seed: int) -> list[dict[str, float]]:
    """A row for each temperature of the target."""
    case = Case(name, seed)
    policy = tilt(case.log_prior, case.rewards, BETA)
    rows = []
    for beta in BETAS:
        target, factor = tilt(case.log_prior, case.rewards, beta), BETA / beta
        moved = case.mixed([case.log_prior, policy], [1 - factor, factor])
        scaled = case.mixed([policy], [factor])  # what sampling at the temperature beta would give
        distances = {"realigned": moved, "policy": policy, "policy, sampled at β": scaled, "prior": case.log_prior}
        rows.append({"beta": beta, **{way: kl(target, law).mean().item() for way, law in distances.items()}})
    return rows


def proxy(name: str, seed: int, steps: int | None) -> list[dict[str, float]]:
    """A row for each temperature, of the small pair's training and of the target alike."""
    case = Case(name, seed)
    small = case.small(seed, steps)
    rows = []
    for beta in BETAS:
        target, tuned = tilt(case.log_prior, case.rewards, beta), tilt(small, case.rewards, beta)
        laws = {
            "proxy": case.mixed([case.log_prior, tuned, small], [1.0, 1.0, -1.0]),
            "small policy": tuned,
            "prior": case.log_prior,
        }
        distances = {way: kl(target, law).mean().item() for way, law in laws.items()}
        rows.append({"beta": beta, "small_to_prior": kl(case.log_prior, small).mean().item(), **distances})
    return rows


def experiment(setting: Setting) -> Shown:
    """Both samplers on both tasks; the small models only on the first."""
    first, fits = next(iter(TASKS)), dict(list(FITS.items())[: 2 if setting.quick else 3])
    found: dict[str, dict[str, list[list[dict[str, float]]]]] = {
        "realigned": {name: [realigned(name, seed) for seed in setting.seeds] for name in TASKS},
        "proxy": {how: [proxy(first, seed, steps) for seed in setting.seeds] for how, steps in fits.items()},
    }
    return Shown(found, table(found), panels(lambda axes: draw(axes, found), 3))


def draw(axes: Any, found: Any) -> None:
    for panel, (name, runs) in zip(axes, found["realigned"].items(), strict=False):
        for index, way in enumerate(("realigned", "policy", "policy, sampled at β", "prior")):
            curve(panel, BETAS, [[drawable(row[way]) for row in rows] for rows in runs], index, way)
        scaled(panel)
        finish(panel, f"realigned: {name}", "β of the target; the policy's is 1", "KL(p ‖ ·), nats")
    panel = axes[2]
    for index, (how, runs) in enumerate(found["proxy"].items()):
        label = f"proxy, small model {how}"
        curve(panel, BETAS, [[row["proxy"] for row in rows] for rows in runs], index, label)
    last = found["proxy"][how]
    curve(panel, BETAS, [[row["small policy"] for row in rows] for rows in last], 4, f"small policy, {how}")
    curve(panel, BETAS, [[row["prior"] for row in rows] for rows in last], 3, "prior")
    scaled(panel)
    finish(
        panel, f"proxy: {next(iter(TASKS))}", "β of the target and of the small pair", "KL(p ‖ ·), nats", fontsize=7
    )


def drawable(distance: float) -> float:
    """A gap where a law is the target itself, which a logarithmic axis does not have."""
    return distance if distance > 1e-9 else math.nan


def scaled(panel: Any) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_ylim(5e-5, 2e3)  # the legend has the upper third


def table(found: Any) -> str:
    rows = []
    for name, runs in found["realigned"].items():
        for place, beta in enumerate(BETAS):
            ways = ("realigned", "policy", "policy, sampled at β", "prior")
            rows.append([name, f"{beta:g}", *(mean_and_spread([r[place][way] for r in runs], 4) for way in ways)])
    first = markdown_table(["reward", "β", "realigned", "policy of β = 1", "… sampled at β", "prior"], rows)
    rows = []
    for how, runs in found["proxy"].items():
        for place, beta in enumerate(BETAS):
            ways = ("small_to_prior", "proxy", "small policy", "prior")
            rows.append([how, f"{beta:g}", *(mean_and_spread([r[place][way] for r in runs], 4) for way in ways)])
    second = markdown_table(["small model", "β", "KL(π₀ ‖ small)", "proxy", "small policy", "prior"], rows)
    return f"KL(p_β ‖ ·) in nats, of the realigned policy:\n\n{first}\n\nand of proxy tuning:\n\n{second}"
