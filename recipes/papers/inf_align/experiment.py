"""InfAlign: win rate against KL for transforms of the calibrated reward and for best-of-N and worst-of-N (2412.19792).

Lines are exact posteriors on enumerated completions, points are policies that f-DPG with the Jensen-Shannon divergence
trained for them. The last panel has what calibration does about a proxy reward with a heavy tail, and the second table
what the package's own trainers reach on one prior.
"""

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trl_bayes import CTRLConfig, CTRLTrainer, FDPGConfig, FDPGTrainer
from trl_bayes.benchmarks.calibrated import ranked_task
from trl_bayes.benchmarks.descent import descend
from trl_bayes.benchmarks.exact_training import train_on
from trl_bayes.benchmarks.laws import at_kl, beats, cumulative, tilt
from trl_bayes.benchmarks.paper import Setting, Shown, enumerated, mean_and_spread
from trl_bayes.benchmarks.paper_figure import curve, finish, panels
from trl_bayes.benchmarks.tables import markdown_table
from trl_bayes.benchmarks.tiny import EnumerableTask
from trl_bayes.benchmarks.win_rates import WinRates, mean_rates, win_rates
from trl_bayes.divergences import get_divergence
from trl_bayes.estimators import Estimator, PolicyGradient, ScoreFunction
from trl_bayes.evaluation.figures import run_style
from trl_bayes.targets import Calibrated, Transform, best_of_n, ctrl_best_of_n, ctrl_worst_of_n, identity
from trl_bayes.targets.transforms import beta_for_kl


BUDGETS = [0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5]
"""Nats from the prior."""
TRAINED_AT = 0.5
STEPS = 200
SIZES = (2, 4, 16)
TRANSFORMS: dict[str, Transform] = {
    "identity: u": identity(),
    "log u": best_of_n(4),
    "CTRL best of N: exp(10u)": ctrl_best_of_n(10.0),
    "CTRL worst of N: −exp(−10u)": ctrl_worst_of_n(10.0),
}
DECODING = {"plain": (2, "plain"), **{f"best of {n}": (n, "best_of_n") for n in SIZES}}
DECODING |= {f"worst of {n}": (n, "worst_of_n") for n in SIZES}


def task_of(seed: int) -> EnumerableTask:
    """421 completions of each of 2 prompts, no two with the same reward."""
    return replace(ranked_task(), letters="abcdefghijklmnopqrst", prompts=("a", "b"), seed=seed)


def rates(laws: Tensor, log_prior: Tensor, rewards: Tensor) -> dict[str, float]:
    """KL and the win rate of each way to decode, averaged over prompts."""
    of_size: dict[int, WinRates] = {
        n: mean_rates([win_rates(law, prior, rewards, n) for law, prior in zip(laws, log_prior, strict=True)])
        for n in SIZES
    }
    found = {way: getattr(of_size[n], name) for way, (n, name) in DECODING.items()}
    return {"kl": of_size[SIZES[0]].kl_prior, **found}


def posterior(name: str, log_prior: Tensor, u: Tensor, nats: float) -> Tensor:
    """The posterior of a transform at a budget, `(P, N)`."""
    values = TRANSFORMS[name](u)
    return at_kl(lambda beta: tilt(log_prior, values, beta), log_prior, nats)


def posteriors(seed: int) -> dict[str, list[dict[str, float]]]:
    """Of each transform at each budget, on a prior of its own."""
    log_prior, rewards = enumerated(task_of(seed))
    u = cumulative(log_prior, rewards).middle
    return {
        name: [rates(posterior(name, log_prior, u, nats), log_prior, rewards) for nats in BUDGETS]
        for name in TRANSFORMS
    }


def trained(name: str, seed: int, steps: int) -> dict[str, float]:
    """Of a policy at one budget."""
    task = task_of(seed)
    log_prior, rewards = enumerated(task)
    phi = posterior(name, log_prior, cumulative(log_prior, rewards).middle, TRAINED_AT) - log_prior
    estimator = ScoreFunction(get_divergence("jensen_shannon"))
    course = descend(task, estimator, phi, steps=steps, group_size=512, seed=seed)
    return rates(course.log_policies[-1], log_prior, rewards)


