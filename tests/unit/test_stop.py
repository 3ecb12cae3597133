"""Stop requests: what the signals do, and when."""

import signal
import threading
from collections.abc import Iterator

import pytest

from ddp_circles.job.stop import STOP_SIGNALS, StopRequest
from tests.harness.ranks import Job


@pytest.fixture(autouse=True)
def no_nohup() -> Iterator[None]:
    """Let SIGHUP be heard, even if the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_sets_the_flag_and_its_handler_is_given_back(number: int) -> None:
    stop_requested, before = StopRequest(), [signal.getsignal(number) for number in STOP_SIGNALS]
    with stop_requested.listening():
        assert not stop_requested()
        signal.raise_signal(number)
        assert stop_requested()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert not stop_requested()


def test_under_nohup_a_closed_terminal_is_no_request() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop_requested = StopRequest()
    with stop_requested.listening(), stop_requested.listening():
        signal.raise_signal(signal.SIGHUP)
        assert not stop_requested()
        signal.raise_signal(signal.SIGTERM)
        assert stop_requested()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def outlive_late_signals() -> None:
    StopRequest.ignore()
    for number in STOP_SIGNALS:
        if number != signal.SIGINT:
            signal.raise_signal(number)


def test_late_signals_do_not_change_the_exit_code() -> None:
    with Job(outlive_late_signals, 1) as job:
        (outcome,) = job.wait(30)
    assert outcome.code == 0


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
