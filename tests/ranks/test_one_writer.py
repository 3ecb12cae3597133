"""A run whose directory was removed ends, and leaves alone what another run has put there since."""

import shutil
import signal
from pathlib import Path

import pytest

from ddp_circles.records.checkpoint import Checkpoints
from tests.harness.ranks import Job
from tests.harness.runs import PLAIN, Bits, bits, checkpoint_steps, finish, start, status

TINY = ("--n-samples=125", "--batch-size=16", "--epochs=30", "--checkpoint-steps=2", "--checkpoint-seconds=1000")
ENDLESS = (*TINY, "--epochs=1000000", "--seed=7")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Bits:
    """The bits of a run that nobody disturbs."""
    return finish(PLAIN, tmp_path_factory.mktemp("alone"), *TINY)


def hold_while_training(job: Job, run_dir: Path) -> None:
    """Wait for some steps, then stop all ranks where they are."""
    job.wait_until(lambda: bool(checkpoint_steps(run_dir)) and checkpoint_steps(run_dir)[0] > 10)
    job.signal(signal.SIGSTOP)


def check_end(job: Job, run_dir: Path, how: str) -> None:
    """The end of a run that has lost its directory: one message, and no rank left over."""
    outcomes = job.wait(60)
    assert [outcome.code for outcome in outcomes] == [1] * len(outcomes), outcomes[0].output
    message = f"rank 0: --run-dir {run_dir} was {how} while this run was training: it ends here"
    assert [line for line in outcomes[0].output.splitlines() if "was " in line] == [message]
    assert all("Traceback" not in outcome.output for outcome in outcomes)
    assert all("raised RunDirTakenError, last seen in " in outcome.output for outcome in outcomes[1:])


@pytest.mark.parametrize("size", [PLAIN, 1, 2, 3])
def test_the_run_before_a_removal_leaves_the_next_one_alone(tmp_path: Path, alone: Bits, size: int) -> None:
    run_dir = tmp_path / "run"
    with start(size, run_dir, *ENDLESS) as old:
        hold_while_training(old, run_dir)
        shutil.rmtree(run_dir)
        with start(size, run_dir, *TINY) as new:
            hold_while_training(new, run_dir)
            old.signal(signal.SIGCONT)
            check_end(old, run_dir, f"taken by another run ({holder(run_dir)})")
            assert status(run_dir) == "running"
            new.signal(signal.SIGCONT)
            outcomes = new.wait(60)
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), outcomes[0].output
    assert bits(run_dir) == alone
    assert checkpoint_steps(run_dir) == [210, 208, 206]
    assert Checkpoints(run_dir / "checkpoints").load_newest()[1] == []


@pytest.mark.parametrize("size", [1, 2])
def test_a_finished_run_is_left_alone_too(tmp_path: Path, alone: Bits, size: int) -> None:
    run_dir = tmp_path / "run"
    with start(size, run_dir, *ENDLESS) as old:
        hold_while_training(old, run_dir)
        shutil.rmtree(run_dir)
        with start(size, run_dir, *TINY) as new:
            new.wait(60)
        left = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
        old.signal(signal.SIGCONT)
        check_end(old, run_dir, f"taken by another run ({holder(run_dir)})")
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == left
    assert bits(run_dir) == alone


@pytest.mark.parametrize("size", [1, 3])
def test_a_run_whose_directory_is_gone_ends_and_does_not_bring_it_back(tmp_path: Path, size: int) -> None:
    run_dir = tmp_path / "run"
    with start(size, run_dir, *ENDLESS) as job:
        hold_while_training(job, run_dir)
        shutil.rmtree(run_dir)
        job.signal(signal.SIGCONT)
        check_end(job, run_dir, "removed")
    assert list(tmp_path.iterdir()) == []


def holder(run_dir: Path) -> str:
    return (run_dir / ".lock.holder").read_text().splitlines()[0]
