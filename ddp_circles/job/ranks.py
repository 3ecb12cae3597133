"""The launcher's environment, read into ranks. The only module that reads launcher variables; imports no torch."""

import contextlib
import ipaddress
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

from ddp_circles.errors import UserError
from ddp_circles.terminal import beside_python, spell_numbers

LAUNCH_VARIABLE = "DDP_CIRCLES_START"
"""Set by launchers that restart the ranks by themselves: a name of the launch that survives restarts."""

COMMAND_VARIABLE = "DDP_CIRCLES_COMMAND"
"""Set by launch scripts: the command that starts the same training again, but for the trainer's flags."""

MODULE = "ddp_circles.train"
"""The trainer's command line, as it is named after `python -m`."""

LOOPBACK = "127.0.0.1"

MPI_VARIABLES = (
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),  # Open MPI
    tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),  # MVAPICH
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
)
"""Rank, world size, local rank and ranks of the node, as each kind of mpirun tells them."""

_parents: dict[int, int] = {}


def parent_at_start() -> int:
    """The id of the process that started this one, as it was at the first call here: it may be gone by now."""
    return _parents.setdefault(os.getpid(), os.getppid())


def set_thread_variables(threads: int) -> None:
    """Tell the math libraries to use `threads` CPU threads; they read the variables when torch is imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)


@dataclass(frozen=True)
class Ranks:
    """The place of this process among all processes of the job; raises `UserError` for one that cannot be."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = 0
    """None until the hosts of all ranks are known, where nobody has given it."""
    local_world_size: int = 1
    nodes: int = 1
    one_machine: bool = True
    """True if all ranks are known to be on this machine, in one network namespace."""
    launcher: str = "one process"
    """`torchrun`, `mpirun`, `srun`, `environment` for variables set by hand or by Kubernetes, or `one process`."""
    job_id: str | None = None
    """The launcher's name for the run, the same after a restart or requeue; None if it has none."""
    job: str = ""
    """The job in words, by which ranks of two jobs that meet at one port are told apart."""
    restarts: int = 0
    """Restarts of the workers by torchrun so far."""
    restarts_left: int = 0
    """Restarts that a failure may still cause."""
    launch: str | None = None
    """The name of this launch, the same after a restart, requeue or retry; None if the launcher does none of these."""
    store_address: tuple[str, int] | None = None
    """Host and port of the ranks' store; None for one process."""
    store_is_the_agents: bool = False
    """True if torchrun's agent holds the store, which then outlives the workers."""
    error_file: Path | None = None
    """The file in which torchrun's agent looks for the error that ended this rank; None without an agent."""

    def __post_init__(self) -> None:
        local_rank = self.local_rank or 0
        if not (0 <= self.rank < self.world_size and 0 <= local_rank < self.local_world_size <= self.world_size):
            raise UserError(
                f"{self.launcher}'s variables contradict each other: rank {self.rank} of {self.world_size}, "
                f"local rank {local_rank} of {self.local_world_size}"
            )

    @property
    def is_main(self) -> bool:
        """True for global rank 0, which speaks and writes."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """The rank and its host, for messages."""
        return f"rank {self.rank} (host {socket.gethostname()})"

    @property
    def serves_store(self) -> bool:
        """True if the ranks' store lives in this process."""
        return self.rank == 0 and self.store_address is not None and not self.store_is_the_agents

    @property
    def launched(self) -> bool:
        """True if a launcher started this process and looks after it."""
        return self.launcher not in ("environment", "one process")

    def on_hosts(self, hosts: Sequence[object]) -> "Ranks":
        """These ranks, given the host of each: whether they are on one machine, and what no launcher has told."""
        here = [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]]
        known = replace(self, one_machine=len(here) == self.world_size)
        if self.launcher not in ("environment", "mpirun"):
            return known
        local_rank = here.index(self.rank) if self.local_rank is None else self.local_rank
        return replace(known, local_rank=local_rank, local_world_size=len(here), nodes=len(set(hosts)))


def this_host() -> str:
    """The identity of this machine or container; two have the same only if their processes can meet on the loopback."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # /proc may be hidden
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/net").readlink()))
    return " ".join(parts)


def spell_ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-3, 7`."""
    spelled = spell_numbers(ranks)
    return f"rank{'' if spelled.isdigit() else 's'} {spelled}"


