"""Which prompts a model can continue: those that fit into its positions, have tokens, and can be written as a chat."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_bayes.language_models.prompts import check_prompt, check_prompts, number_of_positions


ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SMALL = {"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 600, **ENDS}
LLAMA = {**SMALL, "intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 24}
GPT = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 600, "n_positions": 24, **ENDS}
NEO = {"hidden_size": 8, "num_heads": 2, "num_layers": 1, "attention_types": [[["global"], 1]], "vocab_size": 600}
OPT = {**SMALL, "num_hidden_layers": 1, "ffn_dim": 8, "max_position_embeddings": 24, "word_embed_proj_dim": 8}
MODELS: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT)),
    "gpt_bigcode": lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(**GPT)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**GPT, rotary_dim=2)),
    "gpt_neo": lambda: GPTNeoForCausalLM(GPTNeoConfig(**NEO, max_position_embeddings=24, **ENDS)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**LLAMA)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=600, **ENDS)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_number_of_positions_is_where_a_model_stops(name: str) -> None:
    """A model with a number reads so many tokens and no more; one without reads more than its configuration says."""
    model = MODELS[name]().eval()
    assert runs(model, 24)
    assert number_of_positions(model) == (None if runs(model, 25) else 24)
    assert (number_of_positions(model) is None) == (name in ("llama", "gpt_neox", "bloom"))


def runs(model: PreTrainedModel, length: int) -> bool:
    try:
        with torch.no_grad():
            model(torch.ones(1, length, dtype=torch.int64))
    except (IndexError, RuntimeError):
        return False
    return True


def test_an_adapter_has_the_positions_of_its_base() -> None:
    model = get_peft_model(MODELS["gpt2"](), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert number_of_positions(model) == 24


def check(prompts: list[Any], tokenizer: Any, model: str = "gpt2", length: int = 4, **kwargs: Any) -> None:
    check_prompts(prompts, tokenizer, MODELS[model](), max_completion_length=length, **kwargs)


def test_texts_up_to_the_last_position(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokens are counted, not bytes: a text of more bytes than positions fits if its tokens do."""
    word = "assistant"
    assert len(chat_tokenizer(word)["input_ids"]) < len(word) / 3
    tokens = chat_tokenizer(word * 30)["input_ids"]
    for number in (20, 21):
        text = chat_tokenizer.decode(tokens[:number])
        assert len(chat_tokenizer(text)["input_ids"]) == number and len(text) > 24
        if number == 20:
            check(["a", text], chat_tokenizer)
        else:
            with pytest.raises(ValueError, match="A prompt of 21 tokens and a completion .* the model's 24 positions"):
                check(["a", text], chat_tokenizer)
    check([chat_tokenizer.decode(tokens[:21])], chat_tokenizer, length=3)
    check([word * 1000], chat_tokenizer, model="llama")


@pytest.mark.parametrize("think", [True, False])
def test_messages_with_their_template(think: bool, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    """What the template adds counts, and depends on what it is given."""
    prompt = [{"role": "user", "content": "a"}]
    kwargs = {"chat_template_kwargs": {"enable_thinking": think}}
    encoded: Any = chat_tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=True, enable_thinking=think
    )
    room = 24 - len(encoded["input_ids"])
    check([prompt], chat_tokenizer, length=room, **kwargs)
    with pytest.raises(ValueError, match=f"A prompt of {24 - room} tokens"):
        check([prompt], chat_tokenizer, length=room + 1, **kwargs)


def test_messages_without_a_template(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    bare = copy.deepcopy(chat_tokenizer)
    bare.chat_template = None
    check(["a"], bare)
    with pytest.raises(ValueError, match="the tokenizer has no chat template") as caught:
        check(["a", [{"role": "user", "content": "a"}]], bare, model="llama")
    assert "\n" not in str(caught.value)


def test_a_text_without_tokens(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    check([" "], chat_tokenizer)
    for model in ("gpt2", "llama"):
        with pytest.raises(ValueError, match="The prompt '' has no tokens"):
            check(["a", ""], chat_tokenizer, model)


BLANK = {"role": "user", "content": None}


@pytest.mark.parametrize(
    "prompt",
    [None, 3, 1.5, True, [], ["a"], [{"content": "a"}], {"role": "user"}, [["a"]]]
    + [[BLANK], [{"role": "user"}], [{"role": "system", "content": "a"}, BLANK], [{"role": "user", "content": 3}]],
)
def test_what_is_no_prompt(prompt: Any) -> None:
    with pytest.raises(ValueError, match="make it a text, or a list of messages, or leave its row out"):
        check_prompt(prompt)
    with pytest.raises(ValueError, match="A prompt of the data is"):
        check(["a", prompt], object())  # also where the tokenizer is a processor, of images too


def test_a_call_of_a_tool_has_no_content() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    check_prompt([{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}])


def test_processors_are_not_asked_for_tokens() -> None:
    check(["a" * 100, [{"role": "user", "content": [{"type": "text", "text": "a"}]}]], object())


ROPE = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.0],
        "long_factor": [1.0, 4.0],
        "original_max_position_embeddings": 12,
    },
}


@pytest.mark.parametrize(("kind", "limit"), [("dynamic", 24), ("longrope", 12)])
def test_frequencies_that_depend_on_the_length(kind: str, limit: int, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    """A token is sampled with those of the length so far, and scored with those of the whole length."""
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=ROPE[kind]))
    prompt = "a" * 5
    number = len(chat_tokenizer(prompt)["input_ids"])
    check_prompts([prompt], chat_tokenizer, model, max_completion_length=limit - number)
    with pytest.raises(ValueError, match=f"the model's {limit} positions, behind which its RoPE scaling depends on"):
        check_prompts([prompt], chat_tokenizer, model, max_completion_length=limit - number + 1)


def test_a_prompt_that_ends_with_the_assistant(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.warns(UserWarning, match="TRL begins a new turn behind it"):
        check_prompts([turns], chat_tokenizer, MODELS["llama"](), max_completion_length=4)


def test_who_leaves_out_the_checks_may_go_beyond(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=ROPE["dynamic"]))
    check_prompts(["a" * 5], chat_tokenizer, model, max_completion_length=100, allow_scaling=True)
