"""TRL's parser, strict: a recipe's keys and values are checked before anything is loaded, and help is grouped."""

import argparse
import os
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, Union, cast, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from ..assets import own_or_shipped
from ..spelling import did_you_mean
from .refusals import refuse


class RecipeParser(TrlParser):
    """
    A [`~trl.TrlParser`] that refuses what it does not know, each with one sentence that names the nearest known one.

    What differs from its parent: values in the YAML must have the type of their field; what is not a field is handed
    back to the caller ([`~RecipeParser.unknown_keys`]) and not passed over; errors are one line on stderr, exit code
    2; and `--help` lists fields under the class that defines them.
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs: Any):
        super().__init__(cast(Any, dataclass_types), allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="RECIPE", help="YAML file with any of the fields below; flags beat it.")
        self.add_argument(
            "--accelerate_config",
            metavar="NAME_OR_PATH",
            help="Run through accelerate's launcher with this configuration: one that comes with the package "
            "(zero3, fsdp2, ddp, ...) or a file. Any option of `accelerate launch` does the same.",
        )
        self._hints = {name: hint for c in self.dataclass_types for name, hint in get_type_hints(c).items()}

    @property
    def fields(self) -> dict[str, argparse.Action]:
        """The action of each field."""
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            actions.setdefault(action.dest, action)  # the complement `--no_field` comes second
        return {name: action for name, action in actions.items() if name in self._hints}

    @property
    def flags(self) -> set[str]:
        """All that can stand on the command line."""
        return set(self._option_string_actions)

    def unknown_keys(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a recipe that are no field."""
        return {key: value for key, value in config.items() if key not in self.fields and key != "env"}

    def use_recipe(self, config: Mapping[str, Any], source: str) -> None:
        """
        Makes a recipe's values the defaults, and sets the environment variables under its key `env`.

        Args:
            config (`Mapping`): the recipe, as [`read_recipe`] gives it. Keys that are no field are passed over.
            source (`str`): its file, for messages.

        Raises:
            ValueError: a value of the wrong type; one sentence.
        """
        variables = config.get("env", {})
        if not isinstance(variables, Mapping):
            raise ValueError(f"`env` in {source} must be a mapping of environment variables, but is {variables!r}.")
        values = self.values(config, source)
        os.environ.update({str(name): str(value) for name, value in variables.items()})
        self.set_defaults_with_config(**values)

    def values(self, config: Mapping[str, Any], source: str) -> dict[str, Any]:
        """
        The values that a recipe gives to fields, each in the type of its field.

        Raises:
            ValueError: a value of the wrong type; one sentence.
        """
        return {name: self._checked(name, config[name], source) for name in self.fields if name in config}

    def _checked(self, name: str, value: Any, source: str) -> Any:
        """A value of a recipe in the type of its field."""
        action, hint = self.fields[name], self._hints[name]
        if value is False and "no" in (action.choices or ()):
            value = "no"  # YAML reads the word as a boolean
        members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        kinds = {_kind(member) for member in members}
        if list in kinds and kinds <= {list, type(None)} and not isinstance(value, list) and value is not None:
            value = [value]
        if isinstance(value, list) and list in kinds:
            return [self._checked_item(name, item, source) for item in value]
        if isinstance(value, Mapping | list) or value is None:
            if type(value) not in kinds and not (value is None and type(None) in kinds):
                raise ValueError(f"`{name}` in {source} must be {_expected(action)}, but is {value!r}.")
            return value
        if type(value) in kinds - {str} and not action.choices:
            return value
        return self._converted(name, value, source)

    def _checked_item(self, name: str, item: Any, source: str) -> Any:
        """An entry of a list; where it is not a number, a mapping stands for an object that the caller makes."""
        if isinstance(item, Mapping) and self.fields[name].type not in (int, float):
            return item
        return self._converted(name, item, source)

    def _converted(self, name: str, value: Any, source: str) -> Any:
        """A single value, by the same function as on the command line."""
        action = self.fields[name]
        convert = action.type if callable(action.type) else str
        text = str(int(value)) if convert is int and isinstance(value, float) and value.is_integer() else str(value)
        try:
            converted = convert(text)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            raise ValueError(f"`{name}` in {source} must be {_expected(action)}, but is {value!r}.") from None
        if action.choices is not None and converted not in action.choices:
            hint = did_you_mean(value, map(str, action.choices))
            raise ValueError(f"`{name}` in {source} must be {_expected(action)}, but is {value!r}{hint}.")
        return converted

    def error(self, message: str) -> NoReturn:
        """One sentence on stderr and exit code 2."""
        refuse(self.prog, message)

    def format_help(self) -> str:
        """The help, with the fields under the class that defines them; the most specific classes first."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        own = [action for action in self._actions if action.dest not in self._hints]
        for title, actions in [("options", own), *self._sections()]:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _sections(self) -> list[tuple[str, list[argparse.Action]]]:
        sections: dict[type, list[argparse.Action]] = {}
        for dataclass_type in self.dataclass_types:
            for owner in dataclass_type.__mro__:
                sections.setdefault(owner, [])
            for action in self._actions:
                if action.dest in dataclass_type.__dataclass_fields__:
                    sections[_owner(dataclass_type, action.dest)].append(action)
        packages = {owner: owner.__module__.partition(".")[0] for owner in sections}
        ours_first = sorted(sections, key=lambda owner: packages[owner] != "trl_bayes")
        return [(f"{owner.__name__} ({packages[owner]})", sections[owner]) for owner in ours_first if sections[owner]]


def read_recipe(path: str) -> dict[str, Any]:
    """
    A recipe from its YAML file, which may be one that comes with the package.

    Raises:
        ValueError: no such file, not YAML, or not a mapping; one sentence.
    """
    try:
        config = yaml.load(own_or_shipped(path).read_text(encoding="utf-8"), Loader=_RecipeLoader)
    except OSError as error:
        raise ValueError(f"The recipe {path!r} cannot be read: {error.strerror or error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {path!r} is not YAML: {error}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"The recipe {path!r} must be a mapping of fields to values, as in `beta: 0.1`.")
    return {str(key): value if isinstance(value, Exponent) else _plain(value) for key, value in config.items()}


class Exponent(float):
    """A number as in `1e-3`, which a field that is a text, such as a revision, takes as it is written."""

    written: str

    def __str__(self) -> str:
        return self.written


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.2's numbers: in YAML 1.1 `1e-3` is a text, and only `1.0e-3` is a number."""

    def construct_exponent(self, node: yaml.ScalarNode) -> Exponent:
        """A number that keeps how it is written."""
        number = Exponent(self.construct_yaml_float(node))
        number.written = str(node.value)
        return number


_RecipeLoader.add_implicit_resolver(
    "!exponent", re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+.0123456789")
)
_RecipeLoader.add_constructor("!exponent", _RecipeLoader.construct_exponent)


def _plain(value: Any) -> Any:
    """What stands in lists and mappings, without what only a field could ask for."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return float(value) if isinstance(value, Exponent) else value


def _kind(hint: Any) -> Any:
    return get_origin(hint) or hint


def _owner(dataclass_type: type, field: str) -> type:
    """The class that defines a field, or defines it anew."""
    return next(c for c in dataclass_type.__mro__ if field in c.__dict__.get("__annotations__", {}))


def _expected(action: argparse.Action) -> str:
    """The type of a field in words."""
    if action.choices is not None:
        return f"one of {[str(choice) for choice in action.choices]}"
    words = {"int": "a whole number", "float": "a number", "str": "a text", "string_to_bool": "true or false"}
    name = getattr(action.type, "__name__", "str")
    word = words.get(name, f"a {name}")
    return f"a list, each entry {word}" if action.nargs == "+" else word
