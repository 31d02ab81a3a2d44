"""Tiny causal language models of several architectures on the letters' vocabulary, with weights that do something."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    XLNetConfig,
)

from trl_bayes.benchmarks.tiny import build_tiny_tokenizer


LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, LLAMA),
    # Learned positions, which padding must not shift
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neo": (
        GPTNeoConfig,
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 128,
            "attention_types": [[["global", "local"], 1]],
            "attention_dropout": 0.1,
        },
    ),
    # Rates of dropout as numbers on modules, or read from the configuration at every call
    "opt": (
        OPTConfig,
        {
            "hidden_size": 32,
            "ffn_dim": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 128,
        },
    ),
    "llama_attention_dropout": (LlamaConfig, LLAMA | {"attention_dropout": 0.1}),
    "falcon": (
        FalconConfig,
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "attention_dropout": 0.1,
            "hidden_dropout": 0.1,
        },
    ),
    "gptj": (GPTJConfig, {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "attn_pdrop": 0.1}),
    # Noise on the router's input
    "mixtral": (MixtralConfig, LLAMA | {"num_local_experts": 2, "router_jitter_noise": 0.2}),
}
OTHERS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    # Generation gives it a mask token and a permutation, which a forward pass does not have
    "xlnet": (XLNetConfig, {"d_model": 32, "d_inner": 80, "n_layer": 2, "n_head": 4, "dropout": 0.0}),
}
"""That cannot be trained."""


def build_model(folder: Path, architecture: str, letters: str = "abcdef", seed: int = 0) -> str:
    """Saves a model and its tokenizer to a folder; matrices have standard deviation 1/sqrt(inputs), embeddings 1."""
    config_class, sizes = (ARCHITECTURES | OTHERS)[architecture]
    tokenizer = build_tiny_tokenizer(letters)
    config = config_class(
        **sizes,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() >= 2:
                is_embedding = "embed" in name or "wte" in name or "wpe" in name
                weight.normal_(std=1.0 if is_embedding else weight.shape[1] ** -0.5, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
