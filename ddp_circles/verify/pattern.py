"""Words whose every bit is known: written to what shall hold or carry them, and compared with what comes back."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddp_circles.checksums import mixed

PIECES = {"cpu": 2**14, "cuda": 2**22}
"""Words computed at a time: few on the CPU, whose caches are small, and many on a GPU, where each call costs time."""
MOST_PIECES = 2**20
"""Pieces of a block; more would be those of the next one."""


@dataclass(frozen=True)
class Difference:
    """How words depart from their pattern."""

    bytes: int
    """The number of wrong bytes."""
    offset: int
    """Where the first wrong word begins, in bytes."""
    expected: str
    seen: str

    def __str__(self) -> str:
        return f"the word at offset {self.offset:,} should be {self.expected} and is {self.seen}"


def salt_of(seed: int, rank: int) -> int:
    """The number that stands for a rank's pattern of `seed`."""
    return seed * 8191 + rank


def write(words: Tensor, salt: int, block: int = 0) -> Tensor:
    """Fill `words`, a row of int64, with the pattern of `salt` for this number of a block; returns them."""
    for _, piece, right in _pieces(words, salt, block):
        piece.copy_(right)
    return words


def compare(words: Tensor, salt: int, block: int = 0, *, inverted: bool = False) -> Difference | None:
    """Hold every word against what `write` wrote, or against that with all bits `inverted`; None if all are right."""
    count, first = 0, None
    for offset, piece, right in _pieces(words, salt, block, inverted=inverted):
        if not torch.equal(piece, right):
            count += int((piece.view(torch.uint8) != right.view(torch.uint8)).sum())
            first = first or _first(piece, right, offset)
    return Difference(count, *first) if first else None


def _pieces(words: Tensor, salt: int, block: int, *, inverted: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The offset of each piece of `words`, the piece, and its pattern.

    That is the same mixed words for all pieces, with a key of its own for each: what comes from elsewhere looks wrong.
    """
    size, device = PIECES[words.device.type], words.device
    pieces = words.split(size)
    base = mixed(torch.arange(size, device=device), salt)
    base = ~base if inverted else base
    keys = mixed(torch.arange(len(pieces), device=device) + size + block * MOST_PIECES, salt)
    for number, (piece, key) in enumerate(zip(pieces, keys, strict=True)):
        yield number * size, piece, base[: len(piece)] ^ key


def _first(piece: Tensor, right: Tensor, offset: int) -> tuple[int, str, str]:
    position = int((piece != right).nonzero()[0])
    expected, seen = (f"0x{int(words[position]) % 2**64:016x}" for words in (right, piece))
    return 8 * (offset + position), expected, seen
