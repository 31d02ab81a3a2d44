"""Bad configurations and targets: each is refused before the first step, with one sentence that says what to set."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from tests.helpers.trainers import QUIET, TRAINERS, Row
from trl_bayes import (
    DPGConfig,
    DPGTrainer,
    FDPGConfig,
    FDPGTrainer,
    KLRLConfig,
    KLRLTrainer,
    TrajectoryBalanceConfig,
    TrajectoryBalanceTrainer,
    XPOTrainer,
)
from trl_bayes.benchmarks.tiny import build_tiny_model, letter_count_task
from trl_bayes.targets import Constraint, Product, Target, Tilt
from trl_bayes.trainers import warnings_of_users


TASK = letter_count_task()


@pytest.fixture(scope="module")
def model_path(letters_prior: str) -> str:
    return letters_prior


def configs(condition: Callable[[Row], bool]) -> list[Callable[..., Any]]:
    """Configurations of the trainers of which something is true."""
    return [row.config for row in TRAINERS.values() if condition(row)]


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 1,
        **QUIET,
        **settings,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_completion_length": None}, "`max_completion_length=None` is no length.* set the number of tokens"),
        ({"top_p": 0.9}, "`top_p=0.9` changes the distribution .* set it to 1.0"),
        ({"top_k": 50}, "`top_k=50` changes the distribution .* set it to 0"),
        ({"min_p": 0.1}, "`min_p=0.1` changes the distribution .* set it to 0.0"),
        ({"repetition_penalty": 1.1}, "`repetition_penalty=1.1` changes the distribution .* set it to 1.0"),
        ({"generation_kwargs": {"num_beams": 4}}, "`num_beams=4` in `generation_kwargs` changes .* set it to 1"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, "`no_repeat_ngram_size=2` in `generation_kwargs`"),
        ({"generation_kwargs": {"temperature": 0.5}}, "`temperature=0.5` in `generation_kwargs` .* leave it out"),
        ({"generation_kwargs": {"do_sample": False}}, "`do_sample=False` in `generation_kwargs` .* set it to True"),
        ({"generation_kwargs": {"eos_token_id": 0}}, "`eos_token_id=0` in `generation_kwargs` .* leave it out"),
        ({"generation_kwargs": {"allowed_token_ids": [1]}}, r"`allowed_token_ids=\[1\]` .* leave it out"),
        ({"generation_kwargs": {"structured_outputs": {"regex": "a"}}}, "`structured_outputs=.* leave it out"),
        ({"generation_kwargs": {"max_new_tokens": 2}}, "`max_new_tokens` in .* set `max_completion_length` instead"),
        ({"generation_kwargs": {"max_tokens": 2}}, "`max_tokens` in `generation_kwargs` cuts completions"),
        ({"generation_kwargs": {"stop": ["a"]}}, r"`stop=\['a'\]` in `generation_kwargs` .* leave it out"),
        ({"generation_kwargs": {"seed": 1}}, "`seed=1` in `generation_kwargs` .* leave it out"),
        (
            {"sync_ref_model": True, "prior_model_name_or_path": "x", "inexact_settings": "warn"},
            "`sync_ref_model=True` would overwrite the prior",
        ),
        ({"temperature": 0.0}, "`temperature=0.0` does not sample: set it above 0"),
        ({"scale_rewards": "group"}, "`scale_rewards='group'` .* set `scale_rewards='none'`"),
        ({"scale_rewards": True}, "`scale_rewards=True` .* set `scale_rewards='none'`"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "set 'sum_then_normalize'"),
        ({"mask_truncated_completions": True}, "`mask_truncated_completions=True` drops outcomes"),
        ({"sync_ref_model": True}, "`sync_ref_model=True` moves the prior"),
        ({"top_entropy_quantile": 0.2}, "`top_entropy_quantile=0.2` drops tokens"),
        ({"entropy_coef": 0.01}, "An entropy bonus moves the optimum"),
        ({"use_adaptive_entropy": True}, "An entropy bonus moves the optimum"),
        ({"off_policy_mask_threshold": 1.0}, "`off_policy_mask_threshold` drops completions"),
        ({"vllm_structured_outputs_regex": "a*"}, "`vllm_structured_outputs_regex` hides completions"),
        ({"num_generations": 1}, "`num_generations=1` leaves a completion without siblings"),
        ({"num_generations": 0, "partition": "prior_samples"}, "`num_generations=0` leaves a completion without"),
        ({"beta": -0.1}, "`beta=-0.1` is not a temperature"),
        ({"beta": float("nan")}, "`beta=nan` is not a temperature"),
        ({"partition": "exact"}, "Unknown `partition='exact'`: use one of"),
        ({"pseudo_reward_cap": 0.0}, "`pseudo_reward_cap=0.0` must be positive"),
    ],
)
@pytest.mark.parametrize("config", configs(lambda row: row.takes_target))
def test_config_refuses(config: type, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(**arguments(tmp_path, **settings))


@pytest.mark.parametrize("config", configs(lambda row: row.takes_target and not row.allows_pure_rl))
def test_zero_beta_is_for_pure_rl_only(config: type, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`beta=0` has no posterior .* use KLRLTrainer"):
        config(**arguments(tmp_path, beta=0.0))


@pytest.mark.parametrize("settings", [{"target": "constraint"}, {"prior_model_name_or_path": "x"}])
def test_pure_rl_has_neither_target_nor_prior(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`beta=0` is pure RL, which has neither"):
        KLRLConfig(**arguments(tmp_path, beta=0.0, **settings))


@pytest.mark.parametrize("config", configs(lambda row: row.chooses_divergence))
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "jensen_shanon"}, "Unknown divergence 'jensen_shanon' .did you mean 'jensen_shannon'"),
        ({"divergence": "alpha"}, "divergence='alpha' needs its exponent"),
        ({"divergence": "forward_kl", "alpha": 0.5}, "`alpha=0.5` has no meaning"),
    ],
)
def test_divergence_is_checked(config: type, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(**arguments(tmp_path, **settings))


@pytest.mark.parametrize("config", configs(lambda row: row.replays))
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replay_buffer_size": -1}, "`replay_buffer_size=-1` must not be negative"),
        ({"replay_buffer_size": 8, "replay_ratio": 0.0}, "`replay_ratio=0.0` must be positive"),
        ({"replay_buffer_size": 8, "replay_ratio": 2.0}, "holds fewer completions than the 16"),
    ],
)
def test_replay_is_checked(config: type, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(**arguments(tmp_path, **settings))


HARD = [Constraint(), Product([Tilt(0.5), Constraint()])]


@pytest.mark.parametrize("target", HARD, ids=["constraint", "product"])
@pytest.mark.parametrize(
    ("trainer", "config", "settings", "divergence"),
    [
        (KLRLTrainer, KLRLConfig, {}, "reverse_kl"),
        (FDPGTrainer, FDPGConfig, {"divergence": "reverse_kl"}, "reverse_kl"),
        (FDPGTrainer, FDPGConfig, {"divergence": "pearson_chi2"}, "pearson_chi2"),
        (FDPGTrainer, FDPGConfig, {"divergence": "alpha", "alpha": 1.5}, "alpha"),
        (TrajectoryBalanceTrainer, TrajectoryBalanceConfig, {}, "reverse_kl"),
    ],
)
def test_hard_constraint_needs_a_finite_divergence(
    trainer: type, config: type, settings: dict[str, Any], divergence: str, target: Target, tmp_path: Path
) -> None:
    # The model does not exist: the refusal comes before anything is loaded
    with pytest.raises(ValueError, match=f"no probability, and {divergence}.* is infinite .* use DPGTrainer"):
        trainer("no-such-model", TASK.reward_func, config(**arguments(tmp_path, **settings)), target=target)


def test_target_given_twice(tmp_path: Path) -> None:
    args = DPGConfig(**arguments(tmp_path, target="constraint"))
    with pytest.raises(ValueError, match="The target is given twice"):
        DPGTrainer("no-such-model", TASK.reward_func, args, target=Constraint())


def test_unknown_target(tmp_path: Path) -> None:
    args = DPGConfig(**arguments(tmp_path, target="constrain"))
    with pytest.raises(ValueError, match="Unknown target 'constrain' .did you mean 'constraint'"):
        DPGTrainer("no-such-model", TASK.reward_func, args)


def test_target_of_a_missing_reward(model_path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reads the reward 'compiles', but the reward functions are .'reward_func'."):
        DPGTrainer(
            model_path,
            TASK.reward_func,
            DPGConfig(**arguments(tmp_path)),
            TASK.dataset(8),
            target=Constraint(rewards="compiles"),
        )


def test_config_of_another_trainer(tmp_path: Path) -> None:
    args = GRPOConfig(**arguments(tmp_path))
    with pytest.raises(TypeError, match="`FDPGTrainer` takes a `FDPGConfig` as `args`, got `GRPOConfig`"):
        FDPGTrainer("no-such-model", TASK.reward_func, args)
    with pytest.raises(TypeError, match="`XPOTrainer` takes a `XPOConfig` as `args`, got `GRPOConfig`"):
        XPOTrainer("no-such-model", args=args, judge=lambda prompts, pairs: [0] * len(pairs))


def test_a_warning_of_a_package_whose_name_begins_like_ours_keeps_its_line() -> None:
    neighbor = str(Path(warnings_of_users.__file__).parents[1]) + "_rewards/mine.py"
    with pytest.warns(UserWarning, match="look") as caught:
        exec(compile("warn('look')", neighbor, "exec"), {"warn": warnings_of_users.warn})
    assert caught[0].filename == neighbor


def test_prior_with_another_vocabulary(model_path: str, tmp_path: Path) -> None:
    other = build_tiny_model(tmp_path / "other", letters="uvwxyz")  # as many tokens, with other meanings
    args = KLRLConfig(**arguments(tmp_path, prior_model_name_or_path=other))
    with pytest.raises(ValueError, match="tokenizer of the prior has another .* set `prior_model_name_or_path`"):
        KLRLTrainer(model_path, TASK.reward_func, args, TASK.dataset(8))


def test_prior_without_tokenizer_must_have_the_same_size(model_path: str, tmp_path: Path) -> None:
    other = build_tiny_model(tmp_path / "other", letters="abcdefghi")
    for file in Path(other).glob("tokenizer*"):
        file.unlink()
    args = KLRLConfig(**arguments(tmp_path, prior_model_name_or_path=other))
    with pytest.raises(ValueError, match="prior has a vocabulary of 10 tokens, the policy one of 7"):
        KLRLTrainer(model_path, TASK.reward_func, args, TASK.dataset(8))


def test_prior_that_ends_elsewhere(model_path: str, tmp_path: Path) -> None:
    """The policy would stop where the prior goes on, and evaluation would not: other outcomes, another posterior."""
    other = shutil.copytree(model_path, tmp_path / "other")
    prior = AutoModelForCausalLM.from_pretrained(other)
    end = prior.generation_config.eos_token_id
    prior.generation_config.eos_token_id = [end, 0]
    prior.save_pretrained(other)
    args = KLRLConfig(**arguments(tmp_path, prior_model_name_or_path=str(other)))
    message = rf"ends a completion at the tokens \[0, {end}\] and the policy at \[{end}\].*set the same `eos_token_id`"
    with pytest.raises(ValueError, match=message):
        KLRLTrainer(model_path, TASK.reward_func, args, TASK.dataset(8))
    policy = AutoModelForCausalLM.from_pretrained(model_path)
    policy.generation_config.eos_token_id = [0, end]
    assert KLRLTrainer(policy, TASK.reward_func, args, TASK.dataset(8)).eos_token_ids == [0, end]


def test_generation_config_of_the_model(model_path: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path)
    model.generation_config.no_repeat_ngram_size = 2
    args = KLRLConfig(**arguments(tmp_path))
    with pytest.raises(ValueError, match="generation_config has `no_repeat_ngram_size=2`.*set it to 0 in"):
        KLRLTrainer(model, TASK.reward_func, args, TASK.dataset(8))


def test_sampling_defaults_of_the_model_are_overridden_by_trl(model_path: str, tmp_path: Path) -> None:
    """Chat models ship `top_p`, `top_k` and more in their generation_config; TRL's own settings win."""
    model = AutoModelForCausalLM.from_pretrained(model_path)
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1, repetition_penalty=5.0)
    trainer = KLRLTrainer(model, TASK.reward_func, KLRLConfig(**arguments(tmp_path)), TASK.dataset(8))
    prompt_ids = trainer.processing_class(text=["a"] * 64)["input_ids"]
    completions, _ = trainer._generate_single_turn(prompt_ids, None, {}, 64)
    assert len({tuple(ids) for ids in completions}) > 16  # top_k=1 would leave a single one


