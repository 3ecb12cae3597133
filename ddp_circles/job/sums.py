"""Sums over all ranks, and copies from one."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ddp_circles.job.watch import waiting

GATHERED_BYTES = 2**16
"""Most bytes, of all ranks together, that are gathered on the CPU."""


def sum_over_ranks(numbers: Tensor) -> Tensor:
    """Sum a row of `numbers` over all ranks, in one collective; `numbers` may hold the result. Raises if that fails.

    On the CPU a small row is gathered and added up on every rank: gloo's all-reduce sends it round twice, in pieces,
    and each message between two processes costs more than the sum.
    """
    size = dist.get_world_size()
    with waiting:
        # gloo takes CUDA tensors too: it copies them through pinned memory.
        if numbers.is_cuda or size * numbers.nbytes > GATHERED_BYTES:
            dist.all_reduce(numbers)
            return numbers
        everyone = torch.empty(size, len(numbers), dtype=numbers.dtype)
        dist.all_gather(list(everyone.unbind()), numbers)
    return everyone.sum(0)


def copy_from_rank_0(tensors: Iterable[Tensor]) -> None:
    """Overwrite `tensors` with those of rank 0. Raises if that fails."""
    with waiting:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
