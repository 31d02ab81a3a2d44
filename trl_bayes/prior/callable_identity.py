"""What a reward function is, so that rewards kept on disk are used again only if it would give them again.

The name says little: `length_between(maximum=3)` and `length_between(maximum=8)` have the same. What is compared is
all that a function's values depend on and that can be seen: its code, defaults and closure, the globals it uses and
what these use in turn, the state and class of an instance, the weights of a model, the version of a library.
"""

import dis
import enum
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import re
import site
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from ..language_models.fingerprint import parameters_fingerprint, path_fingerprint, plain_config


_PLAIN = (type(None), bool, int, float, complex, bytes, range, type(Ellipsis), torch.dtype, torch.device)
_MODULE_ATTRIBUTES = ("__doc__", "__dict__", "__weakref__", "__module__", "__annotations__", "__dataclass_fields__")
# With these, values may depend on what is not in the program: files, the environment, code that is not there yet
_SEES_OUTSIDE = {
    *("open", "read_text", "read_bytes", "environ", "getenv", "urlopen", "import_module"),
    *("listdir", "glob", "connect"),
    *("fromfile", "genfromtxt", "load", "load_dataset", "load_file", "load_from_disk"),
    *("loadtxt", "read_csv", "read_excel", "read_json", "read_parquet", "read_table"),
}
_BUILTIN_SEES_OUTSIDE = {"eval", "exec", "globals", "input", "__import__"}  # `model.eval()` does not
# Libraries whose version does not stand for what they return: servers and other programs
_LIBRARIES_SEE_OUTSIDE = {
    *("aiohttp", "httpx", "requests", "socket", "subprocess"),
    *("anthropic", "gradio_client", "litellm", "openai"),
}
_MOST_PARTS = 100_000  # of a function that is described; whatever holds more is data and no function


class _UnknownError(Exception):
    """Something whose behavior cannot be told."""


def callable_fingerprint(function: Any, processing_class: Any = None) -> str | None:
    """
    A fingerprint of all that the values of a reward function, or of a tool, depend on.

    Arguments that a factory was called with are in the closure, those of a `functools.partial` in the partial; async
    functions, callable instances, bound methods and reward models are looked into in the same way. The name does not
    matter. Two fingerprints may differ where the values would not (another Python or library, a new docstring).

    Args:
        function (`Callable` or `torch.nn.Module`): the reward function, as the trainer calls it.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): the tokenizer of a reward model.

    Returns:
        `str`, *optional*: `None` where it cannot be told: the function reads files or the environment, or has state
        that cannot be looked into.
    """
    digest = _Digest()
    try:
        digest.add(function)
        digest.add(processing_class)
    except Exception:  # whatever an unknown object does when it is looked at, it is unknown
        return None
    return digest.hexdigest()


