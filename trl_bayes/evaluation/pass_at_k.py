"""pass@k: the probability that at least one of k completions of a prompt is right."""

import torch
from torch import Tensor


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
        values = -torch.expm1(_log_choose(n - counts, k) - _log_choose(torch.tensor(float(n)), k))
        value[rows] = values[num_correct[rows].long()]
        share = ((num_correct[rows] + 2) / (n + 4)).double().unsqueeze(1)  # (R, 1)
        law = torch.distributions.Binomial(n, share, validate_args=False).log_prob(counts).exp()  # (R, n + 1)
        mean = (law * values).sum(dim=1, keepdim=True)
        variance[rows] = (law * (values - mean) ** 2).sum(dim=1)
    return value, variance


def _log_choose(n: Tensor, k: int) -> Tensor:
    """log C(n, k); -inf where n < k."""
    n = n.double()
    chosen = n.clamp(min=k)
    value = torch.lgamma(chosen + 1) - torch.lgamma(chosen - k + 1) - torch.lgamma(torch.tensor(k + 1.0).double())
    return value.masked_fill(n < k, -torch.inf)
