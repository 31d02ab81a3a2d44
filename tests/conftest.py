"""Fixtures for more than one test file: tiny models, made here and saved to a folder, so nothing is downloaded."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


# Read when huggingface_hub and tokenizers are imported: a model id that is not a folder is an error, not a download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl.chat_template_utils import qwen3_chat_template

from tests.helpers.llama import SIZES, llama_config, of_tokenizer
from trl_bayes import cli
from trl_bayes.benchmarks.tiny import letter_count_task
from trl_bayes.prior import Context, PriorScores


torch.set_num_threads(1)  # tiny models are slower with more, and much slower with several workers

_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# As in Qwen3, tokens of their own that decoding keeps
_MARKERS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
_EOS_WEIGHT = 1.65  # at each token about one completion in seven ends, so that lengths differ within a batch


def pytest_collection_finish() -> None:
    """
    Keeps what imports have left, a million objects, out of all garbage collections to come.

    Every training begins with a full one, which took half of the time of a short test.
    """
    gc.collect()
    gc.freeze()


class TinyModels(NamedTuple):
    """Folders that `from_pretrained` loads. All but `other_vocabulary` have the same tokenizer."""

    policy: str  # a Llama
    prior: str  # the same architecture with other weights
    other_vocabulary: str  # a Llama with another tokenizer
    moe: str  # a Qwen3-MoE with a load-balancing loss
    reward: str  # a sequence classifier with one label


def build_chat_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerBase:
    """A byte-level BPE with Qwen3's chat template, which supports tools, and its special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([qwen3_chat_template], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    fast.add_tokens(_MARKERS)
    fast.chat_template = qwen3_chat_template
    return fast


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _raise_eos(model: PreTrainedModel, eos_token_id: int) -> None:
    """Adds about a constant to the logit of EOS, through a hidden unit that embeddings set and no layer changes."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight[..., 0, :] = 0.0
        model.get_input_embeddings().weight[:, 0] = 12.0
        model.get_output_embeddings().weight[:, 0] = 0.0
        model.get_output_embeddings().weight[eos_token_id, 0] = _EOS_WEIGHT
    model.generation_config = GenerationConfig(eos_token_id=eos_token_id)


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerBase:
    return build_chat_tokenizer()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: PreTrainedTokenizerBase) -> TinyModels:
    folder = tmp_path_factory.mktemp("tiny_models")
    with torch.random.fork_rng():
        folders = {}
        other_tokenizer = build_chat_tokenizer(vocab_size=400)
        for seed, (name, tokenizer) in enumerate(
            {"policy": chat_tokenizer, "prior": chat_tokenizer, "other_vocabulary": other_tokenizer}.items()
        ):
            torch.manual_seed(seed)
            llama = LlamaForCausalLM(llama_config(tokenizer))
            _raise_eos(llama, tokenizer.eos_token_id)
            folders[name] = _save(llama, tokenizer, folder / name)
        torch.manual_seed(3)
        moe = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **SIZES,
                **of_tokenizer(chat_tokenizer),
                moe_intermediate_size=16,
                head_dim=8,
                num_experts=4,
                num_experts_per_tok=2,
                decoder_sparse_step=1,
                router_aux_loss_coef=0.1,
            )
        )
        _raise_eos(moe, chat_tokenizer.eos_token_id)
        folders["moe"] = _save(moe, chat_tokenizer, folder / "moe")
        torch.manual_seed(4)
        reward = LlamaForSequenceClassification(llama_config(chat_tokenizer, num_labels=1))
        folders["reward"] = _save(reward, chat_tokenizer, folder / "reward")
    return TinyModels(**folders)


class FakeVLLM:
    """Stands in for vLLM: samples one prompt at a time with transformers, and returns the sampler's log-probabilities.

    `offset` is added to each of them, as a sampler with other numerics would; the last token of the first completion
    has none (`None`), as vLLM returns where it could not score a token.
    """

    offset = 0.01

    def __init__(self, model: PreTrainedModel, temperature: float, max_completion_length: int, **settings: Any):
        self.model, self.temperature, self.max_completion_length = model, temperature, max_completion_length
        self.settings = settings
        self.num_syncs = 0
        self.log_probs: list[list[float | None]] = []  # of the latest completions

    def sync_weights(self) -> None:
        self.num_syncs += 1

    def generate(self, prompts: list[list[int]], **kwargs: Any) -> tuple[Any, list[list[int]], list, None]:
        completions, self.log_probs = [], []
        config = GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            max_new_tokens=self.max_completion_length,
            eos_token_id=self.model.generation_config.eos_token_id,
            pad_token_id=self.model.generation_config.pad_token_id,
        )
        for prompt in prompts:
            ids = self.model.generate(torch.tensor([prompt]), generation_config=config)
            with torch.no_grad():
                logits = self.model(ids).logits[0, len(prompt) - 1 : -1] / self.temperature
            completion = ids[0, len(prompt) :]
            log_probs = logits.log_softmax(dim=1).gather(1, completion.unsqueeze(1)).squeeze(1)
            completions.append(completion.tolist())
            self.log_probs.append((log_probs + self.offset).tolist())
        self.log_probs[0][-1] = None
        return prompts, completions, [[[value] for value in row] for row in self.log_probs], None


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeVLLM]:
    """Makes `use_vllm=True` work without vLLM."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", FakeVLLM)
    return FakeVLLM


