"""Clone demonstrations, then train with the clone as prior and start: a recipe with a section for each stage."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from ..command_line.demonstration_recipe import DemonstrationArguments, split_section_flags, with_section_flags
from ..command_line.demonstrations import PROGRAM, prepare, run_stages
from ..command_line.launch import already_launched, launch
from ..command_line.parser import RecipeParser
from ..command_line.prompts import PromptError
from ..command_line.recipe import read_command_line, read_recipe
from ..command_line.refusals import one_sentence
from ..command_line.stages import StageError
from ..prior import PriorSamplesError


def main(argv: Sequence[str] | None = None) -> None:
    """
    Runs the stages that are not done yet.

    Raises:
        SystemExit: code 2 after one sentence on stderr, for anything that is wrong with the recipe.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = RecipeParser(
        [DemonstrationArguments],
        prog=PROGRAM,
        usage="trl-bayes demo-rl --config RECIPE [--SECTION.KEY VALUE ...] [--accelerate_config NAME_OR_PATH]",
        description=__doc__,
        epilog="`--clone.max_steps 100` sets what a section says; `env` in a recipe is a mapping of variables.",
    )
    with one_sentence(PROGRAM):
        others, section_flags = split_section_flags(argv)
        namespace, _ = parser.parse_known_args(others)
        recipe = with_section_flags({} if namespace.config is None else read_recipe(namespace.config), section_flags)
        launcher_flags, own_args = read_command_line(parser, others, recipe)
        if launcher_flags and not already_launched():
            as_yaml = [(f"--{section}.{key}", _as_yaml(value)) for section, key, value in section_flags]
            again = [word for flag in as_yaml for word in flag]
            return launch("trl_bayes.commands.demo_rl", launcher_flags, [*own_args, *again])
        (arguments,) = parser.parse_args_into_dataclasses(own_args)[:1]
        job = prepare(arguments, str(namespace.config or "the command line"))
    with one_sentence(PROGRAM, (PriorSamplesError, PromptError, StageError)):  # other errors keep their traceback
        run_stages(job)


def _as_yaml(value: Any) -> str:
    """On one line, to be read again as it was."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf).strip()


if __name__ == "__main__":
    main()
