"""The speed of the collectives, in nccl-tests' terms, and of each rank's own computing.

Of n ranks: the algorithm bandwidth is S / t, where S is the size of the buffer in bytes (of an all-gather: of the
result) and t the time of one call; the bus bandwidth is that times 2(n-1)/n for an all-reduce, (n-1)/n for an
all-gather, 1 for a broadcast, so that it can be held against the hardware's speed whatever n is. Source: nccl-tests,
doc/PERFORMANCE.md.

All ranks of a collective end together, so its time says nothing about one rank. What a rank computes by itself does:
its time is the shortest of many, counted on the CPU in time that its own thread ran, on CUDA by events on the device,
so that a loaded machine does not look like a slow one.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ddp_circles.job.watch import waiting
from ddp_circles.job.world import World
from ddp_circles.verify.collectives import perform, synchronize
from ddp_circles.verify.injection import Mark

OPERATIONS = ("broadcast", "all-reduce sum", "all-gather")
WARM_UP, REPEATS = 2, 5
CALLS = 4
"""Calls in each repetition, one after the other."""


@dataclass(frozen=True)
class Timing:
    """One collective at one size: the median over repetitions of the seconds a call takes, and their spread."""

    operation: str
    bytes: int
    seconds: float
    spread: float
    """Median absolute deviation from the median."""


def measure(world: World, max_bytes: int, mark: Mark) -> list[Timing]:
    """Time each collective on float32 buffers of growing size."""
    n = world.ranks.world_size
    timings: list[Timing] = []
    for operation in OPERATIONS:
        for size in sizes(max_bytes):
            mark("speed", len(timings))
            part = n if operation == "all-gather" else 1
            buffer = torch.zeros(max(1, size // 4 // part), device=world.device)
            with waiting:
                seconds = _repeat(operation, buffer, world)
            middle = statistics.median(seconds)
            timings.append(Timing(operation, buffer.numel() * 4 * part, middle, deviation(seconds, middle)))
    return timings


def sizes(max_bytes: int) -> list[int]:
    """Sizes of buffers in bytes: 4 times the powers of 16, and the largest."""
    return [*(size for size in (4 * 16**power for power in range(16)) if size < max_bytes), max(4, max_bytes)]


def _repeat(operation: str, buffer: Tensor, world: World) -> list[float]:
    seconds = []
    for repeat in range(WARM_UP + REPEATS):
        synchronize(world.device)
        begun = time.perf_counter()
        for _ in range(CALLS):
            perform(operation, buffer, 0, world.ranks.world_size)
        synchronize(world.device)
        if repeat >= WARM_UP:
            seconds.append((time.perf_counter() - begun) / CALLS)
    return seconds


def time_computing(device: torch.device, work: int) -> float:
    """The seconds of a fixed computation of this rank's own, done `work` times; the shortest of thirty tries."""
    side = 2048 if device.type == "cuda" else 192
    matrix = torch.full((side, side), 1.0 / side, device=device)
    product = torch.empty_like(matrix)

    def compute() -> None:
        for _ in range(2 * work):
            torch.mm(matrix, matrix, out=product)

    timed = _on_cuda if device.type == "cuda" else _on_cpu
    return min(timed(compute) for _ in range(30))


def _on_cpu(compute: Callable[[], None]) -> float:
    begun = time.thread_time()
    compute()
    return time.thread_time() - begun


def _on_cuda(compute: Callable[[], None]) -> float:
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record()
    compute()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1000


def deviation(values: Sequence[float], middle: float) -> float:
    """The median absolute deviation of `values` from `middle`."""
    return statistics.median(abs(value - middle) for value in values)


# ---- the report


def bandwidths(everyone: Sequence[Sequence[Timing]]) -> list[dict[str, Any]]:
    """One row for each collective and size: times in seconds, bandwidths in bytes per second."""
    n = len(everyone)
    factors = {"broadcast": 1.0, "all-reduce sum": 2 * (n - 1) / n, "all-gather": (n - 1) / n}
    rows = []
    for timings in zip(*everyone, strict=True):
        seconds = statistics.median(timing.seconds for timing in timings)
        algorithm = timings[0].bytes / seconds
        rows.append(
            asdict(timings[0])
            | {
                "seconds": seconds,
                "spread": statistics.median(timing.spread for timing in timings),
                "algorithm_bandwidth": algorithm,
                "bus_bandwidth": algorithm * factors[timings[0].operation],
            }
        )
    return rows


def section(seconds: Sequence[float], everyone: Sequence[Sequence[Timing]], rule: str) -> dict[str, Any]:
    """The entry in verify.json; `seconds`: the computing time of each rank, `rule`: when one is warned about."""
    return {
        "collectives": bandwidths(everyone),
        "compute": {
            "fastest": min(seconds),
            "median": statistics.median(seconds),
            "slowest": max(seconds),
            "seconds": list(seconds),
            "rule": rule,
        },
    }
