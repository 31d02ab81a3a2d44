"""Models that have a given law: fitted to all completions at once, for benchmarks that need a policy, no training."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .laws import kl
from .tiny import EnumerableTask


def all_log_probs(model: nn.Module, task: EnumerableTask, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """`log pi` of all completions after each prompt, `(P, N)` float64, through which a gradient flows."""
    completions, size = task.completions(tokenizer), len(task.completions(tokenizer).ids)
    prompts = [torch.tensor(ids) for ids in tokenizer(text=list(task.prompts))["input_ids"]]
    found: dict[int, Tensor] = {}
    for length in {len(prompt) for prompt in prompts}:  # prompts of one length at once
        places = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
        begin = torch.stack([prompts[place] for place in places]).repeat_interleave(size, dim=0)  # (P' * N, L)
        ids, mask = completions.ids.repeat(len(places), 1), completions.mask.repeat(len(places), 1)  # (P' * N, T)
        logits = model(input_ids=torch.cat([begin, ids[:, :-1]], dim=1)).logits[:, length - 1 :]  # (P' * N, T, V)
        per_token = logits.log_softmax(dim=2).gather(2, ids.unsqueeze(2)).squeeze(2)
        rows = torch.where(mask, per_token, 0.0).sum(dim=1).view(len(places), size)
        found |= dict(zip(places, rows, strict=True))
    return torch.stack([found[place] for place in range(len(prompts))]).double()


def fitted(
    start: PreTrainedModel,
    task: EnumerableTask,
    tokenizer: PreTrainedTokenizerBase,
    log_law: Tensor,
    steps: int = 150,
    learning_rate: float = 5e-3,
) -> PreTrainedModel:
    """
    A copy of a tiny model that minimizes `KL(law||pi)`, summed over all completions, without any sampling.

    Args:
        start ([`~transformers.PreTrainedModel`]): where to begin.
        task ([`EnumerableTask`]), tokenizer: whose completions they are.
        log_law (`torch.Tensor`): `(P, N)`.
        steps (`int`, *optional*, defaults to `150`), learning_rate (`float`, *optional*): of Adam, falling to 0.
    """
    model = copy.deepcopy(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        loss = kl(log_law, all_log_probs(model, task, tokenizer)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model
