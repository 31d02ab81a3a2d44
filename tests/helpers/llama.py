"""The one tiny Llama of the tests."""

from typing import Any

from transformers import LlamaConfig


def llama_config(vocab_size: int, **settings: Any) -> LlamaConfig:
    """
    Two layers of width 16.

    Args:
        vocab_size (`int`): usually the length of the tokenizer.
        settings: fields of [`~transformers.LlamaConfig`] that are to differ; no special token is set unless given.
    """
    defaults: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return LlamaConfig(vocab_size=vocab_size, **{**defaults, **settings})
