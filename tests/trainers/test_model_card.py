"""What goes out with a model or a run: the card that names the posterior, to the hub too, and metrics to a tracker."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.trainers import QUIET, TRAINERS
from trl_bayes.trainers.model_card import posterior_section, with_section
from trl_bayes.trainers.posterior_trainer import PosteriorTrainer


def test_section_shows_the_latest_entry_that_has_metrics() -> None:
    history = [
        {"step": 1, "reward": 0.1, "posterior/log_z": -2.0},
        {"step": 2, "reward": 0.25, "posterior/log_z": -1.5, "posterior/ess": 0.5},
        {"step": 2, "train_runtime": 3.0},
    ]
    section = posterior_section("Constraint(threshold=0.5)", "forward_kl", "running", history)
    assert "`Constraint(threshold=0.5)`" in section
    assert "At step 2" in section
    assert "| log Z, the log marginal likelihood | -1.5 |" in section
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


def make_trainer(tiny_models: Any, folder: Path, pure_rl: bool = False, **settings: Any) -> PosteriorTrainer:
    row = TRAINERS["kl_rl" if pure_rl else "f_dpg"]
    defaults = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        max_steps=1,
        beta=0.0 if pure_rl else 0.5,
    )
    return row.trainer(
        model=tiny_models.policy,
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        args=row.config(**{**QUIET, **defaults, **settings}),
        train_dataset=Dataset.from_dict({"prompt": ["The sky is"] * 4}),
    )


@pytest.mark.parametrize("pure_rl", [False, True])
def test_saved_model_has_it(pure_rl: bool, tiny_models: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_models, tmp_path, pure_rl)
    trainer.train()
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ("pure RL" if pure_rl else "`Tilt(beta=0.5)`") in card
    assert f"`{trainer.estimator.divergence.name}`" in card
    assert "At step 1" in card
    assert f"a fine-tuned version of `{Path(trainer.model.config._name_or_path).name}`" in card
    assert trainer._paper["title"] in card and "@software{vonwerra2020trl" in card


class Hub:
    """What `huggingface_hub` would be asked for."""

    def __init__(self) -> None:
        self.created: list[str] = []
        self.uploads: list[set[str]] = []
        self.card = ""

    def create_repo(self, repo_id: str, **kwargs: Any) -> SimpleNamespace:
        self.created.append(repo_id)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: str, **kwargs: Any) -> str:
        assert repo_id == "me/parses"
        self.uploads.append({path.name for path in Path(folder_path).iterdir()})
        self.card = (Path(folder_path) / "README.md").read_text(encoding="utf-8")
        return "pushed"


def test_push_to_hub_takes_the_card_along(tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *args, **kwargs: hub)
    trainer = make_trainer(tiny_models, tmp_path, push_to_hub=True, hub_model_id="me/parses")
    trainer.train()
    assert trainer.push_to_hub(dataset_name="lines") == "pushed"
    assert hub.created == ["me/parses"]
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= hub.uploads[-1]
    assert "`Tilt(beta=0.5)`" in hub.card and "trl-bayes" in hub.card and "lines" in hub.card


def test_tensorboard_gets_the_posterior_metrics(
    tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(tiny_models, tmp_path, report_to="tensorboard", max_steps=2)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    logged = [entry["posterior/log_z"] for entry in trainer.state.log_history if "posterior/log_z" in entry]
    assert [event.step for event in events.Scalars("train/posterior/log_z")] == [1, 2]
    assert [event.value for event in events.Scalars("train/posterior/log_z")] == pytest.approx(logged, abs=1e-6)
