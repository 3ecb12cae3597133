"""The metrics file: one line per epoch, each epoch once, whatever was killed and resumed in between."""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TypedDict

from ddp_circles.errors import RunDirTakenError, naming
from ddp_circles.reading import read_bytes
from ddp_circles.records.files import write_atomically
from ddp_circles.terminal import spell_numbers, visible, warn

LONGEST_METRICS = 2**30
"""Bytes of the longest file that is read: millions of epochs."""
Row = dict[str, float | int]
"""One epoch's line; its keys are those of metrics.jsonl."""


class Seal(TypedDict):
    """Length and digest of all lines up to a checkpoint, which keeps them: a later start compares the file."""

    bytes: int
    sha256: str


def figure_names(row: Mapping[str, float]) -> list[str]:
    """The figures that a row has of training and test: loss, accuracy where it means something, then the metrics."""
    names = [key.removeprefix("test/") for key in row if key.startswith("test/")]
    return sorted(names, key=lambda name: (name != "loss", name != "accuracy"))


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics file, each epoch once, without a torn last line; empty where there is no file."""
    return _rows_in(_content(path))


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path, LONGEST_METRICS)
    except FileNotFoundError:
        return b""


def _rows_in(content: bytes) -> list[Row]:
    whole_lines, _, _ = content.rpartition(b"\n")
    return list({row["epoch"]: row for row in parse_rows(whole_lines)}.values())


def parse_rows(lines: bytes) -> list[Row]:
    """The rows in whole `lines`; damaged ones are left out, since the others are good."""
    rows: list[Row] = []
    for line in lines.split(b"\n"):
        with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            row: Row = json.loads(line)
            row["epoch"], row["step"] = int(row["epoch"]), int(row["step"])
            rows.append(row)
    return rows


def _as_line(row: Row) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def _is_whole(content: bytes, seal: Seal, epochs: int) -> bool:
    """True if the file still begins with the sealed lines, and no later line claims to be of one of the `epochs`."""
    sealed, later = content[: seal["bytes"]], content[seal["bytes"] :]
    return sha256(sealed).hexdigest() == seal["sha256"] and all(row["epoch"] >= epochs for row in parse_rows(later))


class MetricsFile:
    """The metrics file: one JSON object per epoch, each epoch once.

    Opening it drops the lines of epochs from `keep_below_epoch` on, which the run will log again; raises `FileError`. A
    line that cannot be written, for instance on a full disk, is a warning, and is written together with the next one.
    `seal`: that of the checkpoint to continue from, if it has one; lines that were lost or changed since are a warning.
    `last`: the checkpoint's last line, whose keys all lines should have. `check`: called before every change; raises
    where the folder is no longer this run's.
    """

    def __init__(
        self,
        path: Path,
        keep_below_epoch: int,
        *,
        seal: Seal | None = None,
        last: Row | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = path
        self._check = check
        content = _content(path)
        rows = [row for row in _rows_in(content) if row["epoch"] < keep_below_epoch]
        if seal is None:
            kept = b"".join(map(_as_line, rows))
        elif _is_whole(content, seal, keep_below_epoch):
            kept = content[: seal["bytes"]]
        else:
            kept = self._mend(rows, keep_below_epoch, last or {})
        with naming(path):
            if path.is_symlink() or not path.is_file() or content != kept:
                write_atomically(path, kept)
            self._file = open(path, "r+b", buffering=0, opener=_open_no_link)  # noqa: SIM115
        self._durable = len(kept)
        self._digest = sha256(kept)
        """SHA-256 of the durable lines and those in `_tail`."""
        self._tail = bytearray()
        """Whole lines that belong behind the durable bytes; the first `_written` bytes of them are in the file."""
        self._written = 0
        self._behind = False
        """True while the file lacks lines that were to be written."""

    def log(self, row: Row) -> None:
        """Append one line in a single write; of several in a row that cannot be written, the first is a warning."""
        line = _as_line(row)
        self._tail += line
        self._digest.update(line)
        try:
            self._check()
            self._write()
        except OSError as error:
            if not self._behind:
                warn(f"epoch {row['epoch']} is not in {self.path} yet: {error.strerror}; it will be tried again")
            self._behind = True

    def flush(self) -> None:
        """Put every line logged so far on the disk; raises `FileError` if one of them cannot be."""
        self._check()
        try:
            with naming(self.path):
                self._write()
                os.fsync(self._file.fileno())
            self._durable += len(self._tail)
            self._tail.clear()
        finally:
            self._written = 0  # after a failed fsync nobody knows which bytes were kept: all are written again

    def seal(self) -> Seal:
        """The seal of every line logged so far."""
        return {"bytes": self._durable + len(self._tail), "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Flush as far as possible and close the file; does nothing the second time."""
        if self._file.closed:
            return
        try:
            with self._file:
                self.flush()
        except OSError as error:
            if not self._behind:  # else it was said
                warn(f"{self.path} lacks the last epochs: {error.strerror}")
        except RunDirTakenError:
            pass  # the lines are not for the run that has it now

    def _mend(self, rows: list[Row], epochs: int, last: Row) -> bytes:
        """Say what is lost of the first `epochs` lines; returns those of `rows` that the run can go on with."""
        good = {
            row["epoch"]: _as_line(row)
            for row in rows
            if row["epoch"] >= 0
            and row.keys() == last.keys()
            and all(isinstance(one, (int, float)) for one in row.values())
        }
        lost = [epoch for epoch in range(epochs) if epoch not in good]
        what = (
            f"it lacks epochs ({spell_numbers(lost)}), and other lines may be changed"
            if lost
            else "a line was changed or repeated"
        )
        warn(f"{visible(str(self.path))} is not as the run left it: {what}. The run goes on with what is there")
        return b"".join(good[epoch] for epoch in sorted(good))

    def _write(self) -> None:
        start = self._durable + self._written
        missing = self._tail[self._written :]
        if missing and os.pwrite(self._file.fileno(), missing, start) < len(missing):
            self._file.truncate(start)
            raise OSError(errno.ENOSPC, "no space left for a whole line")
        self._written, self._behind = len(self._tail), False
