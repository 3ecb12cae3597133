"""The host, device and versions of each rank, and the kinds of devices that must compute the same bits."""

import hashlib
import os
import platform
import re
import socket
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from ddp_circles.job.devices import device_uuid
from ddp_circles.job.fingerprint import COMPUTATION, CPU_INFO, cpu_name, device_name, fingerprint
from ddp_circles.job.world import World

Inventory = dict[str, str]
"""One rank's host, device and versions; nothing secret."""
PACKAGE = "package"
"""The entry with the digest of this package's source."""
BFLOAT16_FLAGS = ("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "bf16", "sve", "sve2")
"""The CPU's flags by which oneDNN chooses kernels for bfloat16: a hypervisor may hide some of them."""


def take_inventory(world: World, threads: int) -> Inventory:
    """Describe this rank; `kind` is equal on ranks that must compute the same bits."""
    device = world.device
    on_cuda = device.type == "cuda"
    marks = fingerprint(device, threads)
    driver = _search(Path("/proc/driver/nvidia/version"), r"Kernel Module.*?\s(\d+\.[\d.]+)") or "unknown"
    return {
        "host": socket.gethostname(),
        "device": str(device),
        "name": device_name(device),
        "uuid": device_uuid(device),
        "driver": driver if on_cuda else "",
        "python": platform.python_version(),
        PACKAGE: _digest_of_package(),
        "torch": str(torch.__version__),
        "backend": _backend(world.backend),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "mkl_cbwr": marks["mkl_cbwr"],
        "mkl_enable_instructions": marks["mkl_enable_instructions"],
        "threads": str(threads),
        COMPUTATION: marks[COMPUTATION],
        "kind": _kind(device, marks),
    }


def _kind(device: torch.device, marks: dict[str, str]) -> str:
    """The fingerprint's `marks`, and what the libraries for convolutions and bfloat16 choose their kernels by.

    Without the computation: by it, a broken device would be of a kind of its own, with nothing to compare it to.
    """
    if device.type == "cuda":
        more = {"cudnn": str(torch.backends.cudnn.version())}
    else:
        flags = _search(CPU_INFO, r"^(?:flags|Features)\s*: (.*)$").split()
        more = {
            "cpu": marks["cpu"] or cpu_name(),  # oneDNN looks at it whatever MKL was told
            "bfloat16": " ".join(flag for flag in BFLOAT16_FLAGS if flag in flags),
            "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        }
    return ", ".join(
        value if name in ("device", "cpu", "instruction_set") else f"{name} {value}"
        for name, value in (marks | more).items()
        if value and name != COMPUTATION
    )


def _search(file: Path, pattern: str) -> str:
    """The group of `pattern` at the head of a file of the system; empty where there is none."""
    try:
        with file.open() as opened:
            found = re.search(pattern, opened.read(4096), re.MULTILINE)
    except OSError:
        return ""
    return found[1] if found else ""


def _digest_of_package() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _backend(backend: str) -> str:
    return f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))}" if backend == "nccl" else backend


def ranks_by(values: Sequence[str]) -> dict[str, list[int]]:
    """The ranks that have each of `values`, which are in the order of ranks."""
    ranks = defaultdict(list)
    for rank, value in enumerate(values):
        ranks[value].append(rank)
    return dict(ranks)
