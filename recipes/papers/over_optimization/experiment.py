"""Over-optimization of a proxy reward: gold and proxy against sqrt(KL) for four ways to use the proxy (2210.10760)."""

import math
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor

from trl_bayes.benchmarks.descent import descend
from trl_bayes.benchmarks.laws import best_of_n_law, expected, kl, tilt
from trl_bayes.benchmarks.paper import Setting, Shown, enumerated, mean_and_spread
from trl_bayes.benchmarks.paper_figure import curve, finish, panels
from trl_bayes.benchmarks.tables import markdown_table
from trl_bayes.benchmarks.tiny import EnumerableTask, balance_task
from trl_bayes.divergences import get_divergence
from trl_bayes.estimators import Estimator, ImportanceWeights, PureRL
from trl_bayes.evaluation.figures import run_style
from trl_bayes.targets import Constraint


Point = dict[str, float]

NOISES = {"heavy-tailed noise": 2.0, "normal noise": math.inf}
"""Degrees of freedom of Student's t."""
SIZES = [2**power for power in range(1, 13)]
QUANTILES = [0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998]
BETAS = [64.0 * 0.85**power for power in range(48)]
EXACT = ("best of N", "KL-RL, posterior of each β", "constraint to a quantile")
TRAINED = ("pure RL, trained", "DPG to the 90 % quantile, trained")
GRID = [0.1 * step for step in range(25)]  # of sqrt(KL)


def proxy_noise(size: int, freedom: float, seed: int) -> Tensor:
    """One number for each completion, with the same quartiles whatever the tail."""
    generator = torch.Generator().manual_seed(1000 + seed)
    normal = torch.randn(size, generator=generator, dtype=torch.float64)
    if math.isinf(freedom):
        return normal
    squares = torch.randn(int(freedom), size, generator=generator, dtype=torch.float64).square().sum(dim=0)
    return normal / (squares / freedom).sqrt() * (0.6745 / 0.8165)  # quartiles of the normal and of t with 2


def task_of(seed: int) -> EnumerableTask:
    """As many "a" as "b", "c" at the end if possible: 364 completions of each of 2 prompts."""
    return replace(balance_task(), max_completion_length=5, prompts=("b c", "c a"), seed=seed)


class Case:
    """A prior with its gold reward and a noisy proxy of it."""

    def __init__(self, noise: str, seed: int):
        self.task = task_of(seed)
        self.log_prior, self.gold = enumerated(self.task)
        self.proxy = self.gold + proxy_noise(len(self.gold), NOISES[noise], seed)

    def point(self, law: Tensor) -> Point:
        """Where a law stands, averaged over prompts; rewards as gains over the prior's mean."""
        gold, proxy = (
            (expected(law, value) - expected(self.log_prior, value)).mean().item() for value in (self.gold, self.proxy)
        )
        return {"sqrt_kl": math.sqrt(max(0.0, kl(law, self.log_prior).mean().item())), "gold": gold, "proxy": proxy}

    def cut(self, quantile: float) -> float:
        """A threshold of the proxy that this share of the prior's samples, over all prompts, does not meet."""
        values, order = self.proxy.sort()
        below = self.log_prior.exp().mean(dim=0)[order].cumsum(dim=0)
        place = min(int(torch.searchsorted(below, quantile)), len(values) - 2)
        return ((values[place] + values[place + 1]) / 2).item()  # between two values, whatever the rounding

    def constrained(self, quantile: float) -> Tensor:
        """The prior where the proxy is above a quantile."""
        return (self.log_prior + Constraint(threshold=self.cut(quantile))(self.proxy.unsqueeze(1))).log_softmax(dim=-1)


def exact(noise: str, seed: int) -> dict[str, list[Point]]:
    """The laws of three ways to use the proxy, without any training."""
    case = Case(noise, seed)
    laws = (
        [best_of_n_law(case.log_prior, case.proxy, n) for n in SIZES],
        [tilt(case.log_prior, case.proxy, beta) for beta in BETAS],
        [case.constrained(quantile) for quantile in QUANTILES],
    )
    return {way: [case.point(law) for law in of_way] for way, of_way in zip(EXACT, laws, strict=True)}


def trained(noise: str, seed: int, way: str, steps: int) -> list[Point]:
    """A policy on its way."""
    case = Case(noise, seed)
    if way == TRAINED[0]:
        estimator: Estimator = PureRL(get_divergence("reverse_kl"))
        phi = case.proxy
    else:
        estimator = ImportanceWeights(get_divergence("forward_kl"))
        phi = Constraint(threshold=case.cut(0.9))(case.proxy.unsqueeze(1))
    at = {round(steps * share) for share in (0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)}
    course = descend(case.task, estimator, phi, steps=steps, seed=seed, evaluate_at=at)
    return [case.point(policy) for policy in course.log_policies]


