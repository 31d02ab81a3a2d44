"""Lexical evidence: does the completion have a word or a phrase, or more words of one list than of another?

Every factory here makes a TRL reward function whose values are 0.0 and 1.0, so that it serves as a reward, as a hard
constraint and as a feature of [`~trl_bayes.targets.Moments`]. Only the completion is judged: a word in the prompt is
not the model's doing. The pointwise and the distributional constraints of [A Distributional Approach to Controlled
Text Generation](https://huggingface.co/papers/2012.11635) are of these two kinds.
"""

import re
from collections.abc import Iterable
from typing import Any

from .texts import RewardFunction, completion_text, named, slug


def contains_word(
    word: str | Iterable[str], whole: bool = True, case_sensitive: bool = False, called: str | None = None
) -> RewardFunction:
    """
    Makes the reward 1[the completion has a word, or a phrase, or one of several].

    Args:
        word (`str` or `list[str]`): the word or phrase; of several, any one counts. The blanks of a phrase stand for
            any white space.
        whole (`bool`, *optional*, defaults to `True`): whether `art` must be a word, so that `party` does not count.
        case_sensitive (`bool`, *optional*, defaults to `False`): whether `Amazing` differs from `amazing`.
        called (`str`, *optional*, defaults to `"contains_<word>"`): name in logs and targets.

    Returns:
        `Callable`: a reward function, 1.0 or 0.0 for every completion.

    Raises:
        ValueError: if there is no word, or an empty one.
    """
    words = _words("word", word)
    pattern = _any_of(words, whole, case_sensitive)

    def reward(completions: list[Any], **kwargs: Any) -> list[float | None]:
        return [float(pattern.search(completion_text(completion)) is not None) for completion in completions]

    return named(reward, called or f"contains_{slug(words[0])}" + ("_or_others" if len(words) > 1 else ""))


def more_of(
    words: str | Iterable[str], than: str | Iterable[str], case_sensitive: bool = False, called: str | None = None
) -> RewardFunction:
    """
    Makes the reward 1[the completion has more words of one list than of another], with repetitions.

    With pronouns it says which gender a text is about: `more_of(["she", "her"], than=["he", "his"], called="female")`.

    Args:
        words (`str` or `list[str]`): whole words or phrases that speak for it.
        than (`str` or `list[str]`): those that speak against it.
        case_sensitive (`bool`, *optional*, defaults to `False`): whether capitals matter.
        called (`str`, *optional*, defaults to `"more_<word>_than_<word>"`): name in logs and targets.

    Returns:
        `Callable`: a reward function, 1.0 or 0.0 for every completion; a tie is 0.0.

    Raises:
        ValueError: if a list has no word, or an empty one, or both share a word.
    """
    for_it, against_it = _words("words", words), _words("than", than)
    as_read = str if case_sensitive else str.lower
    if shared := sorted(set(map(as_read, for_it)) & set(map(as_read, against_it))):
        raise ValueError(f"`words` and `than` must not share words, but both have {shared}.")
    wanted, unwanted = (_any_of(part, True, case_sensitive) for part in (for_it, against_it))

    def reward(completions: list[Any], **kwargs: Any) -> list[float | None]:
        texts = [completion_text(completion) for completion in completions]
        return [float(len(wanted.findall(text)) > len(unwanted.findall(text))) for text in texts]

    return named(reward, called or f"more_{slug(for_it[0])}_than_{slug(against_it[0])}")


def _words(argument: str, value: str | Iterable[str]) -> list[str]:
    words = [value] if isinstance(value, str) else list(value)
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f"`{argument}` must be a word, or a list of words, none of them empty, but is {value!r}.")
    return words


def _any_of(words: list[str], whole: bool, case_sensitive: bool) -> re.Pattern[str]:
    """A pattern that finds any of some words, the longest first."""
    options = [r"\s+".join(map(re.escape, word.split())) for word in sorted(words, key=len, reverse=True)]
    # Not `\b`: a word may begin or end with a sign, as in "C++"
    before, behind = (r"(?<!\w)", r"(?!\w)") if whole else ("", "")
    return re.compile(f"{before}(?:{'|'.join(options)}){behind}", 0 if case_sensitive else re.IGNORECASE)
