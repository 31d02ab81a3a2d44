"""Measure step time and peak memory of each trainer, as ratios to RLOOTrainer's."""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from datasets import Dataset
from rich.progress import Progress
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..diagnostics.exact_benchmark import methods, problems
from ..diagnostics.tiny import build_tiny_tokenizer


@dataclass
class StepArguments:
    r"""
    Arguments of the step benchmark.

    Each measurement is a process of its own, so peak memory is that of one trainer; rounds take the trainers in turn,
    so a slow spell of the machine falls on all of them.

    Args:
        hidden_size, num_layers, vocab_size (`int`): of a randomly initialised Llama.
        max_completion_length, batch_size, num_generations (`int`): of a step.
        steps (`int`, *optional*, defaults to `8`): timed steps of a measurement, after two that are not.
        rounds (`int`, *optional*, defaults to `5`): measurements of each trainer.
        methods (`list[str]`, *optional*): parts of the names of the trainers to measure beside RLOOTrainer.
        bf16 (`bool`, *optional*, defaults to `False`): train in bfloat16.
        only (`str`, *optional*): measure this one trainer, once, and print it as JSON.
    """

    hidden_size: int = 256
    num_layers: int = 4
    vocab_size: int = 8192
    max_completion_length: int = 48
    batch_size: int = 32
    num_generations: int = 8
    steps: int = 8
    rounds: int = 5
    methods: list[str] = field(default_factory=list)
    bf16: bool = False
    only: str | None = None


def main(argv: list[str] | None = None) -> None:
    """Measures every trainer in turn, or one if `--only` is given, and prints the table."""
    argv = sys.argv[1:] if argv is None else argv
    (args,) = HfArgumentParser(cast(Any, StepArguments)).parse_args_into_dataclasses(argv)
    if args.only is not None:
        print(json.dumps(measure(args)))
        return
    names = [m.name for m in methods(problems()["letters"])]
    if args.methods:
        names = [n for n in names if n == "TRL RLOOTrainer" or any(part in n for part in args.methods)]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with Progress() as progress:
        for job in progress.track(range(args.rounds * len(names)), description="measuring"):
            name = names[job % len(names)]
            command = [sys.executable, "-m", __spec__.name, *argv, "--only", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[name].append(json.loads(output.splitlines()[-1]))
    print(to_markdown(results))


def measure(args: StepArguments) -> dict[str, float]:
    """Median step time in seconds and peak memory in MiB of the trainer `args.only`, in this process."""
    method = next(m for m in methods(problems()["letters"]) if m.name == args.only)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
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
        settings: dict[str, Any] = dict(
            output_dir=f"{folder}/out",
            per_device_train_batch_size=args.batch_size,
            num_generations=args.num_generations,
            max_completion_length=args.max_completion_length,
            max_steps=args.steps + 2,
            beta=0.1,
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
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {"step_seconds": statistics.median(clock.seconds[2:]), "peak_mib": peak_memory()}


def peak_memory() -> float:
    """Peak memory in MiB: the GPU's allocator if there is one, else this process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def to_markdown(results: dict[str, list[dict[str, float]]]) -> str:
    """Median over rounds, and the ratio to RLOOTrainer in the same round as median (min to max)."""
    reference = results["TRL RLOOTrainer"]
    lines = [
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else f'{os.cpu_count()} CPU cores'}",
        "",
        "| trainer | step, s | ratio to RLOOTrainer | peak, MiB | ratio to RLOOTrainer |",
        "|---|---|---|---|---|",
    ]
    for name, rounds in results.items():
        cells = [name]
        for key, digits in (("step_seconds", 3), ("peak_mib", 0)):
            ratios = [ours[key] / theirs[key] for ours, theirs in zip(rounds, reference, strict=True)]
            cells.append(f"{statistics.median(r[key] for r in rounds):.{digits}f}")
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _token_reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [completion.count("1") / 10 for completion in completions]


class _Clock(TrainerCallback):
    """Seconds that each optimizer step took, generation included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


if __name__ == "__main__":
    main()
