"""A store that only this machine can reach: torch's own stores listen on all addresses, without a password."""

import ipaddress
import socket
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

LOOPBACK = "127.0.0.1"


def is_loopback(host: str) -> bool:
    """True if `host` is an address or the name of this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve_store(port: int, timeout: timedelta) -> TCPStore:
    """Serve a store on the loopback at `port`, 0 for any free one; raises `OSError` if it is taken."""
    listener = socket.create_server((LOOPBACK, port))
    port = listener.getsockname()[1]
    return TCPStore(LOOPBACK, port, None, True, timeout, False, master_listen_fd=listener.detach())
