"""What samples of the prior tell: their context and scores, log Z from them, and the folder that keeps them."""

from .callable_identity import callable_fingerprint
from .context import Context, LogPotential
from .drawing import PriorKeeper
from .identity import DrawIdentity, prompt_key, row_key
from .samples import Draw, PriorSamples, Work
from .scores import PriorScores, PromptTable, log_z_from_prior
from .store import KeptCompletions, PriorSamplesError


__all__ = [
    "Context",
    "Draw",
    "DrawIdentity",
    "KeptCompletions",
    "LogPotential",
    "PriorKeeper",
    "PriorSamples",
    "PriorSamplesError",
    "PriorScores",
    "PromptTable",
    "Work",
    "callable_fingerprint",
    "log_z_from_prior",
    "prompt_key",
    "row_key",
]
