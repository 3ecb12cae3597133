"""Ends a rank that has nothing left to wait for, from a thread beside it."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ddp_circles.job.stop import STOP_SIGNALS
from ddp_circles.job.watch import WAITED, Watch, waiting

LOOK_SECONDS = 0.5
"""Time between two looks at the clock and at the latest news."""

Tell = Callable[[str, str, str], None]
"""Given the reason for the end, this rank's last word and who is missing."""


@contextmanager
def alarm(watch: Watch, patience: float, tell: Tell) -> Iterator[None]:
    """End the process, while the body runs, as soon as there is nothing left to wait for; main thread only.

    That is after `patience` seconds without a new mark, when another rank has ended or the store is gone, and on a stop
    signal. A thread, because a rank that is caught in a collective runs neither its own code nor its signal handlers.
    """
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    fd_before = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(watch, readable, patience, tell), name="alarm", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        os.close(writable)
        thread.join()
        os.close(readable)


def _listen(watch: Watch, readable: int, patience: float, tell: Tell) -> None:
    position, since = watch.position, time.monotonic()
    while True:
        ready, _, _ = select.select([readable], [], [], LOOK_SECONDS)
        signals = os.read(readable, 64) if ready else b""
        if ready and not signals:  # the other end is closed
            return
        if watch.position is not position:
            position, since = watch.position, time.monotonic()
        idle = time.monotonic() - since
        asked = [number for number in signals if number in STOP_SIGNALS]
        if asked:
            reason = f"asked to end by {signal.Signals(asked[0]).name}"
        elif idle > patience:
            reason = f"no progress since {position[0]}, step {position[2]}, for {idle:.0f} s"
        else:
            reason = watch.news.partition(":")[0]
        if reason:
            word = WAITED if waiting or idle < patience / 2 else f"hangs in {_place_of_main_thread()}"
            watch.end(word, partial(tell, reason, word))


def _place_of_main_thread() -> str:
    """The function that the main thread is in, for people to read."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]  # noqa: SLF001 - there is no other way
    code = frame.f_code
    return f"{code.co_name} ({Path(code.co_filename).name}, line {frame.f_lineno})"
