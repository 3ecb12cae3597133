"""Command line: `python -m ddp_circles.train`, alone, under torchrun or under srun."""

import argparse
import faulthandler
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ddp_circles import cli
from ddp_circles.config import FLAGS_SPOKEN, RECIPES, Config, read_toml, recipe
from ddp_circles.errors import UserError
from ddp_circles.job.ranks import Ranks, parent_at_start, set_thread_variables
from ddp_circles.job.stop import stop_requested


@dataclass(frozen=True)
class CommandLine:
    """Train the circles classifier on one process or many: the same seed gives the same bits."""

    settings: tyro.conf.OmitArgPrefixes[Config]
    recipe: Annotated[str, tyro.conf.arg(metavar="|".join(RECIPES))] = "circles"
    """A full set of defaults; flags override it."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE.toml")] = None
    """The same fields from a file; flags override it."""


def main() -> None:
    """Parse, train, and leave with the exit code of the contract."""
    FLAGS_SPOKEN.set(True)
    parent_at_start()  # the launcher may die during the slow imports
    try:
        with stop_requested.listening():
            sys.exit(cli.run(_train))
    finally:
        stop_requested.ignore()


def _train(ranks: Ranks) -> int:
    config = parse_command_line(sys.argv[1:], quiet=not ranks.is_main)
    set_thread_variables(config.threads)  # before torch is imported
    from ddp_circles.run import fit  # noqa: PLC0415 - the seam: no torch before this line

    faulthandler.enable()  # a crash in native code prints the Python stacks
    fit(config)
    return 0


def parse_command_line(arguments: list[str], *, quiet: bool = False) -> Config:
    """Read flags, which come over the `--config` file, which comes over the `--recipe`.

    `quiet` keeps help and errors of ranks other than 0 silent. Raises `UserError` or, for what the command line itself
    gets wrong, `SystemExit` with code 2.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--recipe", default="circles")
    first.add_argument("--config", type=Path)
    first.add_argument("--run-dir", "--run_dir")
    try:
        chosen, _ = first.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    if chosen.run_dir == "":  # which would become the current folder
        raise UserError("--run-dir must name a folder, got nothing: was a variable empty?")
    base = recipe(chosen.recipe, **(read_toml(chosen.config) if chosen.config else {}))
    default = CommandLine(base, chosen.recipe, chosen.config)
    return cli.parse(CommandLine, arguments, program="ddp_circles.train", default=default, quiet=quiet).settings


if __name__ == "__main__":
    main()
