"""The metrics file survives kills and full disks, and Weights & Biases can neither delay a run nor repeat an epoch."""

import json
import os
import pty
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Self

import psutil
import pytest

from ddp_circles.records.console import Console
from ddp_circles.records.metrics_file import MetricsFile, Row, read_rows
from ddp_circles.records.wandb_follower import choose_mode, new_run_id

ROOT = str(Path(__file__).parents[2])
KEY = "0123456789abcdef0123456789abcdef01234567"
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63f80f0001010100"
    "5c3f0b090000000049454e44ae426082"
)


def row(epoch: int) -> Row:
    return {
        "epoch": epoch,
        "step": 13 * (epoch + 1),
        "train/loss": 1 / (epoch + 3),
        "train/accuracy": 427 / 800,
        "test/loss": 0.1 + 0.2,
        "test/accuracy": 0.485,
        "train/samples_per_second": 123456.789,
        "seconds": 0.01,
    }


def rows(*epochs: int) -> list[Row]:
    return [row(epoch) for epoch in epochs]


def warnings_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning: ")]


# --- the metrics file ---


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
    (tmp_path / ".metrics.jsonl.left").write_text("by a kill during the same")
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


def test_a_full_disk_costs_warnings_and_no_line(tmp_path: Path) -> None:
    script = f"""
        import resource, sys
        sys.path.insert(0, {ROOT!r})
        from pathlib import Path
        from ddp_circles.tracking import MetricsFile, read_rows
        from tests.unit.test_tracking import row
        path = Path({str(tmp_path)!r}, "metrics.jsonl")
        lines = MetricsFile(path, 0)
        lines.log(row(0))
        lines.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, resource.RLIM_INFINITY))
        lines.log(row(1))
        lines.log(row(2))
        assert path.read_bytes().endswith(b"}}\\n"), path.read_bytes()
        assert read_rows(path) == [row(0)]
        try:
            lines.flush()
        except OSError as error:
            assert error.filename == str(path), error
        else:
            raise AssertionError("flush must not pass")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        lines.log(row(3))
        lines.finish({{}}, [])
        assert read_rows(path) == [row(0), row(1), row(2), row(3)]
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, resource.RLIM_INFINITY))
        lines.log(row(4))
        lines.close()
    """
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = warnings_in(done.stderr)
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


# --- the console ---


def test_the_console_prints_the_line_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(every=10, total_epochs=21)
    for epoch in range(21):
        console.log({**row(epoch), "train/loss": 0.694608, "test/loss": 0.69301})
    console.finish({}, [])
    console.close()
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"Epoch: {epoch} | Loss: 0.69461, Acc: 53.37% | Test loss: 0.69301, Test acc: 48.50%" for epoch in (0, 10, 20)
    ]
    assert printed.err == ""


def _console_script(epochs: int, before: str = "") -> list[str]:
    script = f"""
        import sys
        sys.path.insert(0, {ROOT!r})
        {before}
        from ddp_circles.tracking import Console, warn
        from tests.unit.test_tracking import row
        console = Console(every=10, total_epochs={epochs})
        for epoch in range({epochs}):
            if epoch == 15:
                warn("in between")
            console.log(row(epoch))
        console.close()
    """
    return [sys.executable, "-c", textwrap.dedent(script)]


