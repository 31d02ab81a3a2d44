"""A stand-in for a vLLM server, for tests of what trainers ask of it."""

from typing import Any

import torch


class GroupingServer:
    """As TRL's client of a vLLM server: one prompt stands for its whole group of `num_generations`."""

    def __init__(self, model: Any, **settings: Any):
        self.model, self.length, self.asked = model, settings["max_completion_length"], []

    def sync_weights(self) -> None: ...

    def generate(self, prompts: list[list[int]], num_generations: int, **kwargs: Any) -> tuple[Any, ...]:
        self.asked.append((len(prompts), num_generations))
        completions, log_probs = [], []
        for prompt in (p for p in prompts[::num_generations] for _ in range(num_generations)):
            ids = self.model.generate(torch.tensor([prompt]), max_new_tokens=self.length, do_sample=True, top_k=0)
            with torch.no_grad():
                logits = self.model(ids).logits[0, len(prompt) - 1 : -1]
            new = ids[0, len(prompt) :]
            completions.append(new.tolist())
            log_probs.append([[v] for v in logits.log_softmax(1).gather(1, new.unsqueeze(1)).squeeze(1).tolist()])
        return prompts, completions, log_probs, None
