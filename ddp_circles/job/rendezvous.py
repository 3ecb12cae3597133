"""Two ways for torchrun to find its nodes, chosen by `--rdzv-backend`. torch imports this module, by its entry points.

`loopback`: one node, which only this machine can reach. A `c10d` rendezvous listens on all addresses and unpickles what
it finds in its store. For a single node there is nothing to negotiate, so nothing is unpickled here.

`bounded`: `c10d`, but torchrun does not outlive its ranks when the other nodes are out of reach.
"""

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

from torch._C._distributed_c10d import PrefixStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from ddp_circles.job.ranks import LOOPBACK
from ddp_circles.job.store import serve_store
from ddp_circles.terminal import complain

STORE_SECONDS = 600
IDLE_SECONDS = 40
"""Time that torchrun without ranks may wait for the others. They kill ranks that do not end after 30 seconds, and going
on without a node that is gone takes 15 seconds and the last call."""
LAST_CALL_SECONDS = 10
"""Time to wait for more nodes once there are enough."""


class LoopbackRendezvous(StaticTCPRendezvous):
    """The rendezvous of a single agent, whose store serves its workers too: `torchrun --rdzv-backend=loopback`."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        if parameters.max_nodes != 1:
            raise ValueError("--rdzv-backend=loopback is for one node: use c10d for several")
        self._server = serve_store(0, timedelta(seconds=STORE_SECONDS))
        super().__init__(LOOPBACK, self._server.port, 0, 1, parameters.run_id, STORE_SECONDS)

    def get_backend(self) -> str:
        """The name by which torchrun asks for this rendezvous."""
        return "loopback"

    def next_rendezvous(self) -> RendezvousInfo:
        """Rank 0 of one agent, at the address of its store."""
        address = RendezvousStoreInfo(LOOPBACK, self._server.port)
        return RendezvousInfo(PrefixStore(self.run_id, self._server), 0, 1, address)


class BoundedRendezvous(RendezvousHandler):
    """A `c10d` rendezvous that ends torchrun when its ranks are gone and it waits in vain for the other nodes.

    Without it, torchrun waits ten minutes for nodes that it cannot reach, and for ever if the head node is among them.
    `--rdzv-conf=idle_timeout=SECONDS`: how long it may wait, after its first start.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        parameters.config = {"last_call_timeout": LAST_CALL_SECONDS} | parameters.config
        backend, store = create_backend(parameters)
        self._c10d = create_handler(store, backend, parameters)
        self._patience = parameters.get_as_int("idle_timeout", IDLE_SECONDS) or IDLE_SECONDS
        self._waits_since = math.inf
        threading.Thread(target=self._watch, name="bounded", daemon=True).start()

    def _watch(self) -> NoReturn:
        started = False
        while not started or _has_ranks() or time.monotonic() - self._waits_since < self._patience:
            started = started or _has_ranks()
            time.sleep(1)
        complain(
            f"torchrun has waited {self._patience} s for the other nodes, and ranks of this one have ended: ending it; "
            "the same command on all nodes continues the run"
        )
        os._exit(1)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self._waits_since = time.monotonic()
        try:
            yield
        finally:
            self._waits_since = math.inf

    def get_backend(self) -> str:
        """The name by which torchrun asks for this rendezvous."""
        return "bounded"

    @property
    def use_agent_store(self) -> bool:
        """As `c10d`, and so are the following."""
        return self._c10d.use_agent_store

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other nodes."""
        with self._waiting():
            return self._c10d.next_rendezvous()

    def is_closed(self) -> bool:
        """True once a node has ended the job."""
        return self._c10d.is_closed()

    def set_closed(self) -> None:
        """End the job."""
        self._c10d.set_closed()

    def num_nodes_waiting(self) -> int:
        """The number of nodes that would like to join."""
        with self._waiting():
            return self._c10d.num_nodes_waiting()

    def get_run_id(self) -> str:
        """The job's name."""
        return self._c10d.get_run_id()

    def shutdown(self) -> bool:
        """End the job for all nodes that wait."""
        with self._waiting():
            return self._c10d.shutdown()


def _has_ranks() -> bool:
    """True while torchrun has ranks, none of which has ended without its notice."""
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def handler() -> type[LoopbackRendezvous]:
    """The entry point at which torchrun finds `loopback`."""
    return LoopbackRendezvous


def bounded_handler() -> type[BoundedRendezvous]:
    """The entry point at which torchrun finds `bounded`."""
    return BoundedRendezvous
