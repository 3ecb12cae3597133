"""The process group of all ranks. The only module that creates or destroys one."""

import contextlib
import itertools
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from ddp_circles.errors import (
    FileError,
    HardwareError,
    OutOfRangeError,
    RunDirTakenError,
    SampleError,
    StopRequestedError,
    UserError,
)
from ddp_circles.job.cards import default_cards
from ddp_circles.job.devices import (
    Place,
    choose_device,
    device_uuid,
    first_refusal,
    start_driver,
    why_not_together,
)
from ddp_circles.job.ranks import Ranks, spell_ranks, this_host
from ddp_circles.job.stop import stop_requested
from ddp_circles.job.store import open_store
from ddp_circles.job.sums import sum_over_ranks
from ddp_circles.job.watch import STORE_SECONDS, WAITED, Watch, waiting
from ddp_circles.metrics import Arriving
from ddp_circles.plain import Plain, from_bytes, to_bytes
from ddp_circles.terminal import say

CONNECTING = "connect"
"""The phase in which the ranks, which have met at the store, open connections to each other."""
CARD_ADVICE = (
    "if the nodes have several network cards, name the one they share in GLOO_SOCKET_IFNAME or, for nccl, in "
    "NCCL_SOCKET_IFNAME: "
)
EVENT_SECONDS = 2e-5
"""Time between two looks for an event of the device; far below the time of a step."""
LOOK_SECONDS = 0.1
POLL_SECONDS = 0.01
PATIENCE_SECONDS = 10.0
"""Time until a rank says for whom it waits."""
STOP_SECONDS = 5.0
"""Time that a rank which was asked to stop still waits for the others: if they come, all save and stop together."""
HEARING_SECONDS = 5.0
"""Time that the rank that serves the store gives the others to read why the job is refused."""

T = TypeVar("T")

_world_numbers = itertools.count()
_last_group: list[Any] = []
"""The last process group that was closed, so that it outlives the models wrapped for it."""


def _share(
    store: Store, ranks: Ranks, name: str, own: object, decide: Callable[[list[Any]], object], given_up: threading.Event
) -> Any:
    """Return, on every rank, what rank 0's `decide` makes of each rank's `own`; all of it is what JSON knows."""

    def get(key: str) -> Any:
        # Looks, and does not wait in C++: a wait that ends while the interpreter does would abort the process.
        while not store.check([key]):
            if given_up.wait(POLL_SECONDS):
                raise ConnectionAbortedError("given up")
        return json.loads(store.get(key))

    store.set(f"{name}/{ranks.rank}", json.dumps(own))
    if ranks.is_main:
        store.set(name, json.dumps(decide([get(f"{name}/{rank}") for rank in range(ranks.world_size)])))
    return get(name)


def _number_hosts(hosts: list[str]) -> list[int]:
    numbers = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    return [numbers[host] for host in hosts]


