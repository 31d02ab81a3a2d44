"""Samples of the prior in a training run: drawn before the first update, scored exactly, and without other traces.

The tiny prior's completions are all enumerated, so every sample on disk can be checked against its probability.
"""

import asyncio
import functools
import inspect
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from tests.helpers.enumerated import log_probs_of
from tests.helpers.trainers import QUIET, TRAINERS
from tests.helpers.training import from_trl, lora, step_logs
from tests.helpers.vllm import GroupingServer
from trl_bayes.benchmarks.tiny import letter_count_task
from trl_bayes.groups import bounded_fixed_log_z
from trl_bayes.prior import prompt_key
from trl_bayes.rewards import length_between
from trl_bayes.trainers.batches import row_hash
from trl_bayes.trainers.further_data import rows_of
from trl_bayes.trainers.learning_from_prior import prior_samples_of
from trl_bayes.trainers.posterior_trainer import PosteriorTrainer


TASK = letter_count_task()
BEST_OF_4 = {"name": "calibrated", "transform": "best_of_n", "n": 4}
TILT = {"name": "tilt", "beta": 0.7}
DEFAULTS: dict[str, Any] = {
    **QUIET,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "num_generations": 4,
    "num_prior_samples": 30,
    "max_completion_length": TASK.max_completion_length,
    "max_steps": 2,
    "learning_rate": 1e-2,
}
# These rewards tie, which is said where the evidence of a calibrated target is asked for
ties = pytest.mark.filterwarnings("ignore:.* share their reward with another:UserWarning")


