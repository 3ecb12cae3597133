"""The example with real data: one hash however it is started, with and without workers, killed or not."""

import json
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from ddp_circles import Config
from examples import digits
from tests.harness.ranks import Job, forget_launcher, run_ranks
from tests.harness.runs import PROJECT, Bits, Command, bits, checkpoint_steps, metrics

EPOCHS = 4
STEPS = 12 * EPOCHS


def train(run_dir: Path, workers: int) -> None:
    """Run the example for a few epochs, with many checkpoints."""
    changed = {"epochs": EPOCHS, "checkpoint_steps": 5, "wandb": "disabled", "plots": False}
    setattr(digits, "Config", lambda **settings: Config(**settings | changed))  # noqa: B010 - not a type any more
    sys.argv = ["digits.py", f"--run-dir={run_dir}", f"--workers={workers}"]
    digits.main()


def train_alone(run_dir: Path, workers: int) -> None:
    """Run it in a process that knows of no launcher."""
    forget_launcher()
    train(run_dir, workers)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Bits:
    """The bits under plain python without workers."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    run_ranks(train_alone, 1, run_dir, 0, timeout=120)
    return bits(run_dir)


@pytest.mark.parametrize(
    ("size", "workers"),
    [
        (1, 2),
        (2, 0),
        (3, 1),
        (4, 2),
        *(pytest.param(*case, marks=pytest.mark.thorough) for case in ((1, 0), (2, 2), (3, 0), (3, 2), (4, 0))),
    ],
)
def test_any_number_of_ranks_and_workers(tmp_path: Path, expected: Bits, size: int, workers: int) -> None:
    run_ranks(train, size, tmp_path, workers, timeout=180)
    assert bits(tmp_path) == expected


def has_reached(run_dir: Path, step: int) -> bool:
    return max(checkpoint_steps(run_dir), default=0) >= step


def test_killed_twice_and_resumed_at_other_sizes(tmp_path: Path, expected: Bits) -> None:
    for size, workers, step in ((3, 1, STEPS // 3), (1, 0, 2 * STEPS // 3)):
        with Job(train, size, tmp_path, workers) as job:
            job.wait_until(partial(has_reached, tmp_path, step), 120)
            job.signal(signal.SIGKILL)
            assert all(outcome.code == -signal.SIGKILL for outcome in job.wait(30))
        assert len(metrics(tmp_path)) < EPOCHS
    run_ranks(train, 2, tmp_path, 2, timeout=180)
    assert bits(tmp_path) == expected
    assert json.loads((tmp_path / "summary.json").read_text())["resumed_from_step"] >= 2 * STEPS // 3


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_it_reads_almost_all_digits(tmp_path: Path) -> None:
    """In full; the README's test compares such a run with one under torchrun."""
    words = (sys.executable, PROJECT / "examples/digits.py", "--run-dir", tmp_path / "run")
    with Command(tmp_path / "log", *words, cwd=tmp_path, variables={"WANDB_MODE": "disabled"}) as command:
        assert command.wait(280) == 0, command.output
    assert metrics(tmp_path / "run")[-1]["test/accuracy"] >= 0.985
