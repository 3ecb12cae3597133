"""Shared by the command lines: a parse that only rank 0 speaks about, one message for a mistake, exit codes."""

import io
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TypeVar

import tyro

from ddp_circles.errors import EXIT_BAD_INPUT, UserError
from ddp_circles.job.ranks import Ranks, parent_at_start, read_ranks
from ddp_circles.job.stop import stop_requested
from ddp_circles.terminal import visible_lines

RANK_0_SPEAKS_SECONDS = 5.0
"""Time that the other ranks give rank 0 to print its message before they leave over a user's mistake."""

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
            _end_job(ranks)
        raise
    except Exception:
        if not _record_traceback(ranks):
            print_traceback(ranks)
        return 1


def refuse(ranks: Ranks, error: UserError) -> int:
    """Say a user's mistake once, from rank 0, and end the job over it; returns the exit code for it."""
    if ranks.is_main:
        print(f"error: {visible_lines(str(error))}", file=sys.stderr, flush=True)
    _end_job(ranks)
    return EXIT_BAD_INPUT


def print_traceback(ranks: Ranks) -> None:
    """Print the traceback of the exception being handled, each line labelled with the rank if there are several."""
    label = f"[rank {ranks.rank}] " if ranks.world_size > 1 else ""
    print("\n".join(label + line for line in _traceback().split("\n")) + "\n", file=sys.stderr, flush=True)


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


def _end_job(ranks: Ranks) -> None:
    """Wait until rank 0 has spoken; if torchrun would restart the ranks, to fail over the same mistake, end torchrun.

    It ends upon SIGTERM, which it passes on to its ranks; no exit code means as much to it. One rank of each node asks,
    before any other one leaves.
    """
    asks = ranks.restarts_left and not ranks.local_rank
    patience = 0.0 if ranks.is_main else RANK_0_SPEAKS_SECONDS * (2 if ranks.restarts_left and not asks else 1)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and not stop_requested():
        time.sleep(0.05)
    parent = parent_at_start()
    if asks and not stop_requested() and os.getppid() == parent and _catches_sigterm(parent):
        os.kill(parent, signal.SIGTERM)


def _catches_sigterm(pid: int) -> bool:
    """True if the process handles SIGTERM, as torchrun does, and not a script between it and this process."""
    try:
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return False
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)
