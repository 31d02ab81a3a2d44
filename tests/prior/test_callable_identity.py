"""What a reward function is: two that could give other values are told apart, and one that cannot be told says so."""

import functools
import importlib
import itertools
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.rewards import get_soft_overlong_punishment, think_format_reward

from trl_bayes.prior import callable_fingerprint
from trl_bayes.rewards import build_reward, classified_as, length_between, parses


class Modules:
    """Modules of the user's own, written, imported and written again."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, itertools.count()

    def __call__(self, name: str = "mine", **sources: str) -> Any:
        """The module `name` after the sources were written; what was imported before is forgotten."""
        for module, source in sources.items():
            (self.folder / f"{module}.py").write_text(textwrap.dedent(source))
        for module in [each for each in sys.modules if (self.folder / f"{each.partition('.')[0]}.py").exists()]:
            del sys.modules[module]
        importlib.invalidate_caches()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode  # two versions may be of the same second
        try:
            return importlib.import_module(name)
        finally:
            sys.dont_write_bytecode = before


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    yield Modules(tmp_path)
    for module in set(sys.modules) - known:
        if (tmp_path / f"{module}.py").exists():
            del sys.modules[module]


MINE = """
    import re
    import helpers
    from helpers import share

    LIMIT, UNUSED = 8, 1
    WORDS = {"good", "better", "best"}
    PATTERN = re.compile("[aeiou]")

    def counted(text):
        return sum(word in WORDS for word in text.split())

    def reward(completions, limit=LIMIT, *, unit=1.0, **kwargs):
        return [unit * min(counted(text), limit) for text in completions]

    def vowels(completions, **kwargs):
        return [len(PATTERN.findall(text)) for text in completions]

    def by_module(completions, **kwargs):
        return [helpers.score(text) for text in completions]

    def by_name(completions, **kwargs):
        return [share(text) for text in completions]

    def late(completions, **kwargs):
        from helpers import score

        return [score(text) for text in completions]

    async def asynchronous(completions, **kwargs):
        return [float(len(text)) for text in completions]

    def nested(completions, **kwargs):
        def inner(text):
            return [c for c in text if c in ("a", "b")]

        return [len(inner(text)) for text in completions]

    class Base:
        def score(self, text):
            return len(text)

    class Scorer(Base):
        scale = 2

        def __init__(self, offset=0.0):
            self.offset = offset

        def __call__(self, completions, **kwargs):
            return [self.scale * self.score(text) + self.offset for text in completions]

        def method(self, completions, **kwargs):
            return self(completions)

    class Async(Scorer):
        async def __call__(self, completions, **kwargs):
            return [0.0 for _ in completions]

    scorer = Scorer()
    asynchronous_scorer = Async()
"""
HELPERS = """
    FACTOR = 1
    OTHER = 1

    def scaled(text):
        return FACTOR * len(text)

    def score(text):
        return scaled(text)

    def share(text):
        return len(text) / 100
