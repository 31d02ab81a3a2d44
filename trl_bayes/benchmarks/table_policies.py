"""Policies that are tables, on an enumerable task whose expert is known: clones by counting, RL by sampling.

A completion walks through few states (how far it is, its last letter, whether it has kept to the rule), and a policy
is a table of log-probabilities, a row for each state. The tilt of a table by a reward that is a function of the last
state is a table again, so the expert can be cloned exactly, and `KL(expert||clone)` is a sum over all completions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..divergences import get_divergence
from ..estimators import ScoreFunction, Sequences
from ..estimators.baselines import leave_one_out_baseline
from .enumeration import enumerate_completions


NUM_LETTERS = 4
LENGTH = 6  # five letters and EOS
SUCCESS = 0.9  # of the expert


@dataclass(frozen=True, eq=False)
class ChainTask:
    """
    Five letters, each the successor of the one before it, then EOS: four completions of 5,461 get the reward 1.

    The uniform prior finds one in 2.6e-4 of its completions. The expert is its tilt that succeeds with probability
    0.9, so it is 0.1 below the best policy.

    Attributes:
        ids (`Tensor`): (N, T) the tokens of all completions; EOS is the last of A tokens.
        mask (`Tensor`): (N, T) which of them count.
        states (`Tensor`): (N, T) the row of a table that a token is drawn from.
        rewards (`Tensor`): (N,) 0 or 1.
        num_states (`int`): S, rows of a table.
    """

    ids: Tensor
    mask: Tensor
    states: Tensor
    rewards: Tensor
    num_states: int

    @property
    def prior(self) -> Tensor:
        """The uniform table, (S, A) log-probabilities."""
        shape = (self.num_states, NUM_LETTERS + 1)
        return torch.full(shape, -math.log(NUM_LETTERS + 1), dtype=torch.float64)

    @property
    def log_expert(self) -> Tensor:
        """`log pi_E` of all completions, (N,)."""
        log_prior = self.log_probs(self.prior)
        chance = (log_prior.exp() * self.rewards).sum().item()
        nats = math.log(SUCCESS / (1 - SUCCESS)) - math.log(chance / (1 - chance))
        return (log_prior + nats * self.rewards).log_softmax(dim=0)

    def log_probs(self, table: Tensor, chosen: Tensor | None = None) -> Tensor:
        """`log pi` of completions under a table: of all, or of those with the indices `chosen` (B,)."""
        rows = slice(None) if chosen is None else chosen
        # where and not a product: an action that is excluded has -inf
        return torch.where(self.mask[rows], table[self.states[rows], self.ids[rows]], 0.0).sum(dim=1)

    def counts(self, weights: Tensor) -> Tensor:
        """How often each action is taken in each state, (S, A), by completions with these weights (N,)."""
        counts = torch.zeros(self.num_states, NUM_LETTERS + 1, dtype=torch.float64)
        where = (self.states[self.mask], self.ids[self.mask])
        return counts.index_put_(where, weights.unsqueeze(1).expand_as(self.mask)[self.mask], accumulate=True)

    def suboptimality(self, table: Tensor) -> float:
        """What the policy gets less than the best one, 1."""
        return 1 - (self.log_probs(table).exp() * self.rewards).sum().item()

    def kl_from_expert(self, table: Tensor) -> float:
        """`KL(expert||policy)` in nats a completion, exactly; infinite if the policy excludes what the expert does."""
        log_expert = self.log_expert
        return (log_expert.exp() * (log_expert - self.log_probs(table))).sum().item()


def chain_task() -> ChainTask:
    """Lists the completions and the states that they go through."""
    completions = enumerate_completions(range(NUM_LETTERS), NUM_LETTERS, LENGTH)
    numbers: dict[tuple[int, int | None], int] = {}
    states, rewards = [], []
    for ids in completions.ids.tolist():
        row, last, keeps_to_the_rule = [], -1, True
        for place, token in enumerate(ids):
            # One state for all that have left the rule: nothing that they do matters any more
            row.append(numbers.setdefault((place, last if keeps_to_the_rule else None), len(numbers)))
            keeps_to_the_rule &= last < 0 or token == (
                NUM_LETTERS if place == LENGTH - 1 else (last + 1) % NUM_LETTERS
            )
            last = token
        states.append(row)
        rewards.append(float(keeps_to_the_rule))
    return ChainTask(
        completions.ids,
        completions.mask,
        torch.tensor(states),
        torch.tensor(rewards, dtype=torch.float64),
        len(numbers),
    )


def draw_demonstrations(task: ChainTask, number: int, seed: int) -> Tensor:
    """Indices (number,) of the expert's completions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(task.log_expert.exp(), number, replacement=True, generator=generator)


