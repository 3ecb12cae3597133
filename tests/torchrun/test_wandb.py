"""The copy at Weights & Biases has every epoch once, and whatever its server does, the training goes its way."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddp_circles.records.metrics_file import Row, read_rows
from ddp_circles.terminal import beside_python
from tests.harness.runs import PROJECT, metrics, start, status, torchrun
from tests.harness.tracked import wait_until, wait_until_none_at
from tests.harness.wandb_log import epochs, only_folder

EPOCHS = 8
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def home(tmp_path: Path) -> Iterator[Path]:
    """A home for the trainers without credentials, in which no process may be left."""
    folder = tmp_path / "home"
    folder.mkdir()
    yield folder
    wait_until_none_at(folder)


def train(tmp_path: Path, *flags: object, options: tuple[str, ...] = (), **variables: str) -> str:
    """Train under torchrun on two ranks; returns what was printed. The run must finish with whole metrics."""
    flags = ("--n-samples=200", f"--epochs={EPOCHS}", "--log-every=1", *flags)
    (tmp_path / "notes").mkdir()
    variables |= {
        "HOME": str(tmp_path / "home"),
        "NETRC": str(tmp_path / "home" / ".netrc"),
        "NOTES": str(tmp_path / "notes"),
        "PYTHONPATH": os.pathsep.join([str(PROJECT / "tests" / "harness" / "note_imports"), str(PROJECT)]),
    }
    with torchrun(tmp_path / "log", 2, tmp_path / "run", *flags, options=options, variables=variables) as command:
        assert command.wait(200) == 0, command.output
        said = command.output
    assert status(tmp_path / "run") == "finished", said
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == list(range(EPOCHS))
    assert [line.split()[1] for line in said.splitlines() if line.startswith("Epoch: ")][-1] == str(EPOCHS - 1)
    return said


def warnings_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if "warning: " in line]


def notes(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "notes").iterdir()}


@pytest.mark.timeout(300)
def test_three_kills_and_other_sizes_leave_one_folder_with_each_epoch_once(tmp_path: Path, home: Path) -> None:
    run_dir = tmp_path / "run"
    flags = ("--wandb=offline", "--n-samples=200", "--batch-size=16", "--checkpoint-steps=150")
    folders: set[Path] = set()
    for size in (2, 1, 3):
        more = len(lines(run_dir)) + 20
        with start(size, run_dir, *flags, "--epochs=1000000", variables={"HOME": str(home)}) as job:
            wait_until(lambda: len(lines(run_dir)) > more and bool(folders_of(run_dir) - folders), 100)  # noqa: B023
            job.signal(signal.SIGKILL, 0)
        folders |= folders_of(run_dir)
    wait_until_none_at(home)
    assert epochs(run_dir) == [line["epoch"] for line in lines(run_dir)]
    total = len(lines(run_dir)) + 20
    with start(2, run_dir, *flags, f"--epochs={total}", variables={"HOME": str(home)}) as job:
        outcomes = job.wait(100)
    for outcome in outcomes:
        assert outcome.code == 0, outcome.output
        assert warnings_in(outcome.output) == []
    assert [line["epoch"] for line in lines(run_dir)] == list(range(total))
    assert epochs(run_dir) == list(range(total))
    assert only_folder(run_dir) not in folders


def lines(run_dir: Path) -> list[Row]:
    return read_rows(run_dir / "metrics.jsonl")


def folders_of(run_dir: Path) -> set[Path]:
    return set(run_dir.glob("wandb/offline-run-*"))


@pytest.mark.timeout(240)
def test_without_an_account_rank_0_alone_tracks_offline(tmp_path: Path) -> None:
    said = train(tmp_path, "--wandb=auto", "--plots")
    assert epochs(tmp_path / "run") == list(range(EPOCHS))
    assert warnings_in(said) == []
    assert said.count(f"wandb: offline; to upload: {beside_python('wandb')} sync ") == said.count("wandb:") == 1
    assert notes(tmp_path) >= {"0-training", "1-training", "0-tracking", "0-tracking-wandb", "0-training-matplotlib"}
    assert "0-training-wandb" not in notes(tmp_path)
    others = ("1-training-", "1-tracking", "launcher-training-")
    assert not [note for note in notes(tmp_path) if note.startswith(others)]


@pytest.mark.thorough
@pytest.mark.timeout(240)
def test_with_neither_tracking_nor_plots_no_process_imports_either(tmp_path: Path) -> None:
    said = train(tmp_path)
    assert warnings_in(said) == []
    assert notes(tmp_path) == {"launcher-training", "0-training", "0-training-sklearn", "1-training"}
    assert not (tmp_path / "run" / "wandb").exists()


@pytest.mark.thorough
@pytest.mark.timeout(240)
@pytest.mark.parametrize("server", ["closed", "silent"])
def test_a_server_that_is_down_costs_a_warning(tmp_path: Path, server: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if server == "closed":
            listener.close()
        started = time.monotonic()
        said = train(tmp_path, "--wandb=auto", WANDB_API_KEY=KEY, WANDB_BASE_URL=address)
        assert time.monotonic() - started < 150
    (warning,) = warnings_in(said)
    assert "Weights & Biases is left out" in warning
    assert KEY not in said


@pytest.mark.thorough
@pytest.mark.timeout(240)
def test_a_restart_by_the_launcher_goes_on_in_the_same_tracked_run(tmp_path: Path) -> None:
    flags = ("--wandb=offline", "--checkpoint-steps=10", "--batch-size=16", "--fault=kill@0:47")
    train(tmp_path, *flags, options=("--max-restarts=1",))
    assert only_folder(tmp_path / "run")
    assert epochs(tmp_path / "run") == list(range(EPOCHS))
