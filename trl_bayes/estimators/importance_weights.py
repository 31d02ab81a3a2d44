"""DPG: the forward KL by importance weights, from completions of any recorded policy."""

import torch

from ..groups import finite_exp
from .base import Estimator, Sequences


class ImportanceWeights(Estimator):
    """
    The gradient of `KL(p||pi)` with weights that do not depend on the policy that is trained:

        grad KL(p||pi) = -E_q[(P/(q Z) - pi/q) grad log pi].

    Samples of any recorded `q` can be reused. The second term is a control variate of mean zero, and at the posterior
    both cancel sample by sample. See [A Distributional Approach to Controlled Text
    Generation](https://huggingface.co/papers/2012.11635).
    """

    def pseudo_reward(self, sequences: Sequences) -> torch.Tensor:
        return finite_exp(sequences.log_target - sequences.log_z - sequences.log_proposal)

    def coefficient(self, sequences: Sequences) -> torch.Tensor:
        log_policy, log_target, log_proposal, log_z, _ = sequences
        return importance_coefficient(log_policy, log_target, log_proposal, log_z)


def importance_coefficient(
    log_policy: torch.Tensor, log_target: torch.Tensor, log_proposal: torch.Tensor, log_z: torch.Tensor
) -> torch.Tensor:
    """
    DPG: the factor of `grad log pi(y)` in `grad KL(p||pi) = -E_q[(P/(q Z) - pi/q) grad log pi]`.

    The first weight does not depend on the policy, so samples of any recorded `q` can be reused. The second is a
    control variate: its expectation is `E_pi[grad log pi] = 0`, and at the posterior both cancel sample by sample.
    See [A Distributional Approach to Controlled Text Generation](https://huggingface.co/papers/2012.11635).

    Args:
        log_policy, log_target, log_proposal, log_z (`torch.Tensor`): same shape, in nats.

    Returns:
        `torch.Tensor`: same shape.
    """
    return finite_exp(log_policy - log_proposal) - finite_exp(log_target - log_z - log_proposal)
