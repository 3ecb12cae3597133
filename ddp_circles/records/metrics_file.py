"""The metrics file: one line per epoch, each epoch once, whatever was killed and resumed in between."""

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

from ddp_circles.records.files import write_atomically
from ddp_circles.terminal import warn

Row = dict[str, float | int]
"""One epoch's line; its keys are those of metrics.jsonl."""


def figure_names(row: Mapping[str, float]) -> list[str]:
    """The figures that a row has of training and test: loss, accuracy where it means something, then the metrics."""
    names = [key.removeprefix("test/") for key in row if key.startswith("test/")]
    return sorted(names, key=lambda name: (name != "loss", name != "accuracy"))


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics file, each epoch once, without a torn last line; empty where there is no file."""
    whole_lines, _, _ = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
    return list({row["epoch"]: row for row in parse_rows(whole_lines)}.values())


def parse_rows(lines: bytes) -> list[Row]:
    """The rows in whole `lines`; damaged ones are left out, since the others are good."""
    rows: list[Row] = []
    for line in lines.split(b"\n"):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row: Row = json.loads(line)
            row["epoch"], row["step"] = int(row["epoch"]), int(row["step"])
            rows.append(row)
    return rows


def _as_line(row: Row) -> bytes:
    return json.dumps(row).encode() + b"\n"


class MetricsFile:
    """The metrics file: one JSON object per epoch, each epoch once.

    Opening it drops the lines of epochs from `keep_below_epoch` on, which the run will log again; raises `OSError`. A
    line that cannot be written, for instance on a full disk, is a warning, and is written together with the next one.
    """

    def __init__(self, path: Path, keep_below_epoch: int) -> None:
        self.path = path
        kept = b"".join(_as_line(row) for row in read_rows(path) if row["epoch"] < keep_below_epoch)
        if not path.exists() or path.read_bytes() != kept:
            write_atomically(path, kept)
        self._file = path.open("r+b", buffering=0)
        self._durable = len(kept)
        self._tail = bytearray()
        """Whole lines that belong behind the durable bytes; the first `_written` bytes of them are in the file."""
        self._written = 0

    def log(self, row: Row) -> None:
        """Append one line in a single write."""
        self._tail += _as_line(row)
        try:
            self._write()
        except OSError as error:
            warn(f"epoch {row['epoch']} is not in {self.path} yet: {error.strerror}; it will be tried again")

    def flush(self) -> None:
        """Put every line logged so far on the disk; raises `OSError` if one of them cannot be."""
        try:
            self._write()
            os.fsync(self._file.fileno())
            self._durable += len(self._tail)
            self._tail.clear()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        finally:
            self._written = 0  # after a failed fsync nobody knows which bytes were kept: all are written again

    def close(self) -> None:
        """Flush as far as possible and close the file; does nothing the second time."""
        if self._file.closed:
            return
        try:
            self.flush()
        except OSError as error:
            warn(f"{self.path} lacks the last epochs: {error.strerror}")
        self._file.close()

    def _write(self) -> None:
        start = self._durable + self._written
        missing = self._tail[self._written :]
        if missing and os.pwrite(self._file.fileno(), missing, start) < len(missing):
            self._file.truncate(start)
            raise OSError(errno.ENOSPC, "no space left for a whole line")
        self._written = len(self._tail)
