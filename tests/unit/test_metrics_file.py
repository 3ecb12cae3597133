"""The metrics file holds each epoch once, whatever kills, full disks and failing disks do to it."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from ddp_circles.records.metrics_file import MetricsFile, Row, read_rows
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
    assert [line.split()[2] for line in said[:3]] == ["1", "2", "4"]
    assert len(said) == 4
    assert "lacks the last epochs" in said[3]


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
