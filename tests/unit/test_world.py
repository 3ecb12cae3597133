"""Ranks from the launcher's variables, and the life of a process group."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ddp_circles.errors import UserError
from ddp_circles.job import world as world_module
from ddp_circles.job.process import CUDNN, be_deterministic, pin_threads, process_as_found
from ddp_circles.job.ranks import Ranks, read_ranks, this_host
from ddp_circles.job.world import is_lost_peer, open_world
from tests.harness.devices import event
from tests.harness.networks import needs_networks
from tests.harness.ranks import Job, free_port, run_ranks

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "12345",
    "TORCHELASTIC_RUN_ID": "night",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SBATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SRUN = SBATCH | {
    "SLURM_STEP_ID": "3",
    "SLURM_STEPID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "MASTER_ADDR": "node1",
}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


def test_without_a_launcher_there_is_one_process() -> None:
    ranks = read_ranks({"PATH": "/bin", "HOSTNAME": "laptop"})
    assert ranks == Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, nodes=1, job_id=None)
    assert (ranks.is_main, ranks.launched, ranks.serves_store, ranks.store_address) == (True, False, False, None)


def test_torchrun_variables() -> None:
    ranks = read_ranks(TORCHRUN)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (5, 8, 1, 4)
    assert (ranks.nodes, ranks.launcher, ranks.job_id, ranks.restarts) == (2, "torchrun", "night", 0)
    assert (ranks.store_address, ranks.store_is_the_agents) == (("head", 12345), True)
    assert (ranks.is_main, ranks.launched, ranks.serves_store) == (False, True, False)


def test_the_default_is_the_environment_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert read_ranks() == read_ranks(TORCHRUN)


def test_a_launch_of_torchrun_keeps_its_name_over_restarts_and_no_other_has_it() -> None:
    def name(launch: str, restarts: int, rank: int) -> str | None:
        file = f"/tmp/torchelastic_{launch}/night_{launch}/attempt_{restarts}/{rank}/error.json"
        return read_ranks(TORCHRUN | {"TORCHELASTIC_ERROR_FILE": file}).launch

    assert name("x", 0, 0) == name("x", 0, 1) == name("x", 3, 2)
    assert name("x", 0, 0) != name("y", 0, 0)
    assert read_ranks(TORCHRUN | {"DDP_CIRCLES_START": "mine"}).launch == "mine"
    assert read_ranks(TORCHRUN).launch is None


def test_torchrun_inside_a_slurm_step_wins() -> None:
    ranks = read_ranks(SRUN | TORCHRUN)
    assert (ranks.rank, ranks.world_size, ranks.launcher, ranks.job_id) == (5, 8, "torchrun", "night")


@pytest.mark.parametrize("run_id", ["none", ""])
def test_a_run_id_of_none_counts_as_missing(run_id: str) -> None:
    environment = TORCHRUN | {"TORCHELASTIC_RUN_ID": run_id}
    assert read_ranks(environment).job_id is None
    assert read_ranks(environment | SBATCH).job_id == "77"


def test_rank_0_serves_the_store_without_an_agent() -> None:
    own = without(TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE")
    assert not read_ranks(own).serves_store
    assert read_ranks(own | {"RANK": "0", "LOCAL_RANK": "0"}).serves_store
    assert not read_ranks(TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}).serves_store


def test_slurm_step_variables() -> None:
    ranks = read_ranks(SRUN)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (3, 4, 1, 2)
    assert (ranks.nodes, ranks.launcher, ranks.job_id) == (2, "srun", "77")
    assert ranks.store_address is not None
    host, port = ranks.store_address
    assert host == "node1"
    assert 1024 < port < 65536
    assert (ranks.is_main, ranks.launched, ranks.serves_store) == (False, True, False)


def test_each_step_has_one_address_of_its_own() -> None:
    def address(**changes: str) -> tuple[str, int] | None:
        return read_ranks(SRUN | changes).store_address

    first = address(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
    assert first == address()
    assert first != address(SLURM_STEP_ID="4")
    assert first != address(SLURM_JOB_ID="78")
    assert address(MASTER_PORT="4444") == ("node1", 4444)
    assert read_ranks(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}).serves_store


@pytest.mark.parametrize(
    "tasks_per_node, node, local_id, expected",
    [("2(x2)", 1, 1, 2), ("3,1", 0, 2, 3), ("3,1", 1, 0, 1), ("1(x2),2", 2, 1, 2), ("4", 0, 3, 4)],
)
def test_slurms_short_form_of_tasks_per_node(tasks_per_node: str, node: int, local_id: int, expected: int) -> None:
    changes = {
        "SLURM_STEP_TASKS_PER_NODE": tasks_per_node,
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local_id),
        "SLURM_STEP_NUM_NODES": str({"4": 1, "1(x2),2": 3}.get(tasks_per_node, 2)),
    }
    assert read_ranks(SRUN | changes).local_world_size == expected


def test_a_step_on_one_node_meets_on_loopback() -> None:
    one_node = {
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4",
        "SLURM_NODEID": "0",
        "SLURM_LOCALID": "3",
    }
    for environment in (SRUN, without(SRUN, "MASTER_ADDR")):
        ranks = read_ranks(environment | one_node)
        assert ranks.store_address is not None
        assert ranks.store_address[0] == "127.0.0.1"


def test_a_step_of_one_task_is_a_world_of_one() -> None:
    one = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NUM_NODES": "1"}
    ranks = read_ranks(SRUN | one | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert (ranks.world_size, ranks.store_address, ranks.job_id, ranks.launched) == (1, None, "77", True)


def test_scontrol_names_the_first_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "node1\\nnode2\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    ranks = read_ranks(without(SRUN, "MASTER_ADDR"))
    assert ranks.store_address is not None
    assert ranks.store_address[0] == "node1"


def test_without_scontrol_the_error_names_master_addr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="MASTER_ADDR"):
        read_ranks(without(SRUN, "MASTER_ADDR"))


HAND = {"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "head", "MASTER_PORT": "12345"}
IN_POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


def test_variables_without_an_agent_are_no_launcher() -> None:
    for extra in ({}, {"TORCHELASTIC_ERROR_FILE": "/tmp/left/by/another/job.json"}):
        ranks = read_ranks(HAND | extra)
        assert (ranks.rank, ranks.world_size, ranks.launcher, ranks.launched) == (2, 3, "environment", False)
        assert (ranks.error_file, ranks.store_address, ranks.serves_store) == (None, ("head", 12345), False)
    assert read_ranks(HAND | {"RANK": "0"}).serves_store


def test_one_rank_by_hand_needs_no_port() -> None:
    ranks = read_ranks({"RANK": "0", "WORLD_SIZE": "1"})
    assert (ranks.world_size, ranks.store_address, ranks.launcher) == (1, None, "environment")


@pytest.mark.parametrize(
    ("given", "alone"),
    [
        ({}, False),
        ({"MASTER_ADDR": "localhost"}, True),
        ({"MASTER_ADDR": "127.0.0.1"}, True),
        ({"MASTER_ADDR": "localhost"} | IN_POD, False),  # the first pod of an older Kubeflow
        ({"MASTER_ADDR": "localhost", "LOCAL_WORLD_SIZE": "3"} | IN_POD, True),
        ({"MASTER_ADDR": "localhost", "LOCAL_WORLD_SIZE": "1"}, False),
        ({"LOCAL_WORLD_SIZE": "3"}, True),
    ],
)
def test_a_store_by_hand_serves_beyond_this_machine_only_if_ranks_may_be_there(
    given: dict[str, str], alone: bool
) -> None:
    ranks = read_ranks(HAND | given)
    assert ranks.one_machine is alone
    assert ranks.store_address is not None
    assert not alone or ranks.store_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        # local rank, local world size, nodes, one machine of ranks 0, 1, 2
        ("aaa", [(0, 3, 1, True), (1, 3, 1, True), (2, 3, 1, True)]),
        ("abc", [(0, 1, 3, False)] * 3),
        ("abb", [(0, 1, 2, False), (0, 2, 2, False), (1, 2, 2, False)]),
        ("aba", [(0, 2, 2, False), (0, 1, 2, False), (1, 2, 2, False)]),
    ],
)
def test_hosts_tell_what_variables_by_hand_do_not(hosts: str, expected: list[tuple[int, int, int, bool]]) -> None:
    for rank, seat in enumerate(expected):
        ranks = read_ranks(HAND | {"RANK": str(rank)}).on_hosts(hosts)
        assert (ranks.local_rank, ranks.local_world_size, ranks.nodes, ranks.one_machine) == seat


def test_a_launchers_word_on_nodes_and_local_ranks_counts_and_only_hosts_tell_of_one_machine() -> None:
    assert read_ranks(HAND | {"LOCAL_RANK": "1"}).on_hosts("aaa").local_rank == 1
    for environment, launcher in ((TORCHRUN, "torchrun"), (SRUN, "srun")):
        told = read_ranks(environment)
        apart, together = (told.on_hosts(hosts[: told.world_size]) for hosts in ("abababab", "aaaaaaaa"))
        assert (apart.one_machine, together.one_machine, told.launcher) == (False, True, launcher)
        for ranks in (apart, together):
            assert (ranks.local_rank, ranks.local_world_size, ranks.nodes) == (
                told.local_rank,
                told.local_world_size,
                told.nodes,
            )


def test_processes_of_one_machine_know_it() -> None:
    assert set(run_ranks(this_host, 2)) == {this_host()}


@needs_networks
def test_another_network_is_another_host() -> None:
    show = "from ddp_circles.job.ranks import this_host; print(this_host())"
    elsewhere = ["unshare", "--net", sys.executable, "-c", show]
    other = subprocess.run(elsewhere, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    assert other
    assert other != this_host()


def test_sbatch_without_srun_is_one_process() -> None:
    ranks = read_ranks(SBATCH)
    assert (ranks.world_size, ranks.launcher, ranks.launched, ranks.job_id) == (1, "one process", False, "77")


@pytest.mark.parametrize(
    "environment, named",
    [
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "local rank 1 of 9"),
        (TORCHRUN | {"RANK": "first"}, "RANK .*'first'"),
        (TORCHRUN | {"RANK": "-1"}, "RANK .*'-1'"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT .*'http'"),
        (without(TORCHRUN, "WORLD_SIZE"), "WORLD_SIZE"),
        (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT"),
        (without(TORCHRUN, "RANK"), "WORLD_SIZE is set without RANK"),
        (SRUN | {"WORLD_SIZE": "8"}, "WORLD_SIZE"),
        (SRUN | {"SLURM_PROCID": "4"}, "rank 4 of 4"),
        (SRUN | {"SLURM_LOCALID": "2"}, "local rank 2 of 2"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "three"}, "SLURM_STEP_NUM_TASKS"),
        (without(SRUN, "SLURM_PROCID"), "SLURM_PROCID"),
        (without(SRUN, "SLURM_JOB_ID"), "SLURM_JOB_ID"),
        (SRUN | {"SLURM_NODEID": "2"}, "SLURM_NODEID 2"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2,1"}, "SLURM_STEP_TASKS_PER_NODE '2,1'"),
        (without(SRUN, "SLURM_STEP_TASKS_PER_NODE"), "SLURM_NODEID 1"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE"),
    ],
)
def test_contradictions_are_errors(environment: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        read_ranks(environment)


def test_restarts_on_several_nodes_need_a_separate_store() -> None:
    restarted = TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1"}
    ranks = read_ranks(restarted)
    assert ranks.restarts == 1
    with (
        pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        open_world(ranks, "cpu", "gloo", 1, {}),
    ):
        pass


@pytest.mark.parametrize(
    "inherited",
    [
        {"OMP_NUM_THREADS": "7", "MKL_NUM_THREADS": "5"},
        pytest.param({}, marks=pytest.mark.thorough),
        pytest.param({"OMP_NUM_THREADS": "1"}, marks=pytest.mark.thorough),
    ],
)
def test_threads_do_not_depend_on_the_launcher(inherited: dict[str, str]) -> None:
    """torchrun sets OMP_NUM_THREADS to 1 unless it is set already."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.harness.programs.show_threads"],
        env=os.environ | inherited,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.stdout, done.stderr) == ("2 2 2\n", "")