def _agree(
    store: Store,
    ranks: Ranks,
    device: str,
    backend: str,
    settings: Mapping[str, object],
    given_up: threading.Event,
) -> tuple[torch.device, str]:
    """Choose this rank's device and backend; rank 0 checks that settings and devices of all ranks go together.

    Raises the same `UserError` on all ranks if they do not.
    """
    texts = {flag: str(value) for flag, value in settings.items()}
    chosen = None
    try:
        chosen = choose_device(device, backend, ranks.local_rank or 0)
        if chosen[0].type == "cuda":
            torch.cuda.set_device(chosen[0])
        place = Place(ranks.name, f"{chosen[0].type} with {chosen[1]}", device_uuid(chosen[0]), settings=texts)
    except (UserError, RuntimeError) as error:  # RuntimeError: the GPU is there and does not work
        place = Place(ranks.name, refusal=str(error), settings=texts)
    refusal = _share(
        store, ranks, "place", place, lambda places: why_not_together([Place(*one) for one in places]), given_up
    )
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
    watch: Watch
    """Looks after this rank until the world is closed."""
    timeout: float
    """Seconds that a collective may take."""
    number: int
    """Worlds that this process has opened before; the same on all ranks."""

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

    def sum(self, numbers: Tensor) -> Tensor:
        """Sum a row of numbers over all ranks; of integers, the bits do not depend on the order of addition."""
        return sum_over_ranks(numbers) if self.ranks.world_size > 1 else numbers

    def wait_for(self, event: torch.cuda.Event) -> None:
        """Wait until the device has reached `event`: a collective of NCCL's only joins a queue, and raises nothing.

        Raises `ConnectionError` when the job has failed elsewhere or a rank is gone, and after nine tenths of the
        timeout: at its end NCCL ends the process without a word.
        """
        patience = 0.9 * self.timeout
        deadline = time.monotonic() + patience
        with waiting:
            while not event.query():
                if news := self.watch.news:
                    raise ConnectionError(news.partition(":")[0])
                if time.monotonic() > deadline:
                    raise ConnectionError(f"no sum of all ranks came within {patience:g} s")
                time.sleep(EVENT_SECONDS)

    def _fetch(self, numbers: Tensor) -> Tensor:
        """A copy on the CPU. Reading `numbers` would wait in C++, where no signal is heard and no rank missed."""
        return Arriving(numbers).fetch(self.wait_for)

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
        buffer = self._padded(content, int(self._fetch(length)))
        dist.broadcast(buffer, src=0)
        return self._fetch(buffer).numpy().tobytes()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, made of what JSON knows, in the order of ranks, on every rank."""
        content = json.dumps(value).encode()
        lengths = torch.zeros(self.ranks.world_size, dtype=torch.int64, device=self.device)
        lengths[self.ranks.rank] = len(content)
        each = self._fetch(self.sum(lengths)).tolist()
        own = self._padded(content, max(each))
        pieces = own.new_empty(len(each), len(own))
        dist.all_gather(list(pieces.unbind()), own)
        rows = zip(self._fetch(pieces), each, strict=True)
        return [json.loads(row[:size].numpy().tobytes()) for row, size in rows]

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

    def refuse(self, mistake: str) -> None:
        """Raise the same `UserError` on all ranks if one of them has a `mistake`; for none, it costs one small sum."""
        if self._fetch(self.sum(torch.tensor([len(mistake)], device=self.device))).item():
            raise UserError(next(filter(None, self.gather(mistake))))


def _attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """The result of `action`, or the text of its `UserError`, or of a file that cannot be used."""
    try:
        return action(), ""
    except (UserError, FileError) as error:
        return None, str(error)


def _join(
    ranks: Ranks,
    watch: Watch,
    device: str,
    backend: str,
    timeout: float,
    settings: Mapping[str, object],
    given_up: threading.Event,
) -> World:
    """Meet the other ranks at the store, find out who is where, and open the process group, until `given_up` is set."""
    number = next(_world_numbers)
    start_driver(device, ranks.local_rank)  # before the first heartbeat: it can hold up all threads for many seconds
    # The store is more patient than `_attend`, which says who is missing.
    store = open_store(ranks, timedelta(seconds=timeout + STORE_SECONDS), number)
    watch.connect(store)
    ranks = ranks.on_hosts(_share(store, ranks, "host", this_host(), _number_hosts, given_up))
    own, backend = _agree(store, ranks, device, backend, settings, given_up)
    for name, card in default_cards(ranks.one_machine, ranks.store_address).items():
        if ranks.world_size == 1 or not os.environ.get(name):  # alone, a rank needs no card that is named
            os.environ[name] = card
    watch.mark(CONNECTING, 0, 0)
    dist.init_process_group(
        backend,
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=timeout),
        device_id=own if own.type == "cuda" else None,  # with it NCCL connects here, and not in the first collective
    )
    if given_up.is_set():
        dist.destroy_process_group()
    watch.mark("start", 0, 0)
    return World(ranks, own, backend, store, watch, timeout, number)


def _attend(joining: Future[World], ranks: Ranks, watch: Watch, timeout: float) -> World:
    """Wait until all ranks have joined; after `PATIENCE_SECONDS`, say for whom.

    Raises `ConnectionError` if that fails or takes more than `timeout` seconds; `StopRequestedError` instead if a stop
    was requested, which leaves the others `STOP_SECONDS` to come.
    """
    begun = time.monotonic()
    deadline, patience, failure = begun + timeout, begun + PATIENCE_SECONDS, ""
    place = ":".join(map(str, ranks.store_address or ()))
    while not failure:
        if wait([joining], LOOK_SECONDS).done:
            try:
                return joining.result()
            except Exception as error:
                if not (isinstance(error, OSError) or is_lost_peer(error)):
                    raise
                failure = first_sentence(error)
        now = time.monotonic()
        failure = failure or watch.news.partition(":")[0]
        if stop_requested():
            deadline = min(deadline, now + STOP_SECONDS)
        if not failure and now > deadline:
            failure = f"waited {now - begun:.0f} s for all ranks to join at {place}"
        if now > patience:
            patience = math.inf
            absent = watch.absent()
            if absent and (ranks.is_main or (0 in absent and not ranks.local_rank)):
                watch.say(
                    f"still waiting for {spell_ranks(absent)} of {ranks.world_size} ({ranks.launcher}) at {place}; "
                    f"waited {PATIENCE_SECONDS:.0f} s of {timeout:g} s"
                )
    if stop_requested():
        if not ranks.local_rank:
            watch.say("stopped before all ranks had joined; nothing was trained since the start")
        watch.last_words("was asked to stop")
        raise StopRequestedError
    raise ConnectionError(CARD_ADVICE * (watch.position[0] == CONNECTING and not watch.news) + failure)


@contextmanager
def open_world(
    ranks: Ranks, device: str, backend: str, timeout: float, settings: Mapping[str, object]
) -> Iterator[World]:
    """Join the process group of all ranks, and leave it whatever happens; a world of one is a world too.

    `device` and `backend` as in the configuration. `timeout`: seconds that a collective may take, and the start.
    `settings`: flags and values that must be the same on all ranks. Raises `UserError`, the same on all ranks, if their
    settings or devices do not go together; also if they would look for each other at stale addresses, or find another
    job, or if a process group is open already. Raises `SystemExit` if another rank does not come or is lost meanwhile,
    and `StopRequestedError` if a stop was requested and not all ranks come.
    """
    if dist.is_initialized():
        raise UserError(
            "a torch.distributed process group is open already: do not call init_process_group, the ranks' group is "
            "opened and closed here; call destroy_process_group before if you need one of your own"
        )
    with Watch(ranks) as watch:
        joining: Future[World] = Future()
        with telling_others(ranks, watch):
            # In a thread, for these calls wait in C++: this one hears signals and the news meanwhile.
            given_up = threading.Event()
            join = partial(_join, ranks, watch, device, backend, timeout, settings, given_up)
            threading.Thread(target=_fulfil, args=(joining, join), daemon=True).start()
            try:
                world = _attend(joining, ranks, watch, timeout)
            finally:
                given_up.set()
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)  # each thread has its own
        # gloo's sockets tell of a rank that is gone. NCCL's kernels wait on; torchrun asks the others to stop.
        watch.listening = lambda: world.backend == "nccl" and bool(waiting) and stop_requested()
        try:
            yield world
        finally:
            # DDP holds the group in C++. If it held the last reference, the group would end with Python's lock held and
            # wait for a thread of gloo's that may be waiting for that very lock, to drop the tensors of the last sum.
            _last_group[:] = [dist.group.WORLD]
            dist.destroy_process_group()


def _fulfil(future: Future[T], action: Callable[[], T]) -> None:
    try:
        future.set_result(action())
    except BaseException as error:
        future.set_exception(error)


@contextmanager
def telling_others(ranks: Ranks, watch: Watch, spell: Callable[[str], str] = str) -> Iterator[None]:
    """Tell the other ranks how this one ends; an end that is no fault in the program becomes one line and exit code 1.

    `spell`: puts flags into the words of the caller.
    """
    try:
        yield
    except (UserError, StopRequestedError):
        raise
    except (HardwareError, OutOfRangeError, RunDirTakenError, FileError, SampleError) as error:
        watch.say(spell(str(error)))
        watch.last_words(f"raised {type(error).__name__}")
        raise SystemExit(1) from None
    except Exception as error:
        if ranks.world_size > 1 and is_lost_peer(error):
            reason = first_sentence(error)
            watch.last_words(WAITED, lambda missing: watch.say(f"lost a peer: {missing} ({reason})"))
            raise SystemExit(1) from None
        watch.last_words(f"raised {type(error).__name__}")
        raise


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
