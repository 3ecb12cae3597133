"""Where ranks meet beside the collectives: the store, which works on when those that are being tested do not."""

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ddp_circles.job.stop import STOP_SIGNALS
from ddp_circles.job.watch import WAITED

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

Mark = Callable[[str, int], None]
"""Notes that this rank has reached a step of a phase."""

LOOK_SECONDS = 0.5
"""Between two looks of the alarm at the clock and at the other ranks."""
JOIN_SECONDS = 5.0
"""How long the end may wait for an answer of the store."""
WAITING_PLACES = ("/torch/", "/checks/board.py")
"""Where a rank waits for others: in torch's collectives, or at the board."""
READING_PLACES = tuple(f"/{name}.py" for name in ("collectives", "speed", "oracle", "metrics", "trainer"))
"""Where it waits for the result of a collective that runs on the device, behind the program's back."""
NAP_SECONDS = (0.002, 0.1)
"""Between two looks at the board: at first, and at the most in a small world."""


class Board:
    """Ranks post values on it; rank 0 reads them all, decides, and posts the answer. Values are what JSON can hold."""

    def __init__(self, store: "Store", rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._page = 0

    def agree(self, value: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """What rank 0's `decide` makes of the values of all ranks, in their order; the same on every rank.

        Waits for as long as it takes: an `Alarm` sets the limit.
        """
        self._page += 1
        self._store.set(self._key(self._rank), json.dumps(value))
        if self._rank == 0:
            values = [json.loads(self._read(self._key(rank))) for rank in range(self._world_size)]
            self._store.set(self._key("answer"), json.dumps(decide(values)))
            if self._page > 1:  # every rank has read the previous answer before it posted its value
                self._store.delete_key(self._key("answer", self._page - 1))
        answer = json.loads(self._read(self._key("answer")))
        self._store.delete_key(self._key(self._rank))
        return answer

    def part(self) -> None:
        """Leave together: rank 0, which may hold the store, goes when all have read its last answer."""
        self.agree(None, lambda _: None)
        self._store.set(self._key(self._rank, "left"), "")
        for rank in range(self._world_size) if self._rank == 0 else ():
            self._read(self._key(rank, "left"))

    def count(self, name: str, amount: int) -> int:
        """Add `amount` to the counter `name`, and return it."""
        return int(self._store.add(f"board/count/{name}", amount))

    def _key(self, who: int | str, page: int | str | None = None) -> str:
        return f"board/{self._page if page is None else page}/{who}"

    def _read(self, key: str) -> bytes:
        nap, longest = NAP_SECONDS[0], max(NAP_SECONDS[1], self._world_size / 2000)
        while not self._store.check([key]):
            time.sleep(nap)
            nap = min(2 * nap, longest)
        return self._store.get(key)


class Alarm:
    """Calls `ring(reason, word)` from a thread of its own when this rank should wait no longer; a context manager.

    It rings when `progress` was not called for `patience` seconds, when another rank reported its end in `store` (None:
    there is no other), and when a signal asks for the end. A thread, because a rank that is caught in a collective runs
    neither its own code nor its signal handlers; and another one for the store, which may be caught too. `word` says
    whether this rank `waited` for others or hangs by itself.
    """

    def __init__(
        self, store: "Store | None", *, patience: float, on_cuda: bool, ring: Callable[[str, str], None]
    ) -> None:
        self._store = store.clone() if store is not None else None  # type: ignore[attr-defined]
        self._patience = patience
        self._waiting_places = (*WAITING_PLACES, *READING_PLACES) if on_cuda else WAITING_PLACES
        self._ring = ring
        self._latest = ("the start", time.monotonic())
        self._news = ""
        self._over = threading.Event()
        self._readable, self._writable = os.pipe()
        os.set_blocking(self._writable, False)
        self._fd_before = -1
        self._thread = threading.Thread(target=self._run, name="alarm", daemon=True)
        self._listener = threading.Thread(target=self._listen, name="alarm's listener", daemon=True)

    def progress(self, place: str) -> None:
        """Note that this rank has reached `place`."""
        self._latest = (place, time.monotonic())

    def __enter__(self) -> Self:
        self._fd_before = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        self._thread.start()
        self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._writable)
        self._over.set()
        self._thread.join()
        self._listener.join(JOIN_SECONDS)
        os.close(self._readable)

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._readable], [], [], LOOK_SECONDS)
            numbers = os.read(self._readable, 64) if ready else None
            if numbers == b"":  # the other end is closed: there is nothing more to watch
                return
            reason = self._reason(numbers or b"")
            if reason is not None:
                self._ring(reason, self._word())

    def _word(self) -> str:
        """`waited`, unless this rank has made no progress for long and is not caught where one waits for others."""
        if time.monotonic() - self._latest[1] < self._patience / 2:
            return WAITED
        frame = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001 - there is no other way
        if frame is None or any(place in frame.f_code.co_filename for place in self._waiting_places):
            return WAITED
        code = frame.f_code
        return f"hangs in {code.co_name} ({Path(code.co_filename).name}, line {frame.f_lineno})"

    def _reason(self, signals: bytes) -> str | None:
        asked = [number for number in signals if number in STOP_SIGNALS]
        if asked:
            return f"asked to end by {signal.Signals(asked[0]).name}"
        place, since = self._latest
        if time.monotonic() - since > self._patience:
            return f"no progress since {place}, for {time.monotonic() - since:.0f} s"
        return self._news or None

    def _listen(self) -> None:
        while self._store is not None and not self._news and not self._over.wait(LOOK_SECONDS):
            try:
                self._news = "another rank has ended" if self._store.check(["failed"]) else ""
            except RuntimeError:
                self._news = "the store of the job is gone"
