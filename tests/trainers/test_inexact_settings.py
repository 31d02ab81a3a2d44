"""Settings with which the fixed point is not the posterior: refused, or trained with under a warning that says so."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from tests.helpers.trainers import QUIET, TRAINERS
from trl_bayes import DPGConfig, DPGTrainer, KLRLConfig, KLRLTrainer
from trl_bayes.benchmarks.tiny import letter_count_task
from trl_bayes.trainers.posterior_trainer import PosteriorTrainer


TASK = letter_count_task()
# What scripts of GRPOTrainer have, and a part of the sentence that says where training goes with it
INEXACT: list[tuple[dict[str, Any], str]] = [
    ({"top_p": 0.95}, "With `top_p=0.95` the policy is corrected only where it is sampled"),
    ({"top_k": 5, "min_p": 0.1}, "With `top_k=5` and `min_p=0.1` the policy is corrected only"),
    ({"repetition_penalty": 1.1}, "`repetition_penalty=1.1`"),
    ({"generation_kwargs": {"typical_p": 0.9}}, r"`typical_p=0.9` in `generation_kwargs`"),
    ({"scale_rewards": "group"}, "`scale_rewards='group'`: It is not used"),
    ({"scale_rewards": "batch"}, "`scale_rewards='batch'`: It is not used"),
    ({"mask_truncated_completions": True}, "the posterior among completions that end"),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "It is not used"),
    ({"top_entropy_quantile": 0.5}, "`top_entropy_quantile=0.5`: It is not used"),
    ({"entropy_coef": 0.1}, "It is not used"),
    ({"off_policy_mask_threshold": 0.5}, "It is not used"),
    ({"neftune_noise_alpha": 5.0}, "log-probabilities are noisy"),
]
inexact = pytest.mark.parametrize(
    ("settings", "sentence"), INEXACT, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return TASK.build_model(tmp_path_factory.mktemp("model"))


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    defaults = {
        **QUIET,
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": TASK.max_completion_length,
        "learning_rate": 1e-3,
    }
    return {**defaults, **settings}


@inexact
@pytest.mark.parametrize("kind", ["kl_rl", "ctrl"])
def test_the_default_refuses(kind: str, settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="To train all the same, set `inexact_settings='warn'`.$") as refused:
        TRAINERS[kind].config(**arguments(tmp_path, **settings))
    for name in settings if "generation_kwargs" not in settings else settings["generation_kwargs"]:
        assert f"`{name}" in str(refused.value)  # all of them are named at once


def test_settings_of_several_kinds_are_named_at_once(tmp_path: Path) -> None:
    given = {"top_p": 0.95, "top_k": 50, "scale_rewards": True, "mask_truncated_completions": True}
    with pytest.raises(ValueError) as refused:
        KLRLConfig(**arguments(tmp_path, **given))
    assert all(f"`{name}=" in str(refused.value) for name in given)
    assert "`scale_rewards=True`" in str(refused.value)  # as the user wrote it


@inexact
def test_a_warning_and_a_mark_in_the_model_card(
    settings: dict[str, Any], sentence: str, model_path: str, tmp_path: Path
) -> None:
    args = DPGConfig(**arguments(tmp_path, inexact_settings="warn", check_log_probs=False, **settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = DPGTrainer(model_path, TASK.reward_func, args, TASK.dataset(16))
    (warning,) = [w for w in caught if issubclass(w.category, UserWarning) and sentence in str(w.message)]
    assert warning.filename == __file__
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "**Not exact.**" in card and sentence in card


def test_the_models_own_settings_are_marked_too(tmp_path: Path) -> None:
    folder = TASK.build_model(tmp_path / "model")
    from transformers import GenerationConfig

    GenerationConfig(no_repeat_ngram_size=2).save_pretrained(folder)
    args = DPGConfig(**arguments(tmp_path, inexact_settings="warn"))
    with pytest.warns(UserWarning, match="generation_config has `no_repeat_ngram_size=2`, with which the policy"):
        trainer = DPGTrainer(folder, TASK.reward_func, args, TASK.dataset(16))
    trainer.train()


def test_truncated_completions_that_are_masked_do_not_count(model_path: str, tmp_path: Path) -> None:
    args = DPGConfig(
        **arguments(tmp_path, inexact_settings="warn", mask_truncated_completions=True, max_completion_length=2)
    )
    with pytest.warns(UserWarning, match="completions that end"):
        trainer = DPGTrainer(model_path, TASK.reward_func, args, TASK.dataset(16))
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert 0 < log["posterior/frac_unscored"] == pytest.approx(log["completions/clipped_ratio"])


def test_an_unknown_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown `inexact_settings='ignore'`: use one of \['refuse', 'warn'\]"):
        KLRLConfig(**arguments(tmp_path, inexact_settings="ignore"))


# --- the sampler's log-probabilities ---------------------------------------------------------------------------------


def test_a_server_whose_log_probabilities_nobody_checks_is_refused(tmp_path: Path) -> None:
    server = {"use_vllm": True, "vllm_mode": "server", "temperature": 0.8}
    with pytest.raises(ValueError, match="start the server with `--logprobs-mode processed_logprobs`"):
        KLRLConfig(**arguments(tmp_path, check_log_probs=False, **server))
    KLRLConfig(**arguments(tmp_path, **server))
    KLRLConfig(**arguments(tmp_path, check_log_probs=False, **{**server, "temperature": 1.0}))


# --- continuous batching ---------------------------------------------------------------------------------------------


def test_generation_that_leaves_the_model_in_training_mode(model_path: str, tmp_path: Path) -> None:
    """As TRL's with continuous batching: evaluation must stay one, for metrics, log Z and replay."""
    args = DPGConfig(**arguments(tmp_path, replay_buffer_size=16, per_device_eval_batch_size=8))
    trainer = DPGTrainer(model_path, TASK.reward_func, args, TASK.dataset(16), TASK.dataset(8))
    generate = trainer._generate_single_turn

    def generate_and_train(*args: Any, **kwargs: Any) -> Any:
        generated = generate(*args, **kwargs)
        trainer.model.train()
        return generated

    trainer._generate_single_turn = generate_and_train  # type: ignore[method-assign]
    metrics = trainer.evaluate()
    assert {"eval_posterior/kl_prior", "eval_posterior/frac_infinite_reward", "eval_entropy"} <= metrics.keys()
    assert len(trainer.partition) == len(trainer.replay_buffer) == 0  # type: ignore[arg-type]
    assert not trainer._metrics["train"]
    trainer.train()
    assert len(trainer.replay_buffer) > 0  # type: ignore[arg-type]


