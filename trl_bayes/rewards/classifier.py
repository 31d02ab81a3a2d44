"""Evidence from a text classifier: the probability of a label, or whether it passes a threshold."""

import math
from typing import TYPE_CHECKING, Any

from ..spelling import did_you_mean
from .texts import RewardFunction, completion_text, full_text, named, slug
from .whole_models import whole_models


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


OUTPUTS = ("probability", "log_probability", "logit")


def classified_as(
    model: str,
    label: str | int,
    output: str = "probability",
    threshold: float | None = None,
    with_prompt: bool = True,
    batch_size: int = 64,
    max_length: int | None = None,
    device: str | None = None,
    called: str | None = None,
) -> RewardFunction:
    """
    Makes a reward from a sequence classifier of transformers, `P(label | text)` or what is made of it.

    With `output="log_probability"` and a `tilt` target of `beta=1` the posterior is Bayes' rule to the letter,
    `p(y|x) ∝ pi_0(y|x) P(label|x, y)`: the classifier is the likelihood. Smaller `beta` counts the same evidence more
    than once. With `threshold` the reward is 0 or 1, for a `constraint` or `moments` target. See [RL with KL penalties
    is better viewed as Bayesian inference](https://huggingface.co/papers/2205.11275).

    The classifier is loaded at the first call, whole on each process, also where the policy is sharded. A model with
    one output per text that is trained as a reward model needs none of this: name it as a reward itself.

    Args:
        model (`str`): id or folder of a model for sequence classification, with its tokenizer.
        label (`str` or `int`): name of the label in the model's configuration, or its index.
        output (`str`, *optional*, defaults to `"probability"`): `probability`, `log_probability` (nats) or `logit`. Of
            a model with several labels per text (`problem_type="multi_label_classification"`) or a single one,
            probabilities are sigmoids; else a softmax.
        threshold (`float`, *optional*): make it 1[output >= threshold].
        with_prompt (`bool`, *optional*, defaults to `True`): whether the text is the prompt and the completion, or the
            completion alone. Messages of a conversation are put one below the other.
        batch_size (`int`, *optional*, defaults to `64`): texts per forward pass.
        max_length (`int`, *optional*): tokens that the classifier sees, the last ones of a longer text; defaults to
            what its tokenizer and its configuration allow.
        device (`str`, *optional*): where it runs; defaults to the accelerator of this process, if there is one.
        called (`str`, *optional*, defaults to `"p_<label>"`, `"log_p_<label>"`, `"logit_<label>"` or
            `"is_<label>"`): name in logs and targets.

    Returns:
        `Callable`: a reward function. A text without any token has no reward (`None`).

    Raises:
        ValueError: if an argument is out of bounds; when it is first called, if the model cannot be loaded or has no
            such label.
    """
    if output not in OUTPUTS:
        raise ValueError(f"Unknown `output={output!r}`: use one of {list(OUTPUTS)}.")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise ValueError(f"`label` must be the name of a label or its index, but is {label!r}.")
    if batch_size < 1 or (max_length is not None and max_length < 1):
        raise ValueError(f"`batch_size` and `max_length` must be 1 or more, but are {batch_size} and {max_length}.")
    if threshold is not None and not _can_be_reached(threshold, output):
        raise ValueError(f"`threshold={threshold}` is no {output.replace('_', ' ')}: every text would get the same.")
    scorer = _Scorer(model, label, output, batch_size, max_length, device)

    def reward(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float | None]:
        pairs = zip(prompts, completions, strict=True)
        scores = scorer([full_text(p, c) if with_prompt else completion_text(c) for p, c in pairs])
        if threshold is None:
            return scores
        return [None if score is None else float(score >= threshold) for score in scores]

    prefix = {"probability": "p", "log_probability": "log_p", "logit": "logit"}[output]
    return named(reward, called or f"{'is' if threshold is not None else prefix}_{slug(str(label))}")


def _can_be_reached(threshold: float, output: str) -> bool:
    low, high = {"probability": (0.0, 1.0), "log_probability": (-math.inf, 0.0)}.get(output, (-math.inf, math.inf))
    return low < threshold <= high and math.isfinite(threshold)


class _Scorer:
    """Texts to scores, with a model that is loaded when the first texts come."""

    def __init__(
        self, name: str, label: str | int, output: str, batch_size: int, max_length: int | None, device: str | None
    ):
        self.name, self.label, self.output = name, label, output
        self.batch_size, self.max_length, self.device = batch_size, max_length, device
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase, int] | None = None

    def __getstate__(self) -> dict[str, object]:
        """What the scores depend on: whether the model is loaded already does not matter."""
        return {**vars(self), "_loaded": None}

    def __call__(self, texts: list[str]) -> list[float | None]:
        import torch

        if not texts:
            return []
        model, tokenizer, column = self._load()
        longest = self.max_length or _longest(tokenizer, model)
        ids = tokenizer(texts, truncation=longest is not None, max_length=longest)["input_ids"]
        order = sorted((i for i in range(len(texts)) if ids[i]), key=lambda i: len(ids[i]))  # little padding
        scores: list[float | None] = [None] * len(texts)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, padding_side="right", return_tensors="pt")
            with torch.inference_mode():
                logits = model(**batch.to(model.device)).logits.float()  # (rows, labels)
            for i, score in zip(rows, self._output(model, logits, column).tolist(), strict=True):
                scores[i] = None if math.isnan(score) else score
        return scores

    def _output(self, model: "PreTrainedModel", logits: "torch.Tensor", column: int) -> "torch.Tensor":
        import torch

        if self.output == "logit":
            return logits[:, column]
        one_of_many = logits.size(1) > 1 and model.config.problem_type != "multi_label_classification"
        log_probs = logits.log_softmax(dim=1) if one_of_many else torch.nn.functional.logsigmoid(logits)
        return log_probs[:, column] if self.output == "log_probability" else log_probs[:, column].exp()

    def _load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, int]":
        if self._loaded is None:
            import torch
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            try:
                with whole_models():
                    model = AutoModelForSequenceClassification.from_pretrained(self.name)
                tokenizer = AutoTokenizer.from_pretrained(self.name, truncation_side="left")
            except (OSError, ValueError) as error:
                reason = (str(error).strip().splitlines() or ["no reason given"])[0]
                raise ValueError(f"The classifier {self.name!r} cannot be loaded ({reason}).") from error
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            model.config.pad_token_id = tokenizer.pad_token_id  # a decoder finds the last token of each text by it
            column = _find_label(self.name, self.label, model.config.id2label)
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            self._loaded = model.to(self.device or accelerator or "cpu").eval(), tokenizer, column
        return self._loaded


def _find_label(name: str, label: str | int, labels: dict[int, str]) -> int:
    """The column of a label."""
    columns = {text: int(i) for i, text in labels.items()}
    if isinstance(label, int) and 0 <= label < len(columns):
        return label
    if isinstance(label, str) and label in columns:
        return columns[label]
    hint = did_you_mean(label, columns)
    raise ValueError(f"The classifier {name!r} has no label {label!r}{hint}: it has {list(columns)}.")


def _longest(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> int | None:
    """Tokens of a text that the classifier can read: a tokenizer that does not know says some enormous number."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (tokenizer.model_max_length, positions) if limit is not None and limit < 10**6]
    return min(limits, default=None)