class Prior(NamedTuple):
    path: str
    tokenizer: PreTrainedTokenizerBase
    log_probs: dict[str, dict[tuple[int, ...], float]]  # prompt -> completion -> log pi_0


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Prior:
    path = TASK.build_model(tmp_path_factory.mktemp("prior"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    return Prior(path, tokenizer, log_probs_of(TASK, AutoModelForCausalLM.from_pretrained(path), tokenizer))


def count_a(completions: list[str], **kwargs: Any) -> list[float]:
    return TASK.reward(completions)


def length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def only_with_b(completions: list[str], **kwargs: Any) -> list[float | None]:
    """None where there is no b, infinite for two."""
    values = {0: None, 1: 1.0}
    return [values.get(text.count("b"), float("inf")) for text in completions]


class Make:
    def __init__(self, prior: Prior, folder: Path):
        self.prior, self.folder = prior, folder

    def __call__(
        self, kind: str = "f_dpg", target: Any = None, config: dict[str, Any] | None = None, **arguments: Any
    ) -> PosteriorTrainer:
        row = TRAINERS[kind]
        args = row.config(**{"output_dir": str(self.folder / "out"), **DEFAULTS, **(config or {})})
        defaults = {"model": self.prior.path, "reward_funcs": count_a, "train_dataset": TASK.dataset(8)}
        return row.trainer(args=args, target=target, **{**defaults, **arguments})


@pytest.fixture
def make(prior: Prior, tmp_path: Path) -> Make:
    return Make(prior, tmp_path)


def samples_on_disk(folder: Path, kind: str = "samples") -> list[dict[str, Any]]:
    return [row for file in sorted(folder.rglob(f"{kind}-*.parquet")) for row in pq.read_table(file).to_pylist()]


def of_prompts(folder: Path, prior: Prior, prompts: Sequence[str]) -> list[list[dict[str, Any]]]:
    """The samples of each prompt, in the order of their numbers."""
    keys = [prompt_key(prior.tokenizer(text=prompt)["input_ids"]) for prompt in prompts]
    rows = sorted(samples_on_disk(folder), key=lambda row: row["number"])
    return [[row for row in rows if row["prompt_key"] == key] for key in keys]


def draw_nothing(trainer: PosteriorTrainer, score: bool = False) -> PosteriorTrainer:
    """A trainer for which everything must be there; but for the rewards, with `score`."""

    def refuse(*args: Any) -> None:
        raise AssertionError("a sample was drawn or scored")

    trainer._draw_prior = refuse  # type: ignore[method-assign, assignment]
    if not score:
        trainer._score_prior_samples = refuse  # type: ignore[method-assign, assignment]
    return trainer


def weights(trainer: PosteriorTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0, msg=f"{name} differs")


# --- What is drawn ---------------------------------------------------------------------------------------------------


def assert_scored_right(folder: Path, prior: Prior, prompts: Sequence[str], num_samples: int) -> None:
    assert len(samples_on_disk(folder)) == len(prompts) * num_samples
    for prompt, rows in zip(prompts, of_prompts(folder, prior, prompts), strict=True):
        assert [row["number"] for row in rows] == list(range(num_samples))
        for row in rows:
            exact = prior.log_probs[prompt][tuple(row["completion_ids"])]
            assert row["log_prior"] == pytest.approx(exact, abs=1e-4)
            assert row["text"] == prior.tokenizer.decode(row["completion_ids"], skip_special_tokens=True)


def rewards_of(folder: Path, rows: Sequence[dict[str, Any]]) -> list[list[float | None]]:
    """The rewards of samples, whose functions are in the order of their fingerprints' first appearance."""
    found: dict[tuple[int, int], list[float | None]] = {}
    for each in samples_on_disk(folder, "rewards"):
        _, number, completion_key, *rewards = each.values()
        found[number, completion_key] = rewards
    return [found[row["number"], row["completion_key"]] for row in rows]


# Chunks of 16, and of 12 = two steps of 6 in groups of 4: neither divides the 30 samples of a prompt
@pytest.mark.parametrize("batch", [{}, {"per_device_train_batch_size": 6, "steps_per_generation": 2}])
def test_samples_have_their_probability_under_the_prior_and_their_rewards(
    batch: dict[str, int], make: Make, prior: Prior, tmp_path: Path
) -> None:
    trainer = make(target=TILT, config={"partition": "prior_samples", **batch}, reward_funcs=[count_a, length])
    trainer.train()
    folder = tmp_path / "out" / "prior_samples"
    assert_scored_right(folder, prior, TASK.prompts, 30)
    rows = of_prompts(folder, prior, TASK.prompts)
    for of_prompt in rows:
        for row, rewards in zip(of_prompt, rewards_of(folder, of_prompt), strict=True):
            assert rewards == [TASK.reward([row["text"]])[0], len(row["completion_ids"])]

    # and log Z is the mean of their evidence
    totals = torch.tensor([[sum(rewards) for rewards in rewards_of(folder, of_prompt)] for of_prompt in rows])
    log_z = (totals / 0.7).logsumexp(dim=1) - torch.tensor(30.0).log()
    keys = torch.tensor([row_hash(row) for row in TASK.dataset(4)])
    assert trainer.partition.table is not None
    torch.testing.assert_close(trainer.partition.table.lookup(keys)[:, 0].float(), log_z, rtol=0, atol=1e-4)


def test_samples_follow_the_prior(make: Make, prior: Prior, tmp_path: Path) -> None:
    """Mean `log pi_0` of 2,000 samples is minus the prior's entropy; 4 standard errors: false alarm 3e-4 over all."""
    config = {"num_prior_samples": 500, "per_device_train_batch_size": 200, "max_steps": 1}
    make(target=BEST_OF_4, config=config, train_dataset=TASK.dataset(200)).train()
    drawn = of_prompts(tmp_path / "out" / "prior_samples", prior, TASK.prompts)
    for prompt, rows in zip(TASK.prompts, drawn, strict=True):
        values = torch.tensor([row["log_prior"] for row in rows])
        assert len(values) == 500
        exact = torch.tensor(list(prior.log_probs[prompt].values()), dtype=torch.float64)
        mean = (exact.exp() * exact).sum()
        deviation = (exact.exp() * (exact - mean).square()).sum().sqrt()
        assert abs(values.mean() - mean) <= 4 * deviation / len(values) ** 0.5


def test_at_another_temperature(make: Make, prior: Prior, tmp_path: Path) -> None:
    make(target=BEST_OF_4, config={"temperature": 2.0}).train()
    model = AutoModelForCausalLM.from_pretrained(prior.path)
    exact = TASK.log_probs(model, prior.tokenizer, temperature=2.0)
    ids, mask = TASK.completions(prior.tokenizer)
    place = {tuple(row[own].tolist()): i for i, (row, own) in enumerate(zip(ids, mask, strict=True))}
    for i, rows in enumerate(of_prompts(tmp_path / "out" / "prior_samples", prior, TASK.prompts)):
        assert len(rows) == 30
        for row in rows:
            expected = exact[i, place[tuple(row["completion_ids"])]].item()
            assert row["log_prior"] == pytest.approx(expected, abs=1e-4)


def test_missing_and_infinite_rewards(make: Make, tmp_path: Path) -> None:
    """The target learns from the rest; the file has what each function says, whatever the others do."""
    trainer = make(target={**BEST_OF_4, "rewards": ["only_with_b"]}, reward_funcs=[count_a, only_with_b])
    trainer.train()
    rows = samples_on_disk(folder := tmp_path / "out" / "prior_samples")
    for row, rewards in zip(rows, rewards_of(folder, rows), strict=True):
        assert rewards[1:] == only_with_b([row["text"]])
        assert rewards[0] is not None
    assert all(value.isfinite().all() for value in weights(trainer).values())
    assert 0 < step_logs(trainer)[0]["posterior/frac_unscored"] < 1


@from_trl
def test_a_prompt_without_any_reward_is_left_out(make: Make) -> None:
    def never_for_b(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None if p == "b" else r for p, r in zip(prompts, TASK.reward(completions), strict=True)]

    each_once = TASK.dataset(4)  # in every batch
    trainer = make("dpg", BEST_OF_4, reward_funcs=never_for_b, train_dataset=each_once)
    trainer.train()
    assert step_logs(trainer)[0]["posterior/frac_unscored"] == pytest.approx(1 / 4)
    assert all(value.isfinite().all() for value in weights(trainer).values())

    with pytest.warns(
        UserWarning, match=r"^1 of 4 prompts have 30 prior samples without a difference .* \(1 of them: none with"
    ):
        trainer = make("dpg", TILT, {"partition": "prior_samples"}, reward_funcs=never_for_b, train_dataset=each_once)
        trainer.train()
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_no_reward_for_any_sample_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="No sample of the prior has a reward"):
        make(target=BEST_OF_4, reward_funcs=lambda completions, **kwargs: [None] * len(completions)).train()


@from_trl
def test_a_rare_event_that_no_sample_shows(make: Make) -> None:
    """Z = 0 in the samples: nothing can be learned, which is said, and nothing breaks."""
    trainer = make("dpg", {"name": "constraint", "threshold": 3.5}, {"partition": "prior_samples"})
    before = weights(trainer)
    with pytest.warns(
        UserWarning, match="^4 of 4 prompts have 30 prior samples .* none with evidence.*`num_prior_samples`"
    ):
        trainer.train()
    assert_same(weights(trainer), before)


@from_trl
def test_a_soft_event_that_no_sample_shows(make: Make) -> None:
    """Nothing is known of Z until training meets it, and then its factor is bounded: without the rule it is 22,025."""
    successes = iter([False] * (4 * 30 + 16))  # the prior's samples, and the first batch

    def rare(completions: list[str], **kwargs: Any) -> list[float]:
        return [0.0 if not next(successes, True) else 1.0 for _ in completions]

    def then_one_of_each_group(completions: list[str], **kwargs: Any) -> list[float]:
        return [value * (i % 4 == 0) for i, value in enumerate(rare(completions))]

    tilt = {"name": "tilt", "beta": 0.1}
    config = {"partition": "prior_samples", "max_steps": 2, "learning_rate": 0.0}
    trainer = make("dpg", tilt, config, reward_funcs=then_one_of_each_group, train_dataset=TASK.dataset(4))
    seen: list[torch.Tensor] = []
    terms = trainer._posterior_terms

    def keep(*args: Any) -> Any:
        seen.append((found := terms(*args))["advantages"])
        return found

    trainer._posterior_terms = keep  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="^4 of 4 prompts have 30 prior samples without a difference"):
        trainer.train()
    first, second = step_logs(trainer)
    unknown = {"posterior/log_z", "posterior/ess", "posterior/reverse_kl", "posterior/forward_kl"}
    assert not unknown & first.keys() and "posterior/kl_prior" in first
    assert second["posterior/log_z"] == pytest.approx(math.log((30 + 7 + math.exp(10)) / 38), abs=1e-4)
    assert seen[0].abs().max() < 1e-4 and 40 < seen[1].max() < 4 / 3 * 38


