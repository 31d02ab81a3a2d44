"""Runs training cases one after the other, in this process or as one of those of a launch, and saves what it saw.

    python worker.py --backend one --models MODELS --out OUT CASE ...
    accelerate launch --config_file ... worker.py --backend zero3 --models MODELS --out OUT CASE ...

Each process writes `OUT/CASE.rank0.pt` and so on. A batch is the same for any number of processes, and so are its
completions where they are scripted: then the processes together must do what one process does alone.
"""

import argparse
import faulthandler
import itertools
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from accelerate.utils import set_seed
from sharding import assert_spread, full_weights
from transformers import PrinterCallback, TrainerCallback

from tests.helpers.trainers import QUIET, TRAINERS
from tests.helpers.training import lora, watch_batches
from trl_bayes.assets import shipped_file
from trl_bayes.benchmarks.tiny import letter_count_task


TASK = letter_count_task()
G = 4
BATCH = 12  # three groups over all processes: with two processes the second group spans both
BETA = 0.7
DEFAULTS: dict[str, Any] = {
    **QUIET,
    "max_steps": 4,
    # Plain gradient descent without clipping: a difference in the weights is one in the gradients
    "optim": "sgd",
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e3,
    "num_generations": G,
    "max_completion_length": TASK.max_completion_length,
    "beta": BETA,
}
SAVES: dict[str, Any] = {
    "optim": "adamw_torch",
    "learning_rate": 3e-3,
    "save_strategy": "steps",
    "save_steps": 2,
    "shuffle_dataset": False,
}
# All that is kept is replayed, whatever the order: two processes with half the buffer each replay what one does
REPLAYS: dict[str, Any] = {"replay_buffer_size": BATCH, "replay_ratio": 1.0}
CALIBRATED: dict[str, Any] = {
    "target": {"name": "calibrated", "transform": "best_of_n", "n": 4},
    "partition": "prior_samples",
    "num_prior_samples": 24,
}
# Half of a batch is pairs, all of which are replayed
PAIRS: dict[str, Any] = {"alpha": 0.1, "num_prior_samples": CALIBRATED["num_prior_samples"]}
# A quarter cannot be spread over two processes: the group in the middle has two completions in each
MIXTURE: dict[str, Any] = {"prior_fraction": 0.5, "num_prior_samples": CALIBRATED["num_prior_samples"]}


def some_a(completions: list[str], **kwargs: Any) -> list[float | None]:
    """Hard evidence, 1[there is an "a"], missing for completions that end with "f"."""
    return [None if text.endswith("f") else float("a" in text) for text in completions]


@dataclass
class Case:
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    reward: Callable[..., list[float | None]] = TASK.reward_func
    lora: bool = False
    has_own_prior: bool = False
    evaluates: bool = False
    is_scripted: bool = True  # completions do not depend on the number of processes
    accumulates: bool = False  # two processes take two micro-batches a step, one takes a single one
    shares_prior_samples: bool = False  # with all other runs, else it draws its own
    resumes: str | None = None  # the case whose checkpoint to go on from
    stops_after: int | None = None  # steps, without saving anything
    is_killed: bool = False  # instead of stopping
    is_new: bool = False  # to the second process, as if the run that it resumes had had one process


# Sampled, so the random state of each process matters as well
RESUMABLE = Case("dpg", {**SAVES, **REPLAYS, **MIXTURE}, is_scripted=False, shares_prior_samples=True)
RESUMABLE_PRIOR = Case("dpg", {**SAVES, **REPLAYS, **CALIBRATED}, is_scripted=False, shares_prior_samples=True)
RESUMABLE_LORA = Case("tb", {**SAVES, **REPLAYS, "partition": "running"}, is_scripted=False, lora=True)