# --- warnings and signatures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINERS)
def test_warnings_point_at_the_users_line(kind: str, model_path: str, tmp_path: Path) -> None:
    row = TRAINERS[kind]
    args = row.config(**arguments(tmp_path, epsilon=0.1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        row.trainer(model_path, TASK.reward_func, args, TASK.dataset(16))
    (warning,) = [w for w in caught if "no effect" in str(w.message)]
    assert (warning.filename, warning.lineno) == (__file__, line)
    assert str(warning.message).startswith("`epsilon` has no effect: the loss is the divergence to the posterior")


def test_warnings_of_trl_point_at_the_users_line(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialize = GRPOTrainer.__init__

    def initialize_and_warn(self: Any, *args: Any, **kwargs: Any) -> None:
        warnings.warn("an argument", FutureWarning, stacklevel=2)
        initialize(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "__init__", initialize_and_warn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        KLRLTrainer(model_path, TASK.reward_func, KLRLConfig(**arguments(tmp_path)), TASK.dataset(16))
    (warning,) = [w for w in caught if str(w.message) == "an argument"]
    assert warning.filename == __file__


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_signature_is_grpo_s_with_a_target(kind: str) -> None:
    row = TRAINERS[kind]
    ours = dict(inspect.signature(row.trainer).parameters)
    further = [ours.pop(name) for name in row.further]
    assert all(parameter.kind == inspect.Parameter.KEYWORD_ONLY for parameter in further)
    assert [*ours] == [*inspect.signature(GRPOTrainer).parameters, "target"]
    posterior = inspect.signature(PosteriorTrainer).parameters
    assert ours.keys() == posterior.keys()
    for name, parameter in posterior.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
        assert name == "args" or ours[name].annotation == parameter.annotation, name


def test_ctrl_takes_no_target(model_path: str, tmp_path: Path) -> None:
    row = TRAINERS["ctrl"]
    with pytest.raises(ValueError, match="CTRLTrainer makes its target from its configuration"):
        row.trainer(model_path, TASK.reward_func, row.config(**arguments(tmp_path)), TASK.dataset(8), target="tilt")


def test_kl_is_logged_as_grpo_does(model_path: str, tmp_path: Path) -> None:
    """A callback or dashboard that reads `kl` finds it: per token, of the prior, wherever there is one."""
    trainer = KLRLTrainer(
        model_path, TASK.reward_func, KLRLConfig(**arguments(tmp_path, learning_rate=0.05)), TASK.dataset(16)
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert logs[1]["kl"] > 1e-4
    with torch.no_grad():
        pure = KLRLTrainer(model_path, TASK.reward_func, KLRLConfig(**arguments(tmp_path, beta=0.0)), TASK.dataset(16))
    pure.train()
    assert all("kl" not in log for log in pure.state.log_history)
