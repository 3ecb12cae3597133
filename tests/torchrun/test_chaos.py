"""One training, killed again and again at random moments and world sizes, ends with the undisturbed bits."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddp_circles.records.checkpoint import decode
from tests.harness.ranks import Job, train, train_on

FAULTS = ("kill one", "kill all", "kill while saving", "terminate torchrun")
SAVE_EVERY = 20


def train_and_die_while_saving(saves: int, *flags: object) -> None:
    """Train; rank 0 is killed when its checkpoint number `saves` is written and has not got its name yet."""
    from ddp_circles.records import files

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


def wait_for_step(run_dir: Path, step: int, still_running: "list[object]") -> None:
    """Wait until a checkpoint of `step` or later is there."""
    deadline = time.monotonic() + 120
    while newest_step(run_dir) < step and all(process.is_alive() for process in still_running):  # type: ignore[attr-defined]
        assert time.monotonic() < deadline, f"no progress to step {step}"
        time.sleep(0.01)


def disturb(dice: random.Random, fault: str, run_dir: Path, flags: tuple[object, ...]) -> None:
    """Start the training at a random size, let it get a little further, and let `fault` happen."""
    size = dice.randint(1, 4)
    further = newest_step(run_dir) + dice.randint(1, 3 * SAVE_EVERY)
    if fault == "terminate torchrun":
        terminate_torchrun(size, run_dir, further, flags)
        return
    function, arguments = (train, flags) if fault != "kill while saving" else (
        train_and_die_while_saving, (dice.randint(1, 3), *flags)
    )  # fmt: skip
    with Job(function, size, *arguments) as job:
        if fault != "kill while saving":
            wait_for_step(run_dir, further, job.processes)
            time.sleep(dice.uniform(0, 0.05))
            job.signal(signal.SIGKILL, *([] if fault == "kill all" else [dice.randrange(size)]))
        outcomes = job.wait(30)
    assert all(outcome.code is not None for outcome in outcomes), [outcome.output for outcome in outcomes]


def terminate_torchrun(size: int, run_dir: Path, further: int, flags: tuple[object, ...]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={size}", "-m", "ddp_circles.train"]
    with subprocess.Popen(
        [*launcher, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as agent:
        deadline = time.monotonic() + 120
        while newest_step(run_dir) < further and agent.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        agent.terminate()
        output, _ = agent.communicate(timeout=120)
    assert (run_dir / "status").read_text() in ("stopped\n", "finished\n"), output


def chaos(tmp_path: Path, rounds: int, seed: int) -> None:
    steps = max(2000, rounds * 2 * SAVE_EVERY)
    flags = (
        "--n-samples=100", "--batch-size=8", f"--epochs={steps // 10}", "--wandb=disabled", "--no-plots",
        "--log-every=100", f"--checkpoint-steps={SAVE_EVERY}",
    )  # fmt: skip
    (undisturbed,) = train_on(1, "--run-dir", tmp_path / "undisturbed", *flags, timeout=60 + steps / 50)
    assert undisturbed.code == 0, undisturbed.output
    dice, run_dir = random.Random(seed), tmp_path / "disturbed"
    print(f"seed {seed}")
    faults = [*FAULTS, *(dice.choice(FAULTS[:3]) for _ in range(rounds - len(FAULTS)))]
    dice.shuffle(faults)
    for fault in faults:
        disturb(dice, fault, run_dir, ("--run-dir", run_dir, *flags))
    last = train_on(dice.randint(1, 4), "--run-dir", run_dir, *flags, timeout=60 + steps / 20)
    assert {outcome.code for outcome in last} == {0}, [outcome.output for outcome in last]
    assert not any("passed over" in outcome.output for outcome in last)
    assert digest(run_dir / "model.safetensors") == digest(tmp_path / "undisturbed" / "model.safetensors")
    assert figures(run_dir) == figures(tmp_path / "undisturbed")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def figures(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what depends on the clock; each epoch once."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(len(rows)))
    return [{name: row[name] for name in row if "second" not in name} for row in rows]


@pytest.mark.timeout(600)
def test_chaos(tmp_path: Path) -> None:
    chaos(tmp_path, rounds=20, seed=random.SystemRandom().randrange(2**32))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_long_chaos(tmp_path: Path) -> None:
    chaos(tmp_path, rounds=200, seed=random.SystemRandom().randrange(2**32))
