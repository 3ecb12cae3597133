"""The micro-batches of each step, taken from a set of samples: one after another, or as slices side by side."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ddp_circles.data import Dataset
from ddp_circles.models import IGNORED
from ddp_circles.sharding import Sharding

ROWS = 32
ALIGNED_ROWS = 64
"""Blocks begin at multiples of it, so that a sample lies at the same place in a line of the cache, whatever is cut out:
the last bits of a product may depend on where its factors begin. 256 bytes are as far as cuBLAS looks."""
BLOCK_ROWS = 2**20
"""Most rows, over all slices, that are put in order together; those of one step always are."""


class MicroBatch(NamedTuple):
    """The samples of a micro-batch; side by side, those of all micro-batches of a rank."""

    number: int
    """Its number in the step; side by side the first one's."""
    inputs: Any
    """A tensor; or tensors in tuples, lists and dictionaries, as the samples have them."""
    targets: Any


class Source(Protocol):
    """Samples in the form that passes through a model need."""

    in_memory: bool
    """True if micro-batches that were cut once can be kept."""
    nothing: MicroBatch
    """What a rank without a sample in a step passes through the model."""

    def __len__(self) -> int:
        """The number of samples."""

    def steps(self, order: Tensor, sharding: Sharding, *, first: int, epoch: int) -> Iterator[list[MicroBatch]]:
        """For each step from `first` on: this rank's micro-batches, without those that hold no sample."""

    def share(self, order: Tensor, sharding: Sharding, *, step: int, epoch: int) -> list[MicroBatch]:
        """The micro-batches of one step and of any rank's `sharding`, aside from those that `steps` goes through."""


class _Held(ABC):
    """Samples that are all in memory."""

    in_memory = True

    def __init__(self, samples: Dataset) -> None:
        self._samples = samples
        self.nothing = MicroBatch(0, samples.inputs[:0], samples.targets[:0])

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._samples.inputs)

    def steps(self, order: Tensor, sharding: Sharding, *, first: int, epoch: int) -> Iterator[list[MicroBatch]]:  # noqa: ARG002
        """For each step from `first` on: this rank's micro-batches, without those that hold no sample."""
        return self._cut(order, sharding, range(first, sharding.steps))

    def share(self, order: Tensor, sharding: Sharding, *, step: int, epoch: int) -> list[MicroBatch]:  # noqa: ARG002
        """The micro-batches of one step and of any rank's `sharding`."""
        return next(self._cut(order, sharding, range(step, step + 1)))

    @abstractmethod
    def _cut(self, order: Tensor, sharding: Sharding, steps: range) -> Iterator[list[MicroBatch]]:
        """The micro-batches of each of `steps`, which follow each other."""


class OneByOne(_Held):
    """Tensors, from which each micro-batch is taken by itself."""

    def _cut(self, order: Tensor, sharding: Sharding, steps: range) -> Iterator[list[MicroBatch]]:
        inputs, targets = self._samples
        # A micro-batch's samples of all steps are put in order together, and lie in one block; a step takes a part.
        begins, blocks = {}, {}
        for number in sharding.owned():
            begin, end = sharding.bounds(steps.start, number)[0], sharding.bounds(steps.stop - 1, number)[1]
            begins[number] = begin = begin // ALIGNED_ROWS * ALIGNED_ROWS
            index = without_waiting(order[number :: sharding.micro_batches][begin:end], inputs.device)
            blocks[number] = inputs[index], targets[index]
        for step in steps:
            parts = [(number, sharding.bounds(step, number)) for number in blocks]
            cuts = {number: slice(low - begins[number], high - begins[number]) for number, (low, high) in parts}
            yield [
                MicroBatch(number, blocks[number][0][cut], blocks[number][1][cut])
                for number, cut in cuts.items()
                if cut.start < cut.stop
            ]


class Slices(_Held):
    """Tensors, from which all micro-batches of a rank are taken as equal slices of one.

    Inputs [slices, rows, features + 1], where the last feature is 1, and all are 0 in rows without a sample; targets
    [slices * rows], there `IGNORED`.
    """

    def _cut(self, order: Tensor, sharding: Sharding, steps: range) -> Iterator[list[MicroBatch]]:
        """One for each of `steps`, which holds this rank's micro-batches, also if empty."""
        device = self._samples.inputs.device
        rows = rows_of(sharding.batch_size, sharding.micro_batches)
        slices = slices_of(sharding.micro_batches, sharding.world_size)
        order, occupied = without_waiting(order, device), len(sharding.owned())
        numbers = torch.arange(slices, device=device).view(-1, 1) * sharding.world_size + sharding.rank
        row_starts = torch.arange(rows, device=device) * sharding.micro_batches
        at_once = max(1, BLOCK_ROWS // (slices * rows))
        for begin in range(0, len(steps), at_once):
            part = steps[begin : begin + at_once]
            start = torch.arange(part.start, part.stop, device=device).view(-1, 1, 1) * sharding.batch_size
            positions = start + (numbers - start) % sharding.micro_batches + row_starts
            taken = positions < (start + sharding.batch_size).clamp(max=sharding.samples)
            taken[:, occupied:] = False
            chosen = order[positions.where(taken, 0)]
            mask = taken.unsqueeze(3)
            inputs = torch.cat([self._samples.inputs[chosen], mask], dim=3).mul_(mask)
            targets = self._samples.targets[chosen].masked_fill_(~taken, IGNORED).flatten(1)
            for piece in zip(inputs.unbind(), targets.unbind(), strict=True):
                yield [MicroBatch(sharding.rank, *piece)]


def without_waiting(order: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`; only from pinned memory does the host not wait for CUDA to take it."""
    return order.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else order


def rows_of(batch_size: int, micro_batches: int) -> int:
    """Rows of a slice: enough for any micro-batch of a step."""
    return filled_up(-(-batch_size // micro_batches), ROWS)


def slices_of(micro_batches: int, world_size: int) -> int:
    """Slices of every rank: enough for the one that runs the most of `micro_batches`."""
    return max(min(2, micro_batches), -(-micro_batches // world_size))


def filled_up(count: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `count`."""
    return -(-count // unit) * unit