class _Digest:
    """A hash of whatever is added to it, part by part."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen: dict[int, tuple[int, Any]] = {}  # by id, with the object, so that no id is used twice
        self._used: set[tuple[str, str]] = set()  # of modules: their names, and what is used of them
        self._parts = 0

    def hexdigest(self) -> str:
        return self._hash.hexdigest()[:16]

    def _say(self, *parts: Any) -> None:
        for part in parts:
            data = part if isinstance(part, bytes) else str(part).encode()
            self._hash.update(f"{len(data)}:".encode() + data)

    def add(self, value: Any) -> None:
        """Adds a value of any kind."""
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise _UnknownError("too large")
        if isinstance(value, _PLAIN):
            return self._say(type(value).__name__, repr(value))
        if isinstance(value, str | Path):  # of a file or a model, its content
            return self._say("text", str(value), path_fingerprint(str(value)))
        if isinstance(value, types.ModuleType):
            return self._add_used(value, list(vars(value)))
        if type(value) not in (tuple, frozenset):  # constants, of which Python may or may not share equal ones
            if id(value) in self._seen:
                return self._say("seen", self._seen[id(value)][0])
            self._seen[id(value)] = len(self._seen), value
        for kinds, describe in _DESCRIBERS:
            if isinstance(value, kinds):
                return describe(self, value)
        if type(value).__module__ == "typing":
            return self._say("type", repr(value))
        self._add_instance(value)

    def add_sequence(self, values: Any) -> None:
        self._say(len(values))
        self._add_kind(values)
        for value in values:
            self.add(value)

    def _add_kind(self, value: Any) -> None:
        """The class of a container, which may have methods of its own."""
        kind = type(value)
        self._say(kind.__name__) if kind.__module__ == "builtins" else self.add(kind)

    def add_set(self, values: Any) -> None:
        each = []
        for value in values:
            part = _Digest()
            part.add(value)
            each.append(part.hexdigest())
        self._add_kind(values)
        self._say(*sorted(each))

    def add_mapping(self, values: Any) -> None:
        self._say(len(values))
        self._add_kind(values)
        for key, value in values.items():
            self.add(key)
            self.add(value)

    # ---------------------------------------------------------------------------------------------------------------
    # Code

    def add_function(self, function: types.FunctionType) -> None:
        self._say("function")
        self.add((function.__defaults__, function.__kwdefaults__, function.__dict__))
        self.add(tuple(_content(cell) for cell in function.__closure__ or ()))
        library = _library(function.__module__)
        if library is not None:  # whose version stands for its code; of functions in a function, the code says which
            self._say(function.__module__, function.__qualname__, library)
            return self.add_code(function.__code__) if "<" in function.__qualname__ else None
        self.add_code(function.__code__)
        names = _names(function)
        outside = {*names.used, *names.attributes} & _SEES_OUTSIDE | {*names.used} & _BUILTIN_SEES_OUTSIDE
        if outside:
            raise _UnknownError(f"it uses {sorted(outside)}")
        for name in names.used:
            if name in function.__globals__:
                self._say(name)
                self._add_used(function.__globals__[name], names.attributes)
        for name in names.imported:
            self._say(name, library := _library(name))
            if library is None:
                self._add_used(importlib.import_module(name), names.attributes)

    def _add_used(self, value: Any, names: Iterable[str]) -> None:
        """What a function uses; of a module of one's own, these names of it."""
        if not isinstance(value, types.ModuleType):
            return self.add(value)
        module, library = value.__name__, _library(value.__name__)
        self._say("module", module, library)
        for name in names if library is None else []:
            if name in vars(value) and (module, name) not in self._used:
                self._used.add((module, name))
                self._say(name)
                self._add_used(vars(value)[name], names)

    def add_code(self, code: types.CodeType) -> None:
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        self._say("code", code.co_code, code.co_exceptiontable, counts, names)
        for constant in code.co_consts:
            self.add_code(constant) if isinstance(constant, types.CodeType) else self.add(constant)

    def add_class(self, cls: type) -> None:
        library = _library(cls.__module__)
        self._say("class", cls.__module__, cls.__qualname__, library)
        if library is not None:
            return
        for base in cls.__bases__:
            self.add(base)
        for name, value in vars(cls).items():
            if name not in _MODULE_ATTRIBUTES and not name.startswith("_abc_"):
                self._say(name)
                self.add(value)

    def add_property(self, value: property) -> None:
        self._say("property")
        self.add((value.fget, value.fset, value.fdel))

    def add_wrapper(self, value: Any) -> None:
        """A static method, a cached function or the like."""
        self._say(type(value).__name__)
        self.add(value.__wrapped__)

    def add_partial(self, value: functools.partial) -> None:
        self._say("partial")
        self.add((value.func, value.args, value.keywords, vars(value)))

    def add_method(self, value: types.MethodType) -> None:
        self._say("method")
        self.add(value.__func__)
        self.add(value.__self__)

    def add_builtin(self, value: Any) -> None:
        """Written in C: the version of its library stands for it; `pattern.search` has an owner besides."""
        owner = getattr(value, "__self__", None)
        self._say("builtin", value.__qualname__, sys.version)
        self._add_used(owner, []) if isinstance(owner, types.ModuleType) else self.add(owner)

    # ---------------------------------------------------------------------------------------------------------------
    # Data

    def add_enum(self, value: enum.Enum) -> None:
        self._say("enum", value.name)
        self.add(type(value))

    def add_named(self, value: Any) -> None:
        """A logger, or a slot of a class: its name is all that there is to it."""
        self._say(type(value).__name__, getattr(value, "name", None) or value.__name__)

    def add_array(self, value: Any) -> None:
        array = numpy.asarray(value)
        if array.dtype.hasobject:
            raise _UnknownError("an array of objects")
        self._say("array", array.dtype, array.shape, numpy.ascontiguousarray(array).tobytes())

    def add_tensor(self, value: torch.Tensor) -> None:
        self._say("tensor", value.dtype, tuple(value.shape), parameters_fingerprint({"": value}))

    def add_model(self, model: torch.nn.Module) -> None:
        parameters = parameters_fingerprint(model.state_dict(keep_vars=True))
        if parameters is None:
            raise _UnknownError("a model whose weights are not here")
        self._say("model", type(model).__qualname__, parameters)
        config = getattr(model, "config", None)
        self._say(json.dumps(plain_config(config.to_dict()), default=str) if config is not None else str(model))
        for kind in dict.fromkeys(type(module) for module in model.modules()):
            self.add(kind)

    def _add_instance(self, value: Any) -> None:
        """Its class and its state, as `pickle` would see it."""
        if hasattr(value, "backend_tokenizer"):
            return self._add_tokenizer(value)
        reduced = value.__reduce_ex__(4)
        if isinstance(reduced, str):
            raise _UnknownError("a global")
        self._say("instance")
        self.add(type(value))
        for part in reduced[1:]:
            self.add(list(part) if isinstance(part, Iterator) else part)

    def _add_tokenizer(self, tokenizer: Any) -> None:
        """Without what a call changes: how it pads and truncates."""
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        kept = {name: value for name, value in backend.items() if name not in ("padding", "truncation")}
        self._say("tokenizer", type(tokenizer).__qualname__, json.dumps(kept), tokenizer.chat_template)
        self._say(sorted(tokenizer.special_tokens_map.items(), key=str))


