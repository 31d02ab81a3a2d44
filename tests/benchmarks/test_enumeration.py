"""The ground truth itself: enumeration, scoring, Bayes' rule and the distances, against independent computations."""

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.llama import SIZES
from trl_bayes.benchmarks.enumeration import (
    Completions,
    PolicyFit,
    compare,
    completion_log_probs,
    enumerate_completions,
    exact_posterior,
    mean_fit,
)


LETTERS, EOS = [3, 0, 5], 4


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
    # With dropout: a scorer that forgets eval mode is found out
    config = LlamaConfig(**{**SIZES, **special, "vocab_size": 6, "initializer_range": 0.5, "attention_dropout": 0.5})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def log(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


# --- enumeration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_letters", "max_length", "count"), [(6, 4, 1_555), (7, 5, 19_608), (1, 1, 2)])
def test_number_of_completions(num_letters: int, max_length: int, count: int) -> None:
    completions = enumerate_completions(range(num_letters), num_letters, max_length)
    assert completions.ids.shape == completions.mask.shape == (count, max_length)
    assert len(torch.unique(completions.ids, dim=0)) == count
    assert completions.ids.dtype == torch.int64
    assert completions.mask.dtype == torch.bool


def test_enumeration_lists_what_can_be_sampled() -> None:
    completions = enumerate_completions(LETTERS, EOS, 3)
    sampled = [tuple(ids[mask].tolist()) for ids, mask in zip(*completions, strict=True)]
    ended = [(*letters, EOS) for length in range(3) for letters in product(LETTERS, repeat=length)]
    cut = list(product(LETTERS, repeat=3))
    assert sampled == ended + cut
    assert (completions.ids[~completions.mask] == EOS).all()


@pytest.mark.parametrize(
    ("letters", "max_length", "message"),
    [([], 3, "distinct"), ([1, 1], 3, "distinct"), ([1, EOS], 3, "without EOS"), ([1], 0, "at least 1")],
)
def test_enumeration_refuses(letters: list[int], max_length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        enumerate_completions(letters, EOS, max_length)


# --- scoring -----------------------------------------------------------------------------------------------------


def naive_log_prob(model: nn.Module, prompt: list[int], completion: list[int], temperature: float) -> float:
    """One token at a time, one forward pass each."""
    total = 0.0
    for position, token in enumerate(completion):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion[:position]])).logits[0, -1]
        total += torch.log_softmax(logits.double() / temperature, dim=-1)[token].item()
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("batch_size", "max_length"), [(7, 4), (1024, 4), (1024, 1)])
def test_log_probs_equal_a_token_by_token_loop(
    model: LlamaForCausalLM, temperature: float, batch_size: int, max_length: int
) -> None:
    completions = enumerate_completions(LETTERS, EOS, max_length)
    prompt = [5, 1]
    log_probs = completion_log_probs(model, prompt, completions, temperature, batch_size)
    assert log_probs.dtype == torch.float64
    rows = torch.randperm(len(log_probs), generator=torch.Generator().manual_seed(0))[:40].tolist()
    model.eval()
    for row in rows:
        completion = completions.ids[row][completions.mask[row]].tolist()
        assert log_probs[row].item() == pytest.approx(naive_log_prob(model, prompt, completion, temperature), abs=1e-5)


