"""Where something else than the training fails, the training warns and finishes."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from matplotlib.figure import Figure

from ddp_circles import predict
from ddp_circles.records import wandb_copy, wandb_run
from ddp_circles.verify.__main__ import main as verify
from tests.harness.ranks import Job
from tests.harness.runs import start, status, train_hastily
from tests.harness.tracked import stand_in_for_wandb

TINY = ("--n-samples=125", "--batch-size=16", "--epochs=1", "--checkpoint-seconds=1000")
NAME = "größe 🎉"
NAMES = ("stdin", "stdout", "stderr")


def with_streams(closed: tuple[int, ...], encoding: str, command: Callable[..., None], *flags: object) -> None:
    """Run `command` with standard streams of this `encoding`, some of them closed, as a shell can start it."""
    for number in (1, 2):
        stream = io.TextIOWrapper(io.FileIO(number, "wb", closefd=False), encoding, write_through=True)
        setattr(sys, NAMES[number], None if number in closed else stream)
    for number in closed:
        os.close(number)
    try:
        command(*flags)
    finally:
        assert all(Path(f"/proc/self/fd/{number}").readlink() == Path(os.devnull) for number in closed)


def show_points(run_dir: Path) -> None:
    sys.argv = ["predict", str(run_dir), "--show=2"]
    predict.main()


def check_machine(out: Path) -> None:
    sys.argv = ["verify", "--device=cpu", "--max-bytes=16384", f"--out={out}"]
    verify()


def copy_run(run_dir: Path) -> None:
    sys.argv = ["wandb_copy", "--wandb=offline", str(run_dir)]
    setattr(wandb_run, "wandb", stand_in_for_wandb())  # noqa: B010 - a plain assignment has another type
    wandb_copy.main()


@pytest.mark.parametrize(
    "size, closed, encoding",
    [(1, (1,), "utf-8"), (2, (2,), "utf-8"), (3, (0, 1, 2), "utf-8"), (2, (), "ascii")],
)
def test_closed_streams_and_terminals_of_few_characters(
    tmp_path: Path, size: int, closed: tuple[int, ...], encoding: str
) -> None:
    run_dir, out = tmp_path / NAME, tmp_path / f"{NAME}.json"
    flags = ("--run-dir", run_dir, *TINY, "--wandb=disabled", "--no-plots", "--log-every=1")
    commands = [(train_hastily, size, flags), (show_points, 1, (run_dir,)), (copy_run, 1, (run_dir,))]
    commands += [(check_machine, 2, (out,))] * (len(closed) != 1)  # one row of each kind: it is no cheap program
    for command, ranks, arguments in commands:
        with Job(with_streams, ranks, closed, encoding, command, *arguments) as job:
            outcomes = job.wait(100)
        assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].output
        if 1 not in closed:
            assert outcomes[0].output
        if not closed and command in (train_hastily, check_machine):
            assert r"\U0001f389" in outcomes[0].output, "an escape in place of what cannot be shown"
    assert status(run_dir) == "finished"


def fail_to_draw(*flags: object) -> None:
    with patch.object(Figure, "savefig", side_effect=ZeroDivisionError("in matplotlib")):
        train_hastily(*flags)


@pytest.mark.parametrize("size", [1, 2])
def test_pictures_that_cannot_be_drawn(tmp_path: Path, size: int) -> None:
    with Job(fail_to_draw, size, "--run-dir", tmp_path, *TINY, "--wandb=disabled", "--plots") as job:
        outcomes = job.wait(100)
    assert [outcome.code for outcome in outcomes] == [0] * size, outcomes[0].output
    assert status(tmp_path) == "finished"
    (warning,) = [line for outcome in outcomes for line in outcome.output.splitlines() if "warning: " in line]
    assert warning.startswith(f"warning: no pictures in {tmp_path / 'plots'}: ")


def test_a_notebooks_backend_that_is_missing_here(tmp_path: Path) -> None:
    backend = "module://matplotlib_inline.backend_inline"
    with start(1, tmp_path, *TINY, "--plots", variables={"MPLBACKEND": backend}) as job:
        (outcome,) = job.wait(100)
    assert (outcome.code, status(tmp_path)) == (0, "finished"), outcome.output
    assert "warning" not in outcome.output
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["curves.png", "decision_boundary.png"]


@pytest.mark.parametrize("size", [0, 1])
def test_a_network_card_that_one_process_does_not_need(tmp_path: Path, size: int) -> None:
    with start(size, tmp_path, *TINY, variables={"GLOO_SOCKET_IFNAME": "eth77"}) as job:
        (outcome,) = job.wait(100)
    assert (outcome.code, status(tmp_path)) == (0, "finished"), outcome.output
