"""Files that somebody may have replaced or damaged: read within bounds, and never waited for."""

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ddp_circles.errors import FileError, naming

LONGEST = 2**20
"""Bytes of the longest file with a word or with some settings in it."""


@contextmanager
def opened(path: Path, limit: float = math.inf) -> Iterator[BinaryIO]:
    """Open the regular file `path`, of at most `limit` bytes, to read; a pipe or a device is not waited for.

    Raises `FileNotFoundError` where there is none, and `FileError` for anything else that is wrong.
    """
    with naming(path, FileNotFoundError):
        check_file(path)
        with open(path, "rb", opener=_open_at_once) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise FileError(errno.EFBIG, f"it has {size:,} bytes, more than {limit:,}", str(path))
            yield file


def check_file(path: Path) -> None:
    """Raise an `OSError` if `path` is something else than a regular file, or a link to one."""
    kind = path.stat().st_mode
    if not stat.S_ISREG(kind):
        what = "a folder" if stat.S_ISDIR(kind) else "a pipe, a device or a socket"
        raise FileError(errno.EINVAL, f"it is {what}, and not a file", str(path))


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of the regular file `path`, which has `limit` bytes at most; raises as `opened` does."""
    with opened(path, limit) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def read_text(path: Path, limit: int) -> str:
    """The text in the regular file `path`; raises as `read_bytes` does, also where it is not UTF-8."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError:
        raise FileError(errno.EILSEQ, "it is not UTF-8 text", str(path)) from None


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The object in the JSON file `path`; raises as `read_text` does, also where there is something else."""
    try:
        value = json.loads(read_text(path, limit))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise FileError(errno.EILSEQ, "it is not a JSON object", str(path))
    return value


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
