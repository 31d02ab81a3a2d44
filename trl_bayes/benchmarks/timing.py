"""Training steps on a random model, with clocks: what is common to the measurements of step time."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..language_models.settings import at_least
from .exact_training import problems, trainers
from .section import SectionArguments
from .tiny import build_tiny_tokenizer
from .trainings import TrainerSetup


_WARM_UP = 2  # steps that are not timed
_NUM_PROMPTS = 64


def measured_trainers() -> list[TrainerSetup]:
    """All that can be measured."""
    return trainers(problems()["letters"])


@dataclass(frozen=True)
class StepSize:
    r"""
    The model and the step that are measured.

    Args:
        hidden_size, num_layers, vocab_size (`int`): of a randomly initialized Llama.
        max_completion_length, batch_size, num_generations (`int`): of a step; the batch is that of each process.
        steps (`int`): timed steps of a measurement, after two that are not.
        use_cpu (`bool`): train on the CPU though there is a GPU.
        bf16 (`bool`): train in bfloat16.
    """

    hidden_size: int = 256
    num_layers: int = 4
    vocab_size: int = 8192
    max_completion_length: int = 48
    batch_size: int = 32
    num_generations: int = 8
    steps: int = 8
    use_cpu: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in ("num_layers", "max_completion_length", "num_generations", "steps"):
            at_least(name, getattr(self, name))
        if self.hidden_size < 64 or self.hidden_size % 64:
            raise ValueError(f"`hidden_size={self.hidden_size}` must be a multiple of 64, the size of a head.")
        if self.batch_size < 1 or self.batch_size % self.num_generations:
            raise ValueError(
                f"`batch_size={self.batch_size}` must be a multiple of `num_generations={self.num_generations}`."
            )
        if self.vocab_size <= _NUM_PROMPTS + 1:
            raise ValueError(f"`vocab_size={self.vocab_size}` is too small for the prompts: set at least 66.")


@dataclass
class SizeArguments(SectionArguments):
    r"""
    Arguments of a section that measures steps.

    Parameters:
        hidden_size, num_layers, vocab_size (`int`, *optional*): of a randomly initialized Llama.
        max_completion_length, batch_size, num_generations (`int`, *optional*): of a step; the batch is that of each
            process.
        steps (`int`, *optional*): timed steps of a measurement, after two that are not.
        bf16 (`bool`, *optional*): train in bfloat16.
    """

    hidden_size: int | None = field(
        default=None, metadata={"help": "Of a randomly initialized Llama; a multiple of 64."}
    )
    num_layers: int | None = field(default=None, metadata={"help": "Of the Llama."})
    vocab_size: int | None = field(default=None, metadata={"help": "Of the Llama."})
    max_completion_length: int | None = field(default=None, metadata={"help": "Tokens of each completion, at most."})
    batch_size: int | None = field(default=None, metadata={"help": "Completions of a step, in each process."})
    num_generations: int | None = field(default=None, metadata={"help": "Completions of a prompt."})
    steps: int | None = field(default=None, metadata={"help": "Timed steps of a measurement, after two that are not."})
    bf16: bool | None = field(default=None, metadata={"help": "Train in bfloat16."})

    def given_size(self, otherwise: StepSize) -> StepSize:
        """
        The size with what these arguments say, and the rest as in `otherwise`.

        Raises:
            ValueError: a size that cannot be; one sentence.
        """
        names = {each.name for each in fields(StepSize)} & {each.name for each in fields(SizeArguments)}
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(otherwise, **given)


class Clock(TrainerCallback):
    """Seconds that each optimizer step took, generation included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    @property
    def median(self) -> float:
        """Of the steps that count."""
        return statistics.median(self.seconds[_WARM_UP:])

    def now(self) -> float:
        """The time, once the accelerator has done its work."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = self.now()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds.append(self.now() - self._start)


class ProcessorClock(Clock):
    """Seconds of processor time of each step, of all threads of this process."""

    def now(self) -> float:
        return time.process_time()


def build_model(folder: str, size: StepSize) -> None:
    """Saves a randomly initialized Llama, the same every time, and its tokenizer of words `w0 w1 ...`."""
    tokenizer = build_tiny_tokenizer([f"w{i}" for i in range(size.vocab_size - 1)])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.hidden_size * 4,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.hidden_size // 64,
        num_key_value_heads=size.hidden_size // 64,
        max_position_embeddings=size.max_completion_length + 64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(setup: TrainerSetup, folder: str, size: StepSize, clocks: Sequence[Clock]) -> Any:
    """
    Trains the model of [`build_model`] for the timed steps and two before them.

    Args:
        setup ([`~trl_bayes.benchmarks.trainings.TrainerSetup`]): the trainer.
        folder (`str`): where the model is.
        size ([`StepSize`]): of the step.
        clocks (`list[Clock]`): run along.

    Returns:
        The trainer.
    """
    settings: dict[str, Any] = dict(
        output_dir=f"{folder}/out",
        per_device_train_batch_size=size.batch_size,
        num_generations=size.num_generations,
        max_completion_length=size.max_completion_length,
        max_steps=size.steps + _WARM_UP,
        beta=0.1,
        use_cpu=size.use_cpu,
        bf16=size.bf16,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **setup.settings,
    )
    trainer = setup.trainer(
        model=folder,
        reward_funcs=_token_reward,
        args=setup.config(**settings),
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(_NUM_PROMPTS)]}),
        callbacks=list(clocks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def _token_reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [completion.count("1") / 10 for completion in completions]


def ratio_cells(ours: Sequence[float], theirs: Sequence[float], digits: int) -> list[str]:
    """
    Two cells of a table: the median over rounds, and the ratio to the yardstick in the same round as median (min to
    max).

    Args:
        ours, theirs (`list[float]`): a number for each round.
        digits (`int`): of the median.
    """
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    return [
        f"{statistics.median(ours):.{digits}f}",
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
    ]
