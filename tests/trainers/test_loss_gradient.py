"""The gradient that a real trainer gives to the parameters, against formulas written out by hand.

The space is tiny (two letters, two tokens: seven completions a prompt) and the completions are chosen, not sampled.
Log-probabilities come from unpadded forward passes, one sequence at a time. Everything made of them is plain Python: a
factor, a sign, a mask or a stale quantity in the trainers has nowhere to hide. The last part goes further: summed over
*all* groups with their probabilities, the trainer's gradient is the exact gradient of the divergence.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import RLOOConfig, RLOOTrainer

from tests.helpers.trainers import QUIET, TRAINERS
from trl_bayes.benchmarks.tiny import EnumerableTask
from trl_bayes.trainers.posterior_trainer import PosteriorTrainer


BETA = 0.5
GROUP_SIZE = 4
Reward = Callable[..., list[float | None]]


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Different for almost all completions, whatever their length."""
    return [text.count("a") - 0.4 * text.count("b") + 0.3 * text.startswith("b") for text in completions]


TASK = EnumerableTask("ab", 2, ("a", "b a"), lambda texts: reward(texts), seed=1)
A, B, EOS = 0, 1, 2  # token ids
# Two groups, each with the empty completion, one that ends and two that are cut
COMPLETIONS = [[A, B], [EOS], [B, EOS], [B, A], [A, A], [A, EOS], [B, B], [EOS]]
PROMPTS = ["a"] * GROUP_SIZE + ["b a"] * GROUP_SIZE

CASES = [
    "kl_rl:reverse_kl",
    "f_dpg:jensen_shannon",
    "f_dpg:forward_kl",
    "f_dpg:squared_hellinger",
    "dpg:forward_kl",
    "tb:reverse_kl",
    "tb:forward_kl",
]
every_trainer = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return TASK.build_model(tmp_path_factory.mktemp("prior"))


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == {"a": A, "b": B, "<eos>": EOS}
    return tokenizer


Make = Callable[..., PosteriorTrainer]


@pytest.fixture
def make(folder: str, tmp_path: Path) -> Make:
    """Builds a trainer whose policy is not its prior, ready for a training step."""

    def make_trainer(case: str, reward_func: Reward = reward, target: Any = None, **settings: Any) -> PosteriorTrainer:
        method, _, divergence = case.partition(":")
        row = TRAINERS[method]
        if row.chooses_divergence:
            settings["divergence"] = divergence
        defaults = {"beta": BETA, "partition": "leave_one_out", "num_generations": GROUP_SIZE}
        # Two micro-batches, so that groups are scored before the loss; `test_scored_by_the_update` has one
        defaults |= {"per_device_train_batch_size": len(PROMPTS), "gradient_accumulation_steps": 2}
        args = row.config(
            output_dir=str(tmp_path),
            max_completion_length=TASK.max_completion_length,
            model_init_kwargs={"dtype": "float32"},
            **{**QUIET, **defaults, **settings},
        )
        trainer = row.trainer(
            model=folder, reward_funcs=[reward_func], args=args, train_dataset=TASK.dataset(8), target=target
        )
        perturb(trainer, seed=0)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # Trainer sets it in its training loop
        return trainer

    return make_trainer


def perturb(trainer: Any, seed: int) -> None:
    """A large step of the policy: about 0.3 nats a completion."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(trainer.model.named_parameters()):
            weight += 0.15 * weight.abs().mean() * torch.randn(weight.shape, generator=generator)
    trainer.state.global_step = 1  # so that it is not taken for a start from another model than the prior


def generate(
    trainer: Any,
    completions: list[list[int]] = COMPLETIONS,
    prompts: list[str] = PROMPTS,
    log_q: list[list[float | None]] | None = None,
) -> dict[str, Any]:
    """The trainer's generation step, with these completions for those that the model would sample."""
    returned = completions if isinstance(trainer, RLOOTrainer) else (completions, log_q)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_generate_single_turn", lambda *args, **kwargs: returned)
        batch: dict[str, Any] = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
    return batch


