"""Stop requests, heartbeats and who is missing, without a training around them."""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from ddp_circles.job import watch as health
from ddp_circles.job.ranks import parent_at_start
from ddp_circles.job.stop import STOP_SIGNALS, StopRequest
from ddp_circles.job.watch import WAITED, Watch
from tests.harness.ranks import Job, run_ranks

# ---- stop requests


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_sets_the_flag_and_nothing_else(number: int) -> None:
    stop_requested = StopRequest()
    with stop_requested.listening():
        assert not stop_requested()
        signal.raise_signal(number)
        assert stop_requested()


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest().listening():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_request_outlives_an_inner_listener_but_not_the_outer_one() -> None:
    stop_requested = StopRequest()
    with stop_requested.listening():
        with stop_requested.listening():
            signal.raise_signal(signal.SIGTERM)
        assert stop_requested()
    assert not stop_requested()


def test_threads_listen_to_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def listen() -> None:
        with StopRequest().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


def interrupt_twice(first: int) -> None:
    with StopRequest().listening():
        signal.raise_signal(first)
        print("still here", flush=True)
        signal.raise_signal(signal.SIGINT)
        print("not reached", flush=True)


@pytest.mark.parametrize("first", STOP_SIGNALS)
def test_an_interrupt_after_a_request_ends_the_process_at_once(first: int) -> None:
    with Job(interrupt_twice, 1, first) as job:
        (outcome,) = job.wait(30)
    assert outcome.code == -signal.SIGINT
    assert outcome.output == "still here\n"


# ---- heartbeats


@pytest.fixture
def store() -> Iterator[Store]:
    """What all ranks of a test meet in."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    yield PrefixStore("start 0", server)
    del server


@contextmanager
def watches(store: Store, size: int) -> Iterator[list[Watch]]:
    """The watches of `size` ranks, without their threads."""
    made = [Watch(rank, size, launched=False) for rank in range(size)]
    for watch in made:
        watch.connect(store)
    yield made


def test_who_gave_no_word_is_named_with_place_and_age(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "WITNESS_SECONDS", 0.2)
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    with watches(store, 3) as (first, second, third):
        third.mark("evaluate", 4, 417)
        clock[0] += 60
        third._doom()  # a late heartbeat does not make the rank younger
        clock[0] += 1
        first.report_end(WAITED)
        second.report_end(WAITED)
        assert first.name_missing() == second.name_missing()
        where = "last seen in evaluate, epoch 4, step 417, 61 s ago"
        assert first.name_missing() == f"rank 2 (host {socket.gethostname()}) {where}"


def test_who_raised_is_to_blame_and_not_who_is_silent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "WITNESS_SECONDS", 0.2)
    with watches(store, 4) as (first, second, third, _silent):
        first.report_end(WAITED)
        third.mark("train", 1, 9)
        third.report_end("raised KeyError")
        verdict = second.name_missing()
        assert re.fullmatch(
            r"rank 2 \(host \S+\) raised KeyError, last seen in train, epoch 1, step 9, 0 s ago", verdict
        )
        assert first.name_missing() == verdict  # all ranks say the same


def test_a_silent_rank_whose_heart_beats_is_not_taken_for_a_dead_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "WITNESS_SECONDS", 0.3)
    with watches(store, 3) as (first, _dead, alive):
        beating = threading.Timer(0.1, alive._doom)
        first.report_end(WAITED)
        beating.start()
        assert first.name_missing().startswith("rank 1 ")
        beating.join()


def test_nothing_is_awaited_once_all_have_reported(store: Store) -> None:
    with watches(store, 2) as (first, second):
        begun = time.monotonic()
        second.report_end(WAITED)
        first.report_end(WAITED)
        first.linger()
        assert first.name_missing() == "all ranks waited"
        assert time.monotonic() - begun < health.WITNESS_SECONDS


def test_a_store_that_is_gone_is_said_and_not_raised(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def __getattr__(self, _name: str) -> None:
            raise RuntimeError("connection reset")

    with watches(store, 2) as (first, _):
        monkeypatch.setattr(first, "_store", Gone())
        first.report_end(WAITED)
        first.linger()
        assert "the store is gone too" in first.name_missing()
        assert first._doom() == "the store of the job is gone"


def test_a_world_of_one_has_nobody_to_ask(store: Store) -> None:
    with watches(store, 1) as (only,):
        only.report_end(WAITED)
        only.linger()
        assert only.name_missing() == "no other rank to ask"
        assert only._doom() is None


def test_a_failed_job_dooms_the_others(store: Store) -> None:
    with watches(store, 2) as (first, second):
        assert second._doom() is None
        first.report_end("raised ValueError")
        assert str(second._doom()).startswith("the job has failed: rank 0 (host ")


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
    monkeypatch.setattr(health, "WITNESS_SECONDS", 4.0)
    store, size, lost = CountingStore(), 1024, 700
    watches = [Watch(rank, size, launched=False) for rank in range(size)]
    for watch in watches:
        watch.connect(store)  # type: ignore[arg-type]
    names: set[str] = set()

    def fail(watch: Watch) -> None:
        watch.report_end(WAITED)
        names.add(watch.name_missing())

    threads = [threading.Thread(target=fail, args=(watch,)) for watch in watches if watch.rank != lost]
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
    health.BEAT_SECONDS, health.GRACE_SECONDS = 0.1, grace
    watch = Watch(rank, 3, launched=True)
    watch.start()
    server = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
    watch.connect(PrefixStore("start 0", server))
    if rank == 0:
        watch.report_end("raised ValueError")
        watch.stop()
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
