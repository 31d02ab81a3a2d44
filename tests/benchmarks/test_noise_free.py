"""The noise-free limit: its table of log-probabilities, its gradient, and its first step."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bayes.benchmarks.enumeration import exact_posterior
from trl_bayes.benchmarks.exact_training import problems, trainers
from trl_bayes.benchmarks.noise_free import exact_loss, limit_method, log_prob_table, train_without_noise
from trl_bayes.divergences import get_divergence


def test_the_table_is_that_of_scoring_each_completion(tmp_path: Path) -> None:
    task = problems()["letters"].task
    tokenizer = AutoTokenizer.from_pretrained(task.build_model(tmp_path.as_posix()))
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompts = tokenizer(text=list(task.prompts))["input_ids"]
    with torch.no_grad():
        table = torch.stack(
            [
                log_prob_table(model, torch.tensor(ids), task.completions(tokenizer), tokenizer.eos_token_id)
                for ids in prompts
            ]
        )
    torch.testing.assert_close(table, task.log_probs(model, tokenizer), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "squared_hellinger"])
def test_the_gradient_is_that_of_the_divergence(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, log_prior, phi = torch.randn(3, 9, dtype=torch.float64, generator=generator)
    posterior, divergence = exact_posterior(log_prior.log_softmax(0), phi), get_divergence(name)
    logits.requires_grad_()
    (ours,) = torch.autograd.grad(exact_loss(logits.log_softmax(0), posterior.log_posterior, divergence), logits)
    log_policy = logits.log_softmax(0)
    value = (posterior.log_posterior.exp() * divergence.f(log_policy - posterior.log_posterior)).sum()
    (exact,) = torch.autograd.grad(value / divergence.curvature, logits)
    torch.testing.assert_close(ours, exact)


def test_a_few_steps_without_noise() -> None:
    """Nothing is drawn: twice the same, and closer to the posterior after each step."""
    torch.set_num_threads(1)
    runs = [
        train_without_noise(problems()["letters"], "forward_kl", evaluate_at=[0, 1, 3], max_steps=3) for _ in range(2)
    ]
    start, first, last = (point.value.forward_kl for point in runs[0].curve)
    assert start == pytest.approx(0.941, abs=1e-3) and start > first > last
    assert runs[0].final == runs[1].final == runs[0].curve[-1].value and runs[0].samples == 3 * 256


def test_the_limit_of_a_trainer_is_of_its_own_divergence() -> None:
    names = {setup.name: limit_method(setup) for setup in trainers(problems()["letters"])}
    assert names["TRL GRPOTrainer"] == names["KLRLTrainer"] == "noise-free reverse_kl"
    assert names["TrajectoryBalanceTrainer"] == "noise-free reverse_kl"
    assert names["DPGTrainer"] == "noise-free forward_kl"
    assert names["FDPGTrainer jensen_shannon"] == "noise-free jensen_shannon"
