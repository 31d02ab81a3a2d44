"""Training on enumerable tasks: budgets, which trainers are on which problem, and one short run with its curve."""

import pytest
import torch

from trl_bayes.benchmarks.exact_training import preferring, problems, train, trainers


def test_budgets() -> None:
    known = problems()
    assert known["letters"].steps(20_480) == 80 and known["letters"].steps(10**9) == 400
    assert known["hard-20k"].steps(10**9) * 32 == 20_480 and known["hard-20k"].steps(64) == 2
    assert known["letters"].steps(1) == 1


def test_both_of_trls_trainers_are_on_every_problem() -> None:
    for problem in problems().values():
        names = [setup.name for setup in trainers(problem)]
        assert names[:2] == ["TRL GRPOTrainer", "TRL RLOOTrainer"] and len(set(names)) == len(names)
        assert ("KLRLTrainer" in names) is not problem.target.hard


@pytest.mark.parametrize(
    ("problem", "name"), [("letters", "DPGTrainer"), ("hard-20k", "TRL RLOOTrainer"), ("letters", "XPO, all pairs")]
)
def test_a_run_ends_where_its_curve_ends(problem: str, name: str) -> None:
    """Two steps: from the prior's own divergence, known by enumeration, towards the posterior."""
    torch.set_num_threads(1)
    chosen = problems()[problem]
    setup = next(setup for setup in [*trainers(chosen), *preferring(chosen)] if setup.name == name)
    fewer = {"num_prior_samples": 4} if "XPO" in name else {}
    run = train(chosen, setup, seed=1, evaluate_at=[0, 2], max_steps=2, **fewer)
    batch = 256 if problem == "letters" else 32
    assert [point.samples for point in run.curve] == [0, 2 * batch] and run.samples == 2 * batch
    start, end = (point.value for point in run.curve)
    prior = {"letters": 0.941, "hard-20k": 2.481}[problem]
    assert start.forward_kl == pytest.approx(prior, abs=1e-3) and start.kl_prior == pytest.approx(0, abs=1e-9)
    assert end == run.final and end.forward_kl < start.forward_kl - 0.05
    assert 0 < run.curve[1].seconds <= run.seconds
