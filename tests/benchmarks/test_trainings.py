"""What sections of trainings share: which trainers are chosen, records, curves, and what is refused."""

import math

import pytest
from trl import GRPOConfig, GRPOTrainer

from trl_bayes import DPGConfig, DPGTrainer
from trl_bayes.benchmarks.learning_curve import Point
from trl_bayes.benchmarks.trainings import (
    TrainerSetup,
    TrainingRun,
    TrainingsArguments,
    check_parts,
    chosen,
    curves_of,
)


SETUPS = [TrainerSetup("TRL GRPOTrainer", GRPOTrainer, GRPOConfig), TrainerSetup("DPGTrainer", DPGTrainer, DPGConfig)]


def test_trainers_are_chosen_by_parts_of_their_names() -> None:
    assert chosen(SETUPS, ["DPG"]) == SETUPS[1:] and chosen(SETUPS, []) == SETUPS
    assert [setup.is_ours for setup in SETUPS] == [False, True]
    check_parts(SETUPS, ["DPG", "TRL"])
    with pytest.raises(ValueError, match="no trainer's name has 'PPO' in it: they are TRL GRPOTrainer, DPGTrainer."):
        check_parts(SETUPS, ["DPG", "PPO"])


def test_records_and_curves_of_a_run() -> None:
    run = TrainingRun("letters", "A", 3, 64, 2.0, "end", (Point(0, 0.0, 1.0), Point(64, 1.5, 0.25)))
    assert run.to_record("fit", str.upper, lambda value: {"kl": value}) == {
        "problem": "letters",
        "method": "A",
        "seed": 3,
        "samples": 64,
        "seconds": 2.0,
        "fit": "END",
        "curve": [{"samples": 0, "seconds": 0.0, "kl": 1.0}, {"samples": 64, "seconds": 1.5, "kl": 0.25}],
    }
    row = curves_of([run], math.sqrt, 2.0)
    assert (row.title, row.start, row.methods) == ("letters", 2.0, ["A"])
    assert row.curves[0].samples == [0, 64] and row.curves[0].values == [1.0, 0.5]


def test_how_it_was_run() -> None:
    assert TrainingsArguments(seeds=[3, 3], num_parallel=1).how() == "seed 3; on the CPU"
    many = TrainingsArguments(seeds=[0, 1], device="cuda", num_parallel=4)
    assert many.how() == "seeds 0, 1; on the GPU, 4 trainings at a time, one CPU thread each"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"samples": 0}, "`samples=0` trains nothing"),
        ({"num_parallel": 0}, "`num_parallel=0` trains nothing"),
        ({"seeds": [-1]}, r"`seeds` must be between 0 and 2\^32 - 2, got \[-1\]."),
        ({"device": "tpu"}, "'tpu' is not one of cpu, cuda"),
    ],
)
def test_refusals(fields: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TrainingsArguments(**fields)
