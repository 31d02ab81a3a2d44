"""Two processes do what one process does, under every backend, for every trainer.

Each launch runs many cases (`worker.py`); the tests read what it saved. Completions are scripted by their place in the
batch of all processes, and of the three groups of a batch the second has its completions in both processes.
"""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bayes.benchmarks.tiny import letter_count_task
from trl_bayes.prior import prompt_key


pytestmark = pytest.mark.slow
TASK = letter_count_task()
G, BATCH, BETA = 4, 12, 0.7
Results = list[dict[str, Any]]  # one for each process
Launched = Callable[..., Any]

PER_COMPLETION = ("advantages", "log_z", "baseline", "log_target", "log_proposal", "usable")
PER_PAIR = ("log_prior", "preference", "usable")
# Not the same run to run, or (micro-batches are averaged) not the same for other micro-batches
TIMES = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
EVALUATION_TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
AVERAGED_OVER_MICRO_BATCHES = {"dpg": ("entropy",)}


def joined(results: Results, number: int, name: str, rows: int = BATCH) -> torch.Tensor:
    """A quantity of all fresh completions (or pairs of them: half as many rows), in the order of the batch."""
    return torch.cat([result["batches"][number][name][: rows // len(results)] for result in results])


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5, **options: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, **options)


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def logs(result: dict[str, Any], without: tuple[str, ...] = ()) -> list[dict[str, float]]:
    """What was logged but for times; what could not be estimated (`None`) is NaN."""
    left_out = {*TIMES, *EVALUATION_TIMES, *without}
    return [
        {name: math.nan if value is None else value for name, value in log.items() if name not in left_out}
        for log in result["logs"]
    ]


def same_logs(one: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float) -> None:
    assert len(one) == len(other)
    for log, other_log in zip(one, other, strict=True):
        assert log == pytest.approx(other_log, rel=tolerance, abs=tolerance, nan_ok=True)


def log_prob(folder: Path, prompts: list[str], completions: list[list[int]]) -> torch.Tensor:
    """`log pi(y|x)` by a plain forward pass for each completion alone, `(B,)`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    values = []
    for prompt, completion in zip(prompts, completions, strict=True):
        prompt_ids = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt_ids + completion])).logits[0, len(prompt_ids) - 1 : -1]
        values.append(logits.log_softmax(dim=1)[range(len(completion)), completion].sum())
    return torch.stack(values)


# --- The launch is what it says --------------------------------------------------------------------------------------


def test_backend_is_what_it_says(launched: Launched, backend: str, scripted: str) -> None:
    """A launch that quietly runs two separate trainings, or shards nothing, would pass all that follows."""
    results = launched(backend)(scripted)
    assert [result["rank"] for result in results] == [0, 1]
    for result in results:
        spread = result["spread"]
        assert spread["world_size"] == 2
        assert spread["zero_stage"] == (int(backend[-1]) if backend.startswith("zero") else 0)
        if backend in ("zero1", "zero2"):
            assert spread["optimizer_share"] == pytest.approx(0.5, abs=0.01)
            assert spread["gradients_are_sharded"] is (backend == "zero2")
        if backend in ("zero3", "fsdp2"):
            assert spread["policy_share"] == pytest.approx(0.5, abs=0.01)
            assert scripted == "lora" or spread["prior_share"] == pytest.approx(0.5, abs=0.01)
        assert [len(batch["prompts"]) for batch in result["batches"]] == [BATCH // 2] * len(result["batches"])
    first, second = (result["batches"][0]["prompts"] for result in results)
    assert len({*first[G:], *second[: G // 2]}) == 1  # a group in both processes


def test_script_has_what_it_should(launched: Launched) -> None:
    """Hard evidence in the reference run: groups without any, completions without a score, and ordinary ones."""
    (result,) = launched("one")("dpg")
    log_target = torch.stack([batch["log_target"].view(-1, G) for batch in result["batches"]])
    usable = torch.stack([batch["usable"].view(-1, G) for batch in result["batches"]])
    assert (~usable).all(dim=2).any() or (log_target == -math.inf).all(dim=2).any()
    assert any(log["posterior/frac_unscored"] > 0 for log in result["logs"] if "loss" in log)
    assert 0.3 < usable.float().mean() < 1


# --- The same as one process -----------------------------------------------------------------------------------------


def test_weights(launched: Launched, backend: str, scripted: str, models: Path) -> None:
    """After one step, where they differ from the start by the gradient, and after all."""
    (one,), results = launched("one")(scripted), launched(backend)(scripted)
    for result in results:
        assert result["weights"].keys() == one["weights"].keys() == {1, 4}
        same_weights(result["weights"][1], one["weights"][1], tolerance=1e-6)
        same_weights(result["weights"][4], one["weights"][4], tolerance=1e-5)
    for name, weight in one["weights"][4].items():
        assert (weight - one["weights"][1][name]).abs().max() > 1e-4, f"{name} has not been trained"


def test_gradients_and_metrics(launched: Launched, backend: str, scripted: str) -> None:
    """All that is logged at all steps, in evaluation too: the gradient's norm, the loss, log Z, ESS, rewards, ..."""
    (one,), results = launched("one")(scripted), launched(backend)(scripted)
    left_out = AVERAGED_OVER_MICRO_BATCHES.get(scripted, ())
    assert all(log["grad_norm"] > 0 for log in one["logs"] if "loss" in log)
    assert scripted != "f_dpg" or sum("eval_posterior/log_z" in log for log in one["logs"]) == 2
    for result in results:
        same_logs(logs(result, without=left_out), logs(one, without=left_out), tolerance=1e-5)
    same_logs(logs(results[0]), logs(results[1]), tolerance=0)


def test_groups_that_span_processes(launched: Launched, backend: str, scripted: str) -> None:
    (one,), results = launched("one")(scripted), launched(backend)(scripted)
    assert len(one["batches"]) == len(results[0]["batches"]) >= 4
    for number, batch in enumerate(one["batches"]):
        assert batch["prompts"] == [prompt for result in results for prompt in result["batches"][number]["prompts"]]
        names, rows = (PER_PAIR, BATCH // 2) if scripted.startswith("xpo") else (PER_COMPLETION, BATCH)
        for name in names:
            close(joined(results, number, name, rows), batch[name][:rows], equal_nan=True)
        if "prompt_key" in batch:
            close(joined(results, number, "prompt_key"), batch["prompt_key"][:BATCH])


@pytest.mark.parametrize("case", ["kl_rl", "f_dpg", "dpg", "dpg_replay"])
def test_running_evidence_agrees(launched: Launched, backend: str, case: str) -> None:
    (one,), results = launched("one")(case), launched(backend)(case)
    expected = one["posterior_state"]["partition"]["running"]
    assert len(expected["keys"]) == len(TASK.prompts)
    assert sum(expected["count"]) > BATCH  # visits of several steps, of both processes
    for result in results:
        state = result["posterior_state"]["partition"]["running"]
        assert state["keys"] == expected["keys"]
        assert state["count"] == expected["count"]
        assert state["log_sum"] == pytest.approx(expected["log_sum"], rel=1e-5, abs=1e-5)
        assert state == results[0]["posterior_state"]["partition"]["running"]
        assert result["num_tokens"] == one["num_tokens"]


@pytest.mark.parametrize("case", ["tb", "dpg_replay", "xpo"])
def test_replay_of_all_processes_is_that_of_one(launched: Launched, backend: str, case: str) -> None:
    """Each keeps its own completions: together they are what one process keeps, each once."""
    (one,), results = launched("one")(case), launched(backend)(case)
    kept = [result["posterior_state"]["replay_buffer"]["rows"] for result in results]
    expected = one["posterior_state"]["replay_buffer"]["rows"]
    number = BATCH // 2 if case == "xpo" else BATCH  # pairs
    assert [len(rows) for rows in kept] == [number // 2] * 2
    for row, expected_row in zip(kept[0] + kept[1], expected, strict=True):
        assert row.keys() == expected_row.keys()
        for name, value in row.items():
            close(value, expected_row[name])
    for result in [one, *results]:
        share = number // (1 if result is one else 2)
        sizes = [len(batch["usable"]) for batch in result["batches"] if batch["is_training"]]
        assert sizes == [share, *[2 * share] * 3]


def learned(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What a process has learned from samples of the prior: the target's state, and log Z of each prompt."""
    state = result["posterior_state"]
    return [state["target"], state["partition"]["prior_samples"]]


def test_samples_of_the_prior_agree(launched: Launched, backend: str) -> None:
    """What is learned from the same samples: the target and log Z of each prompt."""
    (one,), results = launched("one")("calibrated"), launched(backend)("calibrated")
    for result in results:
        for state, expected in zip(learned(result), learned(one), strict=True):
            assert state.keys() == expected.keys() != set()
            assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(expected[key])) for key in expected)


@pytest.mark.parametrize("backend", ["ddp", "zero3"])
def test_samples_of_the_prior_drawn_by_two(launched: Launched, backend: str, models: Path) -> None:
    run = launched(backend)
    results = run("draws")
    files = sorted((run.folder / "draws" / "prior_samples").rglob("samples-*.parquet"))
    samples = pa.concat_tables([pq.read_table(file) for file in files]).to_pydict()
    tokenizer = AutoTokenizer.from_pretrained(models / "policy")
    prompt_of = {prompt_key(tokenizer(text=prompt)["input_ids"]): prompt for prompt in TASK.prompts}
    prompts = [prompt_of[key] for key in samples["prompt_key"]]
    drawn = sorted(zip(prompts, samples["number"], strict=True))
    assert drawn == sorted((prompt, number) for prompt in TASK.prompts for number in range(24))
    close(torch.tensor(samples["log_prior"]).float(), log_prob(models / "policy", prompts, samples["completion_ids"]))
    chunks = [pq.read_table(file, columns=["completion_ids"]).to_pydict()["completion_ids"] for file in files]
    assert all(one != other for one, other in zip(chunks, chunks[1:], strict=False))  # no random numbers twice
    for state, other in zip(*map(learned, results), strict=True):
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key]))
    same_weights(results[0]["weights"][4], results[1]["weights"][4], tolerance=0)


