"""Each loss on long completions: effective samples, the spread of ratios, and which policy still learns."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from ..divergences import get_divergence
from ..estimators import Estimator, ImportanceWeights, PolicyGradient, ScoreFunction
from ..groups import Group, effective_sample_size
from ..language_models.settings import at_least
from ..partitions import LeaveOneOut
from .chains import Chain
from .section import Findings, SectionArguments
from .tables import markdown_table


_SAMPLES = 4096  # for ESS and the spread of weights at the prior
_EARLIER = 4  # updates between the policy that draws and the one that is trained


@dataclass
class LongCompletionsArguments(SectionArguments):
    r"""
    Arguments of the section.

    Parameters:
        lengths (`list[int]`): tokens of a completion.
        distances (`list[float]`): KL(p||pi_0) of the target, in nats.
        vocabulary (`int`): tokens that there are.
        num_generations, prompts (`int`): completions of a group, and groups of an update.
        steps (`int`): updates.
        learning_rate (`float`): of Adam, to 0 linearly.
        seeds (`list[int]`): of the draws.
    """

    lengths: list[int] = field(default_factory=lambda: [16, 64, 256], metadata={"help": "Tokens of a completion."})
    distances: list[float] = field(
        default_factory=lambda: [1.0, 4.0, 16.0], metadata={"help": "KL(p||pi_0) of the target, in nats."}
    )
    vocabulary: int = field(default=128, metadata={"help": "Tokens that there are."})
    num_generations: int = field(default=16, metadata={"help": "Completions of a group."})
    prompts: int = field(default=4, metadata={"help": "Groups of an update."})
    steps: int = field(default=100, metadata={"help": "Updates."})
    learning_rate: float = field(default=0.03, metadata={"help": "Of Adam, to 0 linearly."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of the draws."})

    def __post_init__(self) -> None:
        at_least("num_generations", self.num_generations, 2)
        for name in ("prompts", "steps"):
            at_least(name, getattr(self, name))


class Loss(NamedTuple):
    """An estimator with its cap."""

    estimator: Estimator
    cap: float | None = None


def losses() -> dict[str, Loss]:
    """What is compared."""
    forward = ImportanceWeights(get_divergence("forward_kl"))
    return {
        "KL-RL": Loss(PolicyGradient(get_divergence("reverse_kl"))),
        "f-DPG, Jensen-Shannon": Loss(ScoreFunction(get_divergence("jensen_shannon"))),
        "f-DPG, alpha = .5": Loss(ScoreFunction(get_divergence("alpha", 0.5))),
        "DPG": Loss(forward),
        "DPG, cap 1": Loss(forward, 1.0),
    }


class AtPrior(NamedTuple):
    """What a group's samples are worth before training."""

    ess: float  # of 1, with many samples
    ess_of_group: float  # of 1, with a group's; at least 1 / G
    spread: float  # standard deviation of the log weights, in nats


class Trained(NamedTuple):
    """Where a training ended."""

    reverse_kl: float
    forward_kl: float
    kl_prior: float
    ratio_spread: (
        float  # standard deviation of log pi - log q, q the policy of four updates before; mean over training
    )


