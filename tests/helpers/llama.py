"""The one tiny Llama of the tests."""

from typing import Any

from transformers import LlamaConfig, PreTrainedTokenizerBase


# Of other architectures too
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
}


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a model's configuration has from its tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def llama_config(tokenizer: PreTrainedTokenizerBase, **settings: Any) -> LlamaConfig:
    """Two layers of width 16; `settings` are fields of [`~transformers.LlamaConfig`] that are to differ."""
    return LlamaConfig(**{**SIZES, **of_tokenizer(tokenizer), **settings})
