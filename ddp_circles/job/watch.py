"""Heartbeats, and who is missing when a collective fails."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch._C._distributed_c10d import Store

from ddp_circles.job.ranks import parent_at_start

BEAT_SECONDS = 1.0
GRACE_SECONDS = 7.0
"""How long a rank may take to end by itself once the job has failed."""
WITNESS_SECONDS = 3.0
"""How long survivors wait for each other's word before they name who gave none; some heartbeats long."""
STORE_SECONDS = 30.0
"""How long the last words to the store may take in all; several times what the waits in them add up to."""
WAITED = "waited"
"""The last word of a rank that failed because another one did."""


class Watch:
    """Looks after this rank from a thread of its own.

    Leaves a heartbeat in the store once a second, and ends the process when its launcher is gone, or `GRACE_SECONDS`
    after the job failed on another rank.
    """

    def __init__(self, rank: int, world_size: int, *, launched: bool) -> None:
        self.rank = rank
        self.world_size = world_size
        self._launched = launched
        self._others = [other for other in range(world_size) if other != rank]
        self._launcher = parent_at_start()
        self._store: Store | None = None
        self._position: tuple[str, int, int, float] = ("start", 0, 0, time.time())
        self._count = 0
        self._verdict = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to look after this rank; does nothing for a process that no launcher started."""
        if self._launched:
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(GRACE_SECONDS)

    def connect(self, store: Store) -> None:
        """Leave heartbeats in `store` from now on."""
        if self.world_size > 1:
            own: Store = store.clone()  # type: ignore[attr-defined]
            self._beat(own)
            self._store = own

    def mark(self, phase: str, epoch: int, step: int) -> None:
        """Note where this rank is; cheap enough for every step."""
        self._position = (phase, epoch, step, time.time())

    def report_end(self, word: str) -> None:
        """Tell the others that this rank goes down, and why: `waited` for them, or `raised` something."""
        store = self._store
        if store is None:
            return
        with contextlib.suppress(RuntimeError):  # the store may be gone, with the rank or the launcher that held it
            self._beat(store)
            store.set(f"end/{self.rank}", word)
            if word != WAITED:
                store.compare_set("verdict", "", self._describe(store, self.rank, word))
            store.set("failed", str(self.rank))

    @contextmanager
    def patient_with_store(self) -> Iterator[None]:
        """End the process if what is done with the store meanwhile hangs: its holder may be frozen."""
        hung = threading.Timer(STORE_SECONDS, self._end_process, ("the store of the job does not answer",))
        hung.daemon = True
        hung.start()
        try:
            yield
        finally:
            hung.cancel()

    def linger(self) -> None:
        """Give the others time to read the store, which goes down with this process."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._gather_words(self._store)

    def name_missing(self) -> str:
        """Say which ranks are to blame, where each was seen last and how long ago; the first who asks finds it out.

        The others wait for its verdict, in bounded time: if each looked at all, a large job would swamp the store.
        """
        store = self._store
        if store is None:
            return "no other rank to ask"
        try:
            deadline = time.monotonic() + 2 * WITNESS_SECONDS * (store.add("witnesses", 1) > 1)
            while not store.check(["verdict"]) and time.monotonic() < deadline:
                time.sleep(0.1)
            if not store.check(["verdict"]):
                store.compare_set("verdict", "", self._find_culprits(store))
            return store.get("verdict").decode()
        except RuntimeError:
            return self._verdict or "the store is gone too, with rank 0 or the launcher that held it"

    def _find_culprits(self, store: Store) -> str:
        """Those who raised; else those whose process is gone; else those who live and do not answer."""
        before = {rank: self._seen(store, rank).get("count") for rank in self._others}
        words = self._gather_words(store)
        raised = [rank for rank, word in words.items() if word != WAITED]
        silent = [rank for rank in self._others if rank not in words]
        # A rank that waits for another survivor is as silent as a dead one, but its heart beats.
        gone = [rank for rank in silent if self._seen(store, rank).get("count") == before[rank]]
        culprits = raised or gone or silent
        return "; ".join(self._describe(store, rank, words.get(rank, "")) for rank in culprits) or "all ranks waited"

    def _gather_words(self, store: Store) -> dict[int, str]:
        """The last words of the other ranks; ends when all have spoken, when one has raised, or in bounded time."""
        deadline = time.monotonic() + WITNESS_SECONDS
        words: dict[int, str] = {}
        while True:
            for rank in self._others:
                if rank not in words and store.check([f"end/{rank}"]):
                    words[rank] = store.get(f"end/{rank}").decode()
            raised = any(word != WAITED for word in words.values())
            if raised or len(words) == len(self._others) or time.monotonic() >= deadline:
                return words
            time.sleep(0.05)

    def _describe(self, store: Store, rank: int, word: str) -> str:
        seen = self._seen(store, rank)
        if not seen:
            return f"rank {rank} was never seen"
        age = max(0.0, time.time() - seen["since"])
        where = f"{seen['phase']}, epoch {seen['epoch']}, step {seen['step']}, {age:.0f} s ago"
        return f"rank {rank} (host {seen['host']}) {word + ', ' if word else ''}last seen in {where}"

    @staticmethod
    def _seen(store: Store, rank: int) -> dict[str, Any]:
        """The last heartbeat of `rank`; empty if it left none."""
        return dict(json.loads(store.get(f"beat/{rank}"))) if store.check([f"beat/{rank}"]) else {}

    def _beat(self, store: Store) -> None:
        phase, epoch, step, since = self._position
        self._count += 1
        place = {"host": socket.gethostname(), "phase": phase, "epoch": epoch, "step": step, "since": since}
        store.set(f"beat/{self.rank}", json.dumps(place | {"count": self._count}))

    def _run(self) -> None:
        doomed_since: float | None = None
        while not self._end.wait(BEAT_SECONDS):
            if os.getppid() != self._launcher:
                self._end_process("its launcher is gone")
            reason = self._doom()
            if reason is None:
                doomed_since = None
                continue
            now = time.monotonic()
            doomed_since = doomed_since or now
            if now - doomed_since > GRACE_SECONDS:
                self._end_process(reason)

    def _end_process(self, reason: str) -> NoReturn:
        with contextlib.suppress(OSError):  # the launcher's end of the pipe may be gone with it
            print(f"rank {self.rank}: {reason}; ending this process", file=sys.stderr, flush=True)
        os._exit(1)

    def _doom(self) -> str | None:
        """Leave a heartbeat; returns why this process should not go on, None if it should."""
        if self._store is None:
            return None
        try:
            self._beat(self._store)
            if not self._store.check(["failed"]):
                return None
            if self._store.check(["verdict"]):
                self._verdict = self._store.get("verdict").decode()
            return f"the job has failed: {self._verdict}"
        except RuntimeError:
            return "the store of the job is gone"
