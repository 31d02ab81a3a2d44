"""`beta=0`: pure RL, without a prior."""

from typing import Any

import pytest

from tests.helpers.trainers import ANY_TARGET, TRAINERS
from tests.trainers.drop_in.runs import BETA, G, Make, close, learn, length_evidence, record, with_adapter


NEEDS_A_POSTERIOR = tuple(
    f"posterior/{name}" for name in ("log_z", "ess", "kl_prior", "reverse_kl", "forward_kl", "frac_no_evidence")
)


@pytest.mark.parametrize("adapter", ["none", "new", "trained"])
def test_beta_zero_is_pure_rl(adapter: str, make: Make, tiny_models: Any) -> None:
    trainer = make(
        "kl_rl", {"beta": 0.0, "max_steps": 3, "learning_rate": 1e-3}, **with_adapter(adapter, tiny_models.policy)
    )
    assert trainer.ref_model is None
    recorded = record(trainer)
    learn(trainer, without=("kl", *NEEDS_A_POSTERIOR))
    for batch, _, _ in recorded:
        assert "ref_per_token_logps" not in batch
        rewards = (length_evidence(batch) * BETA).view(-1, G)
        others = (rewards.sum(dim=1, keepdim=True) - rewards) / (G - 1)
        close(batch["advantages"], (rewards - others).flatten())  # REINFORCE with a leave-one-out baseline


@pytest.mark.parametrize("other", [name for name in ANY_TARGET if not TRAINERS[name].allows_pure_rl])
def test_beta_zero_is_refused_elsewhere(other: str, make: Make) -> None:
    with pytest.raises(ValueError, match="KLRLTrainer"):
        make(other, {"beta": 0.0})
