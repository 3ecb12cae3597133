"""Checksums of whole numbers that add up as the numbers do, and what a rank publishes of them in an audited step."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

OUT_OF_RANGE = 1
"""Takes the place of a checksum of numbers beyond the range of the exact sums."""
BLOCK = 2**20


def checksum(rows: Tensor, first: int = 0) -> Tensor:
    """Checksums of the rows of whole numbers, modulo 2^64; int64 of shape [...] for [..., n].

    Each number counts times an odd one that its place chooses, so that no change of a single number goes unseen, and
    hardly one of several. The checksums of several rows add up to that of their sum. `first`: the first number's place.
    """
    if rows.shape[-1] <= BLOCK:
        return (rows * _factors(first, rows.shape[-1], rows.device)).sum(-1)
    parts = rows.split(BLOCK, dim=-1)
    sums = [checksum(part, first + BLOCK * number) for number, part in enumerate(parts)]
    return torch.stack(sums).sum(0)


@lru_cache(maxsize=4)
def _factors(first: int, count: int, device: torch.device) -> Tensor:
    """The odd numbers of `count` places from `first` on."""
    return mixed(torch.arange(first, first + count, device=device)) | 1


def mixed(index: Tensor, salt: int = 0) -> Tensor:
    """64 well-mixed bits for each index: two rounds of multiply and shift, as in SplitMix64; int64."""
    bits = (index + (salt % 2**31) * 0x9E3779B9) * 0x3F58476D1CE4E5B9
    bits = (bits ^ (bits >> 29 & 2**35 - 1)) * 0x14D049BB133111EB  # torch shifts the sign in: mask it out
    return bits ^ (bits >> 32 & 2**32 - 1)


class Checksums:
    """The checksums that one rank notes in an audited step, and the row in which it publishes them.

    `numbers`: of the micro-batches that it owns; `watched`: of those that it recomputes; `weights`: the checksum of its
    weights, of shape [1]. A row has one place for each micro-batch or rank, whichever are more, for those owned; as
    many for those recomputed; and one for each rank's weights. It is 0 where other ranks write.
    """

    def __init__(
        self, numbers: Sequence[int], watched: Sequence[int], weights: Tensor, *, rank: int, places: int, ranks: int
    ) -> None:
        self.own: list[Tensor] = []
        """Of the micro-batches owned, in their order; the last may be missing."""
        self.again: list[Tensor] = []
        """Of those recomputed, in their order."""
        self.sent = torch.zeros_like(weights)
        """Of the sum that this rank sends."""
        self.width = 2 * places + ranks
        self._numbers, self._watched = list(numbers), list(watched)
        self._weights, self._rank, self._places = weights, rank, places

    def row(self, below: Tensor) -> Tensor:
        """The row to publish, int64 of shape [width]; `below`: False if something that is sent is out of range.

        What the other micro-batches leave of the sum that is sent counts for the last one, so that the addition on the
        rank is checked too; a rank that owns none must send nothing.
        """
        row = self.sent.new_zeros(self.width)
        known = torch.cat([*self.own, self.sent[:0]])[: max(0, len(self._numbers) - 1)]
        last = (self.sent - known.sum()).where(below, OUT_OF_RANGE)
        row[[*self._numbers] or [self._rank]] = torch.cat([known, last])
        if self._watched:
            row[[self._places + number for number in self._watched]] = torch.cat(self.again)[: len(self._watched)]
        row[2 * self._places + self._rank] = self._weights
        return row
