"""Evidence about arithmetic: is the final number of the solution the right one? For GSM8K and its like.

TRL's `accuracy_reward` compares mathematical expressions and is the choice for data sets such as MATH; it needs the
package `math-verify`, messages, and a column `solution`. GSM8K has numbers only, in a column `answer` that ends in
`#### 72`, so the comparison here is one of numbers and needs no package.
"""

import re
from decimal import Decimal
from typing import Any

from .texts import completion_text


_NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")  # in "7-3" the sign is an operator
_LATEX_SPACE = re.compile(r"\\[,;:! ]|\{,\}|~")  # also between thousands, as in 1{,}000 and 1\,000
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")  # one level of braces inside, as in \boxed{\text{72}}
_ANSWER_MARK = "####"


def gsm8k_accuracy(completions: list[Any], answer: list[Any] | None = None, **kwargs: Any) -> list[float | None]:
    """
    1[the final number of the completion is that of the answer].

    The final number is the one in the last `\\boxed{...}` of the completion (a box with several, such as a fraction,
    has none); without a box the first one behind the last `####`; without either the last number of all. Thousands
    separators, units and signs of currency do not matter, and `72.0` is `72`.

    Args:
        completions: Completions, as texts or as lists of messages.
        answer: The column `answer` of the data: a number, or a text that ends in `#### 72` as in GSM8K.
        **kwargs: Whatever else TRL passes; not used.

    Returns:
        1.0 or 0.0 for every completion; `None`, which leaves it out of the update, where the answer has no number.

    Raises:
        ValueError: if the data has no column `answer`.
    """
    if answer is None:
        raise ValueError("`gsm8k_accuracy` needs the data's column `answer`, as GSM8K has it: rename yours.")
    rewards: list[float | None] = []
    for completion, gold in zip(completions, answer, strict=True):
        wanted = final_number(str(gold))
        rewards.append(None if wanted is None else float(final_number(completion_text(completion)) == wanted))
    return rewards


def final_number(text: str) -> Decimal | None:
    """The number that a solution ends with, as [`gsm8k_accuracy`] reads it; `None` if there is none."""
    if boxes := _BOXED.findall(text):
        numbers = _NUMBER.findall(_LATEX_SPACE.sub("", boxes[-1]))
        return _decimal(numbers[0]) if len(numbers) == 1 else None
    _, mark, behind = text.rpartition(_ANSWER_MARK)
    numbers = _NUMBER.findall(behind)
    if not numbers:
        return None
    return _decimal(numbers[0] if mark else numbers[-1])


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))
