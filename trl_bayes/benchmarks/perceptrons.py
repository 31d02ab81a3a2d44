"""Policies that are perceptrons over the prefix, several at once: trainings that cost a hundredth of a trainer's."""

import math

import torch
from torch import Tensor, nn

from .tiny import EnumerableTask, build_tiny_tokenizer


class Prefixes:
    """
    The prefixes of all completions of an enumerable task: what a policy needs the next token's distribution after.

    Args:
        task ([`EnumerableTask`]): whose completions they are.
    """

    def __init__(self, task: EnumerableTask):
        tokenizer = build_tiny_tokenizer(task.letters)
        self.num_prompts, self.num_tokens = len(task.prompts), len(task.letters) + 1
        self.ids, self.mask = task.completions(tokenizer)  # (N, T)
        numbers: dict[tuple[int, ...], int] = {}
        self.node_of = torch.tensor(
            [
                [numbers.setdefault(tuple(row[:place]), len(numbers)) if kept else 0 for place, kept in enumerate(own)]
                for row, own in zip(self.ids.tolist(), self.mask.tolist(), strict=True)
            ]
        )  # (N, T)
        places = self.ids.size(1) - 1
        self.features = torch.zeros(len(numbers), places * self.num_tokens + places + 1)  # (M, F)
        for prefix, node in numbers.items():
            self.features[node, places * self.num_tokens + len(prefix)] = 1.0  # how far it is
            for place, letter in enumerate(prefix):
                self.features[node, place * self.num_tokens + letter] = 1.0  # which letter is where

    def log_law(self, next_token: Tensor) -> Tensor:
        """`log pi` of all completions, `(..., N)`, from those of the tokens after each prefix, `(..., M, V)`."""
        letters, start, found = self.num_tokens - 1, 0, []
        here = next_token.new_zeros(*next_token.shape[:-2], 1)  # of the prefixes of one length, in order
        for length in range(self.ids.size(1)):
            after = here.unsqueeze(-1) + next_token[..., start : start + letters**length, :]
            found.append(after[..., letters])  # those that end here
            here, start = after[..., :letters].flatten(-2), start + letters**length
        return torch.cat([*found, here], dim=-1)


class Perceptrons(nn.Module):
    """
    E policies with weights of their own, all at first the same: a function of the prompt and of the letters by place.

    Args:
        prefixes ([`Prefixes`]): of a task.
        number (`int`): E.
        seed (`int`): of the weights.
        logit_std (`float`): standard deviation of the logits, in nats, about.
        width (`int`, *optional*, defaults to `32`): of the two hidden layers.
    """

    def __init__(self, prefixes: Prefixes, number: int, seed: int, logit_std: float, width: int = 32):
        super().__init__()
        self.prefixes, generator = prefixes, torch.Generator().manual_seed(seed)

        def weights(rows: int, columns: int, std: float) -> nn.Parameter:
            drawn = torch.randn(rows, columns, generator=generator) * std
            return nn.Parameter(drawn.expand(number, -1, -1).clone())

        self.of_prompt = weights(prefixes.num_prompts, width, 0.7)
        self.of_prefix = weights(prefixes.features.size(1), width, 0.7)
        self.inner = weights(width, width, 1.5 / math.sqrt(width))
        self.outer = weights(width, prefixes.num_tokens, 1.2 * logit_std / math.sqrt(width))

    def forward(self) -> Tensor:
        """`log pi` of every token after each prompt and prefix, `(E, P, M, V)`, in nats."""
        number, num_prompts, width = self.of_prompt.shape
        first = (self.of_prompt.unsqueeze(2) + (self.prefixes.features @ self.of_prefix).unsqueeze(1)).relu()
        logits = (first.view(number, -1, width) @ self.inner).relu() @ self.outer  # (E, P * M, V)
        return torch.log_softmax(logits, dim=-1).view(number, num_prompts, -1, self.prefixes.num_tokens)
