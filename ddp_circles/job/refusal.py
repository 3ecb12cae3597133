"""A user's mistake, said once: by rank 0, without a traceback, with exit code 2. Imports no torch."""

import os
import re
import signal
import sys
import time
from pathlib import Path
from types import TracebackType

from ddp_circles.errors import EXIT_BAD_INPUT, LoneMistakeError, UserError
from ddp_circles.job.ranks import Ranks, parent_at_start, read_ranks
from ddp_circles.job.stop import stop_requested
from ddp_circles.terminal import complain

RANK_0_SPEAKS_SECONDS = 5.0
"""Time that the other ranks give rank 0 to print its message before they leave over a user's mistake."""


def refuse(ranks: Ranks, error: UserError) -> int:
    """Say a user's mistake once, from rank 0 if all ranks meet it, and end the job; returns the exit code for it."""
    if ranks.is_main or isinstance(error, LoneMistakeError):
        complain(str(error))
    end_job(ranks)
    return EXIT_BAD_INPUT


def end_job(ranks: Ranks) -> None:
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


def refuse_uncaught() -> None:
    """From now on, let a `UserError` that nothing catches end this program as it ends a command line."""
    before = sys.excepthook
    if getattr(before, "__module__", None) == __name__:
        return

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, UserError):
            before(kind, error, trace)
            return
        try:
            ranks = read_ranks()
        except UserError:
            ranks = Ranks()
        code = refuse(ranks, error)
        if not hasattr(sys, "ps1"):  # a session at a prompt goes on
            sys.exit(code)

    sys.excepthook = end
