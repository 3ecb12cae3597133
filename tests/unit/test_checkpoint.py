"""Checkpoints and the run directory: atomic writes, damage detected, one writer at a time."""

import errno
import fcntl
import hashlib
import itertools
import os
import pickle
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddp_circles.errors import FileError, RunDirTakenError, UserError
from ddp_circles.plain import to_bytes
from ddp_circles.records import checkpoint as checkpoint_module
from ddp_circles.records import run_dir as run_dir_module
from ddp_circles.records.checkpoint import FORM, KEEP, VERSION, Checkpoints, decode, encode
from ddp_circles.records.files import sweep, write_atomically
from ddp_circles.records.run_dir import RunDir
from tests.harness.ranks import Job

STATE: dict[str, Any] = {
    "model": {"weight": torch.tensor([1.0, -0.0, torch.inf, 1e-45])},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
    "scheduler": {"state": {"last_epoch": 10, "base_lrs": [0.1]}, "rates": [0.05]},
    "settings": {"hidden": (10, 10), "dataset": "circles"},
    "fingerprint": {"torch": "2.13.0"},
    "tracking_id": "abcd1234",
    "starts": ["job 7"],
    "audits": 3,
    "epoch": 1,
    "step": 3,
    "global_step": 10,
    "train": [{"loss": 2**70, "accuracy": -5}, 7],
    "metrics": {"epoch": 0, "train/loss": 0.5},
    "metrics_seal": {"bytes": 0, "sha256": ""},
    "train_seconds": 1.5,
}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    """Three checkpoints, after steps 10, 20 and 30."""
    made = Checkpoints(tmp_path)
    for step in (10, 20, 30):
        made.save(STATE | {"global_step": step}, step)
    return made


def test_decoding_restores_every_bit() -> None:
    state = decode(encode(STATE))
    weight = state["model"].pop("weight")
    assert weight.numpy().tobytes() == STATE["model"]["weight"].numpy().tobytes()
    assert state["optimizer"]["param_groups"] == STATE["optimizer"]["param_groups"]
    names = STATE.keys() - {"model", "optimizer"}
    assert {name: state[name] for name in names} == {name: STATE[name] for name in names}


CONTENT = encode(STATE)


@settings(deadline=None)
@given(position=st.integers(0, len(CONTENT) - 1), bit=st.integers(0, 7))
def test_one_flipped_bit_is_detected(position: int, bit: int) -> None:
    damaged = bytearray(CONTENT)
    damaged[position] ^= 1 << bit
    with pytest.raises(ValueError, match="checksum does not match"):
        decode(bytes(damaged))


@settings(deadline=None)
@given(length=st.integers(0, len(CONTENT) - 1))
def test_a_truncated_file_is_detected(length: int) -> None:
    with pytest.raises(ValueError, match="cut short or damaged"):
        decode(CONTENT[:length])


def with_checksum(body: bytes) -> bytes:
    rest = len(body).to_bytes(8) + body
    return hashlib.sha256(rest).digest() + rest


@settings(deadline=None)
@given(body=st.binary(max_size=200))
def test_other_bytes_are_refused_although_their_checksum_is_right(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"it holds something other|it is not a checkpoint"):
        decode(with_checksum(body))


