"""The ablation: its policies and estimators against sums over all completions, and one small run of the section."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_bayes import cli
from trl_bayes.benchmarks.ablation import AblationArguments, Row, table
from trl_bayes.benchmarks.ablation_methods import Method, limit_of, methods
from trl_bayes.benchmarks.ablation_tasks import ablation_problems
from trl_bayes.benchmarks.ablation_training import Ablation, Budget, Buffer, Sampled, exact_loss_of, share_from_others
from trl_bayes.benchmarks.exact_training import ExactProblem
from trl_bayes.benchmarks.gradient_moments import gradient_moments
from trl_bayes.benchmarks.perceptrons import Perceptrons, Prefixes
from trl_bayes.benchmarks.tiny import EnumerableTask


def count(texts: list[str]) -> list[float]:
    return [text.count("a") - text.count("c") / 2 for text in texts]


PROBLEM = ExactProblem("small", EnumerableTask("abc", 3, ("a", "b"), count, seed=1), beta=0.7)
BUDGET = Budget(steps=40, groups=4, group_size=8, learning_rate=2e-2, buffer_size=64)
METHODS = {method.name: method for method in methods()}


def moved(ablation: Ablation) -> Perceptrons:
    """Policies away from the prior, all the same."""
    policies, generator = ablation.policies(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policies.parameters():
            weight += 0.1 * torch.randn(weight.shape[1:], generator=generator)
    return policies


def test_the_law_is_the_sum_over_tokens() -> None:
    prefixes = Prefixes(PROBLEM.task)
    next_token = Perceptrons(prefixes, 2, seed=3, logit_std=1.0)()
    law = prefixes.log_law(next_token)
    assert law.shape == (2, 2, PROBLEM.task.num_completions)
    torch.testing.assert_close(law.exp().sum(dim=2), torch.ones(2, 2))
    per_token = next_token[..., prefixes.node_of, prefixes.ids]
    torch.testing.assert_close(law, torch.where(prefixes.mask, per_token, 0.0).sum(dim=3))


@pytest.mark.parametrize(
    "name",
    [  # more updates begin with one, and smaller batches and another beta2 have the same estimator
        name
        for name, method in METHODS.items()
        if not name.startswith("DPG, self")
        and "3, self" not in name
        and (method.most_updates, method.parts, method.adam_beta2) == (1, 1, 0.999)
    ],
)
def test_the_mean_gradient_is_the_exact_one(name: str) -> None:
    """Each seed is a draw of its own; a Z from the group leaves DPG and Jensen-Shannon the bias that they have."""
    method, draws = METHODS[name], 100
    ablation = Ablation(PROBLEM, draws, BUDGET)
    policies, alone = moved(ablation), moved(Ablation(PROBLEM, 1, BUDGET))
    exact_loss_of(ablation, method, alone()).backward()
    exact = torch.cat([weight.grad.flatten() for weight in alone.parameters() if weight.grad is not None])
    sampled = Sampled(ablation, method, 0, BUDGET)
    for _ in range(1 + 2 * method.replay_ratio):  # until it replays
        policies.zero_grad()
        sampled.loss(policies()).backward()
    found = torch.cat([weight.grad.flatten(1) for weight in policies.parameters() if weight.grad is not None], dim=1)
    moments = gradient_moments(found, exact)
    allowed = 0.0 if method.kind in ("policy_gradient", "adaptive", "energy") else 0.02
    assert abs(moments.squared_bias) < 4 * moments.squared_bias_error + allowed * exact.square().sum()


def test_a_batch_is_used_again_while_it_is_effective() -> None:
    """Its weights are those of the policy as it is by then; at once they are all one."""
    method = Method("DPG, twice", "forward_kl", "importance", most_updates=2)
    ablation = Ablation(PROBLEM, 2, BUDGET)
    sampled, policies = Sampled(ablation, method, 0, BUDGET), ablation.policies()
    first = sampled.loss(policies())
    assert sampled.loss_again(policies()).item() == pytest.approx(first.item(), rel=1e-6)
    assert sampled.effective_share(policies()) == pytest.approx(1.0)
    other = moved(ablation)()
    log_policy = ablation.prefixes.log_law(other).flatten(0, 1).gather(1, sampled.batch["outcome"].view(4, -1))
    ratio = (log_policy.view(2, -1) - sampled.batch["log_proposal"]).exp()
    expected = ratio.sum(dim=1).square() / ratio.square().sum(dim=1) / ratio.size(1)
    assert sampled.effective_share(other) == pytest.approx(expected.min().item(), rel=1e-4)
    assert 0.1 < sampled.effective_share(other) < 0.98
    before = ablation.train(Method("DPG", "forward_kl", "importance")).forward_kl
    assert ablation.train(method).forward_kl != before


@pytest.mark.parametrize(
    ("parts", "num_prompts", "expected"), [(1, 2, (40, 4, 8)), (2, 2, (80, 2, 8)), (4, 2, (160, 2, 4))]
)
def test_smaller_batches_have_a_group_for_every_prompt(
    parts: int, num_prompts: int, expected: tuple[int, int, int]
) -> None:
    """As many completions as before, in more steps."""
    budget = BUDGET.in_parts(parts, num_prompts)
    assert (budget.steps, budget.groups, budget.group_size) == expected
    assert budget.completions == BUDGET.completions


@pytest.mark.parametrize("other", [{"parts": 2}, {"adam_beta2": 0.95}])
def test_parts_and_beta2_train_otherwise(other: dict[str, Any]) -> None:
    ablation, method = Ablation(PROBLEM, 1, BUDGET), METHODS["DPG"]
    assert ablation.train(replace(method, **other)).forward_kl != ablation.train(method).forward_kl


def test_the_share_of_a_group_does_not_see_it() -> None:
    """The mixture of Rao-Blackwellized and sequence-level: what a group is changes the shares of the others only."""
    numerator, denominator = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 5.0, 8.0, 4.0])
    shares = share_from_others(numerator, denominator, seeds=2)
    assert shares.tolist() == pytest.approx([2 / 5, 1 / 5, 1.0, 3 / 8])


def test_the_buffer_keeps_the_latest_and_draws_distinct_ones() -> None:
    buffer = Buffer(2, 6, torch.Generator().manual_seed(0))
    for start in (0, 4, 8):
        buffer.add({"outcome": torch.arange(start, start + 4) + torch.tensor([[0], [100]])})
    assert len(buffer) == 6
    drawn = buffer.sample(6)["outcome"].sort(dim=1).values
    assert drawn.tolist() == [list(range(6, 12)), list(range(106, 112))]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_without_noise_it_comes_near(divergence: str) -> None:
    ablation = Ablation(PROBLEM, 1, BUDGET)
    before = ablation.distance(ablation.policies())[0]
    assert ablation.train(limit_of(divergence)).forward_kl[0] < before / 20


def test_seeds_are_independent_trainings() -> None:
    """They end at different places, near the posterior, and at the same ones again."""
    outcome = Ablation(PROBLEM, 3, BUDGET).train(METHODS["DPG, replay 3"])
    assert len(set(outcome.forward_kl)) == 3
    assert max(outcome.forward_kl) < 0.1
    assert Ablation(PROBLEM, 3, BUDGET).train(METHODS["DPG, replay 3"]) == outcome


@pytest.mark.parametrize(("half", "exact"), [(1, [True, False]), (2, [False, True]), (None, [False, False])])
def test_which_half_has_no_noise(half: int | None, exact: list[bool]) -> None:
    method = Method("some", "reverse_kl", "policy_gradient", exact_half=half)
    assert [method.is_exact(share) for share in (0.49, 0.5)] == exact
    assert limit_of("reverse_kl").is_exact(0.7)


def test_the_tasks_are_what_their_names_say() -> None:
    problems = ablation_problems()
    assert len(problems) >= 6
    ablation = Ablation(problems["rare-mode"], 1, BUDGET)
    rare = ablation.phi > 0
    assert ((ablation.log_prior.exp() * rare).sum(dim=1) < 0.005).all()
    assert ((ablation.log_posterior.exp() * rare).sum(dim=1) > 0.15).all()
    assert problems["hard-2"].target.hard
    assert len(problems["16-prompts"].task.prompts) == 16


def test_the_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--problems", "short", "--methods", "DPG, replay 3", "KL-RL (", "--seeds", "2", "--steps", "6"]
    cli.main(["bench", "ablation", *flags, "--output_dir", str(tmp_path)])
    rows: list[dict[str, Any]] = json.loads((tmp_path / "ablation.json").read_text())["ablation"]
    assert [row["method"] for row in rows][:2] == ["noise-free reverse_kl", "noise-free forward_kl"]
    assert {len(row["forward_kl"]) for row in rows[2:]} == {2}
    text = capsys.readouterr().out
    assert "| KL-RL (RLOO's estimator), mean of the last quarter's weights |" in text
    assert "1,536 completions in 6 steps" in text


def test_multiples_of_the_limit() -> None:
    rows = [
        Row("one", limit_of("forward_kl").name, "forward_kl", [2.0], [2.0]),
        Row("one", "DPG, replay 3", "forward_kl", [3.0, 4.0, 8.0], [1.0] * 3),
        Row("two", limit_of("forward_kl").name, "forward_kl", [1.0], [1.0]),
        Row("two", "DPG, replay 3", "forward_kl", [8.0, 8.0, 8.0], [1.0] * 3),
    ]
    assert table(rows).splitlines()[2:] == ["| DPG, replay 3 | 2.00 (4.00) | 8.00 (8.00) | 4.00 |"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"problems": ["leters"]}, "did you mean 'letters'"),
        ({"methods": ["RAO"]}, "'RAO' is part of no row's name"),
        ({"seeds": 0}, "`seeds"),
        ({"steps": 0}, "`steps"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AblationArguments(**wrong)


def test_methods_are_named_once() -> None:
    assert len(METHODS) == len(methods())
    assert all(isinstance(method, Method) for method in methods())
