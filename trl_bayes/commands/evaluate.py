"""Measure how far policies are from a posterior: divergences, rewards and diversity, with standard errors."""

import sys
import time
from collections.abc import Sequence

from rich.console import Console

from ..command_line.evaluation import EvaluateArguments, make_report, notes, prepare, results_table, work_in_words
from ..command_line.folders import gone_if_unused
from ..command_line.measuring import Measuring, NoPosteriorError
from ..command_line.recipe import read_study
from ..command_line.refusals import one_sentence
from ..evaluation.files import write_evaluation
from ..prior import PriorSamplesError


def main(argv: Sequence[str] | None = None) -> None:
    """
    Evaluates, writes the estimates and prints them.

    Raises:
        SystemExit: code 2 after one sentence on stderr, for anything that is wrong with the configuration.
    """
    with one_sentence("trl-bayes evaluate"):
        args, arguments = read_study(
            EvaluateArguments,
            "evaluate",
            sys.argv[1:] if argv is None else argv,
            usage="[--config RECIPE] --policies [NAME=]PATH ... [--FIELD VALUE ...]",
            description=__doc__,
            epilog="The recipe may be that of a training command: what only concerns training is passed over.",
        )
    with gone_if_unused(args.output_dir), one_sentence("trl-bayes evaluate"):
        job = prepare(args, arguments)
    console = Console()
    console.print(work_in_words(job), soft_wrap=True, highlight=False)
    start = time.perf_counter()
    work = Measuring(job, lambda line: console.print(line, soft_wrap=True, highlight=False))
    with one_sentence(
        "trl-bayes evaluate", (PriorSamplesError, NoPosteriorError)
    ):  # errors in rewards keep a traceback
        found = work.measure(work.posterior())
    report = make_report(job, *found)
    report.settings["seconds"] = round(time.perf_counter() - start)
    file = write_evaluation(report, job.folder)
    console.print(results_table(report))
    for note in notes(report):
        console.print(note, soft_wrap=True, highlight=False)
    console.print(f"Estimates: {file}\nPage: trl-bayes report {job.folder}", soft_wrap=True)


if __name__ == "__main__":
    main()
