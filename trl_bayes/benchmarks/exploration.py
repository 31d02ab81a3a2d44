"""XPO where the prior all but misses the best completion: does its bonus find it, and what else does?"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from matplotlib.axes import Axes
from rich.progress import Progress
from torch import Tensor

from ..estimators import PairTerms, PreferenceLoss, bradley_terry
from ..evaluation.figures import REFERENCE
from .jobs import quiet
from .paper_figure import curve, finish, panels
from .section import Findings, SectionArguments
from .tables import markdown_table


BETA = 0.1
BEST = 1e-4  # the prior's probability of the best completion
BATCH = 16  # pairs of an iteration
UPDATES = 10  # of an iteration, each on fresh pairs and as many of all pairs so far


@dataclass
class ExplorationArguments(SectionArguments):
    r"""
    Arguments of the section, besides those of [`~trl_bayes.benchmarks.section.SectionArguments`].

    Parameters:
        seeds (`list[int]`, *optional*, defaults to 0 to 9): of the runs.
        iterations (`int`, *optional*, defaults to `60`): of each run: 16 pairs and 10 updates each.
    """

    page: ClassVar[str] = "exploration"

    seeds: list[int] = field(default_factory=lambda: list(range(10)), metadata={"help": "Seeds of the runs."})
    iterations: int = field(default=60, metadata={"help": "Iterations of each run, of 16 pairs and 10 updates each."})

    def __post_init__(self) -> None:
        if self.iterations < 1 or not self.seeds:
            raise ValueError("`iterations` and the number of `seeds` must be at least 1.")
        self.seeds = list(dict.fromkeys(self.seeds))


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


class Task(NamedTuple):
    """A tree of completions: each token is one of `branches`, after each prefix there is a table of logits."""

    name: str
    log_prior: Tensor
    """`log pi_0` of all `N` completions, in nats."""
    rewards: Tensor
    """`(N,)`."""
    best: int
    """The completion with the largest reward, to which the prior gives [`BEST`]."""
    levels: list[Tensor]
    """The prior's logits after the prefixes of 0, 1, ... tokens, `(branches ** depth, branches)`."""

    @property
    def log_posterior(self) -> Tensor:
        """`log p` of the tilt, `(N,)`."""
        return (self.log_prior + self.rewards / BETA).log_softmax(dim=0)


def log_probs(levels: Sequence[Tensor]) -> Tensor:
    """`log pi` of all completions, `(N,)`, from logits at each depth."""
    total = levels[0].new_zeros(1)
    for logits in levels:
        total = (total.unsqueeze(1) + logits.log_softmax(dim=1)).flatten()
    return total


def two_arms() -> Task:
    """One token, and the better one has probability 1e-4."""
    levels = [torch.tensor([[1 - BEST, BEST]], dtype=torch.float64).log()]
    return Task("two completions", log_probs(levels), torch.tensor([0.0, 1.0], dtype=torch.float64), 1, levels)


def tree(branches: int = 4, depth: int = 4) -> Task:
    """256 completions of four tokens, one of which has reward 1, while the others have at most 0.2."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(branches**level, branches) for level in range(depth)]
    levels = [2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    log_prior = log_probs(levels)
    best = int((log_prior - math.log(BEST)).abs().argmin())
    rewards = 0.2 * torch.rand(len(log_prior), generator=generator, dtype=torch.float64)
    rewards[best] = 1.0
    return Task(f"{branches**depth} completions", log_prior, rewards, best, levels)


# ---------------------------------------------------------------------------------------------------------------------
# Methods


class Method(NamedTuple):
    """A way to explore, or not to."""

    name: str
    alpha: Callable[[float], float] = lambda progress: 0.0
    """Weight of the bonus, of the progress from 0 to 1."""
    accumulates: bool = True
    """Whether past pairs are learned from as well."""
    share: float = 0.0
    """Of the policy's completions, how many another proposal draws in its place: uniform over all completions."""
    demonstrated: float = 0.0
    """Of the policy's completions, how many are demonstrations of the best one."""
    uses_adam: bool = True


