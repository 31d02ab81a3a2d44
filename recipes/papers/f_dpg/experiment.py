"""f-DPG: train with one divergence, measure with every other, exactly (2302.08215)."""

import math
import statistics
from dataclasses import replace
from typing import Any

import numpy
from torch import Tensor

from trl_bayes.benchmarks.descent import descend
from trl_bayes.benchmarks.laws import entropy, expected, expected_distinct, kl, tilt
from trl_bayes.benchmarks.paper import Setting, Shown, enumerated, mean_and_spread
from trl_bayes.benchmarks.paper_figure import curve, finish, panels
from trl_bayes.benchmarks.tables import markdown_table
from trl_bayes.benchmarks.tiny import EnumerableTask, letter_count_task
from trl_bayes.divergences import get_divergence
from trl_bayes.estimators import ScoreFunction


BETA = 0.4
STEPS = 50
GROUP = 16
SYMBOLS = {
    "forward_kl": "KL(p‖π)",
    "reverse_kl": "KL(π‖p)",
    "jensen_shannon": "JS",
    "total_variation": "TV",
    "squared_hellinger": "H²",
    "pearson_chi2": "χ²(π‖p)",
}
SIZES = {8: 1e-2, 16: 5e-3, 32: 5e-3, 64: 2.5e-3}
"""Dimensions of the prior's hidden states, and the best of up to three learning rates on priors that are not shown."""
SWEPT = ("forward_kl", "reverse_kl", "jensen_shannon")
"""Divergences that are compared on priors of each size."""


def task_of(seed: int) -> EnumerableTask:
    """Reward #a - #b/2 on 121 completions of each of 2 prompts."""
    return replace(letter_count_task(), letters="abc", prompts=("b", "c"), seed=seed)


def measured(law: Tensor, posterior: Tensor) -> dict[str, float]:
    """`D_f(pi||p) = E_pi[f(t)/t]` of every f, averaged over prompts."""
    log_ratio = law - posterior
    return {name: expected(law, get_divergence(name).f_over_t(log_ratio)).mean().item() for name in SYMBOLS}


def train(divergence: str, seed: int, steps: int, hidden_size: int = 32) -> dict[str, Any]:
    """A policy along its way, measured with every divergence at its end."""
    task = task_of(seed)
    estimator = ScoreFunction(get_divergence(divergence))
    at = {round(steps * share) for share in (0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)}
    rewards = enumerated(task).rewards
    course = descend(
        task,
        estimator,
        rewards / BETA,
        steps=steps,
        group_size=GROUP,
        seed=seed,
        evaluate_at=at,
        hidden_size=hidden_size,
        learning_rate=SIZES[hidden_size],
    )
    posterior, last = tilt(course.log_prior, rewards, BETA), course.log_policies[-1]
    return {
        "steps": course.steps,
        "entropy": [entropy(law).mean().item() for law in course.log_policies],
        "forward_kl": [kl(posterior, law).mean().item() for law in course.log_policies],
        "posterior_entropy": entropy(posterior).mean().item(),
        "distinct": expected_distinct(last, 100).mean().item(),
        "divergences": measured(last, posterior),
        "start": measured(course.log_prior, posterior),
    }


def experiment(setting: Setting) -> Shown:
    """The matrix, and the sweep of the prior's size with three divergences."""
    steps = 2 if setting.quick else STEPS
    asked: list[dict[str, Any]] = [
        {"divergence": n, "seed": s, "steps": steps} for n in SYMBOLS for s in setting.seeds
    ]
    asked += [
        {"divergence": n, "seed": s, "steps": steps, "hidden_size": size}
        for size in SIZES
        if size != 32
        for n in SWEPT
        for s in setting.seeds
    ]
    results = setting.run(train, asked)
    runs: dict[str, list[Any]] = {name: [] for name in SYMBOLS}
    sweep: dict[int, dict[str, list[Any]]] = {size: {name: [] for name in SWEPT} for size in SIZES}
    for arguments, result in zip(asked, results, strict=True):
        if "hidden_size" in arguments:
            sweep[arguments["hidden_size"]][arguments["divergence"]].append(result)
        else:
            runs[arguments["divergence"]].append(result)
    sweep[32] = {name: runs[name] for name in SWEPT}
    record = {"runs": runs, "sizes": sweep}
    return Shown(record, table(runs, sweep), panels(lambda axes: draw(axes, runs, sweep), 3, height=3.9))


