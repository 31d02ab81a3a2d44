"""Moments: lambda on prior samples, and the exact moments of the posterior that it gives."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_bayes.targets import Constraint, LogSigmoidCentered, Moments, PriorScores, Product, Target, Tempered, Tilt


INF, NAN = math.inf, math.nan


def exact_moments(target: Target, enumerated: Any, rewards: Tensor) -> Tensor:
    """`E_x E_p[f]` over all completions, `(K,)`."""
    moments = []
    for prompt, log_prior in enumerate(enumerated.log_prior):
        phi = target(rewards, enumerated.context(prompt))
        posterior = (log_prior + phi).softmax(dim=0)
        moments.append(posterior @ rewards.double().nan_to_num())
    return torch.stack(moments).mean(dim=0)


def scores(rewards: list[list[list[float]]]) -> PriorScores:
    """Prior scores of a few prompts, written out: `(P, N, K)`."""
    tensor = torch.tensor(rewards)
    return PriorScores(tensor, torch.zeros(tensor.shape[:2]), torch.arange(len(tensor)))


def fitted(mu: dict[str, float], prior: PriorScores) -> Moments:
    moments = Moments(mu)
    moments.bind(list(mu))
    moments.fit(prior)
    return moments


# -------------------------------------------------------------------------------------------------------------------
# The fit


def test_two_features_reach_their_moments_exactly(enumerated: Any) -> None:
    """Prior rates 0.08 and 0.36, asked for one half each; 2,000 samples a prompt."""
    rewards = torch.stack([enumerated.feature("b", place=3), enumerated.feature("e")], dim=1)
    prior = enumerated.log_prior.exp().mean(dim=0) @ rewards.double()
    assert prior.tolist() == pytest.approx([0.077, 0.365], abs=1e-3)
    for seed in range(3):
        moments = fitted({"last_b": 0.5, "has_e": 0.5}, enumerated.sample(rewards, 2000, seed))
        assert exact_moments(moments, enumerated, rewards).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
        achieved = moments.diagnostics()
        assert [achieved["moments/last_b"], achieved["moments/has_e"]] == pytest.approx([0.5, 0.5], abs=1e-7)
        assert achieved["moments/last_b/before"] == pytest.approx(0.077, abs=0.02)
        assert 0.1 < achieved["moments/ess"] < 0.5
        assert achieved["moments/effective_samples"] == pytest.approx(8000 * achieved["moments/ess"], rel=1e-6)


def test_one_binary_feature_has_its_closed_form() -> None:
    """`lambda = logit(mu) - logit(rate)` for one prompt."""
    prior = scores([[[1.0]] * 300 + [[0.0]] * 700])
    moments = fitted({"f": 0.6}, prior)
    expected = math.log(0.6 / 0.4) - math.log(0.3 / 0.7)
    assert moments.diagnostics()["moments/f/lambda"] == pytest.approx(expected, abs=1e-7)
    phi = moments.log_potential(torch.tensor([[1.0], [0.0]]))
    assert phi.tolist() == pytest.approx([0.4 * expected, -0.6 * expected], abs=1e-5)


def test_real_features_and_the_prior_s_own_moments(enumerated: Any) -> None:
    """Asked for what the prior has, nothing changes; a real feature of another scale moves to where it should."""
    generator = torch.Generator().manual_seed(0)
    length = (enumerated.ids != enumerated.ids.max()).sum(dim=1).float()
    rewards = torch.stack([1000 * length + 5000, torch.randn(len(length), generator=generator)], dim=1)
    own = (enumerated.log_prior.exp().mean(dim=0) @ rewards.double()).tolist()
    prior = enumerated.sample(rewards, 2000, seed=1)
    same = fitted(dict(zip(["length", "noise"], own, strict=True)), prior)
    assert (same.log_potential(rewards).abs() < 0.15).all()
    moved = fitted({"length": 8500.0, "noise": 0.5}, prior)
    assert exact_moments(moved, enumerated, rewards).tolist() == pytest.approx([8500.0, 0.5], rel=0.03, abs=0.03)


def test_all_prompts_weigh_the_same() -> None:
    """Not by their Z: the mean over prompts of the moment of each is mu, though their evidence differs a lot."""
    prior = scores([[[1.0]] * 50 + [[0.0]] * 950, [[1.0]] * 900 + [[0.0]] * 100])
    moments = fitted({"f": 0.7}, prior)
    of_each = [
        (prior.log_potential(moments)[i].softmax(dim=0) * prior.rewards[i, :, 0]).sum().item() for i in range(2)
    ]
    assert of_each[0] < 0.5 < of_each[1]
    assert sum(of_each) / 2 == pytest.approx(0.7, abs=1e-6)


def test_prompts_of_the_evaluation_do_not_move_the_target() -> None:
    """Fitted on the two prompts of the training data, mu = .5 is .500 there, whatever else is evaluated on."""
    rates = [300, 200, 990, 980]  # of 1,000 prior samples: two prompts to train on and two to evaluate on
    prior = scores([[[1.0]] * rate + [[0.0]] * (1000 - rate) for rate in rates])
    moments = fitted({"f": 0.5}, replace(prior, multiplicity=torch.tensor([1, 1, 0, 0])))
    alone = fitted({"f": 0.5}, scores([[[1.0]] * rate + [[0.0]] * (1000 - rate) for rate in rates[:2]]))
    assert moments.diagnostics() == alone.diagnostics()
    assert moments.state_dict()["lambda"].tolist() == alone.state_dict()["lambda"].tolist()
    weights = prior.log_potential(moments).softmax(dim=1)
    of_each = (weights * prior.rewards[..., 0]).sum(dim=1)
    assert of_each[:2].mean().item() == pytest.approx(0.5, abs=1e-6)
    together = fitted({"f": 0.5}, prior)  # what it would be with them
    weights = prior.log_potential(together).softmax(dim=1)
    assert (weights * prior.rewards[..., 0]).sum(dim=1)[:2].mean().item() < 0.2


def test_a_prompt_counts_as_often_as_it_occurs() -> None:
    """Twice in the data is as two prompts with the same samples."""
    rows = [[[1.0]] * 100 + [[0.0]] * 900, [[1.0]] * 600 + [[0.0]] * 400]
    twice = fitted({"f": 0.5}, replace(scores(rows), multiplicity=torch.tensor([2, 1])))
    written_out = fitted({"f": 0.5}, scores([rows[0], rows[0], rows[1]]))
    once = fitted({"f": 0.5}, scores(rows))
    lambdas = [each.diagnostics()["moments/f/lambda"] for each in (twice, written_out, once)]
    assert lambdas[0] == pytest.approx(lambdas[1], abs=1e-7)
    assert abs(lambdas[0] - lambdas[2]) > 0.1
    for name in ("moments/f", "moments/f/before", "moments/ess"):
        assert twice.diagnostics()[name] == pytest.approx(written_out.diagnostics()[name], abs=1e-7)


def test_the_evaluation_does_not_make_a_moment_reachable() -> None:
    """What cannot be reached on the training data is refused, although it can on the prompts of the evaluation."""
    prior = scores([[[0.0]] * 100, [[0.0]] * 50 + [[1.0]] * 50])
    with pytest.raises(ValueError, match="The feature 'f' never varies among the prior samples of a prompt"):
        fitted({"f": 0.5}, replace(prior, multiplicity=torch.tensor([1, 0])))


def test_in_a_product_the_evaluation_does_not_count_either() -> None:
    rows = [[1.0, 1.0]] * 100 + [[0.0, 1.0]] * 300
    product = Product([Constraint("valid"), Product([Moments({"f": 0.5}), LogSigmoidCentered("valid")])])
    product.bind(["f", "valid"])
    prior = scores([rows, [[1.0, 1.0]] * 300 + [[0.0, 1.0]] * 100])
    product.fit(replace(prior, multiplicity=torch.tensor([3, 0])))
    assert product.diagnostics()["moments/f/lambda"] == pytest.approx(math.log(3), abs=1e-7)
    phi = prior.log_potential(product)  # the factor that learns of each prompt knows that of the evaluation
    assert phi.isfinite().all()


def test_a_feature_and_its_complement() -> None:
    """lambda is not unique, p is."""
    rows = [[1.0, 0.0]] * 300 + [[0.0, 1.0]] * 700
    both = fitted({"f": 0.6, "not_f": 0.4}, scores([rows]))
    alone = fitted({"f": 0.6}, scores([[row[:1] for row in rows]]))
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(both.log_potential(rewards), alone.log_potential(rewards[:, :1]))


def test_a_feature_that_does_not_apply_is_neutral() -> None:
    """The moment is that of the completions to which it applies, and the others keep their probability."""
    mixed = [[1.0, 2.0]] * 300 + [[0.0, 2.0]] * 700 + [[NAN, 2.0]] * 500 + [[NAN, 1.0]] * 500
    prior = scores([mixed, [[1.0, 1.0]] * 1800 + [[0.0, 1.0]] * 200])
    target = Product([Moments({"f": 0.6}), Tilt(1.0, rewards="g")])
    target.bind(["f", "g"])
    target.fit(prior)
    weights = prior.log_potential(target).softmax(dim=1)
    f = prior.rewards[..., 0]
    share = weights[~f.isnan()].sum().item()
    assert (weights * f.nan_to_num()).sum().item() / share == pytest.approx(0.6, abs=1e-5)
    moments = target.factors[0]
    phi = moments(torch.tensor([[NAN, 1.0], [1.0, NAN]]))
    assert phi.isnan().tolist() == [True, False]


def test_the_prior_to_a_power_does_not_score_a_completion() -> None:
    """Beside `Tempered`, samples without a feature are left out as before; its evidence does count for the others."""
    log_prior = torch.cat([torch.full((400,), -1.0), torch.full((600,), -2.0)])
    f = torch.tensor([[1.0]] * 100 + [[0.0]] * 300 + [[1.0]] * 200 + [[NAN]] * 400)
    product = Product([Tempered(3.0), Moments({"f": 0.5})])
    product.bind(["f"])
    prior = PriorScores(f.unsqueeze(0), log_prior.unsqueeze(0), torch.tensor([0]))
    product.fit(prior)
    ones = 100 * math.exp(-2.0) + 200 * math.exp(-4.0)
    expected = math.log(300 * math.exp(-2.0) / ones)
    assert product.diagnostics()["moments/f/lambda"] == pytest.approx(expected, abs=1e-6)
    assert prior.log_potential(product).isnan().sum() == 400


def test_unscored_and_infinite_samples_are_left_out() -> None:
    rows = [[1.0]] * 300 + [[0.0]] * 700
    clean = fitted({"f": 0.6}, scores([rows]))
    dirty = fitted({"f": 0.6}, scores([rows + [[NAN]] * 50 + [[INF]] * 25 + [[-INF]] * 25]))
    assert dirty.diagnostics()["moments/f/lambda"] == pytest.approx(clean.diagnostics()["moments/f/lambda"])
    assert dirty.diagnostics()["moments/ess"] == pytest.approx(clean.diagnostics()["moments/ess"])


def test_extreme_but_reachable() -> None:
    prior = scores([[[1.0]] * 200 + [[0.0]] * 99_800])
    moments = fitted({"f": 0.9}, prior)
    assert moments.diagnostics()["moments/f"] == pytest.approx(0.9, abs=1e-7)
    huge = fitted({"f": 3e8}, scores([[[i * 1e6] for i in range(1000)]]))
    assert huge.diagnostics()["moments/f"] == pytest.approx(3e8, rel=1e-7)
    tail = (2001 / torch.arange(1, 2001)).pow(3).view(1, -1, 1)  # the mean rests on a few outliers
    outliers = fitted({"f": 2 * tail.mean().item()}, PriorScores(tail, tail[..., 0], torch.tensor([0])))
    assert outliers.diagnostics()["moments/f"] == pytest.approx(2 * tail.mean().item(), rel=1e-6)


def test_too_few_effective_samples_are_said() -> None:
    with pytest.warns(UserWarning, match=r"rest on 2 effective samples of the prior: draw more"):
        fitted({"f": 0.9}, scores([[[1.0]] * 2 + [[0.0]] * 1998]))


# -------------------------------------------------------------------------------------------------------------------
# With other evidence


def test_moments_hold_for_the_whole_product(enumerated: Any) -> None:
    """70 % of the completions that satisfy the constraint, not of the prior's."""
    rewards = torch.stack([enumerated.feature("e"), enumerated.feature("a"), enumerated.feature("a", place=0)], dim=1)
    names = ["has_e", "has_a", "quality"]
    product = Product([Moments({"has_a": 0.7}), Constraint("has_e"), Tilt(0.8, rewards="quality")])
    product.bind(names)
    product.fit(enumerated.sample(rewards, 2000, seed=0))
    exact = exact_moments(product, enumerated, rewards).tolist()
    assert exact[0] == pytest.approx(1.0)
    assert exact[1] == pytest.approx(0.7, abs=0.02)
    alone = Moments({"has_a": 0.7})
    alone.bind(names)
    alone.fit(enumerated.sample(rewards, 2000, seed=0))
    careless = Product([alone, Constraint("has_e"), Tilt(0.8, rewards="quality")])
    careless.bind(names)
    assert abs(exact_moments(careless, enumerated, rewards)[1].item() - 0.7) > 0.05


