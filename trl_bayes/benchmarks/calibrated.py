"""Calibrated targets against their oracle: win rates by the formula, of exact posteriors, and of trained policies."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple

import torch
from rich.progress import Progress

from ..targets import Calibrated
from ..targets.transforms import (
    Transform,
    best_of_n,
    beta_for_kl,
    calibrated_law,
    ctrl_best_of_n,
    ctrl_worst_of_n,
    identity,
)
from .exact_training import Trained, train_on
from .jobs import quiet
from .section import Findings, SectionArguments
from .tables import markdown_table
from .tiny import EnumerableTask
from .win_rates import WinRates, mean_rates, win_rates


N = 4  # the best and the worst of how many
KL_BUDGET = 0.5  # nats


@dataclass
class CalibratedArguments(SectionArguments):
    r"""
    Arguments of the section, besides those of [`~trl_bayes.benchmarks.section.SectionArguments`].

    Parameters:
        max_steps (`int`, *optional*, defaults to `400`): updates of each training, of 256 completions each.
        seed (`int`, *optional*, defaults to `0`): of the training runs.
    """

    page: ClassVar[str] = "oracle"

    max_steps: int = field(default=400, metadata={"help": "Updates of each training, of 256 completions each."})
    seed: int = field(default=0, metadata={"help": "Seed of the training runs."})

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"`max_steps={self.max_steps}` trains nothing: set it to 1 or more.")


def run(args: CalibratedArguments, progress: Progress) -> Iterator[Findings]:
    """Trains a policy for each law; they share their samples of the prior."""
    quiet()
    rows: list[LawRates] = []
    with TemporaryDirectory() as kept:
        for law in progress.track(laws(), description="calibrated targets"):
            rows.append(run_law(law, max_steps=args.max_steps, seed=args.seed, prior_samples_dir=kept))
            yield Findings([to_record(row) for row in rows], to_markdown(rows))


_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def _ranked_reward(texts: list[str]) -> list[float]:
    """No two texts of at most two letters share a value."""
    rewards = []
    for text in texts:
        values = [_LETTERS.index(letter) / 36 for letter in text.split()]
        rewards.append(sum(weight * (1 + value) for weight, value in zip((1.0, 0.7071), values, strict=False)))
    return rewards


def ranked_task() -> EnumerableTask:
    """
    A reward that is as good as continuous: 1,333 completions for each of 4 prompts, no two with the same reward.

    The prior is nearly uniform, so that none but the empty completion (0.03) has a probability above 0.01.
    """
    return EnumerableTask(_LETTERS, 2, ("a", "b", "c d", "e f g"), _ranked_reward, seed=0, logit_std=0.3)


@dataclass(frozen=True)
class Law:
    """One row of the table: a transform with its temperature."""

    name: str
    transform: Transform
    beta: float


def laws() -> list[Law]:
    """The InfAlign oracle's three transforms at 0.5 nats, and the law of best-of-4."""
    at_budget = {"u": identity(), "exp(10u)": ctrl_best_of_n(10.0), "-exp(-10u)": ctrl_worst_of_n(10.0)}
    rows = [Law(name, transform, beta_for_kl(transform, KL_BUDGET)) for name, transform in at_budget.items()]
    return [*rows, Law("best of 4", best_of_n(N), 1 / (N - 1))]


def formula(law: Law) -> WinRates:
    """By the law on (0, 1), for a continuous reward."""
    exact = calibrated_law(law.transform, law.beta, N)
    return WinRates(exact.kl_prior, exact.win_rate, exact.best_of_n, exact.worst_of_n)


def exact_posterior_rates(law: Law, log_prior: torch.Tensor, rewards: torch.Tensor) -> WinRates:
    """Of the posteriors on an enumerated space, priors `(P, N)` and rewards `(N,)`, with `u` from the exact prior."""
    rates = []
    for prior in log_prior:
        less, equal = (
            (prior.exp() * mask(rewards.unsqueeze(1), rewards)).sum(dim=1) for mask in (torch.gt, torch.eq)
        )  # (N,)
        log_joint = prior + law.transform(less + equal / 2) / law.beta
        rates.append(win_rates(log_joint.log_softmax(dim=0), prior, rewards))
    return mean_rates(rates)


def policy_rates(trained: Trained) -> WinRates:
    """Of a trained policy, averaged over prompts."""
    pairs = zip(trained.log_policy, trained.log_prior, strict=True)
    return mean_rates([win_rates(policy, prior, trained.rewards[:, 0]) for policy, prior in pairs])


class LawRates(NamedTuple):
    """The four columns of the table for one law, three times."""

    law: str
    formula: WinRates
    posterior: WinRates
    policy: WinRates


def run_law(law: Law, **settings: Any) -> LawRates:
    """
    One row of the table.

    Args:
        law ([`Law`]): which.
        settings: training arguments, as of [`train_on`].
    """
    trained = train_on(ranked_task(), target=Calibrated(law.transform, law.beta), partition="known", **settings)
    posterior = exact_posterior_rates(law, trained.log_prior, trained.rewards[:, 0])
    return LawRates(law.name, formula(law), posterior, policy_rates(trained))


def to_record(row: LawRates) -> dict[str, Any]:
    """A row as strict JSON."""
    return {"law": row.law, **{name: getattr(row, name)._asdict() for name in row._fields[1:]}}


def to_markdown(rows: Sequence[LawRates]) -> str:
    """The section's part of the page."""
    text = (
        "A policy trained for each transform where all 1,333 completions a prompt are known, against the formula for "
        "a continuous reward and against the exact posterior."
    )
    return "\n\n".join(["## Calibrated targets and their oracle", text, table(rows)])


def table(rows: Sequence[LawRates]) -> str:
    """Three lines a law."""
    lines = [
        [row.law, name, *(f"{value:.3f}" for value in getattr(row, name))]
        for row in rows
        for name in ("formula", "posterior", "policy")
    ]
    return markdown_table(["Phi(u)", "", "KL to the prior", "win rate", f"best of {N}", f"worst of {N}"], lines)