_DESCRIBERS: list[tuple[Any, Callable[[_Digest, Any], None]]] = [
    (enum.Enum, _Digest.add_enum),
    ((tuple, list), _Digest.add_sequence),
    ((set, frozenset), _Digest.add_set),
    ((dict, types.MappingProxyType), _Digest.add_mapping),
    (types.FunctionType, _Digest.add_function),
    (types.MethodType, _Digest.add_method),
    (functools.partial, _Digest.add_partial),
    (type, _Digest.add_class),
    (property, _Digest.add_property),
    ((staticmethod, classmethod, functools._lru_cache_wrapper), _Digest.add_wrapper),
    ((types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType), _Digest.add_builtin),
    (types.MethodWrapperType, _Digest.add_builtin),
    ((logging.Logger, types.MemberDescriptorType, types.GetSetDescriptorType), _Digest.add_named),
    (torch.nn.Module, _Digest.add_model),
    (torch.Tensor, _Digest.add_tensor),
    ((numpy.ndarray, numpy.generic), _Digest.add_array),
    (re.Pattern, lambda digest, pattern: digest._say("pattern", pattern.pattern, pattern.flags)),
    ((types.GenericAlias, types.UnionType), lambda digest, value: digest._say("type", repr(value))),
]


def _content(cell: types.CellType) -> Any:
    """What a closure holds; nothing yet where a function is defined further down."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


class _Names(NamedTuple):
    """What a function's code refers to, each in the order of its first use."""

    used: list[str]  # globals and builtins
    attributes: list[str]  # of whatever
    imported: list[str]  # modules, when it is called


def _names(function: types.FunctionType) -> _Names:
    """Of a function, and of what is defined inside of it."""
    names = _Names([], [], [])
    for code in _codes(function.__code__):
        instructions = [each for each in dis.get_instructions(code) if each.opname != "EXTENDED_ARG"]
        for place, instruction in enumerate(instructions):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                names.used.append(instruction.argval)
            elif instruction.opname == "IMPORT_NAME":
                level = instructions[place - 2].argval  # what is pushed before: the level, and the names to import
                name = "." * level + instruction.argval
                names.imported.append(importlib.util.resolve_name(name, function.__globals__.get("__package__")))
            elif instruction.opcode in dis.hasname:
                names.attributes.append(instruction.argval)
    return _Names(*(list(dict.fromkeys(part)) for part in names))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of what is defined inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


@functools.cache
def _library(module: str | None) -> str | None:
    """The version of the library that a module is of; `None` for a module of the user's own, or of this package."""
    top = (module or "").partition(".")[0]
    if top in _LIBRARIES_SEE_OUTSIDE:
        raise _UnknownError(f"it uses {top}")
    if top in sys.stdlib_module_names and top != "__main__":
        return sys.version
    try:
        spec = importlib.util.find_spec(top) if top not in ("", "__main__", "trl_bayes") else None
    except (ImportError, ValueError):
        spec = None
    places = [*(spec.submodule_search_locations or ()), spec.origin or ""] if spec is not None else []
    if not any(Path(place).is_relative_to(folder) for place in places for folder in _library_folders()):
        return None
    distributions = _distributions().get(top, [])
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(distributions))) or "library"


@functools.cache
def _library_folders() -> list[str]:
    paths = sysconfig.get_paths()
    return [*(paths[name] for name in ("purelib", "platlib")), *site.getsitepackages(), site.getusersitepackages()]


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()