def test_a_product_in_a_product() -> None:
    rows = [[1.0, 1.0]] * 100 + [[0.0, 1.0]] * 300 + [[1.0, 0.0]] * 300 + [[0.0, 0.0]] * 300
    names = ["f", "valid"]
    nested = Product([Constraint("valid"), Product([Moments({"f": 0.5})])])
    flat = Product([Constraint("valid"), Moments({"f": 0.5})])
    for product in (nested, flat):
        product.bind(names)
        assert not product.is_fitted
        product.fit(scores([rows]))
        assert product.is_fitted
    assert nested.diagnostics() == flat.diagnostics()
    assert nested.diagnostics()["moments/f/lambda"] == pytest.approx(math.log(3), abs=1e-7)


def test_a_prompt_without_evidence_is_left_out() -> None:
    rows = [[1.0, 1.0]] * 100 + [[0.0, 1.0]] * 300
    product = Product([Constraint("valid"), Moments({"f": 0.5})])
    product.bind(["f", "valid"])
    product.fit(scores([rows, [[1.0, 0.0]] * 400]))
    assert product.diagnostics()["moments/f/lambda"] == pytest.approx(math.log(3), abs=1e-7)


def test_no_prompt_has_evidence() -> None:
    product = Product([Constraint("valid"), Moments({"f": 0.5})])
    product.bind(["f", "valid"])
    with pytest.raises(ValueError, match="No sample of the prior has both a feature of Moments.* draw more prior sam"):
        product.fit(scores([[[1.0, 0.0], [0.0, 0.0]]]))