def test_rows_with_other_columns_are_other_prompts(make: Make, prior: Prior, tmp_path: Path) -> None:
    """The evidence may depend on any column. With `remove_unused_columns` the trainer sees the prompt only."""

    def as_wanted(completions: list[str], wanted: list[str], **kwargs: Any) -> list[float]:
        return [float(text.count(letter)) for text, letter in zip(completions, wanted, strict=True)]

    data = Dataset.from_dict({"prompt": ["a", "a", "b", "a"], "wanted": ["c", "d", "c", "c"]})
    make(target=BEST_OF_4, reward_funcs=as_wanted, train_dataset=data).train()
    folder = tmp_path / "out" / "prior_samples"
    with_a, with_b = of_prompts(folder, prior, ["a", "b"])
    assert (len(with_a), len(with_b)) == (60, 30)  # two rows have the prompt "a", and share no sample
    expected = [[row["text"].count("c" if row["number"] < 30 else "d")] for row in with_a]
    assert rewards_of(folder, with_a) == expected

    config = {"remove_unused_columns": True, "prior_samples_dir": str(tmp_path / "narrow")}
    make(target=BEST_OF_4, config=config, train_dataset=data).train()
    assert len(samples_on_disk(tmp_path / "narrow")) == 2 * 30


def test_a_vllm_server_samples_each_row_for_its_own_prompt(
    make: Make, prior: Prior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of 4 would span two prompts here, since 30 is not a multiple of 4; lengths of prompts differ."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", GroupingServer)
    trainer = make(target=BEST_OF_4, config={"use_vllm": True, "max_steps": 1})
    asked: list[tuple[Any, int]] = []
    generate = trainer._generate_single_turn

    def record(prompt_ids: Any, images: Any, fields: Any, num_generations: int) -> Any:
        asked.append((prompt_ids, num_generations))
        return generate(prompt_ids, images, fields, num_generations)

    trainer._generate_single_turn = record
    trainer.train()
    assert [number for _, number in asked] == [1] * 8 + [4]  # 120 samples in chunks of 16, then the training
    assert trainer.num_generations == trainer.num_generations_eval == 4
    assert_scored_right(tmp_path / "out" / "prior_samples", prior, TASK.prompts, 30)


# --- No other traces -------------------------------------------------------------------------------------------------