def clone(task: ChainTask, demonstrations: Tensor, one_count: float = 0.0, prior_completions: float = 0.0) -> Tensor:
    """
    The table of maximum likelihood, over a floor; a state that has no count keeps the prior's row.

    Args:
        task ([`ChainTask`]): which.
        demonstrations (`Tensor`): indices of completions.
        one_count (`float`): added to every action of every state, as in the paper.
        prior_completions (`float`): M completions of the prior, cloned besides; in expectation.

    Returns:
        `Tensor`: (S, A) log-probabilities.
    """
    weights = torch.bincount(demonstrations, minlength=len(task.ids)).double()
    weights = weights + prior_completions * task.log_probs(task.prior).exp()
    counts = task.counts(weights) + one_count
    total = counts.sum(dim=1, keepdim=True)
    return torch.where(total > 0, (counts / total.clamp(min=1e-300)).log(), task.prior)


@dataclass(frozen=True)
class Budget:
    """Of RL: updates, completions of each, and Adam's first learning rate, which falls to 0 linearly."""

    steps: int = 40
    batch: int = 64
    learning_rate: float = 0.1

    @property
    def completions(self) -> int:
        """In all."""
        return self.steps * self.batch


def regularized_rl(task: ChainTask, start: Tensor, temperature: float, budget: Budget, seed: int) -> Tensor:
    """
    KL-RL from a table, which is prior and start: the score function of reverse KL with a leave-one-out baseline.

    Args:
        task ([`ChainTask`]), budget ([`Budget`]): which, and how long.
        start (`Tensor`): (S, A) log-probabilities.
        temperature (`float`): lambda, in units of reward per nat.
        seed (`int`): of the completions.

    Returns:
        `Tensor`: (S, A) log-probabilities.
    """
    generator = torch.Generator().manual_seed(seed)
    estimator = ScoreFunction(get_divergence("reverse_kl"))
    log_joint = task.log_probs(start) + task.rewards / temperature  # (N,)
    logits = start.clamp(min=-50).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=budget.learning_rate)
    for step in range(budget.steps):
        table = logits.log_softmax(dim=1)
        drawn = torch.multinomial(
            task.log_probs(table.detach()).exp(), budget.batch, replacement=True, generator=generator
        )
        log_policy = task.log_probs(table, drawn)  # (B,)
        fixed, target = log_policy.detach(), log_joint[drawn]
        zeros = torch.zeros_like(fixed)  # what Z is does not matter to a centered pseudo-reward
        everyone = torch.ones(1, budget.batch, dtype=torch.bool)
        baseline = leave_one_out_baseline((fixed - target)[None], zeros[None], everyone, estimator.divergence)[0]
        factor = estimator.coefficient(Sequences(fixed, target, fixed, zeros, baseline))
        optimizer.zero_grad()
        (factor * log_policy).mean().backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate * (1 - (step + 1) / budget.steps)
    return logits.detach().log_softmax(dim=1)


def slope(numbers: Sequence[int], values: Sequence[float]) -> float:
    """Of a line through the points in log-log, by least squares."""
    x, y = (torch.tensor(points, dtype=torch.float64).log() for points in (numbers, values))
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x * x).sum()).item()