class Malicious:
    """An object that makes a directory when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("how", ["pickle", "torch"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_malicious_checkpoint_is_refused_and_never_executed(tmp_path: Path, how: str, nested: bool) -> None:
    trap = tmp_path / "trap"
    poison: Any = STATE | {"model": {"weight": Malicious(trap)}} if nested else Malicious(trap)
    body = pickle.dumps(poison)
    if how == "torch":
        torch.save(poison, tmp_path / "poison")
        body = (tmp_path / "poison").read_bytes()
    with pytest.raises(ValueError, match="it holds something other than tensors and plain values"):
        decode(with_checksum(body))
    with pytest.raises(ValueError, match="checksum"):
        decode(body)
    assert not trap.exists()


def test_values_that_are_not_plain_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="something other than tensors and plain values"):
        decode(encode({"path": tmp_path}))
    with pytest.raises(ValueError, match="not a checkpoint of this package"):
        decode(with_checksum(to_bytes([1, 2])))


# ---- checkpoint files


def test_the_last_few_are_kept(checkpoints: Checkpoints) -> None:
    for step in (40, 50):
        checkpoints.save(STATE, step)
    assert [path.name for path in checkpoints.files()] == [f"step-{step:012d}.checkpoint" for step in (50, 40, 30)]
    assert len(list(checkpoints.folder.iterdir())) == KEEP


def test_the_newest_is_loaded(checkpoints: Checkpoints) -> None:
    state, warnings = checkpoints.load_newest()
    assert state["global_step"] == 30
    assert warnings == []


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "malicious", "folder", "pipe", "huge", "link to nowhere"])
@pytest.mark.parametrize("count", [1, 2])
def test_damaged_checkpoints_are_named_and_skipped(checkpoints: Checkpoints, damage: str, count: int) -> None:
    damaged = checkpoints.files()[:count]
    for path in damaged:
        spoil(path, damage)
    state, warnings = checkpoints.load_newest()
    assert state["global_step"] == 30 - 10 * count
    assert [f"{path} is passed over" in warning for path, warning in zip(damaged, warnings, strict=True)] == [
        True
    ] * count
    assert not (checkpoints.folder / "trap").exists()


def spoil(path: Path, damage: str) -> None:
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flip":
        path.write_bytes(content[:100] + bytes([content[100] ^ 4]) + content[101:])
    elif damage == "malicious":
        path.write_bytes(with_checksum(pickle.dumps(Malicious(path.parent / "trap"))))
    elif damage == "huge":
        os.truncate(path, 60 * 2**30)
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
        elif damage == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/nowhere")


def test_where_all_are_damaged_each_is_named(checkpoints: Checkpoints) -> None:
    for path in checkpoints.files():
        spoil(path, "empty")
    state, warnings = checkpoints.load_newest()
    assert state == {}
    assert all(str(path) in warning for path, warning in zip(checkpoints.files(), warnings, strict=True))


def test_of_many_damaged_ones_the_first_are_named_and_the_others_counted(checkpoints: Checkpoints) -> None:
    for number in range(1_500):
        (checkpoints.folder / f"step-{10**6 + number}.checkpoint").touch()
    state, warnings = checkpoints.load_newest()
    assert state["global_step"] == 30
    assert warnings[-1] == "so are 1,497 more checkpoints"
    assert sum(map(len, warnings)) < 1000


def test_later_checkpoints_that_were_passed_over_do_not_take_the_place_of_good_ones(checkpoints: Checkpoints) -> None:
    for step in range(10**6, 10**6 + KEEP):
        (checkpoints.folder / f"step-{step:012d}.checkpoint").touch()
    for step in (40, 50, 60):
        checkpoints.save(STATE | {"global_step": step}, step)
    assert checkpoints.load_newest()[0]["global_step"] == 60
    assert len(checkpoints.files()) == 2 * KEEP


# ---- checkpoints that are whole and hold something else

WRONG: list[tuple[str, Any]] = [
    ("model", [1.0]),
    ("optimizer", None),
    ("scheduler", None),
    ("settings", {1: 2}),
    ("fingerprint", {"torch": 2}),
    ("tracking_id", None),
    ("starts", "job 7"),
    ("starts", [7]),
    ("audits", 1.5),
    ("epoch", 1.0),
    ("step", True),
    ("global_step", "10"),
    ("train", [{"loss": 1}]),
    ("train", [{"loss": 0.5}, 7]),
    ("metrics", {"train/loss": "0.5"}),
    ("metrics_seal", {"bytes": 7}),
    ("train_seconds", torch.tensor(1.5)),
]


def test_every_field_is_checked() -> None:
    assert {name for name, _ in WRONG} == STATE.keys() == FORM.keys()


@pytest.mark.parametrize("name, value", WRONG, ids=str)
@pytest.mark.parametrize("missing", [False, True])
def test_a_field_that_is_missing_or_malformed_is_named(name: str, value: Any, missing: bool) -> None:
    state = {key: STATE[key] for key in STATE if key != name} if missing else STATE | {name: value}
    with pytest.raises(ValueError, match=f"its field '{name}' is missing or malformed"):
        decode(encode(state))


def test_fields_of_a_later_use_are_no_damage() -> None:
    assert decode(encode(STATE | {"average": {}})).keys() == STATE.keys() | {"average"}


@pytest.mark.parametrize("version", [VERSION + 1, None])
def test_another_version_ends_the_search(checkpoints: Checkpoints, version: int | None) -> None:
    damaged, other, _ = checkpoints.files()
    damaged.write_bytes(b"")
    other.write_bytes(encode(STATE | {"version": version}))
    state, warnings = checkpoints.load_newest()
    assert state == {}
    assert [path.name in warning for path, warning in zip((damaged, other), warnings, strict=True)] == [True, True]
    assert "another version of this package wrote it" in warnings[1]


def test_an_empty_folder_is_no_error(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).load_newest() == ({}, [])


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_save_changes_nothing(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {path: path.read_bytes() for path in checkpoints.files()}
    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(STATE, 40)
    assert {path: path.read_bytes() for path in checkpoints.folder.iterdir()} == before


def write_and_die(path: Path, content: bytes, call: str, count: int) -> None:
    """Write `path`, and kill this process just before the `count`th call of `os.call`."""
    original, calls = getattr(os, call), itertools.count(1)

    def counted(*arguments: Any) -> Any:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(os, call, counted)
    write_atomically(path, content)


@pytest.mark.parametrize("call, count", [("fsync", 1), ("replace", 1), ("fsync", 2)])
def test_a_killed_save_leaves_every_file_readable(checkpoints: Checkpoints, call: str, count: int) -> None:
    newest = checkpoints.files()[0]
    with Job(write_and_die, 1, newest, encode(STATE | {"global_step": 31}), call, count) as job:
        (outcome,) = job.wait(30)
    assert outcome.code == -signal.SIGKILL
    renamed = count == 2
    assert [decode(path.read_bytes())["global_step"] for path in checkpoints.files()] == [31 if renamed else 30, 20, 10]
    assert len(list(checkpoints.folder.iterdir())) == (KEEP if renamed else KEEP + 1)
    sweep(checkpoints.folder)
    assert sorted(checkpoints.folder.iterdir()) == sorted(checkpoints.files())


# ---- the run directory


def test_a_second_writer_is_refused_by_name_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir_module, "LOCK_WAIT_SECONDS", 0.1)
    run_dir = RunDir(tmp_path)
    with ExitStack() as first, ExitStack() as second:
        run_dir.open(first)
        with pytest.raises(UserError, match=rf"--run-dir {tmp_path} is in use by process {os.getpid()} on \S+: wait"):
            run_dir.open(second)
        first.close()
        run_dir.open(second)


def test_an_unnamed_holder_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir_module, "LOCK_WAIT_SECONDS", 0.1)
    run_dir = RunDir(tmp_path)
    with ExitStack() as at_end:
        run_dir.open(at_end)
        (tmp_path / ".lock.holder").unlink()
        with pytest.raises(UserError, match="is in use by another process"):
            run_dir.open(at_end)


def answer(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Let the file system answer every request for a lock with `error`."""

    def flock(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_without_flock_a_lock_of_a_host_that_is_gone_can_be_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_dir_module, "LOCK_WAIT_SECONDS", 0.1)
    answer(monkeypatch, errno.ENOSYS)
    with ExitStack() as at_end:
        RunDir(tmp_path).open(at_end)
        marker = (tmp_path / ".lock").read_text()
    with ExitStack() as at_end:
        RunDir(tmp_path).open(at_end)  # it is free again
    elsewhere = marker.replace(socket.gethostname(), "elsewhere")
    assert elsewhere != marker
    (tmp_path / ".lock").write_text(elsewhere)
    (tmp_path / ".lock.holder").write_text("process 7 on elsewhere\n0123\n")
    with ExitStack() as at_end:
        with pytest.raises(UserError, match=r"is in use by process 7 on elsewhere: .* remove ") as refused:
            RunDir(tmp_path).open(at_end)
        assert f"remove {tmp_path / '.lock'}" in str(refused.value)
        (tmp_path / ".lock").unlink()
        RunDir(tmp_path).open(at_end)


