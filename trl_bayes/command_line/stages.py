"""A command of several stages: each in a folder of its own, resumed where it stopped, and not repeated for nothing."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..prior.writing import write_whole
from ..trainers.checkpoints import last_whole_checkpoint


RECORD = "stage.json"
"""In the folder of each stage: its identity, whether it is finished, and what it has measured."""

_NO_PART_OF_THE_RESULT = (
    "dataset_name",  # the rows count, wherever they lie
    "disable_tqdm",
    "log_completions",
    "logging_steps",
    "logging_strategy",
    "report_to",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
)


class StageError(ValueError):
    """A stage cannot go on with what an earlier one has given; one sentence."""


@dataclass(frozen=True)
class Stage:
    """
    A stage: its folder, and what its result depends on.

    Attributes:
        name (`str`): of its section in the recipe, and of its folder.
        folder (`Path`): where it writes, under the command's `output_dir`.
        settings (`Mapping`): its section of the recipe.
        data (`str`): fingerprint of the rows that it reads.
        previous (`str`): fingerprint of the stage before it; empty for the first.
        functions (`str`): fingerprint of the reward functions that it calls.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    data: str
    previous: str = ""
    functions: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for the stage to be the same."""
        kept = {key: value for key, value in self.settings.items() if key not in _NO_PART_OF_THE_RESULT}
        return {
            "settings": json.loads(json.dumps(kept, default=str)),
            "data": self.data,
            "functions": self.functions,
            "previous": self.previous,
        }

    @property
    def fingerprint(self) -> str:
        """By which the next stage knows this one."""
        return fingerprint([self.identity])

    @property
    def finished(self) -> bool:
        """Whether the stage has come to its end."""
        return bool(self._record().get("finished"))

    @property
    def figures(self) -> dict[str, Any]:
        """What the finished stage has measured."""
        return dict(self._record().get("figures", {}))

    @property
    def checkpoint(self) -> str | None:
        """The last checkpoint that a kill has left whole, if there is any."""
        return last_whole_checkpoint(self.folder)

    def _record(self) -> dict[str, Any]:
        file = self.folder / RECORD
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}): set `--overwrite`, or name another folder.") from None

    # ---------------------------------------------------------------------------------------------------------------

    def check_folder(self) -> None:
        """
        Refuses a folder that holds something else.

        Raises:
            ValueError: it has other settings, other data or another stage before it, or is no stage's; one sentence.
        """
        advice = "set `--overwrite` to do this and the later stages again, or name another `output_dir`"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(
                f"The folder {self.folder} of the stage `{self.name}` is a file: name another `output_dir`."
            )
        found = self._record().get("identity")
        if found is None and self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"The folder {self.folder} of the stage `{self.name}` holds something else: {advice}.")
        if found not in (None, self.identity):
            raise ValueError(
                f"The folder {self.folder} holds the stage `{self.name}` {_difference(found, self.identity)}: "
                f"{advice}."
            )

    def clear(self) -> None:
        """Removes all that the stage has written."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    def begin(self) -> None:
        """Makes the folder, and says in it whose it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write({"identity": self.identity, "finished": False})

    def finish(self, figures: Mapping[str, Any]) -> None:
        """Marks the stage as done, with what it has measured (strict JSON)."""
        self._write({"identity": self.identity, "finished": True, "figures": dict(figures)})

    def _write(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        write_whole(self.folder / RECORD, lambda path: path.write_text(text, encoding="utf-8"))


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In what a stage differs from another, in words."""
    before, now = found.get("settings", {}), wanted["settings"]
    keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    parts = [f"other settings ({', '.join(keys)})"] if keys else []
    parts += ["other data"] if found.get("data") != wanted["data"] else []
    if found.get("functions") != wanted["functions"]:
        parts.append("other reward functions, or other versions of what they use")
    parts += ["another stage before it"] if found.get("previous") != wanted["previous"] else []
    return "with " + " and ".join(parts or ["another identity"])


def fingerprint(parts: Iterable[Any]) -> str:
    """A short digest of JSON values, in their order."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Several processes: the first one writes, and the others wait for it


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