def full_float32() -> list[str]:
    """The precisions while a training runs in a process that has chosen TF32 for everything."""
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    with process_as_found():
        be_deterministic()
        with CUDNN.flags(enabled=False):  # reads the older name, and puts all back
            pass
        return [kind.fp32_precision for kind in (CUDNN.conv, CUDNN.rnn, torch.backends.cuda.matmul)]


def test_tf32_is_off_whatever_the_process_has_chosen() -> None:
    assert run_ranks(full_float32, 1) == [["ieee"] * 3]


def wait_in_world(timeout: float, news: str, times: float) -> str:
    """Wait for an event; returns what was raised."""
    with open_world(Ranks(), "cpu", "gloo", 30, {}) as world:
        world.watch.news = news
        try:
            replace(world, timeout=timeout).wait_for(event(times))
        except ConnectionError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("timeout", "news", "times", "raised"),
    [
        (30, "", 100, ""),
        (0.2, "", math.inf, "no sum of all ranks came within 0.18 s"),
        (30, "the job has failed: rank 1", math.inf, "the job has failed"),
        (30, "no heartbeat of rank 1 for 20 s", math.inf, "no heartbeat of rank 1 for 20 s"),
    ],
)
def test_a_wait_for_the_device_ends(timeout: float, news: str, times: float, raised: str) -> None:
    assert run_ranks(wait_in_world, 1, timeout, news, times, timeout=20) == [raised]


