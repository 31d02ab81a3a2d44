"""Measure what our trainers add to a step of GRPOTrainer in a run of several processes."""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PrinterCallback

from ..diagnostics.exact_benchmark import Method, methods, problems
from ..diagnostics.tiny import build_tiny_tokenizer
from .bench_step import _Clock, _token_reward


_YARDSTICK = "TRL GRPOTrainer"


@dataclass
class ScalingArguments:
    r"""
    Arguments of the scaling benchmark, which `accelerate launch -m trl_bayes.commands.bench_scaling` starts.

    All trainers are measured in the same processes, and rounds take them in turn, forwards and backwards, so a slow
    spell of the machine falls on all of them. What is compared is whole steps: sampling, rewards, scoring and update.
    Seconds of processor time, summed over processes, say how much work there is on a CPU, whatever else the machine
    is busy with.

    Parameters:
        hidden_size, num_layers, vocab_size (`int`): of a randomly initialised Llama.
        max_completion_length, batch_size, num_generations (`int`): of a step; the batch is that of each process.
        steps (`int`, *optional*, defaults to `5`): timed steps of a measurement, after two that are not.
        rounds (`int`, *optional*, defaults to `6`): measurements of each trainer.
        methods (`list[str]`, *optional*): parts of the names of the trainers to measure beside GRPOTrainer.
        use_cpu (`bool`, *optional*, defaults to `False`): train without a GPU.
        bf16 (`bool`, *optional*, defaults to `False`): train in bfloat16.
    """

    hidden_size: int = 256
    num_layers: int = 4
    vocab_size: int = 8192
    max_completion_length: int = 48
    batch_size: int = 16
    num_generations: int = 8
    steps: int = 5
    rounds: int = 6
    methods: list[str] = field(default_factory=list)
    use_cpu: bool = False
    bf16: bool = False


class Step(NamedTuple):
    """What one optimizer step takes, generation included."""

    wall: float  # seconds, of the slowest process
    work: float  # seconds of processor time, of all processes together


def main(argv: list[str] | None = None) -> None:
    """Measures GRPOTrainer and ours in turn, and prints the table in the first process."""
    (args,) = HfArgumentParser(cast(Any, ScalingArguments)).parse_args_into_dataclasses(
        sys.argv[1:] if argv is None else argv
    )
    state = PartialState(cpu=args.use_cpu)
    if state.num_processes == 1:
        print("There is one process only: start it by `accelerate launch` to measure several.", file=sys.stderr)
    chosen = [method for method in methods(problems()["letters"]) if _is_wanted(method, args.methods)]
    steps: dict[str, list[Step]] = {method.name: [] for method in chosen}
    finished = []  # kept: to free the reducer of a DDP model while others train can hang in gloo
    with tempfile.TemporaryDirectory() as own_folder:
        (folder,) = broadcast_object_list([own_folder])
        if state.is_main_process:
            _build_model(folder, args)
        state.wait_for_everyone()
        for number in range(args.rounds):
            for method in chosen if number % 2 == 0 else reversed(chosen):
                trainer, step = measure(method, folder, args)
                finished.append(trainer)
                steps[method.name].append(step)
        if state.is_main_process:
            print(to_markdown(steps, state.num_processes, str(state.device)), flush=True)
        state.wait_for_everyone()
    finished[-1].end()


def _is_wanted(method: Method, parts: Sequence[str]) -> bool:
    return method.name == _YARDSTICK or (method.is_ours and (not parts or any(part in method.name for part in parts)))


def _build_model(folder: str, args: ScalingArguments) -> None:
    tokenizer = build_tiny_tokenizer([f"w{i}" for i in range(args.vocab_size - 1)])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 4,
        num_hidden_layers=args.num_layers,
        num_attention_heads=max(args.hidden_size // 64, 1),
        num_key_value_heads=max(args.hidden_size // 64, 1),
        max_position_embeddings=args.max_completion_length + 64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(method: Method, folder: str, args: ScalingArguments) -> tuple[Any, Step]:
    """The trainer after its run, and its median step."""
    clock, processor = _Clock(), _ProcessorClock()
    settings: dict[str, Any] = dict(
        output_dir=str(Path(folder) / "out"),
        per_device_train_batch_size=args.batch_size,
        num_generations=args.num_generations,
        max_completion_length=args.max_completion_length,
        max_steps=args.steps + 2,
        beta=0.1,
        use_cpu=args.use_cpu,
        bf16=args.bf16,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **method.settings,
    )
    trainer = method.trainer(
        model=folder,
        reward_funcs=_token_reward,
        args=method.config(**settings),
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(64)]}),
        callbacks=[clock, processor],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    medians = [statistics.median(one.seconds[2:]) for one in (clock, processor)]
    wall, work = zip(*gather_object([medians]), strict=True)
    return trainer, Step(max(wall), sum(work))


def to_markdown(steps: dict[str, list[Step]], num_processes: int, device: str) -> str:
    """Median over rounds, and the ratio to GRPOTrainer in the same round as median (min to max)."""
    lines = [
        f"{num_processes} processes, {device}",
        "",
        "| trainer | step, s | ratio to GRPOTrainer | processor time, s | ratio to GRPOTrainer |",
        "|---|---|---|---|---|",
    ]
    for name, rounds in steps.items():
        cells = [name]
        for ours, theirs in zip(zip(*rounds, strict=True), zip(*steps[_YARDSTICK], strict=True), strict=True):
            ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
            cells.append(f"{statistics.median(ours):.3f}")
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


class _ProcessorClock(_Clock):
    """Seconds of processor time, of all threads of this process."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._start)


if __name__ == "__main__":
    main()
