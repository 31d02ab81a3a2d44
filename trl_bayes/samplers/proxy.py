"""Proxy tuning: what training did to a small model is added to a large prior, token by token."""

from dataclasses import dataclass
from typing import ClassVar

from ..targets import Target
from .base import Mixture, at_least_zero, setting
from .importance import Importance


@dataclass(frozen=True)
class Proxy(Importance):
    """
    Draws from the prior with the log-ratio of a small policy and the small model that it was trained from:

        log q(y_t|y_<t) = log pi_0 + lambda (log pi_small - log pi_small_0) + const,    all of y_t given y_<t.

    With `lambda = 1` the small log-ratio, which is `phi` up to a constant if the small policy is the posterior of its
    own prior, takes the place of the evidence: see [emulated fine-tuning](https://huggingface.co/papers/2310.12962)
    and [proxy tuning](https://huggingface.co/papers/2401.08565). The draws are not those of the large prior's
    posterior (each token's small log-ratio looks ahead as the small model goes on, not the large one), but their
    weights `log P - log q` are exact.

    Args:
        factor (`float`, *optional*, defaults to `1.0`): lambda; above 1 goes farther than the small policy did.
    """

    name: ClassVar[str] = "proxy"
    needs_base: ClassVar[bool] = True

    factor: float = setting(1.0, "lambda: above 1 goes farther than the small policy did.")

    def __post_init__(self) -> None:
        at_least_zero("factor", self.factor)

    def check(self, target: Target, has_proposal: bool) -> None:
        if not has_proposal:
            raise ValueError(
                "The method 'proxy' adds to the prior what training did to a small model, and there is no small "
                "policy: set `proposal_model_name_or_path`, and `proposal_base_model_name_or_path` to what it was "
                "trained from."
            )

    def mixture(self) -> Mixture:
        return Mixture(prior=1.0, proposal=self.factor, base=-self.factor)