def read_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Find this process's ranks: RANK first, of torchrun or set by hand, then mpirun's, the Slurm step's, one process.

    Raises `UserError` where the variables contradict each other.
    """
    if "RANK" in environment:  # torchrun's agent sets its variables too, by hand or in Kubernetes nobody does
        return _torchrun_ranks(environment) if "TORCHELASTIC_RUN_ID" in environment else _given_ranks(environment)
    for names in MPI_VARIABLES:
        if environment.keys() >= set(names):  # in a Slurm job, the step's variables are those of mpirun's own helpers
            return _mpi_ranks(environment, names)
    if "WORLD_SIZE" in environment and environment.get("SLURM_STEP_NUM_TASKS") != environment["WORLD_SIZE"]:
        raise UserError("WORLD_SIZE is set without RANK: start with torchrun or srun, or unset WORLD_SIZE")
    if "SLURM_STEP_ID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        return _slurm_ranks(environment)
    for rank, size, *others in MPI_VARIABLES:
        if environment.get(size, "1") != "1" or (rank in environment and size not in environment):
            missing = [name for name in (rank, size, *others) if name not in environment]
            raise UserError(
                f"mpirun has set some of its variables, and not {', '.join(missing)}: start with torchrun or srun, or "
                "set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process"
            )
    return Ranks(job_id=environment.get("SLURM_JOB_ID") or None)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{name} must be a whole number beside the launcher's other variables, got {text!r}")
    return int(text)


def _torchrun_ranks(environment: Mapping[str, str]) -> Ranks:
    run_id = environment["TORCHELASTIC_RUN_ID"]
    error_file = environment.get("TORCHELASTIC_ERROR_FILE")
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    restarts = _number(environment, "TORCHELASTIC_RESTART_COUNT", 0)
    host = environment.get("MASTER_ADDR", LOOPBACK)
    agents = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    one_machine = environment.get("GROUP_WORLD_SIZE") == "1" or _is_loopback(host)
    return Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=_number(environment, "LOCAL_RANK", rank),
        local_world_size=_number(environment, "LOCAL_WORLD_SIZE", world_size),
        nodes=_number(environment, "GROUP_WORLD_SIZE", 1),
        one_machine=one_machine,
        launcher="torchrun",
        job_id=run_id if run_id not in ("", "none") else environment.get("SLURM_JOB_ID") or None,
        job=f"torchrun's job {run_id} of {world_size} ranks",
        restarts=restarts,
        restarts_left=max(0, _number(environment, "TORCHELASTIC_MAX_RESTARTS", 0) - restarts),
        # The agent makes the folder of its logs, .../RUN_ID_xxxx/attempt_N/RANK/error.json, anew for each launch.
        launch=environment.get(LAUNCH_VARIABLE) or (str(Path(error_file).parents[2]) if error_file else None),
        # Nobody outside the machine needs to reach a store of ours, whatever its name in MASTER_ADDR.
        store_address=(LOOPBACK if one_machine and not agents else host, _number(environment, "MASTER_PORT")),
        store_is_the_agents=agents,
        error_file=Path(error_file) if error_file else None,
    )


def _given_ranks(environment: Mapping[str, str]) -> Ranks:
    """Ranks without a launcher: by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and by LOCAL_* if they are given."""
    world_size = _number(environment, "WORLD_SIZE")
    local_world_size = _number(environment, "LOCAL_WORLD_SIZE", world_size)
    host = environment.get("MASTER_ADDR", LOOPBACK)
    one_machine = local_world_size == world_size
    if "LOCAL_WORLD_SIZE" not in environment:
        # In a pod of Kubernetes, localhost is the pod's own: it can be the first pod's MASTER_ADDR while others join.
        one_machine = _is_loopback(host) and "KUBERNETES_SERVICE_HOST" not in environment
    return Ranks(
        rank=_number(environment, "RANK"),
        world_size=world_size,
        local_rank=_number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else None,
        local_world_size=local_world_size,
        one_machine=one_machine,
        launcher="environment",
        job_id=environment.get("SLURM_JOB_ID") or None,
        job=f"a job of {world_size} ranks",
        launch=environment.get(LAUNCH_VARIABLE),
        store_address=(LOOPBACK if one_machine else host, _number(environment, "MASTER_PORT"))
        if world_size > 1
        else None,
    )


def _mpi_ranks(environment: Mapping[str, str], names: Sequence[str]) -> Ranks:
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {ours: environment[theirs] for ours, theirs in zip(own, names, strict=True)}
    one_machine = given["WORLD_SIZE"] == given["LOCAL_WORLD_SIZE"]
    # Jobs of one machine meet apart: by Open MPI's name for each, or by the process that has started all their ranks.
    job = environment.get("PMIX_NAMESPACE") or environment.get("SLURM_JOB_ID") or str(os.getppid() * one_machine)
    if one_machine:
        given["MASTER_PORT"] = environment.get("MASTER_PORT", str(20000 + crc32(job.encode()) % 20000))
    elif not ("MASTER_ADDR" in environment and "MASTER_PORT" in environment):
        raise UserError(
            "mpirun does not say where the ranks of several nodes can meet: give all of them MASTER_ADDR, the first "
            "node's name, and MASTER_PORT, a free port there (Open MPI: mpirun -x MASTER_ADDR=... -x MASTER_PORT=...)"
        )
    ranks = _given_ranks({**environment, **given})
    return replace(ranks, launcher="mpirun", job=f"mpirun's job {job} of {ranks.world_size} ranks")


def _slurm_ranks(environment: Mapping[str, str]) -> Ranks:
    world_size = _number(environment, "SLURM_STEP_NUM_TASKS")
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", 1)
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID", 0)
    host = _store_host(environment, nodes)
    port = _number(environment, "MASTER_PORT", 20000 + (job * 16 + step) % 20000)
    return Ranks(
        rank=_number(environment, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_world_size=_tasks_here(environment, world_size),
        nodes=nodes,
        one_machine=nodes == 1,
        launcher="srun",
        job_id=environment["SLURM_JOB_ID"],
        job=f"Slurm's step {job}.{step} of {world_size} ranks",
        launch=environment.get(LAUNCH_VARIABLE),
        store_address=(host, port) if world_size > 1 else None,
    )


def _tasks_here(environment: Mapping[str, str], world_size: int) -> int:
    """The number of the step's tasks on this node; Slurm writes 2, 2, 2 and 1 on four nodes as `2(x3),1`."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", str(world_size))
    node = _number(environment, "SLURM_NODEID", 0)
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        counts += [int(match[1])] * int(match[2] or 1) if match else []
    if node >= len(counts) or sum(counts) != world_size:
        raise UserError(
            f"srun's variables contradict each other: SLURM_STEP_NUM_TASKS is {world_size}, SLURM_NODEID {node}, "
            f"SLURM_STEP_TASKS_PER_NODE {text!r}"
        )
    return counts[node]


