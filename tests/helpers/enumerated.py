"""A prior all of whose completions are enumerated: their log-probabilities by name, and which of them are kept."""

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from trl_bayes.benchmarks.tiny import EnumerableTask


Completion = tuple[int, ...]


def log_probs_of(
    task: EnumerableTask, model: Any, tokenizer: PreTrainedTokenizerBase, temperature: float = 1.0
) -> dict[str, dict[Completion, float]]:
    """Of every completion of every prompt, by a plain forward pass: prompt -> completion -> log pi."""
    ids, mask = task.completions(tokenizer)
    completions = [tuple(row[own].tolist()) for row, own in zip(ids, mask, strict=True)]
    table = task.log_probs(model, tokenizer, temperature).tolist()
    return {prompt: dict(zip(completions, row, strict=True)) for prompt, row in zip(task.prompts, table, strict=True)}


class EnumeratedPrior(NamedTuple):
    """Where a task's prior is, and its tokenizer."""

    task: EnumerableTask
    path: str
    tokenizer: PreTrainedTokenizerBase

    def log_probs(self, model: Any, temperature: float = 1.0) -> dict[tuple[str, Completion], float]:
        """Of every prompt with every completion, under a model that was trained from this prior, or the prior."""
        of_prompts = log_probs_of(self.task, model, self.tokenizer, temperature)
        return {(prompt, completion): value for prompt, row in of_prompts.items() for completion, value in row.items()}


def kept(folder: Path) -> set[Completion]:
    """The completions of the prior that are on disk."""
    files = sorted(folder.rglob("samples-*.parquet"))
    return {tuple(row["completion_ids"]) for file in files for row in pq.read_table(file).to_pylist()}
