"""How fast the collectives are, in nccl-tests' terms, and how fast each rank computes.

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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ddp_circles.job.world import World
from ddp_circles.verify.board import Mark
from ddp_circles.verify.collectives import perform
from ddp_circles.verify.findings import Finding, spell_ranks

OPERATIONS = ("broadcast", "all-reduce sum", "all-gather")
REPEATS = 5
CALLS = 4
"""Calls in each repetition, one after the other."""
WARM_UP = 2
PROBES = 30
"""Repetitions of the computation each time it is measured."""
SIDE = {"cpu": 192, "cuda": 2048}
"""Of the square matrices in it."""
FACTOR = {"cpu": 2.0, "cuda": 1.3}
"""A rank is slow above so many times the others' median; CPU ranks, and ranks on one device, disturb each other."""
DEVIATIONS = 5.0
"""And above so many deviations: 1.4826 times the others' median absolute deviation, a standard deviation if normal."""


@dataclass(frozen=True)
class Timing:
    """One collective at one size: the median over repetitions of the seconds a call takes, and their spread."""

    operation: str
    bytes: int
    seconds: float
    spread: float
    """Median absolute deviation from the median."""


def measure(world: World, max_bytes: int, mark: Mark) -> list[Timing]:
    """This rank's timings of each collective on float32 buffers of growing size."""
    n = world.ranks.world_size
    timings: list[Timing] = []
    for operation in OPERATIONS:
        for size in sizes(max_bytes):
            mark("speed", len(timings))
            part = n if operation == "all-gather" else 1
            buffer = torch.zeros(max(1, size // 4 // part), device=world.device)
            seconds = _repeat(operation, buffer, world)
            middle = statistics.median(seconds)
            timings.append(Timing(operation, buffer.numel() * 4 * part, middle, deviation(seconds, middle)))
    return timings


def sizes(max_bytes: int) -> list[int]:
    """Bytes: powers of 16 from 4 on, and the largest."""
    return [*(size for size in (4 * 16**power for power in range(16)) if size < max_bytes), max(4, max_bytes)]


def _repeat(operation: str, buffer: Tensor, world: World) -> list[float]:
    seconds = []
    for repeat in range(WARM_UP + REPEATS):
        _synchronize(world.device)
        begun = time.perf_counter()
        for _ in range(CALLS):
            perform(operation, buffer, 0, world.ranks.world_size)
        _synchronize(world.device)
        if repeat >= WARM_UP:
            seconds.append((time.perf_counter() - begun) / CALLS)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Probe:
    """A fixed computation of this rank's own, and the shortest time that it took."""

    def __init__(self, device: torch.device, work: int) -> None:
        self._device = device
        self._work = work
        side = SIDE[device.type]
        self._matrix = torch.full((side, side), 1.0 / side, device=device)
        self._product = torch.empty_like(self._matrix)
        self.seconds = float("inf")
        """The shortest time so far."""

    def measure(self) -> None:
        """Run the computation `PROBES` times."""
        timed = self._on_cuda if self._device.type == "cuda" else self._on_cpu
        self.seconds = min(self.seconds, *(timed() for _ in range(PROBES)))

    def _compute(self) -> None:
        for _ in range(2 * self._work):
            torch.mm(self._matrix, self._matrix, out=self._product)

    def _on_cpu(self) -> float:
        begun = time.thread_time()
        self._compute()
        return time.thread_time() - begun

    def _on_cuda(self) -> float:
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        self._compute()
        ended.record()
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1000


def deviation(values: Sequence[float], middle: float) -> float:
    """The median absolute deviation of `values` from `middle`."""
    return statistics.median(abs(value - middle) for value in values)


def limit(others: Sequence[float], factor: float) -> float:
    """The time above which a rank is an outlier, by what the other ranks took."""
    middle = statistics.median(others)
    return max(factor * middle, middle + DEVIATIONS * 1.4826 * deviation(others, middle))


def slow_ranks(seconds: Sequence[float], kinds: Sequence[Sequence[int]], factor: float) -> list[Finding]:
    """A warning for each rank that computes much slower than the other ranks of its kind."""
    found = []
    for kind in kinds:
        for rank in kind if len(kind) > 1 else ():
            others = [seconds[other] for other in kind if other != rank]
            if seconds[rank] > limit(others, factor):
                ratio = seconds[rank] / statistics.median(others)
                found.append(_slow(rank, seconds[rank], ratio, factor, len(kind)))
    return found


def _slow(rank: int, seconds: float, ratio: float, factor: float, ranks: int) -> Finding:
    who = "the other rank's" if ranks == 2 else f"the median of the {ranks - 1} other ranks"
    what = (
        f"{spell_ranks([rank])} computes slowly: {seconds * 1e3:.3g} ms, {ratio:.1f} times {who} "
        f"(warned about above {factor:g} times it and {DEVIATIONS:g} deviations)"
    )
    if ranks == 2:
        what += "; with two ranks nobody can say which of them is as it should be"
    advice = "every step of a training waits for it: look for another job there, heat, a power cap, a lower clock"
    return Finding("warning", "speed", (rank,), what, advice)


# ---- on rank 0


def choose_factor(device: torch.device, *, shared: bool) -> float:
    """The `FACTOR` for this fleet; ranks that share a device disturb each other as on a CPU."""
    return FACTOR["cpu" if shared else device.type]


def bandwidths(everyone: Sequence[Sequence[Timing]]) -> list[dict[str, Any]]:
    """What the table says of each collective and size: times in seconds, bandwidths in bytes per second."""
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


def section(seconds: Sequence[float], everyone: Sequence[Sequence[Timing]], factor: float) -> dict[str, Any]:
    """What verify.json says of the speed; `seconds`: the computing time of each rank."""
    rule = (
        f"A rank is warned about above {factor:g} times the median of the others of its kind and above "
        f"{DEVIATIONS:g} deviations (1.4826 times their median absolute deviation) from it."
    )
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
