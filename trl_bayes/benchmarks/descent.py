"""An estimator at work where all completions are known: the loss of the trainers, without TRL's generation around it.

A step draws completions from the policy's exact law, makes the terms of the loss as the trainers do
(`Estimator.terms`, `Estimator.loss`, a running log Z) and takes a step of Adam. It costs a tenth of a step of a
trainer, so that many seeds and settings can be compared; what the trainers add is measured elsewhere.
"""

import tempfile
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..estimators import Estimator, Terms
from ..groups import Group
from ..partitions import Running
from .fitted import all_log_probs
from .tiny import EnumerableTask, build_tiny_model


class Descent(NamedTuple):
    """Where a policy went, `log pi` of all completions of each prompt."""

    log_prior: Tensor
    """`(P, N)`, in nats."""
    steps: tuple[int, ...]
    """After which the policy was kept."""
    log_policies: Tensor
    """`(M, P, N)`, in nats."""


def descend(
    task: EnumerableTask,
    estimator: Estimator,
    phi: Tensor,
    *,
    steps: int,
    group_size: int = 32,
    learning_rate: float = 5e-3,
    seed: int = 0,
    evaluate_at: Iterable[int] = (),
    hidden_size: int = 32,
) -> Descent:
    """
    Trains a tiny model by an estimator.

    Args:
        task ([`EnumerableTask`]): prompts and prior.
        estimator ([`~trl_bayes.estimators.Estimator`]): of the gradient.
        phi (`torch.Tensor`): log-potential of all completions, `(N,)`, or `(P, N)` if it depends on the prompt.
        steps (`int`): of Adam, whose learning rate falls to 0.
        group_size (`int`, *optional*, defaults to `32`): completions of each prompt in a step.
        learning_rate (`float`, *optional*, defaults to `5e-3`): at the beginning.
        seed (`int`, *optional*, defaults to `0`): of what is drawn; the prior has the task's.
        evaluate_at (`Iterable[int]`, *optional*): steps after which the policy is kept; the last always is.
        hidden_size (`int`, *optional*, defaults to `32`): of prior and policy.
    """
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(folder, task.letters, task.seed, hidden_size=hidden_size, logit_std=task.logit_std)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    partition, keys = Running(), torch.arange(len(task.prompts))
    wanted, kept = {*evaluate_at, steps}, []
    log_prior = torch.empty(0)
    for step in range(steps + 1):
        log_policy = all_log_probs(model, task, tokenizer)  # (P, N)
        if step == 0:
            log_prior = log_policy.detach()
        if step in wanted:
            kept.append(log_policy.detach())
        if step == steps:
            break
        drawn = torch.multinomial(log_policy.detach().exp(), group_size, replacement=True, generator=generator)
        chosen = log_policy.gather(1, drawn)  # (P, G)
        now = chosen.detach()
        prior = log_prior.gather(1, drawn) if estimator.has_posterior else torch.zeros_like(now)
        group = Group(now, now, prior, phi.expand_as(log_prior).gather(1, drawn), keys)
        terms = estimator.terms(group, partition.log_z(group))
        partition.update(group)
        loss, _ = estimator.loss(chosen.flatten(), Terms(*(each.flatten() for each in terms)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as the trainers' default
        optimizer.step()
        schedule.step()
    return Descent(log_prior, tuple(sorted(wanted)), torch.stack(kept))