@ties
@pytest.mark.parametrize(
    ("kind", "target", "partition"),
    [
        ("f_dpg", TILT, "prior_samples"),
        ("kl_rl", BEST_OF_4, "known"),
        ("dpg", {"name": "moments", "mu": {"count_a": 0.5}}, "running"),
        ("tb", {"name": "log_sigmoid_centered"}, "prior_samples"),
    ],
)
def test_training_is_the_same_whether_samples_are_drawn_or_found(
    kind: str, target: dict[str, Any], partition: str, make: Make
) -> None:
    settings = {"partition": partition, "num_prior_samples": 60}
    drew = make(kind, target, settings)
    drew.train()
    found = draw_nothing(make(kind, target, settings))
    found.train()
    assert_same(weights(found), weights(drew))
    timed = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    for one, other in zip(drew.state.log_history, found.state.log_history, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


def test_metrics_and_tables_show_training_only(make: Make) -> None:
    """The first batch is the one that a run without prior samples samples: same seeds, same counts, same table."""
    trainers = []
    for partition in ("running", "prior_samples"):
        trainer = make("f_dpg", TILT, {"partition": partition, "max_steps": 1})
        seen: list[Any] = []

        def kept(self: Any, logs: dict, *args: Any, seen: list = seen, **kwargs: Any) -> None:
            seen.append({key: list(self._logs[key]) for key in ("prompt", "completion")})
            type(self).log(self, logs, *args, **kwargs)

        trainer.log = functools.partial(kept, trainer)
        trainer.train()
        trainers.append((trainer, seen))
    (plain, plain_tables), (with_prior, tables) = trainers
    assert tables == plain_tables and len(tables[0]["prompt"]) == 16
    names = ["reward", "num_tokens", "completions/mean_length", "completions/clipped_ratio", "rewards/count_a/mean"]
    for name in [*names, "posterior/kl_prior", "posterior/frac_infinite_reward"]:
        assert step_logs(with_prior)[0][name] == step_logs(plain)[0][name], name
    assert with_prior.state.num_input_tokens_seen == plain.state.num_input_tokens_seen


def test_what_was_learned_is_logged(make: Make) -> None:
    trainer = make("dpg", {"name": "moments", "mu": {"count_a": 0.5}}, {"num_prior_samples": 100})
    trainer.train()
    for log in step_logs(trainer):
        assert log["posterior/target/moments/count_a"] == pytest.approx(0.5, abs=1e-6)
        assert log["posterior/target/moments/ess"] > 0.3
        assert log["posterior/target/moments/count_a/lambda"] != 0


# --- Found again -----------------------------------------------------------------------------------------------------


def same_function_by_another_name(completions: list[str], **kwargs: Any) -> list[float]:
    return TASK.reward(completions)


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@ties
@pytest.mark.parametrize(
    "config", [{"temperature": 0.8}, {"max_completion_length": 3}, {"seed": 1}], ids=lambda config: next(iter(config))
)
def test_samples_of_something_else_stand_beside(config: dict[str, Any], make: Make, tmp_path: Path) -> None:
    """In the same folder: each run finds its own, and none is taken for another's."""
    make(target=BEST_OF_4).train()
    kept = tmp_path / "out" / "prior_samples"
    (first,) = folders(kept)
    other = make(target=BEST_OF_4, config=config)
    with pytest.raises(AssertionError, match="a sample was drawn"):
        draw_nothing(make(target=BEST_OF_4, config=config)).train()
    other.train()
    assert len(folders(kept)) == 2
    draw_nothing(make(target=BEST_OF_4)).train()
    draw_nothing(make(target=BEST_OF_4, config=config)).train()
    assert len(samples_on_disk(kept / first)) == len(samples_on_disk(kept)) / 2 == 4 * 30


@ties
def test_only_what_is_missing_is_drawn(make: Make, prior: Prior, tmp_path: Path) -> None:
    """More samples of each prompt, and more prompts; fewer of either are there already."""
    make(target=BEST_OF_4).train()
    grown = make(target=BEST_OF_4, config={"num_prior_samples": 40})
    drawn: list[dict[str, Any]] = []
    draw = grown._draw_prior

    def record(rows: list[dict[str, Any]], seed: int) -> Any:
        drawn.extend(rows)
        return draw(rows, seed)

    grown._draw_prior = record
    grown.train()
    assert len(drawn) == 40
    folder = tmp_path / "out" / "prior_samples"
    assert_scored_right(folder, prior, TASK.prompts, 40)
    more = Dataset.from_dict({"prompt": [*TASK.prompts, "b a"]})
    make(target=BEST_OF_4, train_dataset=more, config={"num_prior_samples": 40}).train()
    assert len(samples_on_disk(folder)) == 5 * 40
    for data, number in ((TASK.dataset(8), 30), (more, 40), (Dataset.from_dict({"prompt": ["b a", "a"] * 4}), 20)):
        draw_nothing(make(target=BEST_OF_4, train_dataset=data, config={"num_prior_samples": number})).train()


def test_the_same_weights_in_another_folder_are_the_same_model(make: Make, prior: Prior, tmp_path: Path) -> None:
    make(target=BEST_OF_4).train()
    draw_nothing(make(target=BEST_OF_4, model=shutil.copytree(prior.path, tmp_path / "copy").as_posix())).train()


@ties
def test_samples_of_other_weights_in_the_same_folder_are_not_used(make: Make, prior: Prior, tmp_path: Path) -> None:
    """The model was trained again, to the same place."""
    path = shutil.copytree(prior.path, tmp_path / "model").as_posix()
    make(target=BEST_OF_4, model=path).train()
    model = AutoModelForCausalLM.from_pretrained(path)
    model.lm_head.weight.data[0, 0] += 0.1
    model.save_pretrained(path)
    with pytest.raises(AssertionError, match="a sample was drawn"):
        draw_nothing(make(target=BEST_OF_4, model=path)).train()


# --- Rewards that are kept are those of the same functions -----------------------------------------------------------


def at_most(letters: int) -> Callable[..., list[float]]:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(text.split()) <= letters) for text in completions]

    return reward


def scale(completions: list[str], factor: float, **kwargs: Any) -> list[float]:
    return [factor * value for value in TASK.reward(completions)]


class Times:
    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return scale(completions, self.factor)


class TimesLater(Times):
    async def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:  # type: ignore[override]
        return scale(completions, self.factor)


def later(factor: float) -> Callable[..., Any]:
    async def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return scale(completions, factor)

    return reward


REWARDS: list[tuple[Callable[[float], Any], float, float]] = [
    (lambda number: length_between(maximum=number, called="length"), 1, 3),
    (lambda number: at_most(int(number)), 1, 3),
    (lambda factor: functools.partial(scale, factor=factor), 1.0, 2.0),
    (Times, 1.0, 2.0),
    (lambda factor: Times(factor).__call__, 1.0, 2.0),
    (TimesLater, 1.0, 2.0),
    (later, 1.0, 2.0),
]
REWARD_NAMES = ["factory", "closure", "partial", "instance", "method", "async instance", "async function"]


def values_of(reward: Any, completions: list[str]) -> list[float]:
    values = reward(completions=completions)
    return asyncio.run(values) if inspect.iscoroutine(values) else values