def experiment(setting: Setting) -> Shown:
    """All ways with all noises."""
    steps = 2 if setting.quick else 45
    found: dict[str, dict[str, list[list[Point]]]] = {}
    for noise in NOISES:
        by_seed = [exact(noise, seed) for seed in setting.seeds]
        found[noise] = {way: [ways[way] for ways in by_seed] for way in EXACT}
    asked = [(noise, way, seed) for noise in NOISES for way in TRAINED for seed in setting.seeds]
    courses = setting.run(trained, [{"noise": n, "way": w, "seed": s, "steps": steps} for n, w, s in asked])
    for (noise, way, _), course in zip(asked, courses, strict=True):
        found[noise].setdefault(way, []).append(course)
    fits = {noise: forms(ways) for noise, ways in found.items()}
    record = {"points": found, "fits": fits}
    return Shown(record, f"{table(found)}\n\n{table_of_forms(fits)}", panels(lambda axes: draw(axes, found), 2, 2))


def forms(ways: dict[str, list[list[Point]]]) -> dict[str, list[dict[str, float]]]:
    """The paper's laws of the gold gain, `d (a - b d)` and `d (a - b log d)` with d = sqrt(KL), by least squares."""
    found: dict[str, list[dict[str, float]]] = {}
    for way, bend in ((EXACT[0], lambda d: d), (EXACT[1], numpy.log)):
        for points in ways[way]:
            d, gold = (numpy.array([point[name] for point in points]) for name in ("sqrt_kl", "gold"))
            far = d > 0.05
            d, gold = d[far], gold[far]
            (a, b), *_ = numpy.linalg.lstsq(numpy.stack([d, -d * bend(d)], axis=1), gold, rcond=None)
            off = gold - d * (a - b * bend(d))
            explained = 1 - float((off**2).sum() / ((gold - gold.mean()) ** 2).sum())
            found.setdefault(way, []).append({"a": float(a), "b": float(b), "explained": explained})
    return found


def on_grid(points: list[Point], name: str) -> list[float]:
    """Values at equal steps of sqrt(KL), up to where the points end; each way begins at the prior."""
    x, y = [0.0, *(point["sqrt_kl"] for point in points)], [0.0, *(point[name] for point in points)]
    order = numpy.argsort(x)
    values = numpy.interp(GRID, numpy.asarray(x)[order], numpy.asarray(y)[order], right=numpy.nan)
    return [float(value) for value in values]


def draw(axes: Any, found: dict[str, dict[str, list[list[Point]]]]) -> None:
    for column, (noise, ways) in enumerate(found.items()):
        for row, name in enumerate(("proxy", "gold")):
            panel = axes[2 * row + column]
            for index, (way, runs) in enumerate(ways.items()):
                if way in EXACT:
                    curve(panel, GRID, [on_grid(points, name) for points in runs], index, way)
                else:
                    draw_trained(panel, runs, name, index, way)
            panel.axhline(0, color="#222222", linewidth=0.8)
            y = f"{name} reward, gain over π₀"
            finish(panel, f"{name} reward, {noise}", "√KL(π ‖ π₀), √nats", y, legend=row + column == 0)


def draw_trained(panel: Any, runs: list[list[Point]], name: str, index: int, label: str) -> None:
    """The way of each seed, and a marker where it ends."""
    look = run_style(index)
    for points in runs:
        x, y = ([point[key] for point in points] for key in ("sqrt_kl", name))
        panel.plot(x, y, color=look["color"], linewidth=0.7, alpha=0.7)
        panel.plot(x[-1:], y[-1:], color=look["color"], marker=look["marker"], linestyle="none", label=label)
        label = "_"


def table(found: dict[str, dict[str, list[list[Point]]]]) -> str:
    """Where the gold reward is largest on each way, and what it is at the way's end."""
    columns = [
        "noise",
        "way",
        "largest gold gain",
        "at √KL",
        "proxy gain there",
        "gold gain at the end",
        "√KL at the end",
    ]
    rows = []
    for noise, ways in found.items():
        for way, runs in ways.items():
            best = [max(points, key=lambda point: point["gold"]) for points in runs]
            last = [max(points, key=lambda point: point["sqrt_kl"]) for points in runs]
            cells = [[point[name] for point in best] for name in ("gold", "sqrt_kl", "proxy")]
            cells += [[point[name] for point in last] for name in ("gold", "sqrt_kl")]
            rows.append([noise, way, *(mean_and_spread(cell, 2) for cell in cells)])
    return markdown_table(columns, rows)


def table_of_forms(fits: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """How well the paper's laws describe the gold reward of exact laws."""
    rows = [
        [noise, way, form, *(mean_and_spread([fit[name] for fit in ways[way]], 2) for name in ("a", "b", "explained"))]
        for noise, ways in fits.items()
        for way, form in ((EXACT[0], "d (a − b d)"), (EXACT[1], "d (a − b log d)"))
    ]
    columns = ["noise", "way", "form, d = √KL", "a", "b", "share of variance explained"]
    return f"The paper's forms, fitted to the gold gain of each seed:\n\n{markdown_table(columns, rows)}"
