"""What reward functions see outside training is, completion by completion, what TRL's trainer hands to them."""

import copy
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import add_response_schema

from trl_bayes.language_models.parsing import as_rewards_see_them


TEXTS = [
    "plain<|im_end|>",
    "<think>\nso\n</think>\n\nanswer<|im_end|>",
    "<think>\nnever ends",
    '<tool_call>\n{"name": "add", "arguments": {"a": 3}}\n</tool_call><|im_end|>',
    '<tool_call>\n{"name": 7',
    "cut",
    "<|im_end|>",
    " <think></think> <|im_start|><|im_end|>",
]


@pytest.mark.parametrize("conversational", [True, False])
@pytest.mark.parametrize("template", [True, False])
def test_as_in_training(
    template: bool,
    conversational: bool,
    tiny_models: Any,
    chat_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer = add_response_schema(tokenizer) if template else tokenizer
    seen: dict[str, Any] = {}

    def reward(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0] * len(kwargs["completions"])

    trainer = GRPOTrainer(
        tiny_models.policy,
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_dict({"prompt": ["a"]}),
        processing_class=tokenizer,
    )
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *args, **kwargs: (ids, None))
    prompt: Any = [{"role": "user", "content": "3?"}] if conversational else "3 is"
    prompt_ids, *_ = trainer._tokenize_prompts([prompt])
    trainer._generate_and_score_completions([{"prompt": prompt}] * len(ids))
    found = as_rewards_see_them(tokenizer, [prompt] * len(ids), prompt_ids * len(ids), ids)
    assert found == seen["completions"] and len(found) == len(ids)
    if template and conversational:
        assert found[1][0]["content"] == "answer" and "so" in str(found[1][0].keys() | set(found[1][0].values()))
    elif conversational:
        assert "<think>" in found[1][0]["content"]
    else:
        assert isinstance(found[1], str)


def test_a_completion_without_tokens(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    """As a sampler looks at, before the first token."""
    prompt = [{"role": "user", "content": "3?"}]
    for tokenizer in (chat_tokenizer, add_response_schema(copy.deepcopy(chat_tokenizer))):
        assert as_rewards_see_them(tokenizer, [prompt, "x"], [[1], [1]], [[], []]) == [
            [{"role": "assistant", "content": ""}],
            "",
        ]
