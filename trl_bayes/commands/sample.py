"""Sample a posterior without training and write the samples as a data set for `SFTTrainer`."""

import sys
from collections.abc import Sequence

from rich.console import Console

from ..command_line.folders import gone_if_unused
from ..command_line.recipe import read_study
from ..command_line.refusals import one_sentence
from ..command_line.sampling import DATA, DIAGNOSTICS, SampleArguments, draw, prepare, table, trade_off_table, write
from ..prior import PriorSamplesError
from ..samplers import SamplingError
from ..targets import LogPotentialError


def main(argv: Sequence[str] | None = None) -> None:
    """
    Samples, and writes the data set and its diagnostics.

    Raises:
        SystemExit: code 2 after one sentence on stderr, for anything that is wrong with the configuration.
    """
    with one_sentence("trl-bayes sample"):
        args, arguments = read_study(
            SampleArguments,
            "sample",
            sys.argv[1:] if argv is None else argv,
            usage="[--config RECIPE] [--FIELD VALUE ...]",
            description=__doc__,
        )
    with gone_if_unused(args.output_dir):
        with one_sentence("trl-bayes sample"):
            job = prepare(args, arguments)
        with one_sentence(
            "trl-bayes sample", (SamplingError, LogPotentialError, PriorSamplesError)
        ):  # an error in a reward function keeps its traceback
            draws = draw(job)
    write(job, draws)
    console = Console()
    console.print(table(draws, job.study.reward_weights))
    if "trade_off" in draws.diagnostics:
        console.print(trade_off_table(draws.diagnostics["trade_off"]))
    console.print(f"Samples: {job.folder / DATA}\nDiagnostics: {job.folder / DIAGNOSTICS}", soft_wrap=True)


if __name__ == "__main__":
    main()
