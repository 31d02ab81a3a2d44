"""Sample a posterior without training and write the samples as a data set for `SFTTrainer`."""

import json
import math
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import DatasetMixtureConfig, ModelConfig

from ..assets import embedded_path
from ..rewards import build_rewards
from ..samplers import METHODS, Draws, Method, Sampler, SamplingError
from ..samplers.base import at_least
from ..targets import build_target
from .parser import RecipeParser
from .training import (
    Arguments,
    TrainingScriptArguments,
    _check_model,
    _from_json,
    _split,
    load_data,
    read_command_line,
)


DATA = "train.parquet"
DIAGNOSTICS = "diagnostics.json"


def _option(method: str, text: str) -> Any:
    return field(default=None, metadata={"help": f"{method}: {text}"})


@dataclass
class SampleArguments(TrainingScriptArguments):
    r"""
    Arguments of `trl-bayes sample`.

    This class includes only the parameters that are not in [`~trl_bayes.commands.training.TrainingScriptArguments`];
    the options of a method are the fields of its class in [`trl_bayes.samplers`].

    Parameters:
        method (`str`, *optional*, defaults to `"rejection"`):
            One of `prior`, `best_of_n`, `rejection`, `quasi_rejection`, `mcmc`, `smc`.
        proposal_model_name_or_path (`str`, *optional*):
            Policy that proposes completions, with the vocabulary of the prior, which is `model_name_or_path`. Defaults
            to the prior.
        target (`str` or `dict[str, Any]`, *optional*):
            As in training. Defaults to `tilt` with `beta`.
        beta (`float`, *optional*, defaults to `0.1`):
            Temperature of the posterior.
        reward_weights (`list[float]`, *optional*):
            One for each reward function. Defaults to ones.
        num_samples (`int`, *optional*, defaults to `16`):
            Samples of each prompt.
        max_prompts (`int`, *optional*):
            Takes only so many prompts, from the beginning.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Completions are cut after so many tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature of prior and proposal.
        batch_size (`int`, *optional*, defaults to `256`):
            Completions generated at once.
        num_prior_samples (`int`, *optional*, defaults to `100`):
            Samples of each prompt for a target that learns from the prior.
        seed (`int`, *optional*, defaults to `0`):
            The same seed and batch size give the same samples.
        device (`str`, *optional*):
            Such as `cuda:0` or `cpu`. Defaults to a GPU if there is one.
        output_dir (`str`, *optional*, defaults to `"runs/sample"`):
            Where `train.parquet` and `diagnostics.json` are written.
        tokens (`bool`, *optional*, defaults to `False`):
            Whether to write the tokens as drawn besides the texts, see [`~trl_bayes.samplers.Draws.to_dataset`].
    """

    method: str = field(default="rejection", metadata={"help": "How to sample.", "choices": list(METHODS)})
    proposal_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Policy that proposes completions, with the vocabulary of the prior, which is model_name_or_path. "
            "Defaults to the prior."
        },
    )
    target: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "The posterior to sample: a name (constraint, tilt, ...), in YAML a mapping with `name` and the "
            "target's arguments, or the dotted path of a Target class. Defaults to 'tilt'."
        },
    )
    beta: float = field(default=0.1, metadata={"help": "Temperature of the posterior, in units of reward per nat."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One for each reward function. Defaults to ones."}
    )
    num_samples: int = field(default=16, metadata={"help": "Samples of each prompt."})
    max_prompts: int | None = field(
        default=None, metadata={"help": "Take only so many prompts, from the beginning of the data."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Completions are cut after so many tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of prior and proposal."})
    batch_size: int = field(default=256, metadata={"help": "Completions generated at once."})
    num_prior_samples: int = field(
        default=100, metadata={"help": "Samples of each prompt for a target that learns from the prior."}
    )
    seed: int = field(default=0, metadata={"help": "The same seed and batch size give the same samples."})
    device: str | None = field(
        default=None, metadata={"help": "Such as cuda:0 or cpu. Defaults to a GPU if there is one."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a model."})
    output_dir: str = field(default="runs/sample", metadata={"help": f"Where {DATA} and {DIAGNOSTICS} are written."})
    tokens: bool = field(
        default=False,
        metadata={
            "help": "Write the tokens as drawn too: SFTTrainer then trains on exactly these, cut completions without "
            "EOS; for models with the same tokenizer."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the samples in an output_dir that has some."})

    num_candidates: int | None = _option("best_of_n", "N (4).")
    max_log_evidence: float | None = _option(
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
        self.target = _from_json(self.target) if isinstance(self.target, str) else self.target
        at_least("num_samples", self.num_samples)
        if self.max_prompts is not None:
            at_least("max_prompts", self.max_prompts)

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
        args, model = read_arguments(parser, sys.argv[1:] if argv is None else argv)
        job = prepare(args, model)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error) or type(error).__name__)
    try:
        draws = run(job)
    except SamplingError as error:  # an error in a reward function keeps its traceback
        parser.error(str(error))
    write(job, draws)
    console = Console()
    console.print(table(draws))
    if "trade_off" in draws.diagnostics:
        console.print(trade_off_table(draws.diagnostics["trade_off"]))
    console.print(f"Samples: {job.folder / DATA}\nDiagnostics: {job.folder / DIAGNOSTICS}", soft_wrap=True)


class Job(NamedTuple):
    """All that is needed to sample."""

    args: SampleArguments
    sampler: Sampler
    rows: list[dict[str, Any]]
    folder: Path
    settings: dict[str, Any]


def read_arguments(parser: RecipeParser, argv: Sequence[str]) -> tuple[SampleArguments, Arguments]:
    """
    The arguments as objects.

    Raises:
        ValueError: one sentence.
    """
    launcher_flags, own_args = read_command_line(parser, list(argv))
    if launcher_flags:
        raise ValueError(f"`{launcher_flags[0]}` is for training in several processes: leave it out, sampling is one.")
    try:
        args, model, mixture, *_ = parser.parse_args_into_dataclasses(own_args)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.doc!r} is not JSON: {error.msg} at character {error.pos + 1}.") from None
    except TypeError as error:  # an unknown entry of one of `datasets`
        raise ValueError(f"A value is not as its field wants it: {error}.") from None
    return args, Arguments(args, cast(Any, None), model, mixture)


def prepare(args: SampleArguments, arguments: Arguments) -> Job:
    """
    Checks all there is to check, models last.

    Raises:
        ValueError: one sentence.
    """
    folder = prepare_folder(args)
    if arguments.model.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing: name the prior, by id or folder.")
    prior_name = embedded_path(arguments.model.model_name_or_path)
    method, target, rewards = args.make_method(), build_target(args.target, args.beta), _reward_functions(args)
    method.check(target, args.proposal_model_name_or_path is not None)
    _check_model("model_name_or_path", prior_name, args.trust_remote_code, arguments.model.model_revision)
    proposal_name = None
    if args.proposal_model_name_or_path is not None:
        proposal_name = embedded_path(args.proposal_model_name_or_path)
        _check_model("proposal_model_name_or_path", proposal_name, args.trust_remote_code)
    rows = _rows(args, arguments)
    prior, tokenizer = _load(prior_name, args, arguments.model, arguments.model.model_revision)
    proposal = None if proposal_name is None else _load_model(proposal_name, args, arguments.model, "main")
    sampler = Sampler(
        prior,
        tokenizer,
        rewards,
        target,
        method,
        proposal=proposal,
        max_new_tokens=args.max_completion_length,
        temperature=args.temperature,
        batch_size=args.batch_size,
        seed=args.seed,
        reward_weights=None if args.reward_weights is None else torch.tensor(args.reward_weights),
        num_prior_samples=args.num_prior_samples,
        progress=sys.stderr.isatty(),
    )
    settings = {
        "prior": arguments.model.model_name_or_path,
        "proposal": args.proposal_model_name_or_path,
        "rewards": [getattr(function, "__name__", repr(function)) for function in rewards],
        "target": repr(target),
        "method": {name: value for name, value in asdict(cast(Any, method)).items() if value is not None},
        "num_samples": args.num_samples,
        "max_completion_length": args.max_completion_length,
        "temperature": args.temperature,
        "seed": args.seed,
    }
    return Job(args, sampler, rows, folder, settings)


def prepare_folder(args: SampleArguments) -> Path:
    """
    Makes sure that samples can be written, and are not written over others.

    Raises:
        ValueError: one sentence.
    """
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        in_use = any(folder.iterdir())
    except OSError as error:
        raise ValueError(f"`output_dir={folder}` cannot be written to: {error.strerror or error}.") from None
    if in_use and not args.overwrite:
        raise ValueError(f"`output_dir={folder}` is not empty: name another folder, or set `--overwrite`.")
    return folder


def _reward_functions(args: SampleArguments) -> list[Any]:
    rewards = [name for name in [args.reward_model_name_or_path] if name] + build_rewards(args.reward_funcs)
    for reward in rewards:
        if isinstance(reward, str):
            raise ValueError(
                f"`reward_funcs` names the reward model {reward!r}, which only a trainer loads: give a function, for "
                "instance {name: classified_as, ...}."
            )
    return rewards


def _rows(args: SampleArguments, arguments: Arguments) -> list[dict[str, Any]]:
    if args.dataset_streaming and args.max_prompts is None:
        raise ValueError("A data set that is streamed may have no end: set `max_prompts`.")
    rows = list(islice(_split(load_data(arguments), args.dataset_train_split, args), args.max_prompts))
    if not rows:
        raise ValueError(f"The data's split {args.dataset_train_split!r} has no rows.")
    return rows


def _load(
    name: str, args: SampleArguments, model: ModelConfig, revision: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    return _load_model(name, args, model, revision), tokenizer


def _load_model(name: str, args: SampleArguments, model: ModelConfig, revision: str) -> PreTrainedModel:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )
    try:
        return cast(Any, loaded).to(device).eval()
    except RuntimeError as error:
        raise ValueError(f"`device={device}` cannot be used: {str(error).splitlines()[0].rstrip('.')}.") from None


def run(job: Job) -> Draws:
    """
    Samples.

    Raises:
        SamplingError: there is not a single sample, or the method cannot be correct; one sentence.
    """
    names = [name for name in job.rows[0] if name not in ("prompt", "completion", "completions", "completion_ids")]
    columns = {name: [row[name] for row in job.rows] for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* prompts have fewer than")  # said by the table
        draws = job.sampler.sample([row["prompt"] for row in job.rows], job.args.num_samples, columns=columns)
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


def table(draws: Draws) -> Table:
    """The diagnostics that are numbers, and the mean reward."""
    shown = Table(title=f"{draws.diagnostics['method']}: {len(draws):,} samples of {len(draws.prompts):,} prompts")
    shown.add_column("")
    shown.add_column("value", justify="right")
    for name, value in draws.diagnostics.items():
        if text := _cell(value):
            shown.add_row(name.replace("_", " "), text)
    shown.add_row("mean reward", _cell(draws.rewards.nansum(dim=1).mean().item()))
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
