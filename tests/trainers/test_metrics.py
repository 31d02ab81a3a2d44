"""What is logged of a batch: what is known, as far as it is known, and nothing that cannot be."""

import math
import statistics

import pytest
import torch
from accelerate import Accelerator

from trl_bayes.divergences import get_divergence
from trl_bayes.estimators import ImportanceWeights, PolicyGradient, ScoreFunction
from trl_bayes.estimators.base import Estimator
from trl_bayes.groups import Group
from trl_bayes.partitions import LeaveOneOut, LogZ, Partition, Running
from trl_bayes.targets import Constraint, Target, Tilt
from trl_bayes.trainers.metrics import group_metrics, loss_metrics, token_kl


OF_Z = {"posterior/log_z", "posterior/ess", "posterior/reverse_kl", "posterior/forward_kl"}
G = 16
PHI = 10.0  # a 0/1 reward at beta = 0.1
RATE = 0.02
LOG_Z = math.log(RATE * math.exp(PHI) + 1 - RATE)  # of the prior


def at_the_prior(phi: list[float], keys: bool = True) -> Group:
    """A group of the prior's completions, some tokens long."""
    log_prior = torch.linspace(-9.0, -3.0, len(phi)).unsqueeze(0)
    return Group(log_prior, log_prior, log_prior, torch.tensor([phi]), torch.tensor([7]) if keys else None)


def logged(group: Group, partition: Partition, target: Target | None = None, estimator: Estimator | None = None):
    estimator = estimator or ImportanceWeights(get_divergence("forward_kl"))
    log_z = partition.log_z(group)
    terms = estimator.terms(group, log_z)
    return group_metrics(group, terms, log_z, estimator, target or Tilt(beta=0.1))


@pytest.mark.parametrize("reward", [0.0, PHI])
def test_a_group_without_contrast_tells_nothing_of_z(reward: float) -> None:
    """At the prior its weights are as equal as at the posterior: it would log ess = 1 and small distances."""
    metrics = logged(at_the_prior([reward] * G), LeaveOneOut())
    assert not metrics.keys() & OF_Z
    assert metrics["posterior/kl_prior"] == 0
    assert metrics["posterior/frac_no_evidence"] == 0


def test_a_completion_alone_tells_nothing_of_z() -> None:
    assert not logged(at_the_prior([3.0]), LeaveOneOut()).keys() & OF_Z


def test_a_group_with_contrast_tells_z() -> None:
    metrics = logged(at_the_prior([PHI, *[0.0] * (G - 1)]), LeaveOneOut())
    assert metrics.keys() >= OF_Z
    assert metrics["posterior/log_z"] == pytest.approx(math.log((math.exp(PHI) + G - 1) / G), rel=1e-5)
    assert metrics["posterior/ess"] == pytest.approx(1 / G, rel=0.01)


def test_what_other_groups_of_the_prompt_have_told_counts() -> None:
    """The same blind group, after one that had seen a success: its distance from p is known, and not small."""
    partition, blind = Running(), at_the_prior([0.0] * G)
    partition.update(blind)
    assert not logged(blind, partition).keys() & OF_Z  # two blind groups are no better than one
    partition.update(at_the_prior([PHI, *[0.0] * (3 * G - 1)]))
    metrics = logged(blind, partition)
    assert metrics["posterior/log_z"] == pytest.approx(LOG_Z - 0.5, abs=0.3)
    assert metrics["posterior/ess"] < 0.07
    assert metrics["posterior/reverse_kl"] == pytest.approx(metrics["posterior/log_z"], rel=1e-5)
    assert "posterior/forward_kl" not in metrics  # it has seen nothing of p


def test_known_z_counts() -> None:
    class Exact(LeaveOneOut):
        def log_z(self, group: Group) -> LogZ:
            log_z = torch.full((1,), LOG_Z)
            return LogZ(log_z.expand(1, G), log_z, torch.tensor([True]))

    metrics = logged(at_the_prior([0.0] * G), Exact())
    assert metrics["posterior/reverse_kl"] == pytest.approx(LOG_Z, rel=1e-5)
    assert metrics["posterior/ess"] < 0.07


