"""The quickstart's measurement: every run and checkpoint against exact samples of the posterior, and what is told."""

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import trl
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..assets import embedded_path
from ..evaluation.evaluate import evaluate, evaluate_posterior, evaluate_prior
from ..evaluation.posterior import Posterior, condition
from ..evaluation.report import CurvePoint, Report, RunRecord, choose_lines
from ..language_models.completions import Completions
from ..language_models.settings import SamplingSettings
from ..prior.reference import draw_prior
from ..rewards import parses
from ..statistics.estimate import Estimate
from ..targets import Constraint
from .quickstart import RUNS, TRAINED, QuickstartArguments, Run, progress_bars


_PRIOR = "embedded:python_lines"
_INTRO = (
    "A small language model that writes lines of Python is the prior; whether a line parses is the evidence; and the "
    "prior conditioned on lines that parse is the posterior, known here through exact samples. Four trainers start "
    "from the prior with the same budget of completions. Pure RL is paid for lines that parse and for nothing else; "
    "the other three approximate the posterior."
)


# ---------------------------------------------------------------------------------------------------------------------
# Measurement: against exact samples of the posterior


class _Reference(NamedTuple):
    """What runs and checkpoints are measured against; checkpoints by fewer samples."""

    prior: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    exact: Posterior
    of_checkpoints: Posterior


def measure_all(args: QuickstartArguments, folder: Path, console: Console) -> Report:
    """Measures prior, posterior, and every run with its checkpoints, and removes the checkpoints."""
    torch.set_num_threads(args.num_parallel)  # the cores that training had
    checkpoints = {run.name: _checkpoints(folder / run.name) for run in RUNS}
    with progress_bars(console) as progress:
        bar = progress.add_task("Measuring", total=1 + sum(len(found) + 1 for found in checkpoints.values()))

        def advance() -> None:
            progress.advance(bar)

        reference = _draw_reference(args)
        advance()
        runs = [_measure(run, args, folder, reference, checkpoints[run.name], advance) for run in RUNS]
    for run in RUNS:
        for _, checkpoint in checkpoints[run.name]:
            shutil.rmtree(checkpoint)
    return _report(args, reference.exact, runs)


def _draw_reference(args: QuickstartArguments) -> _Reference:
    prior, tokenizer = _load(embedded_path(_PRIOR)), AutoTokenizer.from_pretrained(embedded_path(_PRIOR))
    lines = Path(embedded_path(_PRIOR, "prompts.jsonl")).read_text(encoding="utf-8").splitlines()
    drawn = draw_prior(
        prior,
        tokenizer,
        [json.loads(line)["prompt"] for line in lines],
        [parses],
        args.prior_samples,
        SamplingSettings(RUNS[0].settings["max_completion_length"], seed=args.seed),
    )
    # Distinct-n depends on the number of samples: every row's is measured from as many
    exact = condition(drawn, Constraint(), diversity_per_prompt=args.policy_samples)
    of_checkpoints = condition(drawn, Constraint(), max_per_prompt=args.checkpoint_samples)
    return _Reference(prior, tokenizer, exact, of_checkpoints)


def _measure(
    run: Run,
    args: QuickstartArguments,
    folder: Path,
    reference: _Reference,
    checkpoints: list[tuple[int, Path]],
    advance: Callable[[], None],
) -> RunRecord:
    """A run and its checkpoints; `advance` is called after each."""

    def measured(model: Path, posterior: Posterior, number: int, diversity: bool) -> tuple[Any, Completions]:
        outcome = evaluate(
            _load(model),
            reference.prior,
            reference.tokenizer,
            [parses],
            posterior,
            num_per_prompt=number,
            name=model.name,
            diversity=diversity,
            seed=args.seed + 1,
        )
        advance()
        return outcome

    curve = [CurvePoint(0, 0, evaluate_prior(reference.of_checkpoints, diversity=False).metrics)]
    for step, checkpoint in checkpoints:
        evaluation, _ = measured(checkpoint, reference.of_checkpoints, args.checkpoint_samples, False)
        curve.append(CurvePoint(step, step * run.settings["per_device_train_batch_size"], evaluation.metrics))
    evaluation, completions = measured(folder / run.name, reference.exact, args.policy_samples, True)
    if checkpoints:  # the last one is the model itself, now measured better
        curve[-1] = CurvePoint(curve[-1].step, curve[-1].samples, evaluation.metrics)
    return _record(run, args, folder, evaluation, completions, curve)


