"""Drop-in means: what works with TRL's GRPOTrainer works with ours, and stays exact while it does.

The yardstick is what TRL's own tests of GRPOTrainer cover. Everything here runs on the CPU with the tiny models of
`tests/conftest.py`. Each training run is checked by `learn`: all parameters move and stay finite, and every metric is
logged. Where a feature changes what is sampled or scored (tools, adapters, temperature, padding), the
log-probabilities that enter the loss are compared with a plain forward pass.
"""

import copy
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from trl import GRPOTrainer

from trl_bayes import (
    DPGConfig,
    DPGTrainer,
    FDPGConfig,
    FDPGTrainer,
    KLRLConfig,
    KLRLTrainer,
    TrajectoryBalanceConfig,
    TrajectoryBalanceTrainer,
)


CLASSES: dict[str, tuple[type, type]] = {
    "kl_rl": (KLRLTrainer, KLRLConfig),
    "f_dpg": (FDPGTrainer, FDPGConfig),
    "dpg": (DPGTrainer, DPGConfig),
    "trajectory_balance": (TrajectoryBalanceTrainer, TrajectoryBalanceConfig),
}
METRICS = [  # of the update
    "posterior/capped_frac",
    "entropy",
    "step_time",
]
GENERATION_METRICS = [  # logged, like TRL's, at the steps that generate
    "posterior/log_z",
    "posterior/ess",
    "posterior/kl_prior",
    "posterior/reverse_kl",
    "posterior/forward_kl",
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
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
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
PROMPTS = ["The sky is", "Rain", "Explicit is better than", "Two plus two makes"]


def plain(**columns: list[Any]) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, **columns})


def conversational(**columns: list[Any]) -> Dataset:
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in PROMPTS], **columns})