def test_separate_prior_is_the_one_that_scores(launched: Launched, backend: str, models: Path) -> None:
    """`log P - phi` is the log-probability under the other model, by a plain forward pass, while the policy moves."""
    results = launched(backend)("f_dpg")
    tokenizer = AutoTokenizer.from_pretrained(models / "policy")
    for number in range(len(results[0]["batches"])):
        prompts, completions = [], []
        for result in results:
            batch = result["batches"][number]
            prompts += batch["prompts"]
            pairs = zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
            completions += [ids[mask].tolist() for ids, mask in pairs]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        phi = torch.tensor(TASK.reward(texts)) / BETA
        close(joined(results, number, "log_target") - phi, log_prob(models / "prior", prompts, completions))


# --- Settings under which it need not be the same --------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3", "fsdp2"])
def test_buffers_that_fill_at_their_own_pace(launched: Launched, backend: str) -> None:
    """Completions without evidence are not kept, so one process may replay while the other cannot yet."""
    results = launched(backend)("uneven")
    sizes = [[len(batch["usable"]) for batch in result["batches"]] for result in results]
    assert sizes[0] != sizes[1]
    same_weights(results[0]["weights"][4], results[1]["weights"][4], tolerance=0)
    assert all(weight.isfinite().all() for weight in results[0]["weights"][4].values())
    assert all(math.isfinite(log["loss"]) for log in results[0]["logs"] if "loss" in log)


