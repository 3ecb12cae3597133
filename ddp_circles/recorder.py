"""What a run leaves behind, written by rank 0 while it trains: metrics, checkpoints, status, the final files."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ddp_circles.checkpoint import Checkpoints, State
from ddp_circles.faults import Numbered
from ddp_circles.files import write_atomically
from ddp_circles.health import Watch, stop_requested
from ddp_circles.metrics import Progress, Tally
from ddp_circles.run_dir import RunDir, Status
from ddp_circles.tracking import Row, Trackers, warn

StepT = TypeVar("StepT", bound=Numbered)


@dataclass
class Written:
    """What only rank 0 has: where a run is written to, and how often."""

    run_dir: RunDir
    trackers: Trackers
    checkpoint_seconds: float
    checkpoint_steps: int
    snapshot: Callable[[], State]
    """The state of model and optimizer, and what identifies the run."""


class Recorder(Generic[StepT]):
    """The events around the loop on one rank. `written` is None on ranks other than 0: they keep time and stay silent.

    `wrap` acts around the steps on top of the heartbeats. `steps_per_epoch` turns progress into global steps.
    `train_seconds` and `metrics` (the last epoch's line) come from the run so far.
    """

    def __init__(
        self,
        *,
        watch: Watch,
        written: Written | None,
        wrap: Callable[[Iterator[StepT]], Iterator[StepT]],
        steps_per_epoch: int,
        train_seconds: float,
        metrics: Row,
    ) -> None:
        self._watch = watch
        self._written = written
        self._wrap = wrap
        self._steps_per_epoch = steps_per_epoch
        self.train_seconds = train_seconds
        self.metrics = metrics
        self._started = self._phase_started = self._saved_at = time.monotonic()
        self._saved_step = 0
        self._seen_before = 0
        self._epoch = 0
        self._training = False
        self._epoch_train_seconds = 0.0

    def global_step(self, progress: Progress) -> int:
        """Steps done since the run began."""
        return progress.epoch * self._steps_per_epoch + progress.step

    def wrap_steps(self, steps: Iterator[StepT]) -> Iterator[StepT]:
        """Leave a heartbeat before each step, and before what is to happen in it."""
        return self._wrap(self._marked(steps))

    def _marked(self, steps: Iterator[StepT]) -> Iterator[StepT]:
        for step in steps:
            self._watch.mark("train", self._epoch, step.number)
            yield step

    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return stop_requested()

    def phase(self, name: str, progress: Progress) -> None:
        """Note that `train` or `evaluate` begins."""
        now = time.monotonic()
        self._training = name == "train"
        if self._training:
            self._epoch, self._seen_before, self._started = progress.epoch, progress.train.count, now
        else:
            self._epoch_train_seconds = now - self._phase_started
            self.train_seconds += self._epoch_train_seconds
        self._phase_started = now
        self._watch.mark(name, progress.epoch, self.global_step(progress))

    def epoch_done(self, progress: Progress, test: Tally) -> None:
        """Log the epoch's line."""
        trained = progress.train.count - self._seen_before
        self.metrics = {
            "epoch": progress.epoch,
            "step": self.global_step(progress),
            "train/loss": progress.train.loss,
            "train/accuracy": progress.train.accuracy,
            "test/loss": test.loss,
            "test/accuracy": test.accuracy,
            "train/samples_per_second": trained / max(self._epoch_train_seconds, 1e-9),
            "seconds": time.monotonic() - self._started,
        }
        if self._written is not None:
            self._written.trackers.log(self.metrics)

    def save_due(self, steps_done: int) -> bool:
        """Whether enough time or steps have passed; only ever on rank 0."""
        written = self._written
        if written is None:
            return False
        every = written.checkpoint_steps
        if every and steps_done // every > self._saved_step // every:
            return True
        return time.monotonic() - self._saved_at >= written.checkpoint_seconds

    def save(self, progress: Progress) -> None:
        """Write a checkpoint; if that fails, warn and go on: the older ones are intact."""
        if self._written is None:
            return
        try:
            self.save_or_raise(progress)
        except OSError as error:
            warn(f"no checkpoint after step {self.global_step(progress)}: {error}; the older ones stay")
            self._saved_at, self._saved_step = time.monotonic(), self.global_step(progress)

    def save_or_raise(self, progress: Progress) -> None:
        """Write a checkpoint, after making durable every metrics line that it stands behind; raises `OSError`."""
        written, step = self._written, self.global_step(progress)
        if written is None:
            return
        written.trackers.flush()
        state = written.snapshot() | {
            "epoch": progress.epoch,
            "step": progress.step,
            "global_step": step,
            "train": list(astuple(progress.train)),
            "metrics": self.metrics,
            "train_seconds": self.train_seconds + self._training * (time.monotonic() - self._phase_started),
        }
        Checkpoints(written.run_dir.checkpoints).save(state, step)
        self._saved_at, self._saved_step = time.monotonic(), step

    def begin(self, progress: Progress, config_toml: str) -> None:
        """Say that the run is on; from the first moment there is a checkpoint to return to."""
        if self._written is None:
            return
        self._written.run_dir.set_status("running")
        self._written.run_dir.write_config(config_toml)
        self._saved_step = self.global_step(progress)
        self.save(progress)

    def set_status(self, status: Status) -> None:
        """Say in one word how the run is."""
        if self._written is not None:
            self._written.run_dir.set_status(status)

    def close(self) -> None:
        """End tracking, in bounded time."""
        if self._written is not None:
            self._written.trackers.close()

    def finish(
        self,
        progress: Progress,
        *,
        weights: dict[str, Tensor],
        summary: dict[str, Any],
        draw: Callable[[Path], list[Path]],
    ) -> None:
        """Write the last checkpoint, the model, the summary and the pictures (`draw`, given a folder); then the status.

        Raises `OSError` if one of them cannot be written.
        """
        if self._written is None:
            return
        run_dir = self._written.run_dir
        self.save_or_raise(progress)
        digest = write_model(run_dir.model, weights)
        summary = dict(self.metrics) | {"weights_sha256": digest} | summary
        run_dir.write_summary(summary)
        pictures = draw(run_dir.plots)
        run_dir.set_status("finished")
        self._written.trackers.finish(summary, [*pictures, run_dir.model])


def write_model(path: Path, state: dict[str, Tensor]) -> str:
    """Store `state` as safetensors, the same bytes for the same bits, and return the file's SHA-256."""
    # Copies, since tied weights are one tensor under two names, and safetensors takes each memory once.
    copies = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    content = safetensors_bytes(copies)
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()
