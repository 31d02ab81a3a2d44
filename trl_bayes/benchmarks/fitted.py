"""Models that have a given law: fitted to all completions at once, for benchmarks that need a policy, no training."""

import copy

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .laws import kl
from .tiny import EnumerableTask


def fitted(
    start: PreTrainedModel,
    task: EnumerableTask,
    tokenizer: PreTrainedTokenizerBase,
    log_law: torch.Tensor,
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
    model = copy.deepcopy(start).train()
    completions = task.completions(tokenizer)
    prompts = tokenizer(text=list(task.prompts))["input_ids"]
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        rows = []
        for prompt in prompts:
            ids = torch.cat([torch.tensor(prompt).expand(len(completions.ids), -1), completions.ids], dim=1)
            logits = model(input_ids=ids[:, :-1]).logits[:, len(prompt) - 1 :]  # (N, T, V)
            per_token = logits.log_softmax(dim=2).gather(2, completions.ids.unsqueeze(2)).squeeze(2)
            rows.append(torch.where(completions.mask, per_token, 0.0).sum(dim=1))
        loss = kl(log_law, torch.stack(rows).double()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()
