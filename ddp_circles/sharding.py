"""The samples of each step, micro-batch and rank: index arithmetic over DistributedSampler's order, without padding.

The order of an epoch depends on (seed, epoch) alone. Global step k takes the positions [k*B, (k+1)*B) of it. A step is
cut into V micro-batches: position p belongs to micro-batch p % V, which gets what
`DistributedSampler(num_replicas=V, rank=p % V)` gives a replica. Rank r of W runs the micro-batches r, r + W, r + 2W,
... So every sample is used once per epoch, for any N, B, V and W.
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
    """A data set of which only the length matters: all that the sampler asks for."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples


@dataclass(frozen=True)
class Sharding:
    """The cut of `samples` into steps of `batch_size`, and of each step into `micro_batches` (V) for the ranks."""

    samples: int
    batch_size: int
    micro_batches: int
    rank: int
    world_size: int

    @property
    def steps(self) -> int:
        """Steps per epoch; the last may be smaller."""
        return -(-self.samples // self.batch_size)

    def owned(self) -> range:
        """The numbers of the micro-batches that this rank runs in each step."""
        return range(self.rank, self.micro_batches, self.world_size)

    def step_size(self, step: int) -> int:
        """Samples of `step` over all ranks."""
        return self.seen(step + 1) - self.seen(step)

    def seen(self, steps: int) -> int:
        """Samples of an epoch's first `steps` steps over all ranks."""
        return min(steps * self.batch_size, self.samples)

    def bounds(self, step: int, micro_batch: int) -> tuple[int, int]:
        """Start and stop of `step`'s samples among those of `micro_batch` in an epoch; equal where it is empty."""
        return self._below(self.seen(step), micro_batch), self._below(self.seen(step + 1), micro_batch)

    def _below(self, position: int, micro_batch: int) -> int:
        """Positions below `position` that belong to `micro_batch`."""
        return max(0, -((micro_batch - position) // self.micro_batches))
