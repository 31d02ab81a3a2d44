"""CTRL is KL-RL on the calibrated target that its configuration names; that it reaches it is tested elsewhere."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import HfArgumentParser

from tests.helpers.trainers import QUIET
from trl_bayes import CTRLConfig, CTRLTrainer, KLRLConfig, KLRLTrainer, cli
from trl_bayes.benchmarks.calibrated import ranked_task
from trl_bayes.targets import Calibrated
from trl_bayes.targets.transforms import beta_for_kl, calibrated_law, ctrl_best_of_n, ctrl_worst_of_n


TASK = ranked_task()
SETTINGS: dict[str, Any] = {
    **QUIET,
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "num_prior_samples": 20,
    "max_completion_length": TASK.max_completion_length,
    "max_steps": 2,
    "learning_rate": 1e-2,
}


def config(**settings: Any) -> CTRLConfig:
    return CTRLConfig(**{"output_dir": "unused", **SETTINGS, **settings})


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> str:
    return TASK.build_model(tmp_path_factory.mktemp("prior"))


def test_defaults_are_best_of_4_at_half_a_nat() -> None:
    args = config()
    assert args.beta == beta_for_kl(ctrl_best_of_n(10.0), 0.5)
    assert calibrated_law(args.make_transform(), args.beta).kl_prior == pytest.approx(0.5, abs=1e-6)
    assert args.partition == "known"


@pytest.mark.parametrize(("procedure", "transform"), [("best_of_n", ctrl_best_of_n), ("worst_of_n", ctrl_worst_of_n)])
@pytest.mark.parametrize(("n", "rate"), [(2, 5.0), (3, 10.0), (32, 10.0)])
def test_rate_and_temperature_follow_the_procedure(procedure: str, transform: Any, n: int, rate: float) -> None:
    args = config(inference_procedure=procedure, inference_n=n, kl_budget=1.2)
    assert args.make_transform() == transform(rate)
    assert args.beta == beta_for_kl(transform(rate), 1.2)
    assert config(inference_procedure=procedure, inference_n=n, transform_rate=7).make_transform() == transform(7.0)


@pytest.mark.parametrize("n", [2, 3, 4, 8, 16])
def test_default_rate_is_the_better_of_the_two_for_best_of_n(n: int) -> None:
    """By the law of a continuous reward, at the default budget."""

    def win_rate(rate: float) -> float:
        return calibrated_law(ctrl_best_of_n(rate), beta_for_kl(ctrl_best_of_n(rate), 0.5), n).best_of_n

    assert config(inference_n=n).transform_rate == max((5.0, 10.0), key=win_rate)


def test_beta_can_be_set_instead() -> None:
    args = config(beta=300.0)
    assert args.beta == 300.0 and args.kl_budget is None


def test_a_config_made_from_the_fields_of_another_is_the_same() -> None:
    for args in (config(), config(kl_budget=0.3, inference_n=2), config(beta=5.0)):
        own = {name: getattr(args, name) for name in [*CTRLConfig.__annotations__, "target"]}
        assert config(**own) == args


def test_flags() -> None:
    flags = ["--output_dir", "out", "--use_cpu", "--bf16", "false", "--inference_n", "2", "--kl_budget", "1"]
    (args,) = HfArgumentParser(CTRLConfig).parse_args_into_dataclasses(flags)
    assert args.beta == beta_for_kl(ctrl_best_of_n(5.0), 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inference_procedure": "beam"}, r"Unknown `inference_procedure='beam'`: use one of \['best_of_n', 'worst"),
        ({"inference_n": 1}, "`inference_n=1` leaves nothing to choose from: set it to 2 or more"),
        ({"transform_rate": 0.0}, r"needs `t` in \(0, 50\]"),
        ({"transform_rate": math.nan, "beta": 1.0}, r"needs `t` in \(0, 50\]"),
        ({"kl_budget": 0.0}, r"`kl_budget=0.0` must lie in \(0, 5\] nats"),
        ({"kl_budget": math.nan}, r"`kl_budget=nan` must lie in \(0, 5\] nats"),
        ({"kl_budget": 6.0}, r"`kl_budget=6.0` must lie in \(0, 5\] nats"),
        ({"beta": 0.0}, "`beta=0.0` is not a temperature of CTRL: set a positive number, or `kl_budget` instead"),
        ({"beta": math.nan}, "`beta=nan` is not a temperature of CTRL"),
        ({"beta": 0.1, "kl_budget": 0.5}, "`kl_budget=0.5` asks for `beta=7011.9[0-9]`, but `beta=0.1` is set"),
        ({"target": "tilt"}, "The target of CTRLTrainer follows from .* or use KLRLTrainer for another"),
        ({"num_prior_samples": 1}, "`num_prior_samples=1` is too few"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        config(**settings)
    assert "\n" not in str(refused.value)


def make(kind: type, args: Any, prior: str, **arguments: Any) -> Any:
    defaults = {"model": prior, "reward_funcs": TASK.reward_func, "train_dataset": TASK.dataset(8)}
    return kind(args=args, **{**defaults, **arguments})


@pytest.mark.filterwarnings("ignore:.* share their reward with another:UserWarning")
@pytest.mark.parametrize("procedure", ["best_of_n", "worst_of_n"])
def test_it_is_kl_rl_on_the_calibrated_target(procedure: str, prior: str, tmp_path: Path) -> None:
    args = config(output_dir=str(tmp_path / "ctrl"), inference_procedure=procedure)
    ctrl = make(CTRLTrainer, args, prior)
    ctrl.train()
    assert repr(ctrl.target) == repr(Calibrated(args.make_transform(), args.beta))
    kl_rl_args = KLRLConfig(output_dir=str(tmp_path / "kl_rl"), **SETTINGS, partition="known")
    kl_rl = make(KLRLTrainer, kl_rl_args, prior, target=Calibrated(args.make_transform(), args.beta))
    kl_rl.train()
    for (name, one), (_, other) in zip(ctrl.model.named_parameters(), kl_rl.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    log = next(log for log in ctrl.state.log_history if "loss" in log)
    law = calibrated_law(args.make_transform(), args.beta)
    assert log["posterior/log_z"] == pytest.approx(law.log_z, abs=0.05)  # from 20 ranks


def test_another_target_is_refused(prior: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CTRLTrainer makes its target from its configuration: use KLRLTrainer"):
        make(CTRLTrainer, config(output_dir=str(tmp_path)), prior, target="tilt")


def test_trainer_without_a_configuration(prior: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    trainer = CTRLTrainer(model=prior, reward_funcs=TASK.reward_func, train_dataset=TASK.dataset(8))
    assert trainer.args.output_dir.endswith("-InfAlign-CTRL")
    assert isinstance(trainer.target, Calibrated)


def test_command(prior: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Dataset.from_dict({"prompt": list(TASK.prompts) * 2}).to_json("prompts.jsonl")
    recipe = {
        **SETTINGS,
        "model_name_or_path": prior,
        "dataset_name": "prompts.jsonl",
        "reward_funcs": [{"name": "length_in", "unit": "characters"}],
        "output_dir": "out",
        "kl_budget": 0.25,
        "partition": "running",  # lengths tie
        "report_to": "none",
        "save_strategy": "no",
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    cli.main(["ctrl", "--config", "recipe.yaml", "--inference_procedure", "worst_of_n"])
    assert "2412.19792" in Path("out", "README.md").read_text()
    log = json.loads(Path("out", "trainer_state.json").read_text())["log_history"][0]
    assert "posterior/target/calibrated/tied_frac" in log
