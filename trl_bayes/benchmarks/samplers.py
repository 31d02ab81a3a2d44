"""Error against cost of every sampler, on a task whose posterior is known exactly.

The error is the total variation between the draws and the posterior. It is never zero: as many independent exact
draws differ from their own law too. That floor is known, and a sampler is as good as exact where it reaches it.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy
import torch
from rich.progress import Progress
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..language_models.completions import Completions
from ..language_models.settings import SamplingSettings, at_least
from ..samplers.base import Method
from ..samplers.best_of_n import BestOfN
from ..samplers.importance import Importance
from ..samplers.mcmc import MetropolisHastings
from ..samplers.proxy import Proxy
from ..samplers.quasi_rejection import QuasiRejection
from ..samplers.realigned import Realigned
from ..samplers.rejection import Rejection
from ..samplers.sampler import Sampler
from ..samplers.smc import SequentialMonteCarlo, systematic
from ..targets import Tilt
from .fitted import fitted
from .jobs import quiet
from .section import Findings, SectionArguments
from .tables import markdown_table
from .tiny import EnumerableTask, build_tiny_model, letter_count_task


BETA = 1.0
COLUMNS = ("method", "settings", "TV", "TV of exact draws", "generated a draw", "tokens a draw", "seconds")
_MOST_AT_ONCE = 4096


@dataclass
class SamplersArguments(SectionArguments):
    r"""
    Arguments of the section, besides those of [`~trl_bayes.benchmarks.section.SectionArguments`].

    Parameters:
        num_samples (`int`, *optional*, defaults to `2500`): draws of each of the two prompts.
        seed (`int`, *optional*, defaults to `0`): of all draws.
    """

    page: ClassVar[str] = "samplers"

    num_samples: int = field(default=2500, metadata={"help": "Draws of each of the two prompts."})
    seed: int = field(default=0, metadata={"help": "Seed of all draws."})

    def __post_init__(self) -> None:
        at_least("num_samples", self.num_samples)
        at_least("seed", self.seed, 0)


def run(args: SamplersArguments, progress: Progress) -> Iterator[Findings]:
    """Samples with every setting."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        space = load_space(folder)
        about = {
            "completions": space.log_posterior.size(1),
            "prompts": list(space.task.prompts),
            "beta": BETA,
            "seed": args.seed,
        }
        found: list[Measured] = []
        for setting in progress.track(settings(space.max_log_potential), description="samplers"):
            found.append(measure(space, setting, args.num_samples, args.seed))
            yield Findings({**about, "rows": [each._asdict() for each in found]}, to_markdown(found))


def sampler_task() -> EnumerableTask:
    """The soft reward of "letters" with 121 completions for each of 2 prompts: few enough to see a small error."""
    return replace(letter_count_task(), letters="abc", prompts=("c", "b a"), seed=1)


@dataclass(frozen=True)
class Setting:
    """A method with its settings, as one row; `resample` is how many candidates are weighted for each draw."""

    family: str
    settings: str
    method: Method
    resample: int = 1
    models: dict[str, str] = field(default_factory=dict)  # of a sampler's arguments, by their names in [`Space`]


class Measured(NamedTuple):
    """What a setting gave. Costs are for each draw that was returned, everything it took included."""

    family: str
    settings: str
    total_variation: float
    floor: float  # expected total variation of as many independent exact draws
    floor_spread: float  # its standard deviation
    generated_per_draw: float  # completions; with a twist, parts of them
    tokens_per_draw: float
    num_draws: int
    seconds: float


