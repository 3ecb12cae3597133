"""Shared by the command lines: a parse that only rank 0 speaks about, one message for a mistake, exit codes."""

import io
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from typing import TypeVar

import tyro

from ddp_circles.errors import EXIT_BAD_INPUT, UserError
from ddp_circles.job.ranks import Ranks, read_ranks
from ddp_circles.job.refusal import end_job, refuse
from ddp_circles.terminal import visible

T = TypeVar("T")


def parse(form: type[T], arguments: list[str], *, program: str, default: T | None = None, quiet: bool = False) -> T:
    """Read `arguments` into the dataclass `form`; help and mistakes end in `SystemExit`, without a word if `quiet`."""
    silence = io.StringIO()
    with redirect_stdout(silence) if quiet else nullcontext(), redirect_stderr(silence) if quiet else nullcontext():
        return tyro.cli(form, args=arguments, prog=f"python -m {program}", default=default or tyro.MISSING_NONPROP)


def run(command: Callable[[Ranks], int]) -> int:
    """Call `command` with this process's ranks; returns the exit code."""
    ranks = Ranks()
    try:
        ranks = read_ranks()
        return command(ranks)
    except UserError as error:
        return refuse(ranks, error)
    except SystemExit as leaving:
        if leaving.code == EXIT_BAD_INPUT:
            end_job(ranks)
        raise
    except Exception:
        if ranks.error_file is None or not ranks.error_file.exists():  # else the agent prints it, labelled
            print_traceback(ranks)
        return 1


def print_traceback(ranks: Ranks) -> None:
    """Print the traceback of the exception being handled, each line labelled with the rank if there are several."""
    label = f"[rank {ranks.rank}] " if ranks.world_size > 1 else ""
    lines = traceback.format_exc().rstrip("\n").split("\n")
    print("\n".join(label + visible(line) for line in lines) + "\n", file=sys.stderr, flush=True)
