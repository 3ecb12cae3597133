"""Stop requests: signals that set a flag, at which the training looks. Imports no torch."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Set by any of `STOP_SIGNALS`; a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self._requested = False

    def __call__(self) -> bool:
        """True once a stop was requested."""
        return self._requested

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals; enter it before slow imports, during which a signal would be lost.

        Handlers belong to the process's main thread: in another thread this changes nothing. A SIGHUP that is ignored,
        as under nohup, stays so.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        deaf = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        before = {number: signal.signal(number, self._set) for number in STOP_SIGNALS if number not in deaf}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._set not in before.values():  # the outermost one: a later training in this process starts afresh
                self._requested = False

    @staticmethod
    def ignore() -> None:
        """Ignore all but an interrupt from now on, so that a late one cannot change the exit code."""
        for number in STOP_SIGNALS:
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)

    def _set(self, number: int, _frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self._requested = True


stop_requested = StopRequest()
"""One for the process: signals know no finer scope."""
