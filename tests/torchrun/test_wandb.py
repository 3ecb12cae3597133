"""Under torchrun, Weights & Biases gets every epoch once, and whatever its server does, the training goes its way."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ddp_circles.records import metrics_file as tracking

ROOT = Path(__file__).parents[2]
EPOCHS = 8
NOTE_IMPORTS = """
import os, sys
HEAVY = {"wandb", "matplotlib", "sklearn"}
ROLE = "tracking" if "serve()" in " ".join(sys.orig_argv) else "training"
def note(event, arguments):
    if event == "import" and arguments[0] in HEAVY:
        name = "-".join([os.environ.get("RANK", "launcher"), ROLE, arguments[0]])
        open(os.path.join(os.environ["NOTES"], name), "w").close()
sys.addaudithook(note)
open(os.path.join(os.environ["NOTES"], "-".join([os.environ.get("RANK", "launcher"), ROLE])), "w").close()
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A home without credentials, and processes that note which heavy modules they import."""
    for folder in ("home", "notes", "site"):
        (tmp_path / folder).mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NOTE_IMPORTS)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    return kept | {
        "HOME": str(tmp_path / "home"),
        "NOTES": str(tmp_path / "notes"),
        "PYTHONPATH": str(tmp_path / "site"),
    }


@pytest.fixture(autouse=True)
def _nothing_is_left(environment: dict[str, str]) -> Iterator[None]:
    yield
    deadline = time.monotonic() + 10
    while left := _processes_at(environment["HOME"]):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def _processes_at(home: str) -> list[str]:
    """The command lines of all processes, orphans included, that this test has started."""
    found = psutil.process_iter(["environ", "status", "cmdline"])
    return [
        " ".join(process.info["cmdline"] or ())
        for process in found
        if process.info["status"] != psutil.STATUS_ZOMBIE and (process.info["environ"] or {}).get("HOME") == home
    ]


def train(
    run_dir: Path, environment: dict[str, str], *flags: str, launch: tuple[str, ...] = (), epochs: int = EPOCHS
) -> str:
    """Train on two ranks; what they and the launcher say. Fails unless the run finishes with whole metrics."""
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += ["--nproc_per_node=2", *launch, "-m", "ddp_circles.train", "--run-dir", str(run_dir)]
    command += ["--n-samples", "200", "--epochs", str(epochs), "--log-every", "1", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=200
    )
    assert done.returncode == 0, done.stdout
    assert (run_dir / "status").read_text() == "finished\n", done.stdout
    assert [row["epoch"] for row in tracking.read_rows(run_dir / "metrics.jsonl")] == list(range(epochs))
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("Epoch: ")][-1] == str(epochs - 1)
    return done.stdout


def warnings_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if "warning: " in line]


def notes(environment: dict[str, str]) -> set[str]:
    return {path.name for path in Path(environment["NOTES"]).iterdir()}


def tracked_epochs(run_dir: Path) -> list[int]:
    """The epochs in the files of wandb's, which must be of one run, in the order they were logged."""
    from wandb.proto import wandb_internal_pb2

    found = []
    logs = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({log.name for log in logs}) == 1
    for log in logs:
        for content in tracking._log_records(log.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(content)  # type: ignore[attr-defined]
            items = {".".join(item.nested_key): item.value_json for item in record.history.item}
            found += [json.loads(items["epoch"])] if items else []
    return found


@pytest.mark.timeout(240)
def test_without_an_account_rank_0_alone_tracks_offline(tmp_path: Path, environment: dict[str, str]) -> None:
    said = train(tmp_path / "run", environment)
    assert tracked_epochs(tmp_path / "run") == list(range(EPOCHS))
    assert warnings_in(said) == []
    assert said.count("wandb:") == 1
    assert notes(environment) >= {"0-training", "1-training", "0-tracking", "0-tracking-wandb", "0-training-matplotlib"}
    assert not {
        note for note in notes(environment) if note.startswith(("1-training-", "1-tracking", "launcher-training-"))
    }
    assert "0-training-wandb" not in notes(environment)


@pytest.mark.timeout(240)
def test_with_neither_tracking_nor_plots_no_process_imports_either(tmp_path: Path, environment: dict[str, str]) -> None:
    said = train(tmp_path / "run", environment, "--wandb", "disabled", "--no-plots")
    assert warnings_in(said) == []
    assert notes(environment) == {"launcher-training", "0-training", "0-training-sklearn", "1-training"}
    assert not (tmp_path / "run" / "wandb").exists()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("server", ["closed", "silent"])
def test_a_server_that_is_down_costs_a_warning(tmp_path: Path, environment: dict[str, str], server: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        environment["WANDB_API_KEY"] = "0123456789abcdef0123456789abcdef01234567"
        environment["WANDB_BASE_URL"] = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if server == "closed":
            listener.close()
        started = time.monotonic()
        said = train(tmp_path / "run", environment)
        assert time.monotonic() - started < 60
    (warning,) = warnings_in(said)
    assert "Weights & Biases is left out" in warning
    assert environment["WANDB_API_KEY"] not in said


@pytest.mark.timeout(300)
def test_restarts_go_on_in_the_same_tracked_run(tmp_path: Path, environment: dict[str, str]) -> None:
    flags = ("--wandb", "offline", "--no-plots", "--checkpoint-steps", "10", "--batch-size", "16")
    said = train(tmp_path / "run", environment, *flags, "--fault", "kill@0:47", launch=("--max-restarts=1",))
    assert said.count("wandb:") >= 1
    assert tracked_epochs(tmp_path / "run") == list(range(EPOCHS))
    train(tmp_path / "run", environment, *flags, epochs=EPOCHS + 4)
    assert tracked_epochs(tmp_path / "run") == list(range(EPOCHS + 4))
