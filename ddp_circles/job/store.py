"""The key-value store at which the ranks meet; on one machine, nobody outside it can connect.

torch's own stores listen on all addresses, without a password.
"""

import errno
import socket
import time
from datetime import timedelta

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from ddp_circles.errors import LoneMistakeError, UserError
from ddp_circles.job.ranks import LOOPBACK, Ranks

CONNECT_SECONDS = 10.0
"""Time that the machine of the store has to answer one attempt."""
JOB = "ddp_circles/job"
"""The key that holds the name of the job that meets here."""

_stores: dict[tuple[str, int], Store] = {}
"""Open for the life of the process: other ranks may enter the next world before the rank that serves it."""


def open_store(ranks: Ranks, timeout: timedelta, number: int) -> Store:
    """Open the ranks' store, with a name space for each job, each restart and each world (`number`) of a process.

    Raises `UserError` if another job meets there.
    """
    if ranks.store_address is None:
        return HashStore()
    if ranks.restarts and ranks.nodes > 1 and ranks.store_is_the_agents:
        raise UserError(
            "restarts between nodes need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of every torchrun: "
            "without it the ranks meet at stale addresses (launch/multi_node.sh sets it)"
        )
    host, port = ranks.store_address
    base = _connect(ranks, host, port, timeout)
    base.set_timeout(timeout)
    advice = "give each job a MASTER_PORT of its own"
    if ranks.nodes > 1 and ranks.store_is_the_agents:  # torchrun counts no restart then
        advice += ", or set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 if nodes have joined or left"
    other = _name_job(base, ranks)
    if other != ranks.job:
        raise UserError(f"{host}:{port} is where {other} meets, not {ranks.job}: {advice}")
    # An agent's store outlives the workers. Any other is new at each start, where the nodes' restart counts may differ.
    start = ranks.restarts if ranks.store_is_the_agents else 0
    store = PrefixStore(f"{ranks.job}, start {start}, world {number}", base)
    if store.add(f"rank/{ranks.rank}", 1) > 1:
        raise LoneMistakeError(f"rank {ranks.rank} is at {host}:{port} already: two jobs meet there; {advice}")
    return store


def serve_store(port: int, timeout: timedelta) -> TCPStore:
    """Serve a store on the loopback at `port`, 0 for any free one; raises `OSError` if it is taken."""
    listener = socket.create_server((LOOPBACK, port))
    port = listener.getsockname()[1]
    return TCPStore(LOOPBACK, port, None, True, timeout, False, master_listen_fd=listener.detach())


def _connect(ranks: Ranks, host: str, port: int, timeout: timedelta) -> Store:
    if (host, port) in _stores:
        return _stores[host, port]
    if ranks.serves_store:
        store = _serve(ranks, host, port, timeout)
    else:
        _await_server(host, port, 0.0 if ranks.store_is_the_agents else timeout.total_seconds())
        store = TCPStore(host, port, None, False, timeout, False)
    _stores[host, port] = store
    return store


def _await_server(host: str, port: int, seconds: float) -> None:
    """Wait until somebody listens there; torch's client would report each attempt, with a C++ stack.

    An agent's store was there before this process: if nobody answers, the launcher is gone and waiting is in vain.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), CONNECT_SECONDS).close()
        except OSError:  # rank 0 or its name may not be there yet
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)
        else:
            return


def _serve(ranks: Ranks, host: str, port: int, timeout: timedelta) -> Store:
    try:
        if ranks.one_machine:
            return serve_store(port, timeout)
        # On all addresses: the name by which others reach this machine may mean another address here, or none yet.
        return TCPStore(LOOPBACK, port, None, True, timeout, False)
    except (OSError, RuntimeError) as error:
        if "EADDRINUSE" in str(error) or getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host}, where the ranks would meet, is in use, perhaps by another job: "
                "set MASTER_PORT to a free one"
            ) from None
        raise


def _name_job(store: Store, ranks: Ranks) -> str:
    """Name this job at the store, unless another was first; returns the job that meets there."""
    if ranks.store_is_the_agents:  # no rank serves it: the first to come names the job
        return store.compare_set(JOB, "", ranks.job).decode()
    if ranks.serves_store:
        store.set(JOB, ranks.job)
    return store.get(JOB).decode()
