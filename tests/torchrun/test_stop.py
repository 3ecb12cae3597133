"""Stopped by a signal, in whatever phase: saved, said how to go on, and continued to the bits of a run left alone."""

import shlex
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from ddp_circles.job.stop import STOP_SIGNALS
from tests.harness.ranks import Job
from tests.harness.runs import (
    PLAIN,
    QUIET,
    TRAINER,
    Bits,
    Command,
    bits,
    checkpoint_steps,
    finish,
    newest_state,
    plain,
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
    import os

    from torch.optim import Adam

    original, steps = Adam.step, 0

    def take_step(*arguments: Any) -> Any:
        nonlocal steps
        if steps == step and int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
            signal.raise_signal(number)
        steps += 1
        return original(*arguments)

    setattr(Adam, "step", take_step)  # noqa: B010 - a plain assignment has another type
    (train_hastily if os.environ["WORLD_SIZE"] != "1" else train_plain)(*flags)


def signal_in_evaluation(number: int, *flags: object) -> None:
    """The last rank is signalled at the beginning of its first evaluation."""
    import os

    from ddp_circles import loop

    original = loop.evaluate

    def evaluate(*arguments: Any) -> Any:
        if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
            signal.raise_signal(number)
        return original(*arguments)

    setattr(loop, "evaluate", evaluate)  # noqa: B010 - a plain assignment has another type
    (train_hastily if os.environ["WORLD_SIZE"] != "1" else train_plain)(*flags)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stopped_in_training_and_in_evaluation(tmp_path: Path, alone: Bits, number: int) -> None:
    flags = ("--run-dir", tmp_path, *QUIET, *TINY)
    with Job(signal_in_training, 1, number, 2, *flags) as job:
        (outcome,) = job.wait(120)
    # the request travels with the gradients of the next step
    assert (outcome.code, status(tmp_path), checkpoint_steps(tmp_path)[0]) == (75, "stopped", 4), outcome.output
    assert "stopped after step 4; to continue: " in outcome.output

    with Job(signal_in_evaluation, 2, number, *flags) as job:
        outcomes = job.wait(120)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output
    state = newest_state(tmp_path)
    assert (status(tmp_path), state["epoch"], state["step"]) == ("stopped", 0, STEPS_PER_EPOCH)
    assert "stopped after step 7; to continue: " in outcomes[0].output
    assert outcomes[1].output == ""

    with Job(signal_in_training, 3, number, 12, *flags) as job:
        outcomes = job.wait(120)
    assert ([outcome.code for outcome in outcomes], checkpoint_steps(tmp_path)[0]) == ([0, 0, 0], 21)
    with Job(signal_in_evaluation, 1, number, *flags) as job:
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


# ---- real processes


def signals(pid: int, kind: str) -> int:
    """One of the kernel's sets of signals for a process, as bits; see proc(5)."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(kind)]
    return int(line.split()[1], 16)


def listens(pid: int) -> bool:
    """Whether the process has taken over the last of the three signals; Python itself catches SIGINT."""
    return bool(signals(pid, "SigCgt") >> (STOP_SIGNALS[-1] - 1) & 1)


def has_loaded_torch(process: psutil.Process) -> bool:
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


def test_stopped_before_torch_is_there_and_continued_by_the_printed_command(tmp_path: Path, alone: Bits) -> None:
    commands = {}
    for number in STOP_SIGNALS:
        run_dir = tmp_path / f"run {number}"
        extra = ("--resume=never",) if number == signal.SIGINT else ()
        with plain(tmp_path / f"log {number}", run_dir, *TINY, *extra) as command:
            process = psutil.Process(command.process.pid)
            command.wait_until(partial(listens, process.pid))
            early = not has_loaded_torch(process)
            process.send_signal(number)
            assert command.wait(120) == 75
        assert early
        assert status(run_dir) == "stopped"
        assert checkpoint_steps(run_dir)[0] == 1
        said, _, commands[number] = command.output.strip().splitlines()[-1].partition("; to continue: ")
        assert said == "stopped after step 1"
        expected = [sys.executable, *TRAINER, "--run-dir", str(run_dir), *QUIET, *TINY, *extra]
        assert shlex.split(commands[number])[: len(expected)] == expected

    with Command(tmp_path / "log", "sh", "-c", commands[signal.SIGINT]) as command:
        assert command.wait(120) == 0
    assert "continue after step 1" in command.output
    assert bits(tmp_path / f"run {signal.SIGINT}") == alone
    assert finish(2, tmp_path / f"run {signal.SIGTERM}", *TINY) == alone


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    """The training is stuck, so that the first one alone does nothing."""
    with plain(tmp_path / "log", tmp_path / "run", *LONG, "--fault=stall@0:20") as command:
        command.wait_until((tmp_path / "run" / "fault").exists)
        command.process.send_signal(signal.SIGINT)
        command.wait_until(lambda: not signals(command.process.pid, "ShdPnd"))
        command.process.send_signal(signal.SIGINT)
        assert command.wait(10) == -signal.SIGINT
    assert "Traceback" not in command.output


def test_a_stop_of_torchrun_stops_its_workers_and_prints_its_command(tmp_path: Path, alone: Bits) -> None:
    """Without a run directory given: the command names the one that was found."""
    log, run_dir = tmp_path / "log", tmp_path / "runs" / "demo run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=3"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=demo run"]
    with Command(log, *launcher, *TRAINER, *QUIET, *LONG, cwd=tmp_path) as command:
        command.wait_until(
            lambda: (run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").stat().st_size > 0
        )
        command.process.send_signal(signal.SIGTERM)
        assert command.wait(90) != 0
        assert command.workers() == []
    assert status(run_dir) == "stopped"
    flags = shlex.join([*TRAINER, *QUIET, *LONG])
    continuing = f"torchrun --nproc_per_node=2 {flags} --run-dir 'runs/demo run'"
    (line,) = [line for line in command.output.splitlines() if "to continue" in line]
    assert line == f"stopped after step {checkpoint_steps(run_dir)[0]}; to continue: {continuing}"
    assert "lost a peer" not in command.output
    epochs = newest_state(run_dir)["epoch"] + 4
    assert finish(3, run_dir, *LONG, f"--epochs={epochs}").rows[:4] == alone.rows


def test_a_stop_of_one_worker_stops_them_all_and_torchrun_ends_well(tmp_path: Path) -> None:
    with torchrun(tmp_path / "log", 2, tmp_path / "run", *LONG, options=("--max-restarts=3",)) as command:
        command.wait_until((tmp_path / "run" / "metrics.jsonl").exists)
        command.workers()[1].send_signal(signal.SIGUSR1)
        assert command.wait(90) == 0
    assert status(tmp_path / "run") == "stopped"
    assert command.output.count("start: ") == 1