def pinned() -> int:
    pin_threads(3)
    return torch.get_num_threads()


def test_threads_are_pinned_after_torch_is_imported_too() -> None:
    assert run_ranks(pinned, 2) == [3, 3]


def open_without_gpu(rank: int) -> str:
    """Open a world in which `rank` has no GPU; returns the refusal each rank gets."""
    ranks = read_ranks()
    fakes: dict[str, Any] = {
        "is_available": lambda: ranks.rank != rank,
        "device_count": lambda: 1,
        "set_device": lambda _: None,
        "init": lambda: None,
    }
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    setattr(world_module, "device_uuid", lambda _: f"GPU-{ranks.rank}")  # noqa: B010 - a plain assignment has another type
    with pytest.raises(UserError) as refused, open_world(ranks, "cuda", "gloo", 30, {}):
        pass
    return str(refused.value)


@pytest.mark.parametrize("agent_serves", [True, False])
def test_a_missing_gpu_on_one_rank_is_refused_on_all(agent_serves: bool) -> None:
    environment = {} if agent_serves else {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(free_port())}
    refusals = run_ranks(open_without_gpu, 3, 2, environment=environment)
    assert len(set(refusals)) == 1
    assert refusals[0].startswith("rank 2 (host ")
    assert "--device cuda was asked for and torch sees no CUDA device here" in refusals[0]


