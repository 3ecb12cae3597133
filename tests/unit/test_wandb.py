"""Weights & Biases gets each epoch once, from a program that can neither delay a run nor be left behind by one."""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from ddp_circles.job.stop import STOP_SIGNALS
from ddp_circles.records.wandb_copy import _read_run, without_secrets
from ddp_circles.records.wandb_follower import choose_mode, choose_project, new_run_id
from ddp_circles.terminal import beside_python
from tests.harness.ranks import Job
from tests.harness.tracked import (
    PNG,
    RUN_ID,
    Tracked,
    row,
    track_until_killed,
    wait_until,
    wait_until_none_at,
)
from tests.harness.wandb_log import epochs, history, only_folder, records, whole_records
from tests.harness.wandb_server import WandbServer

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home without credentials, in which no process may be left, and an environment that says nothing of wandb."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    yield folder
    wait_until_none_at(folder)


@pytest.fixture
def folder(home: Path) -> Path:
    """A run directory."""
    path = home.parent / "größe"
    path.mkdir()
    return path


def warnings_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning: ")]


def copy(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Copy a run by hand."""
    return subprocess.run(
        [sys.executable, "-m", "ddp_circles.records.wandb_copy", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=100,
    )


# ---- before anything starts


def test_run_ids_are_short_and_differ() -> None:
    ids = {new_run_id(first=True) for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(one) == 8 and one.isalnum() and one.islower() | one.isdigit() for one in ids)


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
        ("auto", {"WANDB_DISABLED": "true", "WANDB_API_KEY": KEY}, {}, "disabled"),
        ("auto", {"WANDB_DISABLED": "false", "WANDB_API_KEY": KEY}, {}, "online"),
        ("offline", {"WANDB_DISABLED": "true"}, {}, "offline"),
        ("auto", {}, {".netrc": f"machine api.wandb.ai login user password {KEY}"}, "online"),
        ("auto", {}, {".netrc": f"machine example.org login user password {KEY}"}, "offline"),
        ("auto", {"WANDB_BASE_URL": "http://example.org"}, {".netrc": f"machine example.org password {KEY}"}, "online"),
        ("auto", {"WANDB_BASE_URL": "http://[bad"}, {".netrc": f"machine bad login user password {KEY}"}, "offline"),
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


def test_a_project_is_the_flag_then_the_variable_then_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(flag: str = "ddp_circles") -> str:
        return choose_project(flag, default="ddp_circles")

    assert (chosen(), chosen("flag")) == ("ddp_circles", "flag")
    (home.parent / "wandb").mkdir()
    (home.parent / "wandb" / "settings").write_text("[default]\nproject = file")
    assert (chosen(), chosen("flag")) == ("file", "flag")
    monkeypatch.setenv("WANDB_PROJECT", "variable")
    assert (chosen(), chosen("flag")) == ("variable", "flag")


def test_a_user_without_a_home_is_offline(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # as in a container whose user has no name
    monkeypatch.delenv("HOME")
    assert choose_mode("auto") == "offline"
    Tracked(folder, "disabled").finish()
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "harness" / "without_home"))
    done = copy(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert only_folder(folder)


# ---- offline


def says_where(folder: Path) -> str:
    return f"wandb: offline; to upload: {beside_python('wandb')} sync '{folder / 'wandb'}'/offline-run-*-{RUN_ID}\n"


def test_an_offline_copy_holds_everything_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", address(server))
        for name, value in {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PYTHONUTF8", "0")
        run = Tracked(folder)
        run.log(*range(30))
        run.finish(weights_sha256="abc", resumed_from_step=None)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    lines = history(folder)
    assert [{key: line[key] for key in row(0)} for line in lines] == [row(epoch) for epoch in range(30)]
    assert [line["_step"] for line in lines] == [13 * (epoch + 1) for epoch in range(30)]
    assert lines[-1]["plots/curves._type"] == "image-file"
    assert (only_folder(folder) / "files" / lines[-1]["plots/curves.path"]).read_bytes() == PNG
    everything = list(records(folder))
    artifact = next(record.artifact for record in everything if record.WhichOneof("record_type") == "artifact")
    assert (artifact.type, [entry.path for entry in artifact.manifest.contents]) == ("model", ["model.safetensors"])
    begun = next(record.run for record in everything if record.WhichOneof("record_type") == "run")
    assert (begun.run_id, begun.project) == (RUN_ID, "circles")
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
    assert printed.err == says_where(folder)


def test_a_continued_run_is_copied_anew_into_the_only_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Tracked(folder)
    run.log(*range(20))
    run.wait_until_copying()
    run.stop()
    assert epochs(folder) == list(range(20))
    first = only_folder(folder)
    others = [folder / "wandb" / name for name in (f"{first.name[:-8]}other123", f"mine-{first.name}", "notes")]
    for other in others:
        shutil.copytree(first, other)
    torn = first.with_name(f"offline-run-20200101_000000-{RUN_ID}")  # a start that was killed before it removed `first`
    torn.mkdir()
    again = Tracked(folder, keep=12, plots=False)
    again.log(*range(12, 25))
    again.finish()
    for other in others:
        assert (other / f"run-{RUN_ID}.wandb").exists()
        shutil.rmtree(other)
    assert only_folder(folder) not in (first, torn)
    assert epochs(folder) == list(range(25))
    assert not any("plots/curves.path" in line for line in history(folder)), "pictures of another end of the run"
    assert warnings_in(capfd.readouterr().err) == []
    before = history(folder)
    assert copy(folder).returncode == 0
    assert only_folder(folder)
    assert [without_clock(line) for line in history(folder)] == [without_clock(line) for line in before]


def test_the_environment_says_what_it_says_to_any_program(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "parameters.yaml").write_text("wandb_version: 1\nlr:\n  value: 0.5\n")
    words = {"NAME": "mine", "TAGS": "a,b", "NOTES": "note", "RUN_GROUP": "group", "ENTITY": "us", "SWEEP_ID": "sweep"}
    words |= {"RUN_ID": RUN_ID, "SWEEP_PARAM_PATH": str(folder / "parameters.yaml"), "MODE": "online"}
    words |= {"PROJECT": "the agent's", "RESUME": "must", "DIR": str(folder / "there")}
    for name, value in words.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert new_run_id(first=True) == RUN_ID
    assert new_run_id(first=False) != RUN_ID
    run = Tracked(folder)
    run.log(0, 1)
    run.stop()
    assert "WANDB_RESUME=must is ignored" in capfd.readouterr().err
    monkeypatch.setenv("WANDB_RUN_ID", "other123")  # an agent that gives a continued run another id
    again = Tracked(folder, keep=1)
    again.log(1, 2)
    again.finish()
    assert "WANDB_RUN_ID=other123 is ignored: " in capfd.readouterr().err
    assert not (folder / "wandb").exists()
    assert epochs(folder / "there") == [0, 1, 2]
    assert only_folder(folder / "there").name.endswith(f"-{RUN_ID}")
    begun = next(record.run for record in records(folder / "there") if record.WhichOneof("record_type") == "run")
    assert (begun.display_name, begun.notes, begun.run_group, begun.entity) == ("mine", "note", "group", "us")
    assert (begun.run_id, begun.sweep_id, list(begun.tags)) == (RUN_ID, "sweep", ["a", "b"])
    assert begun.project == "circles"
    assert {item.key: item.value_json for item in begun.config.update}["lr"] == "0.5"
    for name in words:
        monkeypatch.delenv(f"WANDB_{name}")
    assert copy(folder).returncode == 0
    begun = next(record.run for record in records(folder) if record.WhichOneof("record_type") == "run")
    assert (begun.display_name, begun.entity, begun.run_id) == ("mine", "us", RUN_ID), "elsewhere, without variables"


@pytest.mark.thorough
@pytest.mark.parametrize("killed, restart", [("training", "later"), ("training", "at once"), ("everything", "at once")])
def test_no_kill_costs_or_repeats_an_epoch(folder: Path, home: Path, killed: str, restart: str) -> None:
    with Job(track_until_killed, 1, folder, 20, killed == "everything", environment={"HOME": str(home)}) as job:
        (outcome,) = job.wait(60)
    assert outcome.code == -signal.SIGKILL, outcome.output
    if restart == "later":
        wait_until_none_at(home)
        only_folder(folder)
        assert epochs(folder) == list(range(20))
        shutil.rmtree(folder / "wandb")
        assert copy(folder).returncode == 0
        assert epochs(folder) == list(range(20))
    again = Tracked(folder, keep=15)
    again.log(*range(15, 22))
    again.finish()
    only_folder(folder)
    assert epochs(folder) == list(range(22))
    assert "warning" not in outcome.output


def test_neither_signals_of_the_job_nor_lagging_behind_cost_anything(folder: Path) -> None:
    run = Tracked(folder)
    for number in STOP_SIGNALS:
        run.program.send_signal(number)  # before it has come so far as to ignore anything
    run.wait_until_copying()
    for number in STOP_SIGNALS:
        run.program.send_signal(number)
    assert os.getsid(run.program.pid) != os.getsid(0)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS), "the trainer hears them"
    run.program.suspend()
    run.log(*range(1000))  # does not wait for it, which would take for ever
    run.program.resume()
    run.finish()
    assert epochs(folder) == list(range(1000))


def without_clock(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("_runtime", "_timestamp")}


# ---- failures


@pytest.mark.parametrize("end", ["stopped", pytest.param("finished", marks=pytest.mark.thorough)])
def test_a_closed_or_silent_server_is_one_warning_and_no_wait(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], end: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        runs = []
        for name, server in (("closed", closed), ("silent", silent)):
            monkeypatch.setenv("WANDB_BASE_URL", address(server))
            (folder / name).mkdir()
            runs.append(Tracked(folder / name, "online"))
        closed.close()
        started = time.monotonic()
        for epoch in range(40):
            for run in runs:
                run.log(epoch)
            time.sleep(0.02)
        assert time.monotonic() - started < 13, "one wait for a server takes 15 seconds"
        for run in runs:
            if end == "stopped":
                run.stop(3)
            else:
                run.finish()
    said = warnings_in(capfd.readouterr().err)
    assert len(said) == 2
    for warning, cause in zip(said, ("connection refused", "CommError"), strict=True):
        assert warning.startswith("warning: Weights & Biases is left out from here on (")
        late = f"its copy was not complete after {3 if end == 'stopped' else 60} s"
        assert any(words in warning for words in (cause, late))
        assert "); metrics.jsonl has everything" in warning
    assert not any(KEY in path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


def address(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_online_without_credentials_is_a_warning_not_a_question(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Tracked(folder, "online")
    run.log(0)
    run.finish()
    (warning,) = warnings_in(capfd.readouterr().err)
    assert "No API key configured" in warning


def test_the_program_dying_is_one_warning_at_the_next_epoch(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Tracked(folder)
    run.log(0)
    run.program.kill()
    wait_until(lambda: run.program.status() == "zombie")
    run.log(1)
    (warning,) = warnings_in(capfd.readouterr().err)
    assert "its program was killed by signal 9" in warning
    run.log(2, 3)
    run.finish()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_no_program_at_all_is_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], mode: Any
) -> None:
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    run = Tracked(folder, mode)
    run.log(0)
    run.finish()
    said = warnings_in(capfd.readouterr().err)
    assert len(said) == (mode == "offline")
    assert all("cannot be started" in warning for warning in said)
    assert not (folder / "wandb").exists()


def test_secrets_are_cut_out_of_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    said = without_secrets(f"Post https://me:word@example.org/x?key={KEY}: refused by http://example.org")
    assert said == "Post https://***@example.org/x?key=***: refused by http://example.org"


# ---- online


def test_online_a_continued_run_repeats_nothing_and_the_key_stays_secret(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with WandbServer(RUN_ID) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        run = Tracked(folder, "online")
        run.log(*range(20))
        run.wait_until_copying()
        run.stop()
        again = Tracked(folder, "online", keep=12)
        again.log(*range(12, 25))
        again.finish(weights_sha256="abc")
        by_hand = copy(folder)
    received = [json.loads(line) for line in server.history]
    assert [line["epoch"] for line in received] == list(range(25))
    assert "plots/curves" in received[24]
    assert set(server.artifacts) == {("model", f"model-{RUN_ID}")}
    printed = capfd.readouterr()
    assert printed.err.splitlines() == [f"wandb: {server.url}/me/circles/runs/{RUN_ID}"] * 2
    assert (by_hand.returncode, by_hand.stdout, by_hand.stderr) == (0, printed.err.splitlines()[0] + "\n", "")
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    assert files
    assert not any(KEY in path.read_text(errors="replace") for path in files)


# ---- by hand


def test_a_run_that_was_not_copied_is_copied_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Tracked(folder, "disabled")
    run.log(*range(5))
    run.finish(weights_sha256="abc")
    assert not (folder / "wandb").exists()
    done = copy(folder)
    assert done.stdout == says_where(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert epochs(folder) == list(range(5))
    assert "plots/curves.path" in history(folder)[-1]
    with WandbServer(RUN_ID) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_MODE", "offline")
        done = copy(folder, "--wandb", "online")
        assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line)["epoch"] for line in server.history] == list(range(5))
    assert server.artifacts == [("model", f"model-{RUN_ID}")]
    assert epochs(folder) == list(range(5)), "the offline copy stays"


def test_a_run_directory_sets_no_variable_that_could_load_code_or_send_a_key_away(tmp_path: Path) -> None:
    given = {"LD_PRELOAD": "/x.so", "WANDB_BASE_URL": "http://elsewhere", "PYTHONPATH": "/x", "WANDB_NAME": 7}
    run = {"run_id": RUN_ID, "project": "p", "config": {}, "variables": given}
    (tmp_path / ".wandb.json").write_text(json.dumps(run))
    assert _read_run(tmp_path)["variables"] == {"WANDB_NAME": "7"}


def test_what_is_no_run_is_refused_before_wandb_is_imported(home: Path) -> None:
    (home / "damaged").mkdir()
    (home / "damaged" / ".wandb.json").write_text('{"run_id": ')
    for name, reason in (("missing", "is not a run directory"), ("damaged", "cannot be read")):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "ddp_circles.records.wandb_copy", str(home / name)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert (done.returncode, len(said)) == (2, 1)
        assert said[0].startswith("error: ")
        assert reason in said[0]
        assert "ddp_circles" in imported
        assert not imported & {"torch", "wandb", "numpy", "matplotlib", "sklearn"}


def test_a_run_that_still_trains_and_a_mode_of_disabled_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Tracked(folder, "disabled")
    with FileLock(folder / ".lock"):
        done = copy(folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is still training" in done.stderr
    run.stop()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    done = copy(folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--wandb online" in done.stderr


def test_the_help_names_what_can_be_asked_for() -> None:
    done = copy("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m ddp_circles.records.wandb_copy [-h] [--wandb {auto,online,offline}] RUN_DIR" in done.stdout
    assert "--follow" not in done.stdout


# ---- the reader that these tests rely on


@pytest.mark.parametrize("size", [0, 1, 7, 32740, 32754, 32755, 32756, 32761, 32768, 100_000])
def test_records_of_any_size_are_read_and_a_torn_one_is_not(size: int) -> None:
    contents = [b"first", bytes(range(256)) * (size // 256) + b"x" * (size % 256), b"last"]
    log = _encoded(contents)
    assert list(whole_records(log)) == contents
    assert list(whole_records(log[:-1])) == contents[:2]
    assert list(whole_records(log[:3])) == []


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


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_settings_or_credentials_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (tmp_path / "wandb").mkdir()
    for pipe in ("settings", "wandb/settings", ".netrc", "_netrc"):
        os.mkfifo(tmp_path / pipe)
    assert choose_mode("auto") == "offline"