def test_bfloat16_with_gradient_checkpointing(launched: Launched, backend: str) -> None:
    (one,), results = launched("one")("bf16"), launched(backend)("bf16")
    for result in results:
        assert result["is_checkpointing"]
        # DeepSpeed keeps bfloat16 weights, with float32 copies of its own; the others convert for the forward pass
        assert result["dtype"] == (torch.bfloat16 if backend.startswith("zero") else torch.float32)
        for name in ("loss", "grad_norm", "posterior/log_z", "posterior/ess", "posterior/kl_prior"):
            values, expected = ([log[name] for log in r["logs"] if name in log] for r in (result, one))
            assert values == pytest.approx(expected, rel=0.03, abs=0.01)
    same_weights(results[0]["weights"][4], results[1]["weights"][4], tolerance=0)
    same_weights(results[0]["weights"][4], one["weights"][4], tolerance=0.02)


def test_generation_without_gathering(launched: Launched) -> None:
    """`ds3_gather_for_generation=False`: the same completions and the same training, layer by layer."""
    run = launched("zero3")
    whole, parts = run("straight"), run("in_parts")
    for one, other in zip(whole, parts, strict=True):
        for batch, other_batch in zip(one["batches"], other["batches"], strict=True):
            assert torch.equal(batch["completion_ids"], other_batch["completion_ids"])
        same_weights(one["weights"][4], other["weights"][4], tolerance=1e-6)
        same_logs(logs(one), logs(other), tolerance=1e-5)


