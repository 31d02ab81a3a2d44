"""What is sampled and what is scored is what a plain forward pass says, whatever the architecture.

Models are tiny and random, with prompts of several lengths, so that rows are padded. A plain forward pass has one row,
no padding and no mask. Architectures differ in how they know positions: learned ones (GPT-2), learned ones counted
from the mask (OPT), rotations (Llama, Gemma), biases (Bloom), a state (Mamba, RWKV); and some look back only so far.
Models are in training mode, where some of them have dropout that is no module.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trl_bayes.language_models.completions import Completions
from trl_bayes.language_models.generation import evaluating, generate
from trl_bayes.language_models.samples import sample
from trl_bayes.language_models.scoring import log_probs
from trl_bayes.language_models.settings import SamplingSettings
from trl_bayes.samplers import Importance, MetropolisHastings, SequentialMonteCarlo
from trl_bayes.samplers.language_model import LanguageModelSource
from trl_bayes.targets import Tilt


LETTERS = "abcdefghijkl"
EOS = len(LETTERS)
TOKENS: dict[str, Any] = {
    "vocab_size": EOS + 1,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "tie_word_embeddings": False,
}
PROMPTS = ["b", "c d", "e f g h i", "j a b"]
ROTARY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LEARNED: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT: dict[str, Any] = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama, attention dropout": lambda: transformers.LlamaConfig(**TOKENS, **ROTARY, attention_dropout=0.3),
    "mistral, sliding window": lambda: transformers.MistralConfig(**TOKENS, **ROTARY, sliding_window=3),
    "gemma 2": lambda: transformers.Gemma2Config(**TOKENS, **ROTARY, head_dim=8, sliding_window=3),
    "gpt2": lambda: transformers.GPT2Config(**TOKENS, **LEARNED),
    "opt, dropout": lambda: transformers.OPTConfig(**TOKENS, **OPT, dropout=0.3),
    "bloom": lambda: transformers.BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "mamba": lambda: transformers.MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8),
    # The padding is part of its state, so that it generates from another distribution behind it
    "rwkv": lambda: transformers.RwkvConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, context_length=64),
}
# Recurrent ones say that their fast kernels are missing; RWKV has none for the CPU
pytestmark = pytest.mark.filterwarnings("ignore:.*(kernel|RWKV|rwkv)")


def build(config: PretrainedConfig, seed: int = 0) -> Any:
    """Random weights that make predictions depend on all of the context; in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.4, generator=generator)
    return model.train()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    vocabulary = {token: i for i, token in enumerate([*LETTERS, "<eos>"])}
    letters = Tokenizer(WordLevel(vocabulary))
    letters.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    return build(CONFIGS[request.param]())


@torch.no_grad()
def plain_laws(model: Any, row: Sequence[int]) -> Tensor:
    """`log pi(.|row[:t])` for every t from 1, (L, V)."""
    with evaluating(model):
        return model(input_ids=torch.tensor([list(row)])).logits[0, -len(row) :].float().log_softmax(dim=1)


def plain_log_probs(model: Any, prompt_ids: Sequence[list[int]], index: Tensor, ids: Sequence[list[int]]) -> Tensor:
    values = []
    for p, completion in zip(index.tolist(), ids, strict=True):
        row, start = [*prompt_ids[p], *completion], len(prompt_ids[p])
        laws = plain_laws(model, row)
        values.append(sum(laws[t - 1, row[t]].item() for t in range(start, len(row))))
    return torch.tensor(values, dtype=torch.float64)


def assert_scored(model: Any, completions: Completions, settings: SamplingSettings) -> None:
    plain = plain_log_probs(model, completions.prompt_ids, completions.prompt_index, completions.completion_ids)
    torch.testing.assert_close(log_probs(model, completions, settings), plain, rtol=0, atol=1e-4)


def assert_generates(model: Any, rows: list[list[int]], length: int = 5) -> None:
    """At a temperature near 0, where samples are what is most probable."""
    with evaluating(model):
        rows_generated = generate(model, rows, SamplingSettings(length, temperature=1e-4, stop_ids=(EOS,)))
    for row, generated in zip(rows, rows_generated, strict=True):
        expected: list[int] = []
        while len(expected) < length and EOS not in expected:
            expected.append(int(plain_laws(model, [*row, *expected])[-1].argmax()))
        assert generated == expected


