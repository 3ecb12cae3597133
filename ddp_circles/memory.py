"""The memory of this machine: what cannot fit is refused, before the system ends processes for it."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def require_memory(needed: float, available: int | None = None) -> None:
    """Raise `MemoryError`, with both figures, if `needed` bytes are more than `available`; default: all there are."""
    available = machine_memory() if available is None else available
    if needed > available:
        raise MemoryError(f"at least {needed / 2**30:,.1f} GiB, of {available / 2**30:,.1f}")


def machine_memory() -> int:
    """Bytes of memory in this machine, or fewer where a control group such as a Slurm job's is limited."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(limit for limit, _ in _group_limits())])


def available_memory() -> int:
    """Bytes that nobody uses, by the system's estimate, or fewer where a control group has less left."""
    free = {name: value.split() for name, value in (line.split(":") for line in MEMINFO.read_text().splitlines())}
    left = [limit - _used(group) for limit, group in _group_limits()]
    return max(0, min([1024 * int(free["MemAvailable"][0]), *left]))


def _group_limits() -> Iterator[tuple[int, Path]]:
    """Limits in bytes, each with its folder, of the control groups that this process is in."""
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):
                folder = CGROUPS / controllers / group.lstrip("/")
                name = "memory.limit_in_bytes" if controllers else "memory.max"
                for above in (folder, *folder.parents):
                    with suppress(OSError, ValueError):  # no such file here, or `max`
                        yield int((above / name).read_text()), above


def _used(group: Path) -> int:
    """Bytes that a control group uses, without those of files that have not been read for long: they give way."""
    for use, cache in (("memory.current", "inactive_file"), ("memory.usage_in_bytes", "total_inactive_file")):
        with suppress(OSError):
            cached = re.search(rf"^{cache} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
            return int((group / use).read_text()) - (int(cached[1]) if cached else 0)
    return 0
