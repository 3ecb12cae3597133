"""Under launchers: restarts that finish by themselves, failures that end the job, and launchers that vanish."""

import re
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.harness.ranks import free_port
from tests.harness.runs import (
    LAUNCHERS,
    PLAIN,
    Bits,
    Launcher,
    Program,
    bits,
    checkpoint_steps,
    finish,
    newest_state,
    status,
    torchrun,
)

SETTINGS = ("--n-samples=125", "--batch-size=16", "--epochs=35", "--checkpoint-steps=50")
"""245 steps."""
LONG = (*SETTINGS, "--epochs=100000")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Bits:
    """The bits of a run without any launcher or fault."""
    return finish(PLAIN, tmp_path_factory.mktemp("alone"), *SETTINGS)


@pytest.mark.parametrize("launch", LAUNCHERS)
def test_a_killed_rank_is_restarted_to_the_same_bits(launch: Launcher, tmp_path: Path, alone: Bits) -> None:
    finish(1, tmp_path / "run", *SETTINGS, "--seed=1", "--epochs=1")
    # discards the other run at its first start, and nothing at the second
    flags = (*SETTINGS, "--resume=never", "--fault=kill@1:200")
    with launch(tmp_path / "log", 3, tmp_path / "run", *flags, options=["--max-restarts=3"]) as job:
        assert job.wait(200) == 0, job.output
    assert bits(tmp_path / "run") == alone
    assert "continue after step 200" in job.output
    for rank in (0, 2):
        assert re.search(rf"^rank {rank}: lost a peer: rank 1 \(host ", job.output, re.MULTILINE), job.output


@pytest.mark.thorough
def test_never_discards_at_the_restart_if_the_first_start_failed_before_it_could(tmp_path: Path, alone: Bits) -> None:
    run_dir = tmp_path / "run"
    finish(1, run_dir, *SETTINGS)
    with torchrun(tmp_path / "log", 2, run_dir, *SETTINGS, "--resume=never", options=["--max-restarts=1"]) as job:
        job.wait_until(lambda: len(job.workers()) == 2)
        job.workers()[1].kill()  # it is importing torch
        assert job.wait(200) == 0, job.output
    assert "start: 2 ranks" in job.output, job.output
    assert bits(run_dir) == alone


def is_training(command: Program, run_dir: Path) -> bool:
    return len(command.workers()) == 2 and run_dir.exists() and bool(checkpoint_steps(run_dir))


def has_just_started(command: Program, run_dir: Path) -> bool:
    return len(command.workers()) == 2 and not run_dir.exists()


@pytest.mark.parametrize(
    ("moment", "seconds"),
    [
        (is_training, 10),
        pytest.param(has_just_started, 30, marks=pytest.mark.thorough),  # the import of torch takes its time
    ],
)
def test_no_worker_outlives_a_killed_launcher(
    tmp_path: Path, moment: Callable[[Program, Path], bool], seconds: float
) -> None:
    run_dir = tmp_path / "run"
    with torchrun(tmp_path / "log", 2, run_dir, *LONG) as command:
        command.wait_until(lambda: moment(command, run_dir))
        workers = command.workers()
        command.signal(signal.SIGKILL)
        gone, alive = psutil.wait_procs(workers, timeout=seconds)
        assert (len(gone), alive) == (2, []), command.output
    finish(1, run_dir, *LONG, "--epochs=40")


@pytest.mark.parametrize("launch", LAUNCHERS)
def test_nodes_may_join_and_leave(launch: Launcher, tmp_path: Path) -> None:
    """One node begins, a second one joins, and is lost: each time all go on from the last checkpoint.

    Even if the job was told to discard what it found at its beginning.
    """
    run_dir = tmp_path / "run"
    # what disturbs it takes longer than many steps
    slow = (*LONG, "--resume=never", "--checkpoint-steps=1", "--timeout=30")
    quick = "join_timeout=60,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
    options = [
        "--nnodes=1:2",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{free_port()}",
        "--rdzv-id=elastic",
        f"--rdzv-conf={quick}",
        "--local-addr=127.0.0.1",
    ]
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"}

    def node(name: str) -> Program:
        named = variables | {"DDP_CIRCLES_START": name}
        return launch(tmp_path / name, 1, run_dir, *slow, options=options, variables=named)

    def progresses(node: Program) -> None:
        reached = max(checkpoint_steps(run_dir), default=0) if run_dir.exists() else 0
        node.wait_until(lambda: run_dir.exists() and max(checkpoint_steps(run_dir), default=0) > reached)

    with node("stays") as stays:
        progresses(stays)
        with node("leaves") as leaves:
            stays.wait_until(lambda: "2 ranks on 2 nodes" in stays.output + leaves.output)
            progresses(stays)
            alone_before = stays.output.count("1 rank (torchrun)")
            leaves.kill()
        stays.wait_until(lambda: stays.output.count("1 rank (torchrun)") > alone_before)
        progresses(stays)
        stays.signal(signal.SIGTERM)
        stays.wait(90)
    assert status(run_dir) == "stopped"
    more = (*LONG, f"--epochs={newest_state(run_dir)['epoch'] + 2}", "--checkpoint-steps=0")
    assert finish(2, run_dir, *more) == finish(PLAIN, tmp_path / "alone", *more)