def refuse_on_one(rank: int) -> str:
    ranks = read_ranks()

    def act() -> int:
        if ranks.rank == rank:
            raise UserError("--n-samples: too many for this node")
        return ranks.rank

    with open_world(ranks, "cpu", "gloo", 30, {}) as world:
        assert world.together(lambda: ranks.rank) == ranks.rank
        with pytest.raises(UserError) as refused:
            world.together(act)
    return str(refused.value)


def test_a_refusal_on_one_rank_is_raised_on_all() -> None:
    refusals = run_ranks(refuse_on_one, 3, 1)
    assert len(set(refusals)) == 1
    assert refusals[0].endswith("): --n-samples: too many for this node")
    assert refusals[0].startswith("rank 1 (host ")


def refuse_on_rank_0() -> str:
    def refuse() -> int:
        raise UserError("--run-dir x is in use")

    with open_world(read_ranks(), "cpu", "gloo", 30, {}) as world, pytest.raises(UserError) as refused:
        world.on_rank_0(refuse)
    return str(refused.value)


def test_what_rank_0_refuses_is_refused_on_all_alike() -> None:
    assert run_ranks(refuse_on_rank_0, 3) == ["--run-dir x is in use"] * 3


def use_world() -> dict[str, Any]:
    """Open a world, use each of its collectives, and close it; returns their results."""
    seen: dict[str, Any] = {}
    ranks = read_ranks()
    with open_world(ranks, "cpu", "gloo", 30, {}) as world:
        seen["open"] = (dist.is_initialized(), dist.get_rank(), dist.get_world_size(), dist.get_backend())
        seen["sum"] = world.sum(torch.tensor([2**53 + 1, ranks.rank])).tolist()
        seen["gather"] = world.gather({"rank": ranks.rank})
        seen["on rank 0"] = world.on_rank_0(lambda: [f"from {ranks.rank}"])
        seen["first"] = world.agree_on_first(f"word of {ranks.rank}")
        seen["again"] = world.agree_on_first("another word")
        seen["description"] = world.describe()
    seen["closed"] = not dist.is_initialized()
    return seen


