"""Distribution matching beside reward maximization: variance of gradients, and where each method ends (2206.00761)."""

import statistics
import tempfile
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bayes.benchmarks.descent import descend
from trl_bayes.benchmarks.fitted import all_log_probs, fitted
from trl_bayes.benchmarks.laws import entropy, expected, kl
from trl_bayes.benchmarks.paper import Enumerated, Setting, Shown, enumerated, mean_and_spread
from trl_bayes.benchmarks.paper_figure import curve, finish, panels
from trl_bayes.benchmarks.tables import markdown_table
from trl_bayes.benchmarks.tiny import EnumerableTask, letter_count_task
from trl_bayes.divergences import get_divergence
from trl_bayes.estimators import Estimator, ImportanceWeights, PolicyGradient, PureRL, Sequences
from trl_bayes.estimators.baselines import leave_one_out_mean
from trl_bayes.groups import finite_exp
from trl_bayes.prior import PriorScores
from trl_bayes.targets import Moments


Row = dict[str, float]

STEPS = 60
SIZES = (4, 8, 16, 32, 64, 128)
"""Completions in a gradient."""
MANY = 2000
"""Gradients of each size of which the variance is taken."""
SHARE = 0.5
"""Of completions with the feature, for the distributional constraint."""


class WithoutBaseline(ImportanceWeights):
    """DPG as it was: `-E_q[P/(q Z) grad log pi]`, without the control variate."""

    def coefficient(self, sequences: Sequences) -> Tensor:
        return -finite_exp(sequences.log_target - sequences.log_z - sequences.log_proposal)


def feature(texts: list[str]) -> list[float]:
    return [float(text.count("a") >= 2) for text in texts]


CONSTRAINTS = ("pointwise: at least two a", "distributional: at least two a in half")


def task_of(seed: int) -> EnumerableTask:
    """121 completions of each of 2 prompts."""
    return replace(letter_count_task(), letters="abc", prompts=("b", "c"), reward=feature, seed=seed)