class BadTarget(Target):
    """Returns what it is told to."""

    def __init__(self, phi: Any):
        super().__init__()
        self.phi = phi

    def log_potential(self, rewards: torch.Tensor) -> torch.Tensor:
        return self.phi(rewards) if callable(self.phi) else self.phi


@pytest.mark.parametrize(
    ("phi", "message"),
    [
        (lambda rewards: rewards, r"returned \(8, 1\) as log-potential: return one value per completion"),
        (lambda rewards: rewards[:3, 0], r"returned \(3,\) as log-potential"),
        (lambda rewards: rewards[:, 0].tolist(), "returned list as log-potential"),
        (lambda rewards: rewards[:, 0] + torch.inf, r"returned \+inf as log-potential"),
        (lambda rewards: rewards[:, 0] - torch.inf, "returned -inf as log-potential, where reverse_kl is infinite"),
    ],
)
def test_target_that_returns_nonsense(model_path: str, tmp_path: Path, phi: Any, message: str) -> None:
    args = KLRLConfig(**arguments(tmp_path))
    trainer = KLRLTrainer(model_path, TASK.reward_func, args, TASK.dataset(8), target=BadTarget(phi))
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())


def test_grpo_settings_without_effect_are_said(model_path: str, tmp_path: Path) -> None:
    args = KLRLConfig(**arguments(tmp_path, loss_type="grpo", epsilon_high=0.28))
    with pytest.warns(UserWarning, match="`loss_type` and `epsilon_high` have no effect"):
        KLRLTrainer(model_path, TASK.reward_func, args, TASK.dataset(8))