CASES: dict[str, Case] = {
    "kl_rl": Case("kl_rl"),
    "f_dpg": Case("f_dpg", has_own_prior=True, evaluates=True),
    "dpg": Case("dpg", {"target": "constraint"}, reward=some_a, accumulates=True),
    "tb": Case("tb", REPLAYS),
    # Of the scripted completions every second one is taken for the prior's
    "dpg_replay": Case("dpg", {**REPLAYS, **MIXTURE}, shares_prior_samples=True),
    "lora": Case("f_dpg", {"learning_rate": 0.1}, lora=True),  # its second factor begins at zero
    "calibrated": Case("f_dpg", CALIBRATED, shares_prior_samples=True),
    "xpo": Case("xpo", {**PAIRS, "replay_buffer_size": BATCH // 2}, evaluates=True, shares_prior_samples=True),
    "xpo_fresh": Case("xpo", {**PAIRS, "replay_buffer_size": 0}, shares_prior_samples=True),
    "bf16": Case("kl_rl", {"bf16": True, "gradient_checkpointing": True}),
    "uneven": Case("dpg", {**REPLAYS, "target": "constraint"}, reward=some_a),  # the buffers fill at their own pace
    "draws": Case("f_dpg", CALIBRATED, is_scripted=False),
    "straight": RESUMABLE,
    "in_parts": replace(RESUMABLE, config={**RESUMABLE.config, "ds3_gather_for_generation": False}),
    "killed": replace(RESUMABLE, stops_after=3, is_killed=True),
    "resumed": replace(RESUMABLE, resumes="killed"),
    "stopped_prior": replace(RESUMABLE_PRIOR, stops_after=3),
    "grown_prior": replace(RESUMABLE_PRIOR, resumes="stopped_prior", is_new=True),
    "straight_lora": RESUMABLE_LORA,
    "stopped_lora": replace(RESUMABLE_LORA, stops_after=3),
    "resumed_lora": replace(RESUMABLE_LORA, resumes="stopped_lora"),
}


class Watch(TrainerCallback):
    """Between two steps: how the model is spread, the weights after the first step, and the end of a case."""

    def __init__(self, backend: str, case: Case):
        self.backend, self.case = backend, case
        self.trainer: Any = None
        self.spread: dict[str, Any] = {}
        self.first_weights: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.spread:
            self.spread = assert_spread(self.trainer, self.backend)
            self.first_weights = full_weights(self.trainer)
        control.should_training_stop |= state.global_step == self.case.stops_after and not self.case.is_killed

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.case.is_killed and state.global_step == self.case.stops_after:
            os.kill(os.getpid(), signal.SIGKILL)


def speak(number: int) -> list[list[int]]:
    """A whole batch of completions: letters 0 to 5, and EOS (6) unless the completion is cut."""
    draw = random.Random(number)
    lengths = [draw.randint(0, TASK.max_completion_length) for _ in range(BATCH)]
    rows = [[draw.randrange(len(TASK.letters)) for _ in range(length)] for length in lengths]
    return [row if len(row) == TASK.max_completion_length else [*row, len(TASK.letters)] for row in rows]


def script(trainer: Any) -> None:
    """Completions depend on the step and on the place in the batch of all processes, and on nothing else."""
    evaluations = itertools.count(1000)
    sample = trainer._generate_single_turn

    def generate(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        if trainer.num_generations == 1:  # samples of the prior
            return sample(prompt_ids, *args, **kwargs)
        assert len(prompt_ids) * trainer.accelerator.num_processes == BATCH
        rows = speak(trainer.state.global_step if trainer.model.training else next(evaluations))
        start = trainer.accelerator.process_index * len(prompt_ids)
        return rows[start : start + len(prompt_ids)], None

    trainer._generate_single_turn = generate


def record(trainer: Any) -> list[dict[str, Any]]:
    """This process's part of every batch that the trainer will generate, replayed completions included."""
    recorded: list[dict[str, Any]] = []

    def see_batch(rows: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        tensors = {name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)}
        prompts = [row["prompt"] for row in rows]
        recorded.append({**tensors, "prompts": prompts, "is_training": trainer.model.training})

    def see_terms(terms: dict[str, torch.Tensor]) -> None:
        recorded[-1].update({name: term.clone() for name, term in terms.items()})

    watch_batches(trainer, see_batch, see_terms)
    return recorded


def make_trainer(case: Case, name: str, options: argparse.Namespace, callback: TrainerCallback) -> Any:
    row = TRAINERS[case.kind]
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    config = {**DEFAULTS, **case.config}
    config["gradient_accumulation_steps"] = 2 if case.accumulates and world_size > 1 else 1
    config["per_device_train_batch_size"] = BATCH // world_size // config["gradient_accumulation_steps"]
    config["per_device_eval_batch_size"] = BATCH // world_size
    if "replay_buffer_size" in config:
        config["replay_buffer_size"] //= world_size
    if case.has_own_prior:
        config["prior_model_name_or_path"] = f"{options.models}/prior"
    if case.evaluates:
        config |= {"eval_strategy": "steps", "eval_steps": 2}
    if case.shares_prior_samples:
        config["prior_samples_dir"] = f"{options.models}/prior_samples"
    args = row.config(output_dir=f"{options.out}/{case.resumes or name}", **config)
    if options.backend == "fsdp2":  # accelerate has no FSDP without a GPU, unless it takes this for a run on GPUs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    set_seed(0)  # of a new adapter
    trainer = row.trainer(
        model=f"{options.models}/policy",
        reward_funcs=case.reward,
        args=args,
        train_dataset=TASK.dataset(6),
        eval_dataset=TASK.dataset(BATCH) if case.evaluates else None,
        peft_config=lora(target_modules="all-linear") if case.lora else None,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    if case.is_scripted:
        script(trainer)
    return trainer


def run(name: str, options: argparse.Namespace) -> Any:
    """Trains and saves what happened; returns the trainer."""
    case = CASES[name]
    watch = Watch(options.backend, case)
    watch.trainer = trainer = make_trainer(case, name, options, watch)
    recorded = record(trainer)
    if case.is_new and trainer.accelerator.process_index == 1:
        Path(trainer.args.output_dir, "checkpoint-2", "posterior_state_1.pt").unlink()
    trainer.train(resume_from_checkpoint=case.resumes is not None)
    process = trainer.accelerator.process_index
    result = {
        "rank": process,
        "spread": watch.spread,
        "batches": recorded,
        "logs": trainer.state.log_history,
        "weights": {1: watch.first_weights, trainer.state.global_step: full_weights(trainer)},
        "posterior_state": trainer.posterior_state(),
        "num_tokens": trainer.state.num_input_tokens_seen,
        "dtype": next(trainer.model.parameters()).dtype,
        "is_checkpointing": trainer.model.is_gradient_checkpointing,
    }
    file = Path(options.out, f"{name}.rank{process}.pt")
    torch.save(result, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)
    trainer.accelerator.wait_for_everyone()
    return trainer


def fsdp_environment() -> dict[str, str]:
    """What accelerate's launcher makes of the configuration for GPUs."""
    config = yaml.safe_load(shipped_file("accelerate_configs/fsdp2.yaml").read_text())["fsdp_config"]
    return {"ACCELERATE_USE_FSDP": "true", **{name.upper(): str(value) for name, value in config.items()}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("cases", nargs="+", choices=CASES)
    options = parser.parse_args()
    faulthandler.dump_traceback_later(options.seconds, exit=True)  # no process outlives its launch
    torch.set_num_threads(1)
    if options.backend == "fsdp2":
        os.environ.update(fsdp_environment())
    environment = dict(os.environ)
    finished = []
    for name in options.cases:
        finished.append(run(name, options))  # kept: to free a DDP reducer between cases can hang in gloo
        # The next trainer makes its own accelerator, in the same process group
        AcceleratorState._reset_state()
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(environment)
    os._exit(0)  # without destructors, for the same reason


if __name__ == "__main__":
    main()