def at_prior(chain: Chain, group: int) -> AtPrior:
    """Weights of the prior's samples."""
    generator = torch.Generator().manual_seed(1)
    phi = chain.log_potential(chain.draw(chain.log_prior, _SAMPLES, generator)) - chain.log_z
    groups = phi[: _SAMPLES // group * group].view(-1, group)
    whole, parts = (
        effective_sample_size(each, torch.ones_like(each, dtype=torch.bool)) for each in (phi[None], groups)
    )
    return AtPrior(whole.item(), parts.mean().item(), phi.std().item())


def train(chain: Chain, loss: Loss, args: LongCompletionsArguments, seed: int) -> Trained:
    """A policy that starts as the prior; for each token it learns how much more often it follows any other."""
    moved = torch.zeros(args.vocabulary, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([moved], lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)
    generator, shape = torch.Generator().manual_seed(seed), (args.prompts, args.num_generations)
    earlier: list[Tensor] = []
    spreads = []
    for _ in range(args.steps):
        log_policy = (chain.log_prior + moved).log_softmax(dim=1)
        tokens = chain.draw(log_policy, shape[0] * shape[1], generator)
        of_sequence = chain.score(log_policy, tokens).sum(dim=1)
        log_q, log_prior = (
            of_sequence.detach().view(shape),
            chain.score(chain.log_prior, tokens).sum(dim=1).view(shape),
        )
        group = Group(log_q, log_q, log_prior, chain.log_potential(tokens).view(shape))
        terms = loss.estimator.terms(group, LeaveOneOut().log_z(group), loss.cap)
        rows = type(terms)(*(term.flatten() for term in terms))
        value, _ = loss.estimator.loss(of_sequence, rows, loss.cap)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_([moved], 1.0)
        optimizer.step()
        schedule.step()
        earlier.append(log_policy.detach())
        if len(earlier) > _EARLIER:
            spreads.append((of_sequence.detach() - chain.score(earlier.pop(0), tokens).sum(dim=1)).std().item())
    log_policy = (chain.log_prior + moved).log_softmax(dim=1)
    reverse_kl, kl_prior = chain.reverse_kl(log_policy)
    spread = sum(spreads) / max(len(spreads), 1)
    return Trained(reverse_kl, chain.forward_kl(log_policy), kl_prior, spread)


def run(args: LongCompletionsArguments, progress: Progress) -> Iterator[Findings]:
    """Each target with each loss."""
    settings = [(distance, length) for distance in args.distances for length in args.lengths]
    record: dict[str, dict[str, object]] = {}
    for distance, length in progress.track(settings, description="long completions"):
        chain = Chain(args.vocabulary, length, distance)
        best = chain.reverse_kl(chain.best)[0], chain.forward_kl(chain.best)
        runs = {
            name: [train(chain, loss, args, seed)._asdict() for seed in args.seeds] for name, loss in losses().items()
        }
        key = f"{distance:g} nats, {length} tokens"
        record[key] = {"prior": at_prior(chain, args.num_generations)._asdict(), "best": best, "trained": runs}
        yield Findings({"arguments": asdict(args), "targets": record}, to_markdown(args, record))


def to_markdown(args: LongCompletionsArguments, record: dict[str, dict[str, object]]) -> str:
    """Two tables: weights at the prior, and where trainings ended."""
    names = list(losses())
    weights, ends, ratios = [], [], []
    for key, found in record.items():
        prior: dict[str, float] = found["prior"]  # type: ignore[assignment]
        runs: dict[str, list[dict[str, float]]] = found["trained"]  # type: ignore[assignment]
        best: tuple[float, float] = found["best"]  # type: ignore[assignment]
        weights.append([key, f"{prior['ess']:.4f}", f"{prior['ess_of_group']:.3f}", f"{prior['spread']:.2f}"])
        ends.append([key, f"{best[0]:.2f}", *(_median(runs[name], "reverse_kl") for name in names)])
        ratios.append([key, *(_median(runs[name], "ratio_spread") for name in names)])
    text = (
        f"A chain of {args.vocabulary} tokens; {args.steps} updates of {args.prompts} groups of "
        f"{args.num_generations}, Adam at {args.learning_rate:g}, {len(args.seeds)} seeds (medians). Nats of a whole "
        f"completion; q is the policy {_EARLIER} updates before."
    )
    tables = [
        markdown_table(["target", "ESS", "ESS in a group", "spread of log w"], weights),
        markdown_table(["KL(π‖p) of", "the best", *names], ends),
        markdown_table(["spread of log π/q", *names], ratios),
    ]
    return "\n\n".join(["## Long completions", text, *tables])


def _median(runs: list[dict[str, float]], key: str) -> str:
    return f"{torch.tensor([each[key] for each in runs]).median().item():.2f}"
