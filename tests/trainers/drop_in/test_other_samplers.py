"""Completions from vLLM or from a rollout function: the proposal is the sampler's."""

from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from tests.trainers.drop_in.runs import BETA, PROMPTS, G, Make, close, learn, record


def test_vllm(kind: str, make: Make, fake_vllm: type) -> None:
    trainer = make(kind, {"use_vllm": True, "vllm_mode": "colocate"})
    recorded = record(trainer)
    sampled: list[list[list[float | None]]] = []
    generate = trainer.vllm_generation.generate

    def generate_and_record(*args: Any, **kwargs: Any) -> Any:
        result = generate(*args, **kwargs)
        sampled.append(trainer.vllm_generation.log_probs)
        return result

    trainer.vllm_generation.generate = generate_and_record
    logs = learn(trainer)
    assert trainer.vllm_generation.num_syncs == 2  # the sampler follows the policy
    for (batch, log_policy, _), log_probs in zip(recorded, sampled, strict=True):
        # The proposal is what the sampler said, not what the trainer would have said
        expected = torch.tensor([sum(x for x in row if x is not None) for row in log_probs])
        close(batch["log_proposal"][1:], expected[1:])
        lengths = batch["completion_mask"].sum(dim=1)
        close(batch["log_proposal"], log_policy + (lengths - (torch.arange(2 * G) == 0).int()) * fake_vllm.offset)
        assert batch["log_proposal"].isfinite().all()  # also where the sampler could not score a token
    assert "sampling/importance_sampling_ratio/mean" in logs[0]


def test_vllm_without_correction_still_weighs_by_the_sampler(make: Make, fake_vllm: type) -> None:
    trainer = make("dpg", {"use_vllm": True, "vllm_importance_sampling_correction": False})
    recorded = record(trainer)
    learn(trainer)
    batch, log_policy, _ = recorded[0]
    close((batch["log_proposal"] - log_policy)[1:], batch["completion_mask"].sum(dim=1)[1:] * fake_vllm.offset)


@pytest.mark.parametrize("with_log_probs", [True, False])
def test_rollout_function(with_log_probs: bool, kind: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        ids = [[65 + i, 66, 67, 68, 2][-(2 + i % 4) :] for i in range(len(prompts))]
        return {
            "prompt_ids": trainer._tokenizer(prompts)["input_ids"],
            "completion_ids": ids,
            "logprobs": [[-5.0] * len(row) for row in ids] if with_log_probs else None,
            "env_mask": [[1] * (len(row) - 1) + [0] for row in ids],  # the last token came from outside
            "grade": [i / 4 for i in range(len(ids))],
        }

    def grade_reward(completions: list, grade: list[float], **kwargs: Any) -> list[float]:
        return grade

    # It reports what it likes, which the check would refuse
    config = {"partition": "running", "max_steps": 4, "check_log_probs": not with_log_probs}
    trainer = make(kind, config, rollout_func=rollout, reward_funcs=grade_reward)
    recorded = record(trainer)
    learn(trainer)
    assert len(trainer.partition) == len(PROMPTS)  # the fields that it adds are no part of the prompt
    batch, log_policy, _ = recorded[0]
    own_tokens = batch["completion_mask"].sum(dim=1) - 1
    close(batch["log_proposal"], -5.0 * own_tokens if with_log_probs else log_policy)
    close(batch["log_target"], log_policy + torch.arange(2 * G) / 4 / BETA)


def test_the_check_of_a_rollout_function_says_what_it_must_return(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        tokens = trainer._tokenizer(prompts)["input_ids"]
        return {
            "prompt_ids": tokens,
            "completion_ids": [[65, 2]] * len(tokens),
            "logprobs": [[-1.0, -1.0]] * len(tokens),
        }

    trainer = make("dpg", {"check_log_probs": True}, rollout_func=rollout)
    refusal = "The `rollout_func`'s log-probabilities differ by .*: as `logprobs` it must return those of the tokens"
    with pytest.raises(ValueError, match=refusal):
        trainer.train()
