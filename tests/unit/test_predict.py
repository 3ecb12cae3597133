"""Prediction from the command line: right figures, any file, no half results, and clear words for what is wrong."""

import contextlib
import csv
import math
import os
import pty
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import load, save_file
from sklearn import datasets
from sklearn.model_selection import train_test_split
from torch import nn

from ddp_circles import inference, memory, predict
from ddp_circles.config import Config, recipe
from ddp_circles.errors import UserError
from ddp_circles.models import Classifier, class_count
from tests.harness.ranks import Job, run_ranks

BINARY = ["logit", "probability", "label"]
FOUR = [*(f"logit_{k}" for k in range(4)), *(f"probability_{k}" for k in range(4)), "label"]
Array = np.ndarray[Any, Any]


def write_run(folder: Path, config: Config) -> Path:
    """A finished run of `config`, as far as prediction looks at it, with spread-out weights."""
    folder.mkdir()
    (folder / "config.toml").write_text(config.to_toml())
    torch.manual_seed(config.seed)
    model = Classifier(2, config.hidden, config.activation, class_count(config.dataset))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module", params=["model_0", "model_3", "model_4"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / str(request.param), recipe(request.param))


@pytest.fixture(scope="module")
def binary_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "binary", recipe("model_3"))


def names_of(run: Path) -> list[str]:
    return FOUR if run.name == "model_4" else BINARY


def oracle(run: Path, points: Array) -> tuple[Array, Array]:
    """Logits and probabilities, each [n, figures], from the weights alone, in float64."""
    weights = load_file(run / "model.safetensors")
    relu = 'activation = "relu"' in (run / "config.toml").read_text()
    values = points.astype(np.float64)
    layers = sorted({int(name.split(".")[1]) for name in weights})
    for layer in layers:
        values = values @ weights[f"layers.{layer}.weight"].T.astype(np.float64) + weights[f"layers.{layer}.bias"]
        if relu and layer != layers[-1]:
            values = np.maximum(values, 0)
    if values.shape[1] == 1:
        return values, 1 / (1 + np.exp(-values))
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return values, powers / powers.sum(axis=1, keepdims=True)


def check(run: Path, points: Array, said: Array) -> None:
    """`said`: logits, probabilities and label of each of `points`; [n, columns]."""
    logits, probabilities = oracle(run, points)
    width = logits.shape[1]
    assert said.shape == (len(points), 2 * width + 1)
    said_logits, said_probabilities, labels = said[:, :width], said[:, width:-1], said[:, -1]
    assert said_logits == pytest.approx(logits, rel=1e-4, abs=1e-5)
    assert said_probabilities == pytest.approx(probabilities, rel=1e-4, abs=1e-6)
    if width == 1:
        assert np.array_equal(labels, np.rint(said_probabilities[:, 0]))
        clear = np.abs(logits[:, 0]) > 1e-4
        assert np.array_equal(labels[clear], np.rint(1 / (1 + np.exp(-said_logits[clear, 0]))))
    else:
        assert np.array_equal(labels, said_probabilities.argmax(axis=1))
        assert said_probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)


def parse_table(text: str) -> tuple[list[str], Array]:
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    return lines[0].split(), np.array([[float(cell) for cell in line.split()] for line in lines[1:]])


def ask(*arguments: object) -> int:
    return predict.run([str(argument) for argument in arguments])


def predict_file(run: Path, text: str | bytes, tmp_path: Path, **options: Any) -> list[list[str]]:
    """The rows of the result for a file with `text`, the header among them."""
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    count = inference.predict_csv(inference.load_model(run)[1], source, target, **options)
    with target.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    assert len(rows) == count + 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["in.csv", "out.csv"]
    return rows


# --points and --show


