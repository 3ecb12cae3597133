"""Shared by the command lines: a parse that only rank 0 speaks about, one message for a mistake, exit codes."""

import io
import json
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from typing import TypeVar

import tyro

from ddp_circles.errors import EXIT_BAD_INPUT, UserError
from ddp_circles.job.ranks import Ranks, read_ranks
from ddp_circles.job.refusal import end_job, refuse
from ddp_circles.terminal import open_streams, remark, visible_lines

T = TypeVar("T")


def parse(form: type[T], arguments: list[str], *, program: str, default: T | None = None, quiet: bool = False) -> T:
    """Read `arguments` into the dataclass `form`; help and mistakes end in `SystemExit`, without a word if `quiet`."""
    silence = io.StringIO()
    try:
        with redirect_stdout(silence) if quiet else nullcontext(), redirect_stderr(silence) if quiet else nullcontext():
            return tyro.cli(form, args=arguments, prog=f"python -m {program}", default=default or tyro.MISSING_NONPROP)
    except OSError:  # nobody can read it, but a mistake it is
        raise SystemExit(EXIT_BAD_INPUT) from None


def run(command: Callable[[Ranks], int]) -> int:
    """Call `command` with this process's ranks; returns the exit code."""
    open_streams()
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
        if not _record_traceback(ranks):
            print_traceback(ranks)
        return 1


def print_traceback(ranks: Ranks) -> None:
    """Print the traceback of the exception being handled, each line labelled with the rank if there are several."""
    label = f"[rank {ranks.rank}] " if ranks.world_size > 1 else ""
    remark("\n".join(label + line for line in _traceback().split("\n")) + "\n")


def _record_traceback(ranks: Ranks) -> bool:
    """Leave the traceback for torchrun, which prints it once, labelled, if it ends over it; returns false if not.

    As torch's own handler does, but safe to print: torchrun prints what it finds.
    """
    if ranks.error_file is None or ranks.restarts_left:
        return False
    text = _traceback()
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    message = {"message": {"message": text.split("\n")[-1], "extraInfo": extra}}
    with suppress(OSError):
        ranks.error_file.write_text(json.dumps(message))
        return True
    return False


def _traceback() -> str:
    return visible_lines(traceback.format_exc().rstrip("\n"))
