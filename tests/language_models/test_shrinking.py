"""Rows that have ended leave the batch: the law stays the model's, and fewer rows are computed."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from trl_bayes.language_models import shrinking
from trl_bayes.language_models.generation import generate
from trl_bayes.language_models.settings import SamplingSettings


STOP, VOCABULARY, LONGEST, ROWS = 0, 5, 24, 400
SETTINGS = SamplingSettings(LONGEST, stop_ids=(STOP,))


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(8 if weights.dim() > 1 else 1)  # laws that depend on the text
    return model


def computed(model: PreTrainedModel, rows: list[list[int]]) -> tuple[list[list[int]], int]:
    """What is generated, and for how many rows the model was called, all steps together."""
    calls: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    torch.manual_seed(1)
    continued = generate(model, rows, SETTINGS)
    hook.remove()
    return continued, sum(calls)


def test_computes_few_rows_that_have_ended(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most twice those that go on, but for the last seven, of which each is computed to the end."""
    continued, rows = computed(model, [[1, 2], [3]] * (ROWS // 2))
    needed = sum(len(each) for each in continued)
    assert needed < rows < 2 * needed + 7 * LONGEST + 50
    monkeypatch.setattr(shrinking, "_goes_on_from_a_cache", lambda *args: False)
    assert computed(model, [[1, 2], [3]] * (ROWS // 2))[1] > 2.5 * needed


def test_each_row_goes_on_from_its_own_text(model: LlamaForCausalLM) -> None:
    """
    Its tokens behind the choices are as likely, under a forward pass of this row, as the model's own entropy says.

    3.9 standard errors: fails once in 10,000. With rows mixed up it is off by more than 20 of them.
    """
    prompts = [[1, 2], [3]] * 300
    torch.manual_seed(2)
    surprises, variances = [], []
    for prompt, new in zip(prompts, generate(model, prompts, SETTINGS), strict=True):
        with torch.no_grad():
            log_laws = model(input_ids=torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1].log_softmax(1)
        for log_law, token in list(zip(log_laws.double(), new, strict=True))[4:]:
            entropy = -(log_law.exp() * log_law).sum()
            surprises.append((-log_law[token] - entropy).item())
            variances.append((log_law.exp() * (log_law + entropy) ** 2).sum().item())
    assert len(surprises) > 1000
    assert abs(sum(surprises)) < 3.9 * sum(variances) ** 0.5


@pytest.mark.parametrize("what", ["another cache", "a cache that is not gone on from"])
def test_does_not_shrink_where_it_may_not(what: str, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "another cache":
        model.generation_config = GenerationConfig()
        plain = shrinking.generate_plainly

        def with_static_cache(model: Any, ids: Any, mask: Any, config: Any, **further: Any) -> Any:
            cache = StaticCache(config=model.config, max_cache_len=64)
            return plain(model, ids, mask, config, **{"past_key_values": cache, **further})

        monkeypatch.setattr(shrinking, "generate_plainly", with_static_cache)
    else:
        monkeypatch.setattr(shrinking, "tolerance", lambda model: -1.0)
    continued, rows = computed(model, [[1, 2], [3]] * 20)
    longest = max(len(each) for each in continued)
    assert rows >= 40 * longest and all(len(each) in range(1, LONGEST + 1) for each in continued)
