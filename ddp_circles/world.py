"""From the launcher's environment to ranks, and from ranks to a process group and back out of it.

The only module that reads launcher variables and the only one that creates or destroys a process group.
"""

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ddp_circles.config import UserError

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

SHARED_STORE_VARIABLE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
START_VARIABLE = "DDP_CIRCLES_START"
"""Set by launchers that start the ranks again by themselves: what names this start through all of that."""
HEARING_SECONDS = 5.0
"""How long the rank that serves the store stays, so that the others can read why the job is refused."""

T = TypeVar("T")

_world_numbers = itertools.count()
_stores: "dict[tuple[str, int], Store]" = {}
"""Kept open for the life of the process: others may be in the next world before the rank that serves the store."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is among all processes of the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    nodes: int = 1
    launcher: str = "one process"
    """`torchrun`, `srun` or `one process`."""
    job_id: str | None = None
    """The launcher's name of the run, the same after a restart or requeue; None where it has none."""
    restarts: int = 0
    """How often torchrun has restarted the workers."""
    start: str | None = None
    """The launcher's name of this start, the same after a requeue or retry; None where it does neither."""
    store_address: tuple[str, int] | None = None
    """Where the ranks meet; None for one process."""
    store_is_the_agents: bool = False
    """Whether torchrun's agent holds the store, so that it outlives the workers."""

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0, the one that speaks and writes."""
        return self.rank == 0

    @property
    def serves_store(self) -> bool:
        """Whether the ranks' store lives in this process."""
        return self.rank == 0 and self.store_address is not None and not self.store_is_the_agents

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process and looks after it."""
        return self.launcher != "one process"


def read_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Find this process's ranks: torchrun's variables first, then the Slurm step's, then one process.

    Raises `UserError` where the variables contradict each other.
    """
    if "RANK" in environment:
        return _torchrun_ranks(environment)
    if "WORLD_SIZE" in environment and environment.get("SLURM_STEP_NUM_TASKS") != environment["WORLD_SIZE"]:
        raise UserError("WORLD_SIZE is set without RANK: start with torchrun or srun, or unset WORLD_SIZE")
    job_id = environment.get("SLURM_JOB_ID")
    if "SLURM_STEP_ID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        return _slurm_ranks(environment)
    return Ranks(job_id=job_id)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise UserError(f"{name} must be a whole number beside the launcher's other variables, got {text!r}")
    return int(text)


def _checked(ranks: Ranks) -> Ranks:
    if not (0 <= ranks.rank < ranks.world_size and 0 <= ranks.local_rank < ranks.local_world_size <= ranks.world_size):
        raise UserError(
            f"{ranks.launcher}'s variables contradict each other: rank {ranks.rank} of {ranks.world_size}, "
            f"local rank {ranks.local_rank} of {ranks.local_world_size}"
        )
    return ranks