@pytest.mark.parametrize(("kind", "before", "after"), REWARDS, ids=REWARD_NAMES)
def test_another_reward_of_the_same_name_scores_what_is_there(
    kind: Callable[[float], Any], before: float, after: float, make: Make, prior: Prior
) -> None:
    """Nothing is drawn, and log Z is that of the new reward; each reward's own are found afterwards."""

    def log_z(number: float, **refuse: Any) -> torch.Tensor:
        config = {"partition": "prior_samples", "max_steps": 1}
        trainer = make("f_dpg", TILT, config, reward_funcs=kind(number), callbacks=[])
        trainer = draw_nothing(trainer, **refuse) if refuse else trainer
        trainer.train()
        assert trainer.partition.table is not None
        return trainer.partition.table.lookup(torch.tensor([row_hash(row) for row in TASK.dataset(4)]))[:, 0]

    first = log_z(before)
    second = log_z(after, score=True)
    expected = []
    for rows in of_prompts(make.folder / "out" / "prior_samples", prior, TASK.prompts):
        values = torch.tensor(values_of(kind(after), [row["text"] for row in rows]))
        expected.append((values / 0.7).logsumexp(dim=0) - torch.tensor(30.0).log())
    torch.testing.assert_close(second.float(), torch.stack(expected), rtol=0, atol=1e-5)
    assert not torch.equal(first, second)
    assert torch.equal(log_z(before, score=False), first) and torch.equal(log_z(after, score=False), second)


def test_what_does_not_change_a_reward(make: Make) -> None:
    """Its name, and the weights of a sum: neither is drawn nor scored again."""
    rewards = [count_a, length]
    make(target=BEST_OF_4, reward_funcs=rewards).train()
    draw_nothing(make(target=BEST_OF_4, reward_funcs=[same_function_by_another_name, length])).train()
    draw_nothing(make(target=BEST_OF_4, reward_funcs=rewards[::-1], config={"reward_weights": [0.5, 2.0]})).train()


def test_a_reward_that_reads_a_file_is_asked_again(make: Make, tmp_path: Path) -> None:
    """What it would say cannot be known without asking."""
    (tmp_path / "letter.txt").write_text("a")
    path = tmp_path / "letter.txt"

    def wanted(completions: list[str], **kwargs: Any) -> list[float]:
        letter = path.read_text()
        return [float(text.count(letter)) for text in completions]

    log_z = []
    for letter in "ab":
        path.write_text(letter)
        config = {"partition": "prior_samples", "max_steps": 1}
        trainer = make("f_dpg", TILT, config, reward_funcs=[wanted, count_a])
        (trainer if letter == "a" else draw_nothing(trainer, score=True)).train()
        assert trainer.partition.table is not None
        log_z.append(trainer.partition.table.values)
    assert not torch.equal(*log_z)
    kept = {name for row in samples_on_disk(tmp_path / "out" / "prior_samples", "rewards") for name in row}
    assert len(kept) == 4  # the three keys and the function that can be recognized


def test_a_reward_model_that_was_trained_again(make: Make, tiny_models: Any, tmp_path: Path) -> None:
    """In the same folder, and as a model in memory."""
    path = shutil.copytree(tiny_models.reward, tmp_path / "reward").as_posix()
    log_z = []
    for change in (0.0, 0.5):
        model = AutoModelForSequenceClassification.from_pretrained(path)
        model.score.weight.data += change
        model.save_pretrained(path)
        for given in (path, model):
            config = {"partition": "prior_samples", "max_steps": 1}
            trainer = make("f_dpg", TILT, config, reward_funcs=given)
            (trainer if not log_z else draw_nothing(trainer, score=given == path)).train()
            assert trainer.partition.table is not None
            log_z.append(trainer.partition.table.values)
    assert torch.equal(log_z[0], log_z[1]) and torch.equal(log_z[2], log_z[3])
    assert not torch.equal(log_z[1], log_z[2])


def test_messages_are_scored_again_as_they_were_given(make: Make, tiny_models: Any) -> None:
    """A conversation's completion is a list of messages, whoever scores it."""
    seen: dict[str, list[Any]] = {"first": [], "second": []}

    def looks(name: str) -> Callable[..., list[float]]:
        def reward(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
            seen[name] += [(p[0]["content"], c) for p, c in zip(prompts, completions, strict=True)]
            return [float(len(completion[0]["content"])) + (name == "second") for completion in completions]

        return reward

    chat = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in ("a", "b")] * 4})
    for name in seen:
        arguments = {"model": tiny_models.policy, "train_dataset": chat, "reward_funcs": looks(name)}
        trainer = make("kl_rl", BEST_OF_4, {"max_steps": 1, "num_prior_samples": 16}, **arguments)
        (trainer if name == "first" else draw_nothing(trainer, score=True)).train()
    drawn, scored = (sorted(map(repr, seen[name][:32])) for name in seen)
    assert drawn == scored and "'role': 'assistant'" in drawn[0]


# --- What is learned across prompts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluation", [None, ["c d", "e e"]])
def test_moments_are_those_of_the_training_data(evaluation: list[str] | None, make: Make, prior: Prior) -> None:
    """
    Whatever is evaluated on, and with each prompt as often as it occurs.

    Here on the samples themselves: "a" occurs three times, "b" once, so mu = (3 mu_a + mu_b) / 4.
    """
    arguments: dict[str, Any] = {"train_dataset": Dataset.from_dict({"prompt": ["a", "b", "a", "a"] * 2})}
    if evaluation is not None:
        arguments["eval_dataset"] = Dataset.from_dict({"prompt": evaluation})
    config = {"num_prior_samples": 200, "max_steps": 1}
    trainer = make("dpg", {"name": "moments", "mu": {"has_a": 0.5}}, config, reward_funcs=has_a, **arguments)
    trainer.train()
    assert trainer.target.diagnostics()["moments/has_a"] == pytest.approx(0.5, abs=1e-6)
    achieved = []
    for rows in of_prompts(make.folder / "out" / "prior_samples", prior, ["a", "b"]):
        rewards = torch.tensor([[float("a" in row["text"])] for row in rows])
        weights = trainer.target(rewards).softmax(dim=0)
        achieved.append((weights @ rewards[:, 0]).item())
    assert (3 * achieved[0] + achieved[1]) / 4 == pytest.approx(0.5, abs=1e-5)
    assert abs(achieved[0] - achieved[1]) > 0.01  # so that the multiplicity is seen


