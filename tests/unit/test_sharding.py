"""Sharding: every index exactly once, the same steps at any world size, DistributedSampler's own order.

In both ways in which micro-batches are cut out of the samples.
"""

import time
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from ddp_circles import micro_batches as cutting
from ddp_circles.data import Dataset
from ddp_circles.micro_batches import ROWS, OneByOne, Slices
from ddp_circles.models import IGNORED
from ddp_circles.sharding import Sharding, TensorSampler

SAMPLES = st.integers(1, 400)
BATCH_SIZES = st.integers(1, 450)
MICRO_BATCHES = st.integers(1, 20)
WORLD_SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**32 - 1)
EPOCHS = st.integers(0, 1000)
few = settings(deadline=None, max_examples=60)


def distributed_sampler(samples: int, replicas: int, rank: int, seed: int) -> DistributedSampler[int]:
    numbers: Any = range(samples)
    return DistributedSampler(numbers, num_replicas=replicas, rank=rank, seed=seed)


def numbered(samples: int) -> Dataset:
    """Samples that are their own numbers."""
    return Dataset(torch.arange(samples).view(-1, 1), torch.arange(samples))


def own_micro_batches(order: torch.Tensor, sharding: Sharding, first: int = 0) -> list[list[list[int]]]:
    """One rank's samples in each step and micro-batch, which are the same in both ways."""
    data = numbered(sharding.samples)
    one_by_one, apart = OneByOne(data).steps(order, sharding, first=first, epoch=0), []
    for step, pieces in enumerate(one_by_one, first):
        positions = torch.arange(sharding.seen(step), sharding.seen(step + 1))
        expected = {
            number: order[positions[positions % sharding.micro_batches == number]] for number in sharding.owned()
        }
        # By its number a micro-batch draws random numbers.
        assert [piece.number for piece in pieces] == [number for number, share in expected.items() if len(share)]
        assert all(torch.equal(piece.targets, expected[piece.number]) for piece in pieces)
        assert all(torch.equal(piece.inputs, piece.targets.view(-1, 1)) for piece in pieces)
        apart.append([piece.targets.tolist() for piece in pieces])
    for step, [(number, inputs, targets)] in enumerate(Slices(data).steps(order, sharding, first=first, epoch=0)):
        assert number == sharding.rank
        slices, rows, features = inputs.shape
        assert features == 2
        assert slices >= min(2, sharding.micro_batches)
        assert rows % ROWS == 0
        taken = targets != IGNORED
        assert torch.equal(inputs, torch.stack([targets * taken, taken], dim=1).view_as(inputs))
        beside = [row[row != IGNORED].tolist() for row in targets.view(slices, rows)]
        assert [one for one in beside if one] == apart[step]
        assert len(targets) == slices * rows
    assert len(apart) == sharding.steps - first == step + 1
    return apart


def own_steps(
    samples: int, batch_size: int, micro_batches: int, rank: int, world_size: int, order: torch.Tensor
) -> list[set[int]]:
    """One rank's samples in each step; asserts that it uses none twice."""
    sharding = Sharding(samples, batch_size, micro_batches, rank, world_size)
    steps = []
    for pieces in own_micro_batches(order, sharding):
        used = [number for piece in pieces for number in piece]
        assert len(set(used)) == len(used)
        steps.append(set(used))
    return steps


@few
@given(samples=SAMPLES, seed=SEEDS, epoch=EPOCHS)
def test_the_order_is_that_of_distributed_sampler(samples: int, seed: int, epoch: int) -> None:
    theirs = distributed_sampler(samples, 1, 0, seed)
    theirs.set_epoch(epoch)
    order = TensorSampler(samples, seed=seed).order(epoch)
    assert order.dtype == torch.int64
    assert order.tolist() == list(theirs)


@few
@given(samples=SAMPLES, micro_batches=MICRO_BATCHES, seed=SEEDS, epoch=EPOCHS)
def test_a_micro_batch_is_what_distributed_sampler_gives_a_replica(
    samples: int, micro_batches: int, seed: int, epoch: int
) -> None:
    order = TensorSampler(samples, seed=seed).order(epoch)
    [shares] = own_micro_batches(order, Sharding(samples, samples, micro_batches, 0, 1))
    for number in range(min(micro_batches, samples)):
        theirs = distributed_sampler(samples, micro_batches, number, seed)
        theirs.set_epoch(epoch)
        padded = list(theirs)
        unpadded = [index for turn, index in enumerate(padded) if number + turn * micro_batches < samples]
        assert shares[number] == unpadded


@few
@given(
    samples=SAMPLES,
    batch_size=BATCH_SIZES,
    micro_batches=MICRO_BATCHES,
    world_size=WORLD_SIZES,
    seed=SEEDS,
    epoch=EPOCHS,
)
def test_each_step_takes_the_same_samples_at_any_world_size(
    samples: int, batch_size: int, micro_batches: int, world_size: int, seed: int, epoch: int
) -> None:
    order = TensorSampler(samples, seed=seed).order(epoch)
    ranks = [own_steps(samples, batch_size, micro_batches, rank, world_size, order) for rank in range(world_size)]
    shuffled = order.tolist()
    batches = [set(shuffled[first : first + batch_size]) for first in range(0, samples, batch_size)]
    assert {len(steps) for steps in ranks} == {len(batches)}  # all ranks take part in all steps
    for step, batch in enumerate(batches):
        shares = [steps[step] for steps in ranks]
        assert set().union(*shares) == batch
        assert sum(map(len, shares)) == len(batch)  # no sample is shared by two ranks


