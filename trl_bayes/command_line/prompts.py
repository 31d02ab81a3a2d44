"""Prompts from the columns of any data set, for those that have no column `prompt`."""

import string
from typing import Any


class PromptError(ValueError):
    """A row of the data that has no prompt, which of a stream turns out only when its turn comes."""


def with_prompts(rows: Any, template: str | None, words: int | None, as_message: bool) -> Any:
    """
    Writes the column `prompt` of a data set; all other columns stay, for reward functions.

    Args:
        rows (`Dataset` or `IterableDataset`): one split.
        template (`str`, *optional*): text with the names of columns in braces, entries of nested ones too, as in
            `"{question}"` and `"{prompt[text]}"`; a brace itself is doubled. Defaults to `"{prompt}"`.
        words (`int`, *optional*): keep that many words from the beginning.
        as_message (`bool`): make it a conversation that begins with the prompt as a user's message.

    Returns:
        `Dataset` or `IterableDataset`: the same rows, as they are if nothing is asked for.

    Raises:
        ValueError: the template names a column that is not there, or is none, or is not about texts; one sentence.
    """
    if template is None and words is None and not as_message:
        return rows
    if words is not None and words < 1:
        raise ValueError(f"`prompt_words={words}` leaves nothing of the prompt: set 1 or more.")
    _check_template(template or "{prompt}", rows.column_names)

    def write(row: dict[str, Any]) -> dict[str, Any]:
        if template is None and not isinstance(row["prompt"], str):
            raise PromptError(
                "`prompt_words` and `prompt_as_message` are for prompts that are texts, but the data has "
                f"{type(row['prompt']).__name__}s: name the text with `prompt_template`, or leave them out."
            )
        try:
            text = row["prompt"] if template is None else _Formatter().vformat(template, (), row)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise PromptError(f"`prompt_template` {template!r} does not fit a row of the data ({reason}).") from None
        text = text if words is None else " ".join(text.split()[:words])
        return {"prompt": [{"role": "user", "content": text}] if as_message else text}

    return rows.map(write)


class _Formatter(string.Formatter):
    """Refuses a blank cell, which would be written as `None`."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        found, key = super().get_field(field_name, args, kwargs)
        if found is None:
            raise ValueError(f"{field_name} is blank")
        return found, key


def _check_template(template: str, columns: list[str] | None) -> None:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"`prompt_template` is not a format string ({error}): double braces are literal.") from None
    for name in names:
        column = name.partition("[")[0]
        if not column or (columns is not None and column not in columns):
            raise ValueError(
                f"`prompt_template` names the column {column!r}, but the data has {columns}: name one of them, and "
                "double a brace that is literal."
            )
