"""Heartbeats, who is missing, and how a process ends, without a training around them."""

import functools
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from ddp_circles.job import watch as watch_module
from ddp_circles.job.ranks import Ranks, parent_at_start
from ddp_circles.job.watch import NOBODY, WAITED, Watch, waiting
from ddp_circles.verify import alarm
from ddp_circles.verify.board import Board
from tests.harness.ranks import Job, free_port, run_ranks

# ---- heartbeats


@pytest.fixture
def store() -> Iterator[Store]:
    """The store of all ranks of a test."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    yield PrefixStore("start 0", server)
    del server


def watches(store: Store, size: int) -> list[Watch]:
    """The watches of `size` ranks, without their threads."""
    made = [Watch(Ranks(rank=rank, world_size=size)) for rank in range(size)]
    for watch in made:
        watch.connect(store)
    return made


def test_who_gave_no_word_is_named_with_place_and_age(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "WITNESS_SECONDS", 0.2)
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    first, second, third = watches(store, 3)
    third.mark("evaluate", 4, 417)
    clock[0] += 60
    third._exchange()  # a late heartbeat does not make the rank younger
    clock[0] += 1
    first._report_end(WAITED)
    second._report_end(WAITED)
    assert first._name_missing() == second._name_missing()
    where = "last seen in evaluate, epoch 4, step 417, 61 s ago"
    assert first._name_missing() == f"rank 2 (host {socket.gethostname()}) {where}"


def test_texts_of_other_ranks_are_one_visible_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "WITNESS_SECONDS", 0.2)
    first, second, _third = watches(store, 3)
    beat = {"name": "rank 2\n\x1b[31m", "where": "\u202etrain", "since": time.time(), "count": 1}
    store.set("beat/2", json.dumps(beat))
    store.set("end/2", "raised\x07")
    first._report_end(WAITED)
    assert second._name_missing() == r"rank 2\n\x1b[31m raised\x07, last seen in \u202etrain, 0 s ago"
    store.set("failed", "0")
    store.set("verdict", b"\xff\x9b\r\n".decode("latin-1"))
    assert second._exchange() == r"the job has failed: ÿ\x9b\r\n"


def test_who_raised_is_to_blame_and_not_who_is_silent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "WITNESS_SECONDS", 0.2)
    first, second, third, _silent = watches(store, 4)
    first._report_end(WAITED)
    third.mark("train", 1, 9)
    third._report_end("raised KeyError")
    verdict = second._name_missing()
    assert re.fullmatch(r"rank 2 \(host \S+\) raised KeyError, last seen in train, epoch 1, step 9, 0 s ago", verdict)
    assert first._name_missing() == verdict  # all ranks say the same


def test_a_silent_rank_whose_heart_beats_is_not_taken_for_a_dead_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "WITNESS_SECONDS", 0.3)
    first, _dead, alive = watches(store, 3)
    beating = threading.Timer(0.1, alive._exchange)
    first._report_end(WAITED)
    beating.start()
    assert first._name_missing().startswith("rank 1 ")
    beating.join()


def test_nothing_is_awaited_once_all_have_reported(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "LINGER_SECONDS", 0.1)
    first, second = watches(store, 2)
    begun = time.monotonic()
    second._report_end(WAITED)
    first._report_end(WAITED)
    first._linger()
    assert first._name_missing() == NOBODY
    assert time.monotonic() - begun < watch_module.WITNESS_SECONDS


def test_a_store_that_is_gone_is_said_and_not_raised(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "LINGER_SECONDS", 0.1)

    class Gone:
        def __getattr__(self, _name: str) -> None:
            raise RuntimeError("connection reset")

    first, _ = watches(store, 2)
    monkeypatch.setattr(first, "_store", Gone())
    first._report_end(WAITED)
    first._linger()
    assert "the store is gone too" in first._name_missing()
    assert first._exchange() == "the store of the job is gone"


@pytest.mark.parametrize("word", [WAITED, "raised ValueError"])
def test_a_world_of_one_has_nobody_to_ask(store: Store, word: str) -> None:
    (only,) = watches(store, 1)
    only.last_words(word)
    assert only._name_missing() == NOBODY
    assert only._exchange() == ""


def test_a_failed_job_dooms_the_others(store: Store) -> None:
    first, second = watches(store, 2)
    assert second._exchange() == ""
    first._report_end("raised ValueError")
    assert second._exchange().startswith("the job has failed: rank 0 (host ")


def test_the_parent_is_remembered_for_each_process() -> None:
    assert parent_at_start() == os.getppid()
    pids = run_ranks(parents, 2)
    assert [remembered for remembered, _ in pids] == [actual for _, actual in pids]


def parents() -> tuple[int, int]:
    return parent_at_start(), os.getppid()


class CountingStore:
    """A store in this process that counts what is asked of it."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._lock = threading.Lock()
        self.requests = 0

    def clone(self) -> "CountingStore":
        return self

    def check(self, names: list[str]) -> bool:
        with self._lock:
            self.requests += 1
            return all(name in self._values for name in names)

    def get(self, name: str) -> bytes:
        with self._lock:
            self.requests += 1
            return self._values[name].encode()

    def set(self, name: str, value: str) -> None:
        with self._lock:
            self.requests += 1
            self._values[name] = value

    def compare_set(self, name: str, _expected: str, value: str) -> None:
        with self._lock:
            self.requests += 1
            self._values.setdefault(name, value)

    def add(self, name: str, amount: int) -> int:
        with self._lock:
            self.requests += 1
            self._values[name] = str(int(self._values.get(name, "0")) + amount)
            return int(self._values[name])


