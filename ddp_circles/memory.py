"""The memory of this machine: what cannot fit is refused, before the system ends processes for it."""

import os
from contextlib import suppress
from pathlib import Path

OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def require_memory(needed: float, available: int | None = None) -> None:
    """Raise `MemoryError`, with both figures, if `needed` bytes are more than `available`; default: all there are."""
    available = machine_memory() if available is None else available
    if needed > available:
        raise MemoryError(f"at least {needed / 2**30:,.1f} GiB, of {available / 2**30:,.1f}")


def machine_memory() -> int:
    """Bytes of memory in this machine, or fewer where a control group such as a Slurm job's is limited."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):
                folder = CGROUPS / controllers / group.lstrip("/")
                name = "memory.limit_in_bytes" if controllers else "memory.max"
                for above in (folder, *folder.parents):
                    with suppress(OSError, ValueError):  # no such file here, or `max`
                        limits.append(int((above / name).read_text()))
    return min(limits)
