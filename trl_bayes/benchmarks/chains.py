"""Long completions whose posterior is known exactly: a chain of tokens, each drawn given the one before.

The prior is a table of random transitions, the evidence a sum of one random number for each token. Then log Z, the
posterior's transitions and every distance follow from sums over pairs of neighbors, however long the completion is.
"""

import torch
from torch import Tensor


class Chain:
    """
    A soft target on completions of a fixed length, at a chosen distance from the prior.

        log P(y) = sum_t log pi_0(y_t|y_{t-1}) + k sum_t u(y_t),    KL(p||pi_0) = distance

    Args:
        vocabulary (`int`): V; completions follow the token 0.
        length (`int`): T.
        distance (`float`): KL(p||pi_0) in nats, by which k is found.
        seed (`int`, *optional*, defaults to `0`): of the transitions and of u.
    """

    def __init__(self, vocabulary: int, length: int, distance: float, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.length = length
        logits = torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64)
        self.log_prior = logits.log_softmax(dim=1)
        self.worth = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
        low, high = 0.0, 20.0
        for _ in range(40):
            self._set(strength := (low + high) / 2)
            low, high = (strength, high) if self.distance < distance else (low, strength)

    def _set(self, strength: float) -> None:
        """log Z, and how often each token is expected to follow each other under the posterior, (V, V)."""
        self.phi = strength * self.worth
        steps = (self.log_prior + self.phi).requires_grad_()
        forward = steps[0]
        for _ in range(self.length - 1):
            forward = (forward.unsqueeze(1) + steps).logsumexp(dim=0)
        log_z = forward.logsumexp(dim=0)
        (self.pairs,) = torch.autograd.grad(log_z, steps)
        self.log_z = log_z.item()
        self.distance = (self.pairs * self.phi).sum().item() - self.log_z

    def draw(self, log_policy: Tensor, number: int, generator: torch.Generator) -> Tensor:
        """Completions (number, 1 + T) of a policy with these transitions (V, V), the token 0 before them."""
        law = log_policy.detach().exp()
        tokens = [torch.zeros(number, dtype=torch.int64)]
        for _ in range(self.length):
            tokens.append(torch.multinomial(law[tokens[-1]], 1, generator=generator).squeeze(1))
        return torch.stack(tokens, dim=1)

    def score(self, log_policy: Tensor, tokens: Tensor) -> Tensor:
        """`log pi(y_t|y_{t-1})`, (number, T), with its gradient."""
        return log_policy[tokens[:, :-1], tokens[:, 1:]]

    def log_potential(self, tokens: Tensor) -> Tensor:
        """phi (number,)."""
        return self.phi[tokens[:, 1:]].sum(dim=1)

    @torch.no_grad()
    def reverse_kl(self, log_policy: Tensor) -> tuple[float, float]:
        """KL(pi||p) and KL(pi||pi_0) of a policy, in nats."""
        law, state = log_policy.exp(), torch.zeros(len(log_policy), dtype=torch.float64)
        state[0] = 1.0
        token_kl = (law * (log_policy - self.log_prior)).sum(dim=1)
        from_prior = worth = 0.0
        for _ in range(self.length):
            from_prior += (state @ token_kl).item()
            state = state @ law
            worth += (state @ self.phi).item()
        return from_prior - worth + self.log_z, from_prior

    @torch.no_grad()
    def forward_kl(self, log_policy: Tensor) -> float:
        """KL(p||pi) of a policy, in nats."""
        return self.distance - (self.pairs * (log_policy - self.log_prior)).sum().item()

    @property
    def best(self) -> Tensor:
        """The transitions (V, V) next to the posterior by KL(p||pi), which are the same at every place."""
        counts = self.pairs + 1e-12
        return (counts / counts.sum(dim=1, keepdim=True)).log()
