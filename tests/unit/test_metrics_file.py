"""The metrics file holds each epoch once, whatever kills, full disks and failing disks do to it."""

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from ddp_circles.records import metrics_file
from ddp_circles.records.metrics_file import MetricsFile, Row, Seal, read_rows
from tests.harness.tracked import row


def rows(*epochs: int) -> list[Row]:
    return [row(epoch) for epoch in epochs]


def test_a_line_holds_the_figures_to_the_last_digit(tmp_path: Path) -> None:
    lines = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for epoch in range(3):
        lines.log(row(epoch))
    lines.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == rows(0, 1, 2)
    assert read_rows(tmp_path / "metrics.jsonl") == rows(0, 1, 2)
    assert read_rows(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("keep_below_epoch", [0, 1, 2, 3, 9])
def test_wherever_a_kill_cuts_the_file_each_epoch_is_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_below_epoch: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    path = tmp_path / "metrics.jsonl"
    written = [json.dumps(row(epoch)).encode() + b"\n" for epoch in range(3)]
    whole, ends = b"".join(written), list(accumulate(map(len, written)))
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = min(sum(cut >= end for end in ends), keep_below_epoch)
        lines = MetricsFile(path, keep_below_epoch)
        assert read_rows(path) == rows(*range(kept))
        for epoch in range(kept, 4):
            lines.log(row(epoch))
        lines.close()
        assert read_rows(path) == rows(0, 1, 2, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_damage_in_the_middle_costs_its_own_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps(row(epoch)) for epoch in range(2)]
    path.write_text(f"{good[0]}\n\0\0\0\n[1]\n{{}}\n7\n{good[1]}\n{good[1]}\n")
    MetricsFile(path, 5).close()
    assert path.read_text() == f"{good[0]}\n{good[1]}\n"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_one_write_for_a_line_and_a_sync_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = MetricsFile(tmp_path / "metrics.jsonl", 0)
    calls: list[str] = []

    def counted(name: str) -> None:
        original = getattr(os, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(os, name, call)

    counted("pwrite")
    counted("fsync")
    lines.log(row(0))
    lines.log(row(1))
    lines.flush()
    assert calls == ["pwrite", "pwrite", "fsync"]
    lines.close()
    lines.close()
    assert read_rows(tmp_path / "metrics.jsonl") == rows(0, 1)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as on a full disk."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def test_a_full_disk_costs_warnings_and_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = MetricsFile(path, 0)
    lines.log(row(0))
    lines.flush()
    with room_for(path.stat().st_size + 100):
        lines.log(row(1))
        lines.log(row(2))
        assert path.read_bytes().endswith(b"}\n")
        assert read_rows(path) == rows(0)
        with pytest.raises(OSError, match=str(path)):
            lines.flush()
    lines.log(row(3))
    lines.flush()
    assert read_rows(path) == rows(0, 1, 2, 3)
    with room_for(path.stat().st_size):
        lines.log(row(4))
        lines.close()
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in said] == ["1", "4"]  # once for each time that the disk is full


def test_lines_that_a_failed_sync_lost_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = MetricsFile(path, 0)
    lines.log(row(0))
    lines.flush()
    durable = path.read_bytes()
    lines.log(row(1))

    def fail(_: int) -> None:
        path.write_bytes(durable)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            lines.flush()
    assert read_rows(path) == rows(0)
    lines.log(row(2))
    lines.close()
    assert read_rows(path) == rows(0, 1, 2)


# ---- lost and changed lines


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was warned about; nothing is flushed to the disk meanwhile."""
    said: list[str] = []
    monkeypatch.setattr(metrics_file, "warn", said.append)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return said


def sealed(path: Path, epochs: int) -> tuple[bytes, Seal]:
    """Log `epochs` epochs; returns the file's bytes and the seal that a checkpoint would keep."""
    lines = MetricsFile(path, 0)
    for epoch in range(epochs):
        lines.log(row(epoch))
    lines.flush()
    seal = lines.seal()
    lines.close()
    return path.read_bytes(), seal


@pytest.mark.parametrize("later", [b"", b'{"epoch": 3, "st', b"\0\0\0\n", json.dumps(row(3)).encode() + b"\n"])
def test_whole_files_are_kept_byte_for_byte_and_without_a_word(
    tmp_path: Path, warnings: list[str], later: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    content, seal = sealed(path, 3)
    path.write_bytes(content + later)
    lines = MetricsFile(path, 3, seal=seal, last=row(2))
    assert (path.read_bytes(), lines.seal()) == (content, seal)
    lines.log(row(3))
    lines.close()
    assert read_rows(path) == rows(0, 1, 2, 3)
    MetricsFile(path, 4, seal=lines.seal(), last=row(3)).close()
    assert warnings == []


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.long)])
def test_any_flipped_bit_is_said_once(tmp_path: Path, warnings: list[str], stride: int) -> None:
    path = tmp_path / "metrics.jsonl"
    content, seal = sealed(path, 3)
    for bit in range(0, 8 * len(content), stride):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        lines = MetricsFile(path, 3, seal=seal, last=row(2))
        lines.close()
        assert len(warnings) == 1, f"bit {bit}: {warnings}"
        assert warnings.pop().startswith(f"{path} is not as the run left it: ")
        kept = read_rows(path)
        assert [one["epoch"] for one in kept] == sorted({one["epoch"] for one in kept} & {0, 1, 2})
        assert all(one.keys() == row(0).keys() for one in kept)
        MetricsFile(path, 3, seal=lines.seal(), last=row(2)).close()
        assert warnings == []