def _load(path: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of a run's checkpoints, in order."""
    return sorted((int(path.name.removeprefix("checkpoint-")), path) for path in folder.glob("checkpoint-*"))


def _valid(completions: Completions) -> torch.Tensor:
    return completions.rewards[:, 0] > 0.5


def _record(
    run: Run,
    args: QuickstartArguments,
    folder: Path,
    evaluation: Any,
    completions: Completions,
    curve: list[CurvePoint],
) -> RunRecord:
    evaluation.name = run.name
    trained = json.loads((folder / run.name / TRAINED).read_text(encoding="utf-8"))
    return RunRecord(
        run.name,
        run.label,
        run.target,
        evaluation,
        curve,
        choose_lines(completions, _valid(completions)),
        {**run.settings, **args.overrides},
        trained["seconds"],
    )


def _report(args: QuickstartArguments, exact: Posterior, runs: list[RunRecord]) -> Report:
    drawn = exact.prior.completions
    posterior = RunRecord(
        "posterior",
        "Posterior (exact)",
        "prior given that the line parses",
        evaluate_posterior(exact),
        samples=choose_lines(exact.exact, _valid(exact.exact)),
    )
    prior = RunRecord("prior", "Prior", "", evaluate_prior(exact), samples=choose_lines(drawn, _valid(drawn)))
    return Report(
        title="trl_bayes quickstart: lines of Python that parse",
        intro=_INTRO,
        problem={
            "prior": "a language model that writes a line of Python; about half of its lines end in a stray backslash",
            "evidence": "1 if the completed line parses as one Python statement, else 0",
            "prompts": ", ".join(repr(prompt) for prompt in drawn.prompts),
            "longest completion": f"{exact.prior.settings.max_new_tokens} tokens",
        },
        posterior=posterior,
        prior=prior,
        runs=runs,
        hard=True,
        reward_label="share of lines that parse",
        reward_is_share=True,
        valid_label="parses",
        invalid_label="does not parse",
        settings={
            "seed": args.seed,
            "prior samples": len(exact.phi),
            "exact posterior samples": len(exact.exact),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "CPU threads": args.num_parallel,
        },
    )


# ---------------------------------------------------------------------------------------------------------------------
# Results


def write_metrics(report: Report, folder: Path) -> None:
    """Writes `metrics.json`: every estimate of every row, with its standard error."""
    rows = {row.name: row.evaluation.to_dict() for row in report.rows if row.evaluation is not None}
    text = json.dumps({"settings": report.settings, "rows": rows}, indent=1, allow_nan=False)
    (folder / "metrics.json").write_text(text, encoding="utf-8")


_COLUMNS = {
    "parse": ("reward", True),
    "KL(π‖π₀)": ("kl_prior", False),
    "KL(p‖π)": ("forward_kl", False),
    "entropy": ("entropy", False),
    "distinct-2": ("distinct_2", False),
    "distinct lines": ("share_distinct", True),
}


def results_table(report: Report) -> Table:
    """The main numbers of every row, in nats unless they are shares; their standard errors are in the report."""
    table = Table(title="p: posterior, π: policy, π₀: prior; distances and entropy in nats")
    table.add_column("")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for row in report.rows:
        estimates = [(row.metric(metric), percent) for metric, percent in _COLUMNS.values()]
        table.add_row(row.label, *(_cell(estimate, percent) for estimate, percent in estimates))
    return table


def _cell(estimate: Estimate | None, percent: bool) -> str:
    if estimate is None:
        return "–"
    if not estimate.trusted:
        return "not reliable"
    return f"{estimate.value:.1%}" if percent else f"{estimate.value:.3g}"
