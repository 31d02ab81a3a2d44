"""The model card names the posterior, the divergence and the latest estimates."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from trl_bayes import FDPGConfig, FDPGTrainer, KLRLConfig, KLRLTrainer
from trl_bayes.trainers.model_card import posterior_section, with_section


def test_section_shows_the_latest_entry_that_has_metrics() -> None:
    history = [
        {"step": 1, "reward": 0.1, "posterior/log_z": -2.0},
        {"step": 2, "reward": 0.25, "posterior/log_z": -1.5, "posterior/ess": 0.5},
        {"step": 2, "train_runtime": 3.0},
    ]
    section = posterior_section("Constraint(threshold=0.5)", "forward_kl", "running", history)
    assert "`Constraint(threshold=0.5)`" in section
    assert "At step 2" in section
    assert "| log Z, the log-evidence | -1.5 |" in section
    assert "| reward | 0.25 |" in section
    assert "KL(π‖p)" not in section  # was not logged


def test_section_without_any_training() -> None:
    assert "At step" not in posterior_section("Tilt(beta=0.1)", "reverse_kl", "running", [])


@pytest.mark.parametrize("card", ["# Card\n\n### Framework versions\n\n- TRL", "# Card of another template\n"])
def test_section_is_added_once_and_nothing_is_lost(card: str) -> None:
    whole = with_section(card, "### Posterior")
    assert whole.count("### Posterior") == 1
    for line in card.splitlines():
        assert line in whole
    assert whole.find("### Posterior") < (whole.find("### Framework versions") + 1 or len(whole))


@pytest.mark.parametrize("pure_rl", [False, True])
def test_saved_model_has_it(pure_rl: bool, tiny_models: Any, tmp_path: Path) -> None:
    trainer_class, config_class = (KLRLTrainer, KLRLConfig) if pure_rl else (FDPGTrainer, FDPGConfig)
    args = config_class(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        max_steps=1,
        logging_steps=1,
        beta=0.0 if pure_rl else 0.5,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
    )
    trainer = trainer_class(
        model=tiny_models.policy,
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["The sky is"] * 4}),
    )
    trainer.train()
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ("pure RL" if pure_rl else "`Tilt(beta=0.5)`") in card
    assert f"`{trainer.divergence.name}`" in card
    assert "At step 1" in card
    assert trainer._paper["title"] in card and "@software{vonwerra2020trl" in card
