"""Best-of-N against the tilt of the same KL: exact laws of both on enumerated completions (2401.01879, 2404.01730)."""

import math
from dataclasses import replace
from typing import Any

import torch

from trl_bayes.benchmarks.calibrated import ranked_task
from trl_bayes.benchmarks.laws import at_kl, beats, best_of_n_law, cumulative, kl, tilt
from trl_bayes.benchmarks.paper import Setting, Shown, enumerated, markdown_table, mean_and_spread
from trl_bayes.benchmarks.paper_figure import curve, finish, panels
from trl_bayes.benchmarks.tiny import hard_constraint_task, letter_count_task
from trl_bayes.samplers import kl_of_best_of_n


SIZES = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
KINDS = {
    "no ties": lambda seed: replace(ranked_task(), seed=seed),
    "no ties, peaked prior": lambda seed: replace(ranked_task(), seed=seed, logit_std=3.0),
    "few ties: #a - #b/2": lambda seed: replace(letter_count_task(), seed=seed),
    "ties: reward 0 or 1": lambda seed: replace(
        hard_constraint_task(), letters="abcd", prompts=("b", "c d", "d b", "c"), seed=seed
    ),
}


def measure(kind: str, seed: int) -> list[dict[str, float]]:
    """One prior: a row for each N, averaged over the prompts."""
    log_prior, rewards = enumerated(KINDS[kind](seed))
    u = cumulative(log_prior, rewards).middle
    rows = []
    for n in SIZES:
        best = best_of_n_law(log_prior, rewards, n)
        nats = kl(best, log_prior).mean().item()
        by_reward = at_kl(lambda beta: tilt(log_prior, rewards, beta), log_prior, nats)
        by_rank = at_kl(lambda beta: tilt(log_prior, u, beta), log_prior, nats)
        rows.append(
            {
                "n": n,
                "formula": kl_of_best_of_n(n),
                "kl": nats,
                "win_rate": mean(beats(best, log_prior, rewards)),
                "win_rate_tilt_reward": mean(beats(by_reward, log_prior, rewards)),
                "win_rate_tilt_rank": mean(beats(by_rank, log_prior, rewards)),
                "kl_best_tilt_rank": mean(kl(best, by_rank)),
                "kl_best_tilt_reward": mean(kl(best, by_reward)),
                "kl_tilt_reward": mean(kl(by_reward, log_prior)),
            }
        )
    return rows


def mean(values: torch.Tensor) -> float:
    return values.mean().item()


def experiment(setting: Setting) -> Shown:
    """All kinds of rewards and priors, with several priors of each."""
    found = {kind: [measure(kind, seed) for seed in setting.seeds] for kind in KINDS}
    return Shown({"rows": found}, table(found), panels(lambda axes: draw(axes, found), 3))


def column(runs: list[list[dict[str, float]]], name: str) -> list[list[float]]:
    """Of each seed, over N."""
    return [[row[name] for row in rows] for rows in runs]


def draw(axes: Any, found: dict[str, list[list[dict[str, float]]]]) -> None:
    left, middle, right = axes
    left.plot(SIZES, [kl_of_best_of_n(n) for n in SIZES], color="#222222", linewidth=1, label="log N − (N−1)/N")
    left.plot(SIZES, [math.log(n) for n in SIZES], color="#222222", linewidth=0.8, linestyle=":", label="log N")
    for index, (kind, runs) in enumerate(found.items()):
        curve(left, SIZES, column(runs, "kl"), index, kind, linestyle="none" if index == 0 else "-")
    left.set_xscale("log", base=2)
    finish(left, "KL(best-of-N ‖ π₀)", "N", "nats")
    runs = found["no ties"]
    x = [kl_of_best_of_n(n) for n in SIZES]
    for index, (name, label) in enumerate(
        (
            ("win_rate", "best of N"),
            ("win_rate_tilt_rank", "tilt of u"),
            ("win_rate_tilt_reward", "tilt of the reward"),
        )
    ):
        curve(middle, x, column(runs, name), index, label)
    finish(middle, "Win rate at the same KL, no ties", "KL(· ‖ π₀), nats", "win rate against π₀")
    for index, kind in enumerate(found):
        curve(right, x, column(found[kind], "kl_best_tilt_rank"), index, kind)
    finish(right, "KL(best-of-N ‖ tilt of u)", "log N − (N−1)/N, nats", "nats")


def table(found: dict[str, list[list[dict[str, float]]]]) -> str:
    """Rows for some N."""
    columns = ["reward", "N", "log N − (N−1)/N", "KL, exact", "win rate", "… tilt of u", "… tilt of the reward"]
    columns += ["KL(best ‖ tilt of u)", "KL(best ‖ tilt of the reward)"]
    names = [
        "kl",
        "win_rate",
        "win_rate_tilt_rank",
        "win_rate_tilt_reward",
        "kl_best_tilt_rank",
        "kl_best_tilt_reward",
    ]
    rows = []
    for kind, runs in found.items():
        for place, n in enumerate(SIZES):
            if n in (2, 4, 16, 64):
                cells = [mean_and_spread([rows[place][name] for rows in runs]) for name in names]
                rows.append([kind, str(n), f"{kl_of_best_of_n(n):.3f}", *cells])
    return markdown_table(columns, rows)
