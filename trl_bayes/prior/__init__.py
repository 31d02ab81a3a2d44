"""What samples of the prior tell: their context and scores, log Z from them, and the folder that keeps them."""

from .context import Context, LogPotential
from .samples import Draw, PriorSamples, PriorSamplesError
from .scores import LogZEstimate, PriorScores, PromptTable, log_z_from_prior


__all__ = [
    "Context",
    "Draw",
    "LogPotential",
    "LogZEstimate",
    "PriorSamples",
    "PriorSamplesError",
    "PriorScores",
    "PromptTable",
    "log_z_from_prior",
]
