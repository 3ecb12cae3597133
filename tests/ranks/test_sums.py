"""The sum over all ranks: a row of numbers comes to the same on every rank, gathered or all-reduced."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ddp_circles.job import sums
from ddp_circles.job.ranks import read_ranks
from ddp_circles.job.world import open_world
from tests.harness.ranks import run_ranks

LENGTHS = (1, 5, 6, 1000)


def sum_rows(most_bytes: int) -> list[tuple[list[int], list[str]]]:
    """Sum a row of each length; with the names of the collectives that it took."""
    used: list[str] = []

    def noting(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            used.append(name)
            return collective(*arguments)

        return call

    found = []
    with open_world(read_ranks(), "cpu", "gloo", 30.0, {}) as world:
        sums.GATHERED_BYTES = most_bytes
        dist.all_reduce, dist.all_gather = noting("reduce", dist.all_reduce), noting("gather", dist.all_gather)
        for length in LENGTHS:
            used.clear()
            total = sums.sum_over_ranks((torch.arange(length) - 2) * 2 ** (20 * world.ranks.rank))
            found.append((total.tolist(), used.copy()))
    return found


def test_small_rows_are_gathered_and_large_ones_reduced_to_the_same_sums() -> None:
    for size in (2, 3):
        for outcome in run_ranks(sum_rows, size, 8 * 5 * size):
            for length, (total, used) in zip(LENGTHS, outcome, strict=True):
                assert total == [
                    (number - 2) * sum(2 ** (20 * rank) for rank in range(size)) for number in range(length)
                ]
                assert used == (["gather"] if length <= 5 else ["reduce"])