@pytest.mark.parametrize("error", [errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_that_refuses_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    answer(monkeypatch, error)
    with ExitStack() as at_end, pytest.raises(UserError, match=r"/\.lock: it cannot be locked: "):
        RunDir(tmp_path).open(at_end)


def test_only_what_a_run_has_written_names_a_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir_module, "LOCK_WAIT_SECONDS", 0.1)
    with ExitStack() as at_end:
        RunDir(tmp_path).open(at_end)
        (tmp_path / "secret").write_text("root:x:0:0\n")
        (tmp_path / ".lock.holder").unlink()
        (tmp_path / ".lock.holder").symlink_to(tmp_path / "secret")
        with pytest.raises(UserError, match="is in use by another process: ") as refused:
            RunDir(tmp_path).open(at_end)
    assert "root:x" not in str(refused.value)


@pytest.mark.parametrize("word", ["", "fini", "finished for ever"])
def test_an_odd_status_beside_checkpoints_is_no_foreign_folder(tmp_path: Path, word: str) -> None:
    run_dir = RunDir(tmp_path)
    (tmp_path / "status").write_text(word)
    (tmp_path / "config.toml").write_text("lr = 1\n")
    with ExitStack() as at_end, pytest.raises(UserError, match="would overwrite"):
        run_dir.open(at_end)
    run_dir.checkpoints.folder.mkdir()
    (run_dir.checkpoints.folder / "step-000000000007.checkpoint").touch()
    with ExitStack() as at_end:
        run_dir.open(at_end)
    assert run_dir.status is None


def test_a_word_is_written_over_the_old_one_where_there_is_no_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(tmp_path)

    def fail(path: Path, _content: bytes) -> None:
        raise FileError(errno.ENOSPC, "No space left on device", str(path))

    with ExitStack() as at_end:
        run_dir.open(at_end)
        run_dir.set_status("running")
        monkeypatch.setattr(run_dir_module, "write_atomically", fail)
        for word in ("failed", "stopped"):
            run_dir.set_status(word)
            assert (tmp_path / "status").read_text() == f"{word}\n"
        (tmp_path / "status").unlink()
        with pytest.raises(FileError, match="status: No space left on device"):
            run_dir.set_status("failed")
        (tmp_path / "status").write_text("running\n")
        lose(tmp_path, "taken")
        with pytest.raises(RunDirTakenError):
            run_dir.set_status("failed")
        assert (tmp_path / "status").read_text() == "running\n"


def test_a_directory_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with ExitStack() as at_end, pytest.raises(UserError, match=r"--run-dir .*file/run cannot be written"):
        RunDir(tmp_path / "file" / "run").open(at_end)


def test_opening_removes_leftovers_of_killed_writes(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for name in (".status.a1b2c3d4.partial", ".metrics.jsonl.a1b2c3d4.partial", "checkpoints/.step-1.a1b2c3d4.partial"):
        (tmp_path / name).write_text("run")
    with ExitStack() as at_end:
        run_dir.open(at_end)
        run_dir.set_status("running")
    assert run_dir.status == "running"
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".lock.holder", "checkpoints", "status"}
    assert list(run_dir.checkpoints.folder.iterdir()) == []


def test_an_unknown_status_is_none(tmp_path: Path) -> None:
    assert RunDir(tmp_path).status is None


def test_clearing_removes_an_earlier_run(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    with ExitStack() as at_end:
        run_dir.open(at_end)
        run_dir.checkpoints.save(STATE, 1)
        for name in ("metrics.jsonl", "model.safetensors", "summary.json", "fault"):
            (tmp_path / name).write_text("old")
        run_dir.set_status("finished")
        run_dir.clear()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".lock.holder", "checkpoints", "status"}
    assert run_dir.status == "running"  # it finished nothing that is still there
    assert list(run_dir.checkpoints.folder.iterdir()) == []


# ---- a folder that is no longer this run's


def lose(folder: Path, how: str) -> None:
    if how == "removed":
        (folder / ".lock.holder").unlink()
    else:
        (folder / ".lock.holder").write_text("process 7 on elsewhere\n0123\n")


@pytest.mark.parametrize("how, said", [("removed", "removed"), ("taken", r"taken by another run \(process 7 on elsew")])
def test_nothing_is_written_once_the_folder_is_anothers(tmp_path: Path, how: str, said: str) -> None:
    run_dir = RunDir(tmp_path)
    writes: list[Callable[[], object]] = [
        lambda: run_dir.set_status("failed"),
        lambda: run_dir.write("config.toml", "lr = 1"),
        lambda: run_dir.write_model({"weight": torch.ones(1)}),
        lambda: run_dir.checkpoints.save(STATE, 5),
        run_dir.clear,
    ]
    with ExitStack() as at_end:
        run_dir.open(at_end)
        for step in range(1, 5):
            run_dir.checkpoints.save(STATE, step)
        lose(tmp_path, how)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for write in writes:
            with pytest.raises(RunDirTakenError, match=f"--run-dir {tmp_path} was {said}"):
                write()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_lost_while_a_checkpoint_is_written_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(tmp_path)
    with ExitStack() as at_end:
        run_dir.open(at_end)
        for step in range(1, KEEP + 1):
            run_dir.checkpoints.save(STATE, step)

        def write_and_lose(path: Path, content: bytes) -> None:
            write_atomically(path, content)
            lose(tmp_path, "taken")

        monkeypatch.setattr(checkpoint_module, "write_atomically", write_and_lose)
        with pytest.raises(RunDirTakenError):
            run_dir.checkpoints.save(STATE, KEEP + 1)
    assert len(run_dir.checkpoints.files()) == KEEP + 1  # nothing was pruned


def test_a_new_start_in_the_same_process_takes_the_folder(tmp_path: Path) -> None:
    first, second = RunDir(tmp_path), RunDir(tmp_path)
    with ExitStack() as at_end:
        first.open(at_end)
        first.check()
    with ExitStack() as at_end:
        second.open(at_end)
        second.check()
        with pytest.raises(RunDirTakenError, match="taken by another run"):
            first.check()


@pytest.mark.parametrize("name", [".lock", ".lock.holder", "status", "config.toml", "model.safetensors"])
def test_no_link_is_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    run_dir = RunDir(tmp_path / "run")
    with ExitStack() as at_end, suppress(UserError):
        run_dir.open(at_end)
        run_dir.set_status("running")
        run_dir.write("config.toml", "lr = 1")
        run_dir.write_model({"weight": torch.ones(1)})
        assert not (tmp_path / "run" / name).is_symlink()
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["status", ".lock.holder"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with ExitStack() as at_end, suppress(UserError):
        RunDir(tmp_path).open(at_end)