@few
@given(samples=SAMPLES, batch_size=BATCH_SIZES, micro_batches=MICRO_BATCHES, world_size=WORLD_SIZES)
def test_each_sample_is_used_once_per_epoch(samples: int, batch_size: int, micro_batches: int, world_size: int) -> None:
    in_place = torch.arange(samples)
    used = [
        index
        for rank in range(world_size)
        for step in own_steps(samples, batch_size, micro_batches, rank, world_size, in_place)
        for index in step
    ]
    assert sorted(used) == list(range(samples))


@few
@given(samples=SAMPLES, batch_size=BATCH_SIZES, micro_batches=MICRO_BATCHES, data=st.data())
def test_a_resumed_epoch_takes_the_steps_that_are_left(
    samples: int, batch_size: int, micro_batches: int, data: st.DataObject
) -> None:
    sharding = Sharding(samples, batch_size, micro_batches, 0, 2)
    order = TensorSampler(samples, seed=1).order(0)
    first = data.draw(st.integers(0, sharding.steps - 1))
    assert own_micro_batches(order, sharding, first) == own_micro_batches(order, sharding)[first:]


@pytest.mark.parametrize("at_once", [1, 100, 1000])
def test_steps_put_in_order_together_do_not_change_a_sample(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    sharding, order = Sharding(613, 37, 8, 1, 3), TensorSampler(613, seed=1).order(0)
    expected = own_micro_batches(order, sharding)
    monkeypatch.setattr(cutting, "BLOCK_ROWS", at_once)
    assert own_micro_batches(order, sharding) == expected


@given(samples=SAMPLES, batch_size=BATCH_SIZES)
def test_step_sizes_add_up(samples: int, batch_size: int) -> None:
    sharding = Sharding(samples, batch_size, 8, 0, 1)
    sizes = [sharding.step_size(step) for step in range(sharding.steps)]
    assert sum(sizes) == samples == sharding.seen(sharding.steps)
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= batch_size


@given(samples=SAMPLES, batch_size=BATCH_SIZES, micro_batches=MICRO_BATCHES)
def test_micro_batches_of_a_step_differ_by_at_most_one_sample(
    samples: int, batch_size: int, micro_batches: int
) -> None:
    sharding = Sharding(samples, batch_size, micro_batches, 0, 1)
    for step in range(sharding.steps):
        bounds = [sharding.bounds(step, number) for number in range(micro_batches)]
        sizes = [stop - start for start, stop in bounds]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == sharding.step_size(step)


def test_each_micro_batch_has_one_rank() -> None:
    owned = [list(Sharding(100, 10, 8, rank, 3).owned()) for rank in range(3)]
    assert owned == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert list(Sharding(100, 10, 2, 2, 3).owned()) == []


def test_epochs_differ_and_repeat() -> None:
    sampler = TensorSampler(1000, seed=42)
    first, second = sampler.order(0), sampler.order(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, TensorSampler(1000, seed=42).order(0))
    assert not torch.equal(first, TensorSampler(1000, seed=43).order(0))


@pytest.mark.timeout(120)
def test_ten_million_samples_are_never_a_list() -> None:
    samples = 10**7
    sharding = Sharding(samples, 1000, 8, 1, 4)
    data, counts = numbered(samples), []
    started = time.process_time()
    tracemalloc.start()
    try:
        order = TensorSampler(samples, seed=42).order(3)
        for source in (OneByOne(data), Slices(data)):
            steps = source.steps(order, sharding, first=0, epoch=0)
            counts.append(sum(int((piece.targets != IGNORED).sum()) for pieces in steps for piece in pieces))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**21  # a list of the indices takes over 80 MB; tensors are not traced
    assert time.process_time() - started < 20
    assert counts == [samples // 4] * 2
    assert torch.equal(order.sort().values, data.targets)


# ---- many ranks


def test_work_per_rank_does_not_grow_with_the_number_of_ranks() -> None:
    """Each of 1,024 ranks holds and computes its own micro-batch only."""
    samples, micro_batches, world = 1024 * 50 + 7, 1024, 1024
    order = TensorSampler(samples, seed=42).order(3)
    data = numbered(samples)
    used = torch.zeros(samples, dtype=torch.int64)
    for rank in range(world):
        sharding = Sharding(samples, 4096, micro_batches, rank, world)
        assert list(sharding.owned()) == [rank]
        share = torch.cat([piece.targets for [piece] in OneByOne(data).steps(order, sharding, first=0, epoch=0)])
        assert len(share) in (50, 51)
        used[share] += 1
        assert sharding.bounds(0, rank) == (0, 4)
        assert sharding.bounds(sharding.steps - 1, rank)[1] == len(share)
    assert (used == 1).all()
