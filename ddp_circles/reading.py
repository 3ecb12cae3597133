"""Files that somebody may have replaced or damaged: read within bounds, and never waited for."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from ddp_circles.errors import FileError


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of the regular file `path`, which has `limit` bytes at most; a pipe or a device is not waited for.

    Raises `FileNotFoundError` where there is none, and `FileError` for anything else that is wrong.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            what = "it is a folder" if stat.S_ISDIR(found.st_mode) else "it is a pipe, a device or a socket"
            raise FileError(errno.EINVAL, f"{what}, and not a file", str(path))
        if found.st_size > limit:
            raise FileError(errno.EFBIG, f"it has {found.st_size:,} bytes, more than {limit:,}", str(path))
        with open(path, "rb", opener=_open_at_once) as file:
            return file.read(found.st_size)
    except (FileError, FileNotFoundError):
        raise
    except OSError as error:
        raise FileError(error.errno, error.strerror, str(path)) from None


def read_text(path: Path, limit: int) -> str:
    """The text in the regular file `path`; raises as `read_bytes` does, also where it is not UTF-8."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError:
        raise FileError(errno.EILSEQ, "it is not UTF-8 text", str(path)) from None


def read_json(path: Path, limit: int) -> Any:
    """The value in the JSON file `path`; raises as `read_text` does, also where it is not JSON."""
    try:
        return json.loads(read_text(path, limit))
    except (ValueError, RecursionError):
        raise FileError(errno.EILSEQ, "it is not JSON", str(path)) from None


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
