"""Calibrated targets against their oracle: win rates by the formula, of exact posteriors, and of trained policies."""

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from ..targets import Calibrated, Target
from ..targets.transforms import (
    Transform,
    best_of_n,
    beta_for_kl,
    calibrated_law,
    ctrl_best_of_n,
    ctrl_worst_of_n,
    identity,
)
from ..trainers.kl_rl import KLRLConfig, KLRLTrainer
from ..trainers.posterior_trainer import PosteriorTrainer
from .exact_benchmark import default_arguments
from .tiny import EnumerableTask


N = 4  # the best and the worst of how many
KL_BUDGET = 0.5  # nats


class WinRates(NamedTuple):
    """A distribution against the prior: the oracle table's columns, each between 0 and 1 but the first."""

    kl_prior: float
    """`KL(.||pi_0)` in nats."""
    plain: float
    """Probability that a sample has a higher reward than one of the prior; ties count half."""
    best_of_n: float
    """The same for the best of `n` samples of either."""
    worst_of_n: float
    """The same for the worst of `n` samples of either."""


def win_rates(log_probs: torch.Tensor, log_prior: torch.Tensor, rewards: torch.Tensor, n: int = N) -> WinRates:
    """
    Exact win rates against the prior on an enumerated space.

    Args:
        log_probs (`torch.Tensor`): of all completions of one prompt, shape `(N,)`, in nats.
        log_prior (`torch.Tensor`): the prior's, shape `(N,)`.
        rewards (`torch.Tensor`): shape `(N,)`.
        n (`int`, *optional*, defaults to `4`): how many samples the best and the worst are taken of.
    """
    _, rank = rewards.unique(return_inverse=True)  # equal rewards are one outcome
    mass = torch.zeros(2, int(rank.max()) + 1, dtype=torch.float64)
    mass.index_add_(1, rank, torch.stack([log_probs, log_prior]).double().exp())  # (2, R)
    at_most = mass.cumsum(dim=1)
    at_least = mass.flip(1).cumsum(dim=1).flip(1)
    return WinRates(
        kl_prior=(log_probs.exp() * (log_probs - log_prior)).nansum().item(),
        plain=_wins(mass),
        best_of_n=_wins(at_most.pow(n).diff(dim=1, prepend=torch.zeros(2, 1, dtype=torch.float64))),
        worst_of_n=_wins(-at_least.pow(n).diff(dim=1, append=torch.zeros(2, 1, dtype=torch.float64))),
    )


def sampled_win_rates(rewards: torch.Tensor, prior_rewards: torch.Tensor, n: int = N) -> WinRates:
    """
    Win rates from samples where completions cannot be enumerated, averaged over prompts.

    They are those of the two empirical distributions: exact in the limit, and without bias for `plain`.

    Args:
        rewards (`torch.Tensor`): of samples of the policy, shape `(P, N)`.
        prior_rewards (`torch.Tensor`): of samples of the prior for the same prompts, shape `(P, M)`.
        n (`int`, *optional*, defaults to `4`): how many samples the best and the worst are taken of.

    Returns:
        [`WinRates`]: with `NaN` as the distance from the prior, which rewards do not tell.
    """
    rates = []
    for ours, theirs in zip(rewards, prior_rewards, strict=True):
        log_share, none = -torch.full_like(ours, len(ours)).log(), torch.full_like(theirs, -math.inf)
        log_prior_share, prior_none = -torch.full_like(theirs, len(theirs)).log(), torch.full_like(ours, -math.inf)
        of_both = torch.cat([log_share, none]), torch.cat([prior_none, log_prior_share])
        rates.append(win_rates(*of_both, torch.cat([ours, theirs]), n)._replace(kl_prior=math.nan))
    return _mean(rates)


def _wins(mass: torch.Tensor) -> float:
    """`P(a > b) + P(a = b)/2` of two distributions `(2, R)` on the same ranks."""
    ours, theirs = mass
    return (ours * (theirs.cumsum(dim=0) - theirs / 2)).sum().item()


def _mean(rates: Sequence[WinRates]) -> WinRates:
    return WinRates(*(math.fsum(column) / len(rates) for column in zip(*rates, strict=True)))


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


