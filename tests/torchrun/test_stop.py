"""Stopped by a signal, in whatever phase: saved, said how to go on, and continued to the bits of a run left alone."""

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.optim import Adam

from ddp_circles import loop
from ddp_circles.job.stop import STOP_SIGNALS
from tests.harness.ranks import Job
from tests.harness.runs import (
    LAUNCHERS,
    PLAIN,
    QUIET,
    TRAINER,
    Bits,
    Command,
    Launcher,
    bits,
    checkpoint_steps,
    finish,
    newest_state,
    plain,
    start,
    status,
    torchrun,
    train_hastily,
    train_plain,
)

STEPS_PER_EPOCH = 7
TINY = ("--n-samples=125", "--batch-size=16", "--epochs=4", "--checkpoint-seconds=1000")
LONG = ("--n-samples=125", "--batch-size=16", "--epochs=100000", "--checkpoint-seconds=1000")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Bits:
    """The bits of a run that nobody stops."""
    return finish(PLAIN, tmp_path_factory.mktemp("alone"), *TINY)


# ---- quick ranks that send the signal to themselves, at a chosen place


def signal_in_training(number: int, step: int, *flags: object) -> None:
    """The last rank is signalled while it takes optimizer step `step`, counted from 0 in this start."""
    original, steps, is_last = Adam.step, 0, is_last_rank()

    def take_step(*arguments: Any) -> Any:
        nonlocal steps
        if steps == step and is_last:
            signal.raise_signal(number)
        steps += 1
        return original(*arguments)

    setattr(Adam, "step", take_step)  # noqa: B010 - a plain assignment has another type
    train_plain_or_launched(*flags)


def is_last_rank() -> bool:
    return int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1


def train_plain_or_launched(*flags: object) -> None:
    """Train; a world of one is a process that knows of no launcher."""
    (train_hastily if os.environ["WORLD_SIZE"] != "1" else train_plain)(*flags)


def signal_in_evaluation(number: int, *flags: object) -> None:
    """The last rank is signalled at the beginning of its first evaluation."""
    original, is_last = loop.evaluate, is_last_rank()

    def evaluate(*arguments: Any) -> Any:
        if is_last:
            signal.raise_signal(number)
        return original(*arguments)

    setattr(loop, "evaluate", evaluate)  # noqa: B010 - a plain assignment has another type
    train_plain_or_launched(*flags)


def test_stopped_in_training_and_in_evaluation(tmp_path: Path, alone: Bits) -> None:
    flags = ("--run-dir", tmp_path, *QUIET, *TINY)
    with Job(signal_in_training, 1, signal.SIGUSR1, 2, *flags) as job:
        (outcome,) = job.wait(120)
    # the request travels with the gradients of the next step
    assert (outcome.code, status(tmp_path), checkpoint_steps(tmp_path)[0]) == (75, "stopped", 4), outcome.output
    assert "stopped after step 4; to continue: " in outcome.output

    with Job(signal_in_evaluation, 2, signal.SIGHUP, *flags) as job:
        outcomes = job.wait(120)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output
    state = newest_state(tmp_path)
    assert (status(tmp_path), state["epoch"], state["step"]) == ("stopped", 0, STEPS_PER_EPOCH)
    assert "stopped after step 7; to continue: " in outcomes[0].output
    assert outcomes[1].output == ""

    with Job(signal_in_training, 3, signal.SIGINT, 12, *flags) as job:
        outcomes = job.wait(120)
    assert ([outcome.code for outcome in outcomes], checkpoint_steps(tmp_path)[0]) == ([0, 0, 0], 21)
    with Job(signal_in_evaluation, 1, signal.SIGUSR2, *flags) as job:
        (outcome,) = job.wait(120)
    assert (outcome.code, status(tmp_path), newest_state(tmp_path)["epoch"]) == (75, "stopped", 2)
    assert finish(2, tmp_path, *TINY) == alone


def test_stopped_in_the_last_evaluation(tmp_path: Path, alone: Bits) -> None:
    flags = (*QUIET, *TINY)
    finish(1, tmp_path, *TINY, "--epochs=3")
    with Job(signal_in_evaluation, 2, signal.SIGTERM, "--run-dir", tmp_path, *flags) as job:
        job.wait(120)
    assert (status(tmp_path), checkpoint_steps(tmp_path)[0]) == ("stopped", 28)
    assert finish(3, tmp_path, *TINY) == alone


