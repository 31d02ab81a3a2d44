"""Replay: completions of earlier policies keep their own prompts and probabilities."""

from typing import Any

import pytest

from tests.helpers.trainers import having
from tests.trainers.drop_in.runs import G, Make, close, completions, learn, length_evidence, record, sequence_log_probs


@pytest.mark.parametrize("kind", having(lambda row: row.replays))
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"steps_per_generation": 2, "per_device_train_batch_size": G, "replay_ratio": 0.5},
        {"num_iterations": 2},
        {"partition": "running"},
    ],
    ids=str,
)
def test_replay(kind: str, config: dict[str, Any], make: Make) -> None:
    trainer = make(kind, {"replay_buffer_size": 2 * G, "max_steps": 6, **config})
    recorded = record(trainer)
    logs = [log for log in learn(trainer) if "reward" in log]
    fresh, ratio = 2 * G, trainer.args.replay_ratio
    assert len(recorded[0].batch["usable"]) == fresh
    assert len(recorded[-1].batch["usable"]) == fresh + ratio * fresh
    assert logs[-1]["posterior/replayed_frac"] == pytest.approx(ratio / (1 + ratio))
    batch, log_policy, _ = recorded[-1]
    earlier = recorded[-2].batch
    kept = {tuple(ids): i for i, ids in enumerate(completions(earlier))}
    log_prior = sequence_log_probs(trainer.ref_model, batch)
    close(batch["log_target"], log_prior + length_evidence(batch))  # the prompt of each is still its own
    close(batch["log_proposal"][:fresh], log_policy[:fresh])
    for i, ids in list(enumerate(completions(batch)))[fresh:]:
        source = kept[tuple(ids)]
        assert batch["log_proposal"][i] == earlier["log_proposal"][source]  # of the policy that sampled it
