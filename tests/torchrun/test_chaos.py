"""One training, killed again and again at random moments and world sizes, ends with the undisturbed bits."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from ddp_circles.records import files
from ddp_circles.records.checkpoint import decode
from tests.harness.ranks import Job, train
from tests.harness.runs import PLAIN, QUIET, agent, bits, checkpoint_steps, finish, run, status, train_hastily

FAULTS = ("kill one", "kill all", "kill while saving", "terminate the launcher")
SAVE_EVERY = 20


def train_and_die_while_saving(saves: int, *flags: object) -> None:
    """Train; rank 0 is killed when its checkpoint number `saves` is written and has not got its name yet."""
    fsync = os.fsync

    def deadly_fsync(descriptor: int) -> None:
        nonlocal saves
        saves -= ".checkpoint." in str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if saves < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    files.os.fsync = deadly_fsync  # type: ignore[attr-defined]
    train(*flags)


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint; every checkpoint there can be read."""
    steps = [-1]
    for path in (run_dir / "checkpoints").glob("step-*.checkpoint"):
        try:
            steps.append(decode(path.read_bytes())["global_step"])
        except FileNotFoundError:
            continue  # dropped as too old between the listing and the reading
    return max(steps)


def has_reached(run_dir: Path, step: int) -> bool:
    """Look for a checkpoint of `step` or later; by name first, which costs less."""
    return max(checkpoint_steps(run_dir), default=-1) >= step and newest_step(run_dir) >= step


def disturb(dice: random.Random, fault: str, folder: Path, flags: tuple[object, ...]) -> None:
    """Start the training at a random size, let it get a little further, and let `fault` happen."""
    size, run_dir = dice.randint(1, 4), folder / "disturbed"
    further = newest_step(run_dir) + dice.randint(1, 3 * SAVE_EVERY)
    if fault == "terminate the launcher":
        with agent(folder / "log", size, run_dir, *flags) as launcher:
            launcher.wait_until(lambda: has_reached(run_dir, further) or launcher.exit_code() is not None)
            if launcher.exit_code() is None:
                launcher.signal(signal.SIGTERM)
            launcher.wait(120)
        assert status(run_dir) in ("stopped", "finished"), launcher.output
        return
    saves = dice.randint(1, 3)
    function, first = (train_and_die_while_saving, [saves]) if fault == "kill while saving" else (train_hastily, [])
    with Job(function, size, *first, "--run-dir", run_dir, *QUIET, *flags) as job:
        if fault != "kill while saving":
            job.wait_until(lambda: has_reached(run_dir, further) or any_ended(job), 120)
            time.sleep(dice.uniform(0, 0.05))
            job.signal(signal.SIGKILL, *([] if fault == "kill all" else [dice.randrange(size)]))
        outcomes = job.wait(30)
    assert all(outcome.code is not None for outcome in outcomes), [outcome.output for outcome in outcomes]


def any_ended(job: Job) -> bool:
    return not all(process.is_alive() for process in job.processes)


def chaos(tmp_path: Path, rounds: int) -> None:
    """Disturb a training `rounds` times; the printed seed repeats the order of the faults."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    steps = rounds * 3 * SAVE_EVERY
    settings = ("--n-samples=100", "--batch-size=8", f"--epochs={steps // 10}", f"--checkpoint-steps={SAVE_EVERY}")
    faults = [*FAULTS, *(dice.choice(FAULTS) for _ in range(rounds - len(FAULTS)))]
    dice.shuffle(faults)
    for fault in faults:
        disturb(dice, fault, tmp_path, settings)
    last = run(dice.randint(1, 4), tmp_path / "disturbed", *settings, timeout=60 + steps / 20)
    assert {outcome.code for outcome in last} == {0}, [outcome.output for outcome in last]
    assert not any("passed over" in outcome.output for outcome in last)
    assert bits(tmp_path / "disturbed") == finish(PLAIN, tmp_path / "undisturbed", *settings, timeout=60 + steps / 50)


@pytest.mark.timeout(600)
def test_chaos(tmp_path: Path) -> None:
    chaos(tmp_path, rounds=20)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_long_chaos(tmp_path: Path) -> None:
    chaos(tmp_path, rounds=200)
