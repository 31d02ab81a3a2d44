"""Samples of a posterior: what is asked for, drawn by one of the methods, written as a data set, told in a table."""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args, get_type_hints

import torch
from rich.table import Table

from ..language_models.completions import Completions
from ..language_models.settings import at_least
from ..samplers import METHODS, Method, Sampler, SamplingError
from ..samplers.sampler import check_base
from ..targets import build_target
from ..targets.base import weighted_sum
from ..trainers.posterior_config import PosteriorConfig
from .arguments import Arguments, StudyArguments
from .folders import prepare_folder
from .models import find_config, load_model, model_path
from .study import Study, load_study


DATA = "train.parquet"
DIAGNOSTICS = "diagnostics.json"


def _method_options() -> type:
    """
    The settings of all methods as flags, of which none has a default: what is not given is the method's own.

    Their words are those of [`~trl_bayes.samplers.setting`], with the names of the methods that take them.
    """
    found: dict[str, list[str]] = {}  # the methods of each setting
    types: dict[str, Any] = {}
    words: dict[str, str] = {}
    for name, method in METHODS.items():
        hints = get_type_hints(method)
        for option in fields(cast(Any, method)):
            found.setdefault(option.name, []).append(name)
            types.setdefault(option.name, _flag_type(hints[option.name]) | None)
            default = "" if option.default in (None, MISSING) else f" ({option.default})"
            words.setdefault(option.name, option.metadata.get("help", "").removesuffix(".") + default)
    return make_dataclass(
        "MethodOptions",
        [
            (name, types[name], field(default=None, metadata={"help": f"{', '.join(methods)}: {words[name]}"}))
            for name, methods in found.items()
        ],
        namespace={"__module__": __name__},
    )


def _flag_type(hint: Any) -> type:
    """The type of a setting that can stand on a command line; a text where it is one of some names."""
    simple = (part for part in (hint, *get_args(hint)) if part in (bool, int, float, str))
    return next(simple, str)


MethodOptions: Any = _method_options()


@dataclass
class SampleArguments(MethodOptions, StudyArguments):
    r"""
    Arguments of `trl-bayes sample`.

    This class includes only the parameters that are not in [`~trl_bayes.command_line.arguments.StudyArguments`]; the
    options of a method are the settings of its class in [`trl_bayes.samplers`].

    Parameters:
        method (`str`, *optional*, defaults to `"rejection"`):
            One of `prior`, `best_of_n`, `rejection`, `quasi_rejection`, `mcmc`, `smc`, `realigned`, `proxy`.
        proposal_model_name_or_path (`str`, *optional*):
            Policy that proposes completions, with the vocabulary of the prior. Defaults to the prior.
        proposal_base_model_name_or_path (`str`, *optional*):
            What this policy was trained from, for `proxy`.
        num_samples (`int`, *optional*, defaults to `16`):
            Samples of each prompt.
        num_prior_samples (`int`, *optional*, defaults to `100`):
            Samples of each prompt for a target that learns from the prior.
        output_dir (`str`, *optional*, defaults to `"runs/sample"`):
            Where `train.parquet` and `diagnostics.json` are written.
        tokens (`bool`, *optional*, defaults to `False`):
            Whether to write the tokens as drawn besides the texts, see
            [`~trl_bayes.language_models.completions.Completions.to_dataset`].
    """

    method: str = field(default="rejection", metadata={"help": "How to sample.", "choices": list(METHODS)})
    proposal_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Policy that proposes completions, with the vocabulary of the prior. Defaults to the prior."
        },
    )
    proposal_base_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "proxy: what the proposal was trained from, with the vocabulary of the prior."},
    )
    num_samples: int = field(default=16, metadata={"help": "Samples of each prompt."})
    num_prior_samples: int = field(
        default=cast(int, PosteriorConfig.__dataclass_fields__["num_prior_samples"].default),
        metadata={"help": "Samples of each prompt for a target that learns from the prior, as in training."},
    )
    output_dir: str = field(default="runs/sample", metadata={"help": f"Where {DATA} and {DIAGNOSTICS} are written."})
    tokens: bool = field(
        default=False,
        metadata={
            "help": "Write the tokens as drawn too: SFTTrainer then trains on exactly these, cut completions without "
            "EOS; for models with the same tokenizer."
        },
    )

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


class Job(NamedTuple):
    """All that is needed to sample."""

    args: SampleArguments
    study: Study
    sampler: Sampler
    folder: Path
    settings: dict[str, Any]


def prepare(args: SampleArguments, arguments: Arguments) -> Job:
    """
    Checks all there is to check, models last.

    Raises:
        ValueError: one sentence.
    """
    training = arguments.training
    folder, method = prepare_folder(args.output_dir, args.overwrite), args.make_method()
    method.check(build_target(training.target, training.beta), args.proposal_model_name_or_path is not None)
    check_base(method, args.proposal_base_model_name_or_path is not None)
    others: dict[str, str] = {}
    for field_name in ("proposal_model_name_or_path", "proposal_base_model_name_or_path"):
        if (named := getattr(args, field_name)) is not None:
            others[field_name.removesuffix("_model_name_or_path")] = path = model_path(named)
            find_config(field_name, path, training.trust_remote_code)
    study = load_study(args, arguments)
    sampler = Sampler(
        study.prior,
        study.tokenizer,
        study.rewards,
        study.target,
        method,
        study.settings,
        **{role: load_model(path, arguments.model, arguments.training, args.device) for role, path in others.items()},
        reward_weights=study.reward_weights,
        num_prior_samples=args.num_prior_samples,
        prior_samples_dir=study.prior_samples_dir,
        prior_name=study.prior_path,
        prior_seed=study.settings_of_prior.seed,
    )
    settings = {
        "prior": study.named,
        "proposal": args.proposal_model_name_or_path,
        "proposal_base": args.proposal_base_model_name_or_path,
        "rewards": study.reward_names,
        "target": repr(study.target),
        "method": {name: value for name, value in asdict(cast(Any, method)).items() if value is not None},
        "num_samples": args.num_samples,
        "max_completion_length": study.settings.max_new_tokens,
        "temperature": study.settings.temperature,
        "seed": args.seed,
    }
    return Job(args, study, sampler, folder, settings)


def draw(job: Job) -> Completions:
    """
    Samples.

    Raises:
        SamplingError: there is not a single sample, or the method cannot be correct; one sentence.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* prompts have fewer than")  # said by the table
        draws = job.sampler.sample(job.study.prompts, job.args.num_samples, columns=job.study.columns)
    if not len(draws):
        raise SamplingError(
            f"The method {job.args.method!r} found no sample in {draws.diagnostics['num_generated']:,} completions: "
            "check the rewards and the target, or give a proposal that meets them more often."
        )
    return draws


def write(job: Job, draws: Completions) -> None:
    """Writes the data set, which `load_dataset(output_dir)` reads, and the diagnostics."""
    draws.to_dataset(job.args.tokens).to_parquet(str(job.folder / DATA))
    text = json.dumps({"settings": job.settings, **draws.diagnostics}, indent=1, allow_nan=False)
    (job.folder / DIAGNOSTICS).write_text(text + "\n", encoding="utf-8")


def table(draws: Completions, reward_weights: torch.Tensor | None = None) -> Table:
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
