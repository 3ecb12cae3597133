"""The run directory: one writer at a time, and files that are whole or absent. Only rank 0 writes here."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import socket
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, contiguous_format

from ddp_circles.errors import FileError, RunDirTakenError, UserError, naming
from ddp_circles.reading import LONGEST, read_text
from ddp_circles.records.checkpoint import Checkpoints
from ddp_circles.records.files import check_places, flush_names, how_to_clear, overwrite, sweep, write_atomically
from ddp_circles.terminal import visible

Status = Literal["running", "stopped", "finished", "failed"]
LOCK_WAIT_SECONDS = 20.0
"""Time that a start gives the processes of the one before to leave; more than they need after a kill."""


class RunDir:
    """The folder `path` and the files in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints", self.check)
        self.metrics = path / "metrics.jsonl"
        self.model = path / "model.safetensors"
        self._holder = path / ".lock.holder"
        self._mark = f"process {os.getpid()} on {visible(socket.gethostname())}\n{secrets.token_hex(16)}\n"
        """The text of `_holder` while this start holds the folder: no other start has the same."""

    def open(self, at_end: ExitStack) -> None:
        """Make the folder and take its lock, which `at_end` releases; remove the leftovers of killed writes.

        Raises `UserError` where it cannot be written, where it has a configuration file that no run wrote, or where
        another run still holds it after `LOCK_WAIT_SECONDS`.
        """
        try:
            check_places(self.path)
            foreign = self.path / "config.toml"
            if self.status is None and not self.checkpoints.files() and foreign.exists():
                raise UserError(f"--run-dir {self.path} would overwrite {foreign}, which is no run's: choose another")
            self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # a folder above may be unreadable
                for folder in (self.path, self.path.parent):
                    flush_names(folder)
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "no permission to write")
            self._lock(at_end)
            write_atomically(self._holder, self._mark.encode())  # a rename, which follows no link
            sweep(self.path)
            sweep(self.checkpoints.folder)
        except OSError as error:
            raise UserError(f"--run-dir {self.path} cannot be written: {error}") from None

    def _lock(self, at_end: ExitStack) -> None:
        """Take the lock; raises `UserError` if another run holds it after `LOCK_WAIT_SECONDS`."""
        lock = FileLock(self.path / ".lock")
        try:
            with warnings.catch_warnings(action="ignore"):  # about a file system without locks, as below
                at_end.enter_context(lock.acquire(timeout=LOCK_WAIT_SECONDS))
        except Timeout:
            holder = ""
            with contextlib.suppress(OSError):  # it may have just taken the lock, and not written its name yet
                holder = read_text(self._holder, LONGEST)
            advice = f"wait for it, or choose another{how_to_clear(lock)}"
            raise UserError(f"--run-dir {self.path} is in use by {_name_in(holder)}: {advice}") from None
        except OSError as error:
            raise FileError(error.errno, f"it cannot be locked: {error.strerror}", str(self.path / ".lock")) from None

    def check(self) -> None:
        """Raise `RunDirTakenError` if another folder is at `path` by now, or another start holds it.

        The lock cannot tell: this process keeps it on a file that was removed, while others lock a new one.
        """
        try:
            found = read_text(self._holder, LONGEST)
        except FileNotFoundError:
            found = ""
        except FileError as error:
            if error.errno != errno.ENOTDIR:
                raise
            found = ""
        if found != self._mark:
            how = f"taken by another run ({_name_in(found)})" if found else "removed"
            raise RunDirTakenError(f"--run-dir {self.path} was {how} while this run was training: it ends here")

    @property
    def status(self) -> str | None:
        """The word in the file `status`; None where there is none of a run's."""
        try:
            word = read_text(self.path / "status", LONGEST).strip()
        except FileNotFoundError:
            return None
        except FileError as error:
            if error.errno not in (errno.EFBIG, errno.EILSEQ):  # those are of other content
                raise
            return None
        return word if word in get_args(Status) else None

    def set_status(self, status: Status) -> None:
        """Write the state of the run, one word; over the old one where there is no space for a new file."""
        self.check()
        file, word = self.path / "status", f"{status}\n".encode()
        try:
            write_atomically(file, word)
        except FileError as error:
            try:
                overwrite(file, word)
            except OSError:  # the first error is the one to tell
                raise error from None

    def write(self, name: str, text: str) -> None:
        """Replace the file `name` by `text`."""
        self.check()
        write_atomically(self.path / name, text.encode())

    def write_model(self, state: dict[str, Any]) -> str:
        """Write the tensors of `state` as safetensors; returns the file's SHA-256."""
        content = model_bytes(state)
        self.check()
        write_atomically(self.model, content)
        return hashlib.sha256(content).hexdigest()

    def clear(self) -> None:
        """Delete what an earlier run left, so that a new one starts from nothing."""
        self.set_status("running")  # first, lest a finished run's word stays where its results are gone
        results = (self.metrics, self.model, self.path / "summary.json", self.path / "fault")
        for stale in (*self.checkpoints.files(), *results):
            with naming(stale):
                stale.unlink(missing_ok=True)


def model_bytes(state: dict[str, Any]) -> bytes:
    """The tensors of `state` as safetensors, the same bytes for the same bits; what else it holds is left out."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    # Copies, since tied weights are one tensor under two names, and safetensors takes each memory once.
    return safetensors_bytes(
        {name: value.detach().cpu().clone(memory_format=contiguous_format) for name, value in tensors.items()}
    )


def _name_in(holder: str) -> str:
    """The process and host in the text of a holder's file, if it is one."""
    named = re.match(r"process \d+ on \S+", holder)
    return visible(named[0]) if named else "another process"
