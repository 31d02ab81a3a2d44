"""RL with KL penalties as inference: pure RL collapses, KL-RL ends at the posterior of its beta (2205.11275)."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from trl_bayes.benchmarks.descent import descend
from trl_bayes.benchmarks.laws import entropy, expected, expected_distinct, kl, tilt
from trl_bayes.benchmarks.paper import Setting, Shown, enumerated, mean_and_spread
from trl_bayes.benchmarks.paper_figure import curve, finish, panels
from trl_bayes.benchmarks.tables import markdown_table
from trl_bayes.benchmarks.tiny import EnumerableTask, letter_count_task
from trl_bayes.divergences import get_divergence
from trl_bayes.estimators import PolicyGradient, PureRL


Point = dict[str, float]

BETAS = (0.0, 0.25, 0.5, 1.0, 2.0)
"""0 is pure RL."""
FRONTIER = [8.0 * 0.85**power for power in range(36)]
STEPS = 60
DRAWN = 100
"""Samples among which different completions are counted."""


def task_of(seed: int) -> EnumerableTask:
    """Reward #a - #b/2 on 121 completions of each of 2 prompts."""
    return replace(letter_count_task(), letters="abc", prompts=("b", "c a"), seed=seed)


def point(law: Tensor, log_prior: Tensor, rewards: Tensor) -> Point:
    """What a law is like, averaged over prompts."""
    values = {
        "reward": expected(law, rewards),
        "entropy": entropy(law),
        "distinct": expected_distinct(law, DRAWN),
        "kl_prior": kl(law, log_prior),
    }
    return {name: value.mean().item() for name, value in values.items()}


def train(beta: float, seed: int, steps: int) -> list[Point]:
    """A policy along its way, with its distance from the posterior of `beta`."""
    task = task_of(seed)
    log_prior, rewards = enumerated(task)
    reverse = get_divergence("reverse_kl")
    estimator = PureRL(reverse) if beta == 0 else PolicyGradient(reverse)
    phi = rewards if beta == 0 else rewards / beta
    at = {round(steps * share) for share in (0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)}
    course = descend(task, estimator, phi, steps=steps, seed=seed, evaluate_at=at)
    points = []
    for step, law in zip(course.steps, course.log_policies, strict=True):
        away = {} if beta == 0 else {"reverse_kl": kl(law, tilt(log_prior, rewards, beta)).mean().item()}
        points.append({"step": step, **point(law, log_prior, rewards), **away})
    return points


def exact(seed: int) -> dict[str, Any]:
    """The prior, and the posteriors of the temperatures that are trained and of many more."""
    log_prior, rewards = enumerated(task_of(seed))
    at = {beta: point(tilt(log_prior, rewards, beta), log_prior, rewards) for beta in (*BETAS[1:], *FRONTIER)}
    return {"prior": point(log_prior, log_prior, rewards), **at}


def experiment(setting: Setting) -> Shown:
    """All temperatures with all seeds."""
    steps = 2 if setting.quick else STEPS
    asked = [{"beta": beta, "seed": seed, "steps": steps} for beta in BETAS for seed in setting.seeds]
    courses: dict[float, list[list[Point]]] = {beta: [] for beta in BETAS}
    for arguments, course in zip(asked, setting.run(train, asked), strict=True):
        courses[arguments["beta"]].append(course)
    laws = [exact(seed) for seed in setting.seeds]
    record = {"courses": courses, "exact": laws}
    return Shown(record, table(courses, laws), panels(lambda axes: draw(axes, courses, laws), 4, width=3.7))


def label(beta: float) -> str:
    return "pure RL, β = 0" if beta == 0 else f"KL-RL, β = {beta:g}"


def draw(axes: Any, courses: dict[float, list[list[Point]]], laws: list[dict[Any, Point]]) -> None:
    titles = {
        "reward": ("reward along training", "reward"),
        "entropy": ("entropy", "nats"),
        "distinct": (f"different among {DRAWN} samples", "completions"),
    }
    for panel, (name, (title, unit)) in zip(axes, titles.items(), strict=False):
        for index, (beta, runs) in enumerate(courses.items()):
            x = [point["step"] for point in runs[0]]
            curve(panel, x, [[point[name] for point in points] for points in runs], index, label(beta), band=0.07)
            if beta > 0:
                level = sum(found[beta][name] for found in laws) / len(laws)
                panel.axhline(level, color="#222222", linewidth=0.7, linestyle=":")
        finish(panel, title, "steps", unit, legend=False)
    panel = axes[3]
    for number, found in enumerate(laws):  # each prior has a frontier of its own
        x, y = ([found[beta][name] for beta in FRONTIER] for name in ("kl_prior", "reward"))
        panel.plot(x, y, color="#777777", linewidth=0.9, label=None if number else "posteriors of all β")
    for index, (beta, runs) in enumerate(courses.items()):
        ends = [points[-1] for points in runs]
        curve_point(panel, ends, index, label(beta))
    finish(panel, "where training ends", "KL(π ‖ π₀), nats", "reward")


def curve_point(panel: Any, ends: list[Point], index: int, text: str) -> None:
    """Where the trainings of one temperature end."""
    x, y = ([end[name] for end in ends] for name in ("kl_prior", "reward"))
    curve(panel, x, [y], index, text, linestyle="none", markevery=1)


def table(courses: dict[float, list[list[Point]]], laws: list[dict[Any, Point]]) -> str:
    """Where trainings end, beside the posteriors."""
    columns = ["objective", "target", "divergence", "", "reward", "entropy", f"different of {DRAWN}", "KL(π‖π₀)"]
    names = ("reward", "entropy", "distinct", "kl_prior")
    rows = [["", "π₀", "", "prior", *(mean_and_spread([found["prior"][n] for found in laws]) for n in names), ""]]
    for beta, runs in courses.items():
        ends = [points[-1] for points in runs]
        cells = [mean_and_spread([end[name] for end in ends]) for name in names]
        if beta == 0:
            about = ["E[r]", "none: a point mass on the best completion", "none"]
            rows.append([*about, "policy", *cells, ""])
            continue
        about = [f"E[r] − {beta:g} KL(π‖π₀)", f"p ∝ π₀ exp(r/{beta:g})", "KL(π‖p)"]
        rows.append([*about, "policy", *cells, mean_and_spread([end["reverse_kl"] for end in ends], 4)])
        rows.append(
            ["", "", "", "posterior", *(mean_and_spread([found[beta][n] for found in laws]) for n in names), "0"]
        )
    return markdown_table([*columns, "KL(π‖p)"], rows)
