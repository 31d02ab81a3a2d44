"""Decoding-time realignment: one trained policy, sampled as if it had been trained at another temperature."""

from dataclasses import dataclass
from typing import ClassVar

from ..targets import Target
from .base import Mixture, at_least_zero, setting
from .importance import Importance


@dataclass(frozen=True)
class Realigned(Importance):
    r"""
    Draws from a trained policy whose logits are moved along the line from the prior's:

        log q(y_t|y_<t) = (1 - lambda) log pi_0(y_t|y_<t) + lambda log pi(y_t|y_<t) + const.

    If `pi` is the posterior at temperature `beta`, the product of powers of whole completions,
    `pi_0^(1-lambda) pi^lambda`, is the posterior at `beta / lambda`. Mixing token by token is that up to the
    normalization at each token, so the draws are close to that posterior and not exact
    ([Decoding-time Realignment](https://huggingface.co/papers/2402.02992)). Their weights `log P - log q` are exact:
    an effective sample size near 1 says that there was nothing to correct.

    Args:
        factor (`float`, *optional*, defaults to `1.0`):
            lambda, the temperature of training over that of the target: 0 is the prior, 1 the policy, above 1 goes on.
    """

    name: ClassVar[str] = "realigned"

    factor: float = setting(1.0, "lambda: the policy's temperature over the target's.")

    def __post_init__(self) -> None:
        at_least_zero("factor", self.factor)

    def check(self, target: Target, has_proposal: bool) -> None:
        if not has_proposal:
            raise ValueError(
                "The method 'realigned' moves a trained policy's logits towards or away from the prior's, and there "
                "is no policy: set `proposal_model_name_or_path`."
            )

    def mixture(self) -> Mixture:
        return Mixture(prior=1 - self.factor, proposal=self.factor)
