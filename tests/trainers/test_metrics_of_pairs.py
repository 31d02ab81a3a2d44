"""What XPO logs of its pairs, by hand."""

import pytest
import torch
from accelerate import Accelerator

from trl_bayes.estimators import PairTerms, PreferenceLoss
from trl_bayes.trainers.pairs import generation_metrics, loss_metrics


ACCELERATOR = Accelerator(cpu=True)
LOG_POLICY = torch.tensor([[-1.0, -4.0], [-2.0, -3.0], [-5.0, -1.0], [-1.0, -2.0]])  # the policy's, the prior's
LOG_PRIOR = torch.tensor([[-2.0, -3.0], [-2.0, -1.0], [-2.0, -2.0], [-3.0, -2.0]])


def test_of_a_micro_batch() -> None:
    """Chosen is what is preferred; a tie says nothing of accuracy, and a pair that nobody compared says nothing."""
    preference, usable = torch.tensor([1.0, 0.2, 0.5, 0.9]), torch.tensor([True, True, True, False])
    loss, parts = PreferenceLoss(beta=0.5), (torch.full((4,), 0.3), torch.full((4,), 0.1))
    found = loss_metrics(LOG_POLICY, PairTerms(LOG_PRIOR, preference, usable), parts, loss, ACCELERATOR)
    implicit = 0.5 * (LOG_POLICY - LOG_PRIOR)  # (.5, -.5), (0, -1), (-1.5, .5)
    assert implicit[:3].tolist() == [[0.5, -0.5], [0.0, -1.0], [-1.5, 0.5]]
    assert found == {
        "loss/dpo": pytest.approx(0.3),
        "loss/xpo": pytest.approx(0.1),
        "logps/chosen": pytest.approx((-1 - 3 - 5) / 3),
        "logps/rejected": pytest.approx((-4 - 2 - 1) / 3),
        "rewards/chosen": pytest.approx((0.5 - 1 - 1.5) / 3),
        "rewards/rejected": pytest.approx((-0.5 + 0 + 0.5) / 3),
        "rewards/margins": pytest.approx((1 - 1 - 2) / 3),
        "rewards/accuracies": pytest.approx(1 / 2),  # the first is right, the second is not, the third is a tie
    }


def test_of_a_generated_batch() -> None:
    """Distance and entropy are of the policy's own completions."""
    output = {
        "scores": torch.tensor([1.0, 0.0, 3.0, 1.0, torch.nan, 2.0, 0.0, 0.0]),
        "ended": torch.tensor([True, False, True, True, False, True, False, True]),
        "usable": torch.tensor([True, True, False, True]),
    }
    found = generation_metrics(output, LOG_POLICY - LOG_PRIOR, LOG_POLICY, ACCELERATOR)
    assert found["objective/kl"] == pytest.approx((1 + 0 - 3 + 2) / 4)
    assert found["objective/entropy"] == pytest.approx((1 + 2 + 5 + 1) / 4)
    assert found["objective/model_scores"] == pytest.approx((1 + 3 + 0) / 3)
    assert found["objective/ref_scores"] == pytest.approx((0 + 1 + 2 + 0) / 4)
    assert found["objective/scores_margin"] == pytest.approx((1 + 2 + 0) / 3)
    assert found["val/model_contain_eos_token"] == pytest.approx(2 / 4)
    assert found["val/ref_contain_eos_token"] == pytest.approx(3 / 4)
    assert found["pairs/judged_frac"] == pytest.approx(3 / 4)
