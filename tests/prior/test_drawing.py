"""Samples of the prior without a trainer: exact, shared through a folder, and refused if they are of another model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tests.helpers.enumerated import log_probs_of
from trl_bayes.benchmarks.tiny import letter_count_task
from trl_bayes.language_models.completions import Completions
from trl_bayes.language_models.samples import sample, score
from trl_bayes.language_models.scoring import log_probs
from trl_bayes.language_models.settings import SamplingSettings
from trl_bayes.prior import PriorSamplesError
from trl_bayes.prior import drawing as drawing_module
from trl_bayes.prior.reference import draw_prior
from trl_bayes.prior.trained_on import draws_trained_on, mark_trained_on


TASK = letter_count_task()


def count_a(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(text.count("a")) for text in completions]


def as_wanted(completions: list[str], wanted: list[str], **kwargs: Any) -> list[float | None]:
    pairs = zip(completions, wanted, strict=True)
    return [None if letter == "z" else text.count(letter) / 10 for text, letter in pairs]


class Loaded(NamedTuple):
    path: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    log_probs: dict[str, dict[tuple[int, ...], float]]  # prompt -> completion -> log pi_0


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path = TASK.build_model(tmp_path_factory.mktemp("prior"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    return Loaded(path, model, tokenizer, log_probs_of(TASK, model, tokenizer))


class Prior(NamedTuple):
    """A prior as a language model, and how it is sampled."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: SamplingSettings


def prior(loaded: Loaded, **changes: Any) -> Prior:
    arguments = {"max_new_tokens": TASK.max_completion_length, "batch_size": 16} | changes
    return Prior(arguments.pop("model", loaded.model), loaded.tokenizer, SamplingSettings(**arguments))


