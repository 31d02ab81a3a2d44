"""Calibrated rewards: quantiles under the prior, the laws that their transforms give, and known Z."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_bayes.targets import (
    Calibrated,
    Context,
    PriorScores,
    Product,
    Tilt,
    Transform,
    best_of_n,
    beta_for_kl,
    calibrated_law,
    ctrl_best_of_n,
    ctrl_worst_of_n,
    identity,
    worst_of_n,
)


INF, NAN = math.inf, math.nan
M = 20_000  # completions of equal prior probability, each with a reward of its own
ORACLE = [
    # Phi, win rate at KL 0.5: plain, best-of-4, worst-of-4 (InfAlign, continuous reward)
    (identity(), 0.774, 0.800, 0.886),
    (ctrl_best_of_n(), 0.712, 0.872, 0.676),
    (ctrl_worst_of_n(), 0.736, 0.686, 0.948),
]


def calibrated(target: Calibrated, rewards: list[list[float]], keys: list[int] | None = None) -> Calibrated:
    """Fitted to prior rewards `(P, N)`."""
    tensor = torch.tensor(rewards).unsqueeze(2)
    keys = list(range(len(rewards))) if keys is None else keys
    target.fit(PriorScores(tensor, torch.zeros(tensor.shape[:2]), torch.tensor(keys)))
    return target


def of_prompt(key: int, num_completions: int) -> Context:
    return Context(torch.zeros(num_completions), torch.full((num_completions,), key))


def population(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rewards `(M,)` of a prompt's completions, far from uniform, and the quantile of each."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(M, generator=generator).double().exp().sort().values
    return rewards, (torch.arange(M) + 0.5) / M


def law_of(target: Calibrated, prior: Tensor, rewards: Tensor) -> Tensor:
    """The posterior over the population, `(M,)`, by Bayes' rule, with `n` prior samples `(n,)` to calibrate."""
    target.fit(PriorScores(prior.view(1, -1, 1), torch.zeros(1, len(prior)), torch.tensor([0])))
    return target(rewards.unsqueeze(1), of_prompt(0, M)).softmax(dim=0)


def win_rates(posterior: Tensor, n: int = 4) -> list[float]:
    """Against the prior: plain, and the best (worst) of n against its best (worst) of n, by enumeration."""
    below = posterior.cumsum(dim=0)
    u = (torch.arange(M, dtype=torch.float64) + 0.5) / M
    best = below.pow(n).diff(prepend=torch.zeros(1, dtype=torch.float64))
    worst = -(1 - below).clamp(min=0).pow(n).diff(prepend=torch.ones(1, dtype=torch.float64))
    return [(posterior @ u).item(), (best @ u.pow(n)).item(), (worst @ (1 - (1 - u).pow(n))).item()]


def kl_prior(posterior: Tensor) -> float:
    return (posterior * (posterior * M).log()).sum().item()


# -------------------------------------------------------------------------------------------------------------------
# u


def test_u_is_the_midrank_among_one_more() -> None:
    target = calibrated(Calibrated(identity(), beta=1.0), [[3.0, 1.0, 1.0, 2.0], [10.0, 20.0, 30.0, 40.0]], [9, 4])
    rewards = torch.tensor([[0.0], [1.0], [1.5], [3.0], [5.0], [25.0], [NAN]])
    keys = torch.tensor([9, 9, 9, 9, 9, 4, 4])
    u = target.calibrate(rewards, Context(torch.zeros(7), keys))
    assert u[:-1].tolist() == pytest.approx([0.1, 0.3, 0.5, 0.8, 0.9, 0.5])
    assert u[-1].isnan()
    phi = target(rewards, Context(torch.zeros(7), keys))
    assert phi.dtype == torch.float32
    assert phi.tolist() == pytest.approx(u.tolist(), nan_ok=True)


