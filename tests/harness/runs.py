"""Whole runs of the trainer's command line: in quick ranks, as real commands, under launchers; and their results."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.api import MultiprocessContext
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.launcher.api import launch_agent
from torch.distributed.run import config_from_args, parse_args

from ddp_circles.job import refusal
from ddp_circles.records.checkpoint import Checkpoints, State, decode
from tests.harness.ranks import FORKSERVER, Job, Outcome, forget_launcher, train, wait_until, write_output_to

PROJECT = Path(__file__).resolve().parents[2]
PYTHON_PATH = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
"""Where commands find this project, and what else this process has been told to find."""
PLAIN = 0
"""In place of a number of ranks: one process that no launcher started."""
QUIET = ("--wandb=disabled", "--no-plots", "--log-every=1000000", "--device=cpu")
TRAINER = ("-m", "ddp_circles.train")
FIGURES = ("epoch", "step", "train/loss", "train/accuracy", "test/loss", "test/accuracy")
"""The figures of a metrics line that do not depend on the clock."""


@dataclass(frozen=True)
class Bits:
    """Results that two runs of the same settings must have in common."""

    model: str
    """SHA-256 of model.safetensors."""
    rows: tuple[tuple[Any, ...], ...]
    """The figures of all epochs, as they were written."""


def bits(run_dir: Path) -> Bits:
    """The bits of a finished run; each epoch must be there once, in order, and the summary must agree."""
    assert status(run_dir) == "finished"
    digest = hashlib.sha256((run_dir / "model.safetensors").read_bytes()).hexdigest()
    rows = metrics(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [row["epoch"] for row in rows] == list(range(summary["epochs"]))
    assert summary["weights_sha256"] == digest
    assert {name: summary[name] for name in FIGURES} == {name: rows[-1][name] for name in FIGURES}
    return Bits(digest, tuple(tuple(row[name] for name in FIGURES) for row in rows))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def status(run_dir: Path) -> str:
    """The word in the file `status`."""
    return (run_dir / "status").read_text().strip()


def checkpoint_steps(run_dir: Path) -> list[int]:
    """The global steps of the checkpoints, newest first, as their names say."""
    return [int(path.stem.removeprefix("step-")) for path in Checkpoints(run_dir / "checkpoints").files()]


def newest_state(run_dir: Path) -> State:
    """The content of the newest checkpoint."""
    return decode(Checkpoints(run_dir / "checkpoints").files()[0].read_bytes())


def start(size: int, run_dir: Path, *flags: object, variables: Mapping[str, str] | None = None) -> Job:
    """Ranks that train in `run_dir`, to be waited for."""
    function = train_plain if size == PLAIN else train_hastily
    return Job(function, max(1, size), "--run-dir", run_dir, *QUIET, *flags, environment=variables)


def run(size: int, run_dir: Path, *flags: object, timeout: float = 180.0) -> list[Outcome]:
    """Train in `run_dir` on `size` ranks until all of them have ended."""
    with start(size, run_dir, *flags) as job:
        return job.wait(timeout)


def finish(size: int, run_dir: Path, *flags: object, timeout: float = 180.0) -> Bits:
    """Train in `run_dir` to the end, and return the run's bits."""
    for outcome in run(size, run_dir, *flags, timeout=timeout):
        assert outcome.code == 0, f"rank {outcome.rank} of {size} ended with {outcome.code}:\n{outcome.output}"
    return bits(run_dir)


def train_hastily(*flags: object) -> None:
    """Run the trainer's command line; where rank 0 refuses, the others do not wait long: there is no agent here."""
    refusal.RANK_0_SPEAKS_SECONDS = 0.1
    train(*flags)


def train_plain(*flags: object) -> None:
    """Run the trainer's command line in a process that knows of no launcher."""
    forget_launcher()
    train(*flags)


# ---- programs, and torchrun


class Program(ABC):
    """Something that runs by itself; a context manager that kills it and all that it started."""

    def __init__(self, log: Path, pid: int) -> None:
        self._log = log
        self.pid = pid

    @property
    def output(self) -> str:
        """The text it has printed so far, and what it started."""
        return self._log.read_text()

    @abstractmethod
    def exit_code(self, timeout: float = 0.0) -> int | None:
        """The exit code, negative for a signal; None if it still runs after `timeout` seconds."""

    @abstractmethod
    def workers(self) -> list[psutil.Process]:
        """The trainers that it has started and that still run, if it is a launcher."""

    def signal(self, number: int) -> None:
        """Send it a signal; its workers get none."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it and then its workers, all without a word."""
        workers = self.workers()
        if self.exit_code() is None:
            self.signal(signal.SIGKILL)
            self.wait(30)
        for worker in workers:
            worker.kill()

    def wait(self, timeout: float) -> int:
        """The exit code; fails with the output if it takes longer."""
        code = self.exit_code(timeout)
        assert code is not None, f"still running after {timeout} s:\n{self.output}"
        return code

    def wait_until(self, condition: Callable[[], bool], timeout: float = 120.0) -> None:
        """Wait for something to come true while it runs."""
        wait_until(condition, timeout, lambda: self.exit_code() is None, lambda: self.output)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


