"""Completions as reward functions see them: the same as in training, from tokens to texts or parsed messages."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import is_conversational
from trl.chat_template_utils import parse_response


def as_rewards_see_them(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
) -> list[Any]:
    """
    What TRL's trainers hand to reward functions as `completions`.

    For a prompt that is a text it is the completion's text. For one of messages it is a list with the assistant's
    message, which a tokenizer with a response template (or the older response schema) parses: reasoning and calls of
    tools then stand beside the content, and markers that decoding keeps are gone.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's.
        prompts (`list`): N texts, or lists of messages.
        prompt_ids (`list[list[int]]`): their tokens, for templates whose end is where the answer begins.
        completion_ids (`list[list[int]]`): N lists of tokens.

    Returns:
        `list`: N texts, or lists of one message.
    """
    parses = any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema"))
    completions: list[Any] = []
    for prompt, prefix, ids in zip(prompts, prompt_ids, completion_ids, strict=True):
        if not is_conversational({"prompt": prompt}):
            completions.append(tokenizer.decode(ids, skip_special_tokens=True))
        elif parses and ids:  # nothing said yet is not parsed
            completions.append([parse_response(tokenizer, ids, prefix=prefix)])
        else:
            completions.append([{"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}])
    return completions
