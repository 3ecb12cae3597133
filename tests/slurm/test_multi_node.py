"""`launch/multi_node.sh`: several nodes without a scheduler, played by several agents on this machine."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.harness.cluster import wait_until
from tests.harness.ranks import free_port
from tests.harness.training import EPOCHS, PROJECT, SETTINGS, STEPS_PER_EPOCH, Undisturbed, read_rows

pytestmark = pytest.mark.timeout(300)

Launch = Callable[..., subprocess.Popen[str]]
MIDDLE = EPOCHS // 2 * STEPS_PER_EPOCH


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The script beside a set-up helper that enters the environment of this test."""
    (tmp_path / "launch").mkdir()
    shutil.copy(PROJECT / "launch/multi_node.sh", tmp_path / "launch")
    (tmp_path / "launch/setup.sh").write_text(f'PATH="{sys.prefix}/bin:$PATH"\n')
    return tmp_path


@pytest.fixture
def port() -> int:
    """Where the nodes meet."""
    return free_port()


@pytest.fixture
def launch(folder: Path, port: int) -> Iterator[Launch]:
    """Starts one node's agent; those that are left at the end are killed with all that they started."""
    agents: list[subprocess.Popen[str]] = []

    def start(*arguments: str, nodes: str, **variables: str) -> subprocess.Popen[str]:
        fixed = ["--nodes", nodes, "--head", f"127.0.0.1:{port}", "--id", "run-1", "--ranks", "1"]
        flags = [*SETTINGS, "--wandb=disabled", "--checkpoint-steps=10", *arguments]
        agents.append(
            subprocess.Popen(
                ["bash", "launch/multi_node.sh", *fixed, "--", *flags],
                cwd=folder,
                env=os.environ | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return agents[-1]

    yield start
    for agent in agents:
        kill_all_of(agent)
        agent.communicate(timeout=40)


def kill_all_of(agent: subprocess.Popen[str]) -> None:
    """End a node: its agent and everything that it started, without a word to anybody."""
    if agent.poll() is None:
        for process in [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]:
            process.send_signal(signal.SIGKILL)


def listens(agent: subprocess.Popen[str], port: int) -> bool:
    """Whether this agent is the one at which the nodes meet."""
    sockets = psutil.Process(agent.pid).net_connections("tcp")
    return any(found.status == psutil.CONN_LISTEN and found.laddr.port == port for found in sockets)


def model(folder: Path) -> bytes:
    return (folder / "runs/run-1/model.safetensors").read_bytes()


def test_two_nodes_survive_a_killed_rank_with_the_undisturbed_bits(
    launch: Launch, folder: Path, undisturbed: Undisturbed
) -> None:
    agents = [launch(f"--fault=kill@1:{MIDDLE}", nodes="2") for _ in range(2)]
    printed = [agent.communicate(timeout=240)[0] for agent in agents]

    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert any(f"continue after step {MIDDLE}: 2 ranks on 2 nodes" in text for text in printed), printed
    assert model(folder) == undisturbed.model
    assert read_rows(folder / "runs/run-1") == undisturbed.rows


def test_with_a_range_of_nodes_the_others_go_on_without_one_that_is_gone(
    launch: Launch, folder: Path, port: int, undisturbed: Undisturbed
) -> None:
    # torchrun reads its options from PET_* too: here, how soon a silent node is given up
    patience = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
    agents = [launch(nodes="1:2", PET_RDZV_CONF=patience) for _ in range(2)]
    run_dir = folder / "runs/run-1"
    wait_until(lambda: len(read_rows(run_dir)) > EPOCHS // 10, "the training is on its way", 120)
    (head,) = [agent for agent in agents if listens(agent, port)]
    (other,) = [agent for agent in agents if agent is not head]
    kill_all_of(other)
    printed, _ = head.communicate(timeout=240)

    assert head.returncode == 0, printed
    assert "1 rank" in printed.partition("continue after step")[2], printed
    assert model(folder) == undisturbed.model
    assert read_rows(run_dir) == undisturbed.rows


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("", "--nodes must be N or MIN:MAX, got ''"),
        ("--nodes 2:1 --head a --id b", "--nodes must be N or MIN:MAX, got '2:1'"),
        ("--nodes 0 --head a --id b", "--nodes must be N or MIN:MAX, got '0'"),
        ("--nodes 2 --head a:b --id c", "--head must be HOST or HOST:PORT, got 'a:b'"),
        ("--nodes 2 --head a", "--id must be a name"),
        ("--nodes 2 --head a --id none", "--id must be a name"),
        ("--nodes 2 --head a --id ../c", "--id must be a name"),
        ("--nodes 2 --head a --id b --ranks x", "--ranks must be a number above 0, got 'x'"),
        ("--nodes 2 --head a --id b --max-restarts -1", "--max-restarts must be a number, got '-1'"),
        ("--nodes", "--nodes needs a value"),
        ("--epochs 3", "unknown argument '--epochs'; the trainer's flags go after --"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(arguments: str, complaint: str, folder: Path) -> None:
    done = subprocess.run(
        ["bash", "launch/multi_node.sh", *arguments.split()], cwd=folder, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_is_text_on_standard_output(folder: Path) -> None:
    done = subprocess.run(
        ["bash", "launch/multi_node.sh", "--help"], cwd=folder, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")
    assert "--max-restarts" in done.stdout
