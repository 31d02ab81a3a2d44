"""Write one HTML report for runs that have been measured."""

import argparse
from pathlib import Path

from ..command_line.refusals import one_sentence


def main(argv: list[str] | None = None) -> None:
    """
    Reads what was measured of each run, puts the runs on one page and prints where it is.

    Args:
        argv (`list[str]`, *optional*): defaults to the command line.

    Raises:
        SystemExit: code 2 after one sentence on stderr, for what cannot be read, compared or written.
    """
    args = _parser().parse_args(argv)
    from ..evaluation.files import merge_reports, read_report  # after the parser: it imports torch
    from ..evaluation.page import write_report

    folder = Path(args.output_dir).expanduser()
    with one_sentence("trl-bayes report"):
        if (folder / "report.html").exists() and not args.overwrite:
            raise ValueError(f"{folder / 'report.html'} exists: give another --output_dir, or --overwrite.")
        report = merge_reports({path: read_report(Path(path).expanduser()) for path in args.runs})
        report.title = args.title or report.title
        print(write_report(report, folder))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-bayes report", description=__doc__)
    found = "folder of a training, a quickstart, an evaluation or a report"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=found)
    parser.add_argument("--output_dir", default="runs/report", help="where report.html, report.json and figures/ go")
    parser.add_argument("--title", help="title of the page; by default the first run's")
    parser.add_argument("--overwrite", action="store_true", help="replace a report that is there")
    return parser


if __name__ == "__main__":
    main()
