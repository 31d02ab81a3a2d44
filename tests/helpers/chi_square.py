"""Pearson's test of counts against a law."""

import torch
from torch import Tensor


def chi_square_p_value(observed: Tensor, expected: Tensor, num_laws: int = 1) -> float:
    """
    That counts come from a law. What the law excludes must not occur.

    Args:
        observed (`torch.Tensor`): counts, shape `(K,)`.
        expected (`torch.Tensor`): their means, `(K,)`; those below five, too rare for the law of chi-square, are one.
        num_laws (`int`): of how many laws the cells are, each with a total of its own.
    """
    if observed[expected == 0].any():
        return 0.0
    rare = expected < 5
    counts, means = (torch.cat([cells[~rare], cells[rare].sum()[None]]).double() for cells in (observed, expected))
    inside = means > 0
    statistic = ((counts - means)[inside].square() / means[inside]).sum()
    degrees = (inside.sum() - num_laws).double()
    return torch.special.gammaincc(degrees / 2, statistic / 2).item()
