"""Trainings of the ablation: several seeds of one method at once, with the trainers' estimators, Z and replay."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..estimators import Terms
from ..groups import Group, effective_sample_size, pooled_log_z
from ..partitions import Running, fixed_log_z
from ..trainers.replay_buffer import refresh
from .ablation_methods import Method
from .exact_training import ExactProblem
from .gradient_estimators import minus_siblings
from .laws import kl
from .noise_free import exact_loss
from .perceptrons import Perceptrons, Prefixes
from .tiny import build_tiny_tokenizer


class Budget(NamedTuple):
    """Of a training: groups of a step, completions of a group, and of the buffer; the learning rate falls to 0."""

    steps: int = 400
    groups: int = 16
    group_size: int = 16
    learning_rate: float = 1e-2
    buffer_size: int = 8192

    @property
    def completions(self) -> int:
        """Fresh ones of a whole training."""
        return self.steps * self.groups * self.group_size

    def in_parts(self, parts: int, num_prompts: int) -> "Budget":
        """As many completions in so many more steps: of fewer groups, or smaller ones where each prompt has one."""
        groups = max(self.groups // parts, num_prompts)
        return self._replace(
            steps=self.steps * parts, groups=groups, group_size=self.groups * self.group_size // (parts * groups)
        )


class Outcome(NamedTuple):
    """`KL(p||pi)` in nats of every seed, the mean over prompts; and with the mean of the last quarter's weights."""

    forward_kl: list[float]
    of_mean_weights: list[float]


class Ablation:
    """
    A task with the tables that all of its trainings share.

    Args:
        problem ([`~trl_bayes.benchmarks.exact_training.ExactProblem`]): task and target.
        seeds (`int`): trainings at once, E.
        budget ([`Budget`]): of each.
    """

    def __init__(self, problem: ExactProblem, seeds: int, budget: Budget):
        task, self.budget, self.seeds = problem.task, budget, seeds
        self._start = (task.seed, task.logit_std)
        self.prefixes = Prefixes(task)
        self.num_prompts = len(task.prompts)
        with torch.no_grad():
            self.next_of_prior = self.policies()()[:1]  # (1, P, M, V)
        self.log_prior = self.prefixes.log_law(self.next_of_prior[0]).double()  # (P, N)
        self.phi = problem.log_potential(task.rewards(build_tiny_tokenizer(task.letters)))  # (N,)
        log_target = self.log_prior + self.phi
        self.log_posterior = log_target - log_target.logsumexp(dim=1, keepdim=True)  # (P, N)

    def policies(self) -> Perceptrons:
        """One for each seed, all the prior."""
        return Perceptrons(self.prefixes, self.seeds, *self._start)

    def distance(self, policies: Perceptrons) -> list[float]:
        """`KL(p||pi)` of every seed."""
        with torch.no_grad():
            log_policy = self.prefixes.log_law(policies()).double()  # (E, P, N)
        return kl(self.log_posterior, log_policy).mean(dim=1).tolist()

    def train(self, method: Method, seed: int = 0) -> Outcome:
        """Adam with a learning rate that falls to 0, and clipping as the trainers' default, for each seed."""
        policies, budget = self.policies(), self.budget.in_parts(method.parts, self.num_prompts)
        optimizer = torch.optim.Adam(policies.parameters(), lr=budget.learning_rate, betas=(0.9, method.adam_beta2))
        sampled = Sampled(self, method, seed, budget)
        mean: list[Tensor] = [torch.zeros_like(weight) for weight in policies.parameters()]
        last = budget.steps // 4
        for step in range(budget.steps):
            for group in optimizer.param_groups:
                group["lr"] = budget.learning_rate * (1 - step / budget.steps)
            exact = method.is_exact(step / budget.steps)
            for update in range(method.most_updates):
                table = policies()
                if update > 0 and sampled.effective_share(table) < method.least_effective:
                    break
                optimizer.zero_grad()
                if exact:
                    loss = exact_loss_of(self, method, table)
                else:
                    loss = sampled.loss_again(table) if update > 0 else sampled.loss(table)
                loss.backward()
                _clip(list(policies.parameters()), 1.0)
                optimizer.step()
            if step >= budget.steps - last:
                for total, weight in zip(mean, policies.parameters(), strict=True):
                    total += weight.detach() / last
        end = self.distance(policies)
        with torch.no_grad():
            for total, weight in zip(mean, policies.parameters(), strict=True):
                weight.copy_(total)
        return Outcome(end, self.distance(policies))


def exact_loss_of(ablation: Ablation, method: Method, next_token: Tensor) -> Tensor:
    """The sum over seeds of the exact loss."""
    log_policy = ablation.prefixes.log_law(next_token).double()  # (E, P, N)
    losses = [
        exact_loss(of_prompt, posterior, method.f)
        for of_seed in log_policy
        for of_prompt, posterior in zip(of_seed, ablation.log_posterior, strict=True)
    ]
    return torch.stack(losses).sum() / ablation.num_prompts