def test_log_probs_equal_a_left_padded_batch_as_trl_scores_it(model: LlamaForCausalLM) -> None:
    completions = enumerate_completions(LETTERS, EOS, 3)
    prompt = torch.tensor([EOS, EOS, 5, 1])
    num_completions = len(completions.ids)
    inputs = torch.cat([prompt.expand(num_completions, -1), completions.ids], dim=1)
    prompt_mask = torch.tensor([0, 0, 1, 1]).expand(num_completions, -1)
    attention_mask = torch.cat([prompt_mask, completions.mask.long()], dim=1)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=inputs, attention_mask=attention_mask).logits[:, 3:-1] / 0.7
    per_token = torch.log_softmax(logits, dim=-1).gather(-1, completions.ids[..., None]).squeeze(-1)
    expected = (per_token * completions.mask).sum(dim=1).double()
    actual = completion_log_probs(model, prompt[2:], completions, temperature=0.7)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_log_probs_of_any_list_of_completions(model: LlamaForCausalLM) -> None:
    """Not only of the enumeration: in any order, and with repeats."""
    everything = enumerate_completions(LETTERS, EOS, 3)
    rows = torch.tensor([20, 3, 3, 0, 39])
    some = Completions(everything.ids[rows], everything.mask[rows])
    expected = completion_log_probs(model, [0], everything)[rows]
    torch.testing.assert_close(completion_log_probs(model, [0], some), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_restores_each_module_s_mode(model: LlamaForCausalLM, training: bool) -> None:
    model.train(training)
    model.lm_head.train(not training)
    before = [module.training for module in model.modules()]
    completions = enumerate_completions(LETTERS, EOS, 2)
    log_probs = completion_log_probs(model, [0], completions)
    assert [module.training for module in model.modules()] == before
    assert not log_probs.requires_grad
    torch.testing.assert_close(log_probs, completion_log_probs(model, [0], completions), atol=0, rtol=0)
    model.eval()


def test_a_token_of_probability_zero_after_the_eos_does_not_count() -> None:
    class EosOnce(nn.Module):
        """Uniform over 4 letters and EOS (token 4), but never EOS twice."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, input_ids: Tensor) -> SimpleNamespace:
            logits = torch.zeros(*input_ids.shape, 5)
            logits[..., EOS] = torch.where(input_ids == EOS, -math.inf, 0.0)
            return SimpleNamespace(logits=logits)

    log_probs = completion_log_probs(EosOnce(), [0], enumerate_completions(range(4), EOS, 3))
    assert log_probs.exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize(("prompt", "temperature", "message"), [([], 1.0, "prompt"), ([0], 0.0, "temperature")])
def test_scoring_refuses(model: LlamaForCausalLM, prompt: list[int], temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        completion_log_probs(model, prompt, enumerate_completions(LETTERS, EOS, 2), temperature)


# --- posterior ---------------------------------------------------------------------------------------------------


def test_posterior_of_three_outcomes_by_hand() -> None:
    # prior 1/2 1/4 1/4, evidence 1 4 0: the products are 1/2 1 0, Z = 3/2, the posterior 1/3 2/3 0
    posterior = exact_posterior(log(1 / 2, 1 / 4, 1 / 4).float(), log(1, 4, 0).float())
    assert posterior.log_z == pytest.approx(math.log(3 / 2), abs=1e-7)
    torch.testing.assert_close(posterior.log_posterior, log(1 / 3, 2 / 3, 0), atol=1e-7, rtol=0)
    assert all(tensor.dtype == torch.float64 for tensor in posterior[:3])


def test_a_completion_that_the_prior_never_gives_is_not_in_the_posterior() -> None:
    posterior = exact_posterior(log(1 / 2, 1 / 2, 0), torch.tensor([0.0, 0.0, 50.0]))
    torch.testing.assert_close(posterior.log_posterior, log(1 / 2, 1 / 2, 0))


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-500, 500)), min_size=1, max_size=20), st.floats(-1e4, 1e4))
@settings(deadline=None)
def test_evidence_matters_up_to_a_constant(outcomes: list[tuple[float, float]], shift: float) -> None:
    logits, phi = torch.tensor(outcomes, dtype=torch.float64).T
    log_prior = torch.log_softmax(logits, dim=0)
    posterior, shifted = exact_posterior(log_prior, phi), exact_posterior(log_prior, phi + shift)
    assert posterior.log_posterior.exp().sum().item() == pytest.approx(1)
    assert shifted.log_z == pytest.approx(posterior.log_z + shift, abs=1e-8)
    torch.testing.assert_close(shifted.log_posterior, posterior.log_posterior, atol=1e-8, rtol=0)
    assert compare(posterior, posterior.log_posterior)[:3] == pytest.approx((0, 0, 0), abs=1e-8)
    assert min(compare(posterior, log_prior)) > -1e-8


@pytest.mark.parametrize(
    ("log_prior", "log_potential", "message"),
    [
        (log(0.5, 0.5), torch.tensor([0.0, math.inf]), r"below \+inf"),
        (log(0.5, 0.5), torch.tensor([0.0, math.nan]), "not NaN"),
        (log(0.5, 0.5), torch.tensor([-math.inf, -math.inf]), "no completion with evidence"),
        (log(1.0, 0.0), torch.tensor([-math.inf, 0.0]), "no completion with evidence"),
        (log(0.5, 0.5), torch.zeros(3), "shape"),
        (log(0.5, 0.5)[None], torch.zeros(1, 2), "shape"),
        (log(0.5, 0.4), torch.zeros(2), "prior's probabilities over all completions sum to 0.9"),
        (log(0.5, 0.5002), torch.zeros(2), "prior"),
        (log(0.5, math.nan), torch.zeros(2), "prior"),
    ],
)
def test_posterior_refuses(log_prior: Tensor, log_potential: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact_posterior(log_prior, log_potential)


# --- distances ---------------------------------------------------------------------------------------------------

LOG2, LOG3 = math.log(2), math.log(3)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (
            (1 / 4, 3 / 4, 0),  # posterior 1/3 2/3 0, prior 1/2 1/4 1/4
            PolicyFit(
                forward_kl=math.log(4 / 3) / 3 + 2 * math.log(8 / 9) / 3,
                reverse_kl=math.log(3 / 4) / 4 + 3 * math.log(9 / 8) / 4,
                total_variation=1 / 12,
                kl_prior=3 * LOG3 / 4 - LOG2 / 4,
                entropy=2 * LOG2 - 3 * LOG3 / 4,
                mass_outside=0,
            ),
        ),
        (
            (1 / 4, 1 / 4, 1 / 2),
            PolicyFit(
                forward_kl=math.log(4 / 3) / 3 + 2 * math.log(8 / 3) / 3,
                reverse_kl=math.inf,
                total_variation=1 / 2,
                kl_prior=LOG2 / 4,
                entropy=3 * LOG2 / 2,
                mass_outside=1 / 2,
            ),
        ),
        (
            (1, 0, 0),
            PolicyFit(
                forward_kl=math.inf,
                reverse_kl=LOG3,
                total_variation=2 / 3,
                kl_prior=LOG2,
                entropy=0,
                mass_outside=0,
            ),
        ),
    ],
)
def test_distances_by_hand(policy: tuple[float, ...], expected: PolicyFit) -> None:
    posterior = exact_posterior(log(1 / 2, 1 / 4, 1 / 4), log(1, 4, 0))
    assert compare(posterior, log(*policy)) == pytest.approx(expected, abs=1e-12)


def test_a_probability_that_underflows_still_counts_as_mass_outside_the_support() -> None:
    posterior = exact_posterior(log(0.5, 0.5), log(1, 0))
    fit = compare(posterior, torch.tensor([0.0, -2000.0]))
    assert fit.reverse_kl == math.inf
    assert fit.forward_kl == pytest.approx(0)
    assert fit.entropy == 0


@pytest.mark.parametrize(
    ("log_policy", "message"), [(log(0.2, 0.3, 0.5), "shape"), (log(0.5, 0.4), "policy's probabilities")]
)
def test_compare_refuses(log_policy: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(exact_posterior(log(0.5, 0.5), torch.zeros(2)), log_policy)


def test_mean_fit_averages_each_field() -> None:
    first, second = PolicyFit(1, 2, 3, 4, 5, 6), PolicyFit(3, math.inf, 5, 6, 7, 8)
    assert mean_fit([first, second]) == PolicyFit(2, math.inf, 4, 5, 6, 7)
    with pytest.raises(ValueError, match="no fits"):
        mean_fit([])