def test_u_of_a_fresh_sample_is_uniform() -> None:
    """Exactly: the rank of one more draw among n is uniform on n + 1 values, so the mean over all draws is 1/2."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.zeros(6)
    for _ in range(3000):
        draws = torch.randn(6, generator=generator)
        target = calibrated(Calibrated("identity", beta=1.0), [draws[:5].tolist()])
        u = target.calibrate(draws[5:].unsqueeze(1), of_prompt(0, 1))
        ranks[round(u.item() * 6 - 0.5)] += 1
    # chi-square with 5 degrees of freedom: 20.5 has probability 0.001 if u is uniform
    assert ((ranks - 500).square() / 500).sum() < 20.5


def test_log_u_is_finite_below_every_prior_sample() -> None:
    target = calibrated(Calibrated(best_of_n(4)), [[1.0] * 100])
    phi = target(torch.tensor([[-1e30], [1e30]]), of_prompt(0, 2))
    cells = [(1 / 101) ** 4, 1 - (100 / 101) ** 4]
    assert phi.tolist() == pytest.approx([math.log(cell * 101 / 4) for cell in cells])


def test_stretching_rewards_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    prior, new = torch.randn(2, 50, generator=generator), torch.randn(20, 1, generator=generator)
    plain = calibrated(Calibrated(best_of_n(4)), prior.tolist())
    stretched = calibrated(Calibrated(best_of_n(4)), (1000 * prior.exp() - 3).tolist())
    torch.testing.assert_close(plain(new, of_prompt(1, 20)), stretched(1000 * new.exp() - 3, of_prompt(1, 20)))


def test_the_weighted_sum_is_calibrated_and_ties_stay_ties() -> None:
    """A prior sample's rewards, seen again in a batch of another size, must tie with themselves."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(1, 64, 7, generator=generator)
    names = [f"r{k}" for k in range(8)]
    target = Calibrated("identity", beta=1.0, rewards=names[:7])
    target.bind(names, torch.rand(8, generator=generator))
    padded = torch.cat([rewards, torch.rand(1, 64, 1, generator=generator)], dim=2)
    target.fit(PriorScores(padded, torch.zeros(1, 64), torch.tensor([0])))
    expected = (target.weighted_sum(padded[0]).argsort().argsort().double() + 1) / 65
    for size in (1, 5, 64):
        u = target.calibrate(padded[0, :size], of_prompt(0, size))
        assert u.tolist() == pytest.approx(expected[:size].tolist())


def test_missing_rewards() -> None:
    """Prompts may have fewer scored samples, or none: then there is nothing to compare with, and u is 1/2."""
    target = calibrated(Calibrated("identity", beta=1.0), [[1.0, NAN, 3.0, INF], [NAN] * 4])
    u = target.calibrate(torch.tensor([[2.0], [5.0], [NAN]]), of_prompt(0, 3))
    assert u.tolist() == pytest.approx([0.5, 2.5 / 3, NAN], nan_ok=True)
    assert target.calibrate(torch.tensor([[2.0]]), of_prompt(1, 1)).tolist() == [0.5]
    assert target.log_z(torch.tensor([0, 1])).isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match="No sample of the prior has a reward: Calibrated has nothing to learn from"):
        calibrated(Calibrated("identity", beta=1.0), [[NAN, NAN]])


# -------------------------------------------------------------------------------------------------------------------
# The laws


@pytest.mark.parametrize(("transform", "plain", "best", "worst"), ORACLE)
def test_oracle_table_by_quadrature(transform: Transform, plain: float, best: float, worst: float) -> None:
    law = calibrated_law(transform, beta_for_kl(transform, 0.5))
    assert law.kl_prior == pytest.approx(0.5, abs=1e-9)
    assert [law.win_rate, law.best_of_n, law.worst_of_n] == pytest.approx([plain, best, worst], abs=6e-4)


@pytest.mark.parametrize(("transform", "plain", "best", "worst"), ORACLE)
def test_oracle_table_by_the_exact_posterior(transform: Transform, plain: float, best: float, worst: float) -> None:
    """The target itself, on 20,000 completions whose quantiles are known from as many prior samples."""
    rewards, _ = population()
    posterior = law_of(Calibrated(transform, beta_for_kl(transform, 0.5)), rewards, rewards)
    assert kl_prior(posterior) == pytest.approx(0.5, abs=0.005)
    assert win_rates(posterior) == pytest.approx([plain, best, worst], abs=0.005)


