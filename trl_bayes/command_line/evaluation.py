"""The evaluation of policies: what is asked for, measured against one posterior, and told in a table."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import trl
from rich.table import Table

from ..evaluation.evaluate import Evaluation, evaluate_posterior, evaluate_prior
from ..evaluation.files import write_samples
from ..evaluation.posterior import Posterior
from ..evaluation.report import Report, RunRecord, choose_lines
from ..evaluation.tables import DIVERSITY_COLUMNS, Column, distance_columns, reward_columns, tabulate
from ..language_models.completions import Completions
from ..language_models.settings import at_least
from ..language_models.vocabulary import check_same_vocabulary
from .arguments import Arguments, StudyArguments
from .folders import prepare_folder
from .models import find_config, model_path
from .study import Study, load_study


_METHODS = ("auto", "rejection", "importance")
_REFERENCES = ("posterior", "prior")  # rows of their own, whose names no policy can have
KEPT = "kept"  # what has been drawn and scored so far, in the output folder
_LOG_Z = Column("log_z", "log Z", "Evidence: how much of the prior is compatible with the target.")


@dataclass
class EvaluateArguments(StudyArguments):
    r"""
    Arguments of `trl-bayes evaluate`.

    This class includes only the parameters that are not in [`~trl_bayes.command_line.arguments.StudyArguments`].

    All policies are compared with one posterior, that of the recipe and its prior. A target that learns, such as
    `Moments`, is fitted to the samples of the prior that are drawn here, for these prompts, and not read from a
    policy's checkpoint: what a checkpoint has learned belongs to its own prior and data, which its folder does not
    name. Where a policy was trained on other prompts, or on more of them, its own target differs, and its distance
    includes that. For the same fit take the same prompts (`max_prompts`), and the training's samples, as many of
    them: its `prior_samples_dir`, with `num_reference_samples` as its `num_prior_samples`. Samples on which one of the
    policies was trained themselves (`prior_fraction`, XPO) are not read: it would seem nearer than it is.

    Parameters:
        policies (`list[str]`):
            What to evaluate, each as `PATH` or `NAME=PATH`: folders or ids of models, checkpoints, outputs of TRL's
            trainers or of any other, and PEFT adapters, all with the prior's tokenizer.
        num_samples (`int`, *optional*, defaults to `400`):
            The most samples of each policy for each prompt.
        num_reference_samples (`int`, *optional*, defaults to `1000`):
            The most samples of the prior for each prompt, from which log Z and the posterior are estimated.
        standard_error (`float`, *optional*, defaults to `0.05`):
            When there is enough: fewer samples are drawn where log Z and the distances have a standard error of so
            many nats, or of that share of a larger number, and are trusted. 0 draws all. A target that learns from
            the prior is always given all samples of it.
        method (`str`, *optional*, defaults to `"auto"`):
            How averages over the posterior are taken, KL(p||pi) among them: `rejection` from exact samples, which
            needs a bound on the evidence, or `importance` from weighted samples of the prior. `auto` is rejection
            where the bound is known.
        max_log_potential (`float`, *optional*):
            The largest phi that any completion can have, such as the largest reward over beta. A constraint's is 0.
        pass_at (`list[int]`, *optional*, defaults to `[1, 10, 100]`):
            k of each pass@k, for rewards of 0 and 1.
        diversity (`bool`, *optional*, defaults to `True`):
            Whether to measure distinct-n, self-BLEU and the share of distinct completions.
        save_samples (`bool`, *optional*, defaults to `False`):
            Whether to write the samples of every row to `samples/NAME.jsonl`: prompt, completion, rewards.
        max_prompts (`int`, *optional*, defaults to `64`):
            Takes only so many prompts, from the beginning.
        output_dir (`str`, *optional*, defaults to `"runs/evaluation"`):
            Where `evaluation.json` is written, which `trl-bayes report` reads, and what has been drawn is kept
            (`kept/`): a run that was stopped goes on.
    """

    policies: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to evaluate, each as PATH or NAME=PATH: models, checkpoints, outputs of any trainer and "
            "PEFT adapters, all with the prior's tokenizer."
        },
    )
    num_samples: int = field(default=400, metadata={"help": "The most samples of each policy for each prompt."})
    num_reference_samples: int = field(
        default=1000,
        metadata={
            "help": "The most samples of the prior for each prompt: what log Z and the posterior are estimated from."
        },
    )
    standard_error: float = field(
        default=0.05,
        metadata={
            "help": "Fewer samples are drawn where log Z and the distances have a standard error of so many nats, or "
            "of that share of a larger number; 0 draws all."
        },
    )
    method: str = field(
        default="auto",
        metadata={
            "help": "How averages over the posterior are taken, KL(p||pi) among them: from exact samples by "
            "rejection, or by importance sampling; auto is rejection where the evidence has a known bound.",
            "choices": [*_METHODS],
        },
    )
    max_log_potential: float | None = field(
        default=None,
        metadata={
            "help": "The largest phi of any completion, such as the largest reward over beta; a constraint's is known "
            "to be 0."
        },
    )
    pass_at: list[int] = field(
        default_factory=lambda: [1, 10, 100], metadata={"help": "k of each pass@k, for rewards of 0 and 1."}
    )
    diversity: bool = field(
        default=True, metadata={"help": "Measure distinct-n, self-BLEU and the share of distinct completions."}
    )
    save_samples: bool = field(
        default=False, metadata={"help": "Write the samples of every row to samples/NAME.jsonl in the output_dir."}
    )
    max_prompts: int | None = field(
        default=64, metadata={"help": "Take only so many prompts, from the beginning of the data."}
    )
    output_dir: str = field(default="runs/evaluation", metadata={"help": "Where evaluation.json is written."})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("num_samples", self.num_samples, 2)
        at_least("num_reference_samples", self.num_reference_samples, 2)
        for k in self.pass_at:
            at_least("pass_at", k)
        if not (math.isfinite(self.standard_error) and self.standard_error >= 0):
            raise ValueError(f"`standard_error` must be 0 or a positive finite number, got {self.standard_error}.")
        if self.max_log_potential is not None and not math.isfinite(self.max_log_potential):
            raise ValueError(f"`max_log_potential` must be finite, got {self.max_log_potential}.")


class Job(NamedTuple):
    """All that is needed to evaluate."""

    args: EvaluateArguments
    arguments: Arguments
    study: Study
    policies: dict[str, str]
    max_log_potential: float | None
    folder: Path


# ---------------------------------------------------------------------------------------------------------------------
# What to evaluate


def prepare(args: EvaluateArguments, arguments: Arguments) -> Job:
    """
    Checks all there is to check; the prior is loaded last, and policies one at a time when it is their turn.

    Raises:
        ValueError: one sentence.
    """
    policies = name_policies(args.policies or [])
    trust = arguments.training.trust_remote_code
    configs = {name: find_config("policies", path, trust) for name, path in policies.items()}
    folder = prepare_folder(args.output_dir, args.overwrite, unfinished=KEPT)
    study = load_study(args, arguments)
    for name, path in policies.items():
        check_same_vocabulary(f"policy {name!r}", path, configs[name], study.prior.config, study.tokenizer, trust)
    bound = study.target.max_log_potential() if args.max_log_potential is None else args.max_log_potential
    if args.method == "rejection" and bound is None and not study.target.will_know_its_bound:
        raise ValueError(
            f"`method=rejection` needs evidence with a known upper bound, which {study.target!r} does not have: set "
            "`max_log_potential`, such as the largest reward over beta, or `method` to 'importance'."
        )
    return Job(args, arguments, study, policies, bound, folder)


def name_policies(specs: Sequence[str]) -> dict[str, str]:
    """
    Paths of policies by their names.

    Args:
        specs (`list[str]`): `NAME=PATH`, or `PATH`, whose name is that of the folder.

    Raises:
        ValueError: none at all, a name that occurs twice, or one that is taken; one sentence.
    """
    if not specs:
        raise ValueError("`policies` is missing: name the models to evaluate, each as PATH or NAME=PATH.")
    policies: dict[str, str] = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not equals or Path(spec).exists():
            name, path = Path(spec).name, spec
        if not name or not path:
            raise ValueError(f"The policy {spec!r} is neither PATH nor NAME=PATH.")
        if name in _REFERENCES:
            raise ValueError(f"No policy can be called {name!r}, which is a row of its own: call it otherwise.")
        if Path(name).name != name:
            raise ValueError(f"The policy's name {name!r} is to be part of a file's: leave out the slashes.")
        if name in policies:
            raise ValueError(f"Two policies are called {name!r}: tell them apart as NAME=PATH.")
        policies[name] = model_path(path)
    return policies


# ---------------------------------------------------------------------------------------------------------------------
# Measurement


def work_in_words(job: Job) -> str:
    """What will be drawn, so that nobody waits for an hour who meant a minute."""
    args, prompts = job.args, len(job.study.rows)
    total = prompts * (args.num_reference_samples + args.num_samples * len(job.policies))
    kept = f", less what {job.study.prior_samples_dir} has" if job.study.prior_samples_dir else ""
    return (
        f"{prompts:,} prompts: at most {args.num_reference_samples:,} completions of each by the prior{kept}, and "
        f"{args.num_samples:,} by each of {len(job.policies)} policies; {total:,} in all, of up to "
        f"{job.study.settings.max_new_tokens:,} tokens. What has been drawn is kept in {job.folder / KEPT}: a second "
        "start goes on."
    )


def make_report(
    job: Job, posterior: Posterior, found: Mapping[str, tuple[Evaluation, Completions]], numbers: Mapping[str, int]
) -> Report:
    """
    What has been measured, as a report.

    Args:
        job ([`Job`]): what was asked for.
        posterior ([`~trl_bayes.evaluation.posterior.Posterior`]): what the policies were compared with.
        found (`Mapping`): estimates and samples of each policy, by its name.
        numbers (`Mapping`): how many samples of each prompt were drawn, by the name of who drew them.
    """
    runs = [
        _record(job, name, evaluation, posterior, completions, settings={"policy": job.policies[name]})
        for name, (evaluation, completions) in found.items()
    ]
    report = _report(job, posterior, runs)
    report.settings |= {"samples per prompt": dict(numbers), "standard error asked for": job.args.standard_error}
    return report


def _record(
    job: Job,
    name: str,
    evaluation: Evaluation,
    posterior: Posterior,
    completions: Completions,
    settings: dict[str, Any] | None = None,
) -> RunRecord:
    if job.args.save_samples:
        write_samples(completions, job.folder, name)
    lines = choose_lines(completions, _valid(posterior, completions))
    return RunRecord(name, name, "", evaluation, samples=lines, settings=settings or {})


def _valid(posterior: Posterior, completions: Completions) -> torch.Tensor | None:
    """Whether each completion has evidence, where evidence is a matter of yes and no."""
    if posterior.target.hard:
        return posterior.log_potential(completions) > -math.inf  # one without any reward has no evidence
    return completions.rewards[:, 0] > 0.5 if _is_share(posterior) else None


def _is_share(posterior: Posterior) -> bool:
    """Whether the reward is one of 0 or 1."""
    rewards = posterior.prior.completions.rewards
    return rewards.size(1) == 1 and posterior.reward_weights is None and bool(((rewards == 0) | (rewards == 1)).all())


def _report(job: Job, posterior: Posterior, runs: list[RunRecord]) -> Report:
    study, args, weights = job.study, job.args, job.arguments.training.reward_weights
    target, bound = posterior.target, job.max_log_potential
    ess = posterior.z.effective_samples
    of_prior = evaluate_prior(posterior, diversity=args.diversity)
    of_posterior = evaluate_posterior(posterior, diversity=args.diversity)
    how = "exact" if posterior.method == "rejection" else "weighted prior samples"
    policies = "policies" if len(runs) > 1 else "policy"
    return Report(
        title=f"{len(runs)} {policies} against the posterior of {_rounded(repr(target))}",
        intro=(
            "Each policy is compared with the posterior, which is the prior updated by the evidence, through samples "
            "of the prior, of the posterior and of the policy itself."
        ),
        problem={
            "prior": study.named,
            "rewards": ", ".join(study.reward_names),
            "target": repr(target),
            "prompts": _prompts_in_words(study),
            "longest completion": f"{study.settings.max_new_tokens} tokens",
            "temperature": str(study.settings.temperature),
        },
        posterior=_record(job, "posterior", of_posterior, posterior, posterior.exact),
        prior=_record(job, "prior", of_prior, posterior, posterior.prior.completions),
        runs=runs,
        hard=posterior.target.hard,
        reward_label=_reward_label(study.reward_names, weights),
        reward_is_share=_is_share(posterior),
        valid_label="has the evidence" if posterior.target.hard else "rewarded",
        invalid_label="does not" if posterior.target.hard else "not rewarded",
        settings={
            "posterior": how,
            "log Z": of_prior.metrics["log_z"].to_dict(),
            "effective samples of the posterior": {"mean": ess.mean().item(), "min": ess.min().item()},
            "largest log-potential": target.max_log_potential() if bound is None else bound,
            "reward weights": weights,
            "seed": args.seed,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
    )


def _rounded(text: str) -> str:
    """A text whose long numbers are cut to four digits, for a heading."""
    return re.sub(r"\d+\.\d{5,}", lambda number: f"{float(number[0]):.4g}", text)


def _reward_label(names: list[str], weights: list[float] | None) -> str:
    if weights is not None:
        return "weighted reward" if len(names) == 1 else "weighted sum of rewards"
    return f"mean {names[0]}" if len(names) == 1 else "sum of rewards"


def _prompts_in_words(study: Study) -> str:
    number, of = len(study.rows), study.num_rows
    return f"{number:,}" if of in (None, number) else f"the first {number:,} of {of:,}"


# ---------------------------------------------------------------------------------------------------------------------
# Results


def results_table(report: Report) -> Table:
    """Every metric of every model, with its standard error; what cannot be trusted has no number."""
    metrics = tabulate(_columns(report), report.rows)
    table = Table(title=f"{report.title}\nprompts: {report.problem['prompts']}; distances and entropy in nats")
    table.add_column("")
    for row, _ in metrics.rows:
        table.add_column(row.label, justify="right")
    for place, column in enumerate(metrics.columns):
        cells = [cells[place] for _, cells in metrics.rows]
        table.add_row(column.heading, *(cell.text + _mark(cell.footnote) for cell in cells))
    return table


def _columns(report: Report) -> list[Column]:
    return [_LOG_Z, *distance_columns(report), *reward_columns(report), *DIVERSITY_COLUMNS]


def _mark(footnote: int | None) -> str:
    return "" if footnote is None else f" [{footnote}]".replace("[", "\\[")


_TOO_FEW = {
    "samples of the posterior for some prompt": "num_reference_samples",
    "too rare to have been seen": "num_reference_samples",
    "samples inside the posterior's support for some prompt": "num_samples",
}
"""What is said of samples that are too few, and the option to raise."""


def _advice(note: str) -> str:
    options = dict.fromkeys(option for words, option in _TOO_FEW.items() if words in note)
    return "".join(f": raise `--{option}`" for option in options)


def notes(report: Report) -> list[str]:
    """What the footnotes of the table say, and what holds for whole rows."""
    footnotes = tabulate(_columns(report), report.rows).footnotes
    numbered = [f"\\[{number}] {note}{_advice(note)}" for number, note in enumerate(footnotes, start=1)]
    of_rows = dict.fromkeys(row.evaluation.note for row in report.rows if row.evaluation and row.evaluation.note)
    return numbered + list(of_rows)