class Command(Program):
    """A real command, in a session of its own."""

    def __init__(
        self, log: Path, *words: object, cwd: Path = PROJECT, variables: Mapping[str, str] | None = None
    ) -> None:
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=os.environ | {"PYTHONPATH": PYTHON_PATH} | dict(variables or {}),
                start_new_session=True,
            )
        super().__init__(log, self.process.pid)
        self._seen: dict[int, psutil.Process] = {}

    def exit_code(self, timeout: float = 0.0) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
        return self.process.returncode

    def workers(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.pid).children(recursive=True)
            self._seen.update({child.pid: child for child in found if _trains(child)})
        return [child for child in self._seen.values() if _trains(child)]


def _trains(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
        return process.status() != psutil.STATUS_ZOMBIE and TRAINER[1] in words and "torch.distributed.run" not in words
    except psutil.NoSuchProcess:
        return False


class Agent(Program):
    """The trainer with `flags` under torch's elastic agent, both from the fork server: torchrun that starts at once.

    `options` are torchrun's. All is as there, but the workers are children of the fork server and not of the agent.
    """

    def __init__(
        self, log: Path, options: Sequence[str], flags: Sequence[object], cwd: Path, variables: Mapping[str, str]
    ) -> None:
        log.touch()
        forkserver.ensure_running()
        arguments = (_server()._forkserver_address, log, options, flags, cwd, variables)
        self._process = FORKSERVER.Process(target=_be_agent, args=arguments, name="agent")
        self._process.start()
        assert self._process.pid is not None
        super().__init__(log, self._process.pid)

    def exit_code(self, timeout: float = 0.0) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def workers(self) -> list[psutil.Process]:
        return [child for child in psutil.Process(_server()._forkserver_pid).children() if self._is_member(child)]

    def _is_member(self, process: psutil.Process) -> bool:
        try:
            return (
                process.pid != self.pid
                and process.status() != psutil.STATUS_ZOMBIE
                and os.getpgid(process.pid) == self.pid
            )
        except (psutil.NoSuchProcess, ProcessLookupError):
            return False


def _server() -> Any:
    return forkserver._forkserver


def _be_agent(
    server: str,
    log: Path,
    options: Sequence[str],
    flags: Sequence[object],
    cwd: Path,
    variables: Mapping[str, str],
) -> None:
    """Run torchrun's agent in this process, which the fork server at the address `server` has forked."""
    os.setpgid(0, 0)
    write_output_to(log)
    forget_launcher()
    os.environ.update({"OMP_NUM_THREADS": "1"} | dict(variables))  # torchrun would choose that and warn about it
    own = _server()
    own._forkserver_address = server
    own.ensure_running = lambda: None  # it runs, but is no child of this process, which could not look after it
    setattr(MultiprocessContext, "_start", _start_lightly)  # noqa: B010 - a plain assignment has another type
    config, _, _ = config_from_args(parse_args([*options, "--start-method=forkserver", "no-script"]))
    record(launch_agent)(config, _be_worker, [log, os.getpid(), flags, cwd, variables])


_start: Callable[[MultiprocessContext], None] = MultiprocessContext._start


def _start_lightly(context: MultiprocessContext) -> None:
    """Start workers without semaphores, which a killed agent would leave behind."""
    setattr(context, "_worker_finished_event", Released())  # noqa: B010 - a plain assignment has another type
    queues: Iterable[Any] = context._ret_vals.values()
    for queue in queues:
        queue._rlock, queue._wlock = contextlib.nullcontext(), None  # it has one writer and one reader
    _start(context)


class Released:
    """An event that has come: a worker that is done ends at once, as under torchrun, even if its agent was stopped."""

    def set(self) -> None:
        """Do nothing."""

    def wait(self) -> None:
        """Return at once."""


def _be_worker(log: Path, group: int, flags: Sequence[object], cwd: Path, variables: Mapping[str, str]) -> None:
    os.setpgid(0, group)
    write_output_to(log)
    os.environ.update(variables)
    os.chdir(cwd)
    train(*flags)


Launcher = Callable[..., Program]
"""`torchrun` or `agent`."""


def torchrun(
    log: Path,
    size: int,
    run_dir: Path | None,
    *flags: object,
    options: Sequence[str] = (),
    cwd: Path = PROJECT,
    variables: Mapping[str, str] | None = None,
) -> Command:
    """A true `torchrun` with `options`: `size` ranks of this node train, in `run_dir` if it is given."""
    launcher = (sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={size}", *options)
    return Command(log, *launcher, *TRAINER, *_flags(run_dir, flags), cwd=cwd, variables=variables)


def agent(
    log: Path,
    size: int,
    run_dir: Path | None,
    *flags: object,
    options: Sequence[str] = (),
    cwd: Path = PROJECT,
    variables: Mapping[str, str] | None = None,
) -> Agent:
    """The same from the fork server: torchrun's agent without torchrun's start."""
    return Agent(log, [f"--nproc_per_node={size}", *options], _flags(run_dir, flags), cwd, variables or {})


LAUNCHERS = [agent, pytest.param(torchrun, marks=pytest.mark.long)]
"""For tests of what holds under both; the second costs seconds for each rank."""


def _flags(run_dir: Path | None, flags: Sequence[object]) -> list[object]:
    return [*(["--run-dir", run_dir] if run_dir else []), *QUIET, *flags]


def plain(log: Path, run_dir: Path, *flags: object) -> Command:
    """`python -m ddp_circles.train`."""
    return Command(log, sys.executable, *TRAINER, *_flags(run_dir, flags))