def test_best_of_4_from_2000_prior_samples() -> None:
    """KL = log 4 - 3/4 and win rate 4/5 within 5 %, and the law itself within 0.02 in total variation."""
    rewards, u = population()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        prior = rewards[torch.randint(M, (2000,), generator=generator)]
        posterior = law_of(Calibrated(best_of_n(4)), prior, rewards)
        assert kl_prior(posterior) == pytest.approx(math.log(4) - 0.75, rel=0.05)
        assert win_rates(posterior)[0] == pytest.approx(0.8, rel=0.05)
        assert (posterior - 4 * u.pow(3) / M).abs().sum() / 2 < 0.03


def test_best_and_worst_of_n_are_the_laws_of_their_names() -> None:
    rewards, u = population()
    for n in (2, 7):
        best = law_of(Calibrated(best_of_n(n)), rewards, rewards)
        worst = law_of(Calibrated(worst_of_n(n)), rewards, rewards)
        torch.testing.assert_close(best * M, n * u.double().pow(n - 1), atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(worst * M, n * (1 - u.double()).pow(n - 1), atol=2e-3, rtol=2e-3)


def test_tilting_towards_more_gives_more() -> None:
    for transform in (best_of_n(4), identity(), ctrl_best_of_n(), ctrl_worst_of_n()):
        kls = [calibrated_law(transform, beta_for_kl(transform, kl)).win_rate for kl in (0.01, 0.1, 1.0)]
        assert kls == sorted(kls)
        assert kls[0] > 0.5


# -------------------------------------------------------------------------------------------------------------------
# Known Z


@pytest.mark.parametrize(
    ("target", "z"),
    [
        (Calibrated(best_of_n(4)), 1 / 4),
        (Calibrated(worst_of_n(8)), 1 / 8),
        (Calibrated(best_of_n(4), beta=2.0), 2 / 3),
        (Calibrated(identity(), beta=0.3), 0.3 * (math.exp(1 / 0.3) - 1)),
    ],
)
def test_closed_forms(target: Calibrated, z: float) -> None:
    """Known from 100 samples to 1e-3, whatever the rewards are."""
    generator = torch.Generator().manual_seed(0)
    calibrated(target, torch.randn(3, 100, generator=generator).exp().tolist())
    log_z = target.log_z(torch.tensor([2, 0, 1]))
    assert log_z.exp().tolist() == pytest.approx([z] * 3, rel=1e-3)
    assert log_z[0] == log_z[1] == log_z[2]  # the same for all prompts
    assert target.diagnostics() == {"calibrated/tied_frac": 0.0}
    assert calibrated_law(target.transform, target.beta).log_z == pytest.approx(math.log(z), abs=1e-6)


def test_the_known_z_is_that_of_fresh_samples() -> None:
    """`E[exp phi]` over fresh completions of the prior, averaged over what prior samples happened to be drawn."""
    rewards, _ = population()
    for transform, beta in ((best_of_n(4), None), (ctrl_worst_of_n(), 0.0115), (ctrl_best_of_n(), 7012.0)):
        means = []
        for seed in range(200):
            generator = torch.Generator().manual_seed(seed)
            target = Calibrated(transform, beta)
            prior = rewards[torch.randperm(M, generator=generator)[:100]]
            calibrated(target, [prior.tolist()])
            phi = target(rewards[::7].float().unsqueeze(1), of_prompt(0, len(rewards[::7])))
            means.append(phi.double().exp().mean())
        mean, error = torch.stack(means).mean(), torch.stack(means).std() / math.sqrt(200)
        assert abs(mean - target.log_z(torch.tensor([0])).exp().item()) < 4 * error + 1e-3 * mean


@pytest.mark.parametrize("transform", [ctrl_best_of_n(), identity()], ids=repr)
def test_ties_are_estimated_and_said_once(transform: Transform, enumerated: Any) -> None:
    """A reward of few values under a transform that takes the middle rank: log Z is that of the exact posterior."""
    rewards = (2 * enumerated.feature("a") + enumerated.feature("b")).unsqueeze(1)
    target = Calibrated(transform, beta_for_kl(transform, 0.6))
    target.fit(enumerated.sample(rewards, 2000, seed=0))
    assert target.diagnostics() == {"calibrated/tied_frac": 1.0}
    with pytest.warns(UserWarning, match=r"^100\.0% of the prior samples share their reward .*: it is estimated from"):
        log_z = target.log_z(enumerated.keys)
    assert torch.equal(target.log_z(enumerated.keys.flip(0)), log_z.flip(0))  # and no second warning
    exact = exact_log_z(target, rewards, enumerated)
    assert log_z.tolist() == pytest.approx(exact, abs=0.05)
    continuous = calibrated_law(transform, target.beta).log_z
    assert max(abs(value - continuous) for value in exact) > 0.1


def exact_log_z(target: Calibrated, rewards: Tensor, enumerated: Any) -> list[float]:
    """Of each prompt, over all completions."""
    return [
        (log_prior + target(rewards, enumerated.context(i))).logsumexp(dim=0).item()
        for i, log_prior in enumerate(enumerated.log_prior)
    ]


# -------------------------------------------------------------------------------------------------------------------
# Best of N with ties


def test_best_of_16_of_a_reward_of_0_and_1() -> None:
    """Prior rate .05: the best of 16 is a success with probability `1 - .95^16 = .560`, the worst of 16 never is."""
    rewards = (torch.arange(M) >= 0.95 * M).double()
    best, worst = (law_of(Calibrated(kind(16)), rewards, rewards) for kind in (best_of_n, worst_of_n))
    assert best[rewards == 1].sum().item() == pytest.approx(1 - 0.95**16, abs=1e-3)
    assert best[rewards == 1].sum().item() == pytest.approx(0.560, abs=1e-3)
    assert worst[rewards == 1].sum().item() == pytest.approx(0.05**16, abs=1e-12)
    assert kl_prior(best) == pytest.approx(
        0.56 * math.log(0.56 / 0.05) + 0.44 * math.log(0.44 / 0.95), abs=2e-3
    )  # and not log 16 - 15/16 = 1.835, which a continuous reward has


@pytest.mark.parametrize("kind", [best_of_n, worst_of_n])
@pytest.mark.parametrize("n", [2, 4, 16])
def test_best_and_worst_of_n_with_ties_by_enumeration(kind: Callable[[int], Transform], n: int) -> None:
    """Each class of ties has the probability that the best (worst) of n is in it; five classes of unequal size."""
    shares = torch.tensor([0.30, 0.05, 0.40, 0.20, 0.05])
    rewards = torch.arange(5).double().repeat_interleave((shares * M).round().long())
    posterior = law_of(Calibrated(kind(n)), rewards, rewards)
    reach = torch.cat([torch.zeros(1), shares.cumsum(dim=0)]).double()
    expected = reach.pow(n).diff() if kind is best_of_n else -(1 - reach).pow(n).diff()
    found = torch.stack([posterior[rewards == value].sum() for value in range(5)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "target", [Calibrated(best_of_n(16)), Calibrated(worst_of_n(4)), Calibrated(best_of_n(3), 2.0)]
)
@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
def test_the_known_z_is_exact_with_ties(target: Calibrated, rate: float) -> None:
    """
    `E[exp phi] = Z` to rounding, over all prior samples that could have been drawn and a new completion.

    With a 0/1 reward what is drawn is a number of successes among 12, so that all can be summed over.
    """
    total = 0.0
    for successes in range(13):
        probability = math.comb(12, successes) * rate**successes * (1 - rate) ** (12 - successes)
        fitted = calibrated(target, [[1.0] * successes + [0.0] * (12 - successes)])
        failure, success = fitted(torch.tensor([[0.0], [1.0]]).double(), of_prompt(0, 2)).exp().tolist()
        total += probability * (rate * success + (1 - rate) * failure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is known, and does not say that it is estimated
        log_z = target.log_z(torch.tensor([0]))
    assert total == pytest.approx(1 / (1 + 1 / target.beta), rel=1e-12)
    assert log_z.item() == pytest.approx(math.log(total), abs=1e-12)


def test_ties_of_a_language_model(enumerated: Any) -> None:
    """The posterior over all completions of a reward of three values is the law of best-of-4, and Z is 1/4."""
    rewards = (2 * enumerated.feature("a") + enumerated.feature("b")).unsqueeze(1)
    target = Calibrated(best_of_n(4))
    target.fit(enumerated.sample(rewards, 20_000, seed=0))
    assert target.log_z(enumerated.keys).tolist() == pytest.approx([math.log(1 / 4)] * 4)
    assert exact_log_z(target, rewards, enumerated) == pytest.approx([math.log(1 / 4)] * 4, abs=0.03)
    for prompt, log_prior in enumerate(enumerated.log_prior):
        posterior = (log_prior + target(rewards, enumerated.context(prompt))).softmax(dim=0)
        values = rewards.squeeze(1)
        mass = torch.stack([log_prior.exp()[values == v].sum() for v in range(4)])
        found = torch.stack([posterior[values == v].sum() for v in range(4)])
        expected = torch.cat([torch.zeros(1), mass.cumsum(dim=0)]).pow(4).diff()
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


def test_without_ties_the_cells_are_those_of_the_ranks() -> None:
    """`phi` of a completion is the mean over its own cell, and the cells of all ranks add up to Z = 1/N exactly."""
    target = calibrated(Calibrated(best_of_n(7)), [[1.0, 2.0, 3.0, 4.0, 5.0]])
    phi = target(torch.tensor([[0.5], [1.5], [2.5], [3.5], [4.5], [5.5]]).double(), of_prompt(0, 6))
    assert phi.exp().mean().item() == pytest.approx(1 / 7, rel=1e-12)


# -------------------------------------------------------------------------------------------------------------------
# Bounds, and how many samples it takes


@pytest.mark.parametrize(
    "target",
    [
        Calibrated(best_of_n(4)),
        Calibrated(worst_of_n(8)),
        Calibrated(ctrl_worst_of_n(), 0.01),
        Calibrated(Transform("hump", lambda u: u * (1 - u)), 0.1),
    ],
    ids=repr,
)
def test_bound_of_phi(target: Calibrated) -> None:
    """Reached by some completion, and by none exceeded; known once the target is fitted."""
    assert copy.deepcopy(target).max_log_potential() is None
    prior = [[1.0, 1.0, 2.0, 2.0, 2.0, 7.0], [NAN] * 6, [1.0, 2.0, 3.0, NAN, NAN, NAN]]
    calibrated(target, prior)
    rewards = torch.linspace(0, 8, 33).double().unsqueeze(1)
    phi = torch.cat([target(rewards, of_prompt(key, 33)) for key in range(3)])
    assert target.max_log_potential() == pytest.approx(phi.max().item(), abs=1e-12)


def test_too_few_samples_for_the_distance_from_the_prior() -> None:
    """
    K samples resolve about log K - 2 nats.

    At a budget of 5 nats and K = 100, log Z from the ranks is off by .63; with as many as are asked for by .006.
    """
    transform = ctrl_best_of_n()
    target = Calibrated(transform, beta_for_kl(transform, 5.0))
    with pytest.warns(
        UserWarning, match=r"^100 samples of the prior .* 2\.6 nats from .* 5 nats away: .* to 1,09[67],"
    ):
        target.warn_of_too_few_samples(100)

    def error(num_samples: int) -> float:
        ranks = torch.arange(num_samples).double().tolist()
        known = calibrated(target, [ranks]).log_z(torch.tensor([0])).item()
        return abs(known - calibrated_law(transform, target.beta).log_z)

    assert error(100) == pytest.approx(0.626, abs=1e-3)
    assert error(1097) == pytest.approx(0.006, abs=1e-3)
    target.warn_of_too_few_samples(1097)


@pytest.mark.parametrize(("target", "enough"), [(Calibrated(best_of_n(4)), 14), (Calibrated(worst_of_n(64)), 177)])
def test_too_few_samples_for_a_large_n(target: Calibrated, enough: int) -> None:
    for holder in (target, Product([Tilt(1.0), target])):
        holder.warn_of_too_few_samples(enough)
        with pytest.warns(UserWarning, match=rf"^{enough - 1} samples of the prior .* prior samples to {enough}, or"):
            holder.warn_of_too_few_samples(enough - 1)
    Tilt(1.0).warn_of_too_few_samples(1)


# -------------------------------------------------------------------------------------------------------------------
# In a product


def test_in_a_product_log_z_is_not_known() -> None:
    single = Product([calibrated(Calibrated(best_of_n(2)), [[1.0, 2.0, 3.0]])])
    log_z = single.log_z(torch.tensor([0]))
    assert log_z is not None
    assert log_z.item() == pytest.approx(math.log(1 / 2))
    assert Product([Calibrated(best_of_n(2)), Tilt(1.0)]).log_z(torch.tensor([0])) is None
    assert Tilt(1.0).log_z(torch.tensor([0])) is None


# -------------------------------------------------------------------------------------------------------------------
# Settings and refusals


def test_settings() -> None:
    assert repr(Calibrated(best_of_n(4))) == f"Calibrated(transform=best_of_n(n=4), beta={1 / 3})"
    assert repr(Calibrated("ctrl_best_of_n", 2, rewards="r")) == (
        "Calibrated(transform=ctrl_best_of_n(t=10.0), beta=2.0, rewards=['r'])"
    )
    assert best_of_n(4) == best_of_n(4) != best_of_n(5)
    mine = Transform("mine", lambda u: u.square())
    assert repr(Calibrated(mine, beta=1.0)) == "Calibrated(transform=mine, beta=1.0)"
    assert not Calibrated(mine, beta=1.0).hard


@pytest.mark.parametrize("n", [1, 0, -3, 2.0, "4", True])
def test_n_refused(n: Any) -> None:
    for transform in (best_of_n, worst_of_n):
        with pytest.raises(ValueError, match=f"`{transform.__name__}` needs a whole number `n` of at least 2"):
            transform(n)


@pytest.mark.parametrize("t", [0.0, -1.0, 1e3, INF, NAN])
def test_t_refused(t: float) -> None:
    for transform in (ctrl_best_of_n, ctrl_worst_of_n):
        with pytest.raises(ValueError, match=rf"`{transform.__name__}` needs `t` in \(0, 50\]"):
            transform(t)


@pytest.mark.parametrize("beta", [0.0, -1.0, INF, NAN])
def test_beta_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="`Calibrated` needs a positive finite `beta`"):
        Calibrated(best_of_n(4), beta=beta)


def test_a_transform_without_a_temperature_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"`Calibrated` needs a `beta` with the transform identity\(\)"):
        Calibrated(identity())


def test_kl_refused() -> None:
    for kl in (0.0, -1.0, NAN, 20.0):
        with pytest.raises(ValueError, match=r"`kl_prior` must lie in \(0, 5\] nats"):
            beta_for_kl(identity(), kl)


def test_a_prompt_without_prior_samples() -> None:
    target = calibrated(Calibrated(best_of_n(4)), [[1.0, 2.0], [1.0, 2.0]], [4, 2**60])
    keys = torch.tensor([4, 5, 2**60, 5, 2**60 + 1])
    with pytest.raises(ValueError, match=r"^2 of 4 prompts have no prior samples: draw them for every prompt that"):
        target(torch.zeros(5, 1), Context(torch.zeros(5), keys))


def test_used_without_context_or_fit() -> None:
    with pytest.raises(ValueError, match="Calibrated needs to know the prompts and the prior's probabilities: call"):
        Calibrated(best_of_n(4))(torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"^Call `fit\(prior_scores\)` first: Calibrated learns"):
        Calibrated(best_of_n(4))(torch.zeros(2, 1), of_prompt(0, 2))
    with pytest.raises(ValueError, match=r"^Call `fit\(prior_scores\)` first: Calibrated learns"):
        Calibrated(best_of_n(4)).log_z(torch.tensor([0]))


def test_what_ties_in_training_ties_wherever_the_target_is_evaluated() -> None:
    """The sum of .1 and .3 is rounded in one precision and not in the other."""
    target = Calibrated(best_of_n(4))
    weights = torch.tensor([0.1, 0.3])
    target.bind(["a", "b"], weights)
    rewards = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])  # (1, N, 2)
    target.fit(PriorScores(rewards, torch.zeros(1, 4), torch.tensor([0])))
    single, double = (target(rewards[0].to(dtype), of_prompt(0, 4)) for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(single.double(), double.double(), rtol=1e-6, atol=1e-6)
