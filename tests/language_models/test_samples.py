"""Sampling and scoring against enumeration: the samples have the model's distribution, and the scores are exact.

Each chi-square test has a fixed seed and accepts p-values above 1e-4: a correct sampler with another seed would fail
once in 10,000.
"""

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tests.helpers.chi_square import chi_square_p_value
from trl_bayes.benchmarks.tiny import EnumerableTask, balance_task
from trl_bayes.language_models.completions import Completions
from trl_bayes.language_models.mixed import MixedModel
from trl_bayes.language_models.samples import sample, score
from trl_bayes.language_models.scoring import log_probs
from trl_bayes.language_models.settings import SamplingSettings


TASK: EnumerableTask = balance_task()  # prompts of one and of three tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return TASK.build_model(tmp_path_factory.mktemp("balance"))


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def draw(model: Any, tokenizer: PreTrainedTokenizerBase, num_per_prompt: int, **settings: Any) -> Completions:
    settings = {"max_new_tokens": TASK.max_completion_length, **settings}
    return sample(model, tokenizer, TASK.prompts, num_per_prompt, SamplingSettings(**settings))


def enumerated(
    model: Any, tokenizer: PreTrainedTokenizerBase, temperature: float = 1.0
) -> dict[tuple[int, tuple[int, ...]], float]:
    """log pi of every (prompt, completion)."""
    completions = TASK.completions(tokenizer)
    rows = [tuple(ids[mask].tolist()) for ids, mask in zip(completions.ids, completions.mask, strict=True)]
    values = TASK.log_probs(model, tokenizer, temperature)
    return {(p, row): values[p, i].item() for p in range(len(TASK.prompts)) for i, row in enumerate(rows)}