def length_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A few nats between the shortest and the longest completion, for plain and conversational prompts alike."""
    return [len(ids) / 4 for ids in completion_ids]


def length_evidence(batch: dict[str, Any]) -> torch.Tensor:
    """`phi` of `length_reward` under the default target, `(B,)`."""
    return batch["completion_mask"].sum(dim=1) / 4 / BETA


# --- Making and checking a run ---------------------------------------------------------------------------------------


class Make:
    """Builds a trainer with the defaults above: `make("dpg", {"num_iterations": 2}, reward_funcs=...)`."""

    def __init__(self, models: Any, folder: Path):
        self.models, self.folder = models, folder

    def __call__(self, kind: str, config: dict[str, Any] | None = None, **arguments: Any) -> GRPOTrainer:
        trainer_class, config_class = CLASSES[kind]
        args = config_class(**{"output_dir": str(self.folder / "out"), **DEFAULTS, **(config or {})})
        arguments = {"model": self.models.policy, "reward_funcs": length_reward, **arguments}
        arguments.setdefault("train_dataset", plain())
        return trainer_class(args=args, **arguments)


@pytest.fixture
def make(tiny_models: Any, tmp_path: Path) -> Make:
    return Make(tiny_models, tmp_path)


@pytest.fixture(params=CLASSES)
def kind(request: pytest.FixtureRequest) -> str:
    """A test that takes this runs with each of our trainers."""
    return request.param


def parameters(model: torch.nn.Module, trainable: bool = True) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad or not trainable}


def step_logs(trainer: GRPOTrainer) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "loss" in log]


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
        assert_finite(log, names)
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


def assert_same_weights(one: GRPOTrainer, other: GRPOTrainer, atol: float = 0.0) -> None:
    other_parameters = parameters(other.model)
    for name, parameter in parameters(one.model).items():
        torch.testing.assert_close(parameter, other_parameters[name], rtol=0, atol=atol, msg=lambda m, n=name: n + m)


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
    generate, posterior_terms = trainer._generate_and_score_completions, trainer._posterior_terms

    def generate_and_record(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rows = copy.deepcopy(inputs)
        batch = generate(inputs)
        recorded.append(Generated(dict(batch), sequence_log_probs(trainer.model, batch, trainer.temperature), rows))
        return batch

    def terms_and_record(output: dict[str, Any], *args: Any) -> dict[str, torch.Tensor]:
        terms = posterior_terms(output, *args)
        if "row" in output:  # in the order into which TRL has shuffled the batch
            recorded[-1].batch.update({name: term[output["row"].argsort()] for name, term in terms.items()})
        return terms

    trainer._generate_and_score_completions = generate_and_record
    trainer._posterior_terms = terms_and_record
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


# `pytest.warns` re-issues what it did not expect under the test's name, where pyproject's filter does not look
from_trl = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

# --- Construction ----------------------------------------------------------------------------------------------------


def test_three_arguments_are_enough(
    kind: str, tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the default output folder is made in the current one
    # The default, bfloat16, is refused on a machine without a GPU unless `use_cpu` is set
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    trainer_class, config_class = CLASSES[kind]
    trainer = trainer_class(model=tiny_models.policy, reward_funcs=tiny_models.reward, train_dataset=plain())
    assert type(trainer.args) is config_class
    assert trainer.args.output_dir == f"policy-{trainer_class._name}"
    assert trainer.reward_func_names == ["reward"]
    assert trainer.ref_model is not None


def test_positional_arguments_are_those_of_grpo(make: Make, tiny_models: Any, tmp_path: Path) -> None:
    args = FDPGConfig(output_dir=str(tmp_path), **DEFAULTS)
    trainer = FDPGTrainer(tiny_models.policy, [length_reward], args, plain(), plain())
    learn(trainer)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 0.9),
        ("top_k", 10),
        ("min_p", 0.01),
        ("repetition_penalty", 1.1),
        ("generation_kwargs", {"num_beams": 2}),
        ("scale_rewards", "group"),
        ("scale_rewards", True),
        ("multi_objective_aggregation", "normalize_then_sum"),
        ("mask_truncated_completions", True),
        ("sync_ref_model", True),
        ("top_entropy_quantile", 0.2),
        ("entropy_coef", 0.01),
        ("off_policy_mask_threshold", 0.5),
    ],
)
def test_the_exceptions_are_refused_with_what_to_set(name: str, value: Any, tmp_path: Path) -> None:
    # These are all of GRPO's settings that are not drop-in: under each the fixed point would not be the posterior
    offending = "num_beams" if name == "generation_kwargs" else "entropy" if name == "entropy_coef" else name
    with pytest.raises(ValueError, match=offending):
        FDPGConfig(output_dir=str(tmp_path), **{**DEFAULTS, name: value})


@pytest.mark.parametrize("setting", [{"scale_rewards": False}, {"generation_kwargs": {"do_sample": True, "top_k": 0}}])
def test_exact_spellings_of_grpo_settings_are_accepted(setting: dict[str, Any], make: Make) -> None:
    learn(make("f_dpg", setting))


@from_trl
def test_grpo_losses_are_accepted_and_said_to_have_no_effect(make: Make) -> None:
    plain_run = make("kl_rl")
    learn(plain_run)
    with pytest.warns(UserWarning, match="loss_type.*epsilon.*importance_sampling_level"):
        grpo_script = make(
            "kl_rl", {"loss_type": "grpo", "epsilon": 0.1, "importance_sampling_level": "sequence", "delta": 2.0}
        )
    learn(grpo_script)
    assert_same_weights(plain_run, grpo_script)


# --- Data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [plain, conversational])
def test_plain_and_conversational_prompts(kind: str, dataset: Callable[[], Dataset], make: Make) -> None:
    # With TRL's default gradient checkpointing
    learn(make(kind, {"gradient_checkpointing": True}, train_dataset=dataset()))


def test_conversational_completions_reach_the_reward_as_messages(make: Make) -> None:
    def content_reward(prompts: list, completions: list, **kwargs: Any) -> list[float]:
        assert all(prompt[-1]["role"] == "user" for prompt in prompts)
        assert all(completion[0]["role"] == "assistant" for completion in completions)
        return [len(completion[0]["content"]) / 16 for completion in completions]

    learn(make("f_dpg", reward_funcs=content_reward, train_dataset=conversational()))


def test_chat_template_arguments(make: Make, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = make("dpg", {"chat_template_kwargs": {"enable_thinking": False}}, train_dataset=conversational())
    recorded = record(trainer)
    learn(trainer)
    prompts = chat_tokenizer.batch_decode(recorded[0].batch["prompt_ids"])
    assert all(prompt.endswith("<think>\n\n</think>\n\n") for prompt in prompts)
    close(recorded[0].batch["log_proposal"], recorded[0].log_policy)


@pytest.mark.parametrize("partition", ["leave_one_out", "running"])
def test_streamed_dataset(partition: str, make: Make) -> None:
    stream = plain(answer=list("abcd")).to_iterable_dataset()
    trainer = make("dpg", {"partition": partition, "max_steps": 3}, train_dataset=stream)
    learn(trainer)
    if partition == "running":
        assert len(trainer.running_partition) == len(PROMPTS)  # three steps of two prompts: two of them came back


def test_num_generations_larger_than_the_batch(kind: str, make: Make) -> None:
    config = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_generations": 4}
    trainer = make(kind, config)
    recorded = record(trainer)
    learn(trainer)
    assert len(recorded[0].batch["usable"]) == 8  # one generation for the whole accumulation window
    close(recorded[0].batch["log_target"] - length_evidence(recorded[0].batch), recorded[0].log_policy)


def test_shuffle_dataset_off(make: Make) -> None:
    trainer = make("f_dpg", {"shuffle_dataset": False})
    recorded = record(trainer)
    learn(trainer)
    assert [row["prompt"] for row in recorded[0].rows] == [PROMPTS[0]] * G + [PROMPTS[1]] * G


def test_dataloader_workers(make: Make) -> None:
    learn(make("f_dpg", {"dataloader_num_workers": 2}))


# --- Rewards ---------------------------------------------------------------------------------------------------------


def early_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(ids) < 8) for ids in completion_ids]


async def async_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(set(ids))) / 8 for ids in completion_ids]


def test_several_weighted_reward_functions(kind: str, make: Make) -> None:
    trainer = make(kind, {"reward_weights": [0.7, 0.3]}, reward_funcs=[length_reward, early_reward])
    recorded = record(trainer)
    logs = learn(trainer)
    lengths = recorded[0].batch["completion_mask"].sum(dim=1)
    reward = 0.7 * lengths / 4 + 0.3 * (lengths < 8)
    close(recorded[0].batch["log_target"] - recorded[0].log_policy, reward / BETA)  # the policy starts at the prior
    assert logs[0]["reward"] == pytest.approx(reward.mean().item(), abs=1e-5)
    for name in ("length_reward", "early_reward"):
        assert f"rewards/{name}/mean" in logs[0]
        assert f"rewards/{name}/std" in logs[0]


def test_sync_async_and_model_rewards_together(kind: str, make: Make, tiny_models: Any) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_models.reward, num_labels=1)
    weights = parameters(classifier)
    trainer = make(kind, reward_funcs=[length_reward, async_reward, classifier, tiny_models.reward])
    recorded = record(trainer)
    logs = learn(trainer)
    assert [name for name in logs[0] if name.startswith("rewards/") and name.endswith("/mean")] == [
        "rewards/length_reward/mean",
        "rewards/async_reward/mean",
        "rewards/reward/mean",
    ]
    # The model is there twice, as an object and as a path
    batch, log_policy, _ = recorded[0]
    functions = length_evidence(batch) * BETA + torch.tensor([len(set(ids)) / 8 for ids in completions(batch)])
    twice = (batch["log_target"] - log_policy) * BETA - functions
    assert twice.mean().item() == pytest.approx(2 * logs[0]["rewards/reward/mean"], abs=1e-4)
    assert twice.std().item() > 0
    assert all(torch.equal(weights[name], parameter) for name, parameter in classifier.named_parameters())


def test_reward_model_with_its_own_tokenizer(make: Make, tiny_models: Any) -> None:
    # Conversational prompts are rendered with the reward model's chat template
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.reward)
    trainer = make(
        "f_dpg",
        reward_funcs=tiny_models.reward,
        reward_processing_classes=tokenizer,
        train_dataset=conversational(),
    )
    learn(trainer)
    assert trainer.reward_processing_classes == [tokenizer]


def test_reward_function_that_does_not_apply_to_some_completions(kind: str, make: Make) -> None:
    def every_other(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [None if i % 2 else 1.0 for i in range(len(completion_ids))]

    trainer = make(kind, {"reward_weights": [1.0, 2.0]}, reward_funcs=[length_reward, every_other])
    recorded = record(trainer)
    logs = learn(trainer)
    batch, log_policy, _ = recorded[0]
    extra = torch.tensor([2.0 / BETA, 0.0]).repeat(G)  # what does not apply adds nothing
    close(batch["log_target"] - log_policy, length_evidence(batch) + extra)
    assert batch["usable"].all()
    assert logs[0]["posterior/frac_unscored"] == 0


def test_reward_function_that_never_applies(make: Make) -> None:
    def never(completions: list, **kwargs: Any) -> list[None]:
        return [None] * len(completions)

    with_it, without_it = make("kl_rl", reward_funcs=[length_reward, never]), make("kl_rl")
    logs = learn(with_it)
    learn(without_it)
    assert logs[0]["rewards/never/mean"] is None  # not NaN, which a JSON logger could not write
    assert_same_weights(with_it, without_it)


def first_of_each_group(value: float | None) -> Callable[..., list[float | None]]:
    """`length_reward`, but the first completion of every group gets `value`."""

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [value if i % G == 0 else len(ids) / 4 for i, ids in enumerate(completion_ids)]

    return reward


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_completion_without_a_usable_reward_is_left_out(value: float | None, kind: str, make: Make) -> None:
    trainer = make(kind, reward_funcs=first_of_each_group(value))
    recorded = record(trainer)
    for log in learn(trainer):
        assert log["posterior/frac_unscored"] == 1 / G
        is_infinite = value is not None and math.isinf(value)
        assert log["posterior/frac_infinite_reward"] == (1 / G if is_infinite else 0)
    for batch, _, _ in recorded:
        first = torch.arange(2 * G) % G == 0
        assert torch.equal(batch["usable"], ~first)
        assert (batch["advantages"][first] == 0).all()
        assert (batch["advantages"][~first] != 0).any()
        assert batch["log_z"].isfinite().all()


def test_infinite_reward_beside_a_finite_one(make: Make) -> None:
    def infinite(completions: list, **kwargs: Any) -> list[float]:
        return [math.inf] * len(completions)

    with_it, without_it = make("dpg", reward_funcs=[length_reward, infinite]), make("dpg")
    logs = learn(with_it)
    learn(without_it)
    assert logs[0]["posterior/frac_infinite_reward"] == 1  # it is said, and it is as if it did not apply
    assert_same_weights(with_it, without_it)


SCORED = [[65, 66, 2], [70, 2], [80, 81, 82, 83, 2], [90, 2]]  # two groups of completions, as token ids; 2 is EOS
UNSCORED = [[[300, 301, 2]] * G, [[302, 2]] * G]


@pytest.mark.parametrize("value", [None, math.inf])
def test_group_without_any_reward_changes_nothing(value: float | None, kind: str, make: Make) -> None:
    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [len(ids) / 4 if i < G else value for i, ids in enumerate(completion_ids)]

    runs = [make(kind, SGD, reward_funcs=reward) for _ in UNSCORED]
    for run, unscored in zip(runs, UNSCORED, strict=True):
        script(run, SCORED + unscored)
        logs = learn(run)
        assert logs[0]["posterior/frac_unscored"] == 0.5
    assert_same_weights(*runs, atol=1e-6)  # whatever was in the group


@pytest.mark.parametrize("value", [None, -math.inf])
def test_no_reward_at_all_is_no_update(value: float | None, kind: str, make: Make) -> None:
    trainer = make(kind, reward_funcs=lambda completions, **kwargs: [value] * len(completions))
    before = parameters(trainer.model, trainable=False)
    trainer.train()
    assert_unchanged(trainer, before)
    for log in step_logs(trainer):
        assert log["grad_norm"] == 0
        assert log["loss"] == 0
        assert log["posterior/frac_unscored"] == 1
        assert log["posterior/log_z"] is None  # unknown, and not NaN


def test_steep_rewards_do_not_poison_the_weights(kind: str, make: Make) -> None:
    # GRPO divides by the standard deviation, so its users have rewards of any size. Here siblings are some 300 nats
    # apart, far beyond what exp() of a float32 holds.
    def steep(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [20.0 * len(ids) for ids in completion_ids]

    trainer = make(kind, reward_funcs=steep)
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    for log in step_logs(trainer):
        assert math.isfinite(log["loss"])
        assert not math.isnan(log["grad_norm"])


def test_policy_that_moves_far_does_not_poison_the_weights(kind: str, make: Make) -> None:
    # Several passes over long completions with a large step: pi/q of a sequence exceeds what a float32 holds
    config = {"num_iterations": 4, "max_steps": 8, "learning_rate": 0.3, "max_completion_length": 64}
    trainer = make(
        kind, config, reward_funcs=lambda completion_ids, **kwargs: [ids[0] / 100 for ids in completion_ids]
    )
    script(trainer, [[65 + i] * 64 for i in range(G)] * 2)
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    for log in step_logs(trainer):
        assert math.isfinite(log["loss"])
        assert not math.isnan(log["grad_norm"])


def test_dataset_columns_reach_the_reward(make: Make) -> None:
    answers = dict(zip(PROMPTS, "abcd", strict=True))

    def answer_reward(prompts: list[str], completion_ids: list, answer: list[str], **kwargs: Any) -> list[float]:
        assert [answers[prompt] for prompt in prompts] == answer
        return [len(ids) / 4 + (letter == "a") for ids, letter in zip(completion_ids, answer, strict=True)]

    learn(make("dpg", reward_funcs=answer_reward, train_dataset=plain(answer=list("abcd"))))


def test_what_trl_offers_a_reward_function(make: Make, tmp_path: Path) -> None:
    steps = []

    def reward(
        completion_ids: list, trainer_state: Any, log_extra: Callable, log_metric: Callable, **kwargs: Any
    ) -> list[float]:
        steps.append(trainer_state.global_step)
        lengths = [len(ids) for ids in completion_ids]
        log_extra("length", lengths)
        log_metric("longest", max(lengths))
        return [length / 4 for length in lengths]

    logs = learn(make("trajectory_balance", {"log_completions": True}, reward_funcs=reward))
    assert steps == [0, 1]
    assert all(log["longest"] == log["completions/max_length"] for log in logs)
    table = pd.read_parquet(tmp_path / "out" / "completions" / "completions_00001.parquet")
    assert table["length"].tolist() == [4 * value for value in table["reward"]]


def test_completions_table_shows_our_advantages(kind: str, make: Make, tmp_path: Path) -> None:
    # Two generations fill the log of completions one after the other; the table is that of the latest
    trainer = make(kind, {"log_completions": True})
    recorded = record(trainer)
    learn(trainer)
    for step, (batch, _, rows) in enumerate(recorded, start=1):
        table = pd.read_parquet(tmp_path / "out" / "completions" / f"completions_{step:05d}.parquet")
        assert table["prompt"].tolist() == [row["prompt"] for row in rows]
        assert table["advantage"].tolist() == pytest.approx(batch["advantages"].tolist())
        close(torch.tensor(table["length_reward"].tolist()), length_evidence(batch) * BETA)


# --- Tools and environments ------------------------------------------------------------------------------------------


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.
    """
    return a * b


