"""What each rank runs on, what differs between ranks, and which of them must compute the same bits."""

import platform
import re
import socket
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from ddp_circles.job.devices import device_uuid
from ddp_circles.job.world import World, fingerprint
from ddp_circles.verify.findings import Finding, spell_ranks

Inventory = dict[str, str]
"""One rank's host, device and versions; nothing secret."""

OWN = ("host", "device", "uuid")
"""What may differ from rank to rank."""
NAMELESS = ("device", "instruction_set")
"""What says in a kind's description by itself what it is."""


def take_inventory(world: World, threads: int) -> Inventory:
    """What this rank runs on. `kind` is equal on ranks that must compute the same bits."""
    device = world.device
    on_cuda = device.type == "cuda"
    marks = fingerprint(device, threads)
    return {
        "host": socket.gethostname(),
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "uuid": device_uuid(device),
        "driver": _driver() if on_cuda else "",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "backend": _backend(world.backend),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "mkl_cbwr": marks["mkl_cbwr"],
        "threads": str(threads),
        "kind": ", ".join(value if name in NAMELESS else f"{name} {value}" for name, value in marks.items() if value),
    }


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def _driver() -> str:
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found[1] if found else "unknown"


def _backend(backend: str) -> str:
    return f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))}" if backend == "nccl" else backend


def differences(everyone: Sequence[Inventory]) -> list[Finding]:
    """A warning for each thing that should be the same on all ranks and is not."""
    found = []
    for name in (name for name in everyone[0] if name not in (*OWN, "kind")):
        values = _ranks_by([one[name] for one in everyone])
        if len(values) > 1:
            listed = "; ".join(f"{value or 'none'} on {spell_ranks(ranks)}" for value, ranks in values.items())
            smallest = min(len(ranks) for ranks in values.values())
            odd = tuple(sorted(rank for ranks in values.values() if len(ranks) == smallest for rank in ranks))
            odd = odd if 2 * len(odd) < len(everyone) else ()
            advice = "make the nodes alike if they should be; a mix is slower, and can keep the bits from being equal"
            found.append(Finding("warning", "inventory", odd, f"{name.replace('_', ' ')} differs: {listed}", advice))
    return found


def kinds(everyone: Sequence[Inventory]) -> dict[str, list[int]]:
    """The ranks of each kind of device; ranks of one kind must compute the same bits."""
    return _ranks_by([one["kind"] for one in everyone])


def sharing(everyone: Sequence[Inventory]) -> bool:
    """Whether ranks share devices, so that one disturbs the other's speed."""
    owned = [(one["host"], one["uuid"] or one["device"]) for one in everyone]
    return len(set(owned)) < len(owned)


def _ranks_by(values: Sequence[str]) -> dict[str, list[int]]:
    ranks = defaultdict(list)
    for rank, value in enumerate(values):
        ranks[value].append(rank)
    return dict(ranks)
