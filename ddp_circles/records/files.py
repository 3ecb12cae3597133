"""Files that are whole or absent: temporary file, flush, rename."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".partial"
SHORT = 4096
"""Bytes that `read_short` reads at most."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` when it is closed, so that a power cut leaves the old or the new.

    Where writing fails or is interrupted, `path` is untouched and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{SUFFIX}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise
    flush_names(path.parent)


def flush_names(folder: Path) -> None:
    """Make the names of the files in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, as `replacing` does; raises `OSError`."""
    with replacing(path) as file:
        file.write(content)


def read_short(path: Path) -> str:
    """The beginning of the text file `path`; raises `OSError`, also for a link. Never waits for a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return os.read(descriptor, SHORT).decode(errors="replace")
    finally:
        os.close(descriptor)


def matching(folder: Path, pattern: str) -> list[Path]:
    """The files in `folder`, if it exists, whose names match; unlike `Path.glob`, raises if it cannot be listed."""
    return [path for path in folder.iterdir() if fnmatch(path.name, pattern)] if folder.exists() else []


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed writes left in `folder`."""
    for leftover in matching(folder, f".*{SUFFIX}"):
        leftover.unlink(missing_ok=True)