def _clip(weights: Sequence[Tensor], largest: float) -> None:
    """Each seed's gradient by its own norm."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norm = torch.stack([gradient.flatten(1).square().sum(dim=1) for gradient in gradients]).sum(dim=0).sqrt()  # (E,)
    for gradient in gradients:
        gradient *= (largest / (norm + 1e-6)).clamp(max=1.0).view(-1, 1, 1)


class Sampled:
    """The loss of a method from completions that are drawn at every step, of all seeds; with what it remembers."""

    def __init__(self, ablation: Ablation, method: Method, seed: int, budget: Budget):
        self.ablation, self.method, self.estimator, self.budget = ablation, method, method.estimator, budget
        self.generator = torch.Generator().manual_seed(seed)
        self.batch: dict[str, Any] = {}  # the latest
        self.partition, self.buffer = Running(), Buffer(ablation.seeds, budget.buffer_size, self.generator)

    def loss(self, next_token: Tensor) -> Tensor:
        """The sum over seeds, of new completions, from `log pi` of every token after each prefix, `(E, P, M, V)`."""
        ablation, (seeds, num_prompts) = self.ablation, next_token.shape[:2]
        with torch.no_grad():
            law = ablation.prefixes.log_law(next_token.detach()).flatten(0, 1)  # (E * P, N)
        row = torch.arange(len(law)).repeat_interleave(self.budget.groups // num_prompts)  # (R,) of the law
        drawn = self._draw(law, ablation.log_prior.repeat(seeds, 1))  # (R, G)
        chosen = law[row.unsqueeze(1), drawn]
        prior = ablation.log_prior[(row % num_prompts).unsqueeze(1), drawn].to(chosen)
        phi, from_prior = ablation.phi[drawn].to(chosen), torch.zeros_like(drawn, dtype=torch.bool)
        from_prior[:, : self._num_of_prior] = True
        group = Group(chosen, self._log_proposal(chosen, prior), prior, phi, row, from_prior)
        if self.method.kind in ("adaptive", "energy"):
            return self._of_tokens(next_token, group, drawn, row)
        log_z = self.partition.log_z(group)
        if self.method.self_normalized:
            log_z = fixed_log_z(pooled_log_z(group.log_weights, group.valid), group)
        terms = self.estimator.terms(group, log_z)
        self.partition.update(group)
        batch: dict[str, Any] = {name: value.reshape(seeds, -1) for name, value in terms._asdict().items()}
        batch["prompt_key"] = row.repeat_interleave(drawn.size(1)).view(seeds, -1)
        batch["outcome"] = drawn.view(seeds, -1)
        self.batch = self._with_replayed(batch)
        return self.loss_again(next_token)

    def loss_again(self, next_token: Tensor) -> Tensor:
        """The same of the latest completions, whoever has drawn them."""
        batch = self.batch
        log_policy = self._per_token(next_token, batch["prompt_key"], batch["outcome"]).sum(dim=2)
        flat = Terms(*(batch[name].flatten() for name in Terms._fields))
        return self.estimator.loss(log_policy.flatten(), flat)[0] * len(log_policy)

    def effective_share(self, next_token: Tensor) -> float:
        """Of the latest completions as samples of these policies, by the ratios `pi/q`: of the seed with the least."""
        log_policy = self._per_token(next_token, self.batch["prompt_key"], self.batch["outcome"]).sum(dim=2)
        ratio = (log_policy - self.batch["log_proposal"]).detach()  # (E, B)
        return effective_sample_size(ratio, torch.ones_like(ratio, dtype=torch.bool)).min().item()

    @property
    def _num_of_prior(self) -> int:
        return round(self.method.prior_fraction * self.budget.group_size)

    def _draw(self, law: Tensor, prior: Tensor) -> Tensor:
        """Numbers of completions, `(R, G)`: of each group a share of the prior's, and the policy's."""
        size, times = self.budget.group_size, self.budget.groups // self.ablation.num_prompts
        of_prior = self._num_of_prior
        parts = [
            torch.multinomial(log_law.exp(), number * times, replacement=True, generator=self.generator)
            for log_law, number in ((prior, of_prior), (law, size - of_prior))
            if number
        ]
        return torch.cat([part.view(len(law) * times, -1) for part in parts], dim=1)

    def _log_proposal(self, log_policy: Tensor, log_prior: Tensor) -> Tensor:
        """The density of the mixture, for all: who drew a completion does not matter."""
        share = torch.tensor(self.method.prior_fraction, dtype=log_policy.dtype)
        return torch.logaddexp(log_policy + torch.log1p(-share), log_prior + share.log()) if share > 0 else log_policy

    def _per_token(self, next_token: Tensor, row: Tensor, outcome: Tensor) -> Tensor:
        """`log pi` of each token, of completions of any shape, `(..., T)`."""
        prefixes, (num_nodes, num_tokens) = self.ablation.prefixes, next_token.shape[2:]
        place = (row.unsqueeze(-1) * num_nodes + prefixes.node_of[outcome]) * num_tokens + prefixes.ids[outcome]
        return torch.where(prefixes.mask[outcome], next_token.flatten()[place], 0.0)

    def _with_replayed(self, batch: dict[str, Any]) -> dict[str, Any]:
        number = self.method.replay_ratio * batch["outcome"].size(1)
        if not number:
            return batch
        fresh = batch
        if len(self.buffer) >= number:
            replayed = {name: value.flatten() for name, value in self.buffer.sample(number).items()}
            refresh(replayed, 0, self.partition, self.estimator)
            seeds = self.ablation.seeds
            batch = {name: torch.cat([fresh[name], replayed[name].view(seeds, -1)], dim=1) for name in fresh}
        self.buffer.add(fresh)
        return batch

    # -----------------------------------------------------------------------------------------------------------------
    # The reverse KL token by token

    def _of_tokens(self, next_token: Tensor, group: Group, drawn: Tensor, row: Tensor) -> Tensor:
        rows = row.unsqueeze(1).expand_as(drawn)
        log_policy = self._per_token(next_token, rows, drawn)  # (R, G, T)
        whole = group.log_policy - group.log_target  # (R, G)
        seeds = self.ablation.seeds
        if self.method.kind == "energy":
            score = self._squared_score(next_token.detach(), rows, drawn)  # (R, G)
            total, weighted = score.sum(dim=1, keepdim=True), (score * whole).sum(dim=1, keepdim=True)
            coefficient = whole - (weighted - score * whole) / (total - score)
            return (coefficient * log_policy.sum(dim=2)).mean() * seeds
        kl = self._token_kl(next_token, rows, drawn)  # (R, G, T)
        future = kl.detach().flip(2).cumsum(2).flip(2) - kl.detach()
        rao = minus_siblings(future - group.phi.unsqueeze(2))
        sequence = minus_siblings(whole.unsqueeze(2)).expand_as(rao)
        own = self.ablation.prefixes.mask[drawn]
        difference = torch.where(own, sequence - rao, 0.0)
        share = share_from_others((sequence * difference).sum(dim=(1, 2)), difference.square().sum(dim=(1, 2)), seeds)
        share = share.view(-1, 1, 1)
        return ((sequence - share * difference) * log_policy + share * kl).sum(dim=2).mean() * seeds

    def _at_tokens(self, values: Tensor, row: Tensor, outcome: Tensor) -> Tensor:
        """What is known of each prefix, `(E, P, M)`, where the tokens of completions are drawn, `(..., T)`."""
        prefixes = self.ablation.prefixes
        found = values.flatten()[row.unsqueeze(-1) * values.size(2) + prefixes.node_of[outcome]]
        return torch.where(prefixes.mask[outcome], found, 0.0)

    def _token_kl(self, next_token: Tensor, row: Tensor, outcome: Tensor) -> Tensor:
        of_nodes = (next_token.exp() * (next_token - self.ablation.next_of_prior)).sum(dim=3)  # (E, P, M)
        return self._at_tokens(of_nodes, row, outcome)

    def _squared_score(self, next_token: Tensor, row: Tensor, outcome: Tensor) -> Tensor:
        """Of the logits, `sum_t |onehot(y_t) - pi_t|^2`: what a completion's score is about as long as."""
        squares = self._at_tokens((2 * next_token).exp().sum(dim=3) + 1, row, outcome)
        return (squares - 2 * self._per_token(next_token, row, outcome).exp().masked_fill(squares == 0, 0.0)).sum(
            dim=2
        )