@dataclass(frozen=True)
class Space:
    """A task's completions, with its prior loaded; `log_posterior` (P, N), and where each completion stands in it."""

    task: EnumerableTask
    prior: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    log_posterior: Tensor
    places: dict[tuple[int, ...], int] = field(repr=False)
    folder: str | Path = ""
    _models: dict[str, PreTrainedModel] = field(default_factory=dict, repr=False)

    def model(self, name: str) -> PreTrainedModel:
        """
        A model that only some samplers need, made when it is first asked for.

        `policy` has the posterior at twice the temperature; `small base` is a smaller model with the prior's law as
        far as it can, and `small policy` the same with the posterior of its own.
        """
        if name not in self._models:
            if name == "policy":
                log_prior = self.task.log_probs(self.prior, self.tokenizer)
                start, law = self.prior, self._tilted(log_prior, 2 * BETA)
            elif name == "small base":
                path = build_tiny_model(
                    Path(self.folder, "small"), self.task.letters, 7, hidden_size=8, num_layers=1, num_heads=1
                )
                start, law = (
                    AutoModelForCausalLM.from_pretrained(path),
                    self.task.log_probs(self.prior, self.tokenizer),
                )
            else:
                start = self.model("small base")
                law = self._tilted(self.task.log_probs(start, self.tokenizer), BETA)
            self._models[name] = fitted(start, self.task, self.tokenizer, law)
        return self._models[name]

    def _tilted(self, log_law: Tensor, beta: float) -> Tensor:
        return (log_law + self.task.rewards(self.tokenizer) / beta).log_softmax(dim=1)

    @property
    def max_log_potential(self) -> float:
        """The largest phi of any completion."""
        return self.task.rewards(self.tokenizer).max().item() / BETA


def load_space(folder: str | Path) -> Space:
    """Builds the prior of the task in a folder and enumerates the posterior."""
    task = sampler_task()
    path = task.build_model(folder)
    prior, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    posteriors = task.posteriors(tokenizer, prior, lambda rewards: rewards / BETA)
    completions = task.completions(tokenizer)
    rows = [tuple(ids[mask].tolist()) for ids, mask in zip(completions.ids, completions.mask, strict=True)]
    log_posterior = torch.stack([posterior.log_posterior for posterior in posteriors])
    return Space(task, prior, tokenizer, log_posterior, {row: i for i, row in enumerate(rows)}, folder)


def settings(max_log_potential: float) -> list[Setting]:
    """Every sampler, from cheap to exact."""
    rows = [Setting("prior", "", Importance())]
    rows += [Setting("best of N", f"N = {n}", BestOfN(n)) for n in (2, 4, 8, 16)]
    rows += [
        Setting("importance, resampled", f"{m} candidates a draw", Importance(), resample=m) for m in (2, 4, 8, 16)
    ]
    for gap in (4.0, 3.0, 2.0, 1.0):
        bound = QuasiRejection(log_bound=max_log_potential - gap)
        rows.append(Setting("quasi-rejection", f"log B = max phi - {gap:g}", bound))
    rows.append(Setting("rejection", "log B = max phi", Rejection(max_log_potential)))
    for kernel in ("independence", "prefix"):
        for steps in (2, 4, 8, 16, 32):
            chain = MetropolisHastings(kernel=kernel, num_steps=steps)
            rows.append(Setting(f"MCMC, {kernel}", f"{steps} steps", chain))
    for twist, name in (("target", "no twist"), ("rewards", "twist = reward so far")):
        for particles in (2, 4, 8, 16, 32):
            runs = SequentialMonteCarlo(particles, tokens_per_step=1, twist=twist, draws_per_run=1)
            rows.append(Setting(f"SMC, {name}", f"{particles} particles, 1 draw a run", runs))
    realigned = {"proposal": "policy"}
    rows += [Setting("realigned", f"policy of 2 beta, factor {f:g}", Realigned(f), models=realigned) for f in (1, 2)]
    small = {"proposal": "small policy", "proposal_base": "small base"}
    rows.append(Setting("proxy", "a small pair, factor 1", Proxy(), models=small))
    return rows


