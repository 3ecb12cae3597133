"""The process group of all ranks. The only module that creates or destroys one."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from ddp_circles.errors import UserError
from ddp_circles.job.devices import Place, choose_device, device_uuid, first_refusal, why_not_together
from ddp_circles.job.ranks import Ranks, set_thread_variables, spell_ranks
from ddp_circles.job.store import open_store
from ddp_circles.job.watch import waiting
from ddp_circles.plain import Plain, from_bytes, to_bytes
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


def _agree(
    store: Store, ranks: Ranks, device: str, backend: str, settings: Mapping[str, object]
) -> tuple[torch.device, str]:
    """Choose this rank's device and backend; rank 0 checks that settings and devices of all ranks go together.

    Raises the same `UserError` on all ranks if they do not.
    """
    texts = {flag: str(value) for flag, value in settings.items()}
    chosen = None
    try:
        chosen = choose_device(device, backend, ranks.local_rank)
        if chosen[0].type == "cuda":
            torch.cuda.set_device(chosen[0])
        place = Place(ranks.name, f"{chosen[0].type} with {chosen[1]}", device_uuid(chosen[0]), settings=texts)
    except (UserError, RuntimeError) as error:  # RuntimeError: the GPU is there and does not work
        place = Place(ranks.name, refusal=str(error), settings=texts)
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

    def on_rank_0(self, action: Callable[[], Plain]) -> Plain:
        """Call `action` on rank 0 alone; returns its result, or raises its `UserError`, on every rank."""
        content = self._broadcast(to_bytes(_attempt(action)) if self.ranks.is_main else b"")
        result, refusal = from_bytes(content)
        if refusal:
            raise UserError(refusal)
        return result

    def _broadcast(self, content: bytes) -> bytes:
        """Rank 0's `content`, on every rank."""
        length = torch.tensor(len(content), device=self.device)
        dist.broadcast(length, src=0)
        buffer = self._padded(content, int(length))
        dist.broadcast(buffer, src=0)
        return buffer.cpu().numpy().tobytes()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, made of what JSON knows, in the order of ranks, on every rank."""
        content = json.dumps(value).encode()
        lengths = torch.zeros(self.ranks.world_size, dtype=torch.int64, device=self.device)
        lengths[self.ranks.rank] = len(content)
        each = self.sum(lengths).tolist()
        own = self._padded(content, max(each))
        pieces = [torch.empty_like(own) for _ in each]
        dist.all_gather(pieces, own)
        return [json.loads(piece[:size].cpu().numpy().tobytes()) for piece, size in zip(pieces, each, strict=True)]

    def _padded(self, content: bytes, length: int) -> Tensor:
        return torch.frombuffer(bytearray(content.ljust(length, b"\0")), dtype=torch.uint8).to(self.device)

    def check_alike(self, digests: Mapping[str, str]) -> None:
        """Raise the same `UserError` on all ranks if something was not given to all alike; by name, as digests."""
        everyone = self.gather(dict(digests))
        for name in digests:
            values = [given[name] for given in everyone]
            if odd := [rank for rank, value in enumerate(values) if value != values[0]]:
                raise UserError(
                    f"{spell_ranks(odd)} {'was' if len(odd) == 1 else 'were'} given other {name} than rank 0: make "
                    "them alike on every rank, from the same seed or file"
                )

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
def open_world(
    ranks: Ranks, device: str, backend: str, timeout: float, settings: Mapping[str, object]
) -> Iterator[World]:
    """Join the process group of all ranks, and leave it whatever happens; a world of one is a world too.

    `device` and `backend` as in the configuration. `timeout`: seconds that a collective may take. `settings`: flags and
    values that must be the same on all ranks. Raises `ConnectionError` if the ranks do not find each other, and
    `UserError`, the same on all ranks, if their settings or devices do not go together; also if they would look for
    each other at stale addresses, or find another job.
    """
    number = next(_world_numbers)
    try:
        store = open_store(ranks, timedelta(seconds=timeout), number)
        own, backend = _agree(store, ranks, device, backend, settings)
        if ranks.one_machine:  # neither library needs to listen beyond it
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                if ranks.world_size == 1 or not os.environ.get(name):  # alone, a rank needs no card that is named
                    os.environ[name] = "lo"
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
