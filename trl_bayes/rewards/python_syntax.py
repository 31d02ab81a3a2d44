"""Evidence about one line of Python: does the line that the model completed parse, and what does it hold?

Every function here is a TRL reward function, `(prompts, completions, **kwargs) -> list[float | None]`, whose value is
0.0 or 1.0, so that it serves both as a reward and as a constraint. What is judged is the *completed line*, prompt and
completion together:

 - standard format: `prompt + completion`;
 - conversational format: what the assistant says, which is a reply and not the continuation of the last message.

Nothing is executed, and no text, however odd, raises.
"""

import ast
import re
import warnings
from typing import Any

from .texts import RewardFunction, completion_text, named


# A name, or what has to be stepped over because names inside it are not tokens: strings and comments. The order
# matters: three quotes before one, and a string with its prefix (b, rf, ...) before a name, which the prefix is not.
_NAME_OR_SKIPPED = re.compile(
    r'(?:\b[rbuf]{1,2})?(?:"""(?:\\.|[^\\])*?"""|\'\'\'(?:\\.|[^\\])*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\')'
    r"|\#[^\n]*"
    r"|(?P<name>\b[^\W\d]\w*)",
    re.DOTALL | re.IGNORECASE,
)

# Surroundings that make a statement legal which is not legal alone: `return`, `await` and `break` need the first,
# `yield from` the second, `from m import *` the last.
_SURROUNDINGS = ("async def f():\n while 1: pass", "def f():\n while 1: pass", "")


def parses(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float | None]:
    """
    1[the completed line is one Python statement].

    The statement may need surroundings that a line alone does not have: `return x` and `await f()` count, as they do
    for `ast.parse`. An empty line, a comment, two statements (`a; b`), an indented line and several lines do not.

    Args:
        prompts, completions (`list`): as TRL passes them, texts or lists of messages.

    Returns:
        `list[float | None]`: 1.0 or 0.0 for every completion.
    """
    with warnings.catch_warnings():  # once a batch: it is as slow as parsing a line
        warnings.simplefilter("ignore")
        return [float(_statement(line) is not None) for line in _completed_lines(prompts, completions)]


def no_syntax_warning(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float | None]:
    """
    1[the completed line parses, and the compiler has nothing to warn about].

    The compiler warns about what is legal and all the same almost certainly a mistake, such as `x is 1`,
    `assert (x, "message")`, `"text"(x)` or the escape `"\\d"`. What it warns about differs a little between
    versions of Python.

    Args:
        prompts, completions (`list`): as TRL passes them, texts or lists of messages.

    Returns:
        `list[float | None]`: 1.0 or 0.0 for every completion; 0.0 for a line that does not parse.
    """
    rewards: list[float | None] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for line in _completed_lines(prompts, completions):
            caught.clear()
            statement = _statement(line)
            if statement is not None:
                _compile_in_surroundings(statement)
            rewards.append(float(statement is not None and not caught))
    return rewards


def max_length(characters: int) -> RewardFunction:
    """
    Makes the reward 1[the completed line has at most `characters` characters].

    Args:
        characters (`int`): longest length that still gets 1.0, counted over prompt and completion.

    Returns:
        `Callable`: a reward function, called `max_length_<characters>` in TRL's logs.

    Raises:
        ValueError: if `characters` is negative.
    """
    if characters < 0:
        raise ValueError(f"`characters` must not be negative, but is {characters}.")

    def reward(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float | None]:
        return [float(len(line) <= characters) for line in _completed_lines(prompts, completions)]

    return named(reward, f"max_length_{characters}")


def contains_name(identifier: str) -> RewardFunction:
    """
    Makes the reward 1[the identifier or keyword `identifier` is a token of the completed line].

    `self` is a token of `self.x = 1`, but not of `myself = 1`, `"self"` or `# self`; a string counts as a whole,
    f-strings included. The line need not parse.

    Args:
        identifier (`str`): a name or keyword, such as `self` or `import`.

    Returns:
        `Callable`: a reward function, called `contains_name_<identifier>` in TRL's logs.

    Raises:
        ValueError: if it is not one.
    """
    if not identifier.isidentifier():
        raise ValueError(f"`identifier` must be a Python identifier, but is {identifier!r}.")

    def reward(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float | None]:
        return [float(_has_name(line, identifier)) for line in _completed_lines(prompts, completions)]

    return named(reward, f"contains_name_{identifier}")


def _has_name(line: str, name: str) -> bool:
    if name not in line:  # most lines end here, without the regular expression
        return False
    return any(match["name"] == name for match in _NAME_OR_SKIPPED.finditer(line))


def _statement(line: str) -> ast.stmt | None:
    """The only statement of a line; `None` where the line is not exactly one statement."""
    line = line.rstrip()
    if not line or "\n" in line or "\r" in line:
        return None
    try:
        body = ast.parse(line).body
    except Exception:
        # Mostly SyntaxError. But null bytes and lone surrogates give ValueError, and deep nesting gives MemoryError,
        # RecursionError or SystemError, depending on the version of Python.
        return None
    return body[0] if len(body) == 1 else None


def _compile_in_surroundings(statement: ast.stmt) -> None:
    """Compiles a statement (never runs it) where it is legal, so that the compiler can issue its warnings."""
    for source in _SURROUNDINGS:
        module = ast.parse(source)
        if module.body:
            module.body[0].body[0].body = [statement]  # type: ignore[attr-defined]
        else:
            module.body = [statement]
        try:
            compile(module, "<line>", "exec", dont_inherit=True)
            return
        except Exception:  # not legal here, or too deep for the compiler: then there is no warning to be had
            continue


def _completed_lines(prompts: list[Any], completions: list[Any]) -> list[str]:
    return [
        completion_text(completion) if isinstance(prompt, list) else prompt + completion_text(completion)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
