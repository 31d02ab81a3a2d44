"""Chains are what they say by enumeration, and the section tells losses apart."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from trl_bayes import cli
from trl_bayes.benchmarks.chains import Chain
from trl_bayes.benchmarks.long_completions import LongCompletionsArguments, at_prior, losses, train


def test_a_chain_by_enumeration() -> None:
    """log Z, the distance that was asked for, and both divergences of another policy; all 27 completions."""
    chain = Chain(vocabulary=3, length=3, distance=0.5, seed=4)
    tokens = torch.tensor([(0, *each) for each in itertools.product(range(3), repeat=3)])
    log_prior = chain.score(chain.log_prior, tokens).sum(dim=1)
    log_target = log_prior + chain.log_potential(tokens)
    assert chain.log_z == pytest.approx(log_target.logsumexp(dim=0).item(), abs=1e-9)
    log_posterior = log_target - chain.log_z
    assert (log_posterior.exp() * (log_posterior - log_prior)).sum().item() == pytest.approx(0.5, abs=1e-6)
    policy = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).log_softmax(dim=1)
    log_policy = chain.score(policy, tokens).sum(dim=1)
    reverse = (log_policy.exp() * (log_policy - log_posterior)).sum().item()
    from_prior = (log_policy.exp() * (log_policy - log_prior)).sum().item()
    forward = (log_posterior.exp() * (log_posterior - log_policy)).sum().item()
    assert chain.reverse_kl(policy) == pytest.approx((reverse, from_prior), abs=1e-9)
    assert chain.forward_kl(policy) == pytest.approx(forward, abs=1e-9)
    assert 0 <= chain.forward_kl(chain.best) < chain.forward_kl(policy)


def test_draws_are_the_policys() -> None:
    chain = Chain(vocabulary=3, length=4, distance=0.5)
    tokens = chain.draw(chain.log_prior, 4000, torch.Generator().manual_seed(0))
    surprise = -chain.score(chain.log_prior, tokens)
    entropy = -(chain.log_prior.exp() * chain.log_prior).sum(dim=1)[tokens[:, :-1]]
    apart = (surprise - entropy).flatten()
    assert tokens.shape == (4000, 5) and (tokens[:, 0] == 0).all()
    assert abs(apart.mean()) < 3.9 * apart.std() / len(apart) ** 0.5


def test_every_loss_comes_nearer_where_the_posterior_is_near() -> None:
    """And far from the prior a group has one effective sample."""
    args = LongCompletionsArguments(lengths=[8], vocabulary=6, steps=60, learning_rate=0.05)
    chain = Chain(6, 8, 0.5)
    for name, loss in losses().items():
        found = train(chain, loss, args, seed=0)
        assert min(found.reverse_kl, found.forward_kl) >= 0 and found.forward_kl < 0.3 < chain.distance, name
        assert found.ratio_spread > 0
    near, far = at_prior(chain, 16), at_prior(Chain(6, 64, 12.0), 16)
    assert near.ess > 0.3 and near.spread < 1.5
    assert far.ess < 0.05 and 1 / 16 <= far.ess_of_group < 0.3 and far.spread > 3


def test_the_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--lengths 4 8 --distances 0.5 --vocabulary 6 --steps 6 --seeds 0 1".split()
    cli.main(["bench", "long-completions", *flags, "--output_dir", str(tmp_path)])
    targets = json.loads((tmp_path / "bench.json").read_text())["long-completions"]["targets"]
    assert list(targets) == ["0.5 nats, 4 tokens", "0.5 nats, 8 tokens"]
    assert all(len(runs) == 2 for each in targets.values() for runs in each["trained"].values())
    assert "| 0.5 nats, 8 tokens |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["bench", "long-completions", "--steps", "0"])
    assert "`steps` must be at least 1, got 0." in capsys.readouterr().err
