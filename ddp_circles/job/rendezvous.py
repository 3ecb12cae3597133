"""A rendezvous for `torchrun --rdzv-backend=loopback`, which only this machine can reach.

A `c10d` rendezvous listens on all addresses and unpickles what it finds in its store. For a single node there is
nothing to negotiate, so nothing is unpickled here. torch alone imports this module, by its entry point.
"""

from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from ddp_circles.job.ranks import LOOPBACK
from ddp_circles.job.store import serve_store

STORE_SECONDS = 600


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


def handler() -> type[LoopbackRendezvous]:
    """The entry point at which torchrun finds the rendezvous."""
    return LoopbackRendezvous
