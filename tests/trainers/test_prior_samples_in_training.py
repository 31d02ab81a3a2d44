"""Samples of the prior in a training run: drawn before the first update, scored exactly, and without other traces.

The tiny prior's completions are all enumerated, so every sample on disk can be checked against its probability.
"""

import functools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tests.helpers.trainers import QUIET, TRAINERS
from tests.helpers.training import from_trl, lora, step_logs
from trl_bayes.benchmarks.tiny import letter_count_task
from trl_bayes.language_models.fingerprint import weights_fingerprint
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
    log_probs = TASK.log_probs(AutoModelForCausalLM.from_pretrained(path), tokenizer)
    ids, mask = TASK.completions(tokenizer)
    completions = [tuple(row[own].tolist()) for row, own in zip(ids, mask, strict=True)]
    table = [dict(zip(completions, row.tolist(), strict=True)) for row in log_probs]
    return Prior(path, tokenizer, dict(zip(TASK.prompts, table, strict=True)))


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


def samples_on_disk(folder: Path) -> list[dict[str, Any]]:
    rows = [row for file in sorted(folder.glob("samples-*.parquet")) for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: row["sample"])


def draw_nothing(trainer: PosteriorTrainer) -> PosteriorTrainer:
    def refuse(*args: Any) -> None:
        raise AssertionError("a sample was drawn")

    trainer._draw_prior = refuse  # type: ignore[method-assign, assignment]
    return trainer


def weights(trainer: PosteriorTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0, msg=f"{name} differs")


# --- What is drawn ---------------------------------------------------------------------------------------------------