def matrix(runs: dict[str, list[Any]]) -> dict[str, dict[str, list[float]]]:
    """Of each training divergence, what each seed measures with each other."""
    return {
        trained: {name: [run["divergences"][name] for run in of_seeds] for name in SYMBOLS}
        for trained, of_seeds in runs.items()
    }


def ranks(runs: dict[str, list[Any]]) -> dict[str, list[float]]:
    """Of each training divergence and seed, its rank (1 is best) averaged over the divergences that measure."""
    found, seeds = matrix(runs), range(len(runs["forward_kl"]))
    places: dict[str, list[float]] = {}
    for trained in SYMBOLS:
        places[trained] = [
            statistics.mean(
                1 + sum(found[other][name][s] < found[trained][name][s] for other in SYMBOLS) for name in SYMBOLS
            )
            for s in seeds
        ]
    return places


def draw(axes: Any, runs: dict[str, list[Any]], sweep: dict[int, dict[str, list[Any]]]) -> None:
    found = matrix(runs)
    means = numpy.array([[statistics.mean(found[trained][name]) for name in SYMBOLS] for trained in SYMBOLS])
    relative = means / means.min(axis=0)
    panel = axes[0]
    panel.imshow(numpy.log(relative), cmap="cividis_r", vmin=0, vmax=math.log(8), aspect="auto")
    for row, column in numpy.ndindex(*relative.shape):
        color = "white" if relative[row, column] > 2.5 else "black"
        panel.text(column, row, f"{relative[row, column]:.2f}", ha="center", va="center", fontsize=8, color=color)
    panel.set_xticks(range(len(SYMBOLS)), SYMBOLS.values(), fontsize=7.5, rotation=30)
    panel.set_yticks(range(len(SYMBOLS)), SYMBOLS.values(), fontsize=8)
    panel.grid(visible=False)
    finish(panel, "divergence over the best of its column", "measured with", "trained with", legend=False)
    for index, (name, of_seeds) in enumerate(runs.items()):
        above = [[value - run["posterior_entropy"] for value in run["entropy"]] for run in of_seeds]
        curve(axes[1], of_seeds[0]["steps"], above, index, SYMBOLS[name], band=0.07)
    axes[1].axhline(0, color="#222222", linewidth=0.8, linestyle=":")
    axes[1].set_ylim(-1.4, 1.4)  # the prior's, above, differ more than all that follows
    finish(axes[1], "entropy above the posterior's", "steps", "nats")
    for index, name in enumerate(SWEPT):
        runs_of = [of[name] for of in sweep.values()]
        ends = [[of_seeds[s]["divergences"]["jensen_shannon"] for of_seeds in runs_of] for s in range(len(runs_of[0]))]
        curve(axes[2], list(SIZES), ends, index, f"trained with {SYMBOLS[name]}", markevery=1)
    axes[2].set_xscale("log", base=2)
    finish(axes[2], "JS at the end, by the prior's size", "dimensions of the prior", "nats")


def table(runs: dict[str, list[Any]], sweep: dict[int, dict[str, list[Any]]]) -> str:
    found, places = matrix(runs), ranks(runs)
    rows = []
    for trained in SYMBOLS:
        cells = [mean_and_spread(found[trained][name], 4) for name in SYMBOLS]
        distinct = mean_and_spread([run["distinct"] for run in runs[trained]], 1)
        rows.append([SYMBOLS[trained], *cells, mean_and_spread(places[trained], 2), distinct])
    start = [mean_and_spread([run["start"][name] for run in runs["forward_kl"]], 3) for name in SYMBOLS]
    rows.append(["(the prior)", *start, "", ""])
    first = markdown_table(["trained with", *SYMBOLS.values(), "mean rank", "different of 100"], rows)
    rows = [
        [
            str(size),
            f"{SIZES[size]:g}",
            mean_and_spread([run["start"]["forward_kl"] for run in of_seeds]),
            SYMBOLS[name],
            *(mean_and_spread([run["divergences"][measure] for run in of_seeds], 4) for measure in SWEPT),
        ]
        for size, of_name in sweep.items()
        for name, of_seeds in of_name.items()
    ]
    columns = ["prior's dimensions", "learning rate", "KL(p‖π₀)", "trained with", *(SYMBOLS[name] for name in SWEPT)]
    second = markdown_table(columns, rows)
    titles = "Measured with each column at the end of training:", "Priors of several sizes:"
    return f"{titles[0]}\n\n{first}\n\n{titles[1]}\n\n{second}"
