"""The host, device and versions of each rank, and the kinds of devices that must compute the same bits."""

import platform
import re
import socket
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from ddp_circles.job.devices import device_uuid
from ddp_circles.job.world import World, fingerprint

Inventory = dict[str, str]
"""One rank's host, device and versions; nothing secret."""


def take_inventory(world: World, threads: int) -> Inventory:
    """Describe this rank; `kind` is equal on ranks that must compute the same bits."""
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
        "kind": ", ".join(
            value if name in ("device", "instruction_set") else f"{name} {value}"
            for name, value in marks.items()
            if value
        ),
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


def ranks_by(values: Sequence[str]) -> dict[str, list[int]]:
    """The ranks that have each of `values`, which are in the order of ranks."""
    ranks = defaultdict(list)
    for rank, value in enumerate(values):
        ranks[value].append(rank)
    return dict(ranks)
