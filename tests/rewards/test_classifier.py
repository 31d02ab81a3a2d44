"""A classifier as evidence: each output against the model itself, batches, thresholds, odd texts, bad arguments."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed

from tests.helpers.llama import llama_config
from trl_bayes.rewards import build_reward, classified_as


LABELS = {0: "NEGATIVE", 1: "NEUTRAL", 2: "POSITIVE"}
TEXTS = ["a", "good", "very bad, and then a long text", "fine", "a b c"]


def save(folder: Path, tokenizer: PreTrainedTokenizerBase, labels: dict[int, str], **settings: Any) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        named = {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}
        special = {"eos_token_id": None, "pad_token_id": None}  # a classifier may name none
        sizes = {"initializer_range": 0.5, "max_position_embeddings": 64}
        config = llama_config(tokenizer, **{**named, **special, **sizes, **settings})
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: PreTrainedTokenizerBase) -> str:
    return save(tmp_path_factory.mktemp("classifier"), chat_tokenizer, LABELS)


def logits_one_by_one(folder: str, texts: list[str]) -> torch.Tensor:
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForSequenceClassification.from_pretrained(folder),
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


def score(reward: Any, completions: list[Any], prompts: list[Any] | None = None) -> list[float | None]:
    return reward(prompts=prompts or [""] * len(completions), completions=completions, completion_ids=[])


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("output", ["probability", "log_probability", "logit"])
def test_each_output_is_the_models_own_whatever_the_batch(model: str, output: str, batch_size: int) -> None:
    logits = logits_one_by_one(model, TEXTS)
    expected = {"probability": logits.softmax(1), "log_probability": logits.log_softmax(1), "logit": logits}[output]
    assert logits.std() > 0.1  # or all texts would look the same
    for label, column in (("POSITIVE", 2), (0, 0)):
        reward = build_reward(
            {"name": "classified_as", "model": model, "label": label, "output": output, "batch_size": batch_size}
        )
        torch.testing.assert_close(torch.tensor(score(reward, TEXTS)), expected[:, column], rtol=1e-4, atol=1e-5)


def test_a_threshold_makes_a_condition(model: str) -> None:
    probabilities = score(classified_as(model, "POSITIVE"), TEXTS)
    threshold = sorted(probabilities)[2]  # type: ignore[type-var]
    reward = classified_as(model, "POSITIVE", threshold=threshold)
    assert score(reward, TEXTS) == [float(p >= threshold) for p in probabilities]  # type: ignore[operator]
    assert sum(score(reward, TEXTS)) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"labels": {0: "TOXIC"}}, {"problem_type": "multi_label_classification"}])
def test_sigmoids_where_labels_do_not_exclude_one_another(
    settings: dict[str, Any], tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = save(tmp_path, chat_tokenizer, **({"labels": LABELS} | settings))
    logits = logits_one_by_one(folder, TEXTS)[:, 0]
    torch.testing.assert_close(torch.tensor(score(classified_as(folder, 0), TEXTS)), logits.sigmoid())
    log_p = score(classified_as(folder, 0, output="log_probability"), TEXTS)
    torch.testing.assert_close(torch.tensor(log_p), torch.nn.functional.logsigmoid(logits))


def test_the_prompt_counts_unless_it_is_not_to(model: str) -> None:
    whole, alone = classified_as(model, "POSITIVE"), classified_as(model, "POSITIVE", with_prompt=False)
    assert score(whole, ["good"], ["very "]) == score(whole, ["very good"])
    assert score(alone, ["good"], ["very "]) == score(whole, ["good"]) != score(whole, ["very good"])
    prompt, completion = [{"role": "user", "content": "How?"}], [{"role": "assistant", "content": "good"}]
    assert score(whole, [completion], [prompt]) == score(whole, ["How?\n\ngood"])
    assert score(alone, [completion], [prompt]) == score(whole, ["good"])


def test_texts_without_tokens_have_no_reward(model: str) -> None:
    reward = classified_as(model, "POSITIVE")
    assert score(reward, []) == []
    assert score(reward, ["", None, [], "a"], ["", "", [], ""])[:3] == [None, None, None]
    assert score(classified_as(model, "POSITIVE", threshold=0.5), [""]) == [None]


def test_of_a_long_text_the_end_is_read(model: str) -> None:
    reward = classified_as(model, "POSITIVE", max_length=4)
    assert score(reward, ["good " * 50 + "x y z"]) == score(reward, ["bad " * 9 + "x y z"])
    longer_than_the_model = score(classified_as(model, "POSITIVE"), ["good " * 999 + "x"])[0]
    assert longer_than_the_model is not None and 0 < longer_than_the_model < 1


def test_nan_is_no_reward(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    folder = save(tmp_path, chat_tokenizer, LABELS)
    broken = AutoModelForSequenceClassification.from_pretrained(folder)
    broken.score.weight.data.fill_(torch.nan)
    broken.save_pretrained(folder)
    assert score(classified_as(folder, "POSITIVE"), ["a"]) == [None]


def test_it_is_loaded_once_and_whole_under_zero3(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 shards what is loaded while its configuration is set; the classifier has no engine that could gather."""

    class ZeRO3:
        def is_zero3(self) -> bool:
            return True

    loaded, sharded = [], []
    load = AutoModelForSequenceClassification.from_pretrained

    def counting(name: str, **kwargs: Any) -> Any:
        loaded.append(name)
        sharded.append(deepspeed.is_deepspeed_zero3_enabled())
        return load(name, **kwargs)

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", counting)
    config = ZeRO3()
    deepspeed.set_hf_deepspeed_config(config)
    try:
        reward = classified_as(model, "POSITIVE")
        assert loaded == []
        assert score(reward, ["a"]) == score(reward, ["a"])
        assert deepspeed.is_deepspeed_zero3_enabled()  # as before
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert loaded == [model] and sharded == [False]


