"""The tiny tasks: the files load offline, the prior is what is sampled, and each task's difficulty is as stated."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from tests.helpers.chi_square import chi_square_p_value
from trl_bayes.benchmarks.enumeration import compare
from trl_bayes.benchmarks.tiny import (
    EnumerableTask,
    balance_task,
    bigram_task,
    build_tiny_model,
    hard_constraint_task,
    letter_count_task,
)


class Case(NamedTuple):
    task: EnumerableTask
    log_potential: Callable[[Tensor], Tensor]
    num_completions: int
    partition: float  # mean over the prompts of Z
    prior_forward_kl: float  # mean over the prompts of KL(p||pi_0)


CASES = {
    "letter_count": Case(letter_count_task(), lambda rewards: rewards / 0.7, 1_555, 3.116, 0.940),
    "hard_constraint": Case(hard_constraint_task(), torch.log, 19_608, 0.0837, 2.481),
    "balance": Case(balance_task(), lambda rewards: rewards / 0.6, 1_093, 0.7558, 0.4328),
    "bigram": Case(bigram_task(), lambda rewards: rewards / 0.5, 1_365, 0.593, 0.476),
}


class Loaded(NamedTuple):
    case: Case
    model: Any  # a PreTrainedModel, whose `generate` the type checker does not see
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read at import, which may be over


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: case.task.build_model(tmp_path_factory.mktemp(name)) for name, case in CASES.items()}


@pytest.fixture(params=CASES)
def loaded(request: pytest.FixtureRequest, folders: dict[str, str]) -> Loaded:
    folder = folders[request.param]
    return Loaded(
        CASES[request.param],
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )


# --- model and tokenizer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("auto_class", [AutoTokenizer, AutoProcessor])
def test_tokenizer(folders: dict[str, str], auto_class: type) -> None:
    processing_class = auto_class.from_pretrained(folders["letter_count"])  # type: ignore[attr-defined]
    eos = processing_class.eos_token_id
    assert processing_class.pad_token_id == eos == 6
    assert len(processing_class) == 7
    assert processing_class.padding_side == "left"
    batch = processing_class(text=["a", "b c"], padding=True)
    assert batch["input_ids"] == [[eos, 0], [1, 2]]
    assert batch["attention_mask"] == [[0, 1], [1, 1]]
    assert processing_class.batch_decode([[0, 1, 2, eos], [5, eos]], skip_special_tokens=True) == ["a b c", "f"]
    with pytest.raises(Exception, match="Missing"):
        processing_class(text=["z"])


def test_model_has_the_tokenizer_s_vocabulary(loaded: Loaded) -> None:
    model, tokenizer = loaded.model, loaded.tokenizer
    assert model.config.vocab_size == len(tokenizer) == len(loaded.case.task.letters) + 1
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 23_000 < model.num_parameters() < 27_000
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id


def test_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    def weights(name: str, global_seed: int, seed: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            state = torch.get_rng_state()
            folder = build_tiny_model(tmp_path / name, seed=seed)
            assert torch.equal(state, torch.get_rng_state()), "the caller's random state was moved"
        return AutoModelForCausalLM.from_pretrained(folder).state_dict()

    first, again, other = weights("first", 0, seed=3), weights("again", 1, seed=3), weights("other", 0, seed=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_logit_std_sets_how_uniform_the_prior_is(tmp_path: Path) -> None:
    task = letter_count_task()
    uniform = build_tiny_model(tmp_path, logit_std=0.0)
    tokenizer = AutoTokenizer.from_pretrained(uniform)
    log_probs = task.log_probs(AutoModelForCausalLM.from_pretrained(uniform), tokenizer)
    lengths = task.completions(tokenizer).mask.sum(dim=1)
    torch.testing.assert_close(log_probs, (-lengths * torch.log(torch.tensor(7.0))).expand(4, -1).double())


@pytest.mark.parametrize("letters", ["", "aba", "a b"])
def test_letters_refused(tmp_path: Path, letters: str) -> None:
    with pytest.raises(ValueError, match="distinct characters"):
        build_tiny_model(tmp_path, letters=letters)


# --- tasks -------------------------------------------------------------------------------------------------------


def test_prior_sums_to_one_and_is_not_uniform(loaded: Loaded) -> None:
    task = loaded.case.task
    log_probs = task.log_probs(loaded.model, loaded.tokenizer)
    assert log_probs.shape == (len(task.prompts), loaded.case.num_completions)
    torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)
    completions = task.completions(loaded.tokenizer)
    first_token = torch.stack(  # (num_prompts, V): the distribution of the first token, by summing over completions
        [log_probs.exp()[:, completions.ids[:, 0] == token].sum(dim=1) for token in range(len(loaded.tokenizer))], 1
    )
    # In units of the logits' standard deviation: the hard task's prior is close to uniform on purpose
    spread = (first_token.max(dim=1).values / first_token.min(dim=1).values).log() / task.logit_std
    assert spread.mean() > 1.0  # after a single prompt it may be less, by chance
    between_prompts = (first_token[0] - first_token[1]).abs().max() / task.logit_std
    assert between_prompts > 0.05, "the prior ignores its prompt"


def test_figures(loaded: Loaded) -> None:
    """Z and the prior's distance from the posterior: what a trainer has to close. Fixed by the seed."""
    case = loaded.case
    log_priors = case.task.log_probs(loaded.model, loaded.tokenizer)
    posteriors = case.task.posteriors(loaded.tokenizer, log_priors, case.log_potential)
    partitions = torch.tensor([posterior.log_z for posterior in posteriors]).exp()
    assert partitions.mean().item() == pytest.approx(case.partition, rel=0.01)
    fit = case.task.evaluate(loaded.model, loaded.tokenizer, log_priors, case.log_potential)
    assert fit.forward_kl == pytest.approx(case.prior_forward_kl, rel=0.01)
    assert fit.kl_prior == pytest.approx(0, abs=1e-12)


