"""How a trainer is made: arguments and settings are those of GRPOTrainer, but for those that are refused."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.trainers import TRAINERS
from tests.helpers.training import assert_same_weights, from_trl, length_reward
from tests.trainers.drop_in.runs import DEFAULTS, Make, learn, plain
from trl_bayes import (
    FDPGConfig,
    FDPGTrainer,
)


def test_three_arguments_are_enough(
    kind: str, tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the default output folder is made in the current one
    # The default, bfloat16, is refused on a machine without a GPU unless `use_cpu` is set
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    row = TRAINERS[kind]
    trainer = row.trainer(model=tiny_models.policy, reward_funcs=tiny_models.reward, train_dataset=plain())
    assert type(trainer.args) is row.config
    assert trainer.args.output_dir == f"policy-{row.trainer._name.replace(' ', '-')}"
    assert trainer.reward_func_names == ["reward"]
    assert trainer.ref_model is not None


def test_positional_arguments_are_those_of_grpo(make: Make, tiny_models: Any, tmp_path: Path) -> None:
    args = FDPGConfig(output_dir=str(tmp_path), **DEFAULTS)
    trainer = FDPGTrainer(tiny_models.policy, [length_reward], args, plain(), plain())
    learn(trainer)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 0.9),
        ("top_k", 10),
        ("min_p", 0.01),
        ("repetition_penalty", 1.1),
        ("generation_kwargs", {"num_beams": 2}),
        ("scale_rewards", "group"),
        ("scale_rewards", True),
        ("multi_objective_aggregation", "normalize_then_sum"),
        ("mask_truncated_completions", True),
        ("sync_ref_model", True),
        ("top_entropy_quantile", 0.2),
        ("entropy_coef", 0.01),
        ("off_policy_mask_threshold", 0.5),
    ],
)
def test_the_exceptions_are_refused_with_what_to_set(name: str, value: Any, tmp_path: Path) -> None:
    # These are all of GRPO's settings that are not drop-in: under each the fixed point would not be the posterior
    offending = "num_beams" if name == "generation_kwargs" else "entropy" if name == "entropy_coef" else name
    with pytest.raises(ValueError, match=offending):
        FDPGConfig(output_dir=str(tmp_path), **{**DEFAULTS, name: value})


@pytest.mark.parametrize("setting", [{"scale_rewards": False}, {"generation_kwargs": {"do_sample": True, "top_k": 0}}])
def test_exact_spellings_of_grpo_settings_are_accepted(setting: dict[str, Any], make: Make) -> None:
    learn(make("f_dpg", setting))


@from_trl
def test_grpo_losses_are_accepted_and_said_to_have_no_effect(make: Make) -> None:
    plain_run = make("kl_rl")
    learn(plain_run)
    with pytest.warns(UserWarning, match="loss_type.*epsilon.*importance_sampling_level"):
        grpo_script = make(
            "kl_rl", {"loss_type": "grpo", "epsilon": 0.1, "importance_sampling_level": "sequence", "delta": 2.0}
        )
    learn(grpo_script)
    assert_same_weights(plain_run, grpo_script)