def test_fast_runs_stop_where_the_ranks_agree(tmp_path: Path) -> None:
    flags = ("--run-dir", tmp_path, *QUIET, *LONG, "--reduction=fast", "--batch-size=1", "--n-samples=1250")
    with Job(signal_in_training, 2, signal.SIGTERM, 40, *flags) as job:
        outcomes = job.wait(120)
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert (status(tmp_path), checkpoint_steps(tmp_path)[0]) == ("stopped", 64)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_no_rank_is_left_after_many_stops(tmp_path: Path) -> None:
    """A group that was freed while gloo's thread still held tensors of the last sum kept one rank in about thirty."""
    for number in range(200):
        flags = ("--run-dir", tmp_path / str(number), *QUIET, *LONG, "--reduction=fast", "--batch-size=1")
        with Job(signal_in_training, 2, signal.SIGTERM, 40, *flags) as job:
            assert [outcome.code for outcome in job.wait(60)] == [0, 0]


# ---- whole processes


def signals(pid: int, kind: str) -> int:
    """One of the kernel's sets of signals for a process, as bits; see proc(5)."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(kind)]
    return int(line.split()[1], 16)


def listens(pid: int) -> bool:
    """Return true once the process has taken over the last of the signals; Python itself catches SIGINT."""
    return bool(signals(pid, "SigCgt") >> (STOP_SIGNALS[-1] - 1) & 1)


def has_loaded_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def stop_before_torch_is_there(folder: Path, number: int, *extra: str) -> str:
    """Send a stop signal as soon as it is caught; returns the command that is printed."""
    run_dir = folder / "run"
    with plain(folder / "log", run_dir, *TINY, *extra) as command:
        command.wait_until(lambda: listens(command.pid))
        early = not has_loaded_torch(command.pid)
        command.signal(number)
        assert command.wait(120) == 75
    assert early
    assert status(run_dir) == "stopped"
    assert checkpoint_steps(run_dir)[0] == 1
    said, _, printed = command.output.strip().splitlines()[-1].partition("; to continue: ")
    assert said == "stopped after step 1"
    expected = [sys.executable, *TRAINER, "--run-dir", str(run_dir), *QUIET, *TINY, *extra]
    assert shlex.split(printed)[: len(expected)] == expected
    return printed


def test_stopped_before_torch_is_there_and_continued_by_the_printed_command(tmp_path: Path, alone: Bits) -> None:
    printed = stop_before_torch_is_there(tmp_path, signal.SIGINT, "--resume=never")
    with Command(tmp_path / "log", "sh", "-c", printed) as command:
        assert command.wait(120) == 0
    assert "continue after step 1" in command.output
    assert bits(tmp_path / "run") == alone


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_stopped_before_torch_is_there_by_the_other_signals(tmp_path: Path, alone: Bits, number: int) -> None:
    stop_before_torch_is_there(tmp_path, number)
    assert finish(2, tmp_path / "run", *TINY) == alone


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    """The training is stuck, so that the first one alone does nothing."""
    with start(PLAIN, tmp_path, *LONG, "--fault=stall@0:20") as job:
        pid = job.processes[0].pid
        job.wait_until((tmp_path / "fault").exists)
        job.signal(signal.SIGINT)
        job.wait_until(lambda: not signals(pid, "ShdPnd") >> (signal.SIGINT - 1) & 1)
        job.signal(signal.SIGINT)
        (outcome,) = job.wait(10)
    assert outcome.code == -signal.SIGINT
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.thorough)])
def test_a_stop_of_torchrun_stops_its_workers_and_prints_its_command(tmp_path: Path, alone: Bits, number: int) -> None:
    """Without a run directory given: the command names the one that was found."""
    run_dir = tmp_path / "runs" / "demo run"
    options = ["--max-restarts=3", "--rdzv-id=demo run"]
    with torchrun(tmp_path / "log", 2, None, *LONG, options=options, cwd=tmp_path) as command:
        command.wait_until(
            lambda: (run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").stat().st_size > 0
        )
        command.signal(number)
        assert command.wait(90) != 0
        assert command.workers() == []
    assert status(run_dir) == "stopped"
    flags = shlex.join([*TRAINER, *QUIET, *LONG])
    continuing = f"{Path(sys.executable).with_name('torchrun')} --nproc_per_node=2 {flags} --run-dir 'runs/demo run'"
    (line,) = [line for line in command.output.splitlines() if "to continue" in line]
    assert line == f"stopped after step {checkpoint_steps(run_dir)[0]}; to continue: {continuing}"
    assert "lost a peer" not in command.output
    epochs = newest_state(run_dir)["epoch"] + 4
    assert finish(3, run_dir, *LONG, f"--epochs={epochs}").rows[:4] == alone.rows


@pytest.mark.parametrize("launch", LAUNCHERS)
def test_a_stop_of_one_worker_stops_them_all_and_the_launcher_ends_well(launch: Launcher, tmp_path: Path) -> None:
    with launch(tmp_path / "log", 2, tmp_path / "run", *LONG, options=["--max-restarts=3"]) as job:
        job.wait_until((tmp_path / "run" / "metrics.jsonl").exists)
        job.workers()[1].send_signal(signal.SIGUSR1)
        assert job.wait(90) == 0
    assert status(tmp_path / "run") == "stopped"
    assert job.output.count("start: ") == 1