def without_keys(line: bytes) -> bytes:
    return json.dumps({name: value for name, value in json.loads(line).items() if name in ("epoch", "step")}).encode()


@pytest.mark.parametrize(
    "damage, named, left",
    [
        (lambda lines: [lines[0], without_keys(lines[1]), lines[2]], "lacks epochs (1)", (0, 2)),
        (lambda lines: [lines[0], lines[0], *lines[1:]], "changed or repeated", (0, 1, 2)),
        (lambda lines: [*lines, lines[1]], "changed or repeated", (0, 1, 2)),
        (lambda lines: [lines[1], lines[0], lines[2]], "changed or repeated", (0, 1, 2)),
        (lambda lines: [line.replace(b"0.485", b"0.486") for line in lines], "changed or repeated", (0, 1, 2)),
        (lambda lines: [line.replace(b"0.485", b'"0.485"') for line in lines], "lacks epochs (0-2)", ()),
        (lambda lines: [line.replace(b'"epoch": 1', b'"epoch": 1e999') for line in lines], "lacks epochs (1)", (0, 2)),
        (lambda lines: [b"[" * 10**5, *lines[1:]], "lacks epochs (0)", (1, 2)),
        (lambda lines: lines[:1], "lacks epochs (1-2)", (0,)),
        (lambda lines: [], "lacks epochs (0-2)", ()),
    ],
)
def test_damage_is_said_and_the_rest_kept(
    tmp_path: Path,
    warnings: list[str],
    damage: Callable[[list[bytes]], list[bytes]],
    named: str,
    left: tuple[int, ...],
) -> None:
    path = tmp_path / "metrics.jsonl"
    content, seal = sealed(path, 3)
    path.write_bytes(b"".join(line + b"\n" for line in damage(content.splitlines())))
    MetricsFile(path, 3, seal=seal, last=row(2)).close()
    (said,) = warnings
    assert named in said
    assert tuple(one["epoch"] for one in read_rows(path)) == left


@pytest.mark.parametrize("instead", ["nothing", "a link", "a link to nowhere"])
def test_the_file_is_replaced_and_never_written_through(tmp_path: Path, warnings: list[str], instead: str) -> None:
    path, elsewhere = tmp_path / "metrics.jsonl", tmp_path / "elsewhere"
    elsewhere.write_bytes(b"")
    if instead != "nothing":
        path.symlink_to(elsewhere if instead == "a link" else tmp_path / "nowhere")
    lines = MetricsFile(path, 0)
    lines.log(row(0))
    lines.close()
    assert path.is_file()
    assert not path.is_symlink()
    assert read_rows(path) == rows(0)
    assert elsewhere.read_bytes() == b""
    assert not (tmp_path / "nowhere").exists()


def test_a_seal_costs_the_same_however_long_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for epoch in range(3):
        lines.log(row(epoch))
    lines.flush()
    monkeypatch.setattr(metrics_file, "sha256", None)
    monkeypatch.setattr(Path, "read_bytes", None)
    assert lines.seal()["bytes"] == (tmp_path / "metrics.jsonl").stat().st_size
    lines.close()
