"""The oracle table: win rates by enumeration, against sampling and the formulas. Training is tested elsewhere."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bayes import cli
from trl_bayes.benchmarks.calibrated_benchmark import (
    WinRates,
    exact_posterior_rates,
    formula,
    laws,
    ranked_task,
    sampled_win_rates,
    win_rates,
)


# InfAlign's oracle at KL 0.5 nats (win rates plain, best of 4, worst of 4), and the law of best-of-4
ORACLE = {
    "u": (0.5, 0.774, 0.800, 0.886),
    "exp(10u)": (0.5, 0.712, 0.872, 0.676),
    "-exp(-10u)": (0.5, 0.736, 0.686, 0.948),
    "best of 4": (math.log(4) - 3 / 4, 4 / 5, 16 / 20, 0.953),
}


@pytest.fixture(scope="module")
def enumerated(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, torch.Tensor]:
    task = ranked_task()
    path = task.build_model(tmp_path_factory.mktemp("prior"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    return task.log_probs(AutoModelForCausalLM.from_pretrained(path), tokenizer), task.rewards(tokenizer)


def test_rewards_are_as_good_as_continuous(enumerated: tuple[torch.Tensor, torch.Tensor]) -> None:
    log_prior, rewards = enumerated
    assert len(rewards.float().unique()) == len(rewards) == 1333
    assert log_prior[:, rewards > 0].exp().max() < 0.01
    assert log_prior.exp().max() < 0.04  # the empty completion


@pytest.mark.parametrize("law", laws(), ids=lambda law: law.name)
def test_exact_posteriors_and_formulas_give_the_oracle(
    law: object, enumerated: tuple[torch.Tensor, torch.Tensor]
) -> None:
    expected = ORACLE[law.name]  # type: ignore[attr-defined]
    assert formula(law) == pytest.approx(expected, abs=0.001)  # type: ignore[arg-type]
    assert exact_posterior_rates(law, *enumerated) == pytest.approx(expected, abs=0.005)  # type: ignore[arg-type]


def test_win_rates_against_sampling() -> None:
    """With ties, and 400,000 pairs: a standard error of 0.0008, and 5 of them."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.tensor([3.0, 1.0, 2.0, 2.0, 5.0])
    policy, prior = (torch.randn(5, generator=generator).log_softmax(0) for _ in range(2))
    exact = win_rates(policy, prior, rewards, n=3)
    ours, theirs = (
        rewards[p.exp().multinomial(1_200_000, replacement=True, generator=generator)].view(-1, 3)
        for p in (policy, prior)
    )
    for column, (a, b) in {
        "plain": (ours[:, 0], theirs[:, 0]),
        "best_of_n": (ours.amax(1), theirs.amax(1)),
        "worst_of_n": (ours.amin(1), theirs.amin(1)),
    }.items():
        sampled = ((a > b).double() + (a == b).double() / 2).mean().item()
        assert getattr(exact, column) == pytest.approx(sampled, abs=0.004)
    assert exact.kl_prior == pytest.approx((policy.exp() * (policy - prior)).sum().item())


def test_win_rates_of_samples() -> None:
    """40,000 samples for each of two prompts, with ties: a standard error of 0.002, and 4 of them; not of one size."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.tensor([[3.0, 1.0, 2.0, 2.0, 5.0], [0.0, 7.0, 7.0, -1.0, 2.0]])
    policy, prior = torch.randn(2, 2, 5, generator=generator).log_softmax(2)
    exact = [win_rates(*each) for each in zip(policy, prior, rewards, strict=True)]
    ours, theirs = (
        rewards.gather(1, p.exp().multinomial(count, replacement=True, generator=generator))
        for p, count in ((policy, 40_000), (prior, 50_000))
    )
    found = sampled_win_rates(ours, theirs)
    assert math.isnan(found.kl_prior)
    for column in ("plain", "best_of_n", "worst_of_n"):
        expected = sum(getattr(rates, column) for rates in exact) / 2
        assert getattr(found, column) == pytest.approx(expected, abs=0.008)


def test_the_prior_wins_half_of_the_time() -> None:
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    assert win_rates(prior, prior, torch.tensor([1.0, 1.0, 0.0, 7.0])) == pytest.approx(WinRates(0.0, 0.5, 0.5, 0.5))


def test_certain_win_and_certain_loss() -> None:
    prior = torch.tensor([1.0, 0.0, 0.0]).log()
    best, worst = torch.tensor([0.0, 1.0, 0.0]).log(), torch.tensor([0.0, 0.0, 1.0]).log()
    rewards = torch.tensor([0.0, 1.0, -1.0])
    assert win_rates(best, prior, rewards)[1:] == (1.0, 1.0, 1.0)
    assert win_rates(worst, prior, rewards)[1:] == (0.0, 0.0, 0.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* has no closed form:UserWarning")  # a tiny prior repeats itself
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One update a law: what is written and printed; that training gets there is tested with the trainers."""
    cli.main(["oracle-table", "--max_steps", "1", "--output_dir", str(tmp_path)])
    table = (tmp_path / "oracle.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("| formula |") == table.count("| policy |") == 4
    records = json.loads((tmp_path / "oracle.json").read_text())
    assert [record["law"] for record in records] == list(ORACLE)
    for record in records:
        assert record["formula"]["plain"] == pytest.approx(ORACLE[record["law"]][1], abs=0.001)


def test_command_that_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["oracle-table", "--max_steps", "0"])
    assert "`max_steps=0` trains nothing: set it to 1 or more." in capsys.readouterr().err