def p_value(samples: Completions, exact: dict[tuple[int, tuple[int, ...]], float]) -> float:
    observed = dict.fromkeys(exact, 0)
    for outcome in samples.outcomes():
        observed[outcome] += 1
    num_prompts = len(samples.prompts)
    expected = torch.tensor(list(exact.values()), dtype=torch.float64).exp() * (len(samples) // num_prompts)
    return chi_square_p_value(torch.tensor(list(observed.values())), expected, num_laws=num_prompts)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_models_distribution(
    model: Any, tokenizer: PreTrainedTokenizerBase, temperature: float
) -> None:
    samples = draw(model, tokenizer, 3000, temperature=temperature, batch_size=2000)
    assert p_value(samples, enumerated(model, tokenizer, temperature)) > 1e-4
    # the test sees a distribution that is off
    assert p_value(samples, enumerated(model, tokenizer, temperature * 1.3)) < 1e-4


def test_the_models_generation_settings_do_not_matter(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    plain = draw(model, tokenizer, 20)
    own = model.generation_config
    try:
        model.generation_config = type(own)(
            eos_token_id=own.eos_token_id, do_sample=True, top_k=1, repetition_penalty=3.0, min_p=0.5
        )
        changed = model.generation_config
        assert draw(model, tokenizer, 20).completion_ids == plain.completion_ids
        assert model.generation_config is changed
    finally:
        model.generation_config = own


def test_the_seed_is_all_that_matters(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    state = torch.random.get_rng_state()
    model.train()
    first = draw(model, tokenizer, 8, seed=3)
    assert model.training
    model.eval()
    torch.rand(5)
    assert draw(model, tokenizer, 8, seed=3).completion_ids == first.completion_ids
    assert draw(model, tokenizer, 8, seed=4).completion_ids != first.completion_ids
    torch.random.set_rng_state(state)
    draw(model, tokenizer, 2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_samples_hold(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    samples = draw(model, tokenizer, 60)
    eos = tokenizer.eos_token_id
    assert len(samples) == 60 * len(TASK.prompts)
    assert samples.prompt_index.tolist() == [p for p in range(len(TASK.prompts)) for _ in range(60)]
    assert 0 < samples.ended.sum() < len(samples)
    for ids, text, ended in zip(samples.completion_ids, samples.texts, samples.ended.tolist(), strict=True):
        assert eos not in ids[:-1] and (ids[-1] == eos) == ended
        assert ended or len(ids) == TASK.max_completion_length
        assert text == tokenizer.decode([token for token in ids if token != eos])
    assert all(eos not in tokens for tokens in samples.tokens())
    chosen = samples.select(torch.tensor([5, 70]))
    assert chosen.texts == [samples.texts[5], samples.texts[70]]
    assert chosen.prompt_index.tolist() == [0, 1] and len(chosen) == 2
    assert len(samples.select(torch.tensor([], dtype=torch.int64))) == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_log_probs_are_exact(
    model: Any, tokenizer: PreTrainedTokenizerBase, temperature: float, batch_size: int
) -> None:
    """Also batch = one by one: prompts and completions of several lengths share a batch."""
    samples = draw(model, tokenizer, 30)
    exact = enumerated(model, tokenizer, temperature)
    expected = torch.tensor([exact[outcome] for outcome in samples.outcomes()], dtype=torch.float64)
    values = log_probs(model, samples, SamplingSettings(1, temperature, batch_size))
    assert values.dtype == torch.float64 and not values.requires_grad
    torch.testing.assert_close(values, expected, rtol=0, atol=2e-5)


def test_log_probs_of_no_samples(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    nothing = draw(model, tokenizer, 1).select(torch.tensor([], dtype=torch.int64))
    assert log_probs(model, nothing, SamplingSettings(1)).shape == (0,)
    assert score([lambda completions, **kwargs: []], nothing, tokenizer).shape == (0, 1)


def test_rewards(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    samples = draw(model, tokenizer, 3)
    calls = []

    def with_column(prompts: list[str], completions: list[str], completion_ids: list, bonus: list, **kwargs: Any):
        calls.append((prompts, completions, completion_ids))
        return bonus

    async def later(completions: list[str], **kwargs: Any) -> list[float | None]:
        await asyncio.sleep(0)
        return [None, math.inf, math.nan, *(float(len(text)) for text in completions[3:])]

    rewards = score([with_column, later], samples, tokenizer, {"bonus": [0, 1, 2, 3]})
    assert calls == [([TASK.prompts[i // 3] for i in range(12)], samples.texts, samples.completion_ids)]
    assert rewards[:, 0].tolist() == [i // 3 for i in range(12)]
    assert rewards[0, 1].isnan() and rewards[1, 1] == math.inf and rewards[2, 1].isnan()
    assert samples.with_known(rewards=rewards).rewards[1].isnan().all()
    assert rewards[3:, 1].tolist() == [len(text) for text in samples.texts[3:]]


def test_bad_rewards(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    samples = draw(model, tokenizer, 1)
    with pytest.raises(ValueError, match="'<lambda>' returned 2 rewards for 4 completions"):
        score([lambda **kwargs: [1.0, 2.0]], samples, tokenizer)
    with pytest.raises(ValueError, match="The column 'bonus' has 1 entries for 4 prompts"):
        score([], samples, tokenizer, {"bonus": [1]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_per_prompt": 0}, "`num_per_prompt` must be at least 1"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"temperature": math.nan}, "`temperature` must be positive"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": ["a", ""]}, "The prompt '' has no tokens"),
    ],
)
def test_bad_input(model: Any, tokenizer: PreTrainedTokenizerBase, changes: dict[str, Any], message: str) -> None:
    settings = {"prompts": ["a"], "num_per_prompt": 1, "max_new_tokens": 2, **changes}
    prompts, num_per_prompt = settings.pop("prompts"), settings.pop("num_per_prompt")
    with pytest.raises(ValueError, match=message):
        sample(model, tokenizer, prompts, num_per_prompt, SamplingSettings(**settings))


def test_messages(tiny_models: Any, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    prompts = [[{"role": "user", "content": "Hello?"}], "plain text"]
    samples = sample(model, chat_tokenizer, prompts, 2, SamplingSettings(5))
    seen = []
    score([lambda completions, **kwargs: seen.append(completions) or [0.0] * 4], samples, chat_tokenizer)
    assert seen[0][0] == [{"role": "assistant", "content": samples.texts[0]}]
    assert seen[0][2] == samples.texts[2]
    assert "assistant" in chat_tokenizer.decode(samples.prompt_ids[0])
    one_by_one = [log_probs(model, samples.select(torch.tensor([i])), SamplingSettings(5)).item() for i in range(4)]
    torch.testing.assert_close(
        log_probs(model, samples, SamplingSettings(5)),
        torch.tensor(one_by_one, dtype=torch.float64),
        rtol=0,
        atol=2e-5,
    )


def test_an_adapter_on_a_base_with_settings(folder: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base: Any = AutoModelForCausalLM.from_pretrained(folder)
    plain = draw(base, tokenizer, 10).completion_ids
    base.generation_config.top_k = 1
    base.generation_config.do_sample = True
    own = base.generation_config
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    assert draw(adapted, tokenizer, 10).completion_ids == plain  # a new adapter changes nothing
    assert base.generation_config is own


def test_what_another_model_of_the_family_has_no_token_for_has_no_probability(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: str
) -> None:
    drawn = draw(model, tokenizer, 3)
    settings = SamplingSettings(TASK.max_completion_length)
    unknown = [*drawn.completion_ids]
    unknown[1] = [0, model.config.vocab_size]
    found = log_probs(model, replace(drawn, completion_ids=unknown), settings)
    expected = log_probs(model, drawn, settings)
    assert found[1] == -math.inf and torch.equal(found[[0, 2, 3, 4, 5]], expected[[0, 2, 3, 4, 5]])


def test_a_mixture_of_models_with_more_and_fewer_rows_of_embeddings(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: str
) -> None:
    larger = AutoModelForCausalLM.from_pretrained(folder)
    larger.resize_token_embeddings(16)
    drawn, settings = draw(model, tokenizer, 3), SamplingSettings(TASK.max_completion_length)
    found = log_probs(cast(Any, MixedModel([larger, model], [0.5, 0.5])), drawn, settings)
    torch.testing.assert_close(found, log_probs(model, drawn, settings), rtol=0, atol=1e-5)
    unknown = replace(drawn, completion_ids=[[15], *drawn.completion_ids[1:]])
    assert log_probs(cast(Any, MixedModel([larger, model], [0.5, 0.5])), unknown, settings)[0] == -math.inf
