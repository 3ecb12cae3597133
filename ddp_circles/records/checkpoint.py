"""Checkpoints: saved atomically, checked when loaded, the newest good one found."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddp_circles.plain import from_bytes, to_bytes
from ddp_circles.reading import opened
from ddp_circles.records.files import matching, write_atomically
from ddp_circles.terminal import visible

DIGEST_BYTES = hashlib.sha256().digest_size
HEAD_BYTES = DIGEST_BYTES + 8
"""Digest, and length of what follows: a file of another length need not be read."""
KEEP = 3
NAMED = 3
"""Checkpoints passed over that are named one by one."""
DAMAGED = "its checksum does not match: it is cut short or damaged"
VERSION = 4
"""Raise it when a field of `FORM` changes or means something else, or when the same settings come to other bits.

Checkpoints of other versions are refused.
"""
FORM: dict[str, Any] = {
    "model": {str: object},
    "optimizer": {str: object},
    "scheduler": {str: object},
    "settings": {str: object},
    "fingerprint": {str: str},
    "tracking_id": str,
    "starts": [str],
    "audits": int,
    "epoch": int,
    "step": int,
    "global_step": int,
    "train": ({str: int}, int),
    "metrics": {str: int | float},
    "metrics_seal": {"bytes": int, "sha256": str},
    "train_seconds": int | float,
}
"""The fields. A form is a type, a dictionary of forms by name or for any name (`str`), a list for all, or a tuple."""

State = dict[str, Any]
"""Tensors and plain values, as `FORM` says: model, optimizer, scheduler, progress, settings, fingerprint, id."""


class OtherVersionError(ValueError):
    """A checkpoint that another version of this package has written."""


def encode(state: State) -> bytes:
    """`state` as the bytes of a checkpoint file: a SHA-256 digest of the rest, the body's length, the body."""
    body = to_bytes({"version": VERSION} | state)
    rest = len(body).to_bytes(HEAD_BYTES - DIGEST_BYTES) + body
    return hashlib.sha256(rest).digest() + rest


def decode(content: bytes) -> State:
    """The state in a checkpoint file's bytes; raises `ValueError` for damage and for anything but a checkpoint."""
    if hashlib.sha256(content[DIGEST_BYTES:]).digest() != content[:DIGEST_BYTES]:
        raise ValueError(DAMAGED)
    state = from_bytes(content[HEAD_BYTES:])
    if not isinstance(state, dict):
        raise ValueError("it is not a checkpoint of this package")  # noqa: TRY004 - damage, not a wrong call
    if (version := state.pop("version", None)) != VERSION:
        raise OtherVersionError(f"another version of this package wrote it (its form is {version!r}, not {VERSION})")
    for name, form in FORM.items():
        if not _fits(state.get(name), form):
            raise ValueError(f"its field {name!r} is missing or malformed")
    return state


def load(path: Path) -> State:
    """The state in the file `path`; raises `OSError`, and `ValueError` as `decode` does."""
    with opened(path) as file:
        head = file.read(HEAD_BYTES)
        if os.fstat(file.fileno()).st_size != HEAD_BYTES + int.from_bytes(head[DIGEST_BYTES:]):
            raise ValueError(DAMAGED)
        return decode(head + file.read())


def _fits(value: Any, form: Any) -> bool:
    """True if `value` has the `form`, as in `FORM`."""
    if isinstance(form, tuple):
        return isinstance(value, list) and len(value) == len(form) and all(map(_fits, value, form))
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(item, form[0]) for item in value)
    if not isinstance(form, dict):
        return isinstance(value, form) and (form is object or not isinstance(value, bool))
    if not isinstance(value, dict):
        return False
    if str in form:
        return all(isinstance(name, str) and _fits(item, form[str]) for name, item in value.items())
    return all(_fits(value.get(name), item) for name, item in form.items())


class Checkpoints:
    """The last few checkpoints of a run, one file each, in `folder`."""

    def __init__(self, folder: Path, check: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self._check = check
        """Called before every change; raises where the folder is no longer this run's."""

    def files(self) -> list[Path]:
        """The checkpoint files, newest first."""
        return sorted(matching(self.folder, "step-*.checkpoint"), reverse=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:012d}.checkpoint"

    def save(self, state: State, step: int) -> Path:
        """Write `state` after `step` global steps and drop the oldest files; an `OSError` leaves the others intact."""
        path = self._path(step)
        content = encode(state)
        self._check()
        write_atomically(path, content)
        self._check()
        with contextlib.suppress(OSError):  # an old one harms nothing, and the next save tries again
            # Later ones were passed over when the run went on from an earlier one: they take no good one's place.
            for old in [other for other in self.files() if other <= path][KEEP:]:
                old.unlink()
        return path

    def delete_after(self, step: int) -> None:
        """Delete those that were written after more than `step` global steps."""
        self._check()
        for later in [other for other in self.files() if other > self._path(step)]:
            later.unlink()

    def load_newest(self) -> tuple[State, list[str]]:
        """The newest good checkpoint's state, empty where there is none, and a warning for each one passed over.

        None is good if the newest that is whole is of another version. Of many passed over, the first few are named.
        """
        passed: list[str] = []
        state: State = {}
        for path in self.files():
            try:
                state = load(path)
                break
            except (OSError, ValueError) as error:
                what = error.strerror if isinstance(error, OSError) else error
                passed.append(visible(f"checkpoint {path} is passed over: {what}"))
                if isinstance(error, OtherVersionError):
                    break
        more = len(passed) - NAMED
        return state, passed if more <= 0 else [*passed[:NAMED], f"so are {more:,} more checkpoints"]