def assert_scored_right(rows: list[dict[str, Any]], prior: Prior, prompts: list[str], num_samples: int) -> None:
    assert [row["sample"] for row in rows] == list(range(len(prompts) * num_samples))
    for row in rows:
        prompt = prompts[row["sample"] // num_samples]
        exact = prior.log_probs[prompt][tuple(row["completion_ids"])]
        assert row["log_prior"] == pytest.approx(exact, abs=1e-4)
        assert row["text"] == prior.tokenizer.decode(row["completion_ids"], skip_special_tokens=True)


# Chunks of 16, and of 12 = two steps of 6 in groups of 4: neither divides the 30 samples of a prompt
@pytest.mark.parametrize("batch", [{}, {"per_device_train_batch_size": 6, "steps_per_generation": 2}])
def test_samples_have_their_probability_under_the_prior_and_their_rewards(
    batch: dict[str, int], make: Make, prior: Prior, tmp_path: Path
) -> None:
    trainer = make(target=TILT, config={"partition": "prior_samples", **batch}, reward_funcs=[count_a, length])
    trainer.train()
    rows = samples_on_disk(tmp_path / "out" / "prior_samples")
    assert_scored_right(rows, prior, list(TASK.prompts), 30)
    for row in rows:
        assert row["rewards"] == [TASK.reward([row["text"]])[0], len(row["completion_ids"])]

    # and log Z is the mean of their evidence
    totals = torch.tensor([sum(row["rewards"]) for row in rows]).view(4, 30)
    log_z = (totals / 0.7).logsumexp(dim=1) - torch.tensor(30.0).log()
    keys = torch.tensor([row["prompt_key"] for row in rows[::30]])
    assert trainer.partition.table is not None
    torch.testing.assert_close(trainer.partition.table.lookup(keys).float(), log_z, rtol=0, atol=1e-4)


def test_samples_follow_the_prior(make: Make, prior: Prior, tmp_path: Path) -> None:
    """Mean `log pi_0` of 2,000 samples is minus the prior's entropy; 4 standard errors: false alarm 3e-4 over all."""
    config = {"num_prior_samples": 500, "per_device_train_batch_size": 200, "max_steps": 1}
    make(target=BEST_OF_4, config=config, train_dataset=TASK.dataset(200)).train()
    drawn = torch.tensor([row["log_prior"] for row in samples_on_disk(tmp_path / "out" / "prior_samples")]).view(4, -1)
    for prompt, values in zip(TASK.prompts, drawn, strict=True):
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
    for row in samples_on_disk(tmp_path / "out" / "prior_samples"):
        expected = exact[row["sample"] // 30, place[tuple(row["completion_ids"])]].item()
        assert row["log_prior"] == pytest.approx(expected, abs=1e-4)


def test_missing_and_infinite_rewards(make: Make, tmp_path: Path) -> None:
    """They are missing in the file, and the target learns from the rest."""
    trainer = make(target={**BEST_OF_4, "rewards": ["only_with_b"]}, reward_funcs=[count_a, only_with_b])
    trainer.train()
    for row in samples_on_disk(tmp_path / "out" / "prior_samples"):
        assert row["rewards"][1] == (1.0 if row["text"].count("b") == 1 else None)
        assert row["rewards"][0] is not None
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

    with pytest.warns(UserWarning, match="1 of 4 prompts have no prior sample with evidence, so they are left out"):
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
    with pytest.warns(UserWarning, match="4 of 4 prompts have no prior sample with evidence.*`num_prior_samples`"):
        trainer.train()
    assert_same(weights(trainer), before)


def test_rows_with_other_columns_are_other_prompts(make: Make, tmp_path: Path) -> None:
    """The evidence may depend on any column. With `remove_unused_columns` the trainer sees the prompt only."""

    def as_wanted(completions: list[str], wanted: list[str], **kwargs: Any) -> list[float]:
        return [float(text.count(letter)) for text, letter in zip(completions, wanted, strict=True)]

    data = Dataset.from_dict({"prompt": ["a", "a", "b", "a"], "wanted": ["c", "d", "c", "c"]})
    make(target=BEST_OF_4, reward_funcs=as_wanted, train_dataset=data).train()
    rows = samples_on_disk(tmp_path / "out" / "prior_samples")
    assert len(rows) == 3 * 30
    assert [row["rewards"][0] for row in rows[30:60]] == [row["text"].count("d") for row in rows[30:60]]

    config = {"remove_unused_columns": True, "prior_samples_dir": str(tmp_path / "narrow")}
    make(target=BEST_OF_4, config=config, train_dataset=data).train()
    assert len(samples_on_disk(tmp_path / "narrow")) == 2 * 30


class GroupingServer:
    """As TRL's client of a vLLM server: one prompt stands for its whole group of `num_generations`."""

    def __init__(self, model: Any, **settings: Any):
        self.model, self.length = model, settings["max_completion_length"]

    def sync_weights(self) -> None: ...

    def generate(self, prompts: list[list[int]], num_generations: int, **kwargs: Any) -> tuple[Any, ...]:
        completions, log_probs = [], []
        for prompt in (p for p in prompts[::num_generations] for _ in range(num_generations)):
            ids = self.model.generate(torch.tensor([prompt]), max_new_tokens=self.length, do_sample=True, top_k=0)
            with torch.no_grad():
                logits = self.model(ids).logits[0, len(prompt) - 1 : -1]
            new = ids[0, len(prompt) :]
            completions.append(new.tolist())
            log_probs.append([[v] for v in logits.log_softmax(1).gather(1, new.unsqueeze(1)).squeeze(1).tolist()])
        return prompts, completions, log_probs, None


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
    assert_scored_right(samples_on_disk(tmp_path / "out" / "prior_samples"), prior, list(TASK.prompts), 30)


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


# --- Found again, or refused -----------------------------------------------------------------------------------------


def other_reward(completions: list[str], **kwargs: Any) -> list[float]:
    return TASK.reward(completions)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (
            {},
            {"reward_funcs": other_reward},
            r"of reward_functions=\['count_a'\].* has reward_functions=\['other_rewa",
        ),
        ({"temperature": 0.8}, {}, "of temperature=1.0, but this run has temperature=0.8: use another folder"),
        ({"max_completion_length": 3}, {}, "of max_completion_length=4, but this run has max_completion_length=3"),
        ({"seed": 1}, {}, "of seed=42, but this run has seed=1"),
        ({"num_prior_samples": 31}, {}, "of num_samples=30, but this run has num_samples=31"),
        ({"chat_template_kwargs": {"thinking": False}}, {}, "of chat_template_kwargs={}, but"),
        (
            {},
            {"train_dataset": Dataset.from_dict({"prompt": ["a", "b", "c", "d"]})},
            "of prompts='.*', but this run has prompts='",
        ),
    ],
)
def test_samples_of_something_else_are_refused(
    config: dict[str, Any], arguments: dict[str, Any], message: str, make: Make
) -> None:
    make(target=BEST_OF_4).train()
    trainer = draw_nothing(make(target=BEST_OF_4, config=config, **arguments))
    with pytest.raises(ValueError, match=message) as refused:
        trainer.train()
    assert "\n" not in str(refused.value)


