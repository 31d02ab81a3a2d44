"""Drop-in means: what works with TRL's GRPOTrainer works with ours, and stays exact while it does.

The yardstick is what TRL's own tests of GRPOTrainer cover. Everything in this folder runs on the CPU with the tiny
models of `tests/conftest.py`. Each training run is checked by `learn`: all parameters move and stay finite, and every
metric is logged. Where a feature changes what is sampled or scored (tools, adapters, temperature, padding), the
log-probabilities that enter the loss are compared with a plain forward pass.
"""

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from trl import GRPOTrainer

from tests.helpers.trainers import QUIET, TRAINERS
from tests.helpers.training import length_reward, lora, parameters, step_logs, watch_batches


METRICS = [  # of the update
    "posterior/capped_frac",
    "entropy",
    "step_time",
]
OF_Z = [  # absent where no group of the batch can tell Z, as when all completions have the same reward
    "posterior/log_z",
    "posterior/ess",
    "posterior/reverse_kl",
    "posterior/forward_kl",
]
GENERATION_METRICS = [  # logged, like TRL's, at the steps that generate
    "kl",
    "posterior/kl_prior",
    "posterior/frac_no_evidence",
    "posterior/frac_unscored",
    "posterior/frac_infinite_reward",
    "posterior/pseudo_reward_mean",
    "posterior/pseudo_reward_std",
    # TRL's own, under their names
    "reward",
    "reward_std",
    "completions/mean_length",
    "completions/clipped_ratio",
    "num_tokens",
]
BETA = 0.5
G = 4  # completions a prompt
DEFAULTS: dict[str, Any] = {
    **QUIET,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 2 * G,
    "num_generations": G,
    "max_completion_length": 8,
    "beta": BETA,
}
# Adam divides by the gradient's size, so that rounding grows; with this, updates that are equal up to it stay so
SGD = {"optim": "sgd", "learning_rate": 0.1}
SCORED = [[65, 66, 2], [70, 2], [80, 81, 82, 83, 2], [90, 2]]  # a group of completions, as token ids; 2 is EOS
PROMPTS = ["The sky is", "Rain", "Explicit is better than", "Two plus two makes"]


def plain(**columns: list[Any]) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, **columns})


def conversational(**columns: list[Any]) -> Dataset:
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in PROMPTS], **columns})


def length_evidence(batch: dict[str, Any]) -> torch.Tensor:
    """`phi` of `length_reward` under the default target, `(B,)`."""
    return batch["completion_mask"].sum(dim=1) / 4 / BETA


class Make:
    """Builds a trainer with the defaults above: `make("dpg", {"num_iterations": 2}, reward_funcs=...)`."""

    def __init__(self, models: Any, folder: Path):
        self.models, self.folder = models, folder

    def __call__(self, kind: str, config: dict[str, Any] | None = None, **arguments: Any) -> GRPOTrainer:
        row = TRAINERS[kind]
        args = row.config(**{"output_dir": str(self.folder / "out"), **DEFAULTS, **(config or {})})
        arguments = {"model": self.models.policy, "reward_funcs": length_reward, **arguments}
        arguments.setdefault("train_dataset", plain())
        return row.trainer(args=args, **arguments)


def learn(trainer: GRPOTrainer, without: tuple[str, ...] = (), **train_arguments: Any) -> list[dict[str, float]]:
    """Trains; every trainable parameter must move and be finite, and every metric must be logged at every step."""
    before = parameters(trainer.model)
    set_seed(trainer.args.seed)  # so that two runs can be compared
    trainer.train(**train_arguments)
    after = parameters(trainer.model)
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert parameter.isfinite().all(), f"{name} is not finite"
        assert not torch.equal(parameter, before[name]), f"{name} has not changed"

    logs = step_logs(trainer)
    assert len(logs) == trainer.args.max_steps
    steps_per_generation = trainer.args.steps_per_generation * trainer.num_iterations
    for step, log in enumerate(logs):
        has_generated = step * trainer.args.gradient_accumulation_steps % steps_per_generation == 0
        names = {"loss", "grad_norm", *METRICS, *(GENERATION_METRICS if has_generated else [])} - set(without)
        assert_finite(log, names | (log.keys() & set(OF_Z)))
        assert log["grad_norm"] > 0
        assert log["posterior/capped_frac"] == 0 or trainer.args.pseudo_reward_cap is not None
        assert not log.keys() & set(without)
    return logs


def assert_finite(log: dict[str, float], names: Iterable[str]) -> None:
    for name in names:
        assert log.get(name) is not None, f"{name} is missing: {log}"
        assert math.isfinite(log[name]), f"{name} is {log[name]}"


def assert_unchanged(trainer: GRPOTrainer, before: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters(trainer.model, trainable=False).items():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, msg=f"{name} has changed")


def sequence_log_probs(model: PreTrainedModel, batch: dict[str, Any], temperature: float = 1.0) -> torch.Tensor:
    """`log pi(y)` of the tokens that the policy produced, by a plain forward pass, `(B,)`."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention_mask).logits[:, batch["prompt_ids"].size(1) - 1 : -1]
    log_probs = (logits.float() / temperature).log_softmax(dim=2)
    per_token = log_probs.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    return (per_token * mask).sum(dim=1)


class Generated(NamedTuple):
    batch: dict[str, Any]  # of TRL's `_generate_and_score_completions`, before it is shuffled and split
    log_policy: torch.Tensor  # log pi(y) of the policy that sampled it, by a plain forward pass, (B,)
    rows: list[dict[str, Any]]  # of the dataset


def record(trainer: GRPOTrainer) -> list[Generated]:
    """Every batch that the trainer will generate from now on, with what the loss adds to it."""
    recorded: list[Generated] = []

    def see_batch(rows: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        recorded.append(Generated(dict(batch), sequence_log_probs(trainer.model, batch, trainer.temperature), rows))

    watch_batches(trainer, see_batch, lambda terms: recorded[-1].batch.update(terms))
    return recorded


def script(trainer: GRPOTrainer, completions: list[list[int]]) -> None:
    """Lets the trainer 'sample' the given completions, always the same."""
    trainer._generate_single_turn = lambda prompt_ids, *_args, **_kwargs: (copy.deepcopy(completions), None)


def completions(batch: dict[str, Any]) -> list[list[int]]:
    """Token ids without the padding."""
    pairs = zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def dropping_lora() -> LoraConfig:
    """An adapter with dropout, which must not reach what is scored."""
    return lora(lora_dropout=0.5)


def trained_adapter(path: str) -> PeftModel:
    """An adapter that is not the identity."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), dropping_lora())
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def with_adapter(adapter: str, path: str) -> dict[str, Any]:
    """Arguments of a trainer whose policy has no adapter ("none"), a "new" one, or one that was "trained" before."""
    if adapter == "trained":
        return {"model": trained_adapter(path)}
    return {"peft_config": dropping_lora()} if adapter == "new" else {}