def test_hard_constraint_is_rare(folders: dict[str, str]) -> None:
    task, folder = hard_constraint_task(), folders["hard_constraint"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prior = AutoModelForCausalLM.from_pretrained(folder)
    fit = task.evaluate(prior, tokenizer, prior, torch.log)
    event = 1 - fit.mass_outside  # the prior as the policy: its probability of the event, averaged over the prompts
    assert 0.06 < event < 0.10
    assert fit.reverse_kl == float("inf")
    assert fit.total_variation == pytest.approx(fit.mass_outside)


def test_evaluate_averages_over_prompts_at_the_temperature(loaded: Loaded) -> None:
    case, model, tokenizer = loaded.case, loaded.model, loaded.tokenizer
    log_policies = case.task.log_probs(model, tokenizer, temperature=0.7)
    log_priors = case.task.log_probs(model, tokenizer)
    posteriors = case.task.posteriors(tokenizer, log_priors, case.log_potential)
    fits = [compare(*pair) for pair in zip(posteriors, log_policies, strict=True)]
    fit = case.task.evaluate(model, tokenizer, log_priors, case.log_potential, temperature=0.7)
    assert fit.kl_prior == pytest.approx(sum(each.kl_prior for each in fits) / 4)
    assert fit.kl_prior > 0.01 * case.task.logit_std**2
    same = case.task.evaluate(model, tokenizer, model, case.log_potential, temperature=0.7)  # the prior at 0.7 too
    assert same.kl_prior == pytest.approx(0, abs=1e-12)


def test_rewards_are_those_of_the_decoded_texts(loaded: Loaded) -> None:
    task, tokenizer = loaded.case.task, loaded.tokenizer
    texts = tokenizer.batch_decode(task.completions(tokenizer).ids, skip_special_tokens=True)
    rewards = task.rewards(tokenizer)
    assert rewards.tolist() == task.reward_func(prompts=["a"] * len(texts), completions=texts, trainer_state=None)
    assert task.completions(tokenizer) is task.completions(tokenizer), "enumerated twice"
    rewards.zero_()
    assert task.rewards(tokenizer).abs().sum() > 0, "a caller's change reached the cache"


@pytest.mark.parametrize(
    ("task", "text", "reward"),
    [
        (letter_count_task(), "", 0.0),
        (letter_count_task(), "a b a c", 1.5),
        (hard_constraint_task(), "a b c d e", 0.0),
        (hard_constraint_task(), "b a a", 1.0),
        (bigram_task(), "", 0.0),
        (bigram_task(), "b a b", 1.0),
        (bigram_task(), "b a", 0.0),
        (bigram_task(), "a b a b", 2.0),
        (bigram_task(), "a b a b c", 1.0),  # five letters: cut
    ],
)
def test_rewards_by_hand(task: EnumerableTask, text: str, reward: float) -> None:
    assert task.reward([text]) == [reward]


def test_task_s_dataset_and_reward_function() -> None:
    task = letter_count_task()
    dataset = task.dataset(6)
    assert dataset.column_names == ["prompt"]
    assert dataset["prompt"][:] == [*task.prompts, *task.prompts[:2]]
    assert not inspect.iscoroutinefunction(task.reward_func)
    assert task.reward_func.__name__ == "reward_func"  # TRL logs a reward under its function's name


def test_a_tokenizer_of_other_letters_is_refused(folders: dict[str, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["letter_count"])
    with pytest.raises(ValueError, match="the tokenizer has the tokens"):
        dataclasses.replace(letter_count_task(), letters="abcdeg").completions(tokenizer)


def test_samples_follow_the_enumerated_prior(loaded: Loaded) -> None:
    """Chi-square of 20,000 samples of `generate`; false-alarm rate 1e-4, with the seed fixed."""
    task, model, tokenizer = loaded.case.task, loaded.model, loaded.tokenizer
    num_samples, prompt_index = 20_000, 2
    prompt = tokenizer(text=[task.prompts[prompt_index]], return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        samples = model.generate(
            **prompt,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=task.max_completion_length,
            num_return_sequences=num_samples,
        )[:, prompt["input_ids"].shape[1] :]
    probabilities = task.log_probs(model, tokenizer)[prompt_index].exp()
    base = len(tokenizer) ** torch.arange(task.max_completion_length)
    codes = (task.completions(tokenizer).ids * base).sum(dim=1)  # (N,) one number a completion
    order = codes.argsort()
    found = torch.searchsorted(codes[order], (samples * base).sum(dim=1))
    assert torch.equal(codes[order][found], (samples * base).sum(dim=1)), "a sample is not in the enumeration"
    counts = torch.bincount(order[found], minlength=len(codes)).double()

    expected = num_samples * probabilities
    assert (expected >= 5).sum() > 200
    assert chi_square_p_value(counts, expected) > 1e-4
