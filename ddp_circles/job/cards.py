"""Network cards: the one at which the libraries that connect the ranks should listen."""

import fcntl
import ipaddress
import socket

GET_ADDRESS = 0x8915
"""Linux's SIOCGIFADDR; Python has no other way to an interface's address."""


def default_cards(one_machine: bool, store_address: tuple[str, int] | None) -> dict[str, str]:
    """Values for gloo's and NCCL's variables that name a network card, unless the user has set them.

    On one machine the loopback: nobody outside needs to connect. On several, gloo listens at the address of the host's
    name; where that is the loopback, as Debian has it in /etc/hosts, the card towards the store is better.
    """
    if one_machine:
        return {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    card = _card_towards(*store_address) if store_address and not _host_name_has_address() else ""
    return {"GLOO_SOCKET_IFNAME": card} if card else {}


def _host_name_has_address() -> bool:
    """True if the host's name means an address of this machine that others may reach."""
    try:
        with socket.socket() as probe:
            probe.bind((socket.gethostname(), 0))
            return not ipaddress.ip_address(probe.getsockname()[0]).is_loopback
    except OSError:
        return False


def _card_towards(host: str, port: int) -> str:
    """The card whose IPv4 address this machine uses to reach `host`; empty if there is none."""
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port))  # sends nothing
        except OSError:
            return ""
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, GET_ADDRESS, name.encode().ljust(40, b"\0"))
            except OSError:  # it has no address
                continue
            if answer[20:24] == own:
                return "" if name == "lo" else name
    return ""
