"""The process group of all ranks. The only module that creates or destroys one."""

import contextlib
import itertools
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from ddp_circles.errors import UserError
from ddp_circles.job.devices import Place, choose_device, device_uuid, first_refusal, why_not_together
from ddp_circles.job.ranks import Ranks, set_thread_variables
from ddp_circles.job.watch import waiting
from ddp_circles.terminal import say

HEARING_SECONDS = 5.0
"""Time that the rank that serves the store gives the others to read why the job is refused."""

T = TypeVar("T")

_world_numbers = itertools.count()
_last_group: list[Any] = []
"""The last process group that was closed, so that it outlives the models wrapped for it."""


def pin_threads(threads: int) -> None:
    """Use `threads` CPU threads in this rank, however it was started."""
    set_thread_variables(threads)
    torch.set_num_threads(threads)


def _agree_on_device(store: Store, ranks: Ranks, device: str, backend: str) -> tuple[torch.device, str]:
    """Choose this rank's device and backend; rank 0 checks that those of all ranks go together.

    Raises the same `UserError` on all ranks if they do not.
    """
    chosen = None
    try:
        chosen = choose_device(device, backend, ranks.local_rank)
        if chosen[0].type == "cuda":
            torch.cuda.set_device(chosen[0])
        place = Place(ranks.name, f"{chosen[0].type} with {chosen[1]}", device_uuid(chosen[0]))
    except (UserError, RuntimeError) as error:  # RuntimeError: the GPU is there and does not work
        place = Place(ranks.name, refusal=str(error))
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


@dataclass(frozen=True)
class World:
    """An open process group: the ranks, their device, their store, and the collectives the package needs."""

    ranks: Ranks
    device: torch.device
    backend: str
    store: Store
    """The key-value store of this start's ranks."""
    timeout: float
    """Seconds that a collective may take."""
    number: int
    """Worlds that this process has opened before; the same on all ranks."""

    @property
    def patience(self) -> float:
        """Seconds to wait for a sum on the device: at `timeout` NCCL ends the process without a word."""
        return 0.9 * self.timeout

    def describe(self) -> str:
        """A phrase for the log: the ranks, their launcher, their device."""
        ranks = self.ranks
        count = "1 rank" if ranks.world_size == 1 else f"{ranks.world_size} ranks"
        nodes = f" on {ranks.nodes} nodes" if ranks.nodes > 1 else ""
        return f"{count}{nodes} ({ranks.launcher}), {self.device.type}, {self.backend}"

    def say(self, line: str) -> None:
        """Print a line, from rank 0 alone."""
        if self.ranks.is_main:
            say(line)

    def agree_on_first(self, word: str) -> str:
        """The first value any rank proposes wins; it survives a restart of the workers."""
        lasting = getattr(self.store, "underlying_store", self.store)
        return lasting.compare_set(f"ddp_circles/first word {self.number}", "", word).decode()

    def sum(self, integers: Tensor) -> Tensor:
        """Sum int64 `integers` over all ranks, in place; the bits do not depend on the order of addition."""
        if self.ranks.world_size > 1:
            with waiting:
                dist.all_reduce(integers)
        return integers

    def on_rank_0(self, action: Callable[[], T]) -> T:
        """Call `action` on rank 0 alone; returns its result, or raises its `UserError`, on every rank."""
        box = list(_attempt(action)) if self.ranks.is_main else [None, ""]
        dist.broadcast_object_list(box, src=0, device=self.device)
        result, refusal = box
        if refusal:
            raise UserError(refusal)
        return cast(T, result)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in the order of ranks, on every rank."""
        box: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(box, value)
        return box

    def together(self, action: Callable[[], T]) -> T:
        """Call `action` on every rank; if any rank refuses with a `UserError`, all ranks raise the same one."""
        result, refusal = _attempt(action)
        if refusal := first_refusal(self.gather((self.ranks.name, refusal))):
            raise UserError(refusal)
        return cast(T, result)


def _attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """The result of `action`, or the text of its `UserError`."""
    try:
        return action(), ""
    except UserError as error:
        return None, str(error)


@contextmanager
def open_world(ranks: Ranks, device: str, backend: str, timeout: float) -> Iterator[World]:
    """Join the process group of all ranks, and leave it whatever happens; a world of one is a world too.

    `device` and `backend` as in the configuration. `timeout`: seconds that a collective may take. Raises
    `ConnectionError` if the ranks do not find each other, and the same `UserError` on all ranks if their devices do not
    go together or if they would look for each other at stale addresses.
    """
    number = next(_world_numbers)
    try:
        store = _open_store(ranks, timedelta(seconds=timeout), number)
        own, backend = _agree_on_device(store, ranks, device, backend)
        if ranks.nodes == 1 and backend == "gloo":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            backend,
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timedelta(seconds=timeout),
            device_id=own if own.type == "cuda" else None,
        )
    except (RuntimeError, OSError) as error:
        card = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        raise ConnectionError(
            f"rank {ranks.rank} did not find the other {ranks.world_size - 1} ranks at {ranks.store_address}: {error}\n"
            f"If the nodes have several network cards, name the one they share in {card}."
        ) from error
    try:
        yield World(ranks, own, backend, store, timeout, number)
    finally:
        # DDP holds the group in C++. If it held the last reference, the group would end with Python's lock held and
        # wait for a thread of gloo's that may be waiting for that very lock, to drop the tensors of the last sum.
        _last_group[:] = [dist.group.WORLD]
        dist.destroy_process_group()


def _open_store(ranks: Ranks, timeout: timedelta, number: int) -> Store:
    """Open the ranks' key-value store, with a name space for each restart and each world of a process."""
    if ranks.store_address is None:
        return HashStore()
    # An agent's store outlives the workers. Any other is new at each start, where the nodes' restart counts may differ.
    start = ranks.restarts if ranks.store_is_the_agents else 0
    return PrefixStore(f"start {start} world {number}", _connect(ranks, timeout))


@cache  # open for the life of the process: other ranks may enter the next world before the rank that serves it
def _connect(ranks: Ranks, timeout: timedelta) -> Store:
    assert ranks.store_address is not None
    if ranks.restarts and ranks.nodes > 1 and ranks.store_is_the_agents:
        raise UserError(
            "restarts between nodes need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of every torchrun: "
            "without it the ranks meet at stale addresses (launch/multi_node.sh sets it)"
        )
    host, port = ranks.store_address
    if ranks.store_is_the_agents:
        # It was there before this process: if nobody answers, the launcher is gone and waiting is in vain.
        socket.create_connection((host, port), timeout.total_seconds()).close()
    serves = ranks.serves_store
    return TCPStore(host, port, None, serves, timeout, multi_tenant=serves, wait_for_workers=False)


def is_lost_peer(error: BaseException) -> bool:
    """True if `error` says that a collective failed because another rank is gone or silent."""
    if isinstance(error, BrokenPipeError):  # the reader of our output left, not a rank
        return False
    if isinstance(error, (dist.DistError, ConnectionError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("gloo/transport", "Gloo", "NCCL"))


def first_sentence(error: BaseException) -> str:
    """The first sentence of a backend's long message, without the place in its source."""
    return re.sub(r"\[\S+:\d+\] ", "", " ".join(str(error).split())).split(". ")[0][:200]
