"""Heartbeats, who is missing when a collective fails, and the end of a process that cannot go on."""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self

from torch._C._distributed_c10d import HashStore, Store

from ddp_circles.job.ranks import Ranks, parent_at_start, spell_ranks
from ddp_circles.terminal import remark, visible

BEAT_SECONDS = 1.0
GRACE_SECONDS = 7.0
"""Time for a rank to end by itself once the job has failed."""
SILENT_SECONDS = 20.0
"""Time without a heartbeat after which a rank counts as gone, where nothing else tells; well below torchrun's 30 s from
its request to stop to its SIGKILL."""
WITNESS_SECONDS = 3.0
"""Time that survivors wait for each other's word before they name who gave none; some heartbeats long."""
STORE_SECONDS = 30.0
"""Time that a rank's last words to the store may take; several times what the waits in them add up to."""
HURRIED_STORE_SECONDS = 10.0
"""The same where the process must end soon; hardly more than those waits."""
LINGER_SECONDS = 1.0
"""Time that the rank which serves the store stays when all have spoken, for them to read the verdict."""
WAITED = "waited"
"""The last word of a rank that failed because another one did."""
NOBODY = "all ranks waited"
"""The answer to who is missing that accuses no rank."""

Tell = Callable[[str], None]
"""Says why this rank ends, given who is missing."""


class Waiting:
    """Marks where this rank waits for others, as a context manager; true while it does."""

    def __init__(self) -> None:
        self._depth = 0

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1

    def __bool__(self) -> bool:
        return self._depth > 0


waiting = Waiting()
"""The process's own: a process is one rank."""