def _torchrun_ranks(environment: Mapping[str, str]) -> Ranks:
    run_id = environment.get("TORCHELASTIC_RUN_ID", "none")
    return _checked(
        Ranks(
            rank=_number(environment, "RANK"),
            world_size=_number(environment, "WORLD_SIZE"),
            local_rank=_number(environment, "LOCAL_RANK", _number(environment, "RANK")),
            local_world_size=_number(environment, "LOCAL_WORLD_SIZE", _number(environment, "WORLD_SIZE")),
            nodes=_number(environment, "GROUP_WORLD_SIZE", 1),
            launcher="torchrun",
            job_id=run_id if run_id not in ("", "none") else environment.get("SLURM_JOB_ID"),
            restarts=_number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
            start=environment.get(START_VARIABLE),
            store_address=(environment.get("MASTER_ADDR", "127.0.0.1"), _number(environment, "MASTER_PORT")),
            store_is_the_agents=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    )


def _slurm_ranks(environment: Mapping[str, str]) -> Ranks:
    world_size = _number(environment, "SLURM_STEP_NUM_TASKS")
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", 1)
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID", 0)
    host = environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_STEP_NODELIST", ""), nodes)
    port = _number(environment, "MASTER_PORT", 20000 + (job * 16 + step) % 20000)
    return _checked(
        Ranks(
            rank=_number(environment, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=_number(environment, "SLURM_LOCALID"),
            local_world_size=_tasks_here(environment, world_size),
            nodes=nodes,
            launcher="srun",
            job_id=environment["SLURM_JOB_ID"],
            start=environment.get(START_VARIABLE),
            store_address=(host, port) if world_size > 1 else None,
        )
    )


def _tasks_here(environment: Mapping[str, str], world_size: int) -> int:
    """How many of the step's tasks run on this node; Slurm writes 2, 2, 2 and 1 on four nodes as `2(x3),1`."""
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


def _first_host(node_list: str, nodes: int) -> str:
    if nodes == 1:
        return "127.0.0.1"
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"cannot tell the first node of {node_list!r}: set MASTER_ADDR in the job ({error})") from None
    return names.stdout.split()[0]


def pin_threads(threads: int) -> None:
    """Use `threads` CPU threads in this rank, however it was started; before torch is imported where possible."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _agree_on_device(store: "Store", ranks: Ranks, device: str, backend: str) -> "tuple[torch.device, str]":
    """This rank's device and backend, once rank 0 has seen that those of all ranks go together.

    Raises the same `UserError` on all ranks where they do not.
    """
    import torch

    from ddp_circles.devices import Place, choose_device, device_uuid, why_not_together

    host, chosen = socket.gethostname(), None
    try:
        chosen = choose_device(device, backend, ranks.local_rank)
        if chosen[0].type == "cuda":
            torch.cuda.set_device(chosen[0])
        place = Place(host, f"{chosen[0].type} with {chosen[1]}", device_uuid(chosen[0]))
    except (UserError, RuntimeError) as error:  # the latter from a GPU that is there and does not work
        place = Place(host, refusal=str(error))
    store.set(f"place/{ranks.rank}", json.dumps(place))
    if ranks.is_main:
        places = [Place(*json.loads(store.get(f"place/{rank}"))) for rank in range(ranks.world_size)]
        store.set("refusal", why_not_together(places))
    refusal = store.get("refusal").decode()
    if refusal or chosen is None:
        store.set(f"heard/{ranks.rank}", "")
        if ranks.serves_store:
            with contextlib.suppress(RuntimeError):
                store.wait([f"heard/{rank}" for rank in range(ranks.world_size)], timedelta(seconds=HEARING_SECONDS))
        raise UserError(refusal)
    return chosen


class World:
    """An open process group: the ranks, their device, their store, and the collectives the package needs."""

    def __init__(
        self, ranks: Ranks, device: "torch.device", backend: str, store: "Store", timeout: float, number: int
    ) -> None:
        self.ranks = ranks
        self.device = device
        self.backend = backend
        self.store = store
        """Where the ranks of this start meet."""
        self.timeout = timeout
        """Seconds that a collective may take."""
        self.number = number
        """How many worlds this process had opened before, as the other ranks had."""

    @property
    def patience(self) -> float:
        """Seconds to wait for a sum on the device: at `timeout` NCCL ends the process without a word."""
        return 0.9 * self.timeout

    def describe(self) -> str:
        """One phrase for the log: how many ranks, who started them, what they compute on."""
        ranks = self.ranks
        count = "1 rank" if ranks.world_size == 1 else f"{ranks.world_size} ranks"
        nodes = f" on {ranks.nodes} nodes" if ranks.nodes > 1 else ""
        return f"{count}{nodes} ({ranks.launcher}), {self.device.type}, {self.backend}"

    def agree_on_first(self, word: str) -> str:
        """Of all words given in this world, and before a restart of the workers in the same one, the first."""
        lasting = getattr(self.store, "underlying_store", self.store)
        return lasting.compare_set(f"ddp_circles/first word {self.number}", "", word).decode()

    def sum(self, integers: "torch.Tensor") -> "torch.Tensor":
        """Add up `integers` over all ranks, in place; the sum of int64 has the same bits in any order."""
        import torch.distributed as dist

        if self.ranks.world_size > 1:
            dist.all_reduce(integers)
        return integers

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in the order of ranks, on every rank."""
        import torch.distributed as dist

        box: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(box, value)
        return box

    def together(self, action: Callable[[], T]) -> T:
        """What `action` returns here; where it is refused on any rank, all ranks raise the same `UserError`."""
        from ddp_circles.devices import first_refusal

        done: list[T] = []
        refusal = ""
        try:
            done.append(action())
        except UserError as error:
            refusal = str(error)
        if refusal := first_refusal(self.gather((socket.gethostname(), refusal))):
            raise UserError(refusal)
        return done[0]


@contextmanager
def open_world(ranks: Ranks, device: str, backend: str, timeout: float) -> "Iterator[World]":
    """Join the process group of all ranks, and leave it whatever happens.

    `device` and `backend` as in the configuration. `timeout`: seconds that a collective may take. A world of one is a
    world too. Raises `ConnectionError` if the ranks do not find each other, and the same `UserError` on all ranks if
    they would look for each other at stale addresses, or if their devices do not go together.
    """
    import torch.distributed as dist

    card = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    number = next(_world_numbers)
    try:
        store = _open_store(ranks, timedelta(seconds=timeout), number)
        own, chosen = _agree_on_device(store, ranks, device, backend)
        card = "NCCL_SOCKET_IFNAME" if chosen == "nccl" else "GLOO_SOCKET_IFNAME"
        if ranks.nodes == 1 and chosen == "gloo":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            chosen,
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timedelta(seconds=timeout),
            device_id=own if own.type == "cuda" else None,
        )
    except (RuntimeError, OSError) as error:
        raise ConnectionError(
            f"rank {ranks.rank} did not find the other {ranks.world_size - 1} ranks at {ranks.store_address}: {error}\n"
            f"If the nodes have several network cards, name the one they share in {card}."
        ) from error
    try:
        yield World(ranks, own, chosen, store, timeout, number)
    finally:
        dist.destroy_process_group()