def sample_prior(
    prior: Prior, prompts: Any, reward_funcs: Any, number: int, columns: Any = None, folder: Path | None = None
) -> Completions:
    model, tokenizer, settings = prior
    return draw_prior(model, tokenizer, prompts, reward_funcs, number, settings, columns, folder=folder).completions


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many completions each call has generated."""
    calls: list[int] = []
    generate = drawing_module.generate

    def counted(model: Any, rows: Any, settings: Any) -> Any:
        calls.append(len(rows))
        return generate(model, rows, settings)

    monkeypatch.setattr(drawing_module, "generate", counted)
    return calls


def test_without_a_folder_it_is_plain_sampling(loaded: Loaded) -> None:
    ours = sample_prior(prior(loaded, seed=3), TASK.prompts, [count_a], 20)
    settings = SamplingSettings(TASK.max_completion_length, batch_size=16, seed=3)
    plain = sample(loaded.model, loaded.tokenizer, TASK.prompts, 20, settings)
    assert ours.completion_ids == plain.completion_ids
    assert torch.equal(ours.log_prior, log_probs(loaded.model, plain, settings))
    assert torch.equal(ours.rewards, score([count_a], plain, loaded.tokenizer))


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_what_is_kept_is_exact(loaded: Loaded, tmp_path: Path, drawn: list[int], temperature: float) -> None:
    """Probabilities by enumeration, rewards by the texts; found again it is the same, and nothing is generated."""
    model = prior(loaded, temperature=temperature)
    first = sample_prior(model, TASK.prompts, [count_a], 20, folder=tmp_path)
    assert drawn == [16] * 5
    assert first.prompt_index.tolist() == [i for i in range(4) for _ in range(20)]
    assert first.prompts == list(TASK.prompts)
    exact = TASK.log_probs(loaded.model, loaded.tokenizer, temperature=temperature)
    place = {ids: i for i, ids in enumerate(loaded.log_probs[TASK.prompts[0]])}
    at = torch.tensor([place[tuple(ids)] for ids in first.completion_ids])
    torch.testing.assert_close(first.log_prior, exact[first.prompt_index, at].double(), rtol=0, atol=1e-4)
    assert first.rewards.flatten().tolist() == count_a(first.texts)
    stops = [ids[-1] == loaded.tokenizer.eos_token_id for ids in first.completion_ids]
    assert first.ended.tolist() == stops and 0 < sum(stops) < 80

    again = sample_prior(model, TASK.prompts, [count_a], 20, folder=tmp_path)
    assert len(drawn) == 5
    assert again.completion_ids == first.completion_ids
    assert again.texts == first.texts
    torch.testing.assert_close(again.log_prior, first.log_prior, rtol=0, atol=1e-5)
    assert torch.equal(again.rewards, first.rewards)


def test_kept_samples_follow_the_prior(loaded: Loaded, tmp_path: Path) -> None:
    """Mean `log pi_0` is minus the entropy; 4 standard errors of 2,000 samples."""
    kept = sample_prior(prior(loaded, batch_size=200), TASK.prompts, [], 500, folder=tmp_path)
    for prompt, values in zip(TASK.prompts, kept.log_prior.view(4, 500), strict=True):
        exact = torch.tensor(list(loaded.log_probs[prompt].values()), dtype=torch.float64)
        mean = (exact.exp() * exact).sum()
        deviation = (exact.exp() * (exact - mean).square()).sum().sqrt()
        assert abs(values.mean() - mean) <= 4 * deviation / 500**0.5


def test_more_samples_and_prompts_are_added(loaded: Loaded, tmp_path: Path, drawn: list[int]) -> None:
    few = sample_prior(prior(loaded), TASK.prompts[:2], [count_a], 16, folder=tmp_path)
    more = sample_prior(prior(loaded), TASK.prompts, [count_a], 24, folder=tmp_path)
    assert sum(drawn) == 4 * 24
    ours = [ids for i, ids in enumerate(more.completion_ids[:48]) if i % 24 < 16]
    assert ours == few.completion_ids
    with_twice = sample_prior(prior(loaded), [TASK.prompts[0]] * 2, [count_a], 12, folder=tmp_path)
    assert sum(drawn) == 4 * 24  # the two take twelve each
    assert with_twice.completion_ids == more.completion_ids[:24]


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.5}, {"max_new_tokens": 3}, {"seed": 1}], ids=lambda each: next(iter(each))
)
def test_samples_of_something_else(loaded: Loaded, tmp_path: Path, drawn: list[int], changes: dict[str, Any]) -> None:
    for settings in ({}, changes, {}, changes):
        sample_prior(prior(loaded, **settings), TASK.prompts, [count_a], 8, folder=tmp_path)
    assert sum(drawn) == 2 * 4 * 8


def test_other_rewards_and_columns_are_scored(loaded: Loaded, tmp_path: Path, drawn: list[int]) -> None:
    """For the same completions; with the columns of each row; missing and rounded as in training."""
    sample_prior(prior(loaded), TASK.prompts, [count_a], 8, folder=tmp_path)
    for letters in ("abcz", "bbbb"):
        columns = {"wanted": list(letters)}
        both = sample_prior(prior(loaded), TASK.prompts, [as_wanted, count_a], 8, columns=columns, folder=tmp_path)
        for i, text in enumerate(both.texts):
            letter = letters[i // 8]
            expected = torch.tensor(float("nan") if letter == "z" else text.count(letter) / 10).double()
            torch.testing.assert_close(both.rewards[i, 0], expected, rtol=0, atol=0, equal_nan=True)
        assert both.rewards[:, 1].tolist() == count_a(both.texts)
    assert sum(drawn) == 4 * 8


def test_conversations(tiny_models: Any, tmp_path: Path) -> None:
    """Prompts of messages: the reward is given messages, when they are drawn and when they are scored again."""
    path = tiny_models.policy
    seen: list[Any] = []

    def looks(number: float) -> Callable[..., list[float]]:
        def reward(completions: list[Any], **kwargs: Any) -> list[float]:
            seen.extend(completions)
            return [number * len(completion[0]["content"]) for completion in completions]

        return reward

    model = AutoModelForCausalLM.from_pretrained(path)
    chat = Prior(model, AutoTokenizer.from_pretrained(path), SamplingSettings(6, batch_size=8))
    prompts: list[Any] = [[{"role": "user", "content": text}] for text in ("a", "b c")]
    first = sample_prior(chat, prompts, [looks(1.0)], 8, folder=tmp_path)
    second = sample_prior(chat, prompts, [looks(2.0)], 8, folder=tmp_path)
    assert torch.equal(second.rewards, 2 * first.rewards)
    assert seen[:16] == seen[16:] == [[{"role": "assistant", "content": text}] for text in first.texts]


# -------------------------------------------------------------------------------------------------------------------
# Another model


def test_the_same_weights_elsewhere_and_others_in_the_same_place(
    loaded: Loaded, tmp_path: Path, drawn: list[int]
) -> None:
    path = shutil.copytree(loaded.path, tmp_path / "copy").as_posix()
    kept = tmp_path / "kept"
    sample_prior(prior(loaded), TASK.prompts, [], 8, folder=kept)
    sample_prior(prior(loaded, model=AutoModelForCausalLM.from_pretrained(path)), TASK.prompts, [], 8, folder=kept)
    assert sum(drawn) == 4 * 8
    changed = AutoModelForCausalLM.from_pretrained(path)
    changed.lm_head.weight.data[0, 0] += 0.1
    changed.save_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    sample_prior(prior(loaded, model=model), TASK.prompts, [], 8, folder=kept)
    assert sum(drawn) == 2 * 4 * 8


def test_a_model_that_was_changed_since_it_was_loaded_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    """Its folder says that it is the prior, and its probabilities that it is not; rounding is no difference."""
    sample_prior(prior(loaded), TASK.prompts, [count_a], 30, folder=tmp_path)
    rounded = AutoModelForCausalLM.from_pretrained(loaded.path, dtype=torch.bfloat16)
    found = sample_prior(prior(loaded, model=rounded), TASK.prompts, [count_a], 30, folder=tmp_path)
    exact = [loaded.log_probs[TASK.prompts[i // 30]][tuple(ids)] for i, ids in enumerate(found.completion_ids)]
    error = (found.log_prior - torch.tensor(exact, dtype=torch.float64)).abs()
    assert 1e-4 < error.mean() < 0.05  # in its own precision, and not in that of whoever drew them
    changed = AutoModelForCausalLM.from_pretrained(loaded.path)
    changed.lm_head.weight.data[0] += 0.3
    for number in (30, 600):  # that many more are drawn by this model itself changes nothing
        with pytest.raises(PriorSamplesError, match="more likely to the model that drew them than to this"):
            sample_prior(prior(loaded, model=changed), TASK.prompts, [count_a], number, folder=tmp_path)


def test_a_model_in_memory_only(loaded: Loaded, tmp_path: Path, drawn: list[int]) -> None:
    """Known by its parameters."""
    for change in (0.0, 0.0, 0.1):
        model = AutoModelForCausalLM.from_pretrained(loaded.path)
        model.lm_head.weight.data[0, 0] += change
        model.config._name_or_path = ""
        sample_prior(prior(loaded, model=model), TASK.prompts, [], 8, folder=tmp_path)
    assert sum(drawn) == 2 * 4 * 8


def test_others_are_drawn_where_a_policy_was_trained_on_them(loaded: Loaded, tmp_path: Path) -> None:
    """Which the policy has learned, so that they would say it is nearer to the posterior than it is."""

    def draw(folder: Path, **settings: Any) -> Completions:
        model, tokenizer, own = prior(loaded)
        return draw_prior(model, tokenizer, TASK.prompts, [count_a], 20, own, folder=folder, **settings).completions

    first = draw(tmp_path / "kept")
    assert draw(tmp_path / "kept", trained_on=()).completion_ids == first.completion_ids
    (kept,) = (tmp_path / "kept").iterdir()
    mark_trained_on(tmp_path / "policy", kept.name, "DPGTrainer")
    assert (
        draws_trained_on(tmp_path / "policy") == draws_trained_on(tmp_path / "policy" / "checkpoint-2") == {kept.name}
    )
    others = draw(tmp_path / "kept", trained_on=draws_trained_on(tmp_path / "policy"))
    assert others.completion_ids != first.completion_ids
    assert draw(tmp_path / "kept", trained_on={kept.name}).texts == others.texts
    # Another training may have the very same completions in a folder of its own
    assert draw(tmp_path / "elsewhere").completion_ids == first.completion_ids
    assert draw(tmp_path / "elsewhere", trained_on={kept.name}).completion_ids == others.completion_ids
    mark_trained_on(kept, kept.name, "DPGTrainer")
    assert draw(tmp_path / "kept", trained_on=()).completion_ids == others.completion_ids
    assert draw(tmp_path / "kept").completion_ids == first.completion_ids  # nobody is measured