def share_from_others(numerator: Tensor, denominator: Tensor, seeds: int) -> Tensor:
    """The regression coefficient in [0, 1] of each group `(R,)` from the other groups of its seed."""
    numerator, denominator = (
        (each.view(seeds, -1).sum(dim=1, keepdim=True) - each.view(seeds, -1)).flatten()
        for each in (numerator, denominator)
    )
    return torch.where(denominator > 0, numerator / denominator, 0.0).clamp(0.0, 1.0)


class Buffer:
    """The latest completions of each seed, first in first out, and distinct ones drawn from them, uniformly."""

    def __init__(self, seeds: int, capacity: int, generator: torch.Generator):
        self._seeds, self._capacity, self._generator = seeds, capacity, generator
        self._rows: dict[str, Tensor] = {}
        self._added = 0

    def __len__(self) -> int:
        return min(self._added, self._capacity)

    def add(self, batch: dict[str, Tensor]) -> None:
        """A batch of every seed, each `(E, B)`."""
        size = batch["outcome"].size(1)
        place = (torch.arange(size) + self._added) % self._capacity
        for name, value in batch.items():
            rows = self._rows.setdefault(name, value.new_zeros(self._seeds, self._capacity))
            rows[:, place] = value
        self._added += size

    def sample(self, number: int) -> dict[str, Tensor]:
        """`(E, number)` of each quantity."""
        order = torch.rand(self._seeds, len(self), generator=self._generator).topk(number, dim=1).indices
        return {name: value.gather(1, order) for name, value in self._rows.items()}