def test_off_a_terminal_there_is_no_bar_and_no_rich() -> None:
    done = subprocess.run(
        _console_script(20, "import atexit; atexit.register(lambda: print('rich' in sys.modules))"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert done.stderr == "warning: in between\n"


@pytest.mark.parametrize("lines_to", ["terminal", "file"])
def test_on_a_terminal_lines_and_bar_do_not_tear_each_other(tmp_path: Path, lines_to: str) -> None:
    mine, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with (tmp_path / "out").open("wb") as file:
        process = subprocess.Popen(
            _console_script(60), stdout=theirs if lines_to == "terminal" else file, stderr=theirs, env=environment
        )
        os.close(theirs)
        screen = _screen(_read_all(mine))
        assert process.wait(60) == 0
    expected = [
        f"Epoch: {epoch} | Loss: {1 / (epoch + 3):.5f}, Acc: 53.37% | Test loss: 0.30000, Test acc: 48.50%"
        for epoch in range(0, 60, 10)
    ]
    if lines_to == "file":
        assert (tmp_path / "out").read_text().splitlines() == expected
        assert screen == ["warning: in between"]
    else:
        assert screen == [*expected[:2], "warning: in between", *expected[2:]]


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
    """What a terminal shows in the end, of the few control sequences that a one-line bar needs."""
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
    done = subprocess.run(_console_script(60), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert warnings_in(done.stderr)[0].startswith("warning: no more lines on standard output")
    assert len(done.stderr.splitlines()) == 2


# --- several as one, and small things ---


def test_trackers_pass_everything_on_and_none_is_silence() -> None:
    class Recording:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def log(self, row: Row) -> None:
            self.calls.append(f"log {row['epoch']}")

        def flush(self) -> None:
            self.calls.append("flush")

        def finish(self, summary: dict[str, Any], files: list[Path]) -> None:
            self.calls.append("finish")

        def close(self) -> None:
            self.calls.append("close")

    both = [Recording(), Recording()]
    for trackers in (Trackers(both), Trackers([])):
        trackers.log(row(3))
        trackers.flush()
        trackers.finish({}, [])
        trackers.close()
    assert [tracker.calls for tracker in both] == [["log 3", "flush", "finish", "close"]] * 2


def test_run_ids_are_short_and_differ() -> None:
    ids = {new_run_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(one) == 8 and one.isalnum() and one.islower() | one.isdigit() for one in ids)


def test_choosing_a_mode_imports_nothing_heavy() -> None:
    script = "import sys; from ddp_circles import tracking; tracking.choose_mode('auto'); tracking.new_run_id(); "
    script += "print({'wandb', 'torch', 'rich', 'matplotlib', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


# --- Weights & Biases ---


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without credentials and an environment that says nothing about wandb."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(
    "asked, environment, files, chosen",
    [
        ("online", {"WANDB_MODE": "offline"}, {}, "online"),
        ("offline", {"WANDB_API_KEY": KEY}, {}, "offline"),
        ("disabled", {"WANDB_API_KEY": KEY}, {}, "disabled"),
        ("auto", {}, {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, {}, "online"),
        ("auto", {"WANDB_IDENTITY_TOKEN_FILE": "/some/file"}, {}, "online"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}, {}, "disabled"),
        ("auto", {"WANDB_MODE": "dryrun", "WANDB_API_KEY": KEY}, {}, "offline"),
        ("auto", {"WANDB_MODE": "online"}, {}, "online"),
        ("auto", {}, {".netrc": f"machine api.wandb.ai login user password {KEY}"}, "online"),
        ("auto", {}, {".netrc": f"machine example.org login user password {KEY}"}, "offline"),
        ("auto", {"WANDB_BASE_URL": "http://example.org"}, {".netrc": f"machine example.org password {KEY}"}, "online"),
        ("auto", {"NETRC": "~/other"}, {"other": f"machine api.wandb.ai password {KEY}"}, "online"),
        ("auto", {}, {".netrc": "damaged in \0 many ways"}, "offline"),
        ("auto", {}, {".config/wandb/settings": f"[default]\napi_key = {KEY}"}, "online"),
        ("auto", {"WANDB_API_KEY": KEY}, {".config/wandb/settings": "[default]\nmode = offline"}, "offline"),
        ("auto", {"WANDB_CONFIG_DIR": "~/there"}, {"there/settings": "[default]\nmode = disabled"}, "disabled"),
        ("auto", {"WANDB_API_KEY": KEY}, {".config/wandb/settings": "damaged"}, "online"),
    ],
)
def test_the_mode_is_chosen_from_what_is_configured_here(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    environment: dict[str, str],
    files: dict[str, str],
    chosen: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    assert choose_mode(asked) == chosen


class Watched(WandbRun):
    """A run whose processes a test can see."""

    def __init__(self, folder: Path, mode: Literal["online", "offline"] = "offline", earlier: int = 0) -> None:
        super().__init__(
            mode=mode,
            project="circles",
            run_id="abcd1234",
            config={"lr": 0.01, "hidden": (10, 10), "run_dir": folder},
            folder=folder,
            earlier=rows(*range(earlier)),
        )
        assert self._process is not None
        self.process = psutil.Process(self._process.pid)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while not self._ready and time.monotonic() < deadline:
            self._send()
            time.sleep(0.05)
        assert self._ready

    def family(self) -> list[psutil.Process]:
        """The processes that exist on behalf of this run."""
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


@pytest.fixture
def folder(home: Path) -> Iterator[Path]:
    """A run directory; afterwards no process of wandb's may be left."""
    before = _wandb_processes()
    path = home.parent / "run"
    path.mkdir()
    yield path
    wait_until_gone(before)


def wait_until_gone(others: set[int]) -> None:
    """Wait until the only processes of wandb's are `others`."""
    deadline = time.monotonic() + 10
    while left := _wandb_processes() - others:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def _wandb_processes() -> set[int]:
    found = psutil.process_iter(["name", "status", "cmdline"])
    return {
        process.pid
        for process in found
        if process.info["status"] != psutil.STATUS_ZOMBIE
        and ("wandb-core" in (process.info["name"] or "") or "ddp_circles.tracking import serve" in str(process.info))
    }


def address(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def records(folder: Path) -> Iterator[Any]:
    """What the run's files hold, in the order they were begun."""
    from wandb.proto import wandb_internal_pb2

    for log in sorted(folder.glob("wandb/*run-*/run-abcd1234.wandb")):
        for content in tracking._log_records(log.read_bytes()):
            yield wandb_internal_pb2.Record.FromString(content)  # type: ignore[attr-defined]


def history(folder: Path) -> list[dict[str, Any]]:
    found = [record.history for record in records(folder) if record.WhichOneof("record_type") == "history"]
    return [{".".join(item.nested_key): json.loads(item.value_json) for item in one.item} for one in found]


def epochs(folder: Path) -> list[int]:
    return [line["epoch"] for line in history(folder)]


@pytest.mark.timeout(60)
def test_an_offline_run_holds_everything_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", address(server))
        (folder / "curves.png").write_bytes(PNG)
        (folder / "model.safetensors").write_bytes(b"weights")
        run = Watched(folder)
        for epoch in range(30):
            run.log(row(epoch))
        run.flush()
        run.finish(
            {"weights_sha256": "abc", "resumed_from_step": None}, [folder / "curves.png", folder / "model.safetensors"]
        )
        assert run.family() == []
        run.close()
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    lines = history(folder)
    assert [{key: line[key] for key in row(0)} for line in lines] == rows(*range(30))
    assert [line["_step"] for line in lines] == [13 * (epoch + 1) for epoch in range(30)]
    assert lines[-1]["plots/curves._type"] == "image-file"
    assert (next(folder.glob("wandb/*/files")) / lines[-1]["plots/curves.path"]).read_bytes() == PNG
    everything = list(records(folder))
    artifact = next(record.artifact for record in everything if record.WhichOneof("record_type") == "artifact")
    assert (artifact.type, [entry.path for entry in artifact.manifest.contents]) == ("model", ["model.safetensors"])
    begun = next(record.run for record in everything if record.WhichOneof("record_type") == "run")
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert (config["lr"], config["hidden"], config["run_dir"]) == (0.01, [10, 10], str(folder))
    metrics = {
        record.metric.name or record.metric.glob_name: record.metric
        for record in everything
        if record.metric.step_metric
    }
    assert {metric.step_metric for metric in metrics.values()} == {"epoch"}
    assert {"train/*", "test/*", "step"} <= set(metrics)
    summary = {
        item.key: json.loads(item.value_json)
        for record in everything
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
        if item.key
    }
    assert summary["weights_sha256"] == "abc"
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == f"wandb: offline run in {next(folder.glob('wandb/offline-run-*'))}, for `wandb sync`\n"


@pytest.mark.timeout(60)
def test_a_stopped_run_goes_on_where_it_was_in_the_same_run(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Watched(folder)
    for epoch in range(20):
        run.log(row(epoch))
    run.wait_until_ready()
    run.close()
    again = Watched(folder, earlier=12)
    for epoch in range(12, 25):
        again.log(row(epoch))
    again.finish({}, [])
    assert epochs(folder) == list(range(25))
    assert len(list(folder.glob("wandb/offline-run-*-abcd1234"))) == 2
    assert warnings_in(capfd.readouterr().err) == []


def training(folder: Path, earlier: int, until: int, last: str) -> list[str]:
    """A process that logs epochs, waits until they are handed over, and then does what `last` says."""
    script = f"""
        import os, sys, time
        sys.path.insert(0, {ROOT!r})
        from pathlib import Path
        from tests.unit.test_tracking import Watched, row
        run = Watched(Path({str(folder)!r}), earlier={earlier})
        run.wait_until_ready()
        for epoch in range({earlier}, {until}):
            run.log(row(epoch))
        time.sleep(1)
        {last}
    """
    return [sys.executable, "-c", textwrap.dedent(script)]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("killed", ["training alone", "everything"])
def test_no_kill_costs_or_repeats_an_epoch(folder: Path, monkeypatch: pytest.MonkeyPatch, killed: str) -> None:
    victims = "[*run.family(), None]" if killed == "everything" else "[None]"
    others = _wandb_processes()
    last = f"for one in {victims}: os.kill(one.pid if one else os.getpid(), 9)"
    done = subprocess.run(training(folder, 0, 20, last), stderr=subprocess.PIPE, text=True, timeout=40)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if killed == "training alone":
        wait_until_gone(others)
        assert epochs(folder) == list(range(20))
    again = Watched(folder, earlier=15)
    for epoch in range(15, 22):
        again.log(row(epoch))
    again.finish({}, [])
    assert epochs(folder) == list(range(22))


@pytest.mark.timeout(60)
def test_more_epochs_than_the_pipe_holds_wait_without_anyone_waiting(folder: Path) -> None:
    run = Watched(folder)
    run.process.suspend()
    started = time.monotonic()
    for epoch in range(1000):
        run.log(row(epoch))
    assert time.monotonic() - started < 1
    assert len(run._to_send) > 65536
    run.process.resume()
    run.finish({}, [])
    assert epochs(folder) == list(range(1000))


@pytest.mark.timeout(100)
def test_a_dead_or_silent_server_is_one_warning_and_no_wait(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        runs = {}
        for name, server in (("closed", closed), ("silent", silent), ("stopped", silent)):
            monkeypatch.setenv("WANDB_BASE_URL", address(server))
            (folder / name).mkdir()
            runs[name] = Watched(folder / name, "online")
            if name == "closed":
                closed.close()
        slowest = 0.0
        for epoch in range(100):
            for run in runs.values():
                started = time.monotonic()
                run.log(row(epoch))
                slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.05)
        assert slowest < 0.2
        started = time.monotonic()
        runs["stopped"].close()
        assert time.monotonic() - started < tracking.CLOSE_SECONDS + 1
        runs["closed"].finish({}, [])
        runs["silent"].finish({}, [])
        assert time.monotonic() - started < 40
    said = warnings_in(capfd.readouterr().err)
    assert len(said) == 3
    assert "no end after 3 s" in said[0]
    assert "connection refused" in said[1]
    assert "CommError" in said[2]
    assert "metrics.jsonl has everything" in said[2]
    assert not any(KEY in path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


@pytest.mark.timeout(60)
def test_online_without_credentials_is_a_warning_not_a_question(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Watched(folder, "online")
    run.log(row(0))
    run.finish({}, [])
    (warning,) = warnings_in(capfd.readouterr().err)
    assert "No API key configured" in warning


@pytest.mark.timeout(60)
def test_its_process_dying_is_one_warning(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Watched(folder)
    run.log(row(0))
    run.process.kill()
    run.process.wait(10)
    for epoch in range(1, 5):
        run.log(row(epoch))
    run.finish({}, [])
    run.close()
    (warning,) = warnings_in(capfd.readouterr().err)
    assert "ended unexpectedly" in warning


def test_no_process_at_all_is_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    run = WandbRun(mode="offline", project="p", run_id="abcd1234", config={}, folder=folder, earlier=[])
    run.log(row(0))
    run.finish({}, [])
    (warning,) = warnings_in(capfd.readouterr().err)
    assert "cannot be started" in warning


@pytest.mark.timeout(60)
def test_never_being_ready_is_one_warning_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "START_SECONDS", 0.2)
    run = Watched(folder)
    run.process.suspend()
    time.sleep(0.3)
    for epoch in range(3):
        run.log(row(epoch))
    run.close()
    (warning,) = warnings_in(capfd.readouterr().err)
    assert "not ready" in warning


@pytest.mark.timeout(60)
def test_signals_of_a_job_leave_it_alone(folder: Path) -> None:
    run = Watched(folder)
    run.wait_until_ready()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        run.process.send_signal(number)
    assert os.getsid(run.process.pid) != os.getsid(0)
    run.log(row(0))
    run.finish({}, [])
    assert epochs(folder) == [0]


@pytest.mark.timeout(60)
def test_online_a_continued_run_repeats_nothing_and_the_key_stays_secret(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with FakeServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        run = Watched(folder, "online")
        for epoch in range(20):
            run.log(row(epoch))
        run.wait_until_ready()
        run.close()
        again = Watched(folder, "online", earlier=12)
        for epoch in range(12, 25):
            again.log(row(epoch))
        (folder / "curves.png").write_bytes(PNG)
        (folder / "model.safetensors").write_bytes(b"weights")
        again.finish({"weights_sha256": "abc"}, [folder / "curves.png", folder / "model.safetensors"])
    received = [json.loads(line) for line in server.history]
    assert [line["epoch"] for line in received] == list(range(25))
    assert "plots/curves" in received[-1]
    assert server.artifacts == [("model", "model-abcd1234")]
    printed = capfd.readouterr()
    assert printed.err.splitlines() == [f"wandb: {server.url}/me/circles/runs/abcd1234"] * 2
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    assert files
    assert not any(KEY in path.read_text(errors="replace") for path in files)


class FakeServer:
    """As much of a server of wandb's as one run needs."""

    def __init__(self) -> None:
        self.history: list[str] = []
        self.artifacts: list[tuple[str, str]] = []
        self._begun = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_PUT(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                self._answer(outer)

            def _answer(self, answerer: Any) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = answerer._answer(self.path, json.loads(body)) if answerer else {}
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                if not isinstance(sys.exception(), ConnectionError):  # its client may leave when it pleases
                    super().handle_error(request, client_address)

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = address(self._server.socket)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path != "/graphql":
            self.history += (body.get("files") or {}).get("wandb-history.jsonl", {}).get("content", [])
            return {"exitcode": None, "limits": {}}
        name = body["query"].split("(")[0].split()[1]
        return {"data": self._graphql(name, body.get("variables") or {})}

    def _graphql(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "P", "name": "circles", "entity": {"id": "E", "name": "me"}}
        bucket = {
            "id": "B",
            "name": "abcd1234",
            "displayName": "x",
            "config": "{}",
            "historyLineCount": len(self.history),
        }
        if name == "RunResumeStatus":
            tail = {"historyTail": json.dumps(self.history[-1:]), "eventsTail": "[]", "wandbConfig": '{"t": 1}'}
            counts = {"logLineCount": 0, "eventsLineCount": 0, "summaryMetrics": "{}", "tags": []}
            return {"model": {**project, "bucket": {**bucket, **tail, **counts}} if self._begun else None}
        if name == "UpsertBucket":
            inserted, self._begun = not self._begun, True
            return {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": inserted}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in asked["files"]]
            return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}
        if name == "CreateArtifact":
            wanted = asked["input"]
            self.artifacts.append((wanted["artifactTypeName"], wanted["artifactCollectionName"]))
            sequence = {"latestArtifact": {"id": "A"}}
            return {"createArtifact": {"artifact": {"id": "A", "state": "COMMITTED", "artifactSequence": sequence}}}
        others: dict[str, dict[str, Any]] = {
            "Viewer": {"viewer": {"id": "V", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}},
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "ArtifactType": {"project": None},
        }
        return others.get(name, {})


def test_secrets_are_cut_out_of_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    said = tracking._without_secrets(f"Post https://me:word@example.org/x?key={KEY}: refused by http://example.org")
    assert said == "Post https://***@example.org/x?key=***: refused by http://example.org"


@pytest.mark.parametrize("size", [0, 1, 7, 32740, 32754, 32755, 32756, 32761, 32768, 100_000])
def test_records_of_any_size_are_read_and_a_torn_one_is_not(size: int) -> None:
    contents = [b"first", bytes(range(256)) * (size // 256) + b"x" * (size % 256), b"last"]
    log = _encoded(contents)
    assert list(tracking._log_records(log)) == contents
    assert list(tracking._log_records(log[:-1])) == contents[:2]
    assert list(tracking._log_records(log[:3])) == []


def _encoded(contents: list[bytes]) -> bytes:
    """The log format as its document describes it."""
    log = b":W&B\xe1\xbe\x00"
    for content in contents:
        rest, first = content, True
        while True:
            room = 32768 - len(log) % 32768
            if room < 7:
                log += bytes(room)
                continue
            piece, rest = rest[: room - 7], rest[room - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not rest]
            log += struct.pack("<IHB", 0, len(piece), kind) + piece
            first = False
            if not rest:
                break
    return log
