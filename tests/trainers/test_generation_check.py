"""A training stops where the distribution that generation samples is not the one that scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from tests.helpers.architectures import build_model
from tests.helpers.trainers import QUIET, TRAINERS
from trl_bayes.benchmarks.tiny import build_tiny_tokenizer, letter_count_task
from trl_bayes.language_models import batching
from trl_bayes.trainers.generation_check import refuse_other_generation


TASK = letter_count_task()
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: build_model(root / name, name) for name in ("llama", "xlnet")}


@pytest.fixture
def make(folders: dict[str, str], tmp_path: Path) -> Make:
    def build(architecture: str, kind: str = "kl_rl", prompts: Any = None, peft: Any = None, **settings: Any) -> Any:
        row = TRAINERS[kind]
        defaults = {
            **QUIET,
            "output_dir": str(tmp_path),
            "learning_rate": 0.0,
            "max_steps": 1,
            "num_generations": 4,
            "per_device_train_batch_size": 16,
            "max_completion_length": TASK.max_completion_length,
        }
        args = row.config(**{**defaults, **settings})
        data = TASK.dataset(16) if prompts is None else prompts
        return row.trainer(folders[architecture], TASK.reward_func, args, data, peft_config=peft)

    return build


def break_cache(model: Any) -> None:
    """With a cache, what is predicted is that of the token before in the vocabulary."""
    forward = model.forward

    def predict(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if (ids := kwargs.get("input_ids")) is not None and ids.size(1) == 1 and kwargs.get("use_cache"):
            output.logits = output.logits.roll(1, dims=-1)
        return output

    model.forward = predict


def break_padding(model: Any) -> None:
    """Generation does not say what is padding."""
    prepare = model.prepare_inputs_for_generation

    def without_mask(*args: Any, **kwargs: Any) -> Any:
        return {k: v for k, v in prepare(*args, **kwargs).items() if k not in ("attention_mask", "position_ids")}

    model.prepare_inputs_for_generation = without_mask


def test_xlnet_is_refused(make: Make) -> None:
    """Total variation up to .48 between what is sampled and what is scored: it trained without a word."""
    with pytest.raises(
        ValueError,
        match=r"XLNetLMHeadModel generates from another .*\(total variation 0\.\d+ .* other inputs than its",
    ):
        make("xlnet").train()


@pytest.mark.parametrize("kind", ["kl_rl", "dpg", "f_dpg", "tb", "ctrl", "xpo"])
def test_every_trainer_refuses_a_wrong_cache(kind: str, make: Make) -> None:
    trainer = make("llama", kind, **({"num_prior_samples": 13} if kind in ("ctrl", "xpo") else {}))
    break_cache(trainer.model)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match="LlamaForCausalLM generates from .* its cache .*`check_log_probs=False`"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_what_its_sentence_says_helps(make: Make) -> None:
    for settings in ({"generation_kwargs": {"use_cache": False}}, {"check_log_probs": False}):
        trainer = make("llama", **settings)
        break_cache(trainer.model)
        trainer.train()


def test_padding_that_generation_reads(make: Make) -> None:
    trainer = make("llama")
    break_padding(trainer.model)
    with pytest.raises(ValueError, match="behind padding .* use prompts of equal length"):
        trainer.train()
    trainer = make("llama", prompts=TASK.dataset(16).map(lambda row: {"prompt": "a b"}))
    break_padding(trainer.model)
    trainer.train()


def test_adapters(make: Make) -> None:
    from peft import LoraConfig

    trainer = make("llama", peft=LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.train()
    trainer = make("llama", peft=LoraConfig(r=2, target_modules=["q_proj"]))
    break_cache(trainer.model.get_base_model())
    with pytest.raises(ValueError, match="generates from another"):
        trainer.train()


def test_it_costs_two_short_forward_passes_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no random number: what is sampled is the same with it and without."""
    passes: list[int] = []
    forward = batching.law_of_forward_pass

    def count(model: Any, tokens: torch.Tensor, number: int) -> torch.Tensor:
        passes.append(len(tokens))
        return forward(model, tokens, number)

    monkeypatch.setattr(batching, "law_of_forward_pass", count)
    ends = []
    for checked in (True, False):
        trainer = make("llama", max_steps=2, learning_rate=1e-2, check_log_probs=checked)
        trainer.train()
        ends.append(next(iter(trainer.model.parameters())).detach())
        assert len(passes) == 2
    assert max(passes) <= 16 + 3
    assert torch.equal(*ends)


@pytest.mark.parametrize("attribute", ["use_vllm", "use_transformers_continuous_batching", "rollout_func"])
def test_what_others_sample_is_not_generated_again(attribute: str, make: Make) -> None:
    trainer = make("llama")
    break_cache(trainer.model)
    prompts = {"prompt_ids": torch.tensor([[1, 2]]), "prompt_mask": torch.ones(1, 2)}
    with pytest.raises(ValueError, match="generates from another"):
        refuse_other_generation(trainer, prompts)
    refuse_other_generation(trainer, prompts | {"num_images": [1]})
    setattr(trainer, attribute, True)
    refuse_other_generation(trainer, prompts)


def test_a_generate_of_the_models_own_that_tells_tokens_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes what it is given and returns a tensor, so there is nothing to compare."""
    trainer = make("llama")
    generate = trainer.model.generate

    def tokens(*args: Any, **kwargs: Any) -> torch.Tensor:
        found = generate(*args, **kwargs)
        return found if isinstance(found, torch.Tensor) else found.sequences

    monkeypatch.setattr(trainer.model, "generate", tokens)
    trainer.train()
    assert trainer.state.global_step == 1


def test_encoder_decoder_models_are_refused(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer("abcdef")
    start = tokenizer.pad_token_id
    sizes = {"vocab_size": len(tokenizer), "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, decoder_start_token_id=start, pad_token_id=start)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    args = TRAINERS["kl_rl"].config(**QUIET, output_dir=str(tmp_path), num_generations=4)
    with pytest.raises(
        ValueError, match="^T5ForConditionalGeneration is an encoder-decoder model, and .* decoder-only"
    ):
        TRAINERS["kl_rl"].trainer(str(tmp_path), TASK.reward_func, args, TASK.dataset(16))
