"""Sample a posterior without training and write the samples as a data set for `SFTTrainer`."""

import json
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from rich.table import Table
from trl import DatasetMixtureConfig, ModelConfig

from ..assets import embedded_path
from ..command_line.parser import RecipeParser
from ..command_line.problem import (
    PosteriorArguments,
    Problem,
    load_model,
    load_problem,
    model_config,
    prepare_folder,
    progress,
    read_arguments,
)
from ..prior import PriorSamplesError
from ..samplers import METHODS, Draws, Method, Sampler, SamplingError
from ..samplers.base import at_least
from ..targets import LogPotentialError, build_target
from ..targets.base import weighted_sum


DATA = "train.parquet"
DIAGNOSTICS = "diagnostics.json"


def _option(method: str, text: str) -> Any:
    return field(default=None, metadata={"help": f"{method}: {text}"})


@dataclass
class SampleArguments(PosteriorArguments):
    r"""
    Arguments of `trl-bayes sample`.

    This class includes only the parameters that are not in [`~trl_bayes.command_line.problem.PosteriorArguments`]; the
    options of a method are the fields of its class in [`trl_bayes.samplers`].

    Parameters:
        method (`str`, *optional*, defaults to `"rejection"`):
            One of `prior`, `best_of_n`, `rejection`, `quasi_rejection`, `mcmc`, `smc`.
        proposal_model_name_or_path (`str`, *optional*):
            Policy that proposes completions, with the vocabulary of the prior. Defaults to the prior.
        num_samples (`int`, *optional*, defaults to `16`):
            Samples of each prompt.
        num_prior_samples (`int`, *optional*, defaults to `100`):
            Samples of each prompt for a target that learns from the prior.
        output_dir (`str`, *optional*, defaults to `"runs/sample"`):
            Where `train.parquet` and `diagnostics.json` are written.
        tokens (`bool`, *optional*, defaults to `False`):
            Whether to write the tokens as drawn besides the texts, see [`~trl_bayes.samplers.Draws.to_dataset`].
    """

    method: str = field(default="rejection", metadata={"help": "How to sample.", "choices": list(METHODS)})
    proposal_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Policy that proposes completions, with the vocabulary of the prior. Defaults to the prior."
        },
    )
    num_samples: int = field(default=16, metadata={"help": "Samples of each prompt."})
    num_prior_samples: int = field(
        default=100, metadata={"help": "Samples of each prompt for a target that learns from the prior."}
    )
    output_dir: str = field(default="runs/sample", metadata={"help": f"Where {DATA} and {DIAGNOSTICS} are written."})
    tokens: bool = field(
        default=False,
        metadata={
            "help": "Write the tokens as drawn too: SFTTrainer then trains on exactly these, cut completions without "
            "EOS; for models with the same tokenizer."
        },
    )

    num_candidates: int | None = _option("best_of_n", "N (4).")
    max_log_potential: float | None = _option(
        "rejection, smc", "the largest phi of any completion; a constraint's is known to be 0."
    )
    max_attempts: int | None = _option(
        "rejection, quasi_rejection", "completions drawn for each sample, at most (1000)."
    )
    log_bound: float | None = _option("quasi_rejection", "log B; by default chosen from a pilot.")
    tolerance: float | None = _option("quasi_rejection", "total variation allowed where B is chosen (0.02).")
    num_pilot: int | None = _option("quasi_rejection", "completions of each prompt in the pilot (512).")
    kernel: str | None = _option("mcmc", "prefix or independence (prefix).")
    num_steps: int | None = _option("mcmc", "steps before the first draw (64).")
    num_chains: int | None = _option("mcmc", "chains of each prompt; by default one for each sample.")
    thin: int | None = _option("mcmc", "steps between the draws of a chain (8).")
    num_particles: int | None = _option("smc", "N (32).")
    tokens_per_step: int | None = _option("smc", "tokens between two looks at the weights (4).")
    ess_threshold: float | None = _option("smc", "resample below this share of effective particles (0.5).")
    twist: str | None = _option("smc", "target or rewards (target).")
    draws_per_run: int | None = _option("smc", "draws of each run; by default all particles.")
    upper_bound: bool | None = _option("smc", "estimate an upper bound on log Z too.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("num_samples", self.num_samples)

    def make_method(self) -> Method:
        """
        The method with the options that were given.

        Raises:
            ValueError: an option of another method, or one out of range.
        """
        method_class = METHODS[self.method]
        own = {option.name for option in fields(cast(Any, method_class))}
        every = {option.name for each in METHODS.values() for option in fields(cast(Any, each))}
        given = {name: value for name in sorted(every) if (value := getattr(self, name)) is not None}
        for name in given:
            if name not in own:
                takes = sorted(own) or "no options"
                raise ValueError(f"`{name}` is not for the method {self.method!r}, which takes {takes}: leave it out.")
        return method_class(**given)


def main(argv: Sequence[str] | None = None) -> None:
    """
    Samples, and writes the data set and its diagnostics.

    Raises:
        SystemExit: code 2 after one sentence on stderr, for anything that is wrong with the configuration.
    """
    parser = RecipeParser(
        [SampleArguments, ModelConfig, DatasetMixtureConfig],
        prog="trl-bayes sample",
        usage="trl-bayes sample [--config RECIPE] [--FIELD VALUE ...]",
        description=__doc__,
    )
    try:
        arguments = read_arguments(parser, sys.argv[1:] if argv is None else argv, SampleArguments)
        job = prepare(*arguments)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error) or type(error).__name__)
    try:
        draws = run(job)
    except (
        SamplingError,
        LogPotentialError,
        PriorSamplesError,
    ) as error:  # an error in a reward function keeps its traceback
        parser.error(str(error))
    write(job, draws)
    console = Console()
    console.print(table(draws, job.problem.reward_weights))
    if "trade_off" in draws.diagnostics:
        console.print(trade_off_table(draws.diagnostics["trade_off"]))
    console.print(f"Samples: {job.folder / DATA}\nDiagnostics: {job.folder / DIAGNOSTICS}", soft_wrap=True)


