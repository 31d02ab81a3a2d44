"""Files that come with the package, found where they are: in an installed package or in a clone."""

from pathlib import Path


EMBEDDED = "embedded:"
"""Prefix of a model or a data set that is shipped with the package, as in `embedded:python_lines`."""

_PACKAGE = Path(__file__).parents[1]


def shipped_file(relative: str) -> Path:
    """
    The path of a file or folder of `accelerate_configs/` or `recipes/`.

    An installed package has them inside, a clone at its top level.

    Args:
        relative (`str`): such as `"accelerate_configs/zero3.yaml"`.

    Raises:
        FileNotFoundError: if it is in neither place.
    """
    for folder in (_PACKAGE, _PACKAGE.parent):
        if (folder / relative).exists():
            return folder / relative
    raise FileNotFoundError(f"{relative!r} does not come with trl_bayes.")


def own_or_shipped(path: str) -> Path:
    """
    A file of the user's; where there is none of that name, the one of `recipes/` that comes with the package.

    So a recipe and its data are found from any folder, by the path that they have in a clone.

    Args:
        path (`str`): such as `"recipes/python_syntax/dpg.yaml"`.
    """
    own = Path(path).expanduser()
    if own.exists() or own.parts[:1] != ("recipes",):
        return own
    try:
        return shipped_file(path)
    except FileNotFoundError:
        return own


def embedded_path(name: str, file: str = "") -> str:
    """
    Where a shipped model is, or a file beside it; a name without the prefix `embedded:` is returned as it is.

    Args:
        name (`str`): `"embedded:python_lines"`, or the id or path of anything else.
        file (`str`, *optional*): a file in the folder, such as `"prompts.jsonl"`.

    Raises:
        FileNotFoundError: the package has no such folder or file; the message says which recipe builds it.
    """
    if not name.startswith(EMBEDDED):
        return name
    folder = Path(__file__).parent / name.removeprefix(EMBEDDED)
    wanted = folder / (file or "config.json")
    if not wanted.is_file():
        raise FileNotFoundError(
            f"{name!r} has no {wanted.name} in {folder}: build it with recipes/embedded_prior/build_prior.py."
        )
    return str(wanted if file else folder)
