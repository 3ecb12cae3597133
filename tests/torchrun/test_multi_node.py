"""Several nodes without a scheduler: `launch/multi_node.sh`, played by several agents on this machine, and pods."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.harness.networks import needs_networks
from tests.harness.ranks import free_port
from tests.harness.runs import PLAIN, PROJECT, QUIET, TRAINER, Bits, Command, bits, finish
from tests.harness.training import EPOCHS, SETTINGS, STEPS_PER_EPOCH, epochs_done

pytestmark = pytest.mark.timeout(300)

Launch = Callable[..., Command]
MIDDLE = EPOCHS // 2 * STEPS_PER_EPOCH


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Bits:
    """The bits of one plain process."""
    return finish(PLAIN, tmp_path_factory.mktemp("undisturbed"), *SETTINGS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The script beside a set-up helper that enters the environment of this test."""
    (tmp_path / "launch").mkdir()
    shutil.copy(PROJECT / "launch/multi_node.sh", tmp_path / "launch")
    (tmp_path / "launch/setup.sh").write_text(f'PATH="{sys.prefix}/bin:$PATH"\n')
    return tmp_path


@pytest.fixture
def port() -> int:
    """The port where the nodes meet."""
    return free_port()


@pytest.fixture
def launch(folder: Path, port: int) -> Iterator[Launch]:
    """Starts one node's agent; those that are left at the end are killed with all that they started."""
    with ExitStack() as agents:

        def start(name: str, *arguments: str, nodes: str, **variables: str) -> Command:
            fixed = ["--nodes", nodes, "--head", f"127.0.0.1:{port}", "--id", "run-1", "--ranks", "1"]
            flags = [*QUIET, *SETTINGS, "--checkpoint-steps=10", *arguments]
            words = ["bash", "launch/multi_node.sh", *fixed, "--", *flags]
            return agents.enter_context(Command(folder / name, *words, cwd=folder, variables=variables))

        yield start


def listens(agent: Command, port: int) -> bool:
    """Return true if this agent is the one at which the nodes meet."""
    sockets = psutil.Process(agent.pid).net_connections("tcp")
    return any(found.status == psutil.CONN_LISTEN and found.laddr.port == port for found in sockets)


@pytest.mark.thorough
def test_two_nodes_survive_a_killed_rank_with_the_undisturbed_bits(
    launch: Launch, folder: Path, undisturbed: Bits
) -> None:
    agents = [launch(name, f"--fault=kill@1:{MIDDLE}", nodes="2") for name in ("a", "b")]
    assert [agent.wait(240) for agent in agents] == [0, 0], [agent.output for agent in agents]
    continued = f"continue after step {MIDDLE}: 2 ranks on 2 nodes"
    assert any(continued in agent.output for agent in agents), [agent.output for agent in agents]
    assert bits(folder / "runs/run-1") == undisturbed


@pytest.mark.thorough
def test_with_a_range_of_nodes_the_others_go_on_without_one_that_is_gone(
    launch: Launch, folder: Path, port: int, undisturbed: Bits
) -> None:
    # torchrun reads its options from PET_* too: here, how soon a silent node is given up
    patience = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
    agents = [launch(name, nodes="1:2", PET_RDZV_CONF=patience) for name in ("a", "b")]
    run_dir = folder / "runs/run-1"
    agents[0].wait_until(lambda: epochs_done(run_dir) > EPOCHS // 10)
    (head,) = [agent for agent in agents if listens(agent, port)]
    (other,) = [agent for agent in agents if agent is not head]
    other.kill()

    assert head.wait(240) == 0, head.output
    assert "1 rank" in head.output.partition("continue after step")[2], head.output
    assert bits(run_dir) == undisturbed


@needs_networks
@pytest.mark.parametrize(
    ("names", "master"),
    [
        # each pod's own name means the loopback, as on many hosts: nobody could connect to gloo there
        ("127.0.1.1 pod-0 pod-1\n198.51.100.1 head\n198.51.100.2 other", "head"),
        # the first pod of an older Kubeflow is told localhost
        pytest.param("198.51.100.1 pod-0\n198.51.100.2 pod-1", "kubeflow", marks=pytest.mark.thorough),
    ],
)
def test_pods_with_a_network_each_train_as_nodes(names: str, master: str, tmp_path: Path, undisturbed: Bits) -> None:
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n{names}\n")
    trainer = [sys.executable, *TRAINER, "--run-dir", tmp_path / "run", *QUIET, *SETTINGS]
    choose = 'if [ "$RANK" = 0 ]; then MASTER_ADDR=localhost; else MASTER_ADDR=pod-0; fi'
    words = ["bash", "-c", f'{choose}; export MASTER_ADDR; exec "$@"', "pod"] if master == "kubeflow" else []
    variables = {"MASTER_ADDR": master, "MASTER_PORT": "23456", "KUBERNETES_SERVICE_HOST": "198.51.100.3"}
    script = PROJECT / "tests/harness/programs/pods.sh"
    with Command(tmp_path / "log", "bash", script, tmp_path / "hosts", *words, *trainer, variables=variables) as pods:
        assert pods.wait(240) == 0, pods.output
    assert "start: 2 ranks on 2 nodes (environment), cpu, gloo" in pods.output
    assert bits(tmp_path / "run") == undisturbed


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
        ("--nodes 2 --head a --id ..", "--id must be a name"),
        ("--nodes 2 --head a --id -c", "--id must be a name"),
        ("--nodes 2 --head a --id .c", "--id must be a name"),
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