class Trained(NamedTuple):
    """A training run on an enumerable task, for all completions of each prompt."""

    trainer: PosteriorTrainer
    rewards: torch.Tensor
    """`(N, K)`, float64."""
    log_prior: torch.Tensor
    """`(P, N)`, in nats."""
    log_policy: torch.Tensor
    """`(P, N)`, in nats."""


def train_on(
    task: EnumerableTask,
    trainer_class: Callable[..., PosteriorTrainer] = KLRLTrainer,
    config_class: Callable[..., Any] = KLRLConfig,
    target: Target | dict[str, Any] | None = None,
    features: Sequence[Callable[[list[str]], list[float]]] | None = None,
    **settings: Any,
) -> Trained:
    """
    Trains on an enumerable task and scores all its completions under the policy.

    Args:
        task ([`EnumerableTask`]): prompts, prior and reward.
        trainer_class, config_class (`Callable`, *optional*): defaults to KL-RL.
        target (`Target` or `dict`, *optional*): as the trainer's.
        features (`list[Callable]`, *optional*):
            Functions of the texts that become reward functions with their names. Defaults to the task's reward.
        settings: training arguments that differ from the defaults here, 400 steps of 256 completions in groups of 16
            with 2,000 prior samples a prompt.
    """
    features = [task.reward] if features is None else list(features)
    with tempfile.TemporaryDirectory() as folder:
        model_path = task.build_model(f"{folder}/prior")
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        log_prior = task.log_probs(AutoModelForCausalLM.from_pretrained(model_path), tokenizer)
        arguments = {
            **default_arguments(task),
            "num_prior_samples": 2000,
            **settings,
        }
        trainer = trainer_class(
            model=model_path,
            reward_funcs=[_as_reward_function(feature) for feature in features],
            args=config_class(output_dir=f"{folder}/out", **arguments),
            train_dataset=task.dataset(arguments["per_device_train_batch_size"]),
            processing_class=tokenizer,
            **({} if target is None else {"target": target}),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        log_policy = task.log_probs(trainer.model, tokenizer)
        texts = _texts(task, tokenizer)
        rewards = torch.tensor([feature(texts) for feature in features], dtype=torch.float64).T
        return Trained(trainer, rewards, log_prior, log_policy)


def _as_reward_function(feature: Callable[[list[str]], list[float]]) -> Callable[..., list[float]]:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return feature(completions)

    reward.__name__ = feature.__name__
    return reward


def _texts(task: EnumerableTask, tokenizer: Any) -> list[str]:
    completions = task.completions(tokenizer)
    pairs = zip(completions.ids, completions.mask, strict=True)
    return tokenizer.batch_decode([ids[mask] for ids, mask in pairs], skip_special_tokens=True)


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
    return _mean(rates)


def policy_rates(trained: Trained) -> WinRates:
    """Of a trained policy, averaged over prompts."""
    pairs = zip(trained.log_policy, trained.log_prior, strict=True)
    return _mean([win_rates(policy, prior, trained.rewards[:, 0]) for policy, prior in pairs])


class Row(NamedTuple):
    """The four columns of the table for one law, three times."""

    law: str
    formula: WinRates
    posterior: WinRates
    policy: WinRates


def run_law(law: Law, **settings: Any) -> Row:
    """
    One row of the table.

    Args:
        law ([`Law`]): which.
        settings: training arguments, as of [`train_on`].
    """
    trained = train_on(ranked_task(), target=Calibrated(law.transform, law.beta), partition="known", **settings)
    posterior = exact_posterior_rates(law, trained.log_prior, trained.rewards[:, 0])
    return Row(law.name, formula(law), posterior, policy_rates(trained))


def to_markdown(rows: Sequence[Row]) -> str:
    """The table: three lines a law."""
    lines = [
        f"| Phi(u) | | KL to the prior | win rate | best of {N} | worst of {N} |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name in ("formula", "posterior", "policy"):
            cells = " | ".join(f"{value:.3f}" for value in getattr(row, name))
            lines.append(f"| {row.law} | {name} | {cells} |")
    return "\n".join(lines) + "\n"


def write(rows: Sequence[Row], folder: Path) -> None:
    """Writes `oracle.json` and `oracle.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [{"law": row.law, **{name: getattr(row, name)._asdict() for name in row._fields[1:]}} for row in rows]
    (folder / "oracle.json").write_text(json.dumps(records, indent=1))
    (folder / "oracle.md").write_text(to_markdown(rows))
