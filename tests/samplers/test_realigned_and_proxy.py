"""Realigned and proxy-tuned sampling: the law of each token is the mixture, and what is missing is refused."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from trl_bayes.benchmarks.laws import kl, mixed_by_token
from trl_bayes.benchmarks.tiny import EnumerableTask, build_tiny_model
from trl_bayes.language_models.mixed import MixedModel
from trl_bayes.samplers import METHODS, Importance, Method, Proxy, Realigned, Sampler, SamplingSettings
from trl_bayes.targets import Tilt


def _reward(texts: list[str]) -> list[float]:
    return [text.count("a") - text.count("b") / 2 for text in texts]


TASK = EnumerableTask("ab", 3, ("a", "b a"), _reward)  # 15 completions; prompts of one and of two tokens
SETTINGS = SamplingSettings(TASK.max_completion_length, batch_size=2000)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    paths = {
        "prior": TASK.build_model(folder / "prior"),
        "policy": build_tiny_model(folder / "policy", "ab", seed=9),
        "small": build_tiny_model(folder / "small", "ab", seed=5, hidden_size=16, num_layers=1, num_heads=2),
        "other": build_tiny_model(folder / "other", "ba", seed=9),
    }
    return {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in paths.items()}


@pytest.fixture(scope="module")
def tokenizer(models: dict[str, Any]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(models["prior"].config._name_or_path)


def sampler(models: dict[str, Any], tokenizer: Any, method: Method, **others: Any) -> Sampler:
    return Sampler(models["prior"], tokenizer, [TASK.reward_func], Tilt(0.7), method, SETTINGS, **others)


CASES = {
    "realigned": (Realigned(1.7), {"proposal": "policy"}, (-0.7, 1.7)),
    "proxy": (Proxy(0.8), {"proposal": "policy", "proposal_base": "small"}, (1.0, 0.8, -0.8)),
}


@pytest.mark.parametrize("name", CASES)
def test_draws_have_the_mixed_law_and_exact_weights(
    name: str, models: dict[str, Any], tokenizer: PreTrainedTokenizerBase, p_value: Any
) -> None:
    method, roles, coefficients = CASES[name]
    others = {role: models[of] for role, of in roles.items()}
    draws = sampler(models, tokenizer, method, **others).sample(TASK.prompts, 2000)
    log_laws = [TASK.log_probs(model, tokenizer) for model in (models["prior"], *others.values())]
    completions = TASK.completions(tokenizer)
    mixed = mixed_by_token(completions, log_laws, coefficients)  # (P, N)
    torch.testing.assert_close(mixed.exp().sum(dim=1), torch.ones(2).double())
    rows = [tuple(ids[mask].tolist()) for ids, mask in zip(completions.ids, completions.mask, strict=True)]
    places = torch.tensor([rows.index(tuple(ids)) for ids in draws.completion_ids])
    for prompt in range(2):
        counts = torch.bincount(places[draws.prompt_index == prompt], minlength=len(rows)).double()
        assert p_value(counts, mixed[prompt].exp()) > 1e-4  # fails once in 10,000
        assert p_value(counts, log_laws[0][prompt].exp()) < 1e-4  # and it is not the prior's
    expected = log_laws[0] + TASK.rewards(tokenizer) / 0.7 - mixed
    torch.testing.assert_close(draws.log_weights, expected[draws.prompt_index, places], rtol=0, atol=1e-4)


def test_factors_that_are_known(models: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """0 is the prior, 1 the policy; the same policy as its own base adds nothing."""
    prior, policy = (TASK.log_probs(models[name], tokenizer) for name in ("prior", "policy"))
    for method, others, law in (
        (Realigned(0.0), {"proposal": models["policy"]}, prior),
        (Realigned(), {"proposal": models["policy"]}, policy),
        (Proxy(), {"proposal": models["policy"], "proposal_base": models["policy"]}, prior),
    ):
        mixed = sampler(models, tokenizer, method, **others).proposal
        torch.testing.assert_close(TASK.log_probs(mixed, tokenizer), law, rtol=0, atol=1e-5)


def test_realigning_a_posterior_is_close_to_that_of_another_temperature(
    models: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Mixing whole completions would be exact; by token it is nearly so."""
    prior, rewards = TASK.log_probs(models["prior"], tokenizer), TASK.rewards(tokenizer)
    trained = (prior + rewards).log_softmax(dim=1)
    distances = []
    for factor in (1.0, 2.0, 4.0):
        wanted = (prior + factor * rewards).log_softmax(dim=1)
        got = mixed_by_token(TASK.completions(tokenizer), [prior, trained], [1 - factor, factor])
        distances.append(kl(wanted, got).mean().item())
        assert kl(wanted, trained).mean() > 20 * distances[-1] - 1e-12
    assert abs(distances[0]) < 1e-12 and 1e-4 < min(distances[1:]) < max(distances) < 0.005


def test_tokens_beyond_the_smallest_vocabulary_have_no_probability(models: dict[str, Any]) -> None:
    mixed = MixedModel([models["prior"], models["policy"]], [0.5, 0.5])
    mixed._sizes = [2, 3]
    assert mixed(torch.tensor([[0, 1]])).logits[..., 2].isneginf().all()


@pytest.mark.parametrize("method", [Realigned(), Proxy()], ids=lambda method: method.name)
def test_a_method_without_its_models_is_refused(
    method: Method, models: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    assert METHODS[method.name] is type(method)
    with pytest.raises(ValueError, match="set `proposal_model_name_or_path`"):
        sampler(models, tokenizer, method)
    with pytest.raises(ValueError, match="another vocabulary than the prior's"):
        base = {"proposal_base": models["prior"]} if method.needs_base else {}
        sampler(models, tokenizer, method, proposal=models["other"], **base)


def test_a_base_belongs_to_proxy_alone(models: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="compares the proposal with what it was trained from"):
        sampler(models, tokenizer, Proxy(), proposal=models["policy"])
    with pytest.raises(ValueError, match="The tokenizer of the proposal's base has another vocabulary"):
        sampler(models, tokenizer, Proxy(), proposal=models["policy"], proposal_base=models["other"])
    with pytest.raises(ValueError, match="does not read what the proposal was trained from"):
        sampler(models, tokenizer, Importance(), proposal=models["policy"], proposal_base=models["small"])


@pytest.mark.parametrize("factor", [-0.1, float("nan"), float("inf")])
def test_bad_factors(factor: float) -> None:
    for method in (Realigned, Proxy):
        with pytest.raises(ValueError, match="`factor` must be finite and at least 0"):
            method(factor)
