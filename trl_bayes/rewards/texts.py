"""What reward functions share: the text that is judged, in TRL's two formats, and the name that TRL logs."""

from collections.abc import Callable
from typing import Any


RewardFunction = Callable[..., list[float | None]]


def completion_text(completion: Any) -> str:
    """
    The text of a completion: itself, or what the assistant says in a list of messages.

    Messages without text (a tool call), tool results and `None` add nothing. Several messages become lines of their
    own; several blocks of one message are joined as they are.
    """
    return _text(completion, role="assistant")


def full_text(prompt: Any, completion: Any) -> str:
    """The completion behind its prompt: joined as they are, or, of messages, one paragraph each."""
    if isinstance(prompt, list):
        parts = [_text([message], role=None) for message in prompt] + [completion_text(completion)]
        return "\n\n".join(part for part in parts if part)
    return _text(prompt, role=None) + completion_text(completion)


def named(reward: RewardFunction, name: str) -> RewardFunction:
    """Gives a reward function the name under which TRL logs it and targets find it."""
    reward.__name__ = reward.__qualname__ = name
    return reward


def slug(text: str) -> str:
    """A text as part of such a name: letters and digits, underscores between them."""
    return "_".join("".join(c if c.isalnum() else " " for c in text).split()) or "empty"


def _text(value: Any, role: str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    texts: list[str] = []
    for message in value:
        if role is None or message.get("role") == role:
            content = message.get("content")
            blocks = content if isinstance(content, list) else [{"text": content}]  # multimodal models have blocks
            texts.append("".join(block.get("text") or "" for block in blocks))
    return "\n".join(text for text in texts if text)
