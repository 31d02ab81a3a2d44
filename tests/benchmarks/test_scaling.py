"""The section of several processes: a step of a tiny model in one process, the table, and what is refused."""

import json
from pathlib import Path

import pytest

from trl_bayes import cli
from trl_bayes.benchmarks import scaling
from trl_bayes.benchmarks.scaling import ScalingArguments, Step, measured
from trl_bayes.benchmarks.timing import StepSize


def test_measures_in_turns_and_writes_where_it_is_the_first_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GRPOTrainer and ours, forwards and backwards, of which one measurement each is real."""
    order: list[str] = []
    once = scaling.measure

    def measure(setup, folder, size):
        order.append(setup.name)
        return once(setup, folder, size) if len(order) <= 2 else (finished[setup.name], Step(0.5, 0.25))

    def keep(setup, folder, size, clocks, train=scaling.train):
        finished[setup.name] = train(setup, folder, size, clocks)
        return finished[setup.name]

    finished: dict[str, object] = {}
    monkeypatch.setattr(scaling, "measure", measure)
    monkeypatch.setattr(scaling, "train", keep)
    tiny = "--hidden_size 64 --num_layers 1 --vocab_size 80 --max_completion_length 4 --batch_size 4 --steps 1"
    flags = [*tiny.split(), "--num_generations", "2", "--use_cpu", "--rounds", "2", "--methods", "KLRL"]
    cli.main(["bench", "scaling", *flags, "--output_dir", str(tmp_path)])
    assert order == ["TRL GRPOTrainer", "KLRLTrainer", "KLRLTrainer", "TRL GRPOTrainer"]
    record = json.loads((tmp_path / "scaling.json").read_text())["scaling"]
    assert record["processes"] == 1 and record["size"]["hidden_size"] == 64
    first, second = record["steps"]["KLRLTrainer"]
    assert first["wall"] > 0 and first["work"] > 0 and second == {"wall": 0.5, "work": 0.25}
    printed = capsys.readouterr()
    assert "| KLRLTrainer |" in printed.out and "start it by `accelerate launch`" in printed.err


def test_the_table() -> None:
    text = scaling.table({"TRL GRPOTrainer": [Step(1.0, 2.0)], "A": [Step(1.5, 2.0)]})
    assert text.splitlines()[-1] == "| A | 1.500 | 1.500 (1.500 to 1.500) | 2.000 | 1.000 (1.000 to 1.000) |"


def test_ours_beside_the_yardstick() -> None:
    assert [setup.name for setup in measured(["KLRL"])] == ["TRL GRPOTrainer", "KLRLTrainer"]
    names = [setup.name for setup in measured([])]
    assert names[0] == "TRL GRPOTrainer" and "TRL RLOOTrainer" not in names and len(names) > 3


def test_its_own_defaults() -> None:
    assert ScalingArguments(use_cpu=True).size == StepSize(batch_size=16, steps=5, use_cpu=True)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"methods": ["PPO"]}, "no trainer's name has 'PPO' in it"),
        ({"methods": ["RLOO"]}, "no trainer's name has 'RLOO' in it"),  # none of ours
        ({"rounds": 0}, "`rounds` must be at least 1, got 0."),
        ({"steps": 0}, "`steps` must be at least 1, got 0."),
        ({"batch_size": 9}, "`batch_size=9` must be a multiple of `num_generations=8`."),
    ],
)
def test_refusals(fields: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ScalingArguments(**fields)
