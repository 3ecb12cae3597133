"""Whole runs of the trainer's command line, in quick ranks or as real commands, and what nothing may change in them."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from ddp_circles.records.checkpoint import Checkpoints, State, decode
from tests.harness.ranks import LAUNCHER_VARIABLES, Job, Outcome, train

PROJECT = Path(__file__).resolve().parents[2]
PLAIN = 0
"""In place of a number of ranks: one process that no launcher started."""
QUIET = ("--wandb=disabled", "--no-plots", "--log-every=1000000", "--device=cpu")
FIGURES = ("epoch", "step", "train/loss", "train/accuracy", "test/loss", "test/accuracy")
"""What a metrics line says that does not depend on the clock."""


@dataclass(frozen=True)
class Bits:
    """What two runs of the same settings must have in common."""

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
    """What the newest checkpoint holds."""
    return decode(Checkpoints(run_dir / "checkpoints").files()[0].read_bytes())


def start(
    size: int, run_dir: Path, *flags: object, restarts: int = 0, variables: Mapping[str, str] | None = None
) -> Job:
    """Ranks that train in `run_dir`, to be waited for."""
    function = train_plain if size == PLAIN else train_hastily
    environment = {"TORCHELASTIC_RESTART_COUNT": str(restarts)} | dict(variables or {})
    return Job(function, max(1, size), "--run-dir", run_dir, *QUIET, *flags, environment=environment)


def run(size: int, run_dir: Path, *flags: object, timeout: float = 180.0) -> list[Outcome]:
    """How each of `size` ranks ends that trains in `run_dir`."""
    with start(size, run_dir, *flags) as job:
        return job.wait(timeout)


def finish(size: int, run_dir: Path, *flags: object) -> Bits:
    """Train in `run_dir` to the end, and return the run's bits."""
    for outcome in run(size, run_dir, *flags):
        assert outcome.code == 0, f"rank {outcome.rank} of {size} ended with {outcome.code}:\n{outcome.output}"
    return bits(run_dir)


def train_hastily(*flags: object) -> None:
    """Run the trainer's command line; where rank 0 refuses, the others do not wait long: there is no agent here."""
    from ddp_circles import cli

    cli.RANK_0_SPEAKS_SECONDS = 0.1
    train(*flags)


def train_plain(*flags: object) -> None:
    """Run the trainer's command line in a process that knows of no launcher."""
    for name in list(os.environ):
        if name.startswith((*LAUNCHER_VARIABLES, "LOCAL_")):
            del os.environ[name]
    train(*flags)


# ---- real commands

TRAINER = ("-m", "ddp_circles.train")


class Command:
    """A program that runs by itself; a context manager that kills it and all that it started."""

    def __init__(
        self, log: Path, *words: object, cwd: Path = PROJECT, variables: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=os.environ | {"PYTHONPATH": str(PROJECT)} | dict(variables or {}),
                start_new_session=True,
            )
        self._seen: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        """What it has printed so far, and what it started."""
        return self._log.read_text()

    def workers(self) -> list[psutil.Process]:
        """The trainers that it has started and that still run, if it is a launcher."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.process.pid).children(recursive=True)
            self._seen.update({child.pid: child for child in found if _trains(child)})
        return [child for child in self._seen.values() if _trains(child)]

    def wait(self, timeout: float) -> int:
        """Its exit code; shows its output if it takes longer."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.output}") from None

    def wait_until(self, condition: Callable[[], bool], timeout: float = 120.0) -> None:
        """Wait for something to come true while it runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output}"
            assert time.monotonic() < deadline, f"still waiting after {timeout} s:\n{self.output}"
            time.sleep(0.01)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers():
            worker.kill()
        self.process.kill()
        self.process.wait()


def _trains(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
        return process.status() != psutil.STATUS_ZOMBIE and TRAINER[1] in words and "torch.distributed.run" not in words
    except psutil.NoSuchProcess:
        return False


def plain(log: Path, run_dir: Path, *flags: object) -> Command:
    """`python -m ddp_circles.train`."""
    return Command(log, sys.executable, *TRAINER, "--run-dir", run_dir, *QUIET, *flags)


def torchrun(
    log: Path, size: int, run_dir: Path, *flags: object, options: tuple[str, ...] = (), **more: Any
) -> Command:
    """`torchrun` with `options` and `size` ranks on this node."""
    launcher = (sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={size}")
    meeting = (
        () if any("--rdzv" in option for option in options) else ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
    )
    return Command(log, *launcher, *meeting, *options, *TRAINER, "--run-dir", run_dir, *QUIET, *flags, **more)