def test_scores_are_those_of_a_plain_forward_pass(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    settings = SamplingSettings(6, seed=3)
    completions = sample(model, tokenizer, PROMPTS, 5, settings)
    assert model.training and len(set(map(len, completions.completion_ids))) > 1
    assert_scored(model, completions, settings)


def test_generation_goes_on_as_a_plain_forward_pass_says(model: Any) -> None:
    """Also from prefixes, as samplers have them: rows of many lengths in a batch."""
    assert_generates(model, [[1], [2, 3], [4, 5, 6, 7, 8], [9, 0, 1], [0, 11, 10, 9, 8, 7, 6], [3, 3]])


@pytest.mark.parametrize("name", ["gpt2", "opt, dropout"])
@pytest.mark.parametrize(
    "method",
    [
        Importance(),
        MetropolisHastings(num_steps=3),
        MetropolisHastings("independence", num_steps=2),
        SequentialMonteCarlo(num_particles=4, tokens_per_step=1, twist="rewards"),
    ],
    ids=["importance", "prefix", "independence", "smc"],
)
def test_samplers_weigh_by_plain_forward_passes(method: Any, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every `log pi_0 - log q` that a method is given, of whole completions and of prefixes."""
    prior, proposal = build(CONFIGS[name]()), build(CONFIGS[name](), seed=1)
    checked = []

    class Checking(LanguageModelSource):
        def log_ratio(self, prompt_index: Tensor, completion_ids: list[list[int]]) -> Tensor:
            found = super().log_ratio(prompt_index, completion_ids)
            self.check(prompt_index, completion_ids, found)
            return found

        def evaluate(self, prompt_index: Tensor, completion_ids: list[list[int]]) -> Completions:
            found = super().evaluate(prompt_index, completion_ids)
            self.check(prompt_index, completion_ids, found.log_weights - found.phi)
            return found

        def check(self, prompt_index: Tensor, completion_ids: list[list[int]], found: Tensor) -> None:
            both = [plain_log_probs(m, self.prompt_ids, prompt_index, completion_ids) for m in (prior, proposal)]
            torch.testing.assert_close(found, both[0] - both[1], rtol=0, atol=1e-4)
            checked.extend(completion_ids)

    def length(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(text.split())) for text in completions]

    target = Tilt(5.0)
    target.bind(["length"])
    source = Checking(
        prior,
        tokenizer,
        [length],
        target,
        PROMPTS,
        SamplingSettings(4),
        proposal=proposal,
        columns={},
        prompt_keys=torch.arange(len(PROMPTS)),
    )
    draws = method.draw(source, 3, numpy.random.default_rng(0))
    assert len(draws) == 3 * len(PROMPTS) and len(checked) >= len(draws)
    assert not isinstance(method, SequentialMonteCarlo) or {1, 2, 3, 4} <= {len(ids) for ids in checked}


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # so generation does without padding
@pytest.mark.parametrize("kind", ["lora", "prompt tuning", "prefix tuning"])
def test_adapters(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """With virtual tokens in front, logits have more places than the sequence has tokens."""
    peft = pytest.importorskip("peft")
    config = {
        "lora": lambda: peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True
        ),
        "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[kind]()
    adapted = peft.get_peft_model(build(CONFIGS["gpt2"]()), config).train()
    settings = SamplingSettings(6)
    assert_scored(adapted, sample(adapted, tokenizer, PROMPTS, 5, settings), settings)
    assert_generates(adapted, [[1], [2, 3], [4, 5, 6, 7, 8], [9, 0, 1]])


def test_a_model_that_generates_otherwise_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    """RoBERTa as a decoder counts positions from 2; `generate` counts them from 0."""
    config = transformers.RobertaConfig(
        **{**TOKENS, "pad_token_id": 1},
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        is_decoder=True,
    )
    with pytest.raises(ValueError, match="RobertaForCausalLM generates from another distribution than a forward pass"):
        sample(build(config), tokenizer, PROMPTS, 2, SamplingSettings(4))