def test_names_under_which_targets_find_them(model: str) -> None:
    assert classified_as(model, "POSITIVE").__name__ == "p_POSITIVE"
    assert classified_as(model, "POSITIVE", output="log_probability").__name__ == "log_p_POSITIVE"
    assert classified_as(model, 0, output="logit").__name__ == "logit_0"
    assert classified_as(model, "not hate", threshold=0.5).__name__ == "is_not_hate"
    assert classified_as(model, 0, called="kind").__name__ == "kind"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": "POSITIVE", "output": "logits"}, "Unknown `output='logits'`"),
        ({"label": None}, "`label` must be"),
        ({"label": "POSITIVE", "batch_size": 0}, "must be 1 or more"),
        ({"label": "POSITIVE", "max_length": 0}, "must be 1 or more"),
        ({"label": "POSITIVE", "threshold": 0.0}, "`threshold=0.0` is no probability"),
        ({"label": "POSITIVE", "threshold": 1.5}, "`threshold=1.5` is no probability"),
        ({"label": "POSITIVE", "threshold": 0.5, "output": "log_probability"}, "is no log probability"),
        ({"label": "POSITIVE", "threshold": float("nan"), "output": "logit"}, "`threshold=nan`"),
        ({}, "missing a required argument: 'label'"),
    ],
)
def test_refusals_before_anything_is_loaded(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_reward({"name": "classified_as", "model": "nope/nope", **settings})
    assert "\n" not in str(caught.value)


def test_refusals_when_it_is_loaded(model: str, tmp_path: Path) -> None:
    for label, message in (
        ("POSITVE", r"no label 'POSITVE' \(did you mean 'POSITIVE'\?\)"),
        (3, "no label 3: it has"),
    ):
        with pytest.raises(ValueError, match=message):
            score(classified_as(model, label), ["a"])
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        score(classified_as(str(tmp_path / "nope"), 0), ["a"])
    assert "\n" not in str(caught.value)
