"""Exact log-probabilities of completions.

`log pi(y|x)` is the sum over the completion's tokens at the sampling temperature, the terminal EOS included. A
completion that is cut at the limit is an outcome of its own, so that the probabilities of all outcomes sum to one.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .batching import pad_rows
from .completions import Completions
from .generation import evaluating
from .progress import progress_bar
from .settings import SamplingSettings


LogProbs = Callable[[PreTrainedModel, Completions, SamplingSettings], Tensor]
"""What scores completions under a model as [`log_probs`] does, and may remember what it has found."""


@torch.no_grad()
def log_probs(model: PreTrainedModel, completions: Completions, settings: SamplingSettings) -> Tensor:
    """
    Log-probability of each completion: `sum_t log softmax(logits_t / temperature)[y_t]`.

    An outcome that occurs several times is scored once, so a collapsed policy is cheap. Sequences are sorted by their
    length and padded on the right, where a causal model cannot see it.

    Args:
        model ([`~transformers.PreTrainedModel`]): any causal language model with the same vocabulary.
        completions ([`Completions`]): what to score.
        settings ([`SamplingSettings`]): those of sampling; the temperature is read, and how many to score at once.

    Returns:
        `torch.Tensor`: (N,) float64 on CPU, in nats; -inf with a token that the model has not.
    """
    outcomes = completions.outcomes()
    # Models of one family may have rows for more tokens than their tokenizer; who has none for a token never writes it
    vocab_size = model.config.get_text_config().vocab_size
    value_of = {outcome: -torch.inf for outcome in outcomes if max(outcome[1], default=0) >= vocab_size}
    different = [outcome for outcome in dict.fromkeys(outcomes) if outcome not in value_of]
    different.sort(key=lambda outcome: len(completions.prompt_ids[outcome[0]]) + len(outcome[1]))
    size = settings.scoring_batch_size
    bar = progress_bar("scoring", len(different), shown=settings.progress)
    with bar, evaluating(model):
        for start in range(0, len(different), size):
            batch = different[start : start + size]
            values = _batch_log_probs(
                model,
                [completions.prompt_ids[i] for i, _ in batch],
                [list(ids) for _, ids in batch],
                settings.temperature,
            )
            value_of.update(zip(batch, values.tolist(), strict=True))
            bar.update(len(batch))
    return torch.tensor([value_of[outcome] for outcome in outcomes], dtype=torch.float64)


def _batch_log_probs(
    model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]], temperature: float
) -> Tensor:
    """(B,) float64 on CPU."""
    device = next(model.parameters()).device
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    ids, mask = pad_rows(rows, pad_token_id=0, left=False)  # any token will do: nothing that counts sees it
    starts = torch.tensor([len(prompt) for prompt in prompts]).unsqueeze(1)  # (B, 1)
    positions = torch.arange(1, ids.size(1)).unsqueeze(0)  # (1, L-1) of the tokens that are predicted
    own = ((positions >= starts) & mask[:, 1:].bool()).to(device)  # (B, L-1)
    ids, mask = ids.to(device), mask.to(device)
    logits = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1]).logits
    logits = logits[:, 1 - ids.size(1) :].float() / temperature  # (B, L-1, V), behind an adapter's virtual tokens
    chosen = logits.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
    per_token = (chosen - logits.logsumexp(dim=2)).double()  # (B, L-1)
    return torch.where(own, per_token, 0.0).sum(dim=1).cpu()