def _open_store(ranks: Ranks, timeout: timedelta, number: int) -> "Store":
    """The store in which the ranks meet: a name space of its own for each restart, and for each world of a process."""
    from torch._C._distributed_c10d import HashStore, PrefixStore

    if ranks.store_address is None:
        return HashStore()
    store = _stores[ranks.store_address] = _stores.get(ranks.store_address) or _connect(ranks, timeout)
    # An agent's store outlives the workers. Any other is new at each start, and then the nodes' counts may differ.
    return PrefixStore(f"start {ranks.restarts if ranks.store_is_the_agents else 0} world {number}", store)


def _connect(ranks: Ranks, timeout: timedelta) -> "Store":
    from torch._C._distributed_c10d import TCPStore

    assert ranks.store_address is not None
    if ranks.restarts and ranks.nodes > 1 and ranks.store_is_the_agents:
        raise UserError(
            f"restarts between nodes need {SHARED_STORE_VARIABLE}=1 in the environment of every torchrun: "
            "without it the ranks meet at stale addresses (launch/multi_node.sh sets it)"
        )
    host, port = ranks.store_address
    if ranks.store_is_the_agents:
        # It stood before this process began: if nobody answers, the launcher is gone, and waiting is in vain.
        socket.create_connection((host, port), timeout.total_seconds()).close()
    serves = ranks.serves_store
    return TCPStore(host, port, None, serves, timeout, multi_tenant=serves, wait_for_workers=False)


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` says that a collective failed because another rank is gone or silent."""
    import torch.distributed as dist

    if isinstance(error, BrokenPipeError):  # who read what is printed here has left, and no rank
        return False
    if isinstance(error, (dist.DistError, ConnectionError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("gloo/transport", "Gloo", "NCCL"))


def fingerprint(device: "torch.device", threads: int) -> dict[str, str]:
    """What the bits of a result depend on besides the configuration; equal on ranks that compute alike."""
    import torch

    on_cuda = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "instruction_set": "" if on_cuda else torch.backends.cpu.get_cpu_capability(),
        "mkl_cbwr": os.environ.get("MKL_CBWR", ""),
        "threads": str(threads),
    }
