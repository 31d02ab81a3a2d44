"""A reward model without a trainer gives the rewards that it gives in TRL's trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from trl_bayes.rewards.calling import call_rewards, reward_name
from trl_bayes.rewards.reward_model import RewardModel


PROMPTS = ["Say", "Say more, and then", "", "x"]
COMPLETIONS = [" a word", "", " several words of some length", " y"]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("conversational", [True, False])
def test_as_in_training(conversational: bool, think: bool, batch_size: int, tiny_models: Any, tmp_path: Path) -> None:
    template = {"enable_thinking": think}
    trainer = GRPOTrainer(
        tiny_models.policy,
        reward_funcs=tiny_models.reward,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            bf16=False,
            use_cpu=True,
            report_to="none",
            chat_template_kwargs=template,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"]}),
    )
    prompts: list[Any] = PROMPTS[:2] + PROMPTS[3:] if conversational else PROMPTS
    completions: list[Any] = COMPLETIONS[: len(prompts)]
    if conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        completions = [[{"role": "assistant", "content": completion}] for completion in completions]
    rows = [{"prompt": prompt} for prompt in prompts]
    expected = trainer._calculate_rewards(rows, prompts, completions, [[0]] * len(prompts))
    reward = RewardModel(tiny_models.reward, {"dtype": "float32"}, template, batch_size=batch_size)
    found = call_rewards([reward], prompts, completions, [[0]] * len(prompts))
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-6)
    assert found.std() > 1e-3
    assert reward_name(reward) == trainer.reward_func_names[0] == "reward"
