"""Files that are whole or absent: temporary file, flush, rename."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from filelock import BaseFileLock, SoftFileLock

from ddp_circles.errors import FileError, naming
from ddp_circles.reading import check_file

SUFFIX = ".partial"
FILES = (
    "status", "config.toml", "metrics.jsonl", "summary.json", "model.safetensors", "fault", ".lock", ".lock.holder",
    ".wandb.json", ".wandb.lock",
)  # fmt: skip
FOLDERS = ("checkpoints", "plots", "wandb")
NO_FOLDER_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
"""What file systems answer that cannot flush a folder; their renames are as durable as they get."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` when it is closed, so that a power cut leaves the old or the new.

    Where writing fails or is interrupted, `path` is untouched and no temporary file is left. Raises `FileError`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{SUFFIX}")
    with naming(path):
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
    """Make the names of the files in `folder` durable, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_FLUSH:
            raise
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, as `replacing` does; raises `FileError`."""
    with replacing(path) as file:
        file.write(content)


def overwrite(path: Path, content: bytes) -> None:
    """Write `content` over the bytes of the file `path`, which needs no space on a full disk; raises `OSError`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def matching(folder: Path, pattern: str) -> list[Path]:
    """The files in `folder`, if it exists, whose names match; unlike `Path.glob`, raises if it cannot be listed."""
    with naming(folder):
        return [path for path in folder.iterdir() if fnmatch(path.name, pattern)] if folder.exists() else []


def how_to_clear(lock: BaseFileLock) -> str:
    """Advice on a lock that nobody releases; empty where the system does it when the holder ends."""
    if not isinstance(lock, SoftFileLock):  # in place of the other, where the file system knows no locks
        return ""
    return f"; if it no longer runs, remove {lock.lock_file}, which nobody else does here"


def check_places(run_dir: Path) -> None:
    """Raise `FileError` if something else is where a file or a folder of a run should be."""
    for path in (run_dir / name for name in FOLDERS):
        with naming(path):
            if (path.exists() or path.is_symlink()) and not path.is_dir():
                raise FileError(errno.ENOTDIR, "it is not a folder", str(path))
    for path in (*(run_dir / name for name in FILES), *matching(run_dir / "plots", "*.png")):
        with naming(path):
            if path.exists() or path.is_symlink():
                check_file(path)


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed writes left in `folder`."""
    for leftover in matching(folder, f".*{SUFFIX}"):
        with naming(leftover):
            leftover.unlink(missing_ok=True)