def test_points_are_predicted_as_from_the_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [(-0.5, 0.3), (0.1, 0.2), (-1e-3, -0.25), (0.7, -3.0), (0.0, 0.0)]
    assert ask(run, "--points", *(f"{x},{y}" for x, y in points)) == 0
    names, values = parse_table(capsys.readouterr().out)
    assert names == ["x1", "x2", *names_of(run)]
    assert np.array_equal(values[:, :2].astype(np.float32), np.array(points, dtype=np.float32))
    check(run, np.array(points), values[:, 2:])


@pytest.mark.parametrize(
    "arguments", [["--points", "-0.5,0.3"], ["--points=-0.5,0.3"], ["--points", "-.5,.3"], ["--points", "-5e-1, +0.3"]]
)
def test_a_point_may_begin_with_a_minus(
    binary_run: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(binary_run, *arguments) == 0
    names, values = parse_table(capsys.readouterr().out)
    assert names == ["x1", "x2", *BINARY]
    assert values[0, :2].astype(np.float32).tolist() == np.array([-0.5, 0.3], dtype=np.float32).tolist()


def test_many_points_may_begin_with_a_minus(
    binary_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")  # the table does not care for the width of the terminal
    assert ask(binary_run, "--points", "0.1,0.2", "-0.5,0.3", "-1,-2") == 0
    names, values = parse_table(capsys.readouterr().out)
    assert names == ["x1", "x2", *BINARY]
    assert values[:, :2].tolist() == [[0.1, 0.2], [-0.5, 0.3], [-1, -2]]


def test_show_gives_the_first_test_points_and_their_truth(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if run.name == "model_4":
        points, classes = datasets.make_blobs(1000, n_features=2, centers=4, cluster_std=1.5, random_state=42)
    else:
        points, classes = datasets.make_circles(1000, noise=0.03, factor=0.8, random_state=42)
    _, test_points, _, truth = train_test_split(points, classes, test_size=0.2, random_state=42)
    for count in (1, 5, 200):
        assert ask(run, "--show", count) == 0
        names, values = parse_table(capsys.readouterr().out)
        assert names == ["x1", "x2", *names_of(run), "truth"]
        assert np.array_equal(values[:, :2].astype(np.float32), test_points[:count].astype(np.float32))
        assert np.array_equal(values[:, -1], truth[:count])
        check(run, test_points[:count].astype(np.float32), values[:, 2:-1])


@given(st.lists(st.tuples(*[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 2), min_size=1))
def test_points_are_read_exactly(points: list[tuple[float, float]]) -> None:
    read = inference.parse_points([f"{x!r},{y!r}" for x, y in points])
    assert read.dtype == torch.float32
    assert read.tolist() == [list(point) for point in points]


@pytest.mark.parametrize("text", ["1", "1,2,3", "", ",", "a,1", "1,b", "nan,1", "1,inf", "1e39,0", "1_0,2", "1;2"])
def test_a_bad_point_is_named(binary_run: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(binary_run, "--points", "0,0", text) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: --points {text!r} is not X1,X2: ")
    assert err.count("\n") == 1


def test_a_point_whose_logits_overflow_is_named(binary_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(binary_run, "--points", "0,0", "3e38,-3e38") == 2
    assert capsys.readouterr().err == "error: point 2 is so far out that its logits are not finite\n"


# --csv


@pytest.mark.parametrize("block_rows", [1, 7, 100, inference.BLOCK_ROWS])
def test_a_file_is_predicted_as_from_the_weights(run: Path, tmp_path: Path, block_rows: int) -> None:
    generator = random.Random(0)
    texts = [[f"{generator.gauss(0, 3):.{digits}g}" for digits in (5, 17)] for _ in range(300)]
    content = "a,b\n" + "".join(f"{x},{y}\n" for x, y in texts)
    header, *rows = predict_file(run, content, tmp_path, block_rows=block_rows)
    assert header == ["a", "b", *names_of(run)]
    assert [row[:2] for row in rows] == texts
    assert {row[-1] for row in rows} <= set("0123")
    check(run, np.array(texts, dtype=np.float32), np.array([row[2:] for row in rows], dtype=np.float64))


def test_figures_read_back_as_the_same_float32(run: Path, tmp_path: Path) -> None:
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    content = "".join(f"{x!r},{y!r}\n" for x, y in points.tolist())
    rows = predict_file(run, content, tmp_path)[1:]
    logits, probabilities, labels = inference.predict(inference.load_model(run)[1], points)
    expected = torch.cat([part.reshape(500, -1).to(torch.float32) for part in (logits, probabilities, labels)], dim=1)
    assert np.array_equal(np.array([row[2:] for row in rows], dtype=np.float32), expected.numpy())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    points=st.lists(st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 2), max_size=40),
    block_rows=st.integers(1, 40),
    header=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    last_end=st.booleans(),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_any_file_gives_the_same_at_any_block_size(
    binary_run: Path,
    tmp_path: Path,
    points: list[tuple[float, float]],
    block_rows: int,
    header: bool,
    end: str,
    last_end: bool,
    quoting: int,
) -> None:
    source = tmp_path / "written.csv"
    with source.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator=end, quoting=quoting)  # type: ignore[arg-type]
        writer.writerows([["east", "north"]] if header or not points else [])
        writer.writerows([[repr(x), repr(y)] for x, y in points])
    content = source.read_bytes()
    source.unlink()
    content = content if last_end else content.removesuffix(end.encode())
    whole = predict_file(binary_run, content, tmp_path)
    pieces = predict_file(binary_run, content, tmp_path, block_rows=block_rows)
    assert whole[0] == pieces[0] == [*(["east", "north"] if header or not points else ["x1", "x2"]), *BINARY]
    assert [row[:2] for row in whole] == [row[:2] for row in pieces]
    assert [tuple(map(float, row[:2])) for row in whole[1:]] == points
    for one, other in zip(whole[1:], pieces[1:], strict=True):
        assert [float(x) for x in one[2:4]] == pytest.approx([float(x) for x in other[2:4]], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfx1,x2\n1,2\n-3,4\n",
        b"\xef\xbb\xbf1,2\n-3,4\n",
        b'"1","2"\n"-3","4"\n',
        b" 1 , 2\n-3 ,\t4\n",
        b'x1,"x2"\r\n1,2\r\n-3,4\r\n',
        b"1,2\r-3,4\r",
        b'"1\n","\n2"\n-3,4\n',
    ],
)
def test_marks_quotes_and_blanks_do_not_matter(binary_run: Path, tmp_path: Path, content: bytes) -> None:
    rows = predict_file(binary_run, content, tmp_path)
    assert rows == predict_file(binary_run, "1,2\n-3,4\n", tmp_path)
    assert [row[:2] for row in rows] == [["x1", "x2"], ["1", "2"], ["-3", "4"]]


def test_names_of_columns_pass_whatever_they_are(binary_run: Path, tmp_path: Path) -> None:
    latin = "größe,\xe9\n".encode("latin-1")
    predict_file(binary_run, latin + b"1,2\n", tmp_path)
    assert (tmp_path / "out.csv").read_bytes().startswith(latin.rstrip(b"\n") + b",logit,probability,label\n1,2,")
    assert predict_file(binary_run, '"a, b","c ""d"""\n', tmp_path) == [["a, b", 'c "d"', *BINARY]]


BAD_ROWS = {
    "1": "expected 2 columns separated by a comma, found 1",
    "1,2,3": "expected 2 columns separated by a comma, found 3",
    "": "expected 2 columns separated by a comma, found 0",
    "1;2": "expected 2 columns separated by a comma, found 1",
    "one,2": "'one' is not a number",
    "1,": "'' is not a number",
    "1,1_0": "'1_0' is not a number",
    "nan,1": "'nan' is not a finite float32",
    "1,-inf": "'-inf' is not a finite float32",
    "3.5e38,0": "'3.5e38' is not a finite float32",
    "3e38,-3e38": "so far out that the logits are not finite",
    '1,"2': "unexpected end of data",
    '1,"2"3': "',' expected after '\"'",
    '"' + "0\n" * 100_000 + '",1': "field larger than field limit (131072)",
    "\xff,1": "'ÿ' is not a number",
    "0" * 200_000 + ",1": "longer than 65536 characters",
    "1," + "0" * 70_000: "longer than 65536 characters",
}


@pytest.mark.parametrize("bad", BAD_ROWS, ids=range(len(BAD_ROWS)))
@pytest.mark.parametrize("block_rows", [2, inference.BLOCK_ROWS])
@pytest.mark.parametrize("header", ["", "x1,x2\n"])
def test_a_bad_row_is_named_by_its_line_and_nothing_is_left(
    binary_run: Path, tmp_path: Path, bad: str, block_rows: int, header: str
) -> None:
    model = inference.load_model(binary_run)[1]
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    for before, after in ((1, 0), (1, 1), (137, 200)):
        for end in ("\n", "\r\n"):
            source.write_text(header + f"0.5,-0.25{end}" * before + bad + end + f"1,2{end}" * after, newline="")
            with pytest.raises(UserError) as caught:
                inference.predict_csv(model, source, target, block_rows=block_rows)
            line = before + 1 + bool(header)
            assert str(caught.value) == f"--csv {source}, line {line}: {BAD_ROWS[bad]}"
            assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("first", ["1", "a", '"a', "a,b,c", "1,b", "a,2", "nan,b", "", "0" * 200_000 + ",1"])
def test_a_bad_first_line_is_named(binary_run: Path, tmp_path: Path, first: str) -> None:
    with pytest.raises(UserError, match=r"in\.csv, line 1: "):
        predict_file(binary_run, first + "\n1,2\n", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_lines_inside_quotes_count(binary_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"in\.csv, line 6: 'a' is not a number"):
        predict_file(binary_run, 'x,"y\nz"\n"1\n",2\n3,4\na,1\n', tmp_path)


def test_a_file_without_end_is_refused(binary_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(binary_run, "--csv", "/dev/zero", "--out", tmp_path / "out.csv") == 2
    assert capsys.readouterr().err == "error: --csv /dev/zero, line 1: longer than 65536 characters\n"
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_is_an_error_and_a_header_alone_is_none(binary_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"in\.csv is empty"):
        predict_file(binary_run, "", tmp_path)
    assert predict_file(binary_run, "a,b", tmp_path) == [["a", "b", *BINARY]]


def test_an_earlier_result_stays_until_the_new_one_is_complete(
    binary_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    target.write_text("earlier")
    source.write_text("1,2\n" * 50_000 + "1,2,3\n")
    assert ask(binary_run, "--csv", source, "--out", target) == 2
    assert capsys.readouterr().err == (
        f"error: --csv {source}, line 50001: expected 2 columns separated by a comma, found 3\n"
    )
    assert target.read_text() == "earlier"
    source.write_text("1,2\n" * 50_000)
    assert ask(binary_run, "--csv", source, "--out", target) == 0
    assert capsys.readouterr().out == f"wrote 50,000 predictions to {target}\n"
    assert len(target.read_text().splitlines()) == 50_001
    assert sorted(tmp_path.iterdir()) == [source, target]


def test_the_result_has_the_rights_of_any_new_file(binary_run: Path, tmp_path: Path) -> None:
    predict_file(binary_run, "1,2\n", tmp_path)
    (tmp_path / "other").touch()
    assert (tmp_path / "out.csv").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_link_is_followed(binary_run: Path, tmp_path: Path) -> None:
    (tmp_path / "real.csv").write_text("earlier")
    (tmp_path / "link.csv").symlink_to("real.csv")
    (tmp_path / "in.csv").write_text("1,2\n")
    assert ask(binary_run, "--csv", tmp_path / "in.csv", "--out", tmp_path / "link.csv") == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text().startswith("x1,x2,logit")


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("in.csv", "in.csv", "must be a file, and another than --csv"),
        ("in.csv", "link.csv", "must be a file, and another than --csv"),
        ("in.csv", "hard.csv", "must be a file, and another than --csv"),
        ("in.csv", "folder", "must be a file, and another than --csv"),
        ("in.csv", "/dev/null", "must be a file, and another than --csv"),
        ("in.csv", "missing/out.csv", "cannot be taken to --out"),
        ("in.csv", "in.csv/out.csv", "cannot be taken to --out"),
        ("in.csv", "n" * 300, "cannot be taken to --out"),
        ("missing.csv", "out.csv", "cannot be read"),
        ("folder", "out.csv", "cannot be read"),
    ],
)
def test_unusable_files_are_errors(
    binary_run: Path, tmp_path: Path, source: str, target: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "in.csv").write_text("1,2\n")
    (tmp_path / "link.csv").symlink_to("in.csv")
    (tmp_path / "hard.csv").hardlink_to(tmp_path / "in.csv")
    before = sorted(tmp_path.rglob("*"))
    assert ask(binary_run, "--csv", tmp_path / source, "--out", tmp_path / target) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "in.csv").read_text() == "1,2\n"


def ask_on_a_small_disk(*arguments: object) -> int:
    """Predict where no file can have more than 100,000 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return ask(*arguments)


def test_a_full_disk_is_an_error_and_leaves_nothing(binary_run: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("1,2\n" * 100_000)
    with Job(ask_on_a_small_disk, 1, binary_run, "--csv", source, "--out", target) as job:
        [outcome] = job.wait(60)
    assert outcome.value == 2
    assert outcome.output == f"error: --csv {source} cannot be taken to --out {target}: File too large\n"
    assert list(tmp_path.iterdir()) == [source]


def run_main(*arguments: object) -> None:
    """Predict as `python -m ddp_circles.predict`, with Ctrl-C as in any new process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["predict", *map(str, arguments)]
    predict.main()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_half_way_leaves_nothing(binary_run: Path, tmp_path: Path, number: signal.Signals) -> None:
    pipe, target = tmp_path / "pipe", tmp_path / "out.csv"
    target.write_text("earlier")
    os.mkfifo(pipe)
    with Job(run_main, 1, binary_run, "--csv", pipe, "--out", target) as job:
        with pipe.open("w") as feed:  # waits for the other side to read
            feed.write("1,2\n" * 100_000)
            feed.flush()
            deadline = time.monotonic() + 60
            while sum(path.stat().st_size for path in tmp_path.glob(".out.csv.*")) < 1_000_000:
                assert time.monotonic() < deadline, job.output(0)
                time.sleep(0.01)
            job.signal(number)  # before the pipe is closed, without which the last block is not complete
        [outcome] = job.wait(60)
    assert (outcome.code, outcome.output) == (130, "interrupted\n")
    assert sorted(tmp_path.iterdir()) == [target, pipe]
    assert target.read_text() == "earlier"


def test_progress_shows_on_a_terminal_and_nowhere_else(
    binary_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("1,2\n" * 10_000)
    arguments = [str(binary_run), "--csv", str(source), "--out", str(target)]
    assert ask(*arguments) == 0
    assert capsys.readouterr() == (f"wrote 10,000 predictions to {target}\n", "")
    result = target.read_bytes()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ddp_circles.predict", *arguments]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal says that the other side is gone
            while piece := os.read(ours, 4096):
                shown += piece
        os.close(ours)
        printed, _ = process.communicate(timeout=60)
    assert "in.csv" in shown.decode()
    assert "40.0/40.0 kB" in shown.decode()
    assert (process.returncode, printed) == (0, f"wrote 10,000 predictions to {target}\n")
    assert target.read_bytes() == result


def memory_peaks(run: Path, *sources: Path) -> list[int]:
    """Predict for one file after the other; returns the process's high-water mark of memory after each, in kB."""
    model = inference.load_model(run)[1]
    peaks = []
    for source in sources:
        inference.predict_csv(model, source, source.with_suffix(".out"))
        # Not ru_maxrss, which begins with that of the parent process.
        [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        peaks.append(int(peak))
    return peaks


@pytest.mark.parametrize("thousands", [200, pytest.param(1000, marks=pytest.mark.thorough)])
def test_many_rows_take_no_more_memory_than_a_few(tmp_path: Path, thousands: int) -> None:
    run = write_run(tmp_path / "model_4", recipe("model_4"))
    points = np.random.default_rng(0).normal(scale=5, size=(1000, 2)).astype(np.float32)
    block = "".join(f"{x!r},{y!r}\n" for x, y in points.tolist())
    for name, repeats in (("few", 20), ("many", thousands)):
        with (tmp_path / name).open("w") as file:
            file.writelines([block] * repeats)
    [(few, many)] = run_ranks(memory_peaks, 1, run, tmp_path / "few", tmp_path / "many")
    assert many - few < 4 * 1024
    with (tmp_path / "many.out").open() as file:
        assert next(file).rstrip("\n").split(",") == ["x1", "x2", *FOUR]
        for position, line in enumerate(file):
            if position % 19_003 == 0:
                row = [float(cell) for cell in line.split(",")]
                assert row[:2] == points[position % 1000].tolist()
                check(run, points[[position % 1000]], np.array([row[2:]]))
    assert position == thousands * 1000 - 1


# the run directory and the command line


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--points"],
        ["--points", "1,2", "--show", "3"],
        ["--points", "1,2", "--csv", "in.csv", "--out", "out.csv"],
        ["--show", "1", "--csv", "in.csv", "--out", "out.csv"],
    ],
)
def test_exactly_one_question_is_asked(
    binary_run: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(binary_run, *arguments) == 2
    assert capsys.readouterr() == ("", "error: give exactly one of --points, --csv and --show\n")


@pytest.mark.parametrize("arguments", [["--csv", "in.csv"], ["--out", "out.csv", "--show", "1"]])
def test_csv_and_out_belong_together(
    binary_run: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(binary_run, *arguments) == 2
    assert capsys.readouterr() == ("", "error: --csv IN.csv and --out OUT.csv belong together\n")


@pytest.mark.parametrize("count", [0, -1, 201])
def test_show_needs_as_many_test_points(binary_run: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(binary_run, "--show", count) == 2
    expected = f"error: --show must be between 1 and 200, the number of test points, got {count}\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize("arguments", [["--show", "1"], ["run", "--show", "x"], ["run", "--shw", "1"]])
def test_a_wrong_command_line_is_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        ask(*arguments)
    assert leaving.value.code == 2


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def act(run: Path) -> None:
        (run / name).write_bytes(change((run / name).read_bytes()))

    return act


def reweigh(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def act(run: Path) -> None:
        path = run / "model.safetensors"
        save_file(change(load(path.read_bytes())), path)

    return act


def diverge(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights["layers.0.bias"][0] = math.nan
    return weights


def make_folder(run: Path) -> None:
    (run / "model.safetensors").unlink()
    (run / "model.safetensors").mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: run.rename(run.with_name("moved")), "there is no run directory"),
        (lambda run: (run / "config.toml").unlink(), "is not a run directory: it has no config.toml"),
        (lambda run: (run / "model.safetensors").unlink(), "the run is not finished"),
        (make_folder, "model.safetensors cannot be read"),
        (rewrite("model.safetensors", lambda content: content[:-4]), "model.safetensors cannot be read"),
        (rewrite("model.safetensors", lambda content: content[:30]), "model.safetensors cannot be read"),
        (rewrite("model.safetensors", lambda content: b""), "model.safetensors cannot be read"),
        (rewrite("model.safetensors", lambda content: b"\xff" * 1000), "model.safetensors cannot be read"),
        (rewrite("config.toml", lambda content: b"lr = "), "config.toml cannot be read"),
        (rewrite("config.toml", lambda content: b"\xff"), "config.toml cannot be read"),
        (rewrite("config.toml", lambda content: content + b"colour = 3\n"), "unknown key 'colour'"),
        (rewrite("config.toml", lambda content: b"lr = -1.0\n"), "lr= must be"),
        (
            rewrite("config.toml", lambda content: b"hidden = [9, 10]\n"),
            "layers.0.bias is torch.float32 [10] in the first and torch.float32 [9] by the second",
        ),
        (
            rewrite("config.toml", lambda content: b"hidden = [10]\n"),
            "layers.2.bias is torch.float32 [10] in the first and torch.float32 [1] by the second",
        ),
        (
            rewrite("config.toml", lambda content: b'dataset = "blobs"\n'),
            "layers.4.bias is torch.float32 [1] in the first and torch.float32 [4] by the second",
        ),
        (
            reweigh(lambda weights: weights | {"extra": torch.zeros(1)}),
            "extra is torch.float32 [1] in the first and missing by the second",
        ),
        (
            reweigh(lambda weights: {"own.weight": torch.zeros(1)}),
            "layers.0.bias is missing in the first and torch.float32 [10] by the second",
        ),
        (
            reweigh(lambda weights: {name: weights[name].double() for name in weights}),
            "layers.0.bias is torch.float64 [10] in the first and torch.float32 [10] by the second",
        ),
        (reweigh(diverge), "has weights that are not finite: the training diverged"),
    ],
    ids=range(19),
)
def test_an_unusable_run_is_an_error(
    tmp_path: Path, spoil: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", recipe("model_3"))
    spoil(run)
    assert ask(run, "--points", "1,2") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert str(run) in err
    assert "--config" not in err


def ask_with_little_memory(run: Path, *question: object) -> tuple[int, float]:
    """Ask on a machine of 16 GiB; returns the exit code, and MiB that this took."""
    setattr(memory, "machine_memory", lambda: 2**34)  # noqa: B010 - a plain assignment has another type
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = ask(run, *question)
    return code, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.parametrize(
    ("setting", "question", "said"),
    [
        ("n_samples = 2000000000", "--show=1", "n_samples=2000000000 needs more memory than there is "),
        ("hidden = [65536, 65536]", "--show=1", "and torch.float32 [65536] by the second"),
    ],
)
def test_a_run_that_memory_cannot_hold_is_refused_before_it_is_asked_for(
    tmp_path: Path, setting: str, question: str, said: str
) -> None:
    run = write_run(tmp_path / "run", recipe("model_3"))
    (run / "config.toml").write_text(f"{setting}\n")
    with Job(ask_with_little_memory, 1, run, question) as job:
        (outcome,) = job.wait(60)
    code, taken = outcome.value
    assert code == 2
    assert outcome.output.startswith("error: ")
    assert outcome.output.count("\n") == 1
    assert said in outcome.output
    assert taken < 300


def test_a_model_without_hidden_layers_is_read_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", Config(hidden=()))
    assert ask(run, "--points", "1,2") == 0
    assert parse_table(capsys.readouterr().out)[0] == ["x1", "x2", *BINARY]


def test_predicting_leaves_the_model_ready_and_without_gradients(binary_run: Path) -> None:
    config, model = inference.load_model(binary_run)
    assert config == recipe("model_3")
    assert isinstance(model, nn.Module)
    assert not model.training
    assert not inference.predict(model, torch.zeros(1, 2)).logits.requires_grad


def test_help_is_quick_and_says_what_is_read_and_written() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "ddp_circles.predict", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "ddp_circles" in imported
    assert not imported & {"torch", "numpy", "matplotlib", "sklearn", "safetensors"}
    for word in ("RUN_DIR", "--points", "X1,X2", "--csv", "--out", "--show", "header"):
        assert word in done.stdout