def log_potential(constraint: str, known: Enumerated) -> Tensor:
    """phi of all completions, `(N,)`: -inf outside the event, or lambda f with the lambda that gives the moment."""
    if constraint.startswith("pointwise"):
        return known.rewards.log()
    target, rewards = Moments({"feature": SHARE}), known.rewards.unsqueeze(1)
    target.bind(["feature"])
    size = len(known.log_prior)
    # All completions with their probabilities, in place of samples of the prior
    everything = PriorScores(
        rewards.expand(size, -1, -1), known.log_prior, torch.arange(size), log_weights=known.log_prior
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*effective samples of the prior")  # they are no samples
        target.fit(everything)
    return target(rewards)


# ---------------------------------------------------------------------------------------------------------------------
# The variance of a gradient


def jacobian(task: EnumerableTask, fit_to: Tensor | None) -> tuple[Tensor, Tensor]:
    """`log pi` `(N,)` of the one prompt, and `grad log pi` of each completion `(N, D)`; of the prior, or of a fit."""
    with tempfile.TemporaryDirectory() as folder:
        path = task.build_model(folder)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    if fit_to is not None:
        model = fitted(model, task, tokenizer, fit_to, steps=25)
    log_policy = all_log_probs(model, task, tokenizer)[0]
    parameters = list(model.parameters())
    rows = [
        torch.cat([part.flatten() for part in torch.autograd.grad(value, parameters, retain_graph=True)])
        for value in log_policy
    ]
    return log_policy.detach(), torch.stack(rows).double()


def variances(seed: int, near: bool) -> dict[str, list[float]]:
    """`E|g - E g|^2 / |E g|^2` of each estimator and size; at the prior, or near the posterior of the constraint."""
    constraint = CONSTRAINTS[0]
    task = replace(task_of(seed), prompts=("b",))
    known = enumerated(task)
    log_target = known.log_prior[0] + log_potential(constraint, known)
    posterior = log_target.log_softmax(dim=0)
    log_policy, gradients = jacobian(task, posterior.unsqueeze(0) if near else None)
    gram, generator = gradients @ gradients.T, torch.Generator().manual_seed(seed)
    worth = {
        "DPG": (posterior - log_policy).exp(),
        "reward": known.rewards,
        "KL-RL, β = 0.1": known.rewards / 0.1 + known.log_prior[0] - log_policy,
    }
    found: dict[str, list[float]] = {}
    for name, value in worth.items():
        mean = log_policy.exp() * value
        norm = (mean @ gram @ mean).item()
        for with_baseline in (False, True):
            found[f"{name}, {'with' if with_baseline else 'no'} baseline"] = [
                spread(value, log_policy, gram, size, with_baseline, name == "DPG", generator) / norm - 1
                for size in SIZES
            ]
    return found


def spread(
    value: Tensor,
    log_policy: Tensor,
    gram: Tensor,
    size: int,
    baseline: bool,
    is_dpg: bool,
    generator: torch.Generator,
) -> float:
    """`E|g|^2` of gradients from groups of a size: `g = sum_i (value_i - b_i) grad log pi_i / size`."""
    drawn = torch.multinomial(log_policy.exp().expand(MANY, -1), size, replacement=True, generator=generator)  # (M, B)
    values = value[drawn]
    if baseline:
        # DPG's is known, E_pi[p/pi] = 1; others are the mean of the siblings
        values = values - (1.0 if is_dpg else leave_one_out_mean(values, torch.ones_like(drawn, dtype=torch.bool)))
    weights = torch.zeros(MANY, len(value), dtype=torch.float64).scatter_add_(1, drawn, values / size)
    return ((weights @ gram) * weights).sum(dim=1).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Trainings


def method(name: str, phi: Tensor, rewards: Tensor, is_hard: bool) -> tuple[Estimator, Tensor]:
    """An estimator and the log-potential that it is given."""
    reverse, forward = get_divergence("reverse_kl"), get_divergence("forward_kl")
    if name == "DPG":
        return WithoutBaseline(forward), phi
    if name == "GDC++":
        return ImportanceWeights(forward), phi
    if name == "reward maximization":
        return PureRL(reverse), rewards
    return PolicyGradient(reverse), rewards / 0.1 if is_hard else phi


METHODS = ("DPG", "GDC++", "reward maximization", "KL-RL")


def train(constraint: str, name: str, seed: int, steps: int) -> list[Row]:
    """A policy along its way."""
    task = task_of(seed)
    known = enumerated(task)
    phi = log_potential(constraint, known)
    estimator, potential = method(name, phi, known.rewards, bool(phi.isneginf().any()))
    at = {round(steps * share) for share in (0, 0.1, 0.2, 0.35, 0.5, 0.75)}
    course = descend(task, estimator, potential, steps=steps, seed=seed, evaluate_at=at)
    posterior = (known.log_prior + phi).log_softmax(dim=1)
    return [
        {
            "step": step,
            "forward_kl": kl(posterior, law).mean().item(),
            "kl_prior": kl(law, known.log_prior).mean().item(),
            "entropy": entropy(law).mean().item(),
            "feature": expected(law, known.rewards).mean().item(),
            "posterior_kl_prior": kl(posterior, known.log_prior).mean().item(),
            "posterior_entropy": entropy(posterior).mean().item(),
        }
        for step, law in zip(course.steps, course.log_policies, strict=True)
    ]


def experiment(setting: Setting) -> Shown:
    """Variances, and all methods on both constraints."""
    steps = 2 if setting.quick else STEPS
    gradients = {
        where: [variances(seed, where != "at the prior") for seed in setting.seeds]
        for where in ("at the prior", "near the posterior")
    }
    asked = [
        {"constraint": constraint, "name": name, "seed": seed, "steps": steps}
        for constraint in CONSTRAINTS
        for name in METHODS
        for seed in setting.seeds
    ]
    courses: dict[str, dict[str, list[list[Row]]]] = {c: {name: [] for name in METHODS} for c in CONSTRAINTS}
    for arguments, course in zip(asked, setting.run(train, asked), strict=True):
        courses[arguments["constraint"]][arguments["name"]].append(course)
    record = {"sizes": SIZES, "variances": gradients, "courses": courses}
    return Shown(
        record, table(gradients, courses), panels(lambda axes: draw(axes, gradients, courses), 4, 2, width=3.8)
    )


def draw(axes: Any, gradients: Any, courses: Any) -> None:
    for panel, (where, runs) in zip((axes[0], axes[4]), gradients.items(), strict=True):
        for index, name in enumerate(runs[0]):
            curve(panel, SIZES, [run[name] for run in runs], index, name, band=0.07)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        legend = {"legend": panel is axes[0], "fontsize": 7, "loc": "lower left"}
        finish(panel, f"variance {where}", "completions in a gradient", "E|g − Eg|² / |Eg|²", **legend)
    titles = {"forward_kl": "KL(p‖π)", "kl_prior": "KL(π‖π₀)", "entropy": "entropy"}
    for row, (constraint, methods) in enumerate(courses.items()):
        for column, (name, title) in enumerate(titles.items()):
            panel = axes[4 * row + 1 + column]
            for index, (way, runs) in enumerate(methods.items()):
                curve(panel, [r["step"] for r in runs[0]], [[r[name] for r in run] for run in runs], index, way)
            if name != "forward_kl":
                ends = [run[-1][f"posterior_{name}"] for run in methods["DPG"]]
                panel.axhline(sum(ends) / len(ends), color="#222222", linewidth=0.8, linestyle=":")
            else:
                panel.set_yscale("log")
            finish(panel, f"{title}, {constraint.partition(':')[0]}", "steps", "nats", legend=panel is axes[1])


def short(values: list[float]) -> str:
    """`mean ± standard deviation` over seeds, whatever the size of the number."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3g} ± {spread:.2g}"


def table(gradients: Any, courses: Any) -> str:
    rows = []
    for where, runs in gradients.items():
        for name in runs[0]:
            rows.append([where, name, *(short([run[name][i] for run in runs]) for i in range(len(SIZES)))])
        for kind in (name.removesuffix(", no baseline") for name in runs[0] if name.endswith(", no baseline")):
            pairs = [(run[f"{kind}, no baseline"], run[f"{kind}, with baseline"]) for run in runs]
            ratios = (short([without[i] / baseline[i] for without, baseline in pairs]) for i in range(len(SIZES)))
            rows.append([where, f"{kind}: without / with", *ratios])
    first = markdown_table(["where", "estimator", *(str(size) for size in SIZES)], rows)
    rows, names = [], ("forward_kl", "kl_prior", "entropy", "feature")
    for constraint, methods in courses.items():
        for way, runs in methods.items():
            rows.append([constraint, way, *(mean_and_spread([run[-1][n] for run in runs]) for n in names)])
        ends = [run[-1] for run in methods["DPG"]]
        exact = [mean_and_spread([end[f"posterior_{n}"] for end in ends]) for n in ("kl_prior", "entropy")]
        rows.append([constraint, "(the posterior)", "0", *exact, ""])
    second = markdown_table(["constraint", "method", "KL(p‖π)", "KL(π‖π₀)", "entropy", "E[feature]"], rows)
    return f"Relative variance of a gradient, by its number of completions:\n\n{first}\n\nAfter training:\n\n{second}"
