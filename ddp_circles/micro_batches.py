"""The micro-batches of each step, taken from a set of samples: one after another, or as slices side by side."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddp_circles.data import Dataset
from ddp_circles.models import IGNORED
from ddp_circles.sharding import Sharding

Cut = Callable[[Dataset, Tensor, Sharding, int], Iterator[list[Dataset]]]
"""From samples, their order, its sharding and a first step: for each step from there on, what this rank's passes take.

One of them at least."""
ROWS = 32
BLOCK_ROWS = 2**20
"""Most rows, over all slices, that are put in order together; those of one step always are."""


def cut_one_by_one(samples: Dataset, order: Tensor, sharding: Sharding, first: int) -> Iterator[list[Dataset]]:
    """A piece for each micro-batch of this rank that is not empty; if all are, an empty piece."""
    inputs, targets = samples
    # All samples of a micro-batch in an epoch are put in order together, and lie in one block; a step takes a part.
    indices = {number: order[number :: sharding.micro_batches].to(inputs.device) for number in sharding.owned()}
    epoch = {number: Dataset(inputs[index], targets[index]) for number, index in indices.items()}
    nothing = Dataset(inputs[:0], targets[:0])
    for step in range(first, sharding.steps):
        parts = [(share, slice(*sharding.bounds(step, number))) for number, share in epoch.items()]
        pieces = [Dataset(share.inputs[part], share.targets[part]) for share, part in parts if part.start < part.stop]
        yield pieces or [nothing]


def cut_side_by_side(samples: Dataset, order: Tensor, sharding: Sharding, first: int) -> Iterator[list[Dataset]]:
    """One piece for all micro-batches of this rank.

    Inputs [slices, rows, features + 1], where the last feature is 1, and all are 0 in rows without a sample; targets
    [slices * rows], there `IGNORED`.
    """
    device = samples.inputs.device
    rows = rows_of(sharding.batch_size, sharding.micro_batches)
    slices = slices_of(sharding.micro_batches, sharding.world_size)
    order, occupied = order.to(device), len(sharding.owned())
    numbers = torch.arange(slices, device=device).view(-1, 1) * sharding.world_size + sharding.rank
    row_starts = torch.arange(rows, device=device) * sharding.micro_batches
    at_once = max(1, BLOCK_ROWS // (slices * rows))
    for begin in range(first, sharding.steps, at_once):
        steps = torch.arange(begin, min(begin + at_once, sharding.steps), device=device).view(-1, 1, 1)
        start = steps * sharding.batch_size
        positions = start + (numbers - start) % sharding.micro_batches + row_starts
        taken = positions < (start + sharding.batch_size).clamp(max=sharding.samples)
        taken[:, occupied:] = False
        chosen = order[positions.where(taken, 0)]
        mask = taken.unsqueeze(3)
        inputs = torch.cat([samples.inputs[chosen], mask], dim=3).mul_(mask)
        targets = samples.targets[chosen].masked_fill_(~taken, IGNORED).flatten(1)
        for piece in zip(inputs.unbind(), targets.unbind(), strict=True):
            yield [Dataset(*piece)]


def rows_of(batch_size: int, micro_batches: int) -> int:
    """Rows of a slice: enough for any micro-batch of a step."""
    return filled_up(-(-batch_size // micro_batches), ROWS)


def slices_of(micro_batches: int, world_size: int) -> int:
    """Slices of every rank: enough for the one that runs the most of `micro_batches`."""
    return max(min(2, micro_batches), -(-micro_batches // world_size))


def filled_up(count: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `count`."""
    return -(-count // unit) * unit
