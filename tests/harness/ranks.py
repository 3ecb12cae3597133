"""Run functions and command lines on several ranks at once, quickly and without leaving a process behind.

The ranks are forked from a server that has torch imported already, so four of them start in a fraction of a second. The
parent holds the ranks' store, as torchrun's agent does, so a job can lose any rank and be started again.
"""

import contextlib
import io
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

from ddp_circles import train as command_line
from ddp_circles.job.stop import STOP_SIGNALS
from ddp_circles.job.store import serve_store

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.harness.preload"])
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "TORCHELASTIC_",
    "SLURM_",
    "GROUP_",
    "WANDB_",
    "DDP_CIRCLES_",
    "KUBERNETES_SERVICE_",
)


@dataclass(frozen=True)
class Outcome:
    """The end of one rank."""

    rank: int
    code: int | None
    """Exit code, negative for a signal, None if it hung and was killed."""
    value: Any
    """The function's result."""
    output: str
    """Standard output and error, with the traceback of what it raised."""


class Job:
    """`size` ranks that run `function(*arguments)`; a context manager that kills what is left at its end."""

    def __init__(
        self, function: Callable[..., Any], size: int, *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        self._folder = TemporaryDirectory()
        self._store = serve_store(0, timedelta(seconds=60))
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(size):
            receiver, sender = FORKSERVER.Pipe(duplex=False)
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "GROUP_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RUN_ID": "test",
            } | dict(environment or {})
            process = FORKSERVER.Process(
                target=_run, args=(sender, self._log(rank), variables, function, arguments), name=f"rank {rank}"
            )
            process.start()
            sender.close()
            self._pipes.append(receiver)
            self.processes.append(process)

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank{rank}"

    def output(self, rank: int) -> str:
        """The text `rank` has printed so far."""
        return self._log(rank).read_text() if self._log(rank).exists() else ""

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to `ranks`, or to all."""
        for rank in ranks or range(len(self.processes)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, number)

    def wait_until(self, condition: Callable[[], bool], timeout: float = 60.0) -> None:
        """Wait for something to come true while all ranks run."""
        wait_until(condition, timeout, lambda: all(process.is_alive() for process in self.processes), self._outputs)

    def _outputs(self) -> str:
        return "\n".join(map(self.output, range(len(self.processes))))

    def wait(self, timeout: float) -> list[Outcome]:
        """Wait for all ranks until `timeout` seconds have passed, then kill the rest."""
        deadline = time.monotonic() + timeout
        outcomes = []
        for rank, (process, pipe) in enumerate(zip(self.processes, self._pipes, strict=True)):
            process.join(max(0.0, deadline - time.monotonic()))
            hung = process.is_alive()
            if hung:
                process.kill()
                process.join()
            code = None if hung else process.exitcode
            outcomes.append(Outcome(rank, code, _received(pipe), self.output(rank)))
        return outcomes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, pipe in zip(self.processes, self._pipes, strict=True):
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
            pipe.close()
        self._folder.cleanup()


def wait_until(
    condition: Callable[[], bool], timeout: float, running: Callable[[], bool], output: Callable[[], str]
) -> None:
    """Wait until `condition` holds; fails with `output` when `running` no longer holds, or after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert running() or condition(), f"ended early:\n{output()}"
        assert time.monotonic() < deadline, f"still waiting after {timeout} s:\n{output()}"
        time.sleep(0.01)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _received(pipe: Connection) -> Any:
    """The value that came through `pipe`; None if the rank left without sending anything."""
    try:
        return pipe.recv() if pipe.poll() else None
    except EOFError:
        return None


def write_output_to(log: Path) -> None:
    """Append everything that this process prints from now on to `log`, line by line."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(fd, "wb", closefd=False), write_through=True) for fd in (1, 2))


def forget_launcher() -> None:
    """Remove every launcher's variables from the environment."""
    for name in list(os.environ):
        if name.startswith(LAUNCHER_VARIABLES):
            del os.environ[name]


def _run(
    sender: Connection, log: Path, variables: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    write_output_to(log)
    forget_launcher()
    os.environ.update(variables)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    try:
        sender.send(function(*arguments))
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def run_ranks(
    function: Callable[..., Any],
    size: int,
    *arguments: Any,
    timeout: float = 120.0,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """The values that `function(*arguments)` returns on each of `size` ranks; names the rank that raised or hung."""
    with Job(function, size, *arguments, environment=environment) as job:
        outcomes = job.wait(timeout)
    for outcome in outcomes:
        how = "hung" if outcome.code is None else f"ended with {outcome.code}"
        assert outcome.code == 0, f"rank {outcome.rank} of {size} {how}:\n{outcome.output}"
    return [outcome.value for outcome in outcomes]


def train(*flags: object) -> None:
    """Run the trainer's command line in this rank and leave with its exit code."""
    sys.argv = ["train", *map(str, flags)]
    sys.orig_argv = [sys.executable, "-m", "ddp_circles.train", *sys.argv[1:]]  # the command that a stop prints
    command_line.main()


def train_on(size: int, *flags: object, timeout: float = 180.0) -> list[Outcome]:
    """Run the trainer's command line on `size` ranks to its end."""
    with Job(train, size, *flags) as job:
        return job.wait(timeout)
