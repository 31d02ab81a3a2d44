"""What the ablation compares: an estimator of the trainers, with one ingredient or another."""

from dataclasses import dataclass

from ..divergences import Divergence, get_divergence
from ..estimators import Estimator, ImportanceWeights, PolicyGradient, ScoreFunction


@dataclass(frozen=True)
class Method:
    """
    One row of the table.

    Args:
        name (`str`): of the row.
        divergence (`str`): that is minimized.
        kind (`str`): `exact` gradient; `policy_gradient`, `score_function` or `importance`, the trainers' estimators;
            `adaptive`, the reverse KL with a share of the Rao-Blackwellized estimator; `energy`, with a baseline that
            is weighted by the length of each sibling's score.
        replay_ratio (`int`): replayed completions for each fresh one.
        prior_fraction (`float`): share of each group that the prior draws.
        self_normalized (`bool`): `Z` is the group's own mean weight.
        exact_half (`int`, *optional*): 1 or 2, the half of the steps in which the gradient is exact.
        most_updates (`int`): with a batch.
        least_effective (`float`): share of the batch that counts under the policy, for another update with it.
        parts (`int`): of a step's completions, each drawn after the update with the one before.
        adam_beta2 (`float`): Adam's, as TRL's default if not given.
    """

    name: str
    divergence: str
    kind: str
    replay_ratio: int = 0
    prior_fraction: float = 0.0
    self_normalized: bool = False
    exact_half: int | None = None
    most_updates: int = 1
    least_effective: float = 0.0
    parts: int = 1
    adam_beta2: float = 0.999

    def is_exact(self, share: float) -> bool:
        """Whether the step has no noise after which this share of the steps is done."""
        return self.kind == "exact" or self.exact_half == (1 if share < 0.5 else 2)

    @property
    def f(self) -> Divergence:
        """The divergence itself."""
        return get_divergence(self.divergence)

    @property
    def estimator(self) -> Estimator:
        """The trainers'."""
        if self.kind == "importance":
            return ImportanceWeights(self.f)
        return ScoreFunction(self.f) if self.kind == "score_function" else PolicyGradient(self.f)


def limit_of(divergence: str) -> Method:
    """The run without noise."""
    return Method(f"noise-free {divergence}", divergence, "exact")


def methods() -> list[Method]:
    """All rows but the limits."""
    forward, reverse, middle = "forward_kl", "reverse_kl", "jensen_shannon"
    return [
        Method("KL-RL (RLOO's estimator)", reverse, "policy_gradient"),
        Method("DPG", forward, "importance"),
        Method("Jensen-Shannon", middle, "score_function"),
        Method("reverse KL, replay 3", reverse, "score_function", replay_ratio=3),
        Method("DPG, replay 1", forward, "importance", replay_ratio=1),
        Method("DPG, replay 3", forward, "importance", replay_ratio=3),
        Method("Jensen-Shannon, replay 3", middle, "score_function", replay_ratio=3),
        Method("DPG, a quarter from the prior", forward, "importance", prior_fraction=0.25),
        Method("Jensen-Shannon, a quarter from the prior", middle, "score_function", prior_fraction=0.25),
        Method("DPG, replay 3, a quarter from the prior", forward, "importance", 3, 0.25),
        Method("KL-RL, 4 updates", reverse, "policy_gradient", most_updates=4),
        Method("DPG, 4 updates", forward, "importance", most_updates=4),
        Method("DPG, up to 4 updates", forward, "importance", most_updates=4, least_effective=0.5),
        Method("DPG, up to 16 updates", forward, "importance", most_updates=16, least_effective=0.5),
        Method("DPG, a quarter from the prior, 4 updates", forward, "importance", 0, 0.25, most_updates=4),
        Method("Jensen-Shannon, up to 4 updates", middle, "score_function", most_updates=4, least_effective=0.5),
        Method("KL-RL, quarter batches", reverse, "policy_gradient", parts=4),
        Method("DPG, quarter batches", forward, "importance", parts=4),
        Method("Jensen-Shannon, quarter batches", middle, "score_function", parts=4),
        Method("DPG, a quarter from the prior, quarter batches", forward, "importance", 0, 0.25, parts=4),
        Method("KL-RL, eighth batches", reverse, "policy_gradient", parts=8),
        Method("DPG, eighth batches", forward, "importance", parts=8),
        Method("KL-RL, Adam's beta2 .95", reverse, "policy_gradient", adam_beta2=0.95),
        Method("DPG, Adam's beta2 .95", forward, "importance", adam_beta2=0.95),
        Method("Jensen-Shannon, Adam's beta2 .95", middle, "score_function", adam_beta2=0.95),
        Method("KL-RL, exact, Adam's beta2 .95", reverse, "exact", adam_beta2=0.95),
        Method("DPG, exact, Adam's beta2 .95", forward, "exact", adam_beta2=0.95),
        Method("DPG, self-normalized Z", forward, "importance", self_normalized=True),
        Method("DPG, replay 3, self-normalized Z", forward, "importance", 3, self_normalized=True),
        Method("KL-RL, share of Rao-Blackwellized", reverse, "adaptive"),
        Method("KL-RL, baseline by score length", reverse, "energy"),
        Method("KL-RL, exact in the first half", reverse, "policy_gradient", exact_half=1),
        Method("KL-RL, exact in the second half", reverse, "policy_gradient", exact_half=2),
    ]