def _constant(alpha: float) -> Callable[[float], float]:
    return lambda progress: alpha


def _falling(alpha: float) -> Callable[[float], float]:
    return lambda progress: alpha * max(0.0, 1 - 2 * progress)  # none in the second half


def methods() -> list[Method]:
    """The bonus at several weights, and what else may find the best completion."""
    weights = (1e-5, 1e-3, 1e-2, 0.1, 1.0)
    return [
        Method("no bonus"),
        *(Method(f"alpha {alpha:g}", _constant(alpha)) for alpha in weights),
        Method("alpha 0.1 to 0", _falling(0.1)),
        Method("alpha 1 to 0", _falling(1.0)),
        Method("alpha 1 to 0, fresh pairs", _falling(1.0), accumulates=False),
        Method("no bonus, SGD", uses_adam=False),
        Method("alpha 1 to 0, SGD", _falling(1.0), uses_adam=False),
        Method("no bonus, 25 % uniform proposal", share=0.25),
        Method("no bonus, 1 % demonstrations", demonstrated=0.01),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# A run


class Run(NamedTuple):
    """Where a run of a method ended."""

    task: str
    method: str
    seed: int
    found: bool
    """Whether the best completion was ever in a pair."""
    best: float
    """`pi` of the best completion, as a share of what the posterior gives it."""
    total_variation: float
    """Of policy and posterior."""
    samples: list[int]
    seconds: list[float]
    forward_kl: list[float]
    """`KL(p||pi)` along the way, in nats."""


def run_method(task: Task, method: Method, seed: int, iterations: int) -> Run:
    """Trains a table of logits by XPO's loss."""
    generator = torch.Generator().manual_seed(seed)
    levels = [logits.clone().requires_grad_() for logits in task.levels]
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(levels, lr=0.05) if method.uses_adam else torch.optim.SGD(levels, lr=1.0)
    )
    loss, posterior = PreferenceLoss(BETA), task.log_posterior
    pairs = torch.zeros(0, 2, dtype=torch.int64)
    samples, seconds, forward_kl, start = [], [], [], time.perf_counter()
    for iteration in range(iterations):
        alpha = method.alpha(iteration / iterations)
        fresh = draw_pairs(task, method, log_probs(levels).detach(), generator)
        pairs = torch.cat([pairs, fresh])
        for _ in range(UPDATES):
            past = pairs[torch.randint(len(pairs), (len(fresh),), generator=generator)]
            batch = torch.cat([fresh, past]) if method.accumulates else fresh
            log_policy = log_probs(levels)[batch]  # (M, 2)
            own, others = task.rewards[batch].unbind(dim=1)
            terms = PairTerms(task.log_prior[batch], bradley_terry(own, others), torch.ones(len(batch)).bool())
            preferred, bonus = loss.losses(log_policy, terms, alpha)
            optimizer.zero_grad()
            (preferred + bonus).mean().backward()
            optimizer.step()
        samples.append(2 * len(pairs))
        seconds.append(time.perf_counter() - start)
        log_policy = log_probs(levels).detach()
        forward_kl.append((posterior.exp() * (posterior - log_policy)).sum().item())
    best = (log_policy[task.best] - posterior[task.best]).exp().item()
    total_variation = (log_policy.exp() - posterior.exp()).abs().sum().item() / 2
    found = bool((pairs == task.best).any())
    return Run(task.name, method.name, seed, found, best, total_variation, samples, seconds, forward_kl)