# --- Death and resumption --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3", "fsdp2"])
def test_killed_run_is_resumed_as_if_nothing_had_happened(launched: Launched, backend: str) -> None:
    """kill -9 of all processes after 3 of 4 steps, the last checkpoint after 2; then a new launch."""
    run = launched(backend)
    assert run.finished.returncode != 0
    assert f"exitcode  : -{signal.SIGKILL.value}" in run.finished.log.read_text()
    assert not run.file("killed", 0).exists() and not run.file("killed", 1).exists()
    assert_resumed(run("straight"), launched(backend, "resumed")("resumed"))


@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3", "fsdp2"])
def test_adapter_is_resumed_as_if_nothing_had_happened(launched: Launched, backend: str) -> None:
    run = launched(backend)
    run("stopped_lora")
    assert_resumed(run("straight_lora"), launched(backend, "resumed")("resumed_lora"))


def test_more_processes_than_the_run_that_is_resumed(launched: Launched) -> None:
    """The new one knows of the evidence what all know (else they would wait for it to learn), but replays nothing."""
    results = launched("ddp")("grown_prior")
    for state, other in zip(*map(learned, results), strict=True):
        assert state.keys() == other.keys() != set()
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])) for key, value in state.items())
    sizes = [[len(batch["usable"]) for batch in result["batches"]] for result in results]
    assert sizes == [[BATCH, BATCH], [BATCH // 2, BATCH]]
    same_weights(results[0]["weights"][4], results[1]["weights"][4], tolerance=0)


def assert_resumed(straight: Results, resumed: Results) -> None:
    sampled = [result["batches"][0]["completion_ids"] for result in straight]
    assert sampled[0].shape != sampled[1].shape or not torch.equal(*sampled)  # each has random numbers of its own
    for one, other in zip(straight, resumed, strict=True):
        same_logs(logs(one)[:-1], logs(other)[:-1], tolerance=1e-6)  # the last is of times
        assert len(other["batches"]) == 2
        for batch, other_batch in zip(one["batches"][2:], other["batches"], strict=True):
            assert torch.equal(batch["completion_ids"], other_batch["completion_ids"])
            for name in PER_COMPLETION:
                close(other_batch[name], batch[name], tolerance=1e-6)
        same_weights(one["weights"][4], other["weights"][4], tolerance=1e-6)
        state, other_state = one["posterior_state"], other["posterior_state"]
        assert state["partition"]["running"]["keys"] == other_state["partition"]["running"]["keys"]
        assert state["partition"]["running"]["count"] == other_state["partition"]["running"]["count"]
        sums = (s["partition"]["running"]["log_sum"] for s in (state, other_state))
        assert next(sums) == pytest.approx(next(sums), abs=1e-6)
        buffers = state["replay_buffer"], other_state["replay_buffer"]
        assert torch.equal(buffers[0]["generator"], buffers[1]["generator"])
        for row, other_row in zip(buffers[0]["rows"], buffers[1]["rows"], strict=True):
            assert row.keys() == other_row.keys()
            for name, value in row.items():
                close(value, other_row[name], tolerance=1e-6)
        assert one["num_tokens"] == other["num_tokens"]
