"""The data of a recipe: a data set, a file, a folder, the prompts of an embedded model or a mixture, as prompts."""

import os
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from ..assets import EMBEDDED, embedded_path, own_or_shipped
from ..language_models.prompts import check_prompt
from ..rewards.calling import check_columns
from ..spelling import did_you_mean
from .arguments import TrainingScriptArguments
from .models import first_sentence
from .prompts import PromptError, with_prompts


_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4")
_PROMPTS = "prompts.jsonl"  # beside an embedded model


def load_data(script: ScriptArguments, mixture: DatasetMixtureConfig) -> DatasetDict | IterableDatasetDict:
    """
    The data sets by split: an id, a local file or folder, the prompts of an embedded model, or a mixture.

    Raises:
        ValueError: none is named, or it cannot be loaded; one sentence.
    """
    name = script.dataset_name
    if mixture.datasets:
        name = ", ".join(part.path for part in mixture.datasets)
        if script.dataset_name:
            raise ValueError("The data is given twice, as `dataset_name` and as `datasets`: leave one of them out.")
    elif name is None:
        raise ValueError("`dataset_name` is missing: name a data set with a column `prompt`, by id, file or folder.")
    for part in mixture.datasets:
        part.path = os.path.expanduser(part.path)
    try:
        return get_dataset(mixture) if mixture.datasets else _load_named(script)
    except StopIteration:
        raise ValueError(f"The data set {name!r} cannot be loaded (a file is empty).") from None
    except (OSError, ValueError, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ is not None else error
        raise ValueError(f"The data set {name!r} cannot be loaded ({first_sentence(cause)}).") from None


def _load_named(script: ScriptArguments) -> Any:
    name = os.path.expanduser(embedded_path(str(script.dataset_name), _PROMPTS))
    file_format = _file_format(name)
    settings = {"name": script.dataset_config, "streaming": script.dataset_streaming}
    if file_format is None:
        return load_dataset(name, **settings)
    file = own_or_shipped(name)
    if not file.is_file():
        raise FileNotFoundError("no such file")
    return load_dataset(file_format, data_files=str(file), **settings)


def _file_format(name: str) -> str | None:
    """The format of a file by its suffix, in capitals or not, compressed or not; `None` for what is no file."""
    path = Path(name.lower())
    return _FORMATS.get(path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix)


def select_split(dataset: Any, split: str, script: TrainingScriptArguments) -> Any:
    """
    One split of the data, checked to have prompts, each a text or messages.

    Of a stream only the first row is looked at now; a later one is refused when its turn comes, by [`PromptError`].

    Raises:
        ValueError: there is no such split, or no column `prompt`, or no row in it, or a prompt is no prompt; one
            sentence.
    """
    if split not in dataset:
        raise ValueError(f"The data has no split {split!r}{did_you_mean(split, dataset)}: it has {list(dataset)}.")
    rows = with_prompts(dataset[split], script.prompt_template, script.prompt_words, script.prompt_as_message)
    columns = rows.column_names
    if columns is not None and "prompt" not in columns:
        raise ValueError(
            f"The data's split {split!r} has no column 'prompt': it has {columns}; see `prompt_template`."
        )
    check_columns(columns)
    if not isinstance(rows, Dataset):
        rows = rows.map(_checked)
        next(iter(rows), None)
        return rows
    if len(rows) == 0:
        raise ValueError(f"The data's split {split!r} has no rows.")
    for prompt in rows["prompt"]:
        check_prompt(prompt)
    return rows


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    try:
        check_prompt(row.get("prompt"))
    except ValueError as error:
        raise PromptError(str(error)) from None
    return row


def hub_dataset(name: str | None) -> str | None:
    """The name of a data set if it is one on the Hub, which is what a model card can link to."""
    if name is None or name.startswith(EMBEDDED) or os.path.exists(os.path.expanduser(name)) or _file_format(name):
        return None
    return name