class Enumerated(NamedTuple):
    """The letters task: `log pi_0` (P, M) of all M completions of P prompts, their letters, the prompts' keys."""

    log_prior: Tensor
    ids: Tensor  # (M, T)
    keys: Tensor  # (P,)

    def feature(self, letter: str, place: int | None = None) -> Tensor:
        """1[the completion has the letter, at a place if one is given], `(M,)`."""
        is_letter = self.ids == "abcdef".index(letter)
        return (is_letter.any(dim=1) if place is None else is_letter[:, place]).float()

    def sample(self, rewards: Tensor, num_samples: int, seed: int) -> PriorScores:
        """Samples of the prior with the rewards `(M, K)` of each."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(self.log_prior.exp(), num_samples, replacement=True, generator=generator)  # (P, N)
        return PriorScores(rewards[drawn], self.log_prior.gather(1, drawn).float(), self.keys)

    def context(self, prompt: int) -> Context:
        """The context of all completions of a prompt."""
        return Context(self.log_prior[prompt].float(), self.keys[prompt].expand(len(self.ids)))


@pytest.fixture(scope="session")
def letters_prior(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the letters task's prior; not to be written to."""
    return letter_count_task().build_model(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="session")
def enumerated(letters_prior: str) -> Enumerated:
    task = letter_count_task()
    tokenizer = AutoTokenizer.from_pretrained(letters_prior)
    log_prior = task.log_probs(AutoModelForCausalLM.from_pretrained(letters_prior), tokenizer)
    keys = torch.tensor([7, 2**59 + 3, 5, 2**59 + 2])  # far apart and not in order, as hashes are
    return Enumerated(log_prior, task.completions(tokenizer).ids, keys)


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """
    Runs a command with a recipe that must be refused with exit code 2 and one line, and returns what that line says.

    An entry of the recipe that is `...` is left out.
    """

    def run(command: str, recipe: dict[str, Any], *flags: str) -> str:
        given = {key: value for key, value in recipe.items() if value is not ...}
        Path("recipe.yaml").write_text(yaml.safe_dump(given))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--config", "recipe.yaml", *flags])
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        lines = [line for line in error.splitlines() if line.startswith("trl-bayes")]
        assert len(lines) == 1 and error.rstrip().endswith(lines[0]) and "Traceback" not in error, error
        return lines[0].removeprefix(f"trl-bayes {command}: error: ")

    return run