def has_a(completions: list[str], **kwargs: Any) -> list[float]:
    return [float("a" in text) for text in completions]


@from_trl
@pytest.mark.parametrize(
    ("target", "config", "message"),
    [
        (
            {"name": "calibrated", "transform": "best_of_n", "n": 64},
            {},
            "30 samples of the prior .* 1.4 nats .* to 177",
        ),
        (
            {"name": "product", "factors": [{"name": "calibrated", "transform": "best_of_n", "n": 64}]},
            {"num_prior_samples": 176},
            "176 samples of the prior .* to 177",
        ),
    ],
)
def test_too_few_samples_are_said_before_any_is_drawn(
    target: dict[str, Any], config: dict[str, Any], message: str, make: Make, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=message):
        make(target=target, config=config)
    assert not (tmp_path / "out" / "prior_samples").exists()
    make(target=target, config={"num_prior_samples": 177})


def test_policy_that_is_not_the_prior_is_refused(make: Make, prior: Prior) -> None:
    """A model as an object, changed since it was loaded: TRL's prior is the one on disk."""
    model = AutoModelForCausalLM.from_pretrained(prior.path)
    make(target=BEST_OF_4, model=model).train()
    changed = AutoModelForCausalLM.from_pretrained(prior.path)
    changed.lm_head.weight.data[0] += 0.3
    trainer = make(target=BEST_OF_4, model=changed, config={"prior_samples_dir": str(make.folder / "other")})
    with pytest.raises(ValueError, match="nats per token from the prior, so it cannot draw samples of the prior"):
        trainer.train()


# --- Resuming --------------------------------------------------------------------------------------------------------

# In one epoch: TRL's sampler starts its shuffles afresh when a run resumes in a later one
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "shuffle_dataset": False}
FOUR_STEPS = TASK.dataset(16)


@ties
@pytest.mark.parametrize(
    ("kind", "target", "partition"),
    [
        ("f_dpg", TILT, "prior_samples"),
        ("kl_rl", BEST_OF_4, "known"),
        ("dpg", {"name": "moments", "mu": {"count_a": 0.5}}, "prior_samples"),
        ("tb", {"name": "chi_squared", "beta": 2.0}, "running"),
    ],
)
def test_resumed_run_is_the_uninterrupted_one_and_draws_nothing(
    kind: str, target: dict[str, Any], partition: str, make: Make, tmp_path: Path
) -> None:
    settings = {**SAVING, "partition": partition, "num_prior_samples": 60}
    if kind == "tb":
        settings["divergence"] = "jensen_shannon"
    whole = make(kind, target, settings, train_dataset=FOUR_STEPS)
    whole.train()
    shutil.rmtree(tmp_path / "out" / "prior_samples")
    resumed = draw_nothing(make(kind, target, settings, train_dataset=FOUR_STEPS))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_same(weights(resumed), weights(whole))
    if whole.partition.name == "prior_samples":
        assert torch.equal(resumed.partition.table.values, whole.partition.table.values)
    assert resumed.target.diagnostics() == whole.target.diagnostics()


@from_trl
def test_without_its_state_a_checkpoint_needs_the_samples(make: Make, tmp_path: Path) -> None:
    settings = {**SAVING, "partition": "prior_samples"}
    whole = make("f_dpg", TILT, settings, train_dataset=FOUR_STEPS)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    (checkpoint / "posterior_state_0.pt").unlink()
    found = draw_nothing(make("f_dpg", TILT, settings, train_dataset=FOUR_STEPS))
    with pytest.warns(UserWarning, match=r"posterior_state_0\.pt is missing"):
        found.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(found), weights(whole))

    next((tmp_path / "out" / "prior_samples").rglob("samples-*.parquet")).unlink()
    (checkpoint / "posterior_state_0.pt").unlink(missing_ok=True)
    lost = draw_nothing(make("f_dpg", TILT, settings, train_dataset=FOUR_STEPS))
    with (
        pytest.warns(UserWarning, match=r"posterior_state_0\.pt is missing"),
        pytest.raises(ValueError, match="are missing in .*prior_samples.*, and the policy has been trained since"),
    ):
        lost.train(resume_from_checkpoint=str(checkpoint))