class Watch:
    """Looks after this rank from a thread of its own; a context manager.

    Leaves a heartbeat in the store once a second, and ends the process when its launcher is gone, or `GRACE_SECONDS`
    after the job failed on another rank. One process without a launcher needs no thread.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._others = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
        self._launcher = parent_at_start()
        self._store: Store = HashStore()
        """Its own until it is connected; in a world of one for good."""
        self._connected = False
        self.listening: Callable[[], bool] = lambda: True
        """True while nothing but its heartbeats tells that another rank is gone: when the ranks join, for instance."""
        self._pulse: dict[int, tuple[int, int]] = {}
        """The other ranks' latest heartbeats, by number, and this rank's own number when it saw them first."""
        self.position: tuple[str, int, int, float] = ("start", 0, 0, time.time())
        """Phase, epoch, step, and the time of the mark."""
        self._beats = 0
        self.news = ""
        """The reason why this process should not go on, as of the last heartbeat; empty if it should."""
        self._verdict = ""
        self._speaking = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        if self._ranks.launched or self._others:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(GRACE_SECONDS)

    def connect(self, store: Store) -> None:
        """Leave heartbeats in `store` from now on."""
        if self._others:
            self._store = store.clone()  # type: ignore[attr-defined]
            self._connected = True
            self._beat()

    def mark(self, phase: str, epoch: int, step: int) -> None:
        """Note where this rank is; cheap enough for every step."""
        self.position = (phase, epoch, step, time.time())

    def absent(self) -> list[int]:
        """The ranks that have not come yet; rank 0 alone as long as its store does not answer."""
        if not self._connected:
            return [] if self._ranks.is_main else [0]
        with contextlib.suppress(RuntimeError):
            return [rank for rank in self._others if not self._seen(rank)]
        return []

    def say(self, line: str) -> None:
        """Print `line` on standard error, labelled with the rank."""
        remark(f"rank {self._ranks.rank}: {line}")

    # ---- the end

    def last_words(self, word: str, tell: Tell | None = None) -> None:
        """Tell the other ranks how this one ends: it `waited` for them, or it `raised` something.

        With `tell`, also find out who is missing, and call it with that. The process ends here if the store does not
        answer: its holder may be frozen.
        """
        with self._speaking:
            self._speak(word, tell, STORE_SECONDS)

    def end(self, word: str, tell: Tell) -> NoReturn:
        """Say the last words and end the process at once; the first thread that comes here does it."""
        self._speaking.acquire()  # for good
        try:
            self._speak(word, tell, HURRIED_STORE_SECONDS)
            if self._ranks.serves_store and self._others:
                time.sleep(LINGER_SECONDS)
        finally:
            with contextlib.suppress(OSError, ValueError):  # the reader of standard output may have left
                sys.stdout.flush()
            os._exit(1)

    def _speak(self, word: str, tell: Tell | None, seconds: float) -> None:
        told = threading.Lock()

        def tell_once(missing: str) -> None:
            if tell is not None and told.acquire(blocking=False):
                tell(missing)

        def give_up() -> None:
            try:
                tell_once(self._silent_holder())
            finally:
                self._end_process("the store of the job does not answer")

        hung = threading.Timer(seconds, give_up)
        hung.daemon = True
        hung.start()
        missing = ""
        try:
            self._report_end(word)
            if tell is not None:
                missing = self._name_missing()
        finally:
            hung.cancel()
        tell_once(missing)
        if self._ranks.serves_store and self._others:
            self._linger()

    def _report_end(self, word: str) -> None:
        if not self._others:
            return
        with contextlib.suppress(RuntimeError):  # the store may be gone, with the rank or the launcher that held it
            self._beat()
            self._store.set(f"end/{self._ranks.rank}", word)
            if word != WAITED:
                self._store.compare_set("verdict", "", self._describe(self._ranks.rank, word))
            self._store.set("failed", str(self._ranks.rank))

    def _silent_holder(self) -> str:
        holder = "the launcher" if self._ranks.store_is_the_agents else "rank 0"
        return f"{holder}, which holds the job's store and does not answer"

    def _linger(self) -> None:
        """Give the others time to read the store, which goes down with this process."""
        with contextlib.suppress(RuntimeError):
            self._gather_words()

    def _name_missing(self) -> str:
        """Say which ranks are to blame, where each was seen last and how long ago; the first who asks finds it out.

        The others wait for its verdict, in bounded time: if each looked at all, a large job would swamp the store.
        """
        if self._others and not self._connected:
            return self._silent_holder()
        store = self._store
        try:
            deadline = time.monotonic() + 2 * WITNESS_SECONDS * (store.add("witnesses", 1) > 1)
            while not store.check(["verdict"]) and time.monotonic() < deadline:
                time.sleep(0.1)
            if not store.check(["verdict"]):
                store.compare_set("verdict", "", self._find_culprits())
            return self._read("verdict")
        except RuntimeError:
            return self._verdict or "the store is gone too, with rank 0 or the launcher that held it"

    def _find_culprits(self) -> str:
        """Name those who raised; else those whose process is gone; else those who live and do not answer."""
        before = {rank: self._seen(rank).get("count") for rank in self._others}
        words = self._gather_words()
        raised = [rank for rank, word in words.items() if word != WAITED]
        silent = [rank for rank in self._others if rank not in words]
        # A rank that waits for another survivor is as silent as a dead one, but its heart beats.
        gone = [rank for rank in silent if self._seen(rank).get("count") == before[rank]]
        return self._describe_all(raised or gone or silent, words) or NOBODY

    def _gather_words(self) -> dict[int, str]:
        """The last words of the other ranks; ends when all have spoken, when one has raised, or in bounded time."""
        deadline = time.monotonic() + WITNESS_SECONDS
        words: dict[int, str] = {}
        while True:
            for rank in self._others:
                if rank not in words and self._store.check([f"end/{rank}"]):
                    words[rank] = self._read(f"end/{rank}")
            raised = any(word != WAITED for word in words.values())
            if raised or len(words) == len(self._others) or time.monotonic() >= deadline:
                return words
            time.sleep(0.05)

    def _describe_all(self, ranks: Sequence[int], words: Mapping[int, str]) -> str:
        """Each of `ranks` in words; those that never came together."""
        absent = [rank for rank in ranks if not self._seen(rank)]
        described = [self._describe(rank, words.get(rank, "")) for rank in ranks if rank not in absent]
        if absent:
            described.append(f"{spell_ranks(absent)} {'was' if len(absent) == 1 else 'were'} never seen")
        return "; ".join(described)

    def _describe(self, rank: int, word: str) -> str:
        seen = self._seen(rank)
        age = max(0.0, time.time() - seen["since"])
        return visible(f"{seen['name']} {word + ', ' if word else ''}last seen in {seen['where']}, {age:.0f} s ago")

    def _read(self, key: str) -> str:
        """The text under `key`, in one line; other processes of the network may write to the store."""
        return visible(self._store.get(key).decode(errors="replace"))

    def _seen(self, rank: int) -> dict[str, Any]:
        """The last heartbeat of `rank`; empty if it left none."""
        beat = f"beat/{rank}"
        return dict(json.loads(self._store.get(beat))) if self._store.check([beat]) else {}

    # ---- the thread

    def _run(self) -> None:
        deadline = math.inf
        while not self._over.wait(BEAT_SECONDS):
            if self._ranks.launched and os.getppid() != self._launcher:
                self._end_unless_speaking("its launcher is gone")
            self.news = self._exchange()
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS) if self.news else math.inf
            if time.monotonic() > deadline:
                self._end_unless_speaking(self.news)

    def _exchange(self) -> str:
        """Leave a heartbeat; returns why this process should not go on, nothing if it should."""
        try:
            self._beat()
            if not self._store.check(["failed"]):
                return self._find_silent() if self.listening() else ""
            if self._store.check(["verdict"]):
                self._verdict = self._read("verdict")
            return f"the job has failed: {self._verdict}"
        except RuntimeError:
            return "the store of the job is gone"

    def _find_silent(self) -> str:
        """Say which rank's heart has stopped, empty if none has; rank 0 listens to all others, they to rank 0.

        Time is told by this rank's own heartbeats, so that a job which was frozen as a whole accuses nobody.
        """
        for rank in self._others if self._ranks.is_main else [0]:
            count = self._seen(rank).get("count", 0)
            if count and count == self._pulse.get(rank, (0, 0))[0]:
                if (self._beats - self._pulse[rank][1]) * BEAT_SECONDS > SILENT_SECONDS:
                    return f"no heartbeat of rank {rank} for {SILENT_SECONDS:.0f} s"
            else:
                self._pulse[rank] = count, self._beats
        return ""

    def _beat(self) -> None:
        phase, epoch, step, since = self.position
        self._beats += 1
        where = f"{phase}, epoch {epoch}, step {step}"
        beat = {"name": self._ranks.name, "where": where, "since": since, "count": self._beats}
        self._store.set(f"beat/{self._ranks.rank}", json.dumps(beat))

    def _end_unless_speaking(self, reason: str) -> None:
        """End the process, but let last words, which take bounded time, be said to their end."""
        if self._speaking.acquire(blocking=False):
            self._end_process(reason)

    def _end_process(self, reason: str) -> NoReturn:
        self.say(f"{reason}; ending this process")
        os._exit(1)
