"""The evidence about lines of Python: what counts as one statement, odd inputs, TRL's two formats, and quiet."""

import sys
import warnings

import pytest

from trl_bayes.rewards import contains_name, max_length, no_syntax_warning, parses


ODD_LINES = [
    "",
    "   ",
    "\0",
    "x = 1\0",
    "\ud800",
    "\ufeffx = 1",
    "(" * 100_000,
    "[" * 5_000 + "]" * 5_000,
    "-" * 100_000 + "1",
    "a" + ".b" * 20_000,
    "1 + " * 20_000 + "1",
    "lambda: " * 5_000 + "1",
    "9" * 10_000,
    "f'{" * 200,
    "'" * 10_001,
    "\\",
    "\N{SNOWMAN}",
]


def score(reward, *lines):
    return reward(prompts=[""] * len(lines), completions=list(lines), completion_ids=[[0]] * len(lines), step=3)


@pytest.mark.parametrize(
    "line",
    ["x = 1", "return x", "yield", "await f()", "self.a: int = 1", "from m import *", "break", "x"]
    + ["if x: pass", "x = 1  ", "x = 1\n", "x = 1  # why", "été = 'é'", "f'{x!r:>{width}}'", "del a[0], b"],
)
def test_a_statement_parses(line):
    assert score(parses, line) == [1.0]


@pytest.mark.parametrize(
    "line",
    ["", " ", "\n", "# why", "x =", "import ", "self.", " x = 1", "a; b", "if x:"]
    + ["x = 1\ny = 2", "x = (1,\n2)", "a\rb", "print 'x'", "1 = x", "f(a=1, 2)"]
    + ["'unterminated", "x = \\", "\0", "x\0", "\ud800"],
)
def test_what_is_not_one_statement_does_not_parse(line):
    assert score(parses, line) == [0.0]


@pytest.mark.parametrize("reward", [parses, no_syntax_warning, contains_name("a"), max_length(10)])
def test_odd_lines_never_raise(reward):
    rewards = score(reward, *ODD_LINES)
    assert len(rewards) == len(ODD_LINES)
    assert set(rewards) <= {0.0, 1.0}


def test_nesting_that_the_parser_refuses_is_no_statement():
    assert score(parses, "(" * 50 + "1" + ")" * 50, "(" * 5_000 + "1" + ")" * 5_000) == [1.0, 0.0]


def test_parsing_leaves_the_recursion_limit_and_the_filters_alone():
    limit, filters = sys.getrecursionlimit(), list(warnings.filters)
    score(parses, *ODD_LINES)
    score(no_syntax_warning, *ODD_LINES)
    assert sys.getrecursionlimit() == limit
    assert list(warnings.filters) == filters


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x == 1", 1.0),
        ("return x", 1.0),
        ("await f()", 1.0),
        ("yield from f()", 1.0),
        ("from m import *", 1.0),
        ("nonlocal x", 1.0),
        ("x is 1", 0.0),
        ("return x is 'a'", 0.0),
        ("await f(x is 1)", 0.0),
        ("yield from (x is 1, y)", 0.0),
        ("assert (x, 'message')", 0.0),
        ("x = 'text'(y)", 0.0),
        (r"x = '\d'", 0.0),
        (r"x = r'\d'", 1.0),
        ("x =", 0.0),
        ("", 0.0),
    ],
)
def test_no_syntax_warning(line, expected):
    assert score(no_syntax_warning, line) == [expected]
    assert score(no_syntax_warning, "x is 1", line, "x = 1") == [0.0, expected, 1.0]  # lines do not affect each other


@pytest.mark.parametrize("reward", [parses, no_syntax_warning])
@pytest.mark.parametrize("action", ["error", "always"])
def test_warnings_are_neither_shown_nor_turned_into_errors(reward, action, capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        score(reward, "x is 1", r"x = '\d'", "0x1for x in y")
    assert caught == []
    assert capsys.readouterr() == ("", "")
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        assert score(parses, r"x = '\d'") == [1.0]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("self.x = 1", 1.0),
        ("f(self)", 1.0),
        ("return self", 1.0),
        ("x = b'a' + self", 1.0),
        ("x = 'it\\'s' + self", 1.0),
        ("self.", 1.0),
        ("x = (self", 1.0),
        ("x = 'a + self", 1.0),  # a quote that is never closed begins no string
        ("myself = 1", 0.0),
        ("self_ = 1", 0.0),
        ("1self", 0.0),
        ("x = 'self'", 0.0),
        ('x = rb"self"', 0.0),
        ("x = f'{self}'", 0.0),
        ('x = """a "self" b"""', 0.0),
        ("x = 1  # self", 0.0),
        ("été", 0.0),
        ("", 0.0),
    ],
)
def test_contains_name(line, expected):
    assert score(contains_name("self"), line) == [expected]


def test_a_string_prefix_is_no_name_but_may_be_one():
    assert score(contains_name("b"), "x = b'a'", "x = b + 'a'", "f(b, 'a')") == [0.0, 1.0, 1.0]
    assert score(contains_name("import"), "import os", "x.important") == [1.0, 0.0]
    assert score(contains_name("été"), "été = 1", "étés = 1") == [1.0, 0.0]


def test_max_length_counts_prompt_and_completion():
    assert max_length(5)(["ab", "ab", ""], ["cde", "cdef", ""]) == [1.0, 0.0, 1.0]
    assert max_length(0)(["", "x"], ["", ""]) == [1.0, 0.0]


def test_names_for_the_logs():
    assert contains_name("self").__name__ == "contains_name_self"
    assert max_length(40).__name__ == "max_length_40"
    assert parses.__name__ == "parses"


def test_wrong_arguments_say_what_is_wrong():
    with pytest.raises(ValueError, match="must be a Python identifier, but is 'a b'"):
        contains_name("a b")
    with pytest.raises(ValueError, match="must not be negative, but is -1"):
        max_length(-1)
    with pytest.raises(ValueError):
        parses(["", ""], ["x = 1"])


def test_the_prompt_is_part_of_the_line():
    assert parses(["x = ", "x = ", "self.", "self."], ["1", "", "a", " = 1"]) == [1.0, 0.0, 1.0, 0.0]


def test_conversations_are_judged_by_what_the_assistant_says():
    user = {"role": "user", "content": "Write ( a line"}
    before = {"role": "assistant", "content": "x = "}  # of an earlier turn: TRL begins another
    blocks = [{"type": "text", "text": "x"}, {"type": "image"}, {"type": "text", "text": " = 1"}]
    tool = {"role": "tool", "content": "("}
    prompts = [[user], [user, before], [user], [user], [user], [user], []]
    completions = [
        [{"role": "assistant", "content": "x = 1"}],
        [{"role": "assistant", "content": "y ="}],
        [{"role": "assistant", "content": blocks}],
        [{"role": "assistant", "content": None, "tool_calls": []}],
        [{"role": "assistant"}, tool, {"role": "assistant", "content": "return x"}],
        [],
        [{"role": "assistant", "content": "x ="}],
    ]
    assert parses(prompts=prompts, completions=completions) == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert max_length(4)(prompts, completions) == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]


def test_a_completion_without_text_is_empty():
    assert parses(["x", ""], [None, None]) == [1.0, 0.0]
