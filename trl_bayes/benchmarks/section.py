"""What a section of `trl-bayes bench` is made of: its arguments, and what it has found so far.

A section is a module of this folder with a function `run(args, progress)`. Its name is the module's with dashes, its
help the first line of the module's docstring, and its flags are the fields of the dataclass that `args` is annotated
with, a [`SectionArguments`]. `run` shows how far it is on a [`~rich.progress.Progress`] and yields [`Findings`] after
each measurement.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from ..spelling import did_you_mean
from .figure import TrainingCurves


class Findings(NamedTuple):
    """What a section has measured so far."""

    record: Any
    """Everything; in the JSON file what is not finite is `null`."""
    markdown: str
    """A heading of the second level, and tables."""
    curves: Sequence[TrainingCurves] = ()
    """For the figure; none if there is nothing to draw."""
    figure: bytes | None = None
    """A PNG file of the section's own, in place of one of curves."""


@dataclass
class SectionArguments:
    r"""
    Arguments of every section.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"runs/bench"`): where `<page>.json`, `<page>.md` and `<page>.png`
            go; sections with the same `page` are written together.
    """

    page: ClassVar[str] = "bench"

    output_dir: str = field(default="runs/bench", metadata={"help": "Where the results are written."})

    def check(self) -> None:  # noqa: B027 - most sections run anywhere
        """Raises `ValueError`, one sentence, if this machine cannot run the section."""


@dataclass
class DeviceArguments(SectionArguments):
    r"""
    Arguments of a section that also runs on a GPU.

    Parameters:
        device (`str`, *optional*, defaults to `"cpu"`): `cpu` or `cuda`.
    """

    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})

    def __post_init__(self) -> None:
        check_words("device", [self.device], ("cpu", "cuda"))

    @property
    def use_cpu(self) -> bool:
        return self.device == "cpu"

    def check(self) -> None:
        """Makes one GPU visible, since with several the Trainer would split each batch; `ValueError` without any."""
        if self.use_cpu:
            return
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # read when CUDA is first asked for, below
        if not torch.cuda.is_available():
            raise ValueError("`device=cuda`, but torch finds no CUDA GPU: set `--device cpu`.")


def check_words(name: str, given: Iterable[str], known: Sequence[str]) -> None:
    """
    Checks the words of a field.

    Raises:
        ValueError: a word that is not known; one sentence with the nearest one.
    """
    for word in given:
        if word not in known:
            raise ValueError(f"`{name}`: {word!r} is not one of {', '.join(known)}{did_you_mean(word, known)}.")