def test_kill_9_while_sampling_and_restart(prior: Prior, tmp_path: Path) -> None:
    """Nothing that was reported done is lost, nothing is drawn twice, and training then goes through."""
    script = textwrap.dedent(f"""
        import itertools, sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import test_prior_samples_in_training as t

        prior = t.Prior({prior.path!r}, None, None)
        trainer = t.Make(prior, Path({str(tmp_path)!r}))(target=t.BEST_OF_4, config={{"num_prior_samples": 100}})
        draw, calls = trainer._draw_prior, itertools.count(1)

        def until_killed(rows, seed):
            print("drawing", flush=True)  # what came before is on disk
            if next(calls) == int(sys.argv[1]):
                time.sleep(600)
            return draw(rows, seed)

        trainer._draw_prior = until_killed
        trainer.train()
        print("trained", trainer.state.global_step, flush=True)
    """)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "out" / "prior_samples"
    command = [sys.executable, "-c", script]
    with subprocess.Popen([*command, "8"], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        drawn = 0
        while drawn < 8:
            line = process.stdout.readline()
            assert line
            drawn += line.startswith("drawing")
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    kept = {(row["prompt_key"], row["number"]): row for row in samples_on_disk(folder)}
    assert len(kept) == 7 * 16
    output = subprocess.run([*command, "0"], stdout=subprocess.PIPE, text=True, env=environment, check=True).stdout
    assert output.count("drawing") == (400 - len(kept)) // 16
    assert "trained 2" in output
    rows = {(row["prompt_key"], row["number"]): row for row in samples_on_disk(folder)}
    assert rows | kept == rows
    assert_scored_right(folder, prior, TASK.prompts, 100)


# --- Evaluation, adapters, replay ------------------------------------------------------------------------------------


@ties
def test_prompts_of_evaluation_are_sampled_too(make: Make, tmp_path: Path) -> None:
    evaluation = {"near": Dataset.from_dict({"prompt": ["a", "f"]}), "far": Dataset.from_dict({"prompt": ["e e"]})}
    config = {"eval_strategy": "steps", "eval_steps": 1, "partition": "known"}
    trainer = make("kl_rl", BEST_OF_4, config, eval_dataset=evaluation)
    trainer.train()
    assert len(samples_on_disk(tmp_path / "out" / "prior_samples")) == 6 * 30
    for name in ("near", "far"):
        logs = [log for log in trainer.state.log_history if f"eval_{name}_loss" in log]
        assert len(logs) == 2 and all(log["eval_posterior/log_z"] == pytest.approx(-1.39, abs=0.15) for log in logs)


# The chunk of 16 is not a multiple of 6
@pytest.mark.parametrize("generations", [None, 6])
def test_evaluation_before_training_draws_and_changes_nothing(
    generations: int | None, make: Make, tmp_path: Path
) -> None:
    config = {
        "partition": "prior_samples",
        "num_generations_eval": generations,
        "per_device_eval_batch_size": 4 * (generations or 4),
    }
    evaluated = make("f_dpg", TILT, config, eval_dataset=TASK.dataset(4))
    metrics = evaluated.evaluate()
    assert metrics["eval_posterior/frac_unscored"] == 0
    assert len(samples_on_disk(tmp_path / "out" / "prior_samples")) == 4 * 30
    assert evaluated.partition.table is not None

    trainer = draw_nothing(make("f_dpg", TILT, config))
    trainer.train()
    draw_nothing(evaluated).train()  # the samples that it drew as an evaluation are those that training uses
    assert torch.equal(evaluated.partition.table.values, trainer.partition.table.values)  # type: ignore[union-attr]


def test_evaluation_on_prompts_that_were_not_sampled_is_refused(make: Make) -> None:
    trainer = make("f_dpg", TILT, {"partition": "prior_samples"})
    trainer.train()
    with pytest.raises(ValueError, match="has been trained since: give the trainer all data as `train_dataset`"):
        trainer.evaluate(Dataset.from_dict({"prompt": ["e e"]}))


@ties
def test_new_adapter_samples_the_base_model(make: Make, prior: Prior, tmp_path: Path) -> None:
    trainer = make("kl_rl", BEST_OF_4, {"partition": "known"}, peft_config=lora())
    trainer.train()
    assert_scored_right(tmp_path / "out" / "prior_samples", prior, TASK.prompts, 30)


def test_adapter_that_does_not_begin_at_zero_is_refused(make: Make) -> None:
    adapter = lora(init_lora_weights=False, lora_alpha=64)
    with pytest.raises(ValueError, match="adapters that begin at zero"):
        make("kl_rl", BEST_OF_4, peft_config=adapter).train()


@pytest.mark.parametrize("kind", ["dpg", "tb"])
def test_replayed_completions_keep_the_fixed_evidence(kind: str, make: Make) -> None:
    config = {"partition": "prior_samples", "replay_buffer_size": 64, "max_steps": 4}
    trainer = make(kind, TILT, config)
    batches: list[dict[str, Any]] = []
    generate = trainer._generate_and_score_completions

    def record(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batches.append(generate(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = record
    trainer.train()
    assert len(batches[-1]["usable"]) == 32 and len(batches[0]["usable"]) == 16
    assert trainer.partition.table is not None
    for batch in batches:
        log_z, number, informed = trainer.partition.table.lookup(batch["prompt_key"]).to(batch["log_z"]).T
        assert informed.all() and (number == 30).all()
        own = batch["log_target"] - batch["log_proposal"]
        expected = bounded_fixed_log_z(log_z, number, own.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(batch["log_z"], expected, rtol=0, atol=0)
        assert (batch["log_z"] == log_z)[own < log_z + math.log(34 / 3) - 1e-5].all()


@ties
def test_one_target_for_two_trainers_learns_once(make: Make) -> None:
    """An object that was fitted before is taken as it is."""
    first = make("f_dpg", BEST_OF_4)
    first.train()
    second = draw_nothing(make("kl_rl", first.target, {"partition": "known"}))
    second.train()
    assert second.target is first.target


# --- Refused before anything is drawn --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [{"target": BEST_OF_4}, {"target": TILT, "config": {"partition": "prior_samples"}}])
def test_what_cannot_be_sampled(
    what: dict[str, Any], make: Make, prior: Prior, tiny_models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # which environments are, and say
    needs = "The target Calibrated" if what["target"] is BEST_OF_4 else "`partition='prior_samples'`"
    config = what.get("config", {})
    with pytest.raises(ValueError, match=f"^{needs}.* leave `prior_model_name_or_path` unset"):
        make(target=what["target"], config={**config, "prior_model_name_or_path": prior.path})
    streamed = TASK.dataset(8).to_iterable_dataset()
    with pytest.raises(ValueError, match=f"^{needs}.*use a data set that is not streamed"):
        make(target=what["target"], config=config, train_dataset=streamed)
    with pytest.raises(ValueError, match=f"^{needs}.*use a data set that is not streamed"):
        make(target=what["target"], config=config, eval_dataset=streamed)
    chat = Dataset.from_dict({"prompt": [[{"role": "user", "content": "a"}]] * 4})
    with pytest.raises(ValueError, match=f"^{needs}.*an environment may write prompts"):
        make(
            target=what["target"],
            config=config,
            model=tiny_models.policy,
            train_dataset=chat,
            reward_funcs=length,
            environment_factory=Room,
        )


class Room:
    """An environment with a tool."""

    def reset(self, **kwargs: Any) -> str:
        return "You are in a room."

    def look(self) -> str:
        """
        Look around.

        Returns:
            What there is.
        """
        return "nothing"


def test_pure_rl_has_no_prior_to_sample(make: Make) -> None:
    with pytest.raises(ValueError, match="`partition='prior_samples'` needs .*`beta=0` is pure RL, which has none"):
        make("kl_rl", config={"beta": 0.0, "partition": "prior_samples"})


@pytest.mark.parametrize(
    "target",
    [
        TILT,
        {"name": "moments", "mu": {"count_a": 0.5}},
        {"name": "product", "factors": [BEST_OF_4, {"name": "constraint"}]},
    ],
)
def test_evidence_that_is_not_known_is_refused(target: dict[str, Any], make: Make) -> None:
    with pytest.raises(ValueError, match="does not know its log Z: set `partition` to 'running', 'leave_one_out'"):
        make("dpg", target, {"partition": "known"})


@ties
@pytest.mark.parametrize(
    "target", [BEST_OF_4, {"name": "chi_squared", "beta": 2.0}, {"name": "product", "factors": [BEST_OF_4]}]
)
def test_evidence_that_is_known(target: dict[str, Any], make: Make) -> None:
    trainer = make("dpg", target, {"partition": "known", "num_prior_samples": 200})
    trainer.train()
    log_z = step_logs(trainer)[0]["posterior/log_z"]
    # log(1/4) without ties; -0.0 where tau normalizes
    assert log_z == pytest.approx(0.0 if target["name"] == "chi_squared" else -1.386, abs=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# What an inexact run keeps is of another distribution


@pytest.mark.filterwarnings("ignore:With `top_k=2`:UserWarning")
def test_an_exact_run_does_not_find_what_top_k_has_cut(make: Make, tmp_path: Path) -> None:
    shared = {"partition": "prior_samples", "prior_samples_dir": str(tmp_path / "shared")}
    cut = make(config={**shared, "top_k": 2, "inexact_settings": "warn"}, target=TILT)
    cut.learn_from_prior()
    exact = make(config=shared, target=TILT)
    assert len(prior_samples_of(exact, rows_of(exact)).missing()) == 30 * len(TASK.prompts)
    assert len(prior_samples_of(cut, rows_of(cut)).missing()) == 0


@pytest.mark.filterwarnings("ignore:`top_entropy_quantile=:UserWarning")
def test_what_changes_the_objective_alone_shares_its_samples_with_exact_runs(make: Make, tmp_path: Path) -> None:
    shared = {"partition": "prior_samples", "prior_samples_dir": str(tmp_path / "shared")}
    make(config=shared, target=TILT).learn_from_prior()
    other = make(config={**shared, "top_entropy_quantile": 0.5, "inexact_settings": "warn"}, target=TILT)
    assert len(prior_samples_of(other, rows_of(other)).missing()) == 0


def test_samples_of_what_a_model_was_before_it_changed_are_refused(make: Make, prior: Prior, tmp_path: Path) -> None:
    """It goes by the folder that it came from, as does a base into which an adapter was merged."""

    def model(noise: float) -> Any:
        loaded = AutoModelForCausalLM.from_pretrained(prior.path)
        with torch.no_grad():
            for weight in loaded.parameters():
                weight += noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        return loaded

    config = {"partition": "prior_samples", "prior_samples_dir": str(tmp_path / "shared")}
    for _ in range(2):  # the second finds what the first has drawn
        make(config=config, target=TILT, model=model(0.0), peft_config=lora()).learn_from_prior()
    changed = make(config=config, target=TILT, model=model(0.3), peft_config=lora())
    with pytest.raises(ValueError, match="or this one was changed after it was loaded: use another"):
        changed.learn_from_prior()
    make(config={**config, "check_log_probs": False}, target=TILT, model=model(0.3), peft_config=lora())


@pytest.mark.parametrize(
    "needed", [{"partition": "prior_samples"}, {"target": BEST_OF_4}, {"prior_fraction": 0.25}], ids=str
)
def test_masked_completions_are_no_samples_of_the_prior(make: Make, needed: dict[str, Any]) -> None:
    """TRL empties them, and who finds them later would take them for completions."""
    config = {"mask_truncated_completions": True, "inexact_settings": "warn", **needed}
    with pytest.raises(ValueError, match="mask_truncated_completions=True` empties those that are cut"):
        make(config=config)


def test_what_rewards_log_of_kept_samples_is_no_metric_of_training(make: Make, tmp_path: Path) -> None:
    """Samples that another function has scored are scored again before the first update."""
    calls = []

    def logs(completions: list[str], log_metric: Any, **kwargs: Any) -> list[float]:
        calls.append(len(completions))
        log_metric("calls", float(len(calls)))
        return [float(len(text)) for text in completions]

    config = {"partition": "prior_samples", "prior_samples_dir": str(tmp_path / "shared"), "max_steps": 1}
    make(config=config, target=TILT).learn_from_prior()
    trainer = make(config=config, target=TILT, reward_funcs=logs)
    trainer.train()
    (first, *_) = step_logs(trainer)
    assert len(calls) > 1 and first["calls"] == len(calls)
