"""A fingerprint of everything besides the configuration that a result's bits depend on."""

import hashlib
import os
import platform
import re
from pathlib import Path

import torch
from torch import Tensor

from ddp_circles.job.process import WORKSPACE

CPU_INFO = Path("/proc/cpuinfo")
COMPUTATION = "computation"
"""The entry with the digest of a small computation: an effect of the others, unless the device is broken."""


def fingerprint(device: torch.device, threads: int) -> dict[str, str]:
    """Everything besides the configuration that a result's bits depend on; equal on ranks that compute alike."""
    on_cuda = device.type == "cuda"
    instruction_set = "" if on_cuda else torch.backends.cpu.get_cpu_capability()
    mkl_cbwr = os.environ.get("MKL_CBWR", "")
    # MKL chooses kernels by the CPU's vendor, and block sizes by its caches, unless both are told not to look.
    alike_anywhere = mkl_cbwr == "COMPATIBLE" and instruction_set == "DEFAULT"
    libraries = {}
    if on_cuda:
        libraries = {"cudnn": str(torch.backends.cudnn.version()), "cublas": os.environ.get(WORKSPACE, "")}
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "cpu": "" if on_cuda or alike_anywhere else cpu_name(),
        "instruction_set": instruction_set,
        "mkl_cbwr": mkl_cbwr,
        "mkl_enable_instructions": os.environ.get("MKL_ENABLE_INSTRUCTIONS", ""),
        "threads": str(threads),
        **libraries,
        COMPUTATION: _digest_of_computation(device),
    }


def device_name(device: torch.device) -> str:
    """The name of the GPU's model, or of the CPU's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The CPU's name, vendor, family and model, as far as the system tells; else its architecture."""
    try:
        with CPU_INFO.open() as file:
            first = file.read(4096)  # of one CPU: all of them would take long where there are hundreds
    except OSError:
        first = ""
    found = dict(re.findall(r"^([\w ]+?)\s*: (.+)$", first, re.MULTILINE))
    name = found.get("model name", platform.machine())
    numbers = [
        found[one] for one in ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part") if one in found
    ]
    return f"{name} ({' '.join(numbers)})" if numbers else name  # a virtual machine may tell no more than AMD EPYC


@torch.no_grad()
def _digest_of_computation(device: torch.device) -> str:
    """Digest the results of some products and functions, from inputs that are the same everywhere; takes milliseconds.

    No random numbers: those of the training must not depend on it.
    """
    count = torch.arange(2**16, dtype=torch.int64, device=device)
    # Between -1 and 1, exact in float32, and with the high bits mixed into the low ones, so without a simple pattern.
    numbers = ((count * 40503 ^ (count * 40503 >> 7)) % 2**16 - 2**15).to(torch.float32) / 2**15

    def matrix(rows: int, columns: int) -> Tensor:
        return numbers[: rows * columns].reshape(rows, columns)

    values = numbers[:4099]
    results = [
        *(matrix(rows, inner) @ matrix(columns, inner).T for rows, inner, columns in PRODUCTS),
        matrix(64, 12).view(4, 16, 12) @ matrix(48, 12).view(4, 12, 12),  # batched, as micro-batches side by side are
        *(function(values * 8) for function in (torch.exp, torch.tanh, torch.sigmoid)),
        torch.log1p(values.abs()),
        numbers.sum(),
    ]
    digest = hashlib.sha256()
    for result in results:
        digest.update(result.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


PRODUCTS = ((64, 2, 10), (7, 10, 1), (33, 100, 17), (8, 1024, 64), (64, 256, 256))
"""Rows, inner size and columns of products: narrow as in the tutorial's models, uneven, and wide."""
