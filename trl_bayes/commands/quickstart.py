"""Fine-tune the embedded prior four ways towards lines that parse, measure the results and write a report."""

import time
from collections.abc import Sequence
from typing import Any, cast

from rich.console import Console
from transformers import HfArgumentParser

from ..command_line.quickstart import QuickstartArguments, prepare_quickstart, train_all
from ..command_line.quickstart_report import measure_all, results_table, write_metrics
from ..command_line.refusals import one_sentence
from ..evaluation.page import write_report


def main(argv: Sequence[str] | None = None) -> None:
    """
    Trains what is not trained yet, measures, and writes the report.

    Raises:
        SystemExit: code 2 after one sentence on stderr, for anything that is wrong with the arguments.
    """
    parser = HfArgumentParser(cast(Any, QuickstartArguments), prog="trl-bayes quickstart", description=__doc__)
    with one_sentence("trl-bayes quickstart"):
        (args,) = parser.parse_args_into_dataclasses(args=None if argv is None else list(argv))
        folder = prepare_quickstart(args)
    console = Console(stderr=True)
    start = time.perf_counter()
    train_all(args, folder, console)
    trained = time.perf_counter()
    report = measure_all(args, folder, console)
    report.settings |= {
        "seconds of training": round(trained - start),
        "seconds of measurement": round(time.perf_counter() - trained),
    }
    page = write_report(report, folder)
    write_metrics(report, folder)
    Console().print(results_table(report))
    Console().print(f"Report: {page}\nNumbers: {folder / 'metrics.json'}\nModels: {folder}/<run>", soft_wrap=True)


if __name__ == "__main__":
    main()
