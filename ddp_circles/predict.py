"""Command line: `python -m ddp_circles.predict`, points to logits to probabilities to labels."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ddp_circles import cli
from ddp_circles.config import in_arguments
from ddp_circles.errors import UserError
from ddp_circles.job.ranks import Ranks
from ddp_circles.job.refusal import refuse
from ddp_circles.terminal import open_streams, remark, visible_lines

EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class CommandLine:
    """Predict with the model of a finished run: raw logits, prediction probabilities, prediction labels.

    With two classes, logit and probability are those of class 1; with more, there is one of each for every class.
    The last digits of logits and probabilities can depend on how many points are computed together.
    """

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of the run."""
    points: Annotated[tuple[str, ...], tyro.conf.arg(metavar="X1,X2 [X1,X2 ...]", help_behavior_hint="")] = ()
    """Predict for these points."""
    csv: Annotated[Path | None, tyro.conf.arg(metavar="IN.csv", help_behavior_hint="")] = None
    """Predict for the points of a file: one a line, two columns separated by a comma, under a header with any
    names or none. Use with --out."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="OUT.csv", help_behavior_hint="")] = None
    """File for the lines of --csv, each with its logits, probabilities and label; always with a header. The file
    appears when it is complete."""
    show: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """Predict for the first N test points of the run, beside the truth."""


def main() -> None:
    """Parse, predict, and leave with the exit code of the contract."""
    open_streams()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a terminated run tidies up like Ctrl-C
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Do what the command line asks for; returns the exit code."""
    try:
        print(visible_lines(_answer(cli.parse(CommandLine, arguments, program="ddp_circles.predict"))))
    except UserError as error:
        return refuse(Ranks(), UserError(in_arguments(str(error))))  # settings are keys of config.toml here
    except KeyboardInterrupt:
        remark("interrupted")
        return EXIT_INTERRUPTED
    return 0


def _answer(chosen: CommandLine) -> str:
    if [chosen.points != (), chosen.csv is not None, chosen.show is not None].count(True) != 1:
        raise UserError("give exactly one of --points, --csv and --show")
    if (chosen.csv is None) != (chosen.out is None):
        raise UserError("--csv IN.csv and --out OUT.csv belong together")
    from ddp_circles import inference  # noqa: PLC0415 - the seam: no torch before this line

    config, model = inference.load_model(chosen.run_dir)
    if chosen.show is not None:
        return inference.show_test_points(config, model, chosen.show)
    if chosen.csv is not None and chosen.out is not None:
        count = inference.predict_csv(model, chosen.csv, chosen.out)
        return f"wrote {count:,} predictions to {chosen.out}"
    return inference.table(model, inference.parse_points(chosen.points))


if __name__ == "__main__":
    main()
