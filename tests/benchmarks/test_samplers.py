"""Error against cost: the comparison itself, on counts whose distance is known, and on real draws of a tiny model."""

import json
import math
from pathlib import Path

import pytest
import torch

from trl_bayes import cli
from trl_bayes.benchmarks.samplers import (
    BETA,
    COLUMNS,
    Setting,
    Space,
    load_space,
    measure,
    noise_floor,
    settings,
    table,
    total_variation,
)
from trl_bayes.samplers import BestOfN, Importance, Rejection


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Space:
    return load_space(tmp_path_factory.mktemp("prior"))


def test_total_variation_by_hand() -> None:
    law = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]).double()
    counts = torch.tensor([[1, 1, 2], [2, 2, 4]]).double()
    assert total_variation(counts, law.log()) == pytest.approx((0.5 + 0.0) / 2)


def test_the_floor_is_that_of_exact_draws() -> None:
    """Four flips of a fair coin are off by 1/2, 1/4 or 0 with probabilities 1/8, 1/2 and 3/8."""
    floor, spread = noise_floor(torch.tensor([[0.5, 0.5]]).log(), [4], repetitions=4000)
    assert floor == pytest.approx(3 / 16, abs=4 * spread / math.sqrt(4000))
    assert spread == pytest.approx(math.sqrt(1 / 16 - (3 / 16) ** 2), rel=0.1)


def test_the_error_is_that_of_the_method(space: Space) -> None:
    """Exact draws are at the floor; the prior's and best-of-N's are as far off as their own laws are."""
    posterior = space.log_posterior.exp()
    log_prior = space.task.log_probs(space.prior, space.tokenizer)
    exact = measure(space, Setting("rejection", "", Rejection(space.max_log_potential)), 400)
    assert abs(exact.total_variation - exact.floor) < 4 * exact.floor_spread
    assert exact.num_draws == 800 and exact.generated_per_draw > 5
    prior = measure(space, Setting("prior", "", Importance()), 4000)
    distance = total_variation(log_prior.exp(), space.log_posterior)
    assert prior.total_variation == pytest.approx(distance, abs=2 * prior.floor) and prior.generated_per_draw == 1
    rewards = space.task.rewards(space.tokenizer)
    below = torch.stack([log_prior.exp()[:, rewards < r].sum(dim=1) for r in rewards], dim=1)
    ties = torch.stack([log_prior.exp()[:, rewards == r].sum(dim=1) for r in rewards], dim=1)
    law = log_prior.exp() * ((below + ties) ** 4 - below**4) / ties  # the best of four, at random among equals
    assert law.sum(dim=1).tolist() == pytest.approx([1, 1])
    best = measure(space, Setting("best of N", "", BestOfN(4)), 4000)
    assert best.total_variation == pytest.approx(((law - posterior).abs().sum(dim=1) / 2).mean().item(), abs=0.03)
    assert best.generated_per_draw == 4


def test_resampling_weighted_draws_comes_near_the_posterior(space: Space) -> None:
    prior = measure(space, Setting("prior", "", Importance()), 1000)
    resampled = measure(space, Setting("importance, resampled", "", Importance(), resample=20), 1000)
    assert resampled.num_draws == 2000 and resampled.generated_per_draw == 20
    assert resampled.total_variation < 1.5 * resampled.floor < prior.total_variation


def test_policies_whose_logits_are_mixed_are_near_the_posterior(space: Space) -> None:
    """By their own law, without weights; the policy of twice the temperature is farther if it is not realigned."""
    every = {(setting.family, setting.settings): setting for setting in settings(space.max_log_potential)}
    rows = {key: measure(space, every[key], 1500) for key in every if key[0] in ("prior", "realigned", "proxy")}
    prior, policy, realigned, proxy = (row.total_variation for row in rows.values())
    floor = next(iter(rows.values())).floor
    assert max(realigned, proxy) < 1.5 * floor < policy < prior


def test_every_method_has_its_rows_and_the_table_its_columns(space: Space) -> None:
    every = settings(space.max_log_potential)
    assert space.max_log_potential == 4 / BETA
    names = {setting.method.name for setting in every}
    assert names == {"prior", "best_of_n", "rejection", "quasi_rejection", "mcmc", "smc", "realigned", "proxy"}
    assert len({(setting.family, setting.settings) for setting in every}) == len(every)
    lines = table([measure(space, every[0], 3)]).splitlines()
    assert len(lines) == 3 and all(line.count("|") == len(COLUMNS) + 1 for line in lines)


def test_the_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A handful of draws by every setting: what is written is what is printed."""
    cli.main(["bench", "samplers", "--num_samples", "20", "--output_dir", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "samplers.json").read_text(), parse_constant=pytest.fail)["samplers"]
    rows = record["rows"]
    assert record["completions"] == 121 and record["seed"] == 0
    assert {row["family"] for row in rows} >= {"prior", "best of N", "rejection", "quasi-rejection", "MCMC, prefix"}
    for row in rows:
        assert 0 <= row["total_variation"] <= 1 and row["num_draws"] > 0
        assert row["tokens_per_draw"] >= row["generated_per_draw"] * 0.9 >= 0.9
    costs = [row["generated_per_draw"] for row in rows if row["family"] == "quasi-rejection"]
    assert costs == sorted(costs)
    markdown, printed = (tmp_path / "out" / "samplers.md").read_text(), capsys.readouterr().out
    assert markdown in printed and markdown.count("\n| ") == len(rows) + 2  # the heads, and the line under them
    for row in rows:
        assert f"| {row['family']} | {row['settings']} | {row['total_variation']:.3f} |" in markdown


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for flags, sentence in (
        (["--num_samples", "0"], "`num_samples` must be at least 1, got 0."),
        (["--seed", "-1"], "`seed` must be at least 0"),
        (["--output_dir", str(tmp_path / "file" / "x")], "Not a directory"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["bench", "samplers", *flags])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and sentence in error and "Traceback" not in error
