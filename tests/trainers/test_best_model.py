"""The checkpoint that is loaded at the end is the one nearest to the posterior."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from trl_bayes import CTRLConfig, DPGConfig, FDPGConfig, FDPGTrainer, KLRLConfig, TrajectoryBalanceConfig, XPOConfig
from trl_bayes.benchmarks.tiny import letter_count_task


HERE = {"output_dir": "out", "bf16": False, "use_cpu": True, "report_to": "none"}


@pytest.mark.parametrize("config_class", [KLRLConfig, FDPGConfig, DPGConfig, TrajectoryBalanceConfig, CTRLConfig])
@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("eval_posterior/forward_kl", False),
        ("posterior/reverse_kl", False),
        ("eval_held_out_posterior/kl_prior", False),
        ("eval_posterior/frac_no_evidence", False),
        ("kl", False),
        ("eval_held_out_kl", False),
        ("eval_posterior/ess", True),
        ("eval_posterior/log_z", True),
        ("eval_reward", True),
        ("eval_loss", False),
        (None, None),
    ],
)
def test_smaller_is_better_for_distances(config_class: type, metric: str | None, expected: bool | None) -> None:
    assert config_class(**HERE, metric_for_best_model=metric).greater_is_better is expected
    for own in (True, False):  # as the user says
        assert config_class(**HERE, metric_for_best_model=metric, greater_is_better=own).greater_is_better is own


@pytest.mark.parametrize("metric", ["eval_objective/kl", "eval_loss/dpo", "eval_posterior/reverse_kl", "eval_kl"])
def test_smaller_is_better_for_what_xpo_logs(metric: str) -> None:
    assert XPOConfig(**HERE, metric_for_best_model=metric).greater_is_better is False


def test_the_nearest_checkpoint_is_loaded(tmp_path: Path) -> None:
    """With a learning rate that overshoots, the distance is not that of the last checkpoint."""
    task = letter_count_task()
    data = Dataset.from_dict({"prompt": task.prompts * 2})
    args: dict[str, Any] = HERE | {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "num_generations": 8,
        "num_generations_eval": 16,
        "max_completion_length": task.max_completion_length,
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_posterior/forward_kl",
        "disable_tqdm": True,
    }
    trainer = FDPGTrainer(
        task.build_model(tmp_path / "prior"), task.reward_func, FDPGConfig(**args), data, data.select(range(4))
    )
    trainer.train()
    distances = {
        entry["step"]: entry["eval_posterior/forward_kl"]
        for entry in trainer.state.log_history
        if "eval_posterior/forward_kl" in entry
    }
    best = min(distances, key=distances.__getitem__)
    assert len(distances) == 6 and distances[best] < max(distances.values())
    assert str(trainer.state.best_model_checkpoint).endswith(f"checkpoint-{best}")
