"""Several processes: the options that belong to `accelerate launch`, and the launch itself, by accelerate."""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..assets import shipped_file
from ..spelling import did_you_mean
from .extras import require_extra


ACCELERATE_CONFIG = "accelerate_config"
_LAUNCHED = "TRL_BAYES_LAUNCHED"  # set for the processes that we launch: theirs is to train


def already_launched() -> bool:
    """Whether this process was started by a launcher, ours or `accelerate launch` or `torchrun`."""
    return any(name in os.environ for name in (_LAUNCHED, "LOCAL_RANK"))


def launcher_actions() -> dict[str, argparse.Action]:
    """The options of `accelerate launch` by name, such as `num_processes`."""
    positional_and_help = ("training_script", "training_script_args", "help", "module", "no_python")
    actions = {action.dest: action for action in launch_command_parser()._actions}
    return {name: action for name, action in actions.items() if name not in positional_and_help}


def split_launcher_flags(args: Sequence[str], ours: set[str]) -> tuple[list[str], list[str]]:
    """
    Divides a command line into the training command's part and the launcher's.

    Args:
        args (`Sequence[str]`): what stands behind the command.
        ours (`set[str]`): flags of the training command; they win where the launcher has the same.

    Returns:
        `tuple[list[str], list[str]]`: both in their order; a flag takes the values behind it along.
    """
    theirs = {flag for action in launcher_actions().values() for flag in action.option_strings} - ours
    theirs |= {f"--{ACCELERATE_CONFIG}", f"--{ACCELERATE_CONFIG.replace('_', '-')}"}
    parts: tuple[list[str], list[str]] = ([], [])
    belongs_to_launcher = False
    for token in args:
        if token.startswith("--"):
            belongs_to_launcher = token.partition("=")[0] in theirs
        parts[belongs_to_launcher].append(token)
    return parts


def launcher_flags_from_recipe(entries: Mapping[str, Any]) -> list[str]:
    """The launcher's options that stand in a recipe, as flags."""
    actions = launcher_actions()
    flags: list[str] = []
    for name, value in entries.items():
        is_switch = name in actions and actions[name].nargs == 0
        if is_switch and value is True:
            flags.append(f"--{name}")
        elif not is_switch and value is not None:
            flags += [f"--{name}", str(value)]
    return flags


def accelerate_config_file(name: str) -> str:
    """
    The file of an accelerate configuration.

    Args:
        name (`str`): a file, or the name of one of those in `accelerate_configs/`.

    Raises:
        ValueError: neither; one sentence with the names that there are.
    """
    if Path(name).expanduser().is_file():
        return os.path.expanduser(name)
    known = sorted(file.stem for file in shipped_file("accelerate_configs").glob("*.yaml"))
    if name not in known:
        raise ValueError(
            f"There is no accelerate configuration {name!r}{did_you_mean(name, known)}: use {known} or a file."
        )
    return str(shipped_file(f"accelerate_configs/{name}.yaml"))


def _is_of_deepspeed(config_file: str | None) -> bool:
    if config_file is None or not Path(config_file).is_file():
        return False
    config = yaml.safe_load(Path(config_file).read_text(encoding="utf-8"))
    return isinstance(config, dict) and config.get("distributed_type") == "DEEPSPEED"


def launch(module: str, launcher_flags: Sequence[str], training_args: Sequence[str]) -> None:
    """
    Runs a training command by `accelerate launch -m`, in as many processes as its configuration says.

    Args:
        module (`str`): such as `"trl_bayes.commands.f_dpg"`.
        launcher_flags (`Sequence[str]`): options of `accelerate launch`, and `--accelerate_config`.
        training_args (`Sequence[str]`): the training command's own.

    Raises:
        ValueError: options that the launcher does not take, or no such configuration.
        ImportError: it is one of DeepSpeed's, which is not installed.
        SystemExit: with the exit code of a process that failed; it has said why itself.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument(f"--{ACCELERATE_CONFIG}", f"--{ACCELERATE_CONFIG.replace('_', '-')}")
    try:
        namespace, flags = own.parse_known_args(list(launcher_flags))
    except argparse.ArgumentError:
        raise ValueError(f"`--{ACCELERATE_CONFIG}` needs a name or a file.") from None
    if namespace.accelerate_config is not None:
        flags = ["--config_file", accelerate_config_file(namespace.accelerate_config), *flags]
    args = launch_command_parser().parse_args([*flags, "--module", module, *training_args])
    if args.use_deepspeed or _is_of_deepspeed(args.config_file):
        require_extra("deepspeed", f"The accelerate configuration {namespace.accelerate_config or args.config_file!r}")
    os.environ[_LAUNCHED] = "1"
    sys.stdout.flush()
    try:
        launch_command(args)
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.returncode) from None
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        raise SystemExit(failure.exitcode) from None
    finally:
        del os.environ[_LAUNCHED]
