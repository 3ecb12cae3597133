"""Which sample goes where: index arithmetic over DistributedSampler's order, without padding.

The order of an epoch depends on (seed, epoch) alone. Global step k takes the positions [k*B, (k+1)*B) of it, and
position p belongs to stream p % V: stream v is what `DistributedSampler(num_replicas=V, rank=v)` gives replica v.
Rank r of W owns the streams r, r + W, r + 2W, ... So every sample is used once per epoch, for any N, B, V and W.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler


class TensorSampler(DistributedSampler[int]):
    """`DistributedSampler`'s order as tensors, with the epoch as an argument and no padding."""

    def __init__(self, samples: int, *, seed: int) -> None:
        super().__init__(_Sized(samples), num_replicas=1, rank=0, shuffle=True, seed=seed)
        self.samples = samples

    def order(self, epoch: int) -> Tensor:
        """Sample numbers in the order of `epoch`; int64 of shape [samples]."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.samples, generator=generator)


class _Sized(Dataset[int]):
    """The one thing the sampler asks of a data set: its length."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples


@dataclass(frozen=True)
class Sharding:
    """How `samples` are cut into steps of `batch_size` and into `streams` (V) for the ranks of a world."""

    samples: int
    batch_size: int
    streams: int
    rank: int
    world_size: int

    @property
    def steps(self) -> int:
        """Steps per epoch; the last may be smaller."""
        return -(-self.samples // self.batch_size)

    def owned(self) -> range:
        """The streams of this rank."""
        return range(self.rank, self.streams, self.world_size)

    def step_size(self, step: int) -> int:
        """Samples of `step` over all ranks."""
        return self.seen(step + 1) - self.seen(step)

    def seen(self, steps: int) -> int:
        """Samples of an epoch's first `steps` steps over all ranks."""
        return min(steps * self.batch_size, self.samples)

    def bounds(self, step: int, stream: int) -> tuple[int, int]:
        """Where `step`'s micro-batch begins and ends within `stream`; equal where it is empty."""
        return self._below(self.seen(step), stream), self._below(self.seen(step + 1), stream)

    def _below(self, position: int, stream: int) -> int:
        """How many positions below `position` belong to `stream`."""
        return max(0, -((stream - position) // self.streams))