def _store_host(environment: Mapping[str, str], nodes: int) -> str:
    if nodes == 1:
        return LOOPBACK  # as above
    if host := environment.get("MASTER_ADDR"):
        return host
    node_list = environment.get("SLURM_STEP_NODELIST", "")
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"cannot tell the first node of {node_list!r}: set MASTER_ADDR in the job ({error})") from None
    return names.stdout.split()[0]


def how_to_continue(ranks: Ranks, words: list[str], changes: dict[str, str]) -> str:
    """The whole command that continues a run, or the way to it, for a process whose command line is `words`.

    `changes`: settings that a new start must have other than this one had.
    """
    if MODULE not in words:
        arguments = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        return "run the same program again" + (f", with Config({arguments})" if changes else "")
    command, flags = words[: words.index(MODULE) + 1], words[words.index(MODULE) + 1 :]
    for name, value in changes.items():
        flags += [f"--{name.replace('_', '-')}", value]  # the later flag counts
    if COMMAND_VARIABLE in os.environ:
        start = os.environ[COMMAND_VARIABLE]
    elif ranks.launcher == "torchrun" and ranks.nodes == 1:
        start = f"{beside_python('torchrun')} --nproc_per_node={ranks.local_world_size} -m {MODULE}"
    elif ranks.world_size == 1:
        start = shlex.join(command)
    else:
        return f"start the same again, with the trainer's flags {shlex.join(flags)}"
    return f"{start} {shlex.join(flags)}"
