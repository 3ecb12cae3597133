"""Names and texts from outside, in real runs: none controls the terminal, none begins a line, none leads elsewhere."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from ddp_circles.records import run_dir as run_dirs
from ddp_circles.records.checkpoint import Checkpoints, State, encode
from tests.harness.ranks import Job, Outcome
from tests.harness.runs import QUIET, newest_state, run, start, status, train_hastily
from tests.unit.test_terminal import control

TINY = ("--n-samples=125", "--batch-size=16", "--epochs=1", "--checkpoint-seconds=1000")
EVIL = "\x1b]0;owned\x07\x1b[2J\u202eevil\nPASSED\x9b31m"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\u202eevil\nPASSED\x9b31m"


def check(outcomes: list[Outcome], begin: str) -> None:
    """Nothing controls a terminal, and the text is in one line, which begins with `begin`."""
    assert not [one for outcome in outcomes for one in control(outcome.output)]
    assert not any("Traceback" in outcome.output for outcome in outcomes)
    shown = (SHOWN, SHOWN.replace(r"\n", " "))
    lines = [line for outcome in outcomes for line in outcome.output.splitlines() if any(one in line for one in shown)]
    assert lines, outcomes[0].output
    assert all(line.startswith(begin) for line in lines), lines


def train_impatiently(*flags: object) -> None:
    run_dirs.LOCK_WAIT_SECONDS = 0.2
    train_hastily(*flags)


def test_the_holder_of_a_directory(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"):
        (tmp_path / ".lock.holder").write_text(f"process 7 on {EVIL}")
        with Job(train_impatiently, 2, "--run-dir", tmp_path, *QUIET, *TINY) as job:
            outcomes = job.wait(60)
    assert not [one for outcome in outcomes for one in control(outcome.output)]
    assert r"is in use by process 7 on \x1b]0;owned\x07\x1b[2J\u202eevil: wait for it" in outcomes[0].output
    assert "PASSED" not in outcomes[0].output


def change(state: State, what: str) -> None:
    if what == "setting":
        state["settings"]["lr"] = EVIL
    elif what == "tensor":
        state["model"][EVIL] = torch.zeros(1)
    else:
        state["fingerprint"]["torch"] = EVIL


@pytest.mark.parametrize(
    "what, begin, size", [("setting", "error: ", 1), ("tensor", "error: ", 2), ("fingerprint", "warning: ", 3)]
)
def test_texts_in_a_checkpoint(tmp_path: Path, what: str, begin: str, size: int) -> None:
    run(1, tmp_path, *TINY)
    state = newest_state(tmp_path)
    change(state, what)
    Checkpoints(tmp_path / "checkpoints").files()[0].write_bytes(encode(state))
    outcomes = run(size, tmp_path, *TINY, "--epochs=2")
    assert {outcome.code for outcome in outcomes} == {0 if begin == "warning: " else 2}
    check(outcomes, begin)


def test_names_of_files_and_of_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / EVIL
    run(1, run_dir, *TINY)
    (run_dir / "checkpoints" / f"step-9{EVIL}.checkpoint").write_bytes(b"")
    (run_dir / "metrics.jsonl").write_bytes(b"")
    (outcome,) = run(1, run_dir, *TINY, "--epochs=2")
    assert not control(outcome.output)
    assert r"is passed over: " in outcome.output
    assert rf"step-9{SHOWN}.checkpoint is passed over" in outcome.output
    assert rf"{tmp_path}/{SHOWN}/metrics.jsonl is not as the run left it" in outcome.output
    assert status(run_dir) == "finished"


def test_a_verdict_in_the_store(tmp_path: Path) -> None:
    with start(2, tmp_path, *TINY, "--epochs=1000000") as job:
        job.wait_until(lambda: "start: " in job.output(0))
        job._store.set("torchrun's job test of 2 ranks, start 0, world 0/verdict", EVIL)
        job.signal(signal.SIGKILL, 1)
        outcomes = job.wait(60)
    assert outcomes[0].code == 1
    check(outcomes, "rank 0: ")


# ---- names that become paths


def train_in(folder: Path, *flags: object) -> None:
    os.chdir(folder)
    train_hastily(*flags)


def train_named(folder: Path, size: int, **environment: str) -> list[Outcome]:
    folder.mkdir(parents=True)
    with Job(train_in, size, folder, *QUIET, *TINY, environment=environment) as job:
        return job.wait(60)


@pytest.mark.parametrize(
    "variables, size",
    [
        ({"TORCHELASTIC_RUN_ID": "../../x"}, 1),
        ({"TORCHELASTIC_RUN_ID": "../../x"}, 2),
        ({"TORCHELASTIC_RUN_ID": "/tmp/x"}, 3),
        ({"TORCHELASTIC_RUN_ID": ".."}, 1),
        ({"TORCHELASTIC_RUN_ID": "."}, 1),
        ({"TORCHELASTIC_RUN_ID": "x/"}, 1),
        ({"TORCHELASTIC_RUN_ID": "a/../b"}, 1),
        ({"TORCHELASTIC_RUN_ID": EVIL}, 1),
        ({"TORCHELASTIC_RUN_ID": "none", "SLURM_JOB_ID": "../7"}, 2),
    ],
)
def test_a_launchers_id_leads_nowhere_else(tmp_path: Path, variables: dict[str, Any], size: int) -> None:
    outcomes = train_named(tmp_path / "a" / "b", size, **variables)
    assert [outcome.code for outcome in outcomes] == [2] * size, outcomes[0].output
    (line,) = outcomes[0].output.splitlines()
    assert line.startswith("error: the launch's id '")
    assert "give --run-dir, or torchrun another --rdzv-id" in line
    assert not control(line)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["a", "a/b"]


def test_any_plain_name_names_the_folder(tmp_path: Path) -> None:
    name = "Größe 7, lr=0.1:~x"
    (outcome,) = train_named(tmp_path / "a", 1, TORCHELASTIC_RUN_ID=name)
    assert outcome.code == 0, outcome.output
    assert status(tmp_path / "a" / "runs" / name) == "finished"
