"""The run directory: one writer at a time, and files that are whole or absent. Only rank 0 writes here."""

import contextlib
import hashlib
import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, contiguous_format

from ddp_circles.errors import UserError
from ddp_circles.records.checkpoint import Checkpoints
from ddp_circles.records.files import sweep, write_atomically

Status = Literal["running", "stopped", "finished", "failed"]
LOCK_WAIT_SECONDS = 20.0
"""Time that a start gives the processes of the one before to leave; more than they need after a kill."""


class RunDir:
    """The folder `path` and the files in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")
        self.metrics = path / "metrics.jsonl"
        self.model = path / "model.safetensors"

    def open(self, at_end: ExitStack) -> None:
        """Make the folder and take its lock, which `at_end` releases; remove the leftovers of killed writes.

        Raises `UserError` where it cannot be written, where it has a configuration file that no run wrote, or where
        another run still holds it after `LOCK_WAIT_SECONDS`.
        """
        holder = self.path / ".lock.holder"
        try:
            if self.status is None and (foreign := self.path / "config.toml").exists():
                raise UserError(f"--run-dir {self.path} would overwrite {foreign}, which is no run's: choose another")
            self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise PermissionError("no permission to write")
            at_end.enter_context(FileLock(self.path / ".lock").acquire(timeout=LOCK_WAIT_SECONDS))
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            sweep(self.path)
            sweep(self.checkpoints.folder)
        except Timeout:
            name = "another process"
            with contextlib.suppress(OSError):  # it may have just taken the lock, and not written its name yet
                name = holder.read_text()
            raise UserError(f"--run-dir {self.path} is in use by {name}: wait for it, or choose another") from None
        except OSError as error:
            raise UserError(f"--run-dir {self.path} cannot be written: {error}") from None

    @property
    def status(self) -> str | None:
        """The word in the file `status`; None where there is none."""
        file = self.path / "status"
        return file.read_text().strip() if file.exists() else None

    def set_status(self, status: Status) -> None:
        """Write the state of the run, one word."""
        self.write("status", f"{status}\n")

    def write(self, name: str, text: str) -> None:
        """Replace the file `name` by `text`."""
        write_atomically(self.path / name, text.encode())

    def write_model(self, state: dict[str, Tensor]) -> str:
        """Write `state` as safetensors, the same bytes for the same bits; returns the file's SHA-256."""
        # Copies, since tied weights are one tensor under two names, and safetensors takes each memory once.
        copies = {name: value.detach().cpu().clone(memory_format=contiguous_format) for name, value in state.items()}
        content = safetensors_bytes(copies)
        write_atomically(self.model, content)
        return hashlib.sha256(content).hexdigest()

    def clear(self) -> None:
        """Delete what an earlier run left, so that a new one starts from nothing."""
        for checkpoint in sorted(self.checkpoints.folder.iterdir(), reverse=True):
            checkpoint.unlink()
        for stale in (self.metrics, self.model, self.path / "summary.json", self.path / "fault"):
            stale.unlink(missing_ok=True)
