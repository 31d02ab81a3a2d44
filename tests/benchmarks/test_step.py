"""The section of step time and memory: one real step, what a process's peak is, and the table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trl_bayes import cli
from trl_bayes.benchmarks import step
from trl_bayes.benchmarks.step import StepArguments, measured_names, table, to_markdown
from trl_bayes.benchmarks.timing import StepSize, measured_trainers


TINY = StepSize(64, 1, 80, max_completion_length=4, batch_size=4, num_generations=2, steps=1, use_cpu=True)


def test_one_step_of_a_tiny_model() -> None:
    measured = step.measure(TINY, "DPGTrainer")
    assert measured["step_seconds"] > 0 and 50 < measured["peak_mib"] < 50_000


def test_a_section_measures_every_trainer_in_each_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each measurement is asked for in turn; no figure without a divergence."""
    asked = []

    def measure_apart(size: StepSize, name: str) -> dict[str, float]:
        asked.append(name)
        return {"step_seconds": 2.0 if name == step.YARDSTICK else 3.0, "peak_mib": 100.0}

    monkeypatch.setattr(step, "measure_apart", measure_apart)
    cli.main(["bench", "step", "--methods", "DPGTrainer", "--output_dir", str(tmp_path)])
    record = json.loads((tmp_path / "bench.json").read_text())["step"]
    assert asked == 2 * measured_names(["DPGTrainer"]) and len(record["measurements"]["DPGTrainer"]) == 2
    assert record["rounds"] == 2 and record["size"]["batch_size"] == 16
    assert "| DPGTrainer | 3.000 | 1.500 (1.500 to 1.500) | 100 |" in capsys.readouterr().out
    assert not (tmp_path / "bench.png").exists()


def test_a_measurement_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="The measurement of TRL RLOOTrainer failed"):
        step.measure_apart(TINY, "TRL RLOOTrainer")


@pytest.mark.slow
def test_a_measurement_is_a_process_of_its_own() -> None:
    assert step.measure_apart(TINY, "KLRLTrainer").keys() == {"step_seconds", "processor_seconds", "peak_mib"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="other systems have no count from the beginning")
def test_a_peak_is_not_that_of_the_process_that_started_it() -> None:
    """A process that has 2 GiB resident starts one that only imports."""
    small = "from trl_bayes.benchmarks.step import peak_memory; print(peak_memory(use_cpu=True))"
    large = (
        "import subprocess, sys; memory = bytearray(2**31); memory[::4096] = b'1' * 2**19; "
        "sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    )
    run = subprocess.run([sys.executable, "-c", large, small], capture_output=True, text=True, check=True)
    assert 50 < float(run.stdout.splitlines()[-1]) < 1500


def test_the_table() -> None:
    text = table(
        {
            "TRL RLOOTrainer": [{"step_seconds": 1.0, "peak_mib": 100.0}, {"step_seconds": 2.0, "peak_mib": 100.0}],
            "A": [{"step_seconds": 3.0, "peak_mib": 150.0}, {"step_seconds": 4.0, "peak_mib": 50.0}],
        }
    )
    assert text.splitlines()[-1] == "| A | 3.500 | 2.500 (2.000 to 3.000) | 100 | 1.000 (0.500 to 1.500) |"


def test_the_table_of_processor_time() -> None:
    measured = {"TRL RLOOTrainer": [{"step_seconds": 9.0, "processor_seconds": 2.0, "peak_mib": 100.0}]}
    text = to_markdown(measured, TINY, processor_time=True)
    assert "Seconds are of processor time." in text and "| TRL RLOOTrainer | 2.000 |" in text
    assert "| TRL RLOOTrainer | 9.000 |" in to_markdown(measured, TINY)


def test_a_trainer_is_measured_beside_the_yardstick() -> None:
    assert measured_names(["KLRL"]) == ["TRL RLOOTrainer", "KLRLTrainer"]
    assert len(measured_names([])) == len(measured_trainers())


def test_a_gpu_has_a_larger_model() -> None:
    cpu, cuda = StepArguments().size, StepArguments(device="cuda").size
    assert cuda.hidden_size > cpu.hidden_size and cuda.bf16 and not cuda.use_cpu and cpu.use_cpu and not cpu.bf16
    assert not StepArguments(device="cuda", bf16=False, hidden_size=64).size.bf16
    assert StepArguments(device="cuda").num_rounds == 3 and StepArguments(rounds=5, quick=True).num_rounds == 5


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, sentence in (
        (["--methods", "PPO"], "no trainer's name has 'PPO' in it: they are TRL GRPOTrainer,"),
        (["--rounds", "0"], "`rounds` must be at least 1, got 0."),
        (["--batch_size", "9"], "`batch_size=9` must be a multiple of `num_generations=8`."),
        (["--processor_time", "true", "--device", "cuda"], "`processor_time` measures the CPU's work"),
        (["--device", "tpu"], "'tpu' is not one of cpu, cuda"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["bench", "step", *flags])
        assert stopped.value.code == 2 and sentence in capsys.readouterr().err
