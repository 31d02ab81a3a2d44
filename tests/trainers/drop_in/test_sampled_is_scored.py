"""The distribution that is sampled is the one that is scored, however batches are made and used again."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.training import assert_same_weights
from tests.trainers.drop_in.runs import (
    DEFAULTS,
    SCORED,
    SGD,
    G,
    Make,
    close,
    learn,
    length_evidence,
    record,
    script,
    sequence_log_probs,
)
from trl_bayes import (
    TrajectoryBalanceConfig,
)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.5, "num_iterations": 2, "max_steps": 4},
        {"pad_to_multiple_of": 16},
        {"steps_per_generation": 2, "per_device_train_batch_size": G, "max_steps": 4},
        {"generation_batch_size": 4 * G, "per_device_train_batch_size": G, "max_steps": 4},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": G},
        {"num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["f_dpg", "tb"])
def test_terms_of_the_loss_match_a_plain_forward_pass(config: dict[str, Any], kind: str, make: Make) -> None:
    trainer = make(kind, config)
    recorded = record(trainer)
    learn(trainer)
    for batch, log_policy, _ in recorded:
        close(batch["log_proposal"], log_policy)
        log_prior = sequence_log_probs(trainer.ref_model, batch, trainer.temperature)
        close(batch["log_target"], log_prior + length_evidence(batch))
        assert batch["usable"].all()
        if multiple := trainer.pad_to_multiple_of:
            assert batch["prompt_ids"].size(1) % multiple == batch["completion_ids"].size(1) % multiple == 0
    generations_per_step = trainer.num_iterations * trainer.args.steps_per_generation
    steps = trainer.args.max_steps * trainer.args.gradient_accumulation_steps
    assert len(recorded) == steps // generations_per_step


def test_gradient_accumulation_is_the_same_update(kind: str, make: Make) -> None:
    # One batch of eight, and two micro-batches of four (TRL shuffles: any four) give the same gradient
    whole = make(kind, SGD)
    parts = make(kind, {**SGD, "per_device_train_batch_size": G, "gradient_accumulation_steps": 2})
    logs = learn(whole), learn(parts)
    assert_same_weights(whole, parts, atol=1e-6)
    for one, two in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3, abs=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
        assert one["posterior/ess"] == pytest.approx(two["posterior/ess"], rel=1e-3)


def test_padding_does_not_change_the_update(kind: str, make: Make) -> None:
    tight, padded = make(kind, SGD), make(kind, {**SGD, "pad_to_multiple_of": 32})
    for trainer in (tight, padded):
        script(trainer, SCORED * 2)
        learn(trainer)
    assert_same_weights(tight, padded, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "reuses"),
    [
        ({}, False),
        ({"gradient_accumulation_steps": 2}, False),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, False),
        ({"num_iterations": 2}, True),
        ({"steps_per_generation": 2}, True),
        ({"generation_batch_size": 4 * G}, True),
        ({"replay_buffer_size": 2 * G}, True),
    ],
    ids=str,
)
def test_trajectory_balance_knows_whether_the_policy_moves_under_its_samples(
    config: dict[str, Any], reuses: bool, tmp_path: Path
) -> None:
    # The fit of log Z to the policy that sampled goes stale as soon as that policy is updated, in whatever way
    args = TrajectoryBalanceConfig(output_dir=str(tmp_path), **{**DEFAULTS, **config})
    assert args.reuses_samples is reuses


@pytest.mark.parametrize("kind", ["kl_rl", "f_dpg"])
def test_reuse_of_completions_corrects_for_the_policy_that_moved(kind: str, make: Make) -> None:
    # Each completion is weighted by pi/q: at the second pass over a batch the policy is another one
    trainer = make(kind, {"num_iterations": 2, "max_steps": 2})
    seen: list[tuple[Any, torch.Tensor]] = []
    coefficient = trainer.estimator.coefficient

    def coefficient_and_record(sequences: Any) -> torch.Tensor:
        seen.append((sequences, coefficient(sequences)))
        return seen[-1][1]

    trainer.estimator.coefficient = coefficient_and_record
    learn(trainer)
    seen = seen[1:]  # the first is of whole groups, when they are generated
    ratios = [(sequences.log_policy - sequences.log_proposal).exp() for sequences, _ in seen]
    close(ratios[0], torch.ones_like(ratios[0]))
    assert (ratios[1] - 1).abs().max() > 1e-3
    for (sequences, actual), ratio in zip(seen, ratios, strict=True):
        log_t = sequences.log_policy - sequences.log_target + sequences.log_z
        # Z cancels in KL-RL's own formula: it is left out of both the pseudo-reward and the baseline
        slope = log_t - sequences.log_z if kind == "kl_rl" else trainer.estimator.divergence.slope(log_t)
        close(actual, ratio * (slope + sequences.baseline))


def test_cap_is_said_to_act(kind: str, make: Make) -> None:
    logs = learn(make(kind, {"pseudo_reward_cap": 1e-3}))
    assert all(log["posterior/capped_frac"] > 0.5 for log in logs)
