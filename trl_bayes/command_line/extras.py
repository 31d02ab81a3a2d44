"""Optional packages: what needs one that is not installed says which, and how to install it."""

import importlib.util


def require_extra(package: str, what: str) -> None:
    """
    Refuses what needs an optional package where it is not installed.

    Args:
        package (`str`): `"peft"` or `"deepspeed"`, which is the name of the extra too.
        what (`str`): what needs it, as the beginning of a sentence.

    Raises:
        ImportError: one sentence.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"{what} needs the package {package}, which is not installed: "
            f'`pip install "trl_bayes[{package}]"`, or `pip install ".[{package}]"` in a clone.'
        )
