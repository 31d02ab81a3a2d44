"""Log-probabilities that are kept in a folder, so that work which was stopped does not score a completion twice."""

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel

from ..language_models.completions import Completions
from ..language_models.fingerprint import model_fingerprint
from ..language_models.progress import progress_bar
from ..language_models.scoring import log_probs
from ..language_models.settings import SamplingSettings
from .identity import stable_hash
from .store import PriorSamplesError
from .writing import write_whole


_AT_ONCE = 256  # completions that a killed run loses at most
_SCHEMA = pa.schema([("outcome", pa.int64()), ("log_prob", pa.float64())])


class KeptLogProbs:
    """
    `log pi(y|x)` of one model, as [`~trl_bayes.language_models.scoring.log_probs`] gives it, each found once.

    To be called in its place. The values are known by the model's weights and precision, the temperature, and the
    tokens of prompt and completion; each chunk of 256 is a file that appears at once and whole.

    Args:
        folder (`str` or `Path`): of many models; that of this one is made in it.
        model ([`~transformers.PreTrainedModel`]): the only one that it can then be called with.
        name (`str`): folder or id that it was loaded from.

    Raises:
        PriorSamplesError: a file in the folder cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], model: PreTrainedModel, name: str):
        precision = next(model.parameters()).dtype
        self._model, self._identity = model, f"{model_fingerprint(name, model)} {precision}"
        self._folder = Path(folder)
        self._known: dict[Path, dict[int, float]] = {}  # of each temperature's folder

    def __call__(self, model: PreTrainedModel, completions: Completions, settings: SamplingSettings) -> torch.Tensor:
        """(N,) float64 on CPU, in nats."""
        if model is not self._model:
            raise ValueError("These log-probabilities are kept for another model: make a `KeptLogProbs` for each.")
        folder = self._folder / f"{stable_hash([self._identity, settings.temperature]):015x}"
        keys = [stable_hash([completions.prompt_ids[prompt], list(ids)]) for prompt, ids in completions.outcomes()]
        if folder not in self._known:
            self._known[folder] = _read(folder)
        known = self._known[folder]
        place_of = {key: place for place, key in enumerate(keys) if key not in known}  # one of those that are the same
        if place_of:
            with progress_bar("scoring", len(place_of), shown=settings.progress) as bar:
                for chunk in torch.tensor([*place_of.values()]).split(_AT_ONCE):
                    values = log_probs(model, completions.select(chunk), replace(settings, progress=False)).tolist()
                    found = dict(zip([keys[place] for place in chunk.tolist()], values, strict=True))
                    _add(folder, found)
                    known.update(found)
                    bar.update(len(found))
        return torch.tensor([known[key] for key in keys], dtype=torch.float64)


def _read(folder: Path) -> dict[int, float]:
    known: dict[int, float] = {}
    for file in sorted(folder.glob("log_probs-*.parquet")):
        try:
            table = pq.read_table(file, schema=_SCHEMA)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise PriorSamplesError(f"{file} cannot be read ({error}): delete it, and it is made again.") from None
        known.update(zip(table["outcome"].to_pylist(), table["log_prob"].to_pylist(), strict=True))
    return known


def _add(folder: Path, found: dict[int, float]) -> None:
    table = pa.table({"outcome": list(found), "log_prob": list(found.values())}, schema=_SCHEMA)
    write_whole(folder / f"log_probs-{min(found):015x}.parquet", lambda path: pq.write_table(table, path))