"""


@pytest.mark.parametrize(
    ("name", "module", "old", "new"),
    [
        ("reward", "mine", "min(", "max("),  # its code
        ("reward", "mine", "unit=1.0", "unit=2.0"),  # a default
        ("reward", "mine", "LIMIT, UNUSED = 8", "LIMIT, UNUSED = 9"),  # which is in a default
        ("reward", "mine", "sum(", "any("),  # a function that it uses
        ("reward", "mine", '"best"', '"worst"'),  # a global that this uses
        ("vowels", "mine", "[aeiou]", "[aeiouy]"),
        ("vowels", "mine", 're.compile("[aeiou]")', 're.compile("[aeiou]", re.I)'),
        ("by_module", "helpers", "return scaled(text)", "return scaled(text) + 1"),  # a function of another module
        ("by_module", "helpers", "FACTOR = 1", "FACTOR = 2"),
        ("by_name", "helpers", "/ 100", "/ 10"),
        ("late", "helpers", "FACTOR = 1", "FACTOR = 2"),
        ("asynchronous", "mine", "float(len(text))", "-float(len(text))"),
        ("asynchronous", "mine", "async def asynchronous", "def asynchronous"),
        ("nested", "mine", '("a", "b")', '("a", "c")'),
        ("scorer", "mine", "scale = 2", "scale = 3"),  # of an instance: its class
        ("scorer", "mine", "+ self.offset", "- self.offset"),
        ("scorer", "mine", "offset=0.0", "offset=1.0"),  # its state
        ("scorer", "mine", "            return len(text)", "            return -len(text)"),  # a base class
        ("asynchronous_scorer", "mine", "0.0 for _", "1.0 for _"),
    ],
)
def test_what_a_function_depends_on(name: str, module: str, old: str, new: str, modules: Any) -> None:
    sources = {"mine": MINE, "helpers": HELPERS}
    assert old in sources[module]
    before = callable_fingerprint(getattr(modules(**sources), name))
    assert before is not None
    assert callable_fingerprint(getattr(modules(**sources), name)) == before
    sources[module] = sources[module].replace(old, new)
    after = callable_fingerprint(getattr(modules(**sources), name))
    assert after is not None and after != before


@pytest.mark.parametrize(
    ("name", "module", "old", "new"),
    [
        ("reward", "mine", "UNUSED = 8, 1", "UNUSED = 8, 2"),
        ("vowels", "mine", "    PATTERN =", "\n\n    PATTERN ="),  # the lines behind it
        ("by_module", "helpers", "OTHER = 1", "OTHER = 2"),
        ("by_module", "helpers", "/ 100", "/ 10"),
        ("by_name", "helpers", "FACTOR = 1", "FACTOR = 2"),
    ],
)
def test_what_it_does_not_depend_on(name: str, module: str, old: str, new: str, modules: Any) -> None:
    sources = {"mine": MINE, "helpers": HELPERS}
    before = callable_fingerprint(getattr(modules(**sources), name))
    sources[module] = sources[module].replace(old, new)
    assert callable_fingerprint(getattr(modules(**sources), name)) == before is not None


def factory(value: Any) -> Callable[..., list[float]]:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(value(text) if callable(value) else text == value) for text in completions]

    return reward


def scaled(completions: list[str], scale: float, **kwargs: Any) -> list[float]:
    return [scale * len(text) for text in completions]


Pair = namedtuple("Pair", "a b")


class OwnList(list):
    pass


LOOP: list[Any] = [1]
LOOP.append(LOOP)
DIFFERENT: list[Any] = [
    1,
    1.0,
    True,
    None,
    "1",
    b"1",
    (1, 2),
    [1, 2],
    OwnList([1, 2]),
    {1, 2},
    frozenset({1, 2}),
    {1: 2},
    OrderedDict({1: 2}),
    {2: 1},
    Pair(1, 2),
    range(3),
    re.compile("a"),
    re.compile("a", re.IGNORECASE),
    torch.tensor([1.0, 2.0]),
    torch.tensor([1.0, 2.5]),
    torch.tensor([2.0, 1.0]),
    torch.tensor([1.0, 2.0], dtype=torch.float64),
    numpy.array([1, 2]),
    numpy.array([1, 3]),
    numpy.float32(1.0),
    len,
    str.upper,
    re.compile("b").search,
    re.compile("c").search,
    functools.partial(int, base=2),
    functools.partial(int, base=3),
    lambda text: text > "a",
    lambda text: text < "a",
    functools.lru_cache(lambda text: text > "b"),
    itertools.count,
    torch.relu,
    Path("a"),
    LOOP,
    object,
    list[int],
    int | None,
]


def test_values_in_a_closure() -> None:
    """All different, and each the same again."""
    fingerprints = [callable_fingerprint(factory(value)) for value in DIFFERENT]
    assert None not in fingerprints
    assert len(set(fingerprints)) == len(DIFFERENT)
    assert [callable_fingerprint(factory(value)) for value in DIFFERENT] == fingerprints
    in_partials = [callable_fingerprint(functools.partial(scaled, scale=value)) for value in DIFFERENT]
    assert len(set(in_partials)) == len(DIFFERENT)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"name": "length_between", "maximum": 3}, {"name": "length_between", "maximum": 8}),
        ({"name": "length_between", "maximum": 3}, {"name": "length_between", "maximum": 3, "unit": "characters"}),
        ({"name": "length_in", "unit": "words"}, {"name": "length_in", "unit": "lines"}),
        ({"name": "max_length", "characters": 40}, {"name": "max_length", "characters": 41}),
        ({"name": "contains_word", "word": "a"}, {"name": "contains_word", "word": "b"}),
        ({"name": "contains_word", "word": ["a", "b"]}, {"name": "contains_word", "word": ["a", "c"]}),
        ({"name": "contains_word", "word": "a"}, {"name": "contains_word", "word": "a", "case_sensitive": True}),
        ({"name": "more_of", "words": "a", "than": "b"}, {"name": "more_of", "words": "a", "than": "c"}),
        ({"name": "matches", "pattern": "a"}, {"name": "matches", "pattern": "b"}),
        (
            {"name": "get_soft_overlong_punishment", "max_completion_len": 10, "soft_punish_cache": 2},
            {"name": "get_soft_overlong_punishment", "max_completion_len": 10, "soft_punish_cache": 3},
        ),
        ("parses", "no_syntax_warning"),
        ("think_format_reward", "gsm8k_accuracy"),
        ({"name": "classified_as", "model": "m", "label": "x"}, {"name": "classified_as", "model": "m", "label": "y"}),
    ],
)
def test_ready_rewards_of_a_recipe(one: Any, other: Any) -> None:
    """A factory may give all of them one name: its arguments tell them apart."""
    first, second = callable_fingerprint(build_reward(one)), callable_fingerprint(build_reward(other))
    assert None not in (first, second) and first != second
    assert callable_fingerprint(build_reward(one)) == first


def test_the_name_does_not_matter() -> None:
    assert callable_fingerprint(length_between(maximum=3, called="short")) == callable_fingerprint(
        length_between(maximum=3, called="brief")
    )


def test_rewards_of_a_library_are_known_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl_bayes.prior import callable_identity

    def both() -> list[str | None]:
        callable_identity._library.cache_clear()
        return [callable_fingerprint(each) for each in (think_format_reward, get_soft_overlong_punishment(10, 2))]

    before = both()
    assert None not in before and both() == before
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "trl" else version(name))
    after = both()
    monkeypatch.undo()
    callable_identity._library.cache_clear()
    assert None not in after and not set(before) & set(after)


# -------------------------------------------------------------------------------------------------------------------
# What cannot be told


class Stateful:
    def __init__(self, state: Any) -> None:
        self.state = state

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [0.0] * len(completions)


def reads_a_file(completions: list[str], **kwargs: Any) -> list[float]:
    with open("words.txt") as file:
        words = file.read().split()
    return [float(text in words) for text in completions]


def reads_a_path(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(text in Path("words.txt").read_text()) for text in completions]


def reads_the_environment(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(text == os.environ["WANTED"]) for text in completions]


def calls_one_that_reads(completions: list[str], **kwargs: Any) -> list[float]:
    return reads_a_file(completions)


def asks_a_server(completions: list[str], **kwargs: Any) -> list[float]:
    import requests

    return [requests.post("http://localhost:1", json=text).json() for text in completions]


def asks_a_host(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(bool(socket.gethostbyname(text))) for text in completions]


def runs_a_program(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(subprocess.run(["judge", text]).returncode) for text in completions]


def evaluates(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(eval(text)) for text in completions]


def imports_by_name(completions: list[str], **kwargs: Any) -> list[float]:
    return importlib.import_module("helpers").score(completions)


def lazily(completions: list[str], **kwargs: Any) -> list[float]:
    from no_such_package_of_mine import score

    return score(completions)


@pytest.mark.parametrize(
    "reward",
    [
        reads_a_file,
        reads_a_path,
        reads_the_environment,
        calls_one_that_reads,
        asks_a_server,
        asks_a_host,
        runs_a_program,
        evaluates,
        imports_by_name,
        lazily,
        Stateful(threading.Lock()),
        Stateful(n for n in range(3)),
        Stateful(sys.stdout),
        factory(list(range(1_000_000))),
        functools.partial(scaled, scale=threading.Lock()),
        Stateful(numpy.array([object()])),
    ],
    ids=lambda reward: getattr(reward, "__name__", type(reward).__name__),
)
def test_not_recognized(reward: Any) -> None:
    assert callable_fingerprint(reward) is None


def test_what_a_method_is_called_does_not_make_it_a_builtin() -> None:
    """`model.eval()` evaluates no code."""

    def reward(completions: list[str], model: Any = None, **kwargs: Any) -> list[float]:
        model.eval()
        return [0.0] * len(completions)

    assert callable_fingerprint(reward) is not None


# -------------------------------------------------------------------------------------------------------------------
# Models and files


@pytest.fixture
def classifier(tiny_models: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(tiny_models.reward)


def test_a_reward_model_is_known_by_its_weights(classifier: Any, tiny_models: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.reward)
    before = callable_fingerprint(classifier, tokenizer)
    again = AutoModelForSequenceClassification.from_pretrained(tiny_models.reward)
    assert callable_fingerprint(again, AutoTokenizer.from_pretrained(tiny_models.reward)) == before is not None
    tokenizer("a text", padding="max_length", max_length=9, truncation=True)  # leaves traces in a fast tokenizer
    assert callable_fingerprint(classifier, tokenizer) == before
    classifier.score.weight.data[0, 0] += 1e-3
    assert callable_fingerprint(classifier, tokenizer) not in (None, before)
    tokenizer.chat_template = "{{ messages }}"
    assert callable_fingerprint(again, tokenizer) not in (None, before)
    again.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    assert callable_fingerprint(again) not in (None, callable_fingerprint(classifier), before)


def test_a_classifier_is_known_by_the_weights_in_its_folder(classifier: Any, tmp_path: Path, tiny_models: Any) -> None:
    """Trained again in the same place; and whether it has been loaded does not matter."""
    AutoTokenizer.from_pretrained(tiny_models.reward).save_pretrained(tmp_path)
    classifier.save_pretrained(tmp_path)
    reward = classified_as(str(tmp_path), 0, output="logit")
    before = callable_fingerprint(reward)
    assert callable_fingerprint(classified_as(str(tmp_path), 0, output="logit")) == before is not None
    reward(prompts=["a"], completions=["b"])
    assert callable_fingerprint(reward) == before
    classifier.score.weight.data += 0.1
    classifier.save_pretrained(tmp_path)
    assert callable_fingerprint(classified_as(str(tmp_path), 0, output="logit")) not in (None, before)


def test_a_file_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    for path in (file, str(file)):
        file.write_text("good")
        before = callable_fingerprint(factory(path))
        file.write_text("best")
        assert callable_fingerprint(factory(path)) not in (None, before)


# -------------------------------------------------------------------------------------------------------------------
# The same in another process


def test_the_same_in_every_process(modules: Any) -> None:
    """Whatever the seed of hashes, and whether a module is compiled or its compiled file is read."""
    modules(mine=MINE, helpers=HELPERS)
    script = textwrap.dedent("""
        import mine
        from trl_bayes.prior import callable_fingerprint
        from trl_bayes.rewards import contains_word, gsm8k_accuracy, parses
        from trl.rewards import think_format_reward

        names = ("reward", "vowels", "by_module", "late", "asynchronous", "nested", "scorer", "asynchronous_scorer")
        ours = [parses, gsm8k_accuracy, contains_word("a"), think_format_reward]
        print(*map(callable_fingerprint, [*(getattr(mine, name) for name in names), *ours, mine.scorer.method]))
    """)
    said = []
    for seed in ("0", "7"):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
            "PYTHONPATH": os.pathsep.join([str(modules.folder), str(Path(__file__).parents[2])]),
            "PYTHONHASHSEED": seed,
        }
        run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        said.append(run.stdout.split())
    assert list((modules.folder / "__pycache__").glob("mine*.pyc"))  # the second process read it
    assert said[0] == said[1] and len(set(said[0])) == 13 and "None" not in said[0]
    assert said[0][8] == callable_fingerprint(parses)