def test_nothing_is_better_than_meeting_a_constraint() -> None:
    """All completions meet it: no other could count more, so the group tells Z."""
    metrics = logged(at_the_prior([0.0] * G), LeaveOneOut(), Constraint())
    assert metrics["posterior/log_z"] == pytest.approx(0, abs=1e-5)
    assert metrics["posterior/ess"] == pytest.approx(1, abs=1e-5)


def test_a_group_that_misses_a_constraint_has_no_evidence() -> None:
    metrics = logged(at_the_prior([-math.inf] * G), LeaveOneOut(), Constraint())
    assert not metrics.keys() & OF_Z
    assert metrics["posterior/frac_no_evidence"] == 1


def test_an_unknown_metric_is_absent_and_never_nan() -> None:
    """With a constraint reverse KL is infinite: trackers warn of a None."""
    metrics = logged(at_the_prior([0.0, -math.inf] * (G // 2)), LeaveOneOut(), Constraint())
    assert "posterior/reverse_kl" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("successes", [1, 2])
def test_a_lone_success_logs_nothing_that_cannot_be(successes: int) -> None:
    """Jensen-Shannon is at most log 2, and forward KL the largest log-ratio: 953.9 and 1e21 were logged."""
    group = at_the_prior([PHI * 4] * successes + [0.0] * (G - successes))
    estimator = ScoreFunction(get_divergence("jensen_shannon"))
    metrics = logged(group, LeaveOneOut(), estimator=estimator)
    assert 0 <= metrics["posterior/forward_kl"] <= math.log(G) + 0.01
    terms = estimator.terms(group, LeaveOneOut().log_z(group))
    loss, _ = estimator.loss(group.log_policy[0], type(terms)(*(term[0] for term in terms)))
    assert 0 <= loss.item() <= math.log(2)


def test_pure_rl_has_no_posterior_to_log() -> None:
    from trl_bayes.estimators import PureRL

    metrics = logged(at_the_prior([1.0, 2.0, 0.0]), LeaveOneOut(), estimator=PureRL(get_divergence("reverse_kl")))
    assert set(metrics) == {
        f"posterior/{name}" for name in ("frac_unscored", "pseudo_reward_mean", "pseudo_reward_std")
    }


def test_means_are_over_prompts_that_tell() -> None:
    one, other = at_the_prior([PHI, *[0.0] * 3]), at_the_prior([0.0] * 4)
    both = Group(*(torch.cat(pair) for pair in zip(one[:5], other[:5], strict=True)))  # type: ignore[arg-type]
    estimator = PolicyGradient(get_divergence("reverse_kl"))
    for name in OF_Z:
        assert logged(both, LeaveOneOut(), estimator=estimator)[name] == pytest.approx(
            logged(one, LeaveOneOut(), estimator=estimator)[name]
        )


def test_distances_next_to_the_posterior_are_sharp() -> None:
    """With Z known from elsewhere: a plain mean over 16 completions is off by 10 to 20 times the distance itself."""

    class Exact(LeaveOneOut):
        def log_z(self, group: Group) -> LogZ:
            return LogZ(torch.zeros(1, G), torch.zeros(1), torch.tensor([True]))

    generator = torch.Generator().manual_seed(0)
    log_posterior = torch.randn(64, generator=generator).log_softmax(0)
    log_policy = (log_posterior + 0.02 * torch.randn(64, generator=generator)).log_softmax(0)
    drawn = torch.multinomial(log_policy.exp(), G, replacement=True, generator=generator).unsqueeze(0)
    zeros = torch.zeros(1, G)
    group = Group(log_policy[drawn], log_policy[drawn], zeros, log_posterior[drawn], torch.tensor([7]))
    metrics = logged(group, Exact())
    reverse = (log_policy.exp() * (log_policy - log_posterior)).sum().item()
    forward = (log_posterior.exp() * (log_posterior - log_policy)).sum().item()
    assert metrics["posterior/reverse_kl"] == pytest.approx(reverse, rel=0.5)
    assert metrics["posterior/forward_kl"] == pytest.approx(forward, rel=0.5)


def test_a_lost_mode_shows_in_the_mean_over_batches() -> None:
    """Where Z is known a group that has seen what the policy has lost counts, however heavy it is."""
    generator = torch.Generator().manual_seed(0)
    log_prior = torch.randn(400, generator=generator, dtype=torch.float64).log_softmax(dim=0)
    phi = torch.randn(400, generator=generator, dtype=torch.float64)
    true_log_z = (log_prior + phi).logsumexp(dim=0)
    posterior = log_prior + phi - true_log_z
    policy = torch.where(phi > phi.median(), posterior, posterior - 4).log_softmax(dim=0)
    exact = (posterior.exp() * (posterior - policy)).sum().item()
    estimator, found = ImportanceWeights(get_divergence("forward_kl")), []
    for _ in range(400):
        y = torch.multinomial(policy.exp(), 256, replacement=True, generator=generator).view(16, 16)
        known = LogZ(true_log_z.expand(16, 16), true_log_z.expand(16), torch.ones(16, dtype=torch.bool))
        group = Group(policy[y], policy[y], log_prior[y], phi[y])
        metrics = group_metrics(group, estimator.terms(group, known), known, estimator, Tilt(beta=1.0))
        found.append(metrics["posterior/forward_kl"])
    mean, error = statistics.mean(found), statistics.stdev(found) / len(found) ** 0.5
    assert abs(mean - exact) < 4 * error and error < 0.1 * exact


def test_pseudo_rewards_of_a_batch() -> None:
    """Of what has a reward: `log pi_0 + phi - log pi` of KL-RL, `-f'(t)` of f-DPG."""
    log_policy, log_prior = torch.tensor([[-1.0, -2.0, -3.0, -1.5]]), torch.tensor([[-1.5, -1.0, -2.0, -4.0]])
    group = Group(log_policy, log_policy, log_prior, torch.tensor([[0.5, 2.0, -1.0, math.nan]]))
    metrics = logged(group, LeaveOneOut(), estimator=PolicyGradient(get_divergence("reverse_kl")))
    assert metrics["posterior/pseudo_reward_mean"] == pytest.approx((0 + 3 + 0) / 3)
    assert metrics["posterior/pseudo_reward_std"] == pytest.approx(math.sqrt(2))
    metrics = logged(group, LeaveOneOut(), estimator=ScoreFunction(get_divergence("reverse_kl")))
    z = LeaveOneOut().log_z(group).of_completion[0].tolist()
    rewards = [0 - z[0] - 1, 3 - z[1] - 1, 0 - z[2] - 1]
    mean = sum(rewards) / 3
    assert metrics["posterior/pseudo_reward_mean"] == pytest.approx(mean, rel=1e-5)
    spread = math.sqrt(sum((each - mean) ** 2 for each in rewards) / 3)
    assert metrics["posterior/pseudo_reward_std"] == pytest.approx(spread, rel=1e-5)


def test_kl_and_entropy_are_means_over_the_policys_tokens() -> None:
    policy, prior = (
        torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -3.0, -1.0]]),
        torch.tensor([[-1.5, -1.0, 0.0], [-2.0, -3.0, -2.5]]),
    )
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    output = {"ref_per_token_logps": prior, "completion_mask": mask}
    differences = [-0.5, 1.0, -1.5, 0.0, -1.5]
    expected = sum(math.exp(each) - each - 1 for each in differences) / 5
    assert token_kl(policy, output, Accelerator(cpu=True))["kl"] == pytest.approx(expected, rel=1e-5)
    entropies, capped = torch.tensor([[1.0, 2.0, 50.0], [3.0, 4.0, 5.0]]), torch.tensor([True, False])
    metrics = loss_metrics(entropies, mask, capped, Accelerator(cpu=True))
    assert metrics == {"entropy": pytest.approx(3.0), "posterior/capped_frac": pytest.approx(0.5)}
