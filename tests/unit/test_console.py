"""Lines about epochs and the progress bar: the text of the contract, on and off a terminal."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ddp_circles.records.console import Console
from tests.harness.tracked import row

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


def program(epochs: int, seconds: float = 0.0) -> list[str]:
    return [sys.executable, "-m", "tests.harness.programs.console", str(epochs), str(seconds)]


def test_the_console_prints_the_line_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(every=10, total_epochs=25)
    for epoch in range(25):
        console.log({**row(epoch), "train/loss": 0.694608, "test/loss": 0.69301})
    console.close()
    console.close()
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"Epoch: {epoch} | Loss: 0.69461, Acc: 53.37% | Test loss: 0.69301, Test acc: 48.50%"
        for epoch in (0, 10, 20, 24)
    ]
    assert printed.err == ""


def test_metrics_follow_the_loss_and_there_may_be_no_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    own = {"train/MAE": 1e-9, "test/MAE": 1234.5}
    without = {name: value for name, value in row(0).items() if "accuracy" not in name}
    for figures in (row(0) | own, without | own, without):
        console = Console(every=1, total_epochs=1)
        console.log(figures)
        console.close()
    assert capsys.readouterr().out.splitlines() == [
        (
            "Epoch: 0 | Loss: 0.33333, Acc: 53.37%, MAE: 0.00000 | "
            "Test loss: 0.30000, Test acc: 48.50%, Test MAE: 1234.50000"
        ),
        "Epoch: 0 | Loss: 0.33333, MAE: 0.00000 | Test loss: 0.30000, Test MAE: 1234.50000",
        "Epoch: 0 | Loss: 0.33333 | Test loss: 0.30000",
    ]


def test_off_a_terminal_there_is_no_bar() -> None:
    done = subprocess.run(program(20), env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert len(done.stdout.splitlines()) == 3
    assert done.stderr == "warning: in between\n"


@pytest.mark.parametrize("lines_to", ["terminal", "file"])
def test_on_a_terminal_lines_and_bar_do_not_tear_each_other(tmp_path: Path, lines_to: str) -> None:
    mine, theirs = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "100"}
    with (tmp_path / "out").open("wb") as file:
        process = subprocess.Popen(
            program(60), stdout=theirs if lines_to == "terminal" else file, stderr=theirs, env=environment
        )
        os.close(theirs)
        screen = _screen(_read_all(mine))
        assert process.wait(60) == 0
    expected = [
        f"Epoch: {epoch} | Loss: {1 / (epoch + 3):.5f}, Acc: 53.37% | Test loss: 0.30000, Test acc: 48.50%"
        for epoch in (*range(0, 60, 10), 59)
    ]
    if lines_to == "file":
        assert (tmp_path / "out").read_text().splitlines() == expected
        assert screen == ["warning: in between"]
    else:
        assert screen == [*expected[:2], "warning: in between", *expected[2:]]


def test_the_bar_moves_within_an_epoch_and_then_shows_the_loss() -> None:
    mine, theirs = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen(program(2, 0.15), stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
    os.close(theirs)
    output = _read_all(mine)
    assert process.wait(60) == 0
    assert "\x1b[?25l" not in output, "the cursor is hidden, and would stay so after a kill"
    frames = [frame for frame in re.split(r"\r|\n", output) if "epoch" in frame]
    first = [frame for frame in frames if "0/2" in frame]
    assert len({re.sub(r"\d:\d\d:\d\d", "", frame) for frame in first}) >= 3, "the clock apart"
    assert not any("loss" in frame for frame in first)
    assert all(f"loss {1 / 3:.5f}" in frame for frame in frames if "1/2" in frame)
    assert any("1/2" in frame for frame in frames)


def _read_all(terminal: int) -> str:
    output = b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # how a terminal says that the other side is gone
            chunk = b""
        if not chunk:
            os.close(terminal)
            return output.decode()
        output += chunk


def _screen(output: str) -> list[str]:
    """The text a terminal shows in the end, of the few control sequences that a one-line bar needs."""
    lines, at = [""], 0
    for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if part == "\n":
            at += 1
            lines += [""] * (at == len(lines))
        elif part == "\x1b[1A":
            at -= 1
        elif part == "\x1b[2K":
            lines[at] = ""
        elif part == "\r" or part.startswith("\x1b"):
            pass  # each text stands on an emptied line, so only lines matter
        else:
            lines[at] += part
    return [line for line in lines if line]


def test_a_reader_that_left_does_not_end_the_training() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(program(60), env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: no more lines on standard output")
    assert len(done.stderr.splitlines()) == 2
