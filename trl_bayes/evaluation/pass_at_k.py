"""pass@k: the probability that at least one of k completions of a prompt is right."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..statistics.estimate import Estimate, average


def pass_at_k(num_correct: Tensor, num_samples: Tensor, k: int) -> tuple[Tensor, Tensor]:
    r"""
    The unbiased estimate of pass@k of each prompt, and its variance.

    Of n completions c are right, and none of k that are chosen among them with probability `C(n-c, k) / C(n, k)`:

        pass@k = 1 - C(n-c, k) / C(n, k)

    ([Chen et al., 2021](https://huggingface.co/papers/2107.03374)). `1 - (1 - c/n)^k` would be biased. The variance is
    that of this function of c, binomial with the share `(c + 2) / (n + 4)`: two right and two wrong completions are
    added (Agresti and Coull), so that it is not zero where all, or none, are right.

    Args:
        num_correct (`torch.Tensor`): (P,) c of each prompt, from 0 to n.
        num_samples (`torch.Tensor`): (P,) n of each prompt.
        k (`int`): at least 1.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: values and variances, (P,) float64; NaN for a prompt with fewer than k
        completions.

    Raises:
        ValueError: k below 1.
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    value, variance = torch.full((2, len(num_samples)), torch.nan, dtype=torch.float64)
    for n in num_samples.unique().tolist():
        if n < k:
            continue
        rows = num_samples == n
        counts = torch.arange(n + 1, dtype=torch.float64)  # (n + 1,) every c
        none_right = [math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)]
        values = 1 - torch.tensor(none_right, dtype=torch.float64)
        value[rows] = values[num_correct[rows].long()]
        share = ((num_correct[rows] + 2) / (n + 4)).double().unsqueeze(1)  # (R, 1)
        law = torch.distributions.Binomial(n, share, validate_args=False).log_prob(counts).exp()  # (R, n + 1)
        mean = (law * values).sum(dim=1, keepdim=True)
        variance[rows] = (law * (values - mean) ** 2).sum(dim=1)
    return value, variance


def pass_at_k_estimates(
    rewards: Tensor, names: Sequence[str], prompt_index: Tensor, num_prompts: int, ks: Sequence[int]
) -> dict[str, Estimate]:
    """pass@k, averaged over prompts, of each reward that is 0 or 1 wherever it is known.

    The names are `pass_at_<k>`, and `pass_at_<k>/<reward>` where there are several rewards; see [`pass_at_k`].

    Args:
        rewards: (N, K).
        names: of the K rewards.
        prompt_index: (N,) int64.
        num_prompts: P.
        ks: what to compute.
    """
    estimates = {}
    for k in ks:
        for column, name in enumerate(names):
            known = ~rewards[:, column].isnan()
            values, index = rewards[known, column], prompt_index[known]
            if not ((values == 0) | (values == 1)).all() or not len(values):
                continue
            number = torch.bincount(index, minlength=num_prompts)
            correct = torch.bincount(index, weights=values.double(), minlength=num_prompts)
            enough = bool((number >= k).all())
            note = "" if enough else f"fewer than {k} samples of some prompt"
            key = f"pass_at_{k}" + (f"/{name}" if len(names) > 1 else "")
            estimates[key] = average(*pass_at_k(correct, number, k), enough, note)
    return estimates