@pytest.mark.parametrize("size", [1, 3])
def test_a_world_opens_and_closes(size: int) -> None:
    results = run_ranks(use_world, size)
    for rank, seen in enumerate(results):
        assert seen["open"] == (True, rank, size, "gloo")
        assert seen["sum"] == [size * (2**53 + 1), sum(range(size))]  # float64 cannot hold it
        assert seen["gather"] == [{"rank": other} for other in range(size)]
        assert seen["on rank 0"] == ["from 0"]
        assert seen["first"] == results[0]["first"] == seen["again"]
        assert seen["description"] == f"{size} rank{'s' * (size > 1)} (torchrun), cpu, gloo"
        assert seen["closed"]
    assert results[0]["first"] in [f"word of {rank}" for rank in range(size)]


def raise_in_world() -> bool:
    try:
        with open_world(read_ranks(), "cpu", "gloo", 30, {}):
            raise LookupError
    except LookupError:
        return not dist.is_initialized()


def test_a_world_closes_after_an_error() -> None:
    assert run_ranks(raise_in_world, 2) == [True, True]


def open_world_of_one() -> tuple[int, list[int], bool]:
    with open_world(Ranks(), "cpu", "gloo", 30, {}) as world:
        size, total = dist.get_world_size(), torch.tensor([7])
        dist.all_reduce(total)
        world.gather(None)
    return size, total.tolist(), dist.is_initialized()


def test_one_process_is_a_world_too() -> None:
    assert run_ranks(open_world_of_one, 1) == [(1, [7], False)]


def gloo_interface() -> str:
    with open_world(read_ranks(), "cpu", "gloo", 30, {}):
        return os.environ["GLOO_SOCKET_IFNAME"]


def test_gloo_uses_loopback_on_one_node_by_default() -> None:
    assert run_ranks(gloo_interface, 2) == ["lo", "lo"]
    assert run_ranks(gloo_interface, 2, environment={"GLOO_SOCKET_IFNAME": "lo,lo"}) == ["lo,lo"] * 2


def lose_peer() -> bool:
    ranks = read_ranks()
    with open_world(ranks, "cpu", "gloo", 30, {}) as world:
        world.gather(None)
        if ranks.rank == 1:
            os._exit(0)
        with pytest.raises(RuntimeError) as failed:
            world.sum(torch.zeros(1, dtype=torch.int64))
    return is_lost_peer(failed.value)


def test_a_lost_peer_is_distinguished_from_other_errors() -> None:
    with Job(lose_peer, 2) as job:
        survivor, _ = job.wait(60)
    assert (survivor.code, survivor.value) == (0, True), survivor.output
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_peer(ValueError("Gloo"))
    assert not is_lost_peer(BrokenPipeError())
