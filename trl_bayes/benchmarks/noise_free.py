"""The noise-free limit: what the same optimizer, schedule and number of steps reach on the exact gradient."""

import time
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import RLOOConfig, RLOOTrainer

from ..divergences import Divergence, get_divergence
from .enumeration import Completions, PolicyFit
from .exact_training import ExactProblem, ExactRun, default_arguments, ready_trainer
from .learning_curve import Point
from .trainings import TrainerSetup, TrainingRun


NAME = "noise-free"
"""Begins the method of a run without noise; the divergence follows."""


def divergence_of(setup: TrainerSetup) -> Divergence:
    """What a trainer minimizes: TRL's the reverse KL, ours what their configuration says."""
    if not setup.is_ours:
        return get_divergence("reverse_kl")
    config: Any = setup.config(output_dir="unused", use_cpu=True, bf16=False, **setup.settings)
    return cast(Divergence, config.make_divergence())


def limit_method(setup: TrainerSetup) -> str:
    """The name of the run without noise that a trainer is compared with."""
    return f"{NAME} {divergence_of(setup).name}"


def log_prob_table(model: nn.Module, prompt_ids: Tensor, completions: Completions, eos_token_id: int) -> Tensor:
    """
    `log pi(y|x)` of all completions of one prompt with its gradient, `(N,)`, in nats, from one forward pass.

    A completion that has ended needs no forward pass of its own: its tokens follow the prefixes of longer ones.

    Args:
        model (`nn.Module`): a causal language model.
        prompt_ids (`torch.Tensor`): the prompt's tokens, `(L,)`.
        completions ([`~trl_bayes.benchmarks.enumeration.Completions`]): `(N, T)`.
        eos_token_id (`int`): with which `completions` are padded.
    """
    ids, mask = completions
    inputs = ids[:, :-1]
    filler = int(ids[ids != eos_token_id][0])  # any letter: what comes after EOS is not looked at
    contexts, context_of = torch.unique(inputs.masked_fill(inputs == eos_token_id, filler), dim=0, return_inverse=True)
    rows = torch.cat([prompt_ids.expand(len(contexts), -1), contexts], dim=1)  # (U, L + T - 1)
    logits = model(input_ids=rows).logits[:, len(prompt_ids) - 1 :]  # (U, T, V)
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    per_token = log_probs[context_of.unsqueeze(1), torch.arange(ids.size(1), device=ids.device), ids]  # (N, T)
    return torch.where(mask, per_token, 0.0).sum(dim=1)


def exact_loss(log_policy: Tensor, log_posterior: Tensor, divergence: Divergence) -> Tensor:
    """
    A scalar whose gradient is that of `D_f(pi||p) / f''(1)`, which is `sum_y pi(y) f'(t(y)) grad log pi(y) / f''(1)`.

    Args:
        log_policy (`torch.Tensor`): `log pi` of all completions of a prompt, `(N,)`.
        log_posterior (`torch.Tensor`): `log p` of the same, `(N,)`.
        divergence ([`~trl_bayes.divergences.Divergence`]): `f`.
    """
    now = log_policy.detach()
    slope = divergence.slope(now - log_posterior)
    policy = now.exp()
    # The mean slope adds nothing to the gradient but rounding, which is all there is near the posterior
    slope = slope - (policy * slope).sum()
    return (policy * slope * log_policy).sum() / divergence.curvature


def train_without_noise(
    problem: ExactProblem, divergence: str, *, evaluate_at: Iterable[int] = (), **settings: Any
) -> ExactRun:
    """
    Trains on the exact gradient, every prompt at every step, from the problem's prior.

    Optimizer, schedule and clipping are those that the trainers get. On a hard constraint the reverse KL is infinite:
    what TRL's trainers minimize there is that of their tilt, see [`~trl_bayes.benchmarks.exact_training.trainers`].

    Args:
        problem ([`~trl_bayes.benchmarks.exact_training.ExactProblem`]): task, target and budget.
        divergence (`str`): its name.
        evaluate_at (`Iterable[int]`, *optional*): steps after which to record the fit; 0 is the start.
        settings: training arguments that differ from those of [`~trl_bayes.benchmarks.exact_training.train`].
    """
    task, minimized = problem.task, get_divergence(divergence)
    arguments = {**default_arguments(task), "beta": 0.1, **problem.settings, **settings}
    log_potential = problem.log_potential
    if problem.target.hard and not minimized.allows_hard_constraints:
        log_potential = lambda rewards: rewards / arguments["beta"]  # noqa: E731
    with ready_trainer(task, RLOOTrainer, RLOOConfig, arguments, reward_funcs=task.reward_func) as (
        trainer,
        tokenizer,
        log_prior,
    ):
        model, steps = cast(PreTrainedModel, trainer.model), int(trainer.args.max_steps)
        trainer.create_optimizer_and_scheduler(steps)
        device = next(model.parameters()).device
        prompts = [torch.tensor(ids, device=device) for ids in tokenizer(text=list(task.prompts))["input_ids"]]
        completions = Completions(*(each.to(device) for each in task.completions(tokenizer)))
        posteriors = [
            each._replace(log_posterior=each.log_posterior.to(device))
            for each in task.posteriors(tokenizer, log_prior, log_potential)
        ]

        def fit() -> PolicyFit:
            return task.evaluate(model, tokenizer, log_prior, problem.log_potential)

        curve, wanted, seconds, per_step = [], set(evaluate_at), 0.0, trainer.args.per_device_train_batch_size
        for step in range(steps + 1):
            if step in wanted:
                curve.append(Point(step * per_step, seconds, fit()))
            if step == steps:
                break
            start = time.perf_counter()
            for prompt, posterior in zip(prompts, posteriors, strict=True):
                table = log_prob_table(model, prompt, completions, tokenizer.eos_token_id)  # (N,)
                (exact_loss(table, posterior.log_posterior, minimized) / len(prompts)).backward()
            _update(trainer, model)
            seconds += time.perf_counter() - start
        return TrainingRun(problem.name, f"{NAME} {divergence}", 0, steps * per_step, seconds, fit(), tuple(curve))


def _update(trainer: Any, model: nn.Module) -> None:
    """What the Trainer does with a gradient: clip it, step, and move the learning rate."""
    nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    trainer.optimizer.zero_grad()