def measure(space: Space, setting: Setting, num_samples: int, seed: int = 0) -> Measured:
    """
    Draws, and compares with the posterior.

    Args:
        space ([`Space`]): from [`load_space`].
        setting ([`Setting`]): the method.
        num_samples (`int`): draws of each prompt.
        seed (`int`, *optional*, defaults to `0`): of the draws.
    """
    models: dict[str, Any] = {role: space.model(name) for role, name in setting.models.items()}
    sampler = Sampler(
        space.prior,
        space.tokenizer,
        [space.task.reward_func],
        Tilt(BETA),
        setting.method,
        SamplingSettings(space.task.max_completion_length, batch_size=_MOST_AT_ONCE, seed=seed),
        **models,
    )
    start = time.perf_counter()
    draws = sampler.sample(space.task.prompts, num_samples * setting.resample)
    seconds = time.perf_counter() - start
    counts = count(space, draws)
    if setting.family.startswith("importance"):
        counts = resample(space, draws, num_samples, seed)
    returned = counts.sum(dim=1)
    floor, spread = noise_floor(space.log_posterior, returned.long().tolist(), seed)
    return Measured(
        setting.family,
        setting.settings,
        total_variation(counts, space.log_posterior),
        floor,
        spread,
        draws.diagnostics["num_generated"] / returned.sum().item(),
        draws.diagnostics["num_tokens"] / returned.sum().item(),
        int(returned.sum()),
        round(seconds, 2),
    )


def _places(space: Space, draws: Completions) -> Tensor:
    """Which completion each draw is, (M,)."""
    return torch.tensor([space.places[tuple(ids)] for ids in draws.completion_ids])


def count(space: Space, draws: Completions) -> Tensor:
    """Numbers of each completion, (P, N) float64."""
    num_prompts, num_completions = space.log_posterior.shape
    flat = draws.prompt_index * num_completions + _places(space, draws)
    return torch.bincount(flat, minlength=num_prompts * num_completions).view(num_prompts, -1).double()


def resample(space: Space, draws: Completions, num_samples: int, seed: int) -> Tensor:
    """Numbers (P, N) of each completion among draws that are chosen in proportion to their weights."""
    num_prompts = len(draws.prompts)
    rng = numpy.random.default_rng([seed, 2])
    chosen = systematic(draws.log_weights.view(num_prompts, -1), num_samples, rng)  # (P, n)
    places = _places(space, draws).view(num_prompts, -1).gather(1, chosen)
    return torch.stack([torch.bincount(row, minlength=space.log_posterior.size(1)) for row in places]).double()


def total_variation(counts: Tensor, log_posterior: Tensor) -> float:
    """`sum |frequency - p| / 2`, averaged over prompts; (P, N) each."""
    frequencies = counts / counts.sum(dim=1, keepdim=True)
    return ((frequencies - log_posterior.exp()).abs().sum(dim=1) / 2).mean().item()


def noise_floor(
    log_posterior: Tensor, num_draws: Sequence[int], seed: int = 0, repetitions: int = 50
) -> tuple[float, float]:
    """Mean and standard deviation of the total variation of independent exact draws, by simulation.

    Args:
        log_posterior (`torch.Tensor`): (P, N).
        num_draws (`list[int]`): of each prompt.
        seed (`int`, *optional*, defaults to `0`): of the simulation.
        repetitions (`int`, *optional*, defaults to `50`): of the simulation.
    """
    rng = numpy.random.default_rng([seed, 3])
    law = log_posterior.exp().numpy()
    law = law / law.sum(axis=1, keepdims=True)
    values = [
        total_variation(
            torch.from_numpy(numpy.stack([rng.multinomial(n, p) for n, p in zip(num_draws, law, strict=True)])),
            log_posterior,
        )
        for _ in range(repetitions)
    ]
    return float(numpy.mean(values)), float(numpy.std(values, ddof=1))


def to_markdown(found: Sequence[Measured]) -> str:
    """The section's part of the page."""
    text = (
        "Total variation to a posterior that is known exactly, and what a draw costs. As many independent exact draws "
        "differ from their own law too: by what the fourth column says."
    )
    return "\n\n".join(["## Samplers", text, table(found)])


def table(found: Sequence[Measured]) -> str:
    """A row for each setting."""
    return markdown_table(COLUMNS, [cells(each) for each in found])


def cells(row: Measured) -> list[str]:
    """A row as text."""
    return [
        row.family,
        row.settings,
        f"{row.total_variation:.3f}",
        f"{row.floor:.3f} ± {row.floor_spread:.3f}",
        f"{row.generated_per_draw:.3g}",
        f"{row.tokens_per_draw:.3g}",
        f"{row.seconds:.1f}",
    ]