HARDEST = "CTRL worst of N: −exp(−10u)"
"""What one of the package's trainers is compared on."""
WAYS = ("posterior", *(f"{kind}, {by}" for kind in ("f-DPG, JS", "KL-RL") for by in ("trainer", "this script")))
DRAWN = 128
"""Completions a prompt in a step of a trainer."""


def compared(way: str, seed: int, steps: int) -> dict[str, float]:
    """The hardest transform at one budget: exact, by a trainer of the package, or as all policies here are trained."""
    task = task_of(seed)
    log_prior, rewards = enumerated(task)
    transform = TRANSFORMS[HARDEST]
    beta = beta_for_kl(transform, TRAINED_AT)
    phi = transform(cumulative(log_prior, rewards).middle) / beta
    settings: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": DRAWN * len(task.prompts),
        "num_generations": DRAWN,
        "learning_rate": 5e-3,
        "adam_beta2": 0.99,
        "seed": seed,
    }
    if way == "posterior":
        law = (log_prior + phi).log_softmax(dim=1)
    elif way.endswith("trainer"):
        with warnings.catch_warnings():
            # 2,000 samples of 421 completions repeat, and Z is then estimated from them
            warnings.filterwarnings("ignore", message=".*share their reward with another of the same prompt")
            law = by_trainer(way, task, beta, settings)
    else:
        estimator: Estimator = ScoreFunction(get_divergence("jensen_shannon"))
        if way.startswith("KL-RL"):
            estimator = PolicyGradient(get_divergence("reverse_kl"))
        law = descend(task, estimator, phi, steps=steps, group_size=DRAWN, seed=seed).log_policies[-1]
    return rates(law, log_prior, rewards)


def by_trainer(way: str, task: EnumerableTask, beta: float, settings: dict[str, Any]) -> Tensor:
    """`log pi` of all completions, `(P, N)`, of a policy that a trainer of the package has trained."""
    if way.startswith("KL-RL"):
        ctrl = {"inference_procedure": "worst_of_n", "kl_budget": TRAINED_AT}
        return train_on(task, CTRLTrainer, CTRLConfig, **ctrl, **settings).log_policy
    target = Calibrated(TRANSFORMS[HARDEST], beta)
    f_dpg = {"partition": "known", "divergence": "jensen_shannon"}
    return train_on(task, FDPGTrainer, FDPGConfig, target, **f_dpg, **settings).log_policy


def hacked(seed: int) -> dict[str, list[float]]:
    """Win rate by the gold reward where the proxy's noise has a heavy tail, at each budget."""
    log_prior, gold = enumerated(task_of(seed))
    generator = torch.Generator().manual_seed(1000 + seed)
    normal = torch.randn(3, len(gold), generator=generator, dtype=torch.float64)
    noise = normal[0] / (normal[1:].square().sum(dim=0) / 2).sqrt()  # Student's t with 2 degrees of freedom
    proxy = gold + 0.3 * noise
    u = cumulative(log_prior, proxy).middle
    families = {"the proxy itself": proxy, "calibrated: u": u, "calibrated: exp(10u)": (10 * u).exp()}
    return {
        name: [
            beats(at_kl(lambda beta, v=values: tilt(log_prior, v, beta), log_prior, nats), log_prior, gold)
            .mean()
            .item()
            for nats in BUDGETS
        ]
        for name, values in families.items()
    }


