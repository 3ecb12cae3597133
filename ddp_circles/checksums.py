"""Checksums of whole numbers that add up as the numbers do, and what all ranks publish of them in an audited step."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from ddp_circles.terminal import spell_numbers

T = TypeVar("T")

OUT_OF_RANGE = 1
"""Takes the place of a checksum of numbers beyond the range of the exact sums."""
BLOCK = 2**20
"""Most numbers of a row whose factors are made at once."""
KEPT = 2**16
"""Most factors that are kept for the next row."""


def checksum(rows: Tensor, first: int = 0) -> Tensor:
    """Checksums of the rows of whole numbers, modulo 2^64; int64 of shape [...] for [..., n].

    Each number counts times an odd one that its place chooses, so that no change of a single number goes unseen, and
    hardly one of several. The checksums of several rows add up to that of their sum. `first`: the first number's place.
    """
    count = rows.shape[-1]
    if count > BLOCK:
        parts = enumerate(rows.split(BLOCK, dim=-1))
        return torch.stack([checksum(part, first + BLOCK * number) for number, part in parts]).sum(0)
    factors = (_factors if count <= KEPT else _factors.__wrapped__)(first, count, rows.device)
    return (rows * factors).sum(-1)


@lru_cache(maxsize=4)
def _factors(first: int, count: int, device: torch.device) -> Tensor:
    """The odd numbers of `count` places from `first` on."""
    return mixed(torch.arange(first, first + count, device=device)) | 1


def mixed(index: Tensor, salt: int = 0) -> Tensor:
    """64 well-mixed bits for each index: two rounds of multiply and shift, as in SplitMix64; int64."""
    bits = (index + (salt % 2**31) * 0x9E3779B9) * 0x3F58476D1CE4E5B9
    bits = (bits ^ (bits >> 29 & 2**35 - 1)) * 0x14D049BB133111EB  # torch shifts the sign in: mask it out
    return bits ^ (bits >> 32 & 2**32 - 1)


@dataclass(frozen=True)
class Layout:
    """A row that all ranks publish: a place for each micro-batch owned, for each recomputed, for each rank's weights.

    A rank that owns none, or none with a sample, has the place of its own number: it must add nothing.
    """

    ranks: int
    micro_batches: int
    distance: int
    """From the rank that recomputes to the one that owns; 0 for one rank."""

    @property
    def places(self) -> int:
        """Places for those owned."""
        return max(self.micro_batches, self.ranks)

    @property
    def width(self) -> int:
        """All places."""
        return 2 * self.places + self.ranks

    def watched_by(self, rank: int) -> int:
        """The rank whose micro-batches `rank` recomputes."""
        return (rank + self.distance) % self.ranks

    def parties(self, number: int) -> tuple[int, int]:
        """The rank that owns a micro-batch, and the one that recomputes it."""
        owner = number % self.ranks
        return owner, (owner - self.distance) % self.ranks

    def spell(self, numbers: Sequence[int]) -> str:
        """`micro-batches 0, 3`."""
        real = [number for number in numbers if number < self.micro_batches]
        if not real:
            return "what it must not add"
        return f"micro-batch{'es' * (len(real) > 1)} {spell_numbers(real)}"


class Checksums:
    """The checksums that one rank notes in an audited step.

    `numbers`: of the micro-batches that it owns; `watched`: of those that it recomputes; `weights`: the checksum of its
    weights, of shape [1].
    """

    def __init__(
        self, layout: Layout, rank: int, numbers: Sequence[int], watched: Sequence[int], weights: Tensor
    ) -> None:
        self.width = layout.width
        self.own: list[Tensor] = []
        """Of the micro-batches owned, in their order; of the last one it is not needed."""
        self.again: list[Tensor] = []
        """Of those recomputed, in their order."""
        self.sent = torch.zeros_like(weights)
        """Of the sum that this rank sends."""
        self.received: list[Tensor] = []
        """Of the parts of the sum over all ranks; empty if there is no other."""
        self._layout, self._rank = layout, rank
        self._numbers, self._watched, self._weights = list(numbers), list(watched), weights

    def row(self, below: Tensor) -> Tensor:
        """This rank's part of the row to publish, int64 of shape [width], 0 where other ranks write.

        `below`: False if something that is sent is out of range. What the other micro-batches leave of the sum that is
        sent counts for the last one, so that the addition on the rank is checked too.
        """
        row = self.sent.new_zeros(self.width)
        known = torch.cat([*self.own, self.sent[:0]])[: len(self._numbers) - 1]
        last = (self.sent - known.sum()).where(below, OUT_OF_RANGE)
        row[self._numbers] = torch.cat([known, last])
        row[[self._layout.places + number for number in self._watched]] = torch.cat(self.again)[: len(self._watched)]
        row[2 * self._layout.places + self._rank] = self._weights
        return row


@dataclass(frozen=True)
class Published:
    """The checksums that all ranks have published in one audited step; the same on all ranks."""

    layout: Layout
    own: list[int]
    """For each place the checksum of the owner; 0 if there is no such micro-batch, or it holds no sample."""
    again: list[int]
    """The same, recomputed by another rank."""
    weights: list[int]
    """For each rank, of its weights."""

    @classmethod
    def from_row(cls, layout: Layout, row: list[int]) -> "Published":
        """Cut a sum of rows over all ranks."""
        places = layout.places
        return cls(layout, row[:places], row[places : 2 * places], row[2 * places :])

    @property
    def diverged(self) -> bool:
        """True if a micro-batch is out of range by the word of two ranks: no fault of the hardware."""
        return OUT_OF_RANGE in (own for own, again in zip(self.own, self.again, strict=True) if own == again)

    @property
    def disputed(self) -> list[int]:
        """The micro-batches of which two ranks have different checksums."""
        pairs = zip(self.own, self.again, strict=True)
        return [number for number, (own, again) in enumerate(pairs) if own != again]

    def arrived(self, received: Sequence[int]) -> bool:
        """True if the parts of the sum that a rank has received have the checksum of what all ranks own."""
        return (sum(received) - sum(self.own)) % 2**64 == 0


LASTS = "the fault lasts"
ENDINGS = (
    "twice, with different bits",
    "unlike the others, when asked to settle it",
    "unlike the others, and like them when asked again: the fault passes",
    f"unlike the others, when asked again too: {LASTS}",
)
"""What a rank at fault did with its micro-batches."""


def judge(published: Published, third: Sequence[Sequence[int]]) -> dict[int, str]:
    """The ranks at fault and what each has done; `third`: for each rank, what it found of the disputed when asked last.

    At fault is who departs from the majority of the last answers, or where there is none, from itself.
    """
    layout = published.layout
    wrong: dict[int, list[int]] = {}
    endings: dict[int, int] = {}
    for number, answers in zip(published.disputed, zip(*third, strict=True), strict=True):
        usual = majority(answers)
        firsts = list(zip(layout.parties(number), (published.own[number], published.again[number]), strict=True))
        for rank, answer in enumerate(answers):
            right = answer if usual is None else usual
            earlier = [found for by, found in firsts if by == rank]
            if all(found == right for found in (answer, *earlier)):
                continue
            wrong.setdefault(rank, []).append(number)
            told = 2 + (answer != right) if earlier else 1
            endings[rank] = max(0 if usual is None or len(third) == 1 else told, endings.get(rank, 0))
    return {rank: f"computed {layout.spell(numbers)} {ENDINGS[endings[rank]]}" for rank, numbers in wrong.items()}


def majority(values: Sequence[T]) -> T | None:
    """The value that more than half of `values` are, if there is one."""
    value, count = Counter(values).most_common(1)[0]
    return value if 2 * count > len(values) else None
