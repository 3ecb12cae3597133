"""The error counters that a GPU keeps itself, through nvidia-ml-py, where that is installed."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

UNCORRECTED, CORRECTED = "uncorrected ECC errors", "corrected ECC errors"
REMAPPED, PENDING, FAILED = "remapped rows", "pending row remaps", "failed row remaps"
THROTTLING = {0x08: "hardware slowdown", 0x20: "thermal slowdown by software", 0x40: "thermal slowdown by hardware"}
"""Bits of NVML's reasons for lower clocks, as in nvml.h."""


@dataclass(frozen=True)
class Reading:
    """The counters that a GPU has, by name, or the reason why none could be read."""

    counters: dict[str, int]
    """Reasons for lower clocks are 1 while they hold, else 0."""
    refusal: str = ""


def read_counters(uuid: str) -> Reading:
    """Read the counters of the GPU with this id; those that it does not have are left out."""
    try:
        import pynvml  # noqa: PLC0415 - an extra
    except ImportError:
        return Reading({}, "nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
        try:
            return Reading(_read(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return Reading({}, f"NVML: {error}")


def _read(nvml: Any, gpu: Any) -> dict[str, int]:
    counters: dict[str, int] = {}

    def note(read: Callable[[], dict[str, int]]) -> None:
        with suppress(nvml.NVMLError, AttributeError):  # this GPU, its driver or that package has no such counter
            counters.update(read())

    def errors(kind: int) -> int:
        return int(nvml.nvmlDeviceGetTotalEccErrors(gpu, kind, nvml.NVML_VOLATILE_ECC))

    def rows() -> dict[str, int]:
        corrected, uncorrected, pending, failed = map(int, nvml.nvmlDeviceGetRemappedRows(gpu))
        return {REMAPPED: corrected + uncorrected, PENDING: pending, FAILED: failed}

    def throttling() -> dict[str, int]:
        reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
        return {name: int(reasons & bit != 0) for bit, name in THROTTLING.items()}

    note(lambda: {UNCORRECTED: errors(nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED)})
    note(lambda: {CORRECTED: errors(nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED)})
    note(rows)
    note(throttling)
    return counters