async def multiply_later(a: int, b: int) -> int:
    """
    Multiplies two integers, in its own time.

    Args:
        a: The first integer.
        b: The second integer.
    """
    return a * b


class Counter:
    """An environment that owns its reward: the model is to add numbers up."""

    def reset(self, **kwargs: Any) -> str:
        self.total = 0
        return " The total is 0."

    def add(self, amount: int) -> int:
        """
        Adds to the total.

        Args:
            amount: What to add.
        """
        self.total += amount
        return self.total

    def get_reward(self) -> float:
        return self.total / 4


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call><|im_end|>'


def speak(trainer: GRPOTrainer, tokenizer: PreTrainedTokenizerBase, first_turns: list[str]) -> None:
    """Lets the model 'say' `first_turns`, in this order, and 'Done!' after each tool result."""

    def generate(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        turns = iter(first_turns * len(input_ids))
        said = [
            "Done!<|im_end|>" if "<tool_response>" in tokenizer.decode(prompt) else next(turns) for prompt in input_ids
        ]
        answers = tokenizer(said, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, answers], dim=1)

    trainer.model.generate = generate


@pytest.mark.parametrize("tool", [multiply, multiply_later])
@pytest.mark.parametrize(
    ("kind", "config"),
    [("kl_rl", {}), ("f_dpg", {}), ("trajectory_balance", {}), ("dpg", {"replay_buffer_size": 8})],
)
def test_tools(
    kind: str, config: dict[str, Any], tool: Callable, make: Make, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = make(kind, {"max_completion_length": 256, **config}, train_dataset=conversational(), tools=[tool])
    name = tool.__name__
    turns = [call(name, '{"a": 3, "b": 4}'), call(name, '{"a": 3, "c": 4}'), "I know.<|im_end|>", "No idea<|im_end|>"]
    speak(trainer, chat_tokenizer, turns)
    recorded = record(trainer)
    for log in learn(trainer):
        assert log["tools/call_frequency"] == 0.5
        assert log["tools/failure_frequency"] == 0.5  # one of the two calls has a wrong argument
    batch, log_policy, _ = recorded[0]
    fresh = slice(0, 2 * G)
    pairs = zip(batch["completion_ids"], batch["tool_mask"], strict=True)
    results = [chat_tokenizer.decode(ids[mask == 0]) for ids, mask in pairs]
    assert "12" in results[0]
    assert "error" in results[1]
    assert results[2] == results[3] == ""
    # The policy neither chose nor is trained on what the tool said
    close(batch["log_proposal"][fresh], log_policy[fresh])
    unmasked = sequence_log_probs(trainer.ref_model, {k: v for k, v in batch.items() if k != "tool_mask"})
    assert (unmasked - log_policy)[0].abs() > 1
    # The prior is the policy that training starts from, tool results masked
    close((batch["log_target"] - log_policy)[fresh], length_evidence(batch)[fresh])


@pytest.mark.parametrize("with_dataset", [True, False])
def test_environment_that_owns_its_reward(
    with_dataset: bool,
    make: Make,
    chat_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = make(
        "f_dpg",
        {"max_completion_length": 256},
        reward_funcs=None,
        train_dataset=conversational() if with_dataset else None,
        environment_factory=Counter,
    )
    amounts = [1, 2, 3, 0]
    speak(trainer, chat_tokenizer, [call("add", f'{{"amount": {amount}}}') for amount in amounts])
    recorded = record(trainer)
    logs = learn(trainer)
    batch, log_policy, _ = recorded[0]
    rewards = torch.tensor(amounts * 2) / 4
    close(batch["log_target"] - log_policy, rewards / BETA)
    close(batch["log_proposal"], log_policy)
    assert logs[0]["rewards/Counter/mean"] == pytest.approx(rewards.mean().item())


def test_environment_reward_beside_a_function_can_be_read_by_name(
    make: Make, chat_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = make(
        "dpg",
        {"max_completion_length": 256, "target": {"name": "tilt", "beta": 1.0, "rewards": ["Counter"]}},
        train_dataset=conversational(),
        environment_factory=Counter,
    )
    speak(trainer, chat_tokenizer, [call("add", f'{{"amount": {amount}}}') for amount in (1, 2, 3, 0)])
    recorded = record(trainer)
    learn(trainer)
    close(recorded[0].batch["log_target"] - recorded[0].log_policy, torch.tensor([1.0, 2.0, 3.0, 0.0] * 2) / 4)


class Examiner(Counter):
    """An environment that writes its own prompts, another one at every generation."""

    num_resets = 0

    def reset(self, **kwargs: Any) -> str:
        self.num_resets += 1
        self.total = 0
        return f"Add up to {self.num_resets}."


def test_prompts_that_an_environment_writes_are_told_apart(
    make: Make, chat_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = make(
        "dpg",
        {"max_completion_length": 256, "max_steps": 3},
        reward_funcs=None,
        train_dataset=None,  # so every row of the data is the same
        environment_factory=Examiner,
    )
    speak(trainer, chat_tokenizer, [call("add", f'{{"amount": {amount}}}') for amount in (1, 2, 3, 0)])
    learn(trainer)
    past = trainer.running_partition.state_dict()
    assert past["count"] == [2 * G] * 3  # the two groups of each generation share a prompt


class Silent:
    """An environment without a reward of its own."""

    def reset(self, **kwargs: Any) -> None:
        return None

    def look(self) -> str:
        """Looks around."""
        return "Nothing."


def test_environments_by_name_with_a_reward_in_one_of_them(
    make: Make, chat_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = make(
        "dpg",
        {"max_completion_length": 256, "shuffle_dataset": False},
        reward_funcs=None,
        train_dataset=conversational(environment=["counter", "silent"] * 2),
        environment_factory={"counter": Counter, "silent": Silent},
    )
    turns = [call("add", f'{{"amount": {amount}}}') for amount in (1, 2, 3, 0)] + [call("look", "{}")] * G
    speak(trainer, chat_tokenizer, turns)
    recorded = record(trainer)
    for log in learn(trainer):
        assert log["posterior/frac_unscored"] == 0.5  # the group that no reward looks at is left out
    batch, log_policy, _ = recorded[0]
    assert batch["usable"].tolist() == [True] * G + [False] * G
    close((batch["log_target"] - log_policy)[:G], torch.tensor([1.0, 2.0, 3.0, 0.0]) / 4 / BETA)


# --- PEFT ------------------------------------------------------------------------------------------------------------


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")


def test_new_adapter(kind: str, make: Make, tiny_models: Any) -> None:
    trainer = make(kind, {"max_steps": 3, "gradient_checkpointing": True}, peft_config=lora())
    base = {name: p for name, p in parameters(trainer.model, trainable=False).items() if "lora" not in name}
    recorded = record(trainer)
    learn(trainer)
    assert isinstance(trainer.model, PeftModel)
    assert trainer.ref_model is None  # the prior is the model without its adapter
    for name, parameter in base.items():
        assert torch.equal(trainer.model.get_parameter(name), parameter), f"{name} has changed"
    prior = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    for batch, log_policy, _ in recorded:
        close(batch["log_proposal"], log_policy)  # with the adapter, and without its dropout
        close(batch["log_target"] - length_evidence(batch), sequence_log_probs(prior, batch))
    assert not torch.allclose(recorded[-1].log_policy, sequence_log_probs(prior, recorded[-1].batch), atol=1e-3)


def trained_adapter(path: str) -> PeftModel:
    """An adapter that is not the identity."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), lora())
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def test_adapter_that_was_trained_before(kind: str, make: Make, tiny_models: Any) -> None:
    # The prior is the adapter that training starts from, not the model underneath
    trainer = make(kind, model=trained_adapter(tiny_models.policy))
    assert not any(".ref." in name for name in parameters(trainer.model))
    recorded = record(trainer)
    learn(trainer)
    prior = trained_adapter(tiny_models.policy).eval()
    for batch, log_policy, _ in recorded:
        close(batch["log_proposal"], log_policy)
        close(batch["log_target"] - length_evidence(batch), sequence_log_probs(prior, batch))
    base = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    start = sequence_log_probs(base, recorded[0].batch)
    assert not torch.allclose(start, recorded[0].log_policy, atol=1e-3)


@pytest.mark.parametrize("adapter", ["none", "new", "trained"])
def test_prior_of_its_own(adapter: str, kind: str, make: Make, tiny_models: Any) -> None:
    arguments = {"none": {}, "new": {"peft_config": lora()}, "trained": {"model": trained_adapter(tiny_models.policy)}}
    trainer = make(kind, {"prior_model_name_or_path": tiny_models.prior, "max_steps": 3}, **arguments[adapter])
    assert trainer.args.beta == trainer.beta == BETA
    weights = parameters(trainer.ref_model, trainable=False)
    recorded = record(trainer)
    logs = learn(trainer)
    prior = AutoModelForCausalLM.from_pretrained(tiny_models.prior)
    for batch, _, _ in recorded:
        close(batch["log_target"] - length_evidence(batch), sequence_log_probs(prior, batch))
    assert logs[0]["posterior/kl_prior"] != 0  # training does not start from the prior
    assert all(torch.equal(weights[name], p) for name, p in trainer.ref_model.named_parameters())


def test_prior_with_another_vocabulary_is_refused(make: Make, tiny_models: Any) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        make("f_dpg", {"prior_model_name_or_path": tiny_models.other_vocabulary})


def test_prior_follows_the_settings_of_the_models(make: Make, tiny_models: Any) -> None:
    config = {"prior_model_name_or_path": tiny_models.prior, "model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = make("f_dpg", {**config, "cast_lm_head_to_fp32": True, "temperature": 0.7})
    assert trainer.model.model.dtype == trainer.ref_model.model.dtype == torch.bfloat16
    recorded = record(trainer)
    learn(trainer)
    prior = AutoModelForCausalLM.from_pretrained(tiny_models.prior, dtype="float32")
    expected = sequence_log_probs(prior, recorded[0].batch, temperature=0.7)
    difference = recorded[0].batch["log_target"] - length_evidence(recorded[0].batch) - expected
    assert difference.abs().max() < 0.3  # bfloat16: eight tokens


# --- Models ----------------------------------------------------------------------------------------------------------


def test_model_as_path_or_as_object(kind: str, make: Make, tiny_models: Any) -> None:
    by_path = make(kind)
    by_object = make(kind, model=AutoModelForCausalLM.from_pretrained(tiny_models.policy, dtype="float32"))
    learn(by_path)
    learn(by_object)
    assert_same_weights(by_path, by_object)


@pytest.mark.parametrize("coefficient", [None, 0.0])
def test_mixture_of_experts(coefficient: float | None, kind: str, make: Make, tiny_models: Any) -> None:
    # The load-balancing loss of the architecture is added, with its own coefficient unless the config has one
    config = {"router_aux_loss_coef": coefficient, "gradient_accumulation_steps": 2, "per_device_train_batch_size": G}
    trainer = make(kind, config, model=tiny_models.moe)
    added: list[float] = []
    compute_loss = trainer._compute_loss

    def compute_and_compare(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        loss = compute_loss(model, inputs)
        trainer.aux_loss_enabled, enabled = False, trainer.aux_loss_enabled
        with torch.no_grad():
            added.append((loss - compute_loss(model, inputs)).item())
        trainer.aux_loss_enabled = enabled
        return loss

    trainer._compute_loss = compute_and_compare
    for step, log in enumerate(learn(trainer)):
        if coefficient is None:
            assert log["aux_loss"] > 0
            assert sum(added[2 * step : 2 * step + 2]) == pytest.approx(0.1 * log["aux_loss"], rel=1e-3)
        else:
            assert "aux_loss" not in log
            assert sum(added) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bf16(dtype: str, kind: str, make: Make) -> None:
    trainer = make(kind, {"bf16": True, "model_init_kwargs": {"dtype": dtype}})
    recorded = record(trainer)
    learn(trainer)
    assert recorded[0].batch["log_target"].dtype == torch.float32  # sums over tokens are not in bfloat16
    close(recorded[0].batch["log_target"] - length_evidence(recorded[0].batch), recorded[0].batch["log_proposal"])


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_gives_the_same_gradient(options: dict[str, bool], make: Make) -> None:
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options}
    with_it, without_it = make("f_dpg", {**SGD, **checkpointing}), make("f_dpg", SGD)
    learn(with_it)
    learn(without_it)
    assert_same_weights(with_it, without_it, atol=1e-6)


def test_tokenizer_without_a_padding_token(make: Make, tiny_models: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.policy, pad_token=None)
    assert tokenizer.pad_token is None
    trainer = make(
        "dpg", processing_class=tokenizer
    )  # TRL pads with EOS, which must not end the completions in the loss
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    recorded = record(trainer)
    learn(trainer)
    batch, log_policy, _ = recorded[0]
    close(batch["log_proposal"], log_policy)
    ended = (batch["completion_ids"] == tokenizer.eos_token_id) & batch["completion_mask"].bool()
    assert ended.any(dim=1).any()  # EOS itself is scored


def test_several_end_tokens_and_added_tokens(make: Make, tiny_models: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.policy)
    tokenizer.add_tokens(["<answer>"])
    model = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ends = [tokenizer.eos_token_id, *range(60, 90)]
    model.generation_config.eos_token_id = ends
    folder = tmp_path / "resized"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer = make("f_dpg", model=str(folder))
    recorded = record(trainer)
    learn(trainer)
    batch, log_policy, _ = recorded[0]
    close(batch["log_proposal"], log_policy)
    assert {ids[-1] for ids in completions(batch)} & set(ends[1:])


def test_own_callbacks_and_optimizer(make: Make) -> None:
    seen: list[str] = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            seen.extend(logs)

    trainer = make("kl_rl", callbacks=[Watch()])
    sgd = torch.optim.SGD(trainer.model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1.0)
    trainer = make("kl_rl", model=trainer.model, callbacks=[Watch()], optimizers=(sgd, schedule))
    assert trainer.optimizer is sgd
    learn(trainer)
    assert {*METRICS, *GENERATION_METRICS} <= set(seen)


# --- The distribution that is sampled is the one that is scored ------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.5, "num_iterations": 2, "max_steps": 4},
        {"pad_to_multiple_of": 16},
        {"steps_per_generation": 2, "per_device_train_batch_size": G, "max_steps": 4},
        {"generation_batch_size": 4 * G, "per_device_train_batch_size": G, "max_steps": 4},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": G},
        {"num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["f_dpg", "trajectory_balance"])
def test_terms_of_the_loss_match_a_plain_forward_pass(config: dict[str, Any], kind: str, make: Make) -> None:
    trainer = make(kind, config)
    recorded = record(trainer)
    learn(trainer)
    for batch, log_policy, _ in recorded:
        close(batch["log_proposal"], log_policy)
        log_prior = sequence_log_probs(trainer.ref_model, batch, trainer.temperature)
        close(batch["log_target"], log_prior + length_evidence(batch))
        assert batch["usable"].all()
        if multiple := trainer.pad_to_multiple_of:
            assert batch["prompt_ids"].size(1) % multiple == batch["completion_ids"].size(1) % multiple == 0
    generations_per_step = trainer.num_iterations * trainer.args.steps_per_generation
    steps = trainer.args.max_steps * trainer.args.gradient_accumulation_steps
    assert len(recorded) == steps // generations_per_step


def test_gradient_accumulation_is_the_same_update(kind: str, make: Make) -> None:
    # One batch of eight, and two micro-batches of four (TRL shuffles: any four) give the same gradient
    whole = make(kind, SGD)
    parts = make(kind, {**SGD, "per_device_train_batch_size": G, "gradient_accumulation_steps": 2})
    logs = learn(whole), learn(parts)
    assert_same_weights(whole, parts, atol=1e-6)
    for one, two in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3, abs=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
        assert one["posterior/ess"] == pytest.approx(two["posterior/ess"], rel=1e-3)


def test_padding_does_not_change_the_update(kind: str, make: Make) -> None:
    tight, padded = make(kind, SGD), make(kind, {**SGD, "pad_to_multiple_of": 32})
    for trainer in (tight, padded):
        script(trainer, SCORED * 2)
        learn(trainer)
    assert_same_weights(tight, padded, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "reuses"),
    [
        ({}, False),
        ({"gradient_accumulation_steps": 2}, False),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, False),
        ({"num_iterations": 2}, True),
        ({"steps_per_generation": 2}, True),
        ({"generation_batch_size": 4 * G}, True),
        ({"replay_buffer_size": 2 * G}, True),
    ],
    ids=str,
)
def test_trajectory_balance_knows_whether_the_policy_moves_under_its_samples(
    config: dict[str, Any], reuses: bool, tmp_path: Path
) -> None:
    # The fit of log Z to the policy that sampled goes stale as soon as that policy is updated, in whatever way
    args = TrajectoryBalanceConfig(output_dir=str(tmp_path), **{**DEFAULTS, **config})
    assert args.reuses_samples is reuses


@pytest.mark.parametrize("kind", ["kl_rl", "f_dpg"])
def test_reuse_of_completions_corrects_for_the_policy_that_moved(kind: str, make: Make) -> None:
    # Each completion is weighted by pi/q: at the second pass over a batch the policy is another one
    trainer = make(kind, {"num_iterations": 2, "max_steps": 2})
    seen: list[tuple[Any, torch.Tensor]] = []
    coefficient = trainer.coefficient

    def coefficient_and_record(sequences: Any) -> torch.Tensor:
        seen.append((sequences, coefficient(sequences)))
        return seen[-1][1]

    trainer.coefficient = coefficient_and_record
    learn(trainer)
    seen = seen[1:]  # the first is of whole groups, when they are generated
    ratios = [(sequences.log_policy - sequences.log_proposal).exp() for sequences, _ in seen]
    close(ratios[0], torch.ones_like(ratios[0]))
    assert (ratios[1] - 1).abs().max() > 1e-3
    for (sequences, actual), ratio in zip(seen, ratios, strict=True):
        log_t = sequences.log_policy - sequences.log_target + sequences.log_z
        # Z cancels in KL-RL's own formula: it is left out of both the pseudo-reward and the baseline
        slope = log_t - sequences.log_z if kind == "kl_rl" else trainer.divergence.slope(log_t)
        close(actual, ratio * (slope + sequences.baseline))


def test_cap_is_said_to_act(kind: str, make: Make) -> None:
    logs = learn(make(kind, {"pseudo_reward_cap": 1e-3}))
    assert all(log["posterior/capped_frac"] > 0.5 for log in logs)


# --- Other samplers --------------------------------------------------------------------------------------------------


def test_vllm(kind: str, make: Make, fake_vllm: type) -> None:
    trainer = make(kind, {"use_vllm": True, "vllm_mode": "colocate"})
    recorded = record(trainer)
    sampled: list[list[list[float | None]]] = []
    generate = trainer.vllm_generation.generate

    def generate_and_record(*args: Any, **kwargs: Any) -> Any:
        result = generate(*args, **kwargs)
        sampled.append(trainer.vllm_generation.log_probs)
        return result

    trainer.vllm_generation.generate = generate_and_record
    logs = learn(trainer)
    assert trainer.vllm_generation.num_syncs == 2  # the sampler follows the policy
    for (batch, log_policy, _), log_probs in zip(recorded, sampled, strict=True):
        # The proposal is what the sampler said, not what the trainer would have said
        expected = torch.tensor([sum(x for x in row if x is not None) for row in log_probs])
        close(batch["log_proposal"][1:], expected[1:])
        lengths = batch["completion_mask"].sum(dim=1)
        close(batch["log_proposal"], log_policy + (lengths - (torch.arange(2 * G) == 0).int()) * fake_vllm.offset)
        assert batch["log_proposal"].isfinite().all()  # also where the sampler could not score a token
    assert "sampling/importance_sampling_ratio/mean" in logs[0]


def test_vllm_without_correction_still_weighs_by_the_sampler(make: Make, fake_vllm: type) -> None:
    trainer = make("dpg", {"use_vllm": True, "vllm_importance_sampling_correction": False})
    recorded = record(trainer)
    learn(trainer)
    batch, log_policy, _ = recorded[0]
    close((batch["log_proposal"] - log_policy)[1:], batch["completion_mask"].sum(dim=1)[1:] * fake_vllm.offset)


@pytest.mark.parametrize("with_log_probs", [True, False])
def test_rollout_function(with_log_probs: bool, kind: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        ids = [[65 + i, 66, 67, 68, 2][-(2 + i % 4) :] for i in range(len(prompts))]
        return {
            "prompt_ids": trainer._tokenizer(prompts)["input_ids"],
            "completion_ids": ids,
            "logprobs": [[-5.0] * len(row) for row in ids] if with_log_probs else None,
            "env_mask": [[1] * (len(row) - 1) + [0] for row in ids],  # the last token came from outside
            "grade": [i / 4 for i in range(len(ids))],
        }

    def grade_reward(completions: list, grade: list[float], **kwargs: Any) -> list[float]:
        return grade

    config = {"partition": "running", "max_steps": 4}
    trainer = make(kind, config, rollout_func=rollout, reward_funcs=grade_reward)
    recorded = record(trainer)
    learn(trainer)
    assert len(trainer.running_partition) == len(PROMPTS)  # the fields that it adds are no part of the prompt
    batch, log_policy, _ = recorded[0]
    own_tokens = batch["completion_mask"].sum(dim=1) - 1
    close(batch["log_proposal"], -5.0 * own_tokens if with_log_probs else log_policy)
    close(batch["log_target"], log_policy + torch.arange(2 * G) / 4 / BETA)


# --- Evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_generations_eval", [None, 1, 2])
def test_evaluation_while_training(num_generations_eval: int | None, kind: str, make: Make) -> None:
    config = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
        "num_generations_eval": num_generations_eval,
        "per_device_eval_batch_size": 2 * G,
        "partition": "leave_one_out",
    }
    trainer = make(kind, config, eval_dataset=plain())
    recorded = record(trainer)
    learn(trainer)
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 3
    names = {f"eval_{name}" for name in [*METRICS, *GENERATION_METRICS, "loss"]} - {"eval_step_time"}
    for log in evaluations:
        assert_finite(log, names)
    if num_generations_eval is not None:  # groups are of this size: Z is that of the one sibling, or one's own
        batch = recorded[0].batch
        weights = (batch["log_target"] - batch["log_proposal"]).view(-1, num_generations_eval)
        close(batch["log_z"], weights.flip(1).flatten())


def test_evaluation_does_not_change_training(make: Make) -> None:
    # The state that training learns from (Z of each prompt, replay) is not touched by looking at the policy
    config = {"partition": "running", "replay_buffer_size": 2 * G, "max_steps": 3}
    looked, not_looked = make("dpg", config, eval_dataset=plain()), make("dpg", config)
    for trainer in (looked, not_looked):
        script(trainer, SCORED * 2)
    looked.evaluate()
    state = looked.posterior_state()
    assert state["running_partition"]["keys"] == []
    assert state["replay_buffer"]["rows"] == []
    learn(looked)
    learn(not_looked)
    assert_same_weights(looked, not_looked)


def test_evaluation_batch_larger_than_the_generation_batch(kind: str, make: Make) -> None:
    # transformers' default for evaluation is 8, whatever the batch of training
    config = {"per_device_train_batch_size": G, "per_device_eval_batch_size": 4 * G, "log_completions": True}
    trainer = make(kind, config, eval_dataset=plain())
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    learn(trainer)


def test_several_evaluation_datasets(make: Make) -> None:
    datasets = {"one": plain(), "two": conversational()}
    config = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2 * G}
    for evaluation in (datasets, DatasetDict(datasets)):
        trainer = make("f_dpg", config, eval_dataset=evaluation)
        learn(trainer)
        logged = {name for log in trainer.state.log_history for name in log}
        assert {"eval_one_loss", "eval_two_loss", "eval_posterior/ess"} <= logged


def test_streamed_evaluation(make: Make) -> None:
    trainer = make("kl_rl", {"per_device_eval_batch_size": G}, eval_dataset=plain().to_iterable_dataset())
    assert math.isfinite(trainer.evaluate()["eval_posterior/reverse_kl"])


def test_best_model_by_one_of_our_metrics(make: Make) -> None:
    config = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": G,
        "save_strategy": "best",
        "metric_for_best_model": "eval_posterior/reverse_kl",
        "greater_is_better": False,
        "load_best_model_at_end": True,
    }
    trainer = make("kl_rl", config, eval_dataset=plain())
    trainer.train()
    logged = [log["eval_posterior/reverse_kl"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.state.best_metric == min(logged)


# --- Checkpoints -----------------------------------------------------------------------------------------------------

LEAVE_ONE_OUT = {"partition": "leave_one_out"}
RUNNING = {"partition": "running"}
REPLAY = {"replay_buffer_size": 3 * G, "replay_ratio": 0.5}
RESUMABLE = [
    ("kl_rl", LEAVE_ONE_OUT),
    ("f_dpg", RUNNING),
    ("dpg", {**LEAVE_ONE_OUT, "gradient_accumulation_steps": 2}),
    ("dpg", {**RUNNING, **REPLAY}),
    ("trajectory_balance", LEAVE_ONE_OUT),
    ("trajectory_balance", {**LEAVE_ONE_OUT, **REPLAY}),
]
# Two prompts a step, four in all, each twice in one epoch: at the checkpoint every prompt has been seen once, so what
# was learned about Z matters. (TRL's sampler starts its shuffles afresh when a run resumes in a later epoch.)
TWO_VISITS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "shuffle_dataset": False}


def twice() -> Dataset:
    return concatenate_datasets([plain(), plain()])


@pytest.mark.parametrize(("kind", "config"), RESUMABLE, ids=str)
def test_resumed_run_is_the_uninterrupted_one(kind: str, config: dict[str, Any], make: Make, tmp_path: Path) -> None:
    config = {**config, **TWO_VISITS}
    straight = make(kind, config, train_dataset=twice())
    learn(straight)
    resumed = make(kind, config, train_dataset=twice())
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_same_weights(straight, resumed)
    assert step_logs(straight)[-1]["loss"] == step_logs(resumed)[-1]["loss"]
    one, other = straight.posterior_state(), resumed.posterior_state()
    assert one.keys() == other.keys()
    assert one.get("running_partition") == other.get("running_partition")
    if "replay_buffer" in one:
        rows, other_rows = one["replay_buffer"]["rows"], other["replay_buffer"]["rows"]
        assert len(rows) == len(other_rows) == 3 * G
        for row, other_row in zip(rows, other_rows, strict=True):
            assert row.keys() == other_row.keys()
            assert all(torch.equal(row[name], other_row[name]) for name in row)


@from_trl
@pytest.mark.parametrize("config", [RUNNING, {**LEAVE_ONE_OUT, **REPLAY}], ids=str)
def test_resuming_needs_what_was_learned(config: dict[str, Any], make: Make, tmp_path: Path) -> None:
    # The converse: without our file the run goes on, says so, and is another one
    config = {**config, **TWO_VISITS}
    straight = make("dpg", config, train_dataset=twice())
    learn(straight)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    os.remove(checkpoint / "posterior_state_0.pt")
    resumed = make("dpg", config, train_dataset=twice())
    with pytest.warns(UserWarning, match="starts afresh"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(AssertionError):
        assert_same_weights(straight, resumed)


def test_checkpoint_of_another_trainer_or_target_is_refused(make: Make, tmp_path: Path) -> None:
    make("f_dpg", {"save_strategy": "steps", "save_steps": 1}).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    with pytest.raises(ValueError, match="FDPGTrainer"):
        make("dpg").train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="Tilt"):
        make("f_dpg", {"beta": 2 * BETA}).train(resume_from_checkpoint=checkpoint)


def test_checkpoint_of_an_adapter_resumes(make: Make, tmp_path: Path) -> None:
    straight = make("f_dpg", TWO_VISITS, peft_config=lora(), train_dataset=twice())
    learn(straight)
    resumed = make("f_dpg", TWO_VISITS, peft_config=lora(), train_dataset=twice())
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_same_weights(straight, resumed)


def test_saved_model_is_an_ordinary_one(kind: str, make: Make, tmp_path: Path) -> None:
    trainer = make(kind, {"save_strategy": "steps", "save_steps": 2, "save_only_model": True})
    learn(trainer)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert not list(checkpoint.glob("posterior_state*"))
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name))
    card = (tmp_path / "out" / "README.md").read_text()
    assert trainer._paper["id"] in card
    assert "GRPO" not in card


# --- Pure RL ---------------------------------------------------------------------------------------------------------

NEEDS_A_POSTERIOR = tuple(
    f"posterior/{name}" for name in ("log_z", "ess", "kl_prior", "reverse_kl", "forward_kl", "frac_no_evidence")
)


@pytest.mark.parametrize("adapter", ["none", "new", "trained"])
def test_beta_zero_is_pure_rl(adapter: str, make: Make, tiny_models: Any) -> None:
    arguments = {"none": {}, "new": {"peft_config": lora()}, "trained": {"model": trained_adapter(tiny_models.policy)}}
    trainer = make("kl_rl", {"beta": 0.0, "max_steps": 3, "learning_rate": 1e-3}, **arguments[adapter])
    assert trainer.ref_model is None
    recorded = record(trainer)
    learn(trainer, without=NEEDS_A_POSTERIOR)
    for batch, _, _ in recorded:
        assert "ref_per_token_logps" not in batch
        rewards = (length_evidence(batch) * BETA).view(-1, G)
        others = (rewards.sum(dim=1, keepdim=True) - rewards) / (G - 1)
        close(batch["advantages"], (rewards - others).flatten())  # REINFORCE with a leave-one-out baseline


@pytest.mark.parametrize("other", ["f_dpg", "dpg", "trajectory_balance"])
def test_beta_zero_is_refused_elsewhere(other: str, make: Make) -> None:
    with pytest.raises(ValueError, match="KLRLTrainer"):
        make(other, {"beta": 0.0})


# --- Replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dpg", "trajectory_balance"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"steps_per_generation": 2, "per_device_train_batch_size": G, "replay_ratio": 0.5},
        {"num_iterations": 2},
        {"partition": "running"},
    ],
    ids=str,
)
def test_replay(kind: str, config: dict[str, Any], make: Make) -> None:
    trainer = make(kind, {"replay_buffer_size": 2 * G, "max_steps": 6, **config})
    recorded = record(trainer)
    logs = [log for log in learn(trainer) if "reward" in log]
    fresh, ratio = 2 * G, trainer.args.replay_ratio
    assert len(recorded[0].batch["usable"]) == fresh
    assert len(recorded[-1].batch["usable"]) == fresh + ratio * fresh
    assert logs[-1]["posterior/replayed_frac"] == pytest.approx(ratio / (1 + ratio))
    batch, log_policy, _ = recorded[-1]
    earlier = recorded[-2].batch
    kept = {tuple(ids): i for i, ids in enumerate(completions(earlier))}
    log_prior = sequence_log_probs(trainer.ref_model, batch)
    close(batch["log_target"], log_prior + length_evidence(batch))  # the prompt of each is still its own
    close(batch["log_proposal"][:fresh], log_policy[:fresh])
    for i, ids in list(enumerate(completions(batch)))[fresh:]:
        source = kept[tuple(ids)]
        assert batch["log_proposal"][i] == earlier["log_proposal"][source]  # of the policy that sampled it