# -------------------------------------------------------------------------------------------------------------------
# What cannot be


@pytest.mark.parametrize("mu", [0.0, 1.0, 1.2, -0.1])
def test_out_of_reach_alone(mu: float) -> None:
    with pytest.raises(ValueError) as error:
        fitted({"g": 0.5, "f": mu}, scores([[[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]]))
    assert str(error.value) == (
        f"`Moments` cannot reach 'f' = {mu:.4g}: the prior samples allow means between 0 and 1, both excluded. Choose "
        "one in between, or draw more prior samples; for a feature that must always hold, use `Constraint`."
    )


def test_out_of_reach_over_all_prompts() -> None:
    """Each prompt varies between 0 and 1, but half of them never have the feature."""
    prior = scores([[[0.0]] * 100, [[0.0]] * 50 + [[1.0]] * 50])
    with pytest.raises(ValueError, match=r"cannot reach 'f' = 0\.6: the prior samples allow means between 0 and 0\.5"):
        fitted({"f": 0.6}, prior)


def test_a_feature_that_never_varies() -> None:
    """Neither within a prompt: what differs only between prompts cannot be changed by any policy."""
    for rows in ([[[0.0]] * 9] * 2, [[[0.0]] * 9, [[1.0]] * 9]):
        with pytest.raises(ValueError, match=r"The feature 'f' never varies among the prior samples of a prompt"):
            fitted({"f": 0.5}, scores(rows))


@pytest.mark.parametrize(
    ("rows", "mu"),
    [
        # c is a and b never together, and yet both 0.7
        ([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [0.7, 0.7]),
        # b implies a
        ([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], [0.3, 0.6]),
        # on the edge: only completions with exactly one of them are left
        ([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [0.4, 0.6]),
        ([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], [0.5, 0.5]),
        # complements that do not add up to one
        ([[1.0, 0.0], [0.0, 1.0]], [0.4, 0.4]),
    ],
)
def test_out_of_reach_together(rows: list[list[float]], mu: list[float]) -> None:
    """The third feature is free and must not be blamed."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.tensor(rows).repeat(200, 1)
    free = torch.randint(0, 2, (len(rewards), 1), generator=generator).float()
    prior = scores([torch.cat([rewards, free], dim=1).tolist()])
    with pytest.raises(ValueError) as error:
        fitted({"a": mu[0], "b": mu[1], "free": 0.6}, prior)
    assert str(error.value) == (
        f"`Moments` cannot reach 'a' = {mu[0]:.4g} and 'b' = {mu[1]:.4g} together: no weighting of the prior samples "
        "has these means. Choose moments that go together, or draw more prior samples."
    )


def test_unknown_feature() -> None:
    with pytest.raises(ValueError, match="Moments reads the reward 'femal', but the reward functions are"):
        Moments({"femal": 0.5}).bind(["female"])


@pytest.mark.parametrize("mu", [{}, None, 0.5, ["f"]])
def test_not_moments(mu: Any) -> None:
    with pytest.raises(ValueError, match="`Moments` needs a mapping of feature names to moments"):
        Moments(mu)


@pytest.mark.parametrize("value", [NAN, INF, None, "0.5", True])
def test_not_a_moment(value: Any) -> None:
    with pytest.raises(ValueError, match="`Moments` needs a finite number as the moment of 'f', got"):
        Moments({"f": value})


def test_used_before_the_fit() -> None:
    moments = Moments({"f": 0.5})
    moments.bind(["f"])
    with pytest.raises(ValueError, match=r"^Call `fit\(prior_scores\)` first: Moments learns from samples of the pr"):
        moments(torch.zeros(3, 1))


def test_two_moments_in_a_product() -> None:
    with pytest.raises(ValueError, match="give all moments to one `Moments`"):
        Product([Moments({"f": 0.5}), Product([Moments({"g": 0.5})])])


def test_state_and_settings() -> None:
    moments = fitted({"f": 0.6}, scores([[[1.0]] * 300 + [[0.0]] * 700]))
    assert repr(moments) == "Moments(mu={'f': 0.6})"
    assert not moments.hard
    restored = Moments({"f": 0.6})
    restored.bind(["f"])
    assert restored.state_dict() == {}
    assert restored.diagnostics() == {}
    restored.load_state_dict({})
    assert not restored.is_fitted
    restored.load_state_dict(moments.state_dict())
    assert restored.is_fitted
    assert restored.diagnostics() == moments.diagnostics()
    rewards = torch.rand(5, 1)
    assert torch.equal(restored(rewards), moments(rewards))
