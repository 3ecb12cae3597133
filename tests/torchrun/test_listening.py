"""On one machine nothing that is started here can be reached from another one."""

import socket
import subprocess
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from tests.harness.networks import needs_networks
from tests.harness.runs import PROJECT, Command, metrics

LONG = ("--epochs=100000", "--wandb=offline", "--no-plots", "--device=cpu", "--log-every=1000000")


def trains(run_dir: Path) -> Callable[[], bool]:
    """A condition: the training in `run_dir` has begun, and so has its copy to Weights & Biases."""
    return lambda: (
        (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir)) > 1 and any(run_dir.glob("wandb/off*"))
    )


def listening(pid: int) -> list[tuple[str, int]]:
    """The addresses and ports at which a process, and all that it has started, accept connections."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    sockets = [found for process in processes for found in process.net_connections("inet")]
    return sorted({(found.laddr.ip, found.laddr.port) for found in sockets if found.status == psutil.CONN_LISTEN})


def test_a_training_on_one_machine_listens_on_the_loopback_alone(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Command(
        tmp_path / "log", "bash", "launch/train.sh", "--run-dir", run_dir, *LONG, variables={"RANKS": "2"}
    ) as job:
        job.wait_until(trains(run_dir))
        found = listening(job.pid)
    assert len(found) >= 3  # the store and each rank
    assert all(ip_address(address).is_loopback for address, _ in found), found


@needs_networks
@pytest.mark.thorough
def test_no_port_answers_from_another_machine(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with (
        socket.create_server(("", 0)) as open_door,
        Command(tmp_path / "log", "bash", "launch/train.sh", "--run-dir", run_dir, *LONG) as job,
    ):
        job.wait_until(trains(run_dir))
        ports = [port for _, port in listening(job.pid)]
        control = open_door.getsockname()[1]
        seen = subprocess.run(
            ["bash", PROJECT / "tests/harness/programs/neighbour.sh", *map(str, (control, *ports))],
            capture_output=True,
            text=True,
            timeout=60,
        )
    answers = [f"{control} answers", *(f"{port} is silent" for port in ports)]
    assert seen.stdout.splitlines() == answers, seen.stderr
