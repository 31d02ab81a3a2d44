"""What was drawn: one identity of samples of the prior, whoever draws them and whoever asks for them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from datasets.fingerprint import Hasher


_FORMAT = 2  # of what is kept; the first one did not say whether a policy was trained on it
_NOT_FOR_REWARDS = ("completion", "completions", "completion_ids")  # columns that reward functions are not given


@dataclass(frozen=True)
class DrawIdentity:
    """
    What completions of the prior depend on, besides their prompt.

    Two that are equal, but for the name of the model, are of the same distribution and the same random numbers. How a
    prompt becomes tokens is not in it: a prompt is known by its tokens ([`prompt_key`]), whatever tokenizer and chat
    template they come from. Neither is the numerical precision.

    Args:
        model (`str`): name or folder, for whoever reads it.
        weights (`str`): of [`~trl_bayes.language_models.fingerprint.model_fingerprint`].
        temperature (`float`): of the softmax.
        max_completion_length (`int`): a completion without a stop token is cut after so many tokens.
        stop_ids (`Sequence[int]`): tokens that end a completion, in any order.
        seed (`int`): of the random numbers.
        tools (`Sequence[str]`, *optional*): fingerprints of what takes part in a completion besides the model.
    """

    model: str
    weights: str
    temperature: float
    max_completion_length: int
    stop_ids: Sequence[int]
    seed: int
    tools: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", float(self.temperature))
        object.__setattr__(self, "stop_ids", sorted(set(self.stop_ids)))
        object.__setattr__(self, "tools", list(self.tools))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @property
    def fingerprint(self) -> str:
        """Sixteen characters that tell it from any other, for the name of a folder."""
        own = {name: value for name, value in self.to_dict().items() if name != "model"} | {"format": _FORMAT}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def prompt_key(token_ids: Sequence[int], besides: int = 0) -> int:
    """
    Identity of a prompt as the model sees it, int64.

    Args:
        token_ids (`Sequence[int]`): its tokens.
        besides (`int`, *optional*): of what the model sees besides, such as images.
    """
    return stable_hash([list(token_ids), besides])


def row_key(row: Mapping[str, Any]) -> int:
    """Identity of a row of the data as reward functions see it, int64: the prompt and the columns they are given."""
    seen = {name: row[name] for name in sorted(row) if name not in _NOT_FOR_REWARDS}
    return int(Hasher.hash(seen)[:15], 16)


def stable_hash(values: Any) -> int:
    """Of plain values, int64 and not negative; the same in every process and every run."""
    return int(hashlib.sha256(json.dumps(values).encode()).hexdigest()[:15], 16)
