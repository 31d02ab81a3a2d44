"""One completion a prompt: compared with a log Z from samples of the prior, it trains as a group does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from trl_bayes import DPGConfig, DPGTrainer, FDPGConfig, FDPGTrainer, KLRLConfig, KLRLTrainer
from trl_bayes.benchmarks.exact_training import train_on
from trl_bayes.benchmarks.tiny import EnumerableTask


def count(texts: list[str]) -> list[float]:
    return [text.count("a") / 2 for text in texts]


TASK = EnumerableTask("abc", 3, ("a", "b c"), count, seed=0)


@pytest.mark.parametrize(
    ("trainer", "config"), [(KLRLTrainer, KLRLConfig), (FDPGTrainer, FDPGConfig), (DPGTrainer, DPGConfig)]
)
def test_it_comes_nearer_to_the_posterior(trainer: Any, config: Any) -> None:
    torch.set_num_threads(1)
    settings: dict[str, Any] = {
        "num_generations": 1,
        "partition": "prior_samples",
        "num_prior_samples": 256,
        "beta": 0.5,
        "per_device_train_batch_size": 129,  # any number, odd ones too
        "max_steps": 12,
        "learning_rate": 1e-2,
    }
    trained = train_on(TASK, trainer, config, **settings)
    log_target = trained.log_prior + trained.rewards[:, 0] / 0.5  # (P, N)
    log_posterior = log_target - log_target.logsumexp(dim=1, keepdim=True)
    before, after = (
        (log_posterior.exp() * (log_posterior - each)).sum(dim=1).mean().item()
        for each in (trained.log_prior, trained.log_policy)
    )
    assert trained.trainer.num_generations == trained.trainer.num_generations_eval == 1
    assert after < before / 4


@pytest.mark.parametrize("partition", ["prior_samples", "known"])
def test_its_configuration(tmp_path: Path, partition: str) -> None:
    settings: dict[str, Any] = {"output_dir": str(tmp_path), "partition": partition, "bf16": False, "use_cpu": True}
    args = KLRLConfig(num_generations=1, per_device_train_batch_size=5, **settings)
    assert type(args.num_generations) is int
    assert args.num_generations == 1
    assert args.num_generations_eval is None  # as many as in training
    assert KLRLConfig(num_generations=1, num_generations_eval=4, **settings).num_generations_eval == 4


def test_pure_rl_has_nothing_to_compare_it_with(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`num_generations=1` leaves a completion without siblings"):
        KLRLConfig(output_dir=str(tmp_path), num_generations=1, partition="prior_samples", beta=0.0)
