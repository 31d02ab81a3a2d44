"""A share of each group from the prior: whose completions, at what density, what is logged, and what is refused.

That the gradient is exact is in `tests/estimators/test_mixture.py`; here the trainers are to give the estimators what
is written there. The tiny prior's completions are all enumerated.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.enumerated import EnumeratedPrior, kept
from tests.helpers.outcomes import LOG_POLICY, LOG_PRIOR, NUM_OUTCOMES, SOFT
from tests.helpers.trainers import QUIET, TRAINERS
from tests.helpers.training import assert_same_weights, parameters, watch_batches
from tests.helpers.vllm import GroupingServer
from trl_bayes import DPGConfig, FDPGConfig, KLRLConfig, TrajectoryBalanceConfig, XPOConfig
from trl_bayes.benchmarks.tiny import letter_count_task
from trl_bayes.divergences import get_divergence
from trl_bayes.estimators import ImportanceWeights
from trl_bayes.groups import Group, pooled_log_z
from trl_bayes.partitions import fixed_log_z
from trl_bayes.targets import Tilt
from trl_bayes.trainers.metrics import group_metrics
from trl_bayes.trainers.prior_share import merge, spread
from trl_bayes.trainers.refusals import refuse_data


TASK = letter_count_task()
G, BETA = 4, 0.7
DEFAULTS: dict[str, Any] = {
    **QUIET,
    "beta": BETA,
    "per_device_train_batch_size": 4 * G,
    "per_device_eval_batch_size": 4 * G,
    "num_generations": G,
    "prior_fraction": 0.5,
    "num_prior_samples": 6,
    "max_completion_length": TASK.max_completion_length,
    "max_steps": 3,
    "learning_rate": 3e-2,
}
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def prior(letters_prior: str) -> EnumeratedPrior:
    return EnumeratedPrior(TASK, letters_prior, AutoTokenizer.from_pretrained(letters_prior))


@pytest.fixture
def make(prior: EnumeratedPrior, tmp_path: Path) -> Make:
    def make_trainer(kind: str = "dpg", config: dict[str, Any] | None = None, **arguments: Any) -> Any:
        row = TRAINERS[kind]
        args = row.config(**{"output_dir": str(tmp_path / "out"), **DEFAULTS, **(config or {})})
        defaults = {"model": prior.path, "reward_funcs": TASK.reward_func, "train_dataset": TASK.dataset(16)}
        return row.trainer(args=args, **{**defaults, **arguments})

    return make_trainer


class Seen(NamedTuple):
    batch: dict[str, Any]
    weights: dict[str, torch.Tensor]  # of the policy that sampled it
    is_training: bool

    def completions(self, tokenizer: Any) -> list[tuple[str, tuple[int, ...]]]:
        """The prompt and the completion of each row."""
        return [
            (
                tokenizer.decode(self.batch["prompt_ids"][i][self.batch["prompt_mask"][i].bool()]),
                tuple(self.batch["completion_ids"][i][self.batch["completion_mask"][i].bool()].tolist()),
            )
            for i in range(len(self.batch["completion_ids"]))
        ]


def record(trainer: Any) -> list[Seen]:
    """Every batch that is generated from now on, with what the loss adds to it."""
    seen: list[Seen] = []

    def see(rows: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        seen.append(Seen(dict(batch), parameters(trainer.model, trainable=False), trainer.model.training))

    watch_batches(trainer, see, lambda terms: seen[-1].batch.update(terms))
    return seen


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("dpg", {}),
        ("dpg", {"replay_buffer_size": 16, "replay_ratio": 1.0}),  # scored before the update, and kept
        ("f_dpg", {"prior_fraction": 0.25, "num_iterations": 2, "max_steps": 4}),
        ("tb", {"partition": "prior_samples"}),
    ],
    ids=str,
)
def test_completions_and_their_density(
    kind: str, config: dict[str, Any], make: Make, prior: EnumeratedPrior, tmp_path: Path
) -> None:
    trainer = make(kind, config)
    seen = record(trainer)
    trainer.train()
    of_prior = kept(tmp_path / "out" / "prior_samples")
    base = prior.log_probs(AutoModelForCausalLM.from_pretrained(prior.path))
    share = trainer.args.prior_fraction
    model = AutoModelForCausalLM.from_pretrained(prior.path)
    for each in seen:
        model.load_state_dict(each.weights)
        policy = prior.log_probs(model)
        completions = each.completions(prior.tokenizer)[: 4 * G]
        expected = [math.log((1 - share) * math.exp(policy[one]) + share * math.exp(base[one])) for one in completions]
        assert each.batch["log_proposal"][: 4 * G].tolist() == pytest.approx(expected, abs=1e-4)
        chosen = each.batch["from_prior"][: 4 * G].view(-1, G) if "from_prior" in each.batch else None
        if chosen is not None:
            assert (chosen.sum(dim=1) == share * G).all()
            for group, drawn_by_prior in enumerate(chosen):
                own = [completions[G * group + i][1] for i in drawn_by_prior.nonzero().flatten().tolist()]
                assert {*own} <= of_prior
        if kind == "f_dpg":  # whose siblings are the policy's completions only
            log_ratio = torch.tensor([policy[one] for one in completions]) - each.batch["log_target"]
            for i in range(4 * G):
                siblings = [j for j in range(G * (i // G), G * (i // G) + G) if j != i and not chosen.flatten()[j]]
                worth = -get_divergence("jensen_shannon").slope(log_ratio[siblings] + each.batch["log_z"][i])
                assert each.batch["baseline"][i].item() == pytest.approx(worth.mean().item(), abs=1e-4)
    assert max(abs(policy[one] - base[one]) for one in policy) > 0.5  # the two densities differ
    # The others are the policy's, which after some steps are not the kept ones any more
    assert {one[1] for one in seen[-1].completions(prior.tokenizer)} - of_prior
    if "replay_buffer_size" in config:
        # One of an earlier batch has the density of its own time
        fresh = seen[-2].completions(prior.tokenizer)[: 4 * G]
        then = dict(zip(fresh, seen[-2].batch["log_proposal"].tolist(), strict=False))
        replayed = seen[-1].completions(prior.tokenizer)[4 * G :]
        assert len(replayed) == 4 * G
        for one, log_q in zip(replayed, seen[-1].batch["log_proposal"][4 * G :].tolist(), strict=True):
            assert log_q == then[one]


def test_evaluation_is_the_policy_s_alone(make: Make) -> None:
    """Of other prompts than are trained on, for which no samples of the prior are drawn; the same as without."""
    other = Dataset.from_dict({"prompt": ["f e"] * 4})
    logs = []
    for share in (0.5, 0.0):
        trainer = make(config={"prior_fraction": share}, eval_dataset=other)
        if share:
            trainer.learn_from_prior()
            assert len(trainer._prior_completions) == len(TASK.prompts) * DEFAULTS["num_prior_samples"]
        seen = record(trainer)
        torch.manual_seed(0)
        logs.append({name: value for name, value in trainer.evaluate().items() if "runtime" not in name})
        assert not any(each.is_training or "from_prior" in each.batch for each in seen) and seen
    without = ("eval_samples_per_second", "eval_steps_per_second", "eval_num_tokens")
    assert {k: v for k, v in logs[0].items() if k not in without} == {
        k: v for k, v in logs[1].items() if k not in without
    }


def test_metrics_are_those_of_the_policy() -> None:
    """Completions of five outcomes in proportion to their density: the mixture's tell the same as the policy's own."""
    estimator, y = ImportanceWeights(get_divergence("forward_kl")), torch.arange(NUM_OUTCOMES)
    mixture = torch.logaddexp(LOG_POLICY, LOG_PRIOR) - math.log(2)
    found = []
    for log_q in (LOG_POLICY, mixture):
        drawn = y.repeat_interleave((20_000 * log_q.exp()).round().long()).unsqueeze(0)
        phi = (SOFT.log_target - LOG_PRIOR)[drawn]
        group = Group(LOG_POLICY[drawn], log_q[drawn], LOG_PRIOR[drawn], phi)
        log_z = fixed_log_z(pooled_log_z(group.log_weights, group.valid), group)
        terms = estimator.terms(group, log_z)
        found.append(group_metrics(group, terms, log_z, estimator, Tilt(1.0)))
    alone, mixed = found
    assert alone["posterior/ess"] < 0.8 and alone["posterior/kl_prior"] > 0.1
    for name in ("log_z", "ess", "kl_prior", "reverse_kl", "forward_kl"):
        assert mixed[f"posterior/{name}"] == pytest.approx(alone[f"posterior/{name}"], abs=1e-3), name


def test_resumed_run_is_the_uninterrupted_one(make: Make, tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "replay_buffer_size": 16}
    straight = make(config=saves)
    straight.train()
    resumed = make(config=saves)
    resumed._draw_prior = lambda *args: pytest.fail("drawn again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_same_weights(straight, resumed)


def test_vllm_samples_the_policy_s_part(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", GroupingServer)
    trainer = make(config={"use_vllm": True, "prior_fraction": 0.25, "max_steps": 1})
    trainer.train()
    # 24 samples of the prior in chunks of 16, one for each row; then three quarters of each group
    assert trainer.vllm_generation.asked == [(16, 1), (8, 1), (12, 3)]


@pytest.mark.parametrize("number", range(1, 6))
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_group_has_its_share_and_every_process_as_many(number: int, processes: int) -> None:
    group_size, of_process = 6, 12 // processes
    chosen = [spread(number, group_size, range(p * of_process, (p + 1) * of_process)) for p in range(processes)]
    whole = [each for own in chosen for each in own]
    assert [sum(whole[:6]), sum(whole[6:])] == [number, number]
    if of_process * number % group_size == 0:  # what the configuration asks for
        assert len({sum(own) for own in chosen}) == 1


def test_merging() -> None:
    assert merge("xyz", "ab", [False, True, False, True, False]) == ["x", "a", "y", "b", "z"]


def test_no_completion_twice_while_there_are_others(make: Make) -> None:
    trainer = make(config={"num_prior_samples": 2, "prior_fraction": 0.75, "max_steps": 1})
    trainer.learn_from_prior()
    rows = [{"prompt": "a"}] * G + [{"prompt": "b"}] * G + [{"prompt": "c d"}] * 2 * G
    trainer.model.train()
    chosen = trainer._choose_of_prior(rows)
    assert len(chosen) == 3 * 4
    kept_of_a = trainer._prior_completions[:2]
    assert sorted(chosen[:2]) == sorted(list(each) for each in kept_of_a)  # both, and one of them again
    assert chosen[2] in [list(each) for each in kept_of_a]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, math.nan])
def test_no_share(share: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no share of a group"):
        DPGConfig(output_dir=str(tmp_path), **{**DEFAULTS, "prior_fraction": share})


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_group_needs_both(share: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs some of the prior and some of the policy"):
        FDPGConfig(output_dir=str(tmp_path), **{**DEFAULTS, "prior_fraction": share})


def test_a_process_needs_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 2)
    settings = {**DEFAULTS, "per_device_train_batch_size": 6, "prior_fraction": 0.25}
    with pytest.raises(ValueError, match=r"spread evenly over the 6 that each process generates.* a multiple of 4\."):
        DPGConfig(output_dir=str(tmp_path), **settings)
    DPGConfig(output_dir=str(tmp_path), **{**settings, "prior_fraction": 0.5})


def test_trajectory_balance_with_its_own_z(tmp_path: Path) -> None:
    """The constant that is fitted to the siblings is exact under any proposal, importance weights are not."""
    TrajectoryBalanceConfig(output_dir=str(tmp_path), **DEFAULTS)
    for settings in ({"divergence": "forward_kl"}, {"replay_buffer_size": 64}):
        with pytest.raises(ValueError, match="moves the fixed point of trajectory balance"):
            TrajectoryBalanceConfig(output_dir=str(tmp_path), **DEFAULTS, **settings)
        TrajectoryBalanceConfig(output_dir=str(tmp_path), **DEFAULTS, **settings, partition="running")


def test_trainers_that_have_no_use_for_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every second completion is the prior's"):
        XPOConfig(output_dir=str(tmp_path), **DEFAULTS)
    with pytest.raises(TypeError, match="prior_fraction"):
        KLRLConfig(output_dir=str(tmp_path), **DEFAULTS)


def test_a_prior_that_cannot_be_sampled(make: Make, prior: EnumeratedPrior) -> None:
    def rollout(prompts: list, trainer: Any) -> dict[str, Any]:
        raise AssertionError

    with pytest.raises(ValueError, match="`rollout_func` would write others into them"):
        make(rollout_func=rollout)
    with pytest.raises(ValueError, match="`prior_fraction=0.5` needs samples of the prior.*prior_model_name_or_path"):
        make(config={"prior_model_name_or_path": prior.path})
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))
    with pytest.raises(ValueError, match="`prior_fraction=0.5` needs samples of the prior.*not streamed"):
        make(train_dataset=stream)
    trainer = make()
    trainer._is_vlm = True
    with pytest.raises(ValueError, match="`prior_fraction=.*` keeps completions as text, without their images"):
        refuse_data(trainer, [])
