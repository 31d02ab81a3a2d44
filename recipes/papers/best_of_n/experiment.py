"""Best-of-N against the tilt of the same KL: exact laws of both on enumerated completions (2401.01879, 2404.01730).

The second paper's limit is that of a memoryless model and a reward that adds up over tokens, where types of
completions, which are few, take the place of completions.
"""

import math
from dataclasses import replace
from typing import Any

import torch

from trl_bayes.benchmarks.calibrated import ranked_task
from trl_bayes.benchmarks.laws import at_kl, beats, best_of_n_law, cumulative, expected, kl, tilt
from trl_bayes.benchmarks.paper import Setting, Shown, enumerated, mean_and_spread
from trl_bayes.benchmarks.paper_figure import curve, finish, panels
from trl_bayes.benchmarks.tables import markdown_table
from trl_bayes.benchmarks.tiny import hard_constraint_task, letter_count_task
from trl_bayes.samplers import kl_of_best_of_n


SIZES = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
LENGTHS = [16, 32, 64, 128]
"""Tokens of a completion of the memoryless model."""
RATES = [0.05, 0.1, 0.2]
"""Nats a token that are spent, `log N / m`."""
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


def memoryless(seed: int, rate: float) -> list[dict[str, float]]:
    """
    Three letters drawn independently, with a reward each: best of `exp(rate m)` of `m` tokens, and the tilt.

    Completions with the same letters in another order have the same prior and reward, so that both laws, and how far
    they are from each other, are those of the counts of the letters.
    """
    generator = torch.Generator().manual_seed(seed)
    log_letter = torch.randn(3, generator=generator, dtype=torch.float64).log_softmax(dim=0)
    worth = torch.rand(3, generator=generator, dtype=torch.float64)
    rows = []
    for m in LENGTHS:
        counts = torch.tensor([(i, j, m - i - j) for i in range(m + 1) for j in range(m + 1 - i)]).double()
        log_prior = math.lgamma(m + 1) - torch.lgamma(counts + 1).sum(dim=1) + counts @ log_letter
        rewards, n = counts @ worth, round(math.exp(rate * m))
        best = best_of_n_law(log_prior, rewards, n)
        nats = kl(best, log_prior).item()
        by_reward = at_kl(lambda beta, p=log_prior, r=rewards: tilt(p, r, beta), log_prior, nats)
        gap = (expected(by_reward, rewards) - expected(best, rewards)).item()
        rows.append({"m": m, "n": n, "kl": nats, "kl_best_tilt": kl(best, by_reward).item() / m, "gap": gap / m})
    return rows


def mean(values: torch.Tensor) -> float:
    return values.mean().item()


def experiment(setting: Setting) -> Shown:
    """All kinds of rewards and priors, with several priors of each."""
    found = {kind: [measure(kind, seed) for seed in setting.seeds] for kind in KINDS}
    limit = {rate: [memoryless(seed, rate) for seed in setting.seeds] for rate in RATES}
    record = {"rows": found, "memoryless": limit}
    return Shown(record, table(found, limit), panels(lambda axes: draw(axes, found, limit), 4, width=3.9))


def column(runs: list[list[dict[str, float]]], name: str) -> list[list[float]]:
    """Of each seed, over N."""
    return [[row[name] for row in rows] for rows in runs]


def draw(axes: Any, found: dict[str, list[list[dict[str, float]]]], limit: dict[float, Any]) -> None:
    left, middle, right, last = axes
    left.plot(SIZES, [kl_of_best_of_n(n) for n in SIZES], color="#222222", linewidth=1, label="log N − (N−1)/N")
    left.plot(SIZES, [math.log(n) for n in SIZES], color="#222222", linewidth=0.8, linestyle=":", label="log N")
    for index, (kind, runs) in enumerate(found.items()):
        curve(left, SIZES, column(runs, "kl"), index, kind, **({"linestyle": "none"} if index == 0 else {}))
    left.set_xscale("log", base=2)
    finish(left, "KL(best-of-N ‖ π₀)", "N", "nats")
    middle.axhline(0, color="#222222", linewidth=1)
    tilts = {"win_rate_tilt_rank": "tilt of u", "win_rate_tilt_reward": "tilt of the reward"}
    shown = [(kind, *tilt) for kind in ("no ties", "few ties: #a - #b/2") for tilt in tilts.items()]
    for index, (kind, name, label) in enumerate(shown):
        rates = zip(column(found[kind], name), column(found[kind], "win_rate"), strict=True)
        above = [[a - b for a, b in zip(*pair, strict=True)] for pair in rates]
        curve(middle, SIZES, above, index, f"{label}, {kind.partition(':')[0]}")
    middle.set_xscale("log", base=2)
    middle.set_ylim(bottom=-0.085)  # room for the legend
    finish(middle, "tilts of the same KL", "N", "win rate above best-of-N's", loc="lower left")
    for index, kind in enumerate(found):
        curve(right, SIZES, column(found[kind], "kl_best_tilt_rank"), index, kind)
    right.set_xscale("log", base=2)
    finish(right, "KL(best-of-N ‖ tilt of u)", "N", "nats")
    for index, (rate, runs) in enumerate(limit.items()):
        curve(last, LENGTHS, column(runs, "kl_best_tilt"), index, f"N = exp({rate:g} m)", markevery=1)
    last.set_xscale("log", base=2)
    finish(last, "memoryless: best ‖ tilt of reward", "tokens m", "KL a token, nats")


def table(found: dict[str, list[list[dict[str, float]]]], limit: dict[float, Any]) -> str:
    """Rows for some N, and for all lengths."""
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
    first = markdown_table(columns, rows)
    rows = []
    for rate, runs in limit.items():
        for place, m in enumerate(LENGTHS):
            names = ("kl", "kl_best_tilt", "gap")
            cells = [mean_and_spread([found[place][name] for found in runs], 4) for name in names]
            rows.append([f"exp({rate:g} m)", str(m), str(runs[0][place]["n"]), *cells])
    columns = [
        "N",
        "tokens m",
        "N is",
        "KL(best ‖ π₀)",
        "KL(best ‖ tilt) a token",
        "reward of the tilt above, a token",
    ]
    second = markdown_table(columns, rows)
    return f"{first}\n\nA memoryless model and a reward that adds up over m tokens, of three letters:\n\n{second}"
