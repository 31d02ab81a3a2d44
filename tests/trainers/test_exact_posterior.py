"""Every trainer, trained for real, ends at the posterior that enumeration gives.

The tiny prior's completions are all scored, so KL(p||pi), KL(pi||p) and TV are exact. TRL's RLOOTrainer on the same
task and with the same optimizer is the yardstick. Training is deterministic given the seed (one thread, CPU).
"""

import json
from collections.abc import Callable

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bayes import (
    FDPGConfig,
    FDPGTrainer,
    KLRLConfig,
    KLRLTrainer,
    TrajectoryBalanceConfig,
    TrajectoryBalanceTrainer,
)
from trl_bayes.benchmarks.enumeration import PolicyFit, compare, mean_fit
from trl_bayes.benchmarks.exact_training import ExactProblem, problems, train, trainers
from trl_bayes.benchmarks.trainings import TrainerSetup
from trl_bayes.targets import Constraint, Product, Target, Tilt


pytestmark = pytest.mark.slow
PROBLEMS = problems()
Once = Callable[[str, Callable[[], PolicyFit]], PolicyFit]
SHORT = {"max_steps": 80}  # 20,480 completions, as many as `trl-bayes bench exact` takes
OURS = [method for method in trainers(PROBLEMS["letters"]) if method.is_ours]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def once(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Callable[[str, Callable[[], PolicyFit]], PolicyFit]:
    """Runs something once for all pytest workers and hands its result to each."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent

    def run(name: str, compute: Callable[[], PolicyFit]) -> PolicyFit:
        file = folder / f"{name}.json"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                file.write_text(json.dumps(compute()))
        return PolicyFit(*json.loads(file.read_text()))

    return run


@pytest.mark.parametrize("method", OURS, ids=lambda method: method.name.replace(" ", "-"))
def test_reaches_the_posterior_like_rloo(method: TrainerSetup, once: Once) -> None:
    problem = PROBLEMS["letters"]
    rloo = next(m for m in trainers(problem) if m.name == "TRL RLOOTrainer")
    yardstick = once("rloo", lambda: train(problem, rloo, **SHORT).final)
    fit = train(problem, method, **SHORT).final
    assert fit.forward_kl <= 0.025
    assert fit.reverse_kl <= 0.025
    assert fit.forward_kl <= 1.15 * yardstick.forward_kl
    assert fit.reverse_kl <= 1.15 * yardstick.reverse_kl


@pytest.mark.parametrize(
    ("name", "samples", "forward_kl", "mass_outside"),
    [
        ("DPGTrainer", "20k", 0.10, 0.03),
        ("FDPGTrainer jensen_shannon", "20k", 0.10, 0.03),
        ("FDPGTrainer jensen_shannon", "100k", 0.02, 0.005),
    ],
)
def test_conditions_on_a_rare_event(name: str, samples: str, forward_kl: float, mass_outside: float) -> None:
    """An event of prior probability 0.08; log Z is -2.5, where the prior stands."""
    problem = PROBLEMS[f"hard-{samples}"]
    method = next(m for m in trainers(problem) if m.name == name)
    fit = train(problem, method).final
    assert fit.forward_kl <= forward_kl
    assert fit.mass_outside <= mass_outside


def test_dpg_gains_from_using_each_sample_four_times() -> None:
    """A batch used four times: with 13k completions it is nearer to the posterior than on-policy with 30k."""
    problem = PROBLEMS["hard-100k"]
    dpg = next(m for m in trainers(problem) if m.name == "DPGTrainer")
    on_policy = train(problem, dpg, max_steps=234)
    reused = train(problem, dpg, max_steps=4 * 98, num_iterations=4)
    assert (on_policy.samples, reused.samples) == (29_952, 12_544)
    assert reused.final.forward_kl <= min(0.025, on_policy.final.forward_kl / 2)
    assert reused.final.mass_outside <= min(0.01, on_policy.final.mass_outside / 2)


def test_pure_rl_collapses(letters_prior: str) -> None:
    """beta=0 has no posterior: soon it has less than half of the entropy that the posterior of a reward / 0.7 has."""
    problem = PROBLEMS["letters"]
    tokenizer, prior = (
        AutoTokenizer.from_pretrained(letters_prior),
        AutoModelForCausalLM.from_pretrained(letters_prior),
    )
    exact = problem.task.posteriors(tokenizer, prior, problem.log_potential)
    entropy = mean_fit([compare(posterior, posterior.log_posterior) for posterior in exact]).entropy
    pure = train(
        problem, TrainerSetup("pure RL", _untargeted(KLRLTrainer), KLRLConfig, {"beta": 0.0}), max_steps=60
    ).final
    assert pure.entropy < entropy / 2
    assert pure.forward_kl > 1.0


def _untargeted(trainer: Callable) -> Callable:
    """The trainer without the problem's target: pure RL takes none."""
    return lambda *args, target=None, **kwargs: trainer(*args, **kwargs)


@pytest.mark.parametrize(
    ("trainer", "config", "settings"),
    [
        (TrajectoryBalanceTrainer, TrajectoryBalanceConfig, {"replay_buffer_size": 2048}),
        (TrajectoryBalanceTrainer, TrajectoryBalanceConfig, {"divergence": "jensen_shannon", "num_iterations": 2}),
        (TrajectoryBalanceTrainer, TrajectoryBalanceConfig, {"divergence": "alpha", "alpha": 0.5}),
        (FDPGTrainer, FDPGConfig, {"divergence": "squared_hellinger"}),
        (FDPGTrainer, FDPGConfig, {"divergence": "alpha", "alpha": 0.5, "num_iterations": 2}),
        (KLRLTrainer, KLRLConfig, {"num_iterations": 2, "gradient_accumulation_steps": 2}),
    ],
)
def test_other_divergences_and_reuse_reach_the_posterior(trainer: Callable, config: Callable, settings: dict) -> None:
    per_step = 128 if "gradient_accumulation_steps" in settings else 256
    method = TrainerSetup("variant", trainer, config, {**settings, "per_device_train_batch_size": per_step})
    fit = train(PROBLEMS["letters"], method, **SHORT).final
    assert fit.forward_kl <= 0.025
    assert fit.reverse_kl <= 0.025


class _Conjunction(ExactProblem):
    """Two pieces of evidence: the tilt, and completions of at least two letters."""

    @property
    def target(self) -> Target:
        return Product([Tilt(0.7), Constraint(threshold=-0.25)])


def test_product_of_a_tilt_and_a_constraint() -> None:
    problem = _Conjunction("conjunction", PROBLEMS["letters"].task, beta=0.7)
    dpg = next(m for m in OURS if m.name == "DPGTrainer")
    fit = train(problem, dpg).final
    assert fit.forward_kl <= 0.025
    assert fit.mass_outside <= 0.01


def test_posterior_of_a_prior_that_is_not_the_start() -> None:
    """Training starts from another model; the posterior is that of `prior_model_name_or_path`."""
    problem = PROBLEMS["letters"]
    dpg = next(m for m in OURS if m.name == "DPGTrainer")
    fit = train(problem, dpg, start_seed=7, max_steps=300).final
    assert fit.forward_kl <= 0.025
    assert fit.reverse_kl <= 0.025
