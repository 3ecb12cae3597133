"""Memory that must hold what is written to it: filled with a pattern, then with its inverse, and read word by word.

Every bit is held both as 0 and as 1, for a second each, in which the rank computes on what is left. The inverse is made
of what the memory holds, so that a wrong bit stays wrong.
"""

import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddp_circles.memory import available_memory
from ddp_circles.verify.injection import Mark
from ddp_circles.verify.pattern import Difference, compare, write
from ddp_circles.verify.speed import time_computing

ON_CUDA = 0.8
"""Share of the free memory of a GPU that is filled if nothing else is asked for."""
BLOCK = 256 * 2**20
"""Bytes taken at a time, so that memory in pieces can be filled too."""
HOLD_SECONDS = 1.0


@dataclass(frozen=True)
class Held:
    """What a rank's memory has held."""

    bytes: int
    wrong: dict[int, Difference]
    """Blocks that came back wrong, by number, the first time that they did."""


def free_memory(device: torch.device) -> int:
    """Bytes of the device's memory that nobody uses; of a CPU, of the machine's."""
    if device.type != "cuda":
        return available_memory()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def sizes(share: float, places: Sequence[Hashable], free: Sequence[int]) -> list[int]:
    """Bytes for each rank: a `share` of what is `free` at its place, divided among the ranks that are there."""
    least = {place: min(free[rank] for rank, other in enumerate(places) if other == place) for place in set(places)}
    ranks = Counter(places)
    return [int(share * least[place] / ranks[place]) for place in places]


def check(device: torch.device, size: int, salt: int, seconds: float, mark: Mark) -> Held:
    """Fill, hold and read up to `size` bytes; fewer if no more can be had, or if that many take too many `seconds`.

    `mark` is called for each block, whenever it is filled or read. All memory is free again at the end.
    """
    blocks = _fill(device, size, salt, seconds, mark)
    held = Held(sum(block.nbytes for block in blocks), {})
    for inverted in (False, True) if blocks else ():
        _hold(device)
        for number, block in enumerate(blocks):
            mark("memory", number)
            difference = compare(block, salt, number, inverted=inverted)
            if difference is not None:
                held.wrong.setdefault(number, difference)
            block.bitwise_not_()
    del blocks[:]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return held


def _fill(device: torch.device, size: int, salt: int, seconds: float, mark: Mark) -> list[Tensor]:
    blocks: list[Tensor] = []
    deadline = time.monotonic() + seconds
    for begin in range(0, size // 8 * 8, BLOCK):
        mark("memory", len(blocks))
        try:
            block = torch.empty(min(size - begin, BLOCK) // 8, dtype=torch.int64, device=device)
        except RuntimeError:  # no more memory to be had
            break
        blocks.append(write(block, salt, len(blocks)))
        if time.monotonic() > deadline:
            break
    return blocks


def _hold(device: torch.device) -> None:
    """Compute on what is left of the memory."""
    end = time.monotonic() + HOLD_SECONDS
    while time.monotonic() < end:
        time_computing(device, 1)