def rows_of(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """A micro-batch, as TRL splits a generated one."""
    return {name: value[rows] if value.dim() > 0 else value for name, value in batch.items()}


def gradient_of(trainer: Any, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """The loss of a micro-batch and what it gives to each parameter."""
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}


# --- by hand ---------------------------------------------------------------------------------------------------------


def token_log_probs(model: Any, prompt: str, completion: list[int], temperature: float = 1.0) -> Tensor:
    """`log pi` of each token of a completion, differentiable, without padding."""
    prompt_ids = [{"a": A, "b": B}[letter] for letter in prompt.split()]
    logits = model(input_ids=torch.tensor([prompt_ids + completion[:-1]])).logits[0, len(prompt_ids) - 1 :]
    return (logits.double() / temperature).log_softmax(dim=1)[torch.arange(len(completion)), completion]


def log_prob(model: Any, prompt: str, completion: list[int], temperature: float = 1.0) -> Tensor:
    return token_log_probs(model, prompt, completion, temperature).sum()


@torch.no_grad()
def log_probs(
    model: Any, temperature: float = 1.0, completions: list[list[int]] = COMPLETIONS, prompts: list[str] = PROMPTS
) -> list[float]:
    return [log_prob(model, *pair, temperature).item() for pair in zip(prompts, completions, strict=True)]


def text_of(completion: list[int]) -> str:
    return " ".join("ab"[token] for token in completion if token != EOS)


class Sample(NamedTuple):
    """A completion and what is known of it, in nats."""

    log_pi: float  # of the policy that is updated
    log_pi_then: float  # of the policy at the time of the generation step
    log_q: float  # of what sampled it
    log_target: float


def mean_of_others(values: list[float], i: int) -> float:
    others = [value for j, value in enumerate(values) if j != i]
    return sum(others) / len(others)


def t_of(log_pi: float, sample: Sample, z: float) -> float:
    return math.exp(log_pi) * z / math.exp(sample.log_target)


# f'(t), f(t) / t, L_f(log t) and f''(1)
SLOPE: dict[str, Callable[[float], float]] = {
    "forward_kl": lambda t: -1 / t,
    "reverse_kl": lambda t: 1 + math.log(t),
    "jensen_shannon": lambda t: math.log(2 * t / (1 + t)) / 2,
    "squared_hellinger": lambda t: 1 - 1 / math.sqrt(t),
}
F_OVER_T: dict[str, Callable[[float], float]] = {
    "forward_kl": lambda t: -math.log(t) / t,
    "reverse_kl": lambda t: math.log(t),
    "jensen_shannon": lambda t: (t * math.log(t) - (t + 1) * math.log((t + 1) / 2)) / 2 / t,
    "squared_hellinger": lambda t: (math.sqrt(t) - 1) ** 2 / t,
}
LOSS: dict[str, Callable[[float], float]] = {
    "forward_kl": lambda t: math.log(t) + 1 / t - 1,
    "reverse_kl": lambda t: math.log(t) ** 2 / 2,
}
CURVATURE = {"forward_kl": 1.0, "reverse_kl": 1.0, "jensen_shannon": 0.25, "squared_hellinger": 0.5}


def z_of_others(group: list[Sample], past: tuple[float, int] = (0.0, 0)) -> list[float]:
    """`Z_{-i}`, the mean weight of the siblings and of the past; at least 3/4 of the mean with the own weight."""
    weights = [math.exp(sample.log_target - sample.log_q) for sample in group]
    total, number = past[0] + sum(weights), past[1] + len(group)
    if number == 1:
        return weights
    return [max((total - own) / (number - 1), 0.75 * total / number) for own in weights]


def z_of_prompt(group: list[Sample], past: tuple[float, int] = (0.0, 0)) -> float:
    """The mean weight of the group and of the past, at least that of the group: with which the value is measured."""
    weights = [math.exp(sample.log_target - sample.log_q) for sample in group]
    return max((past[0] + sum(weights)) / (past[1] + len(group)), sum(weights) / len(group))


def fitted_evidence(group: list[Sample], divergence: str) -> list[float]:
    """Trajectory balance on-policy: for reverse KL the siblings' mean log-ratio, else the evidence of the others."""
    if divergence != "reverse_kl":
        return z_of_others(group)
    log_ratios = [sample.log_target - sample.log_pi_then for sample in group]
    return [math.exp(mean_of_others(log_ratios, i)) for i in range(len(group))]


def coefficients(case: str, group: list[Sample], z: list[float]) -> list[float]:
    """The factor of `grad log pi(y_i)`: of the divergence itself, before the division by f''(1)."""
    method, _, divergence = case.partition(":")
    slope, factors = SLOPE[divergence], []
    for i, sample in enumerate(group):
        ratio = math.exp(sample.log_pi - sample.log_q)
        if method == "kl_rl":
            baseline = math.log(z[i])  # alone, what it is worth at the posterior
            if len(group) > 1:
                baseline = mean_of_others([s.log_target - s.log_pi_then for s in group], i)
            factors.append(-ratio * (sample.log_target - sample.log_pi - baseline))
        elif method == "f_dpg":
            baseline = -slope(1.0)
            if len(group) > 1:
                baseline = mean_of_others([-slope(t_of(s.log_pi_then, s, z[i])) for s in group], i)
            factors.append(ratio * (slope(t_of(sample.log_pi, sample, z[i])) + baseline))
        elif method == "dpg":
            factors.append(ratio - math.exp(sample.log_target - sample.log_q) / z[i])
        else:
            factors.append(slope(t_of(sample.log_pi, sample, z[i])) - slope(1.0))
    return factors


def values(case: str, group: list[Sample], z: list[float]) -> list[float]:
    """What each completion adds to the loss that is logged."""
    method, _, divergence = case.partition(":")
    t = [t_of(sample.log_pi, sample, z[i]) for i, sample in enumerate(group)]
    if method == "tb":
        return [LOSS[divergence](each) for each in t]
    ratios = [math.exp(sample.log_pi - sample.log_q) for sample in group]
    return [ratio * F_OVER_T[divergence](each) for ratio, each in zip(ratios, t, strict=True)]


class ByHand(NamedTuple):
    """Per completion of COMPLETIONS; zero for one without a reward."""

    coefficients: list[float]
    values: list[float]
    z: list[float]


def by_hand(
    case: str,
    trainer: Any,
    log_pi_then: list[float],
    log_q: list[float] | None = None,
    rewards: list[float | None] | None = None,
    fit: bool = True,
    past: tuple[float, int] = (0.0, 0),
) -> ByHand:
    """Everything that the trainer should find for COMPLETIONS, from its current policy and its prior.

    `fit`: whether trajectory balance fits its evidence to the group; `past`: sum and number of earlier weights.
    """
    log_pi, log_prior = log_probs(trainer.model), log_probs(trainer.ref_model)
    rewards = list(reward([text_of(completion) for completion in COMPLETIONS])) if rewards is None else rewards
    result = ByHand(*([0.0] * len(COMPLETIONS) for _ in range(3)))
    for start in range(0, len(COMPLETIONS), GROUP_SIZE):
        scored = [i for i in range(start, start + GROUP_SIZE) if rewards[i] is not None]
        if not scored:
            continue
        group = [
            Sample(log_pi[i], log_pi_then[i], (log_q or log_pi_then)[i], log_prior[i] + rewards[i] / BETA)  # type: ignore[operator]
            for i in scored
        ]
        z = z_of_others(group, past)
        if not past[1] and fit and case.startswith("tb"):
            z = fitted_evidence(group, case.partition(":")[2])
        z_of_value = z if case.startswith("tb") else [z_of_prompt(group, past)] * len(group)
        found_here = (coefficients(case, group, z), values(case, group, z_of_value), z)
        for column, found in zip(result, found_here, strict=True):
            for i, each in zip(scored, found, strict=True):
                column[i] = each
    return result


def assemble(
    trainer: Any,
    factors: list[float],
    rows: list[int],
    temperature: float = 1.0,
    completions: list[list[int]] = COMPLETIONS,
    prompts: list[str] = PROMPTS,
) -> dict[str, Tensor]:
    """`mean_i c_i grad log pi(y_i)`."""
    trainer.model.zero_grad()
    terms = [factors[i] * log_prob(trainer.model, prompts[i], completions[i], temperature) for i in rows]
    (torch.stack(terms).sum() / len(rows)).backward()
    return {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}


def assert_same_gradient(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-4) -> None:
    """Relative to the largest entry of the whole gradient: float32 against float64."""
    assert actual.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    assert scale > 1e-3, "nothing to compare"
    for name in expected:
        difference = (actual[name] - expected[name]).abs().max().item()
        assert difference < tolerance * scale, f"{name}: off by {difference / scale:.2g} of the largest entry"


# --- the loss is the one by hand -------------------------------------------------------------------------------------

MICRO_BATCH = [1, 3, 4, 6, 7]  # some of both groups, as after TRL's shuffle


def scaled(case: str, factors: list[float]) -> list[float]:
    return [factor / CURVATURE[case.partition(":")[2]] for factor in factors]


@every_trainer
def test_on_policy(case: str, make: Make) -> None:
    trainer = make(case)
    then = log_probs(trainer.model)
    batch = generate(trainer)
    expected = by_hand(case, trainer, then)
    assert batch["log_proposal"].tolist() == pytest.approx(then, abs=1e-5)
    if not case.startswith("kl_rl"):  # KL-RL needs none
        assert batch["log_z"].exp().tolist() == pytest.approx(expected.z, rel=1e-4)
    factors = scaled(case, expected.coefficients)
    assert batch["advantages"].tolist() == pytest.approx([-factor for factor in factors], abs=2e-4)

    loss, gradient = gradient_of(trainer, rows_of(batch, MICRO_BATCH))
    assert loss == pytest.approx(sum(expected.values[i] for i in MICRO_BATCH) / len(MICRO_BATCH), rel=1e-3)
    assert_same_gradient(gradient, assemble(trainer, factors, MICRO_BATCH))


@every_trainer
def test_scored_by_the_update(case: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is used whole, at once, is not scored before: the loss does it, whatever the order of the rows."""
    trainer = make(case, gradient_accumulation_steps=1)
    expected = by_hand(case, trainer, log_probs(trainer.model))
    monkeypatch.setattr(trainer, "_score", lambda output: pytest.fail("the policy was scored twice"))
    batch = generate(trainer)
    batch = rows_of(batch, [5, 2, 7, 0, 3, 6, 1, 4])
    factors = scaled(case, expected.coefficients)
    for _ in range(2):  # a second look at the same batch finds the same
        loss, gradient = gradient_of(trainer, batch)
        assert loss == pytest.approx(sum(expected.values) / len(expected.values), rel=1e-3)
        assert_same_gradient(gradient, assemble(trainer, factors, list(range(8))))
    assert batch["advantages"].tolist() == pytest.approx([-factors[i] for i in [5, 2, 7, 0, 3, 6, 1, 4]], abs=2e-4)
    shown = trainer._logs["advantages"]  # in the order in which they were sampled
    assert list(shown) == pytest.approx([-factor for factor in factors], abs=2e-4)


def test_dropout_is_not_in_the_proposal(make: Make) -> None:
    """With dropout the update's forward pass does not give the probability that a completion was sampled with."""
    trainer = make("kl_rl:reverse_kl", gradient_accumulation_steps=1, disable_dropout=False)
    assert "log_proposal" in generate(trainer)


@every_trainer
def test_off_policy(case: str, make: Make) -> None:
    """The second pass over a batch: q and the evidence are those of the generation step, the policy is a later one."""
    trainer = make(case, num_iterations=2)
    then = log_probs(trainer.model)
    batch = generate(trainer)
    perturb(trainer, seed=1)
    now = log_probs(trainer.model)
    assert max(abs(a - b) for a, b in zip(now, then, strict=True)) > 0.1
    expected = by_hand(case, trainer, then, fit=False)
    factors = scaled(case, expected.coefficients)
    loss, gradient = gradient_of(trainer, rows_of(batch, MICRO_BATCH))
    assert loss == pytest.approx(sum(expected.values[i] for i in MICRO_BATCH) / len(MICRO_BATCH), rel=1e-3)
    assert_same_gradient(gradient, assemble(trainer, factors, MICRO_BATCH))


@every_trainer
def test_sampler_with_other_numerics(case: str, make: Make) -> None:
    """What the sampler reports is q (vLLM, asynchronous policies); a token that it could not score agrees with pi."""
    trainer = make(case, check_log_probs=False)  # more than rounding, to be seen
    then, shift = log_probs(trainer.model), 0.2
    with torch.no_grad():
        by_token = [token_log_probs(trainer.model, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    reported: list[list[float | None]] = [(each + shift).tolist() for each in by_token]
    log_q = [log_pi + shift * len(ids) for log_pi, ids in zip(then, COMPLETIONS, strict=True)]
    reported[0][1] = None
    log_q[0] -= shift
    batch = generate(trainer, log_q=reported)
    assert batch["log_proposal"].tolist() == pytest.approx(log_q, abs=1e-5)
    expected = by_hand(case, trainer, then, log_q)
    _, gradient = gradient_of(trainer, batch)
    assert_same_gradient(gradient, assemble(trainer, scaled(case, expected.coefficients), list(range(8))))


@every_trainer
def test_cap(case: str, make: Make) -> None:
    """The factor is capped after the division by f''(1); the loss that is logged is not."""
    trainer = make(case, pseudo_reward_cap=1.0)
    expected = by_hand(case, trainer, log_probs(trainer.model))
    factors = scaled(case, expected.coefficients)
    sizes = sorted(abs(factor) for factor in factors)
    trainer.args.pseudo_reward_cap = cap = (sizes[4] + sizes[5]) / 2  # three of eight are capped
    capped = [min(max(factor, -cap), cap) for factor in factors]
    batch = generate(trainer)
    assert batch["advantages"].tolist() == pytest.approx([-factor for factor in capped], abs=2e-4)
    loss, gradient = gradient_of(trainer, batch)
    assert_same_gradient(gradient, assemble(trainer, capped, list(range(8))))
    assert loss == pytest.approx(sum(expected.values) / 8, rel=1e-3)
    assert trainer._metrics["train"]["posterior/capped_frac"] == [pytest.approx(3 / 8)]


@every_trainer
def test_gradient_accumulation_divides_the_loss(case: str, make: Make) -> None:
    trainer = make(case)
    batch = generate(trainer)
    loss, gradient = gradient_of(trainer, batch)
    trainer.current_gradient_accumulation_steps = 4
    quarter, quarter_gradient = gradient_of(trainer, batch)
    assert quarter == pytest.approx(loss / 4)
    assert_same_gradient({name: 4 * each for name, each in quarter_gradient.items()}, gradient, tolerance=1e-6)
    trainer.model.eval()  # no accumulation in evaluation
    assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("case", ["kl_rl:reverse_kl", "f_dpg:jensen_shannon"])
def test_micro_batches_add_up(case: str, make: Make) -> None:
    """What concerns a group was computed before the split: halves give the same gradient as the whole."""
    trainer = make(case)
    batch = generate(trainer)
    _, whole = gradient_of(trainer, batch)
    _, first = gradient_of(trainer, rows_of(batch, [0, 5, 2, 7]))
    _, second = gradient_of(trainer, rows_of(batch, [6, 1, 4, 3]))
    assert_same_gradient({name: (first[name] + second[name]) / 2 for name in whole}, whole, tolerance=1e-5)


def test_pure_rl(make: Make) -> None:
    """beta = 0: the reward alone, neither prior nor temperature."""
    trainer = make("kl_rl:reverse_kl", beta=0.0)
    rewards = reward([text_of(completion) for completion in COMPLETIONS])
    groups = [rewards[:GROUP_SIZE], rewards[GROUP_SIZE:]]
    factors = [mean_of_others(group, i) - group[i] for group in groups for i in range(GROUP_SIZE)]
    loss, gradient = gradient_of(trainer, generate(trainer))
    assert_same_gradient(gradient, assemble(trainer, factors, list(range(8))))
    assert loss == pytest.approx(-sum(rewards) / 8)


def test_temperature(make: Make) -> None:
    """The policy and the prior are those that are sampled from: at the sampling temperature."""
    trainer, temperature = make("kl_rl:reverse_kl", temperature=0.6), 0.6
    log_pi, log_prior = (log_probs(model, temperature) for model in (trainer.model, trainer.ref_model))
    rewards = reward([text_of(completion) for completion in COMPLETIONS])
    worth = [prior + each / BETA - policy for prior, each, policy in zip(log_prior, rewards, log_pi, strict=True)]
    groups = [worth[:GROUP_SIZE], worth[GROUP_SIZE:]]
    factors = [mean_of_others(group, i) - group[i] for group in groups for i in range(GROUP_SIZE)]
    _, gradient = gradient_of(trainer, generate(trainer))
    assert_same_gradient(gradient, assemble(trainer, factors, list(range(8)), temperature))


def test_tokens_of_the_environment_do_not_count(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tool returned is read, but has no probability: neither the policy's, nor the prior's, nor q's."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    own = [[1] * len(ids) for ids in COMPLETIONS]
    own[0], own[2], own[6] = [1, 0], [0, 1], [0, 1]
    prompt_ids = [[A]] * GROUP_SIZE + [[B, A]] * GROUP_SIZE
    trainer = make("kl_rl:reverse_kl")
    trainer.rollout_func = lambda prompts, _: {
        "prompt_ids": prompt_ids,
        "completion_ids": COMPLETIONS,
        "logprobs": None,
        "env_mask": own,
    }

    def own_log_probs(model: Any) -> list[Tensor]:
        triples = zip(PROMPTS, COMPLETIONS, own, strict=True)
        return [(token_log_probs(model, prompt, ids) * torch.tensor(mask)).sum() for prompt, ids, mask in triples]

    rewards = reward([text_of(completion) for completion in COMPLETIONS])
    log_pi, log_prior = own_log_probs(trainer.model), own_log_probs(trainer.ref_model)
    worth = [(log_prior[i] + rewards[i] / BETA - log_pi[i]).item() for i in range(8)]
    groups = [worth[:GROUP_SIZE], worth[GROUP_SIZE:]]
    factors = [mean_of_others(group, i) - group[i] for group in groups for i in range(GROUP_SIZE)]
    trainer.model.zero_grad()
    sum(factor * each / 8 for factor, each in zip(factors, log_pi, strict=True)).backward()
    expected = {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}

    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS])
    assert batch["log_proposal"].tolist() == pytest.approx([each.item() for each in log_pi], abs=1e-5)
    _, gradient = gradient_of(trainer, batch)
    assert_same_gradient(gradient, expected)


def test_kl_rl_advantages_are_rloo_s_over_beta(make: Make, folder: str, tmp_path: Path) -> None:
    trainer = make("kl_rl:reverse_kl")
    rloo = RLOOTrainer(
        model=folder,
        reward_funcs=[reward],
        args=RLOOConfig(
            output_dir=str(tmp_path),
            beta=BETA,
            num_generations=GROUP_SIZE,
            per_device_train_batch_size=len(PROMPTS),
            max_completion_length=TASK.max_completion_length,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_dropout=True,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=TASK.dataset(8),
    )
    rloo.model.load_state_dict(trainer.model.state_dict())
    rloo.model.train()
    expected = generate(rloo)["advantages"] / BETA
    assert expected.abs().max() > 1
    torch.testing.assert_close(generate(trainer)["advantages"], expected, atol=1e-5, rtol=1e-4)


# --- completions without a reward, and groups without evidence -------------------------------------------------------


def some_unscored(missing: dict[int, float | None]) -> tuple[Reward, list[float | None]]:
    """A reward function that returns these values for these rows of COMPLETIONS, and the rewards as they count."""
    rewards = reward([text_of(completion) for completion in COMPLETIONS])
    returned = [missing.get(i, each) for i, each in enumerate(rewards)]
    return lambda completions, **kwargs: returned, [None if i in missing else each for i, each in enumerate(rewards)]


@every_trainer
def test_completions_without_a_reward(case: str, make: Make) -> None:
    """One of the first group (an infinite reward is none) and all of the second: they add nothing, to anything."""
    reward_func, rewards = some_unscored({2: math.inf, 4: None, 5: math.nan, 6: None, 7: -math.inf})
    trainer = make(case, reward_func=reward_func)
    expected = by_hand(case, trainer, log_probs(trainer.model), rewards=rewards)
    batch = generate(trainer)
    assert batch["usable"].tolist() == [each is not None for each in rewards]
    loss, gradient = gradient_of(trainer, batch)
    assert loss == pytest.approx(sum(expected.values) / 8, rel=1e-3)  # still the mean over all rows
    assert_same_gradient(gradient, assemble(trainer, scaled(case, expected.coefficients), list(range(8))))

    loss, gradient = gradient_of(trainer, rows_of(batch, [2, 4, 5, 6, 7]))
    assert loss == 0
    assert all((each == 0).all() for each in gradient.values())


@every_trainer
def test_a_batch_without_any_reward(case: str, make: Make) -> None:
    trainer = make(case, reward_func=some_unscored(dict.fromkeys(range(8)))[0])
    loss, gradient = gradient_of(trainer, generate(trainer))
    assert loss == 0
    assert all((each == 0).all() for each in gradient.values())


@every_trainer
def test_a_lone_scored_completion_gives_no_gradient(case: str, make: Make) -> None:
    """As in RLOO: there is nothing to compare it with, and a constant added to the reward must not matter."""
    trainer = make(case, reward_func=some_unscored(dict.fromkeys(range(1, 4)))[0])
    _, gradient = gradient_of(trainer, rows_of(generate(trainer), [0, 1, 2, 3]))
    assert all((each.abs() < 1e-6).all() for each in gradient.values())


@pytest.mark.parametrize(
    "case",
    [
        "f_dpg:jensen_shannon",
        "f_dpg:forward_kl",
        "dpg:forward_kl",
        "tb:forward_kl",
        "tb:jensen_shannon",
    ],
)
def test_a_group_without_evidence(case: str, make: Make) -> None:
    """No completion of the second group meets the constraint."""
    rewards = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    trainer = make(case, reward_func=lambda completions, **kwargs: rewards, target="constraint")
    batch = generate(trainer)
    _, gradient = gradient_of(trainer, rows_of(batch, [0, 1, 2, 3]))
    assert max(each.abs().max() for each in gradient.values()) > 1e-3
    loss, gradient = gradient_of(trainer, rows_of(batch, [4, 5, 6, 7]))
    assert loss == 0
    assert all((each == 0).all() for each in gradient.values())
    assert trainer._metrics["train"]["posterior/frac_no_evidence"] == [0.5]


@every_trainer
def test_one_success_at_a_low_temperature(case: str, make: Make) -> None:
    """A binary reward at beta = 0.01, 100 nats: one completion of the first group has it. Nothing overflows."""
    rewards = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    trainer = make(case, reward_func=lambda completions, **kwargs: rewards, beta=0.01)
    loss, gradient = gradient_of(trainer, generate(trainer))
    assert math.isfinite(loss)
    assert all(each.isfinite().all() for each in gradient.values())


# --- evidence and completions of earlier steps -----------------------------------------------------------------------


@every_trainer
def test_running_partition(case: str, make: Make) -> None:
    """The second visit to a prompt pools the weights of the first, made by another policy."""
    trainer = make(case, partition="running")
    first = log_probs(trainer.model)
    log_prior = log_probs(trainer.ref_model)
    rewards = reward([text_of(completion) for completion in COMPLETIONS])
    weights = [math.exp(log_prior[i] + rewards[i] / BETA - first[i]) for i in range(8)]
    trainer.model.eval()
    trainer.args.per_device_eval_batch_size = 8
    generate(trainer)  # evaluation leaves nothing behind
    trainer.model.train()
    generate(trainer)
    perturb(trainer, seed=1)
    second = log_probs(trainer.model)
    batch = generate(trainer)
    expected = ByHand([], [], [])
    for start in (0, GROUP_SIZE):
        past = (sum(weights[start : start + GROUP_SIZE]), GROUP_SIZE)
        pooled = by_hand(case, trainer, second, past=past)
        for column, found in zip(expected, pooled, strict=True):
            column.extend(found[start : start + GROUP_SIZE])
    if not case.startswith("kl_rl"):
        assert batch["log_z"].exp().tolist() == pytest.approx(expected.z, rel=1e-4)
    loss, gradient = gradient_of(trainer, batch)
    assert loss == pytest.approx(sum(expected.values) / 8, rel=1e-4)
    assert_same_gradient(gradient, assemble(trainer, scaled(case, expected.coefficients), list(range(8))))


@pytest.mark.parametrize("case", ["dpg:forward_kl", "tb:reverse_kl", "f_dpg:jensen_shannon", "f_dpg:forward_kl"])
def test_replay(case: str, make: Make) -> None:
    """Replayed completions keep the q and the evidence of their own time; f-DPG's are compared with the posterior."""
    trainer = make(case, gradient_accumulation_steps=1, replay_buffer_size=8)
    then = log_probs(trainer.model)
    old_evidence = by_hand(case, trainer, then, fit=False).z
    batch = generate(trainer)
    assert len(batch["usable"]) == 8
    perturb(trainer, seed=1)
    now = log_probs(trainer.model)
    batch = generate(trainer)
    assert len(batch["usable"]) == 16
    found = by_hand(case, trainer, now, fit=False)

    prompt_of = {(A,): "a", (B, A): "b a"}
    rows = []  # of COMPLETIONS, by what the batch holds
    for prompt_ids, prompt_mask, ids, mask in zip(
        batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], strict=True
    ):
        pair = (prompt_of[tuple(prompt_ids[prompt_mask.bool()].tolist())], ids[mask.bool()].tolist())
        rows.append(list(zip(PROMPTS, COMPLETIONS, strict=True)).index(pair))
    assert rows[:8] == list(range(8))
    assert sorted(rows[8:]) == list(range(8))
    log_prior = log_probs(trainer.ref_model)
    rewards = reward([text_of(completion) for completion in COMPLETIONS])
    factors = found.coefficients + [
        coefficients(case, [Sample(now[i], then[i], then[i], log_prior[i] + rewards[i] / BETA)], [old_evidence[i]])[0]
        for i in rows[8:]
    ]
    _, gradient = gradient_of(trainer, batch)
    prompts, completions = [PROMPTS[i] for i in rows], [COMPLETIONS[i] for i in rows]
    factors = scaled(case, factors)
    expected = assemble(trainer, factors, list(range(16)), completions=completions, prompts=prompts)
    assert_same_gradient(gradient, expected)


# --- summed over all groups, the gradient is exact -------------------------------------------------------------------

PROMPT = "b a"
EVERY_COMPLETION = [[EOS], [A, EOS], [B, EOS], [A, A], [A, B], [B, A], [B, B]]
PAIRS = list(itertools.product(range(7), repeat=2))


def contains_a(completions: list[str], **kwargs: Any) -> list[float]:
    return [float("a" in text) for text in completions]


def exact_divergence(name: str, log_policy: Tensor, log_posterior: Tensor) -> Tensor:
    """`D_f(pi||p)` over all completions, from the definition `sum_y p f(pi/p)` of the KLs and of their mixture."""

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        support = log_a > -math.inf
        return (log_a[support].exp() * (log_a[support] - log_b[support])).sum()

    if name == "forward_kl":
        return kl(log_posterior, log_policy)
    if name == "reverse_kl":
        return kl(log_policy, log_posterior)
    assert name == "jensen_shannon"
    mixture = torch.logaddexp(log_policy, log_posterior) - math.log(2)
    return (kl(log_policy, mixture) + kl(log_posterior, mixture)) / 2


@pytest.mark.parametrize(
    ("case", "hard", "off_policy"),
    [
        ("kl_rl:reverse_kl", False, False),
        ("kl_rl:reverse_kl", False, True),
        ("f_dpg:jensen_shannon", False, False),
        ("f_dpg:jensen_shannon", False, True),
        ("f_dpg:jensen_shannon", True, False),
        ("f_dpg:jensen_shannon", True, True),
        ("f_dpg:reverse_kl", False, False),
        ("dpg:forward_kl", False, True),
        ("dpg:forward_kl", True, False),
        ("dpg:forward_kl", True, True),
        ("tb:jensen_shannon", False, False),  # trajectory balance: on-policy only
        ("tb:jensen_shannon", True, False),
        ("tb:reverse_kl", False, False),
    ],
)
def test_expected_gradient_is_that_of_the_divergence(
    case: str, hard: bool, off_policy: bool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 49 pairs of completions of a prompt, each with its probability, and the exact log Z (KL-RL needs none)."""
    trainer = make(
        case,
        reward_func=contains_a if hard else reward,
        target="constraint" if hard else None,
        num_generations=2,
        per_device_train_batch_size=2 * len(PAIRS),
        num_iterations=2 if off_policy else 1,
    )
    texts = [text_of(completion) for completion in EVERY_COMPLETION]
    phi = torch.tensor(contains_a(texts)).log() if hard else torch.tensor(reward(texts)) / BETA
    prompts = [PROMPT] * 7
    log_target = torch.tensor(log_probs(trainer.ref_model, 1.0, EVERY_COMPLETION, prompts)) + phi.double()
    log_z = log_target.logsumexp(0)
    log_q = torch.tensor(log_probs(trainer.model, 1.0, EVERY_COMPLETION, prompts))
    assert log_q.exp().sum().item() == pytest.approx(1, abs=1e-6)
    if not case.startswith("kl_rl"):
        monkeypatch.setattr(
            trainer.estimator, "choose_log_z", lambda group, estimate: torch.full_like(estimate, log_z.item())
        )
    completions = [EVERY_COMPLETION[i] for pair in PAIRS for i in pair]
    batch = generate(trainer, completions, [PROMPT] * len(completions))
    if off_policy:
        perturb(trainer, seed=1)

    trainer.model.zero_grad()
    for number, (first, second) in enumerate(PAIRS):
        probability = (log_q[first] + log_q[second]).exp().item()
        loss = trainer._compute_loss(trainer.model, rows_of(batch, [2 * number, 2 * number + 1]))
        (probability * loss).backward()
    expected_gradient = {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}

    trainer.model.zero_grad()
    log_policy = torch.stack([log_prob(trainer.model, PROMPT, completion) for completion in EVERY_COMPLETION])
    divergence = case.partition(":")[2]
    distance = exact_divergence(divergence, log_policy, log_target - log_z)
    (distance / CURVATURE[divergence]).backward()
    exact = {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}
    assert_same_gradient(expected_gradient, exact)
