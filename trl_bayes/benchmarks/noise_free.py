"""The noise-free limit: what the same optimizer, schedule and number of steps reach on the exact gradient."""

import time
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import RLOOConfig, RLOOTrainer

from ..divergences import Divergence, get_divergence
from .enumeration import Completions, PolicyFit
from .exact_training import ExactProblem, ExactRun, Ready, default_arguments, ready_trainer
from .learning_curve import Point
from .tiny import EnumerableTask
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


class NoiseFree:
    """
    A training whose gradient is exact: every completion of every prompt at every step.

    Args:
        ready ([`~trl_bayes.benchmarks.exact_training.Ready`]): a trainer whose model, optimizer, schedule and clipping
            are used.
        task ([`~trl_bayes.benchmarks.tiny.EnumerableTask`]): prompts and prior.
        log_potential (`Callable`): rewards to phi.
        divergence ([`~trl_bayes.divergences.Divergence`]): that is minimized.
    """

    def __init__(
        self, ready: Ready, task: EnumerableTask, log_potential: Callable[[Tensor], Tensor], divergence: Divergence
    ):
        self.trainer, tokenizer, log_prior = ready
        self.model, self.divergence, self.step = cast(PreTrainedModel, self.trainer.model), divergence, 0
        self.trainer.create_optimizer_and_scheduler(int(self.trainer.args.max_steps))
        device = next(self.model.parameters()).device
        self._eos_token_id = tokenizer.eos_token_id
        self._prompts = [torch.tensor(ids, device=device) for ids in tokenizer(text=list(task.prompts))["input_ids"]]
        self._completions = Completions(*(each.to(device) for each in task.completions(tokenizer)))
        self.posteriors = [
            each._replace(log_posterior=each.log_posterior.to(device))
            for each in task.posteriors(tokenizer, log_prior, log_potential)
        ]

    def _backward(self, divergence: Divergence) -> None:
        for prompt, posterior in zip(self._prompts, self.posteriors, strict=True):
            table = log_prob_table(self.model, prompt, self._completions, self._eos_token_id)  # (N,)
            (exact_loss(table, posterior.log_posterior, divergence) / len(self._prompts)).backward()

    def advance(self) -> None:
        """One step, with what the Trainer does with a gradient: clip it, step, and move the learning rate."""
        self._backward(self.divergence)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.trainer.optimizer.step()
        self.trainer.lr_scheduler.step()
        self.trainer.optimizer.zero_grad()
        self.step += 1

    def gradient(self, divergence: str) -> Tensor:
        """The exact gradient of `D_f(pi||p) / f''(1)` where the policy is, of all parameters, `(D,)`."""
        self.trainer.optimizer.zero_grad()
        self._backward(get_divergence(divergence))
        found = torch.cat([weight.grad.flatten() for weight in self.model.parameters() if weight.grad is not None])
        self.trainer.optimizer.zero_grad()
        return found


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
    with ready_trainer(task, RLOOTrainer, RLOOConfig, arguments, reward_funcs=task.reward_func) as ready:
        training = NoiseFree(ready, task, log_potential, minimized)

        def fit() -> PolicyFit:
            return task.evaluate(training.model, ready.tokenizer, ready.log_prior, problem.log_potential)

        curve, wanted, seconds = [], set(evaluate_at), 0.0
        steps, per_step = int(ready.trainer.args.max_steps), ready.trainer.args.per_device_train_batch_size
        for step in range(steps + 1):
            if step in wanted:
                curve.append(Point(step * per_step, seconds, fit()))
            if step < steps:
                start = time.perf_counter()
                training.advance()
                seconds += time.perf_counter() - start
        return TrainingRun(problem.name, f"{NAME} {divergence}", 0, steps * per_step, seconds, fit(), tuple(curve))