def test_naming_the_lost_among_many_costs_each_a_few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "WITNESS_SECONDS", 4.0)
    store, size, lost = CountingStore(), 1024, 700
    everyone = watches(store, size)  # type: ignore[arg-type]
    names: set[str] = set()

    def fail(watch: Watch) -> None:
        watch._report_end(WAITED)
        names.add(watch._name_missing())

    threads = [threading.Thread(target=fail, args=(watch,)) for watch in everyone if watch._ranks.rank != lost]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(names) == 1
    assert re.match(rf"rank {lost} \(host [^)]+\) last seen in start, ", names.pop())
    assert store.requests < 150 * size  # nearly all of them questions whether it is found out yet, ten a second


# ---- the end of a process


def hang_after_failure(grace: float) -> None:
    """Rank 0 reports a failure and leaves; the others hang."""
    rank = int(os.environ["RANK"])
    watch_module.BEAT_SECONDS, watch_module.GRACE_SECONDS = 0.1, grace
    with Watch(Ranks(rank=rank, world_size=3, launcher="torchrun")) as watch:
        server = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
        watch.connect(PrefixStore("start 0", server))
        if rank == 0:
            watch.last_words("raised ValueError")
        else:
            time.sleep(60)


def test_ranks_that_hang_are_ended_when_the_job_has_failed() -> None:
    begun = time.monotonic()
    with Job(hang_after_failure, 3, 0.5) as job:
        outcomes = job.wait(40)
    assert [outcome.code for outcome in outcomes] == [0, 1, 1]
    assert time.monotonic() - begun < 30
    for outcome in outcomes[1:]:
        assert outcome.output.startswith(f"rank {outcome.rank}: the job has failed: rank 0 (host ")
        assert outcome.output.endswith("; ending this process\n")


def test_ranks_may_take_their_grace_to_end_by_themselves() -> None:
    with Job(hang_after_failure, 2, 60.0) as job:
        job.processes[0].join(30)
        time.sleep(0.5)
        assert job.processes[1].is_alive()


class SilentStore(CountingStore):
    """A store that took the heartbeat at the start, and answers nothing any more."""

    def compare_set(self, name: str, _expected: str, value: str) -> None:
        time.sleep(60)

    def add(self, name: str, amount: int) -> int:
        time.sleep(60)
        return 0


