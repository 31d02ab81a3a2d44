"""The sampler on language models: every method reaches the enumerated posterior, and what is wrong is refused early.

Total variations are measured with the samples' own noise in them: about 0.04 for 400 samples of 15 outcomes.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from trl_bayes import samplers
from trl_bayes.benchmarks.tiny import EnumerableTask, build_tiny_model
from trl_bayes.samplers import (
    METHODS,
    BestOfN,
    Completions,
    Importance,
    Method,
    MetropolisHastings,
    QuasiRejection,
    Rejection,
    Sampler,
    SamplingSettings,
    SequentialMonteCarlo,
)
from trl_bayes.targets import Calibrated, Constraint, Context, Moments, Product, Target, Tempered, Tilt, best_of_n


def _reward(texts: list[str]) -> list[float]:
    return [text.count("a") - text.count("b") / 2 for text in texts]


TASK = EnumerableTask("ab", 3, ("a", "b a"), _reward)  # 15 completions; prompts of one and of two tokens
TILT = Tilt(0.7)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tiny")
    return {
        "prior": TASK.build_model(folder / "prior"),
        "policy": build_tiny_model(folder / "policy", "ab", seed=9),
        "letters": build_tiny_model(folder / "letters", "ba", seed=9),
        "larger": build_tiny_model(folder / "larger", "abc", seed=9),
    }


@pytest.fixture(scope="module")
def models(folders: dict[str, str]) -> dict[str, Any]:
    return {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def tokenizer(folders: dict[str, str]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folders["prior"])


def make(models: dict[str, Any], tokenizer: Any, target: Target, method: Method, **settings: Any) -> Sampler:
    rewards = settings.pop("reward_funcs", [TASK.reward_func])
    others = {
        name: settings.pop(name) for name in ("proposal", "reward_weights", "num_prior_samples") if name in settings
    }
    drawing = SamplingSettings(**{"max_new_tokens": TASK.max_completion_length, **settings})
    return Sampler(models["prior"], tokenizer, rewards, target, method, drawing, **others)


def laws(draws: Completions, tokenizer: Any, log_weights: Tensor | None = None) -> Tensor:
    """Shares of all outcomes (P, 15), weighted."""
    completions = TASK.completions(tokenizer)
    rows = [tuple(ids[mask].tolist()) for ids, mask in zip(completions.ids, completions.mask, strict=True)]
    place = {row: i for i, row in enumerate(rows)}
    outcome = torch.tensor([place[tuple(ids)] for ids in draws.completion_ids])
    weights = (torch.zeros(len(draws)) if log_weights is None else log_weights).double().exp()
    table = torch.zeros(len(draws.prompts), len(rows), dtype=torch.float64)
    table.index_put_((draws.prompt_index, outcome), weights, accumulate=True)
    return table / table.sum(dim=1, keepdim=True)


def posterior(model: Any, tokenizer: Any, target: Target, temperature: float = 1.0) -> Tensor:
    log_prior = TASK.log_probs(model, tokenizer, temperature)
    target.bind(["reward_func"])
    rewards = TASK.rewards(tokenizer).unsqueeze(1)
    phi = torch.stack([target(rewards, Context(row, torch.full((len(row),), p))) for p, row in enumerate(log_prior)])
    return (log_prior + phi).softmax(dim=1)


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().sum(dim=1).max().item() / 2


# ---------------------------------------------------------------------------------------------------------------------
# The posterior


REACHES_THE_POSTERIOR = [
    Rejection(3 / 0.7),  # draws from the prior only
    Importance(),
    QuasiRejection(tolerance=0.01),
    MetropolisHastings(num_steps=40),
    MetropolisHastings("independence", num_steps=64),
    SequentialMonteCarlo(tokens_per_step=1, twist="rewards", num_particles=20),
    SequentialMonteCarlo(num_particles=20),
]


@pytest.mark.parametrize(
    ("method", "with_proposal"),
    [(method, False) for method in REACHES_THE_POSTERIOR] + [(method, True) for method in REACHES_THE_POSTERIOR[1:]],
    ids=lambda value: getattr(value, "kernel", getattr(value, "twist", getattr(value, "name", value))),
)
def test_every_method_reaches_the_posterior(
    method: Method, with_proposal: bool, models: dict[str, Any], tokenizer: Any
) -> None:
    n = 2000 if isinstance(method, Importance | SequentialMonteCarlo) else 500
    sampler = make(
        models, tokenizer, TILT, method, proposal=models["policy"] if with_proposal else None, batch_size=1000
    )
    draws = sampler.sample(TASK.prompts, n)
    assert torch.bincount(draws.prompt_index).tolist() == [n, n]
    truth = posterior(models["prior"], tokenizer, TILT)
    assert distance(laws(draws, tokenizer, draws.log_weights), truth) < 0.09
    assert distance(TASK.log_probs(models["prior"], tokenizer).exp(), truth) > 0.15
    assert json.loads(json.dumps(draws.diagnostics, allow_nan=False)) == draws.diagnostics
    assert draws.diagnostics["num_generated"] >= len(draws) and draws.diagnostics["num_tokens"] > 0


def test_the_temperature_is_part_of_the_prior(models: dict[str, Any], tokenizer: Any) -> None:
    """Also with a target that reads log pi_0."""
    target = Tempered(2.0)
    draws = make(models, tokenizer, target, Rejection(), temperature=0.6, reward_funcs=[]).sample(TASK.prompts, 500)
    truth = posterior(models["prior"], tokenizer, target, 0.6)
    assert distance(laws(draws, tokenizer), truth) < 0.09
    assert distance(posterior(models["prior"], tokenizer, target), truth) > 0.15


def test_new_ends_are_drawn_from_the_model(models: dict[str, Any], tokenizer: Any) -> None:
    """Prefixes of several lengths in a batch, each with its own room."""
    sampler = make(models, tokenizer, Tilt(1e9), MetropolisHastings(num_steps=3, num_chains=2000), batch_size=700)
    draws = sampler.sample(TASK.prompts, 2000)  # every step is a draw from the prior, if its end is
    assert distance(laws(draws, tokenizer), TASK.log_probs(models["prior"], tokenizer).exp()) < 0.05
    assert draws.diagnostics["num_generated"] == 4 * 4000


def test_what_draws_hold(models: dict[str, Any], tokenizer: Any) -> None:
    draws = make(models, tokenizer, TILT, Rejection(3 / 0.7)).sample(TASK.prompts, 30)
    eos = tokenizer.eos_token_id
    assert draws.prompts == list(TASK.prompts) and draws.prompt_index.tolist() == [0] * 30 + [1] * 30
    for ids, text, ended in zip(draws.completion_ids, draws.texts, draws.ended.tolist(), strict=True):
        assert (ids[-1] == eos) == ended and (ended or len(ids) == 3)
        assert text == " ".join("ab"[i] for i in ids if i != eos)
    assert draws.rewards[:, 0].tolist() == _reward(draws.texts)
    assert torch.allclose(draws.phi, draws.rewards[:, 0] / 0.7)
    table = draws.to_dataset()
    assert table.column_names == ["prompt", "completion", "log_weight", "rewards", "log_potential", "ended"]
    assert table[45]["prompt"] == "b a" and table[45]["completion"] == draws.texts[45]
    assert table[45]["rewards"] == draws.rewards[45].tolist()
    tokens = draws.to_dataset(tokens=True)
    assert tokens.column_names == [*table.column_names, "input_ids", "completion_mask"]
    assert tokens[45]["input_ids"] == tokenizer("b a")["input_ids"] + draws.completion_ids[45]
    assert tokens[45]["completion_mask"] == [0, 0] + [1] * len(draws.completion_ids[45])


def test_the_seed_is_all_that_matters(models: dict[str, Any], tokenizer: Any) -> None:
    def draw(seed: int) -> list[list[int]]:
        torch.rand(3)
        method = MetropolisHastings(num_steps=3)
        return make(models, tokenizer, TILT, method, seed=seed).sample(TASK.prompts, 20).completion_ids

    state = torch.random.get_rng_state()
    first = draw(1)
    assert draw(1) == first != draw(2)
    torch.random.set_rng_state(state)
    make(models, tokenizer, TILT, Importance()).sample(TASK.prompts, 2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_target_that_learns_is_fitted_for_each_call(models: dict[str, Any], tokenizer: Any) -> None:
    target = Calibrated("identity", beta=0.5)
    sampler = make(models, tokenizer, target, Importance(), num_prior_samples=50)
    assert len(sampler.sample(TASK.prompts, 5)) == 10
    assert len(sampler.sample(["a b", "b", "a"], 4)) == 12  # other prompts under the same keys
    assert not target.is_fitted
    fixed = Tilt(0.7)
    assert make(models, tokenizer, fixed, Importance()).target is fixed


def test_a_bound_that_is_known_once_the_target_has_learned(models: dict[str, Any], tokenizer: Any) -> None:
    """Of best-of-2, phi = log(quantile): every second completion of the prior is taken."""
    target = Calibrated(best_of_n(2))
    sampler = make(models, tokenizer, target, Rejection(), num_prior_samples=200)
    draws = sampler.sample(TASK.prompts, 200)
    assert len(draws) == 400 and math.isfinite(draws.diagnostics["max_log_potential"])
    assert SequentialMonteCarlo(upper_bound=True).check(target, has_proposal=False) is None


def test_rewards_that_are_missing(models: dict[str, Any], tokenizer: Any) -> None:
    """A completion without any reward is not part of the posterior."""

    def sometimes(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None if text.startswith("b") else 0.0 for text in completions]

    for method in (Rejection(0.0), MetropolisHastings(num_steps=60), QuasiRejection(), BestOfN(20)):
        draws = make(models, tokenizer, Tilt(1.0), method, reward_funcs=[sometimes]).sample(TASK.prompts[:1], 40)
        assert len(draws) == 40 and not any(text.startswith("b") for text in draws.texts)
    kept = make(models, tokenizer, Tilt(1.0), Importance(), reward_funcs=[sometimes]).sample(TASK.prompts, 40)
    assert 0 < kept.diagnostics["num_unscored"] == int(kept.log_weights.isneginf().sum()) < 80
    assert kept.to_dataset()["rewards"][int(kept.phi.isnan().nonzero()[0])] == [None]


def test_columns_reach_the_rewards(models: dict[str, Any], tokenizer: Any) -> None:
    def bonus_reward(completions: list[str], bonus: list[float], **kwargs: Any) -> list[float]:
        return bonus

    sampler = make(models, tokenizer, Tilt(1.0), BestOfN(2), reward_funcs=[bonus_reward])
    draws = sampler.sample(TASK.prompts, 3, columns={"bonus": [1.0, 2.0]})
    assert draws.rewards.flatten().tolist() == [1.0] * 3 + [2.0] * 3


def test_fewer_draws_than_asked_for_are_warned_of(models: dict[str, Any], tokenizer: Any) -> None:
    sampler = make(models, tokenizer, Constraint(threshold=99.0), Rejection(max_attempts=2))
    with pytest.warns(UserWarning, match="2 of 2 prompts have fewer than 3 draws, 6 are missing"):
        draws = sampler.sample(TASK.prompts, 3)
    assert len(draws) == 0 and draws.diagnostics["num_missing"] == 6
    assert draws.to_dataset().num_rows == 0


def test_a_chat(tiny_models: Any, chat_tokenizer: Any) -> None:
    def length(completions: list[Any], **kwargs: Any) -> list[float]:
        return [len(messages[0]["content"]) / 10 for messages in completions]

    model = AutoModelForCausalLM.from_pretrained(tiny_models.prior)
    prompts = [[{"role": "user", "content": "Hello"}], [{"role": "user", "content": "What is it?"}]]
    method = SequentialMonteCarlo(num_particles=3, tokens_per_step=3, twist="rewards")
    draws = Sampler(model, chat_tokenizer, [length], Tilt(1.0), method, SamplingSettings(8)).sample(prompts, 3)
    row = draws.to_dataset()[0]
    assert row["prompt"] == prompts[0] and row["completion"] == [{"role": "assistant", "content": draws.texts[0]}]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_a_proposal_stops_where_the_prior_does(folders: dict[str, str], tokenizer: Any) -> None:
    """Whatever its own generation config says; otherwise its draws were no outcomes of the prior."""
    models = {name: AutoModelForCausalLM.from_pretrained(folders[name]) for name in ("prior", "policy")}
    letter = tokenizer.get_vocab()["b"]
    models["prior"].generation_config.eos_token_id = [tokenizer.eos_token_id, letter]
    sampler = make(models, tokenizer, TILT, Importance(), proposal=models["policy"])
    draws = sampler.sample(TASK.prompts, 200)
    ends = {tokenizer.eos_token_id, letter}
    for ids, ended in zip(draws.completion_ids, draws.ended.tolist(), strict=True):
        assert ended == (ids[-1] in ends) and not {*ids[:-1]} & ends
    assert {ids[-1] for ids in draws.completion_ids} > {letter}


def test_names_of_methods() -> None:
    """All that the package has, each under a name of its own, by which its class is found."""
    classes = [value for value in vars(samplers).values() if isinstance(value, type) and issubclass(value, Method)]
    assert {*METHODS.values()} == {*classes} - {Method}
    assert all(METHODS[method.name] is method for method in METHODS.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"seed": -1}, "`seed` must be at least 0"),
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"temperature": math.inf}, "`temperature` must be positive"),
        ({"num_prior_samples": 1}, "`num_prior_samples` must be at least 2"),
        ({"reward_funcs": []}, "give at least one reward function"),
        ({"reward_weights": torch.ones(2)}, "2 reward weights for 1 reward functions"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str, models: dict[str, Any], tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make(models, tokenizer, Tilt(1.0), Importance(), **settings)


def test_no_prompts_and_no_draws(models: dict[str, Any], tokenizer: Any) -> None:
    sampler = make(models, tokenizer, Tilt(1.0), Importance())
    with pytest.raises(ValueError, match="`n` must be at least 1, got 0"):
        sampler.sample(TASK.prompts, 0)
    with pytest.raises(ValueError, match="no prompts"):
        sampler.sample([], 3)


def test_unbounded_evidence(models: dict[str, Any], tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="needs evidence with a known upper bound"):
        make(models, tokenizer, Tilt(1.0), Rejection())
    for target in (Moments({"reward_func": 0.5}), Product([Calibrated(best_of_n(2)), Tilt(1.0)])):  # never have one
        with pytest.raises(ValueError, match="needs evidence with a known upper bound"):
            Rejection().check(target, has_proposal=False)
    Rejection().check(Product([Calibrated(best_of_n(2)), Constraint()]), has_proposal=False)
    with pytest.raises(ValueError, match="leave the proposal out"):
        make(models, tokenizer, Constraint(), Rejection(), proposal=models["policy"])


def test_a_policy_with_another_tokenizer(models: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    for name in ("letters", "larger"):
        with pytest.raises(ValueError, match="another vocabulary than the prior's"):
            make(models, tokenizer, Tilt(1.0), Importance(), proposal=models[name])
    models["larger"].save_pretrained(tmp_path)  # without a tokenizer beside it
    alone = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocabulary of 4 tokens, the prior one of 3"):
        make(models, tokenizer, Tilt(1.0), Importance(), proposal=alone)


@pytest.mark.parametrize("method", [Importance(), QuasiRejection(), MetropolisHastings(), SequentialMonteCarlo()])
def test_a_proposal_without_support(method: Method, folders: dict[str, str], models: Any, tokenizer: Any) -> None:
    mute = AutoModelForCausalLM.from_pretrained(folders["policy"])
    mute.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([0]), -math.inf)
    )
    sampler = make(models, tokenizer, Tilt(1.0), method, proposal=mute)
    with pytest.raises(ValueError, match="The proposal never produces '[ab ]*a[ab ]*', which the posterior does"):
        sampler.sample(TASK.prompts, 5)
    # without evidence for what it leaves out it may be used
    no_a = make(models, tokenizer, Constraint(threshold=-9), Importance(), proposal=mute, reward_funcs=[_minus_ten_a])
    assert len(no_a.sample(TASK.prompts, 5)) == 10


def _minus_ten_a(completions: list[str], **kwargs: Any) -> list[float]:
    return [-10.0 * text.count("a") for text in completions]


def test_infinite_evidence(models: dict[str, Any], tokenizer: Any) -> None:
    class Infinite(Tilt):
        def log_potential(self, rewards: Tensor) -> Tensor:
            return torch.full_like(rewards[:, 0], math.inf)

    with pytest.raises(
        ValueError,
        match=r"^The target Infinite\(beta=1.0\) returned \+inf as log-potential, which no posterior can have",
    ):
        make(models, tokenizer, Infinite(1.0), Importance()).sample(TASK.prompts, 2)
