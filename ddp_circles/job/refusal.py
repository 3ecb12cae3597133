"""A user's mistake, said once: by rank 0, without a traceback, with exit code 2. Imports no torch."""

import sys
import time
from types import TracebackType

from ddp_circles.errors import EXIT_BAD_INPUT, UserError
from ddp_circles.job.ranks import Ranks, read_ranks
from ddp_circles.job.stop import stop_requested
from ddp_circles.terminal import visible_lines

RANK_0_SPEAKS_SECONDS = 5.0
"""Time that the other ranks give rank 0 to print its message before they leave over a user's mistake."""


def refuse(ranks: Ranks, error: UserError) -> int:
    """Say a user's mistake once, from rank 0; returns the exit code for it."""
    if ranks.is_main:
        print(f"error: {visible_lines(str(error))}", file=sys.stderr, flush=True)
    end_job(ranks)
    return EXIT_BAD_INPUT


def end_job(ranks: Ranks) -> None:
    """Wait until rank 0 has spoken: a launcher ends all ranks as soon as one has left."""
    deadline = time.monotonic() + (0.0 if ranks.is_main else RANK_0_SPEAKS_SECONDS)
    while time.monotonic() < deadline and not stop_requested():
        time.sleep(0.05)


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
