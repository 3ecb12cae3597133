"""Checkpoints: saved atomically, checked when loaded, the newest good one found."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddp_circles.plain import from_bytes, to_bytes
from ddp_circles.records.files import write_atomically
from ddp_circles.terminal import visible

DIGEST_BYTES = hashlib.sha256().digest_size
KEEP = 3

State = dict[str, Any]
"""Tensors and plain values: model, optimizer, progress, configuration, fingerprint, tracking id."""


def encode(state: State) -> bytes:
    """`state` as the bytes of a checkpoint file: a SHA-256 digest, then its plain values."""
    body = to_bytes(state)
    return hashlib.sha256(body).digest() + body


def decode(content: bytes) -> State:
    """The state in a checkpoint file's bytes; raises `ValueError` for damage and for other than plain values."""
    digest, body = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("its checksum does not match: it is cut short or damaged")
    state = from_bytes(body)
    if not isinstance(state, dict):
        raise ValueError("it is not a checkpoint of this package")  # noqa: TRY004 - damage, not a wrong call
    return state


class Checkpoints:
    """The last few checkpoints of a run, one file each, in `folder`."""

    def __init__(self, folder: Path, check: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self._check = check
        """Called before every change; raises where the folder is no longer this run's."""

    def files(self) -> list[Path]:
        """The checkpoint files, newest first."""
        return sorted(self.folder.glob("step-*.checkpoint"), reverse=True)

    def save(self, state: State, step: int) -> Path:
        """Write `state` after `step` global steps and drop the oldest files; an `OSError` leaves the others intact."""
        path = self.folder / f"step-{step:012d}.checkpoint"
        content = encode(state)
        self._check()
        write_atomically(path, content)
        self._check()
        for old in self.files()[KEEP:]:
            with contextlib.suppress(OSError):  # it harms nothing, and the next save tries again
                old.unlink()
        return path

    def load_newest(self) -> tuple[State, list[str]]:
        """The newest good checkpoint's state, empty where there is none, and a warning for each one passed over."""
        warnings: list[str] = []
        for path in self.files():
            try:
                return decode(path.read_bytes()), warnings
            except (OSError, ValueError) as error:
                warnings.append(visible(f"checkpoint {path} is passed over: {error}"))
        return {}, warnings