def experiment(setting: Setting) -> Shown:
    """Lines for all transforms, points at half a nat, and the proxy."""
    by_seed = [posteriors(seed) for seed in setting.seeds]
    lines = {name: [found[name] for found in by_seed] for name in TRANSFORMS}
    steps = 2 if setting.quick else STEPS
    asked = [{"name": name, "seed": seed, "steps": steps} for name in TRANSFORMS for seed in setting.seeds]
    results = setting.run(trained, asked)
    seed = setting.seeds[0]
    beside = setting.run(compared, [{"way": way, "seed": seed, "steps": steps} for way in WAYS])
    by_trainers = dict(zip(WAYS, beside, strict=True))
    points: dict[str, list[dict[str, float]]] = {name: [] for name in TRANSFORMS}
    for arguments, result in zip(asked, results, strict=True):
        points[arguments["name"]].append(result)
    heavy = [hacked(seed) for seed in setting.seeds]
    record = {
        "budgets": BUDGETS,
        "posteriors": lines,
        "policies": points,
        "trainers": by_trainers,
        "heavy_tail": heavy,
    }
    text = f"{table(lines, points, heavy)}\n\n{table_of_trainers(by_trainers, seed)}"
    return Shown(record, text, panels(lambda axes: draw(axes, lines, points, heavy), 4, 2, width=3.7, height=3.2))


def draw(axes: Any, lines: Any, points: Any, heavy: Any) -> None:
    for panel, way in zip(axes, DECODING, strict=False):
        for index, name in enumerate(TRANSFORMS):
            curve(panel, BUDGETS, [[row[way] for row in rows] for rows in lines[name]], index, name)
            look = run_style(index)
            x, y = ([row[key] for row in points[name]] for key in ("kl", way))
            label = f"hollow: trained, {len(x)} seeds" if index == len(TRANSFORMS) - 1 else None
            hollow = {"marker": look["marker"], "markersize": 6, "markerfacecolor": "none", "label": label}
            panel.plot(x, y, "k", linestyle="none", **hollow)
        finish(panel, way, "KL(π ‖ π₀), nats", "win rate against π₀", legend=panel is axes[0], fontsize=7)
    for index, name in enumerate(heavy[0]):
        curve(axes[7], BUDGETS, [found[name] for found in heavy], index, name)
    finish(axes[7], "gold win rate, heavy-tailed proxy", "KL(π ‖ π₀), nats", "win rate by the gold reward")


def table(lines: Any, points: Any, heavy: Any) -> str:
    """At half a nat: posterior and policy; and the proxy at some budgets."""
    place, rows = BUDGETS.index(TRAINED_AT), []
    for name in TRANSFORMS:
        for what, found in (("posterior", [r[place] for r in lines[name]]), ("policy", points[name])):
            rows.append([name, what, *(mean_and_spread([f[key] for f in found]) for key in ("kl", *DECODING))])
    first = markdown_table(["Φ(u)", "", "KL", *DECODING], rows)
    largest = max(
        abs(point[key] - run[place][key])
        for name in TRANSFORMS
        for point, run in zip(points[name], lines[name], strict=True)
        for key in ("kl", *DECODING)
    )
    rows = [[f"{nats:g}", *(mean_and_spread([f[n][i] for f in heavy]) for n in heavy[0])] for i, nats in shown()]
    second = markdown_table(["KL", *heavy[0]], rows)
    return (
        f"{first}\n\nThe largest difference of a policy from its posterior, in any column and seed: {largest:.3f}.\n\n"
        f"Win rate by the gold reward where the proxy's noise has a heavy tail:\n\n{second}"
    )


def table_of_trainers(found: dict[str, dict[str, float]], seed: int) -> str:
    """The package's trainers beside the short loop that trained the rest."""
    rows = [[way, *(f"{row[key]:.3f}" for key in ("kl", *DECODING))] for way, row in found.items()]
    text = f"By the package's trainers too: {HARDEST} at half a nat, seed {seed}, {DRAWN} completions a prompt:"
    return f"{text}\n\n{markdown_table(['', 'KL', *DECODING], rows)}"


def shown() -> list[tuple[int, float]]:
    """Some of the budgets."""
    return [(i, nats) for i, nats in enumerate(BUDGETS) if not math.isclose(nats, 0.75) and nats >= 0.1]
