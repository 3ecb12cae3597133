"""Started by mpirun: its variables make the ranks of one job, or the start is refused."""

import os
import signal
from pathlib import Path

import pytest

from ddp_circles.errors import UserError
from ddp_circles.job.ranks import MPI_VARIABLES, read_ranks
from tests.harness.ranks import Job, forget_launcher, free_port, train
from tests.harness.runs import PLAIN, QUIET, Bits, bits, finish, status

FLAGS = ("--n-samples=125", "--batch-size=16", "--epochs=4")
SRUN_OF_MPIRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
"""The variables that mpirun's helper on the second node has, and hands down to its ranks."""
MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "12345"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Bits:
    """The bits of one plain process."""
    return finish(PLAIN, tmp_path_factory.mktemp("alone"), *FLAGS)


def train_under_mpirun(names: tuple[str, ...], port: int, *flags: object) -> None:
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    forget_launcher()
    os.environ.update(dict(zip(names, (rank, size, rank, size), strict=True)) | {"MASTER_PORT": str(port)})
    train(*flags)


@pytest.mark.parametrize(("names", "size"), list(zip(MPI_VARIABLES, (1, 2, 3), strict=True)))
def test_its_ranks_are_one_job_with_the_bits_of_one_process(
    names: tuple[str, ...], size: int, tmp_path: Path, alone: Bits
) -> None:
    with Job(train_under_mpirun, size, names, free_port(), "--run-dir", tmp_path, *QUIET, *FLAGS) as job:
        outcomes = job.wait(120)
    assert [outcome.code for outcome in outcomes] == [0] * size, outcomes[0].output
    assert f"{size} rank" in outcomes[0].output
    assert "(mpirun)" in outcomes[0].output
    assert [outcome.output for outcome in outcomes[1:]] == [""] * (size - 1)
    assert bits(tmp_path) == alone


def test_a_stop_is_no_failure_for_mpirun_which_would_kill_rank_0_over_one(tmp_path: Path) -> None:
    flags = ("--run-dir", tmp_path, *QUIET, *FLAGS, "--epochs=100000", "--checkpoint-seconds=1000")
    with Job(train_under_mpirun, 2, MPI_VARIABLES[0], free_port(), *flags) as job:
        job.wait_until((tmp_path / "metrics.jsonl").exists)
        job.signal(signal.SIGTERM)
        outcomes = job.wait(60)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output
    assert status(tmp_path) == "stopped"


def variables(names: tuple[str, ...], *values: int) -> dict[str, str]:
    return dict(zip(names, map(str, values), strict=False))


@pytest.mark.parametrize("names", MPI_VARIABLES)
def test_several_nodes_meet_where_they_are_told_to(names: tuple[str, ...]) -> None:
    environment = SRUN_OF_MPIRUN | variables(names, 5, 8, 1, 4)
    ranks = read_ranks(environment | MEETING)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (5, 8, 1, 4)
    assert (ranks.store_address, ranks.one_machine, ranks.launcher) == (("node1", 12345), False, "mpirun")
    for missing in MEETING:
        with pytest.raises(UserError, match=missing):
            read_ranks(environment | {name: value for name, value in MEETING.items() if name != missing})


def test_jobs_on_one_node_meet_apart_on_the_loopback() -> None:
    found = [
        read_ranks(variables(MPI_VARIABLES[0], rank, 2, rank, 2) | {"PMIX_NAMESPACE": f"prterun-node1-{job}@1"})
        for rank in (0, 1)
        for job in (7, 8)
    ]
    addresses = [ranks.store_address for ranks in found]
    assert all(address is not None and address[0] == "127.0.0.1" for address in addresses)
    assert addresses[0] == addresses[2] != addresses[1] == addresses[3]
    assert found[0].job != found[1].job
    assert all(ranks.one_machine for ranks in found)


@pytest.mark.parametrize("names", MPI_VARIABLES)
def test_variables_that_do_not_tell_all_are_refused_unless_they_are_sruns(names: tuple[str, ...]) -> None:
    some = variables(names, 1, 2)
    with pytest.raises(UserError, match=f"not {names[2]}, {names[3]}"):
        read_ranks(some)
    with pytest.raises(UserError, match=names[1]):
        read_ranks({names[0]: "1"})
    assert read_ranks(some | SRUN_OF_MPIRUN | MEETING).launcher == "srun"
    assert read_ranks(variables(names, 0, 1)).launcher == "one process"
    assert read_ranks(some | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1"}).launcher != "mpirun"
    with pytest.raises(UserError, match="rank 2 of 2"):
        read_ranks(variables(names, 2, 2, 1, 2))