class Job(NamedTuple):
    """All that is needed to sample."""

    args: SampleArguments
    problem: Problem
    sampler: Sampler
    folder: Path
    settings: dict[str, Any]


def prepare(args: SampleArguments, model: ModelConfig, mixture: DatasetMixtureConfig) -> Job:
    """
    Checks all there is to check, models last.

    Raises:
        ValueError: one sentence.
    """
    folder, method = prepare_folder(args), args.make_method()
    method.check(build_target(args.target, args.beta), args.proposal_model_name_or_path is not None)
    proposal_name = None
    if args.proposal_model_name_or_path is not None:
        proposal_name = embedded_path(args.proposal_model_name_or_path)
        model_config("proposal_model_name_or_path", proposal_name, args.trust_remote_code)
    problem = load_problem(args, model, mixture)
    sampler = Sampler(
        problem.prior,
        problem.tokenizer,
        problem.rewards,
        problem.target,
        method,
        proposal=None if proposal_name is None else load_model(proposal_name, args, model),
        max_new_tokens=args.max_completion_length,
        temperature=args.temperature,
        batch_size=args.batch_size,
        seed=args.seed,
        reward_weights=problem.reward_weights,
        num_prior_samples=args.num_prior_samples,
        prior_samples_dir=args.prior_samples_dir,
        prior_name=problem.prior_name,
        progress=progress(),
    )
    settings = {
        "prior": args.prior_model_name_or_path or model.model_name_or_path,
        "proposal": args.proposal_model_name_or_path,
        "rewards": problem.reward_names,
        "target": repr(problem.target),
        "method": {name: value for name, value in asdict(cast(Any, method)).items() if value is not None},
        "num_samples": args.num_samples,
        "max_completion_length": args.max_completion_length,
        "temperature": args.temperature,
        "seed": args.seed,
    }
    return Job(args, problem, sampler, folder, settings)


def run(job: Job) -> Draws:
    """
    Samples.

    Raises:
        SamplingError: there is not a single sample, or the method cannot be correct; one sentence.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* prompts have fewer than")  # said by the table
        draws = job.sampler.sample(job.problem.prompts, job.args.num_samples, columns=job.problem.columns)
    if not len(draws):
        raise SamplingError(
            f"The method {job.args.method!r} found no sample in {draws.diagnostics['num_generated']:,} completions: "
            "check the rewards and the target, or give a proposal that meets them more often."
        )
    return draws


def write(job: Job, draws: Draws) -> None:
    """Writes the data set, which `load_dataset(output_dir)` reads, and the diagnostics."""
    draws.to_dataset(job.args.tokens).to_parquet(str(job.folder / DATA))
    text = json.dumps({"settings": job.settings, **draws.diagnostics}, indent=1, allow_nan=False)
    (job.folder / DIAGNOSTICS).write_text(text + "\n", encoding="utf-8")


def table(draws: Draws, reward_weights: torch.Tensor | None = None) -> Table:
    """The diagnostics that are numbers, and the mean of the weighted reward."""
    shown = Table(title=f"{draws.diagnostics['method']}: {len(draws):,} samples of {len(draws.prompts):,} prompts")
    shown.add_column("")
    shown.add_column("value", justify="right")
    for name, value in draws.diagnostics.items():
        if text := _cell(value):
            shown.add_row(name.replace("_", " "), text)
    shown.add_row("mean reward", _cell(weighted_sum(draws.rewards, reward_weights).nanmean().item()))
    return shown


def trade_off_table(points: Sequence[dict[str, float]]) -> Table:
    """Quasi-rejection's choice of B, from the same completions."""
    shown = Table(title="quasi-rejection: what a bound B costs and gives, mean over prompts")
    columns = ("quantile", "log_bound", "acceptance_rate", "total_variation", "total_variation_bound")
    for name in columns:
        shown.add_column(name.replace("_", " "), justify="right")
    for point in points:
        shown.add_row(*(_cell(point[name]) for name in columns))
    return shown


def _cell(value: Any) -> str:
    """A diagnostic as text; empty for what is no number or has a name of its own."""
    if isinstance(value, dict) and "trusted" in value:
        number = value["value_is"] if value["value"] is None else f"{value['value']:.4g}"
        error = "" if value["standard_error"] is None else f" ± {value['standard_error']:.2g}"
        return f"{number}{error}" + ("" if value["trusted"] else " (not reliable)")
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_cell(entry)}" for name, entry in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return "–" if value is None else ""


if __name__ == "__main__":
    main()
