"""The benchmarks as commands: one small run of everything, what is refused, and the tables of step and scaling."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_bayes import cli
from trl_bayes.benchmarks.exact_benchmark import Method, methods, problems
from trl_bayes.benchmarks.step_benchmark import Clock, ProcessorClock, build_model, ratio_cells
from trl_bayes.commands import bench, bench_scaling, bench_step
from trl_bayes.commands.bench import BenchArguments, exact_jobs
from trl_bayes.commands.bench_scaling import ScalingArguments, Step
from trl_bayes.commands.bench_step import StepArguments


TINY: dict[str, Any] = dict(
    hidden_size=64, num_layers=1, vocab_size=80, max_completion_length=4, batch_size=4, num_generations=2, steps=1
)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence with which a command refuses."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(argv))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    return error.strip().splitlines()[-1].partition("error: ")[2]


def test_two_sections_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exact and embedded by one trainer, in this process, a step or two each."""
    arguments = ["--problems", "letters", "--methods", "shannon", "--seeds", "3", "--quick", "--num_parallel", "1"]
    cli.main(["bench", "--sections", "exact", "embedded", *arguments, "--output_dir", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "bench.json").read_text(), parse_constant=pytest.fail)
    assert record["machine"]["torch"] == torch.__version__ and record["machine"]["processor"]
    (exact,) = record["exact"]
    assert (exact["problem"], exact["seed"], exact["samples"]) == ("letters", 3, 512)
    assert [point["samples"] for point in exact["curve"]] == [0, 256, 512]
    (embedded,) = record["embedded"]["runs"]
    assert embedded["samples"] >= 80 and embedded["evaluation"]["metrics"]["reward"]["trusted"]
    printed, written = capsys.readouterr().out, (tmp_path / "out" / "bench.md").read_text()
    rows = (
        "| letters | FDPGTrainer jensen_shannon | 512 |",
        f"| FDPGTrainer jensen_shannon | {embedded['samples']} |",
    )
    for text in rows:
        assert text in printed and text in written
    assert "![" in written and "![" not in printed and "Step time" not in written
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_step_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each measurement is asked for in turn; no figure without a divergence."""

    def measure(args: StepArguments, name: str) -> dict[str, float]:
        return {"step_seconds": 2.0 if name == bench_step.YARDSTICK else 3.0, "peak_mib": 100.0}

    monkeypatch.setattr(bench_step, "_measure_apart", measure)
    cli.main(["bench", "--sections", "step", "--methods", "DPGTrainer", "--output_dir", str(tmp_path)])
    record = json.loads((tmp_path / "bench.json").read_text())
    assert len(record["step"]["measurements"]["DPGTrainer"]) == record["step"]["size"]["rounds"] == 2
    assert "| DPGTrainer | 3.000 | 1.500 (1.500 to 1.500) | 100 |" in capsys.readouterr().out
    assert not (tmp_path / "bench.png").exists()


@pytest.mark.slow
def test_trainings_in_two_processes_are_those_of_one(tmp_path: Path) -> None:
    def fits(folder: str, *flags: str) -> list[Any]:
        arguments = ["--sections", "exact", "--problems", "letters", "--methods", "RLOO", "KLRL", "--samples", "256"]
        cli.main(["bench", *arguments, "--seeds", "0", *flags, "--output_dir", str(tmp_path / folder)])
        runs = json.loads((tmp_path / folder / "bench.json").read_text())["exact"]
        return [(run["method"], run["fit"]["forward_kl"]) for run in runs]

    alone, together = fits("one", "--num_parallel", "1"), fits("two")
    assert [name for name, _ in alone] == [name for name, _ in together] == ["TRL RLOOTrainer", "KLRLTrainer"]
    assert [value for _, value in together] == pytest.approx([value for _, value in alone], rel=1e-4)


def test_jobs_are_problems_by_methods_by_seeds() -> None:
    args = BenchArguments(problems=["letters", "hard-20k", "letters"], methods=["RLOO", "DPG"], seeds=[0, 4, 0])
    jobs = exact_jobs(args)
    assert len(jobs) == 2 * (4 + 4)  # RLOO, DPG and two of f-DPG on either
    settings = [job.keywords for job in jobs]
    assert {one["seed"] for one in settings} == {0, 4} and {one["max_steps"] for one in settings} == {80, 640}
    assert all(one["evaluate_at"][0] == 0 and one["evaluate_at"][-1] == one["max_steps"] for one in settings)
    full = [job.keywords["max_steps"] for job in exact_jobs(BenchArguments(problems=["letters"], samples=102_400))]
    assert set(full) == {400}


def test_bench_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # which the command would set
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, sentence in (
        (["--problems", "leters"], "'leters' is not one of letters, bigrams, balance, hard-20k, hard-100k (did you"),
        (["--sections", "exacte"], "'exacte' is not one of exact, embedded, step (did you mean 'exact'?)."),
        (["--methods", "PPO"], "no trainer's name has 'PPO' in it: they are TRL GRPOTrainer,"),
        (["--problems", "hard-20k", "--sections", "exact", "--methods", "KLRL"], "no trainer's name has 'KLRL' in it"),
        (["--device", "tpu"], "'tpu' is not one of cpu, cuda"),
        (["--device", "cuda"], "`device=cuda`, but torch finds no CUDA GPU: set `--device cpu`."),
        (["--samples", "0"], "`samples=0` trains nothing"),
        (["--num_parallel", "0"], "`num_parallel=0` trains nothing"),
        (["--seeds", "-1"], "`seeds` must be between 0 and 2^32 - 2, got [-1]."),
        (["--output_dir", str(tmp_path / "file" / "x")], "cannot be written to: Not a directory."),
    ):
        assert sentence in refusal(capsys, "bench", *flags)


def test_cuda_has_a_larger_model() -> None:
    cpu, cuda = BenchArguments().step, BenchArguments(device="cuda").step
    assert cuda.hidden_size > cpu.hidden_size and cuda.bf16 and not cuda.use_cpu and cpu.use_cpu
    (job, *_) = exact_jobs(BenchArguments(device="cuda"))
    assert job.keywords["use_cpu"] is False


# ---------------------------------------------------------------------------------------------------------------------
# bench-step and bench-scaling


def test_one_step_of_a_tiny_model() -> None:
    measured = bench_step.measure(StepArguments(**TINY, use_cpu=True, only="DPGTrainer"))
    assert 0 < measured["step_seconds"] < 10 and 50 < measured["peak_mib"] < 50_000


def test_scaling_in_one_process(tmp_path: Path) -> None:
    args = ScalingArguments(**TINY, use_cpu=True)
    build_model(str(tmp_path), args)
    klrl = next(method for method in methods(problems()["letters"]) if method.name == "KLRLTrainer")
    trainer, step = bench_scaling.measure(klrl, str(tmp_path), args)
    assert trainer.state.global_step == 3 and 0 < step.wall < 10 and 0 < step.work < 10


def test_clocks_leave_out_the_first_two_steps() -> None:
    for clock in (Clock(), ProcessorClock()):
        clock.seconds = [9.0, 9.0, 1.0, 2.0, 4.0]
        assert clock.median == 2.0


def test_ratios_are_those_of_a_round() -> None:
    assert ratio_cells([2.0, 6.0, 8.0], [1.0, 2.0, 8.0], digits=1) == ["6.0", "2.000 (1.000 to 3.000)"]


def test_tables_of_steps() -> None:
    step = bench_step.to_markdown(
        {
            "TRL RLOOTrainer": [{"step_seconds": 1.0, "peak_mib": 100.0}, {"step_seconds": 2.0, "peak_mib": 100.0}],
            "A": [{"step_seconds": 3.0, "peak_mib": 150.0}, {"step_seconds": 4.0, "peak_mib": 50.0}],
        },
        use_cpu=True,
    )
    assert step.splitlines()[-1] == "| A | 3.500 | 2.500 (2.000 to 3.000) | 100 | 1.000 (0.500 to 1.500) |"
    scaling = bench_scaling.to_markdown({"TRL GRPOTrainer": [Step(1.0, 2.0)], "A": [Step(1.5, 2.0)]}, 4, "cpu")
    assert scaling.startswith("4 processes, cpu\n")
    assert scaling.splitlines()[-1] == "| A | 1.500 | 1.500 (1.500 to 1.500) | 2.000 | 1.000 (1.000 to 1.000) |"


def test_a_measurement_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="The measurement of TRL RLOOTrainer failed"):
        bench_step.measure_all(StepArguments(**TINY, rounds=1, methods=["DPG"]))


@pytest.mark.parametrize("command", ["bench-step", "bench-scaling"])
def test_step_and_scaling_refuse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, sentence in (
        (["--methods", "PPO"], "is named 'PPO': "),
        (["--rounds", "0"], "`rounds` must be at least 1, got 0."),
        (["--steps", "0"], "`steps` must be at least 1, got 0."),
        (["--hidden_size", "100"], "`hidden_size=100` must be a multiple of 64"),
        (["--batch_size", "9"], "`batch_size=9` must be a multiple of `num_generations=8`."),
        (["--vocab_size", "10"], "`vocab_size=10` is too small"),
    ):
        assert sentence in refusal(capsys, command, *flags)


def test_a_trainer_is_measured_beside_the_yardstick() -> None:
    assert bench_step.measured_methods(["KLRL"]) == ["TRL RLOOTrainer", "KLRLTrainer"]
    assert len(bench_step.measured_methods([])) == len(methods(problems()["letters"]))
    assert isinstance(bench._chosen(methods(problems()["letters"]), BenchArguments(methods=["DPG"]))[0], Method)
