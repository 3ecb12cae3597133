"""Copies that must change nothing: between host and device, and through a file."""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddp_circles.verify.collectives import synchronize
from ddp_circles.verify.pattern import Difference, compare, write

COPY_BYTES = 4 * 2**20
FILE_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Copied:
    """A pattern that came back from a device; the seconds are those of both ways together."""

    bytes: int
    seconds: float
    difference: Difference | None


@dataclass(frozen=True)
class Stored:
    """A pattern that came back from a file, or the error that kept it from being written and read."""

    folder: str
    difference: Difference | None
    error: str = ""


def copy_there_and_back(device: torch.device, salt: int) -> Copied:
    """Copy a pattern to the device's memory and back, on CUDA from and to pinned memory."""
    sent, received = _host_memory(device), _host_memory(device)
    there = received.to(device, copy=True)
    write(sent, salt)
    synchronize(device)
    begun = time.perf_counter()
    _copy(sent, there, received)
    synchronize(device)
    return Copied(sent.nbytes, time.perf_counter() - begun, compare(received, salt))


def _host_memory(device: torch.device) -> Tensor:
    return torch.full((COPY_BYTES // 8,), -1, pin_memory=device.type == "cuda")


def _copy(sent: Tensor, there: Tensor, received: Tensor) -> None:
    there.copy_(sent, non_blocking=True)
    received.copy_(there, non_blocking=True)


def store_and_read(preferred: Path, salt: int) -> Stored:
    """Write a pattern to a file without a name, drop it from the page cache, and read it from the disk.

    The file is in the folder `preferred`, or with other temporary files where that cannot be written to.
    """
    usable = preferred.is_dir() and os.access(preferred, os.W_OK)
    folder = str(preferred.absolute()) if usable else tempfile.gettempdir()
    content = write(torch.empty(FILE_BYTES // 8, dtype=torch.int64), salt).numpy().tobytes()
    try:
        read = _through_file(folder, content)
    except OSError as error:
        return Stored(folder, None, error.strerror or str(error))
    words = torch.frombuffer(bytearray(read.ljust(FILE_BYTES, b"\0")), dtype=torch.int64)
    return Stored(folder, compare(words, salt))


def _through_file(folder: str, content: bytes) -> bytes:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        return file.read(len(content))