def speak_to_a_silent_store(word: str, *, ask: bool) -> None:
    """Say the last words to nobody."""
    watch_module.STORE_SECONDS = 0.3
    watch = Watch(Ranks(rank=1, world_size=2, store_is_the_agents=True))
    watch.connect(SilentStore())  # type: ignore[arg-type]
    watch.last_words(word, (lambda missing: watch.say(f"lost a peer: {missing}")) if ask else None)
    print("not reached")


def test_a_store_that_does_not_answer_ends_the_process_in_bounded_time() -> None:
    line = "rank 1: the store of the job does not answer; ending this process\n"
    with Job(functools.partial(speak_to_a_silent_store, "raised ValueError", ask=False), 1) as job:
        (raised,) = job.wait(30)
    assert (raised.code, raised.output) == (1, line)
    with Job(functools.partial(speak_to_a_silent_store, WAITED, ask=True), 1) as job:
        (lost,) = job.wait(30)
    holder = "the launcher, which holds the job's store and does not answer"
    assert (lost.code, lost.output) == (1, f"rank 1: lost a peer: {holder}\n{line}")


def end_twice() -> None:
    """Let two threads end the process at once."""
    watch_module.LINGER_SECONDS = 0.5
    watch = Watch(Ranks(rank=0, world_size=2, store_address=("127.0.0.1", free_port())))
    watch.connect(HashStore())
    for _ in range(2):
        threading.Thread(target=watch.end, args=("raised ValueError", watch.say)).start()


def test_a_process_says_its_last_words_once() -> None:
    with Job(end_twice, 1) as job:
        (outcome,) = job.wait(30)
    assert outcome.code == 1
    assert re.fullmatch(r"rank 0: rank 0 \(host .*\) raised ValueError, last seen in start, .* ago\n", outcome.output)


# ---- the alarm

Told = list[tuple[str, str]]
"""Reasons and last words with which an alarm would have ended the process."""


def set_alarm(monkeypatch: pytest.MonkeyPatch, patience: float, until: Callable[[Told], bool]) -> Told:
    """Be in a place where nothing moves, under an alarm, until something is told."""
    told: Told = []
    watch = Watch(Ranks())
    monkeypatch.setattr(alarm, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(watch, "end", lambda _word, tell: tell("nobody"))
    with alarm.alarm(watch, patience, lambda reason, word, _missing: told.append((reason, word))):
        watch.mark("speed", 0, 3)
        deadline = time.monotonic() + 10
        while not until(told) and time.monotonic() < deadline:
            time.sleep(0.05)
    return told


def test_an_alarm_ends_what_does_not_move_and_says_where_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    reason, word = set_alarm(monkeypatch, 0.3, bool)[0]
    assert reason.startswith("no progress since speed, step 3, for ")
    assert word.startswith("hangs in set_alarm (test_watch.py, line ")


def test_a_rank_that_waits_for_others_does_not_accuse_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with waiting:
        assert set_alarm(monkeypatch, 0.3, bool)[0][1] == WAITED
    assert not waiting


def test_an_alarm_is_silent_while_there_is_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic()
    assert set_alarm(monkeypatch, 60.0, lambda _: time.monotonic() - begun > 0.5) == []


def test_an_alarm_hears_a_stop_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alarm, "STOP_SIGNALS", (signal.SIGUSR2,))
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        sender = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR2))
        sender.start()
        assert set_alarm(monkeypatch, 60.0, bool) == [("asked to end by SIGUSR2", WAITED)]
        sender.join()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert signal.set_wakeup_fd(-1) == -1


def test_who_reads_at_the_board_waits() -> None:
    store = HashStore()
    board = Board(store, 1, 2)
    reader = threading.Thread(target=board.agree, args=(None, lambda _: None))
    reader.start()
    deadline = time.monotonic() + 10
    while not waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    assert waiting
    store.set("board/1/answer", "1")
    reader.join(10)
    assert not waiting
