"""Calibrated targets: the oracle by the formulas and by enumeration. Training is tested with the trainers."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bayes import cli
from trl_bayes.benchmarks.calibrated import exact_posterior_rates, formula, laws, ranked_task


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* has no closed form:UserWarning")  # a tiny prior repeats itself
def test_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One update a law: what is written and printed; that training gets there is tested with the trainers."""
    cli.main(["bench", "calibrated", "--max_steps", "1", "--output_dir", str(tmp_path)])
    table = (tmp_path / "oracle.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("| formula |") == table.count("| policy |") == 4
    records = json.loads((tmp_path / "oracle.json").read_text())["calibrated"]
    assert [record["law"] for record in records] == list(ORACLE)
    for record in records:
        assert record["formula"]["plain"] == pytest.approx(ORACLE[record["law"]][1], abs=0.001)


def test_a_section_that_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "calibrated", "--max_steps", "0"])
    assert "`max_steps=0` trains nothing: set it to 1 or more." in capsys.readouterr().err