def test_samples_of_another_model_are_refused(make: Make, prior: Prior, tmp_path: Path) -> None:
    make(target=BEST_OF_4).train()
    with pytest.raises(ValueError, match="are of model='.*', but this run has model='.*/copy': use another folder"):
        make(target=BEST_OF_4, model=shutil.copytree(prior.path, tmp_path / "copy").as_posix()).train()


def test_samples_of_other_weights_in_the_same_folder_are_refused(make: Make, prior: Prior, tmp_path: Path) -> None:
    """The model was trained again, to the same place."""
    path = shutil.copytree(prior.path, tmp_path / "model").as_posix()
    make(target=BEST_OF_4, model=path).train()
    model = AutoModelForCausalLM.from_pretrained(path)
    model.lm_head.weight.data[0, 0] += 0.1
    model.save_pretrained(path)
    with pytest.raises(ValueError, match="are of weights='[0-9a-f]{16}', but this run has weights='[0-9a-f]{16}'"):
        make(target=BEST_OF_4, model=path).train()


def test_fingerprint_of_weights(tmp_path: Path) -> None:
    assert weights_fingerprint("some/model") is None
    assert weights_fingerprint(str(tmp_path)) is None
    (tmp_path / "model.safetensors").write_bytes(bytes(3_000_000))
    first = weights_fingerprint(str(tmp_path))
    assert first == weights_fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(bytes(2_999_999) + b"1")
    assert first != weights_fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert weights_fingerprint(str(tmp_path)) is not None


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

    next((tmp_path / "out" / "prior_samples").glob("samples-*.parquet")).unlink()
    (checkpoint / "posterior_state_0.pt").unlink(missing_ok=True)
    lost = draw_nothing(make("f_dpg", TILT, settings, train_dataset=FOUR_STEPS))
    with (
        pytest.warns(UserWarning, match=r"posterior_state_0\.pt is missing"),
        pytest.raises(ValueError, match="are missing in .*prior_samples, and the policy has been trained since: star"),
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
    kept = samples_on_disk(folder)
    assert len(kept) == 7 * 16
    output = subprocess.run([*command, "0"], stdout=subprocess.PIPE, text=True, env=environment, check=True).stdout
    assert output.count("drawing") == (400 - len(kept)) // 16
    assert "trained 2" in output
    rows = samples_on_disk(folder)
    assert [row["sample"] for row in rows] == list(range(400))
    assert {row["sample"]: row for row in rows} | {row["sample"]: row for row in kept} == {
        row["sample"]: row for row in rows
    }
    assert_scored_right(rows, prior, list(TASK.prompts), 100)


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
    with pytest.raises(ValueError, match="1 of 1 prompts have no prior samples: draw them"):
        trainer.evaluate(Dataset.from_dict({"prompt": ["e e"]}))


@ties
def test_new_adapter_samples_the_base_model(make: Make, prior: Prior, tmp_path: Path) -> None:
    trainer = make("kl_rl", BEST_OF_4, {"partition": "known"}, peft_config=lora())
    trainer.train()
    assert_scored_right(samples_on_disk(tmp_path / "out" / "prior_samples"), prior, list(TASK.prompts), 30)


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
        expected = trainer.partition.table.lookup(batch["prompt_key"]).to(batch["log_z"])
        torch.testing.assert_close(batch["log_z"], expected, rtol=0, atol=0)


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
