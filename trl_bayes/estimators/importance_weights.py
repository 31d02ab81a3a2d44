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
        return sequences.importance_ratio - self.pseudo_reward(sequences)
