"""Buffers that a forward pass changes: the mean, or the sum, over micro-batches, for any partition and any order."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ddp_circles.buffers import Buffers
from ddp_circles.exact import ExactReducer
from ddp_circles.fixed_point import BUFFER_BITS
from ddp_circles.metrics import LocalTally

CPU = torch.device("cpu")
NAMES = ["count", "average", "inner.total", "flags"]
START = {"average": [0.5, -3.0], "inner.total": [[1e6, 0.0]], "count": 7, "flags": [250, 3]}


class Model(nn.Module):
    average: Tensor
    count: Tensor
    flags: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.register_buffer("average", torch.tensor(START["average"]))
        self.register_buffer("count", torch.tensor(START["count"]))
        self.register_buffer("flags", torch.tensor(START["flags"], dtype=torch.uint8))
        self.register_buffer("untouched", torch.ones(2))
        self.inner.register_buffer("total", torch.tensor(START["inner.total"], dtype=torch.float64))

    def change(self, amount: float, *, replace: bool = False) -> None:
        """Do what a forward pass might do."""
        new = self.average + amount
        if replace:
            self.average = new
            self.count = self.count + 3
        else:
            self.average.copy_(new)
            self.count += 3
        self.inner.get_buffer("total")[0, 1] += amount
        self.flags += 1


def sums_of_a_rank(model: Model, buffers: Buffers, amounts: Sequence[float], *, replace: bool = False) -> Tensor:
    """What a rank with these micro-batches adds to the sum of a step."""
    for amount in amounts:
        model.change(amount, replace=replace)
        buffers.take_changes()
        check_begun(model)
    changes = buffers.changes()
    return torch.cat([buffers.added_up(units_of(changes)), buffers.counts()])


def units_of(changes: list[Tensor]) -> Tensor:
    """Changes as multiples of 2^-34."""
    return torch.cat([torch.zeros(0), *changes]).double().mul(2.0**BUFFER_BITS).round().long()


def check_begun(model: Model) -> None:
    """Check that the model has the buffers that it began with."""
    assert {name: model.get_buffer(name).tolist() for name in NAMES} == START


amounts_of_ranks = st.lists(
    st.lists(st.floats(-100, 100, width=32), max_size=4), min_size=1, max_size=4
).filter(any)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(shares=amounts_of_ranks, replace=st.booleans())
def test_means_and_sums_do_not_depend_on_the_ranks(shares: list[list[float]], replace: bool) -> None:
    models = [Model() for _ in shares]
    ranks = [Buffers(model, NAMES) for model in models]
    given_out = [dict(model.named_buffers()) for model in models]
    total = torch.stack(
        [
            sums_of_a_rank(model, buffers, share, replace=replace)
            for model, buffers, share in zip(models, ranks, shares, strict=True)
        ]
    ).sum(0)
    for buffers in ranks:
        assert len(total) == buffers.width
        buffers.apply(total)
    amounts = [amount for share in shares for amount in share]
    alone = Model()
    Buffers(alone, NAMES).apply(sums_of_a_rank(Model(), Buffers(Model(), NAMES), []) + total)
    for model, begun in zip(models, given_out, strict=True):
        assert all(model.get_buffer(name) is begun[name] for name in begun)  # other places may hold them
        assert model.count.item() == 7 + 3 * len(amounts)
        assert model.flags.tolist() == [(250 + len(amounts)) % 256, 3 + len(amounts)]
        for row, value in enumerate(model.average.tolist()):
            old = START["average"][row]  # type: ignore[index]
            changes = [float(np.float32(np.float32(old) + np.float32(amount)) - np.float32(old)) for amount in amounts]
            units = sum(round(Fraction(change) * 2**BUFFER_BITS) for change in changes)
            mean = Fraction(units, len(amounts) * 2**BUFFER_BITS)
            assert value == pytest.approx(float(Fraction(old) + mean), rel=1e-7, abs=1e-9)
        assert all(torch.equal(model.get_buffer(name), alone.get_buffer(name)) for name in NAMES)
        assert model.get_buffer("untouched").tolist() == [1, 1]


def test_steps_build_on_each_other() -> None:
    """A long row of small changes arrives where one average of all of them does."""
    model = Model()
    buffers = Buffers(model, NAMES)
    for _ in range(100):
        for amount in (0.25, 0.75):
            model.change(amount)
            buffers.take_changes()
        buffers.apply(torch.cat([buffers.added_up(units_of(buffers.changes())), buffers.counts()]))
    assert model.average.tolist() == [50.5, 47.0]
    assert model.inner.get_buffer("total").tolist() == [[1e6, 50.0]]
    assert model.count.item() == 7 + 600


def test_whole_numbers_alone() -> None:
    model = Model()
    buffers = Buffers(model, ["count"])
    for _ in range(3):
        model.count += 2**40
        buffers.take_changes()
    sums = torch.cat([buffers.added_up(torch.zeros(0, dtype=torch.int64)), buffers.counts()])
    assert sums.tolist() == [3 * 2**40, 3]
    buffers.apply(sums)
    assert model.count.item() == 7 + 3 * 2**40


@pytest.mark.parametrize("replace", [False, True])
def test_an_empty_micro_batch_changes_nothing(replace: bool) -> None:
    model = Model()
    buffers = Buffers(model, NAMES)
    model.change(float("nan"), replace=replace)
    buffers.put_back()
    check_begun(model)
    assert buffers.changes() == []
    assert buffers.counts().tolist() == [0, 0, 0, 0]


class Shifted(nn.Module):
    """A layer whose forward pass shifts a buffer."""

    buffer: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("buffer", torch.zeros(2))

    def forward(self, inputs: Tensor, by: float) -> Tensor:
        self.buffer += by
        logits: Tensor = self.layer(inputs)
        return logits.squeeze(1)


@pytest.mark.parametrize(
    "by, out_of_range",
    [(0.5, 0), (3e7, 0), (-3e7, 0), (4e7, 1), (-4e7, 1), (float("inf"), 1), (float("nan"), 1)],
)
def test_a_change_beyond_the_range_is_noticed(by: float, out_of_range: int) -> None:
    model, tally = Shifted(), LocalTally(CPU)
    reducer = ExactReducer(
        model,
        model,
        buffers=Buffers(model, ["buffer"]),
        micro_batches=8,
        tally=tally,
        stop_requested=lambda: False,
        device=CPU,
    )
    for network, context in reducer.passes(2):
        with context:
            logits = network(torch.ones(3, 2), by)
            tally.add(logits.sum(), logits, torch.ones(3))
            logits.sum().backward(reducer.weight(6))
    assert int(reducer.agreed(0, last=True)[2]) == out_of_range
    if not out_of_range:
        assert model.buffer.tolist() == [by] * 2
