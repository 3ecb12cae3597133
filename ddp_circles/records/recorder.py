"""The loop's surroundings on a rank: heartbeats, planned faults, times; and on rank 0, everything that is written."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

from ddp_circles.constancy import Constancy
from ddp_circles.errors import FileError, HardwareError, RunDirTakenError, StopRequestedError
from ddp_circles.job.rehearsal import Rehearsal
from ddp_circles.job.stop import stop_requested
from ddp_circles.job.watch import Watch
from ddp_circles.metrics import Progress, Tally
from ddp_circles.records.checkpoint import State
from ddp_circles.records.console import Console
from ddp_circles.records.metrics_file import MetricsFile, Row
from ddp_circles.records.run_dir import RunDir
from ddp_circles.records.wandb_follower import FINISHED_SECONDS, UNFINISHED_SECONDS, WandbFollower
from ddp_circles.terminal import warn


@dataclass
class Writer:
    """The outputs of a run and how often they are written; only rank 0 has them."""

    run_dir: RunDir
    metrics_file: MetricsFile
    console: Console
    follower: WandbFollower
    """The copy at Weights & Biases."""
    checkpoint_seconds: float
    checkpoint_steps: int
    snapshot: Callable[[], State]
    """The state of model and optimizer, and what identifies the run."""


@dataclass
class Recorder:
    """The events around the loop on one rank, and the figures of the run so far."""

    watch: Watch
    rehearsal: Rehearsal | None
    """None where no fault is planned."""
    writer: Writer | None
    """None on ranks other than 0: they keep time and stay silent."""
    steps_per_epoch: int
    train_seconds: float
    metrics: Row
    """The last epoch's line."""
    checkpoint_step: int | None
    """Global step of the newest checkpoint; None while there is none."""
    learning_rates: Callable[[], Row]
    """Those of the last step, by the names that they are logged under."""
    constancy: Constancy | None
    """None where nothing is promised, or nothing can change."""
    refuse: Callable[[str], None]
    """Raises the same `UserError` on all ranks if one of them has a message."""
    _training: bool = False
    _epoch_began: float = 0.0
    _epoch_train_seconds: float = 0.0
    _seen_before: int = 0
    """Samples of the epoch that an earlier start has trained on."""
    _saved_at: float = 0.0
    _saved_step: int = 0

    def global_step(self, progress: Progress) -> int:
        """Steps done since the run began."""
        return progress.epoch * self.steps_per_epoch + progress.step

    # ---- what the loop tells

    def before_step(self, step: int) -> None:
        """Note the step for the heartbeat and, where somebody watches, the bar; let a planned fault happen."""
        self.watch.mark("train", step // self.steps_per_epoch, step)
        if self.writer is not None and self.writer.console.watched:
            self.writer.console.move(step / self.steps_per_epoch)
        if self.rehearsal is not None:
            self.rehearsal.reach(step)

    def stop_requested(self) -> bool:
        """True once this rank was asked to stop."""
        return stop_requested()

    def phase(self, name: str, progress: Progress) -> None:
        """Note that `train` or `evaluate` begins."""
        now = time.monotonic()
        self._training = name == "train"
        if self._training:
            self._epoch_began, self._seen_before = now, progress.train.count
        else:
            self._epoch_train_seconds = now - self._epoch_began
            self.train_seconds += self._epoch_train_seconds
        self.watch.mark(name, progress.epoch, self.global_step(progress))

    def epoch_done(self, progress: Progress, test: Tally) -> None:
        """Log the epoch's line."""
        if self.constancy is not None:
            self.refuse(self.constancy.breach())
        trained = progress.train.count - self._seen_before
        self.metrics = {
            "epoch": progress.epoch,
            "step": self.global_step(progress),
            **{f"train/{name}": mean for name, mean in progress.train.means.items()},
            **{f"test/{name}": mean for name, mean in test.means.items()},
            **self.learning_rates(),
            "train/samples_per_second": trained / max(self._epoch_train_seconds, 1e-9),
            "seconds": time.monotonic() - self._epoch_began,
        }
        if self.writer is not None:
            self.writer.metrics_file.log(self.metrics)
            self.writer.console.log(self.metrics)
            self.writer.follower.look()

    def save_due(self, steps_done: int) -> bool:
        """True when enough time or steps have passed; always False on ranks other than 0."""
        if (writer := self.writer) is None:
            return False
        every = writer.checkpoint_steps
        if every and steps_done // every > self._saved_step // every:
            return True
        return time.monotonic() - self._saved_at >= writer.checkpoint_seconds

    def save(self, progress: Progress) -> None:
        """Write a checkpoint; if that fails, warn and go on: the older ones are intact.

        None is written of an epoch that will be refused.
        """
        if self.writer is not None and self.constancy is not None and self.constancy.breach():
            return
        try:
            self.save_or_raise(progress)
        except OSError as error:
            warn(f"no checkpoint after step {self.global_step(progress)}: {error}; the older ones stay")
        self._saved_at, self._saved_step = time.monotonic(), self.global_step(progress)

    def save_or_raise(self, progress: Progress) -> None:
        """Write a checkpoint, after making every metrics line before it durable; raises `OSError`."""
        writer, step = self.writer, self.global_step(progress)
        if writer is None:
            return
        writer.metrics_file.flush()
        state = writer.snapshot() | {
            "epoch": progress.epoch,
            "step": progress.step,
            "global_step": step,
            "train": list(astuple(progress.train)),
            "metrics": self.metrics,
            "metrics_seal": writer.metrics_file.seal(),
            "train_seconds": self.train_seconds + self._training * (time.monotonic() - self._epoch_began),
        }
        writer.run_dir.checkpoints.save(state, step)
        self.checkpoint_step = step

    def describe_stop(self, progress: Progress) -> str:
        """The step at which the run has stopped and, where that could not be saved, the step of the last checkpoint."""
        step, saved = self.global_step(progress), self.checkpoint_step
        if self.writer is None or saved == step:
            return str(step)
        last = "there is no checkpoint" if saved is None else f"the last checkpoint is step {saved}"
        return f"{step}, not saved; {last}"

    # ---- from the beginning of a run to its end

    @contextmanager
    def running(self, progress: Progress, config_toml: str) -> Iterator[None]:
        """Keep the file `status` true while the body trains; a first checkpoint is written before it."""
        if (writer := self.writer) is None:
            yield
            return
        try:
            writer.run_dir.set_status("running")
            writer.run_dir.write("config.toml", config_toml)
            self.save(progress)
            writer.follower.start()
            yield
        except RunDirTakenError:
            raise
        except BaseException as error:
            try:
                if isinstance(error, HardwareError) and error.sound_step is not None:
                    writer.run_dir.checkpoints.delete_after(error.sound_step)
                writer.run_dir.set_status("stopped" if isinstance(error, StopRequestedError) else "failed")
            except (OSError, RunDirTakenError) as second:  # the first error is the one that ends the run
                warn(f"the status stays as it was: {second}")
            if isinstance(error, FileError):
                error.strerror = f"{error.strerror}; after a cure the same command goes on from the last checkpoint"
            raise

    def finish(self, progress: Progress, *, summary: dict[str, Any], draw: Callable[[], None]) -> None:
        """Write the last checkpoint, the model, the summary and, with `draw`, the pictures; then the status.

        Raises `FileError` if one of them cannot be written.
        """
        if (writer := self.writer) is None:
            return
        self.save_or_raise(progress)
        digest = writer.run_dir.write_model(writer.snapshot()["model"])
        summary = {**self.metrics, "weights_sha256": digest, **summary}
        writer.run_dir.write("summary.json", json.dumps(summary, indent=2) + "\n")
        writer.run_dir.check()
        draw()
        writer.run_dir.set_status("finished")
        writer.console.close()
        writer.follower.wait(FINISHED_SECONDS)

    def close(self) -> None:
        """Close the files and the copy at Weights & Biases, in bounded time; does nothing the second time."""
        if self.writer is not None:
            self.writer.metrics_file.close()
            self.writer.console.close()
            self.writer.follower.wait(UNFINISHED_SECONDS)