def draw_pairs(task: Task, method: Method, log_policy: Tensor, generator: torch.Generator) -> Tensor:
    """Completions of the policy and of the prior, `(BATCH, 2)`."""
    own, others = (
        torch.multinomial(log.exp(), BATCH, replacement=True, generator=generator)
        for log in (log_policy, task.log_prior)
    )
    chance = torch.rand(BATCH, generator=generator)
    uniform = torch.randint(len(log_policy), (BATCH,), generator=generator)
    own = torch.where(chance < method.share, uniform, own)
    own = torch.where(chance < method.demonstrated, task.best, own)
    return torch.stack([own, others], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The section


def run(args: ExplorationArguments, progress: Progress) -> Iterator[Findings]:
    """Trains every method on both tasks."""
    quiet()
    torch.set_num_threads(1)
    tasks, runs = [two_arms(), tree()], []
    bar = progress.add_task("exploration", total=len(tasks) * len(methods()) * len(args.seeds))
    for task in tasks:
        for method in methods():
            for seed in args.seeds:
                runs.append(run_method(task, method, seed, args.iterations))
                progress.advance(bar)
            yield findings(tasks, runs, with_figure=method.name == methods()[-1].name)


def findings(tasks: Sequence[Task], runs: Sequence[Run], with_figure: bool = True) -> Findings:
    """The section's part of the page; the figure takes as long as some runs."""
    text = (
        f"The prior gives the best completion {BEST:g}. Learned from preferences by XPO's loss in tables of logits, "
        f"{BATCH} pairs and {UPDATES} updates an iteration. Found: runs in which the best completion was ever in a "
        "pair. Solved: those that end with at least half of the probability that the posterior gives it."
    )
    parts = ["## Exploration", text]
    begun = [task for task in tasks if any(each.task == task.name for each in runs)]
    for task in begun:
        parts += [f"### {task.name}", table([each for each in runs if each.task == task.name])]
    return Findings(
        [each._asdict() for each in runs], "\n\n".join(parts), figure=figure(begun, runs) if with_figure else None
    )


def figure(tasks: Sequence[Task], runs: Sequence[Run]) -> bytes:
    """`KL(p||pi)` against completions drawn: a row for each task, a panel for each kind of method."""
    kinds = {
        "constant bonus": lambda method: "to 0" not in method and "SGD" not in method and "%" not in method,
        "falling bonus, and SGD": lambda method: "to 0" in method or "SGD" in method,
        "other proposals": lambda method: "%" in method or method == "no bonus",
    }

    def draw(every: Sequence[Axes]) -> None:
        places = [(task, title) for task in tasks for title in kinds]
        for axes, (task, title) in zip(every, places, strict=True):
            own = [each for each in runs if each.task == task.name]
            for index, name in enumerate(dict.fromkeys(each.method for each in own if kinds[title](each.method))):
                seeds = [each for each in own if each.method == name]
                curve(
                    axes, seeds[0].samples, [each.forward_kl for each in seeds], index, name.removeprefix("no bonus, ")
                )
            start = (task.log_posterior.exp() * (task.log_posterior - task.log_prior)).sum().item()
            axes.axhline(start, color=REFERENCE, linestyle="--", linewidth=1.2, label="the prior")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_ylim(1e-3, 300)  # below that all are equally good
            place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.1, -0.2), "ncols": 2}
            finish(axes, f"{task.name}: {title}", "completions drawn", "KL(p‖π), nats", **place)

    return panels(draw, len(kinds), max(1, len(tasks)), height=4.4)


def table(runs: Sequence[Run]) -> str:
    """A line for each method."""
    rows = []
    for name in dict.fromkeys(each.method for each in runs):
        own = [each for each in runs if each.method == name]
        found, solved = sum(each.found for each in own), sum(each.best >= 0.5 for each in own)
        best = sum(each.best for each in own) / len(own)
        distance = sum(each.total_variation for each in own) / len(own)
        rows.append([name, f"{found} / {len(own)}", f"{solved} / {len(own)}", f"{best:.3f}", f"{distance:.3f}"])
    return markdown_table(["method", "found", "solved", "π(best) / p(best), mean", "TV(p, π), mean"], rows)
