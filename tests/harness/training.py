"""Training jobs on the test cluster."""

import json
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from tests.harness.cluster import FINAL_STATES, Cluster, ClusterError, Job, wait_until
from tests.harness.runs import PROJECT, QUIET, Bits, bits, status

EPOCHS = 60
STEPS_PER_EPOCH = 5
SETTINGS = (f"--epochs={EPOCHS}", "--n-samples=400", "--batch-size=64")
"""Trained by every run here; some seconds of work."""


def epochs_done(run_dir: Path) -> int:
    """The number of lines in metrics.jsonl so far."""
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@dataclass(frozen=True)
class Training:
    """A submitted job."""

    cluster: Cluster
    job_id: str
    folder: Path
    """The folder in which it runs and prints."""

    @classmethod
    def submit(
        cls,
        cluster: Cluster,
        folder: Path,
        *arguments: str,
        script: str = "train.sbatch",
        options: Sequence[str] = (),
        variables: dict[str, str] | None = None,
    ) -> Self:
        """Submit a batch script from the project's folder, as a user does; the job runs in `folder`.

        `options` go to sbatch, `arguments` to the trainer, `variables` into the environment. One rank per node, if
        neither asks for another number.
        """
        job_id = cluster.submit(
            f"--chdir={folder}",
            f"--output={folder}/%x-%j.out",
            *options,
            f"slurm/{script}",
            *QUIET,
            *SETTINGS,
            "--checkpoint-seconds=3600",
            *arguments,
            cwd=PROJECT,
            **({"VIRTUAL_ENV": sys.prefix, "RANKS_PER_NODE": "1"} | (variables or {})),
        )
        return cls(cluster, job_id, folder)

    @property
    def run_dir(self) -> Path:
        """The run directory, named after the job where nothing else is said."""
        return self.folder / "runs" / self.job_id

    @property
    def log(self) -> str:
        """The text that the job has printed."""
        file = self.folder / f"circles-{self.job_id}.out"
        return file.read_text() if file.exists() else ""

    @property
    def status(self) -> str:
        """The word in the run directory's file `status`."""
        return status(self.run_dir)

    @property
    def summary(self) -> dict[str, Any]:
        """The run's last figures."""
        figures: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return figures

    @property
    def bits(self) -> Bits:
        """The bits of the finished run."""
        return bits(self.run_dir)

    def job(self) -> Job:
        """The job's state now."""
        return self.cluster.job(self.job_id)

    def wait_for_some_steps(self) -> int:
        """Wait until a few of the epochs are done; returns the steps done by then."""
        try:
            wait_until(lambda: epochs_done(self.run_dir) > EPOCHS // 10, "the training is on its way", 180)
        except ClusterError as error:
            raise self._with_log(error) from None
        return epochs_done(self.run_dir) * STEPS_PER_EPOCH

    def interrupt(self, *command: str) -> None:
        """Run a command of Slurm's that makes it tell the trainers to stop.

        They are held until it has, so that they are in the middle of their work however long it takes.
        """
        trainers = self.trainers()
        for trainer in trainers:
            trainer.suspend()
        try:
            self.cluster.run(*command)
            wait_until(lambda: all(map(_is_told_to_stop, trainers)), "all trainers are told to stop", 120)
        finally:
            for trainer in trainers:
                with suppress(psutil.NoSuchProcess):
                    trainer.resume()

    def wait(self, *states: str, seconds: float = 300) -> Job:
        """Wait for one of `states`, by default for the job's end."""
        try:
            return self.cluster.wait_for_job(self.job_id, *states, seconds=seconds)
        except ClusterError as error:
            raise self._with_log(error) from None

    def cancel(self) -> None:
        """End the job if it is still there."""
        if self.job().state not in FINAL_STATES:
            self.cluster.run("scancel", self.job_id)
            self.wait()

    def trainers(self) -> list[psutil.Process]:
        """The processes that train, without torchrun and wrappers."""
        run_dir = str(self.run_dir.relative_to(self.folder))
        found = [(process, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        trainers = [process for process, words in found if "-m" in words[1:3] and run_dir in words]
        assert trainers
        return trainers

    def wandb_runs(self) -> set[str]:
        """The ids of the Weights & Biases runs recorded here."""
        names = [path.name for path in (self.run_dir / "wandb").glob("offline-run-*")]
        return {match[1] for name in names if (match := re.fullmatch(r"offline-run-\d+_\d+-(\w+)", name))}

    def _with_log(self, error: ClusterError) -> ClusterError:
        return ClusterError(f"{error}\n-- log of job {self.job_id}\n{self.log[-3000:]}")


def _is_told_to_stop(trainer: psutil.Process) -> bool:
    """Return true if USR1 or TERM is pending for a process that is held, or has already set it going again."""
    try:
        if trainer.status() != psutil.STATUS_STOPPED:
            return True
        lines = Path(f"/proc/{trainer.pid}/status").read_text().splitlines()
    except (psutil.NoSuchProcess, FileNotFoundError):
        return True
    (mask,) = [int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd:")]
    return any(mask >> (number - 1) & 1 for number in (signal.SIGUSR1, signal.SIGTERM))
