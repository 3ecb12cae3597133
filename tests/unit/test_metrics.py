"""Loss and accuracy as integers: sums independent of the ranks, and no overflow."""

import math
from fractions import Fraction
from unittest.mock import Mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddp_circles.metrics import LocalTally, Sums, SumsReader, Tally

CPU = torch.device("cpu")
UNITS = 2**24
LOSSES = st.lists(st.floats(0, 2.0**20, width=32), min_size=1, max_size=12)


def tally_of(losses: list[float], logits: list[Tensor], targets: list[Tensor]) -> LocalTally:
    tally = LocalTally(CPU)
    for loss, own_logits, own_targets in zip(losses, logits, targets, strict=True):
        tally.add(torch.tensor(loss), own_logits, own_targets)
    return tally


@settings(deadline=None)
@given(losses=LOSSES, owners=st.lists(st.integers(0, 3), min_size=12, max_size=12), seed=st.integers(0, 2**31))
def test_sums_do_not_depend_on_the_ranks(losses: list[float], owners: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(size, generator=generator) for size in range(len(losses))]
    targets = [(torch.rand(size, generator=generator) < 0.5).float() for size in range(len(losses))]
    total = torch.zeros(3, dtype=torch.int64)
    for rank in range(4):
        mine = [number for number in range(len(losses)) if owners[number] == rank]
        share = tally_of([losses[n] for n in mine], [logits[n] for n in mine], [targets[n] for n in mine])
        total += share.take(len(losses))
    units = sum(round(Fraction(loss) * UNITS) for loss in losses)  # exact arithmetic, ties to even
    right = sum(
        (logit > 0) == (target == 1)
        for some, others in zip(logits, targets, strict=True)
        for logit, target in zip(some.tolist(), others.tolist(), strict=True)
    )
    assert total.tolist() == [units, right * UNITS, 0]


def test_taking_a_tally_empties_it() -> None:
    tally = tally_of([1.0], [torch.tensor([3.0, -3.0])], [torch.tensor([1.0, 1.0])])
    assert tally.take(8).tolist() == [UNITS, UNITS, 0]
    assert tally.take(8).tolist() == [0, 0, 0]


def test_classes_are_counted_too() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0], [5.0, 1.0, 0.0]])
    assert tally_of([0.0], [logits], [torch.tensor([1, 2])]).take(8).tolist() == [0, UNITS, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**36, -(2.0**36)])
def test_losses_out_of_range_are_counted(bad: float) -> None:
    nothing = [torch.zeros(0)] * 4
    assert tally_of([1.0, bad, bad, 2.0], nothing, nothing).take(8)[2] == 2


def test_the_largest_losses_allowed_cannot_overflow() -> None:
    largest = torch.tensor(2.0**35).nextafter(torch.tensor(0.0)).item()
    nothing = [torch.zeros(0)] * 8
    units, _, bad = tally_of([largest] * 8, nothing, nothing).take(8).tolist()
    assert (units, bad) == (8 * round(Fraction(largest) * UNITS), 0)


def test_a_billion_samples_are_summed_to_the_last_unit() -> None:
    samples, per_step, mean = 10**9, 10**8, 0.6931472
    shares = [per_step // 8 * mean] * 8
    total = 0
    exact = Fraction(0)
    for _ in range(samples // per_step):
        units, right, bad = tally_of(shares, [torch.zeros(1)] * 8, [torch.zeros(1)] * 8).take(8).tolist()
        assert (right, bad) == (8 * UNITS, 0)
        total += units
        exact += sum(Fraction(torch.tensor(share).item()) for share in shares)
    assert abs(Fraction(total, UNITS) - exact) <= Fraction(80, 2 * UNITS)  # half a unit per term, 80 terms
    assert Tally({"loss": total}, samples).means["loss"] == pytest.approx(mean, rel=1e-6)
    assert exact * 2**44 > 2**63  # would overflow at the gradients' resolution


def test_a_billion_samples_in_one_agreement() -> None:
    units, _, bad = tally_of([10**9 / 8 * 2.5] * 8, [torch.zeros(1)] * 8, [torch.zeros(1)] * 8).take(8).tolist()
    assert (units, bad) == (round(10**9 * 2.5) * UNITS, 0)


def test_percent_is_printed_as_published() -> None:
    means = Tally({"loss": 800 * UNITS // 2, "accuracy": 427 * UNITS}, 800).means
    assert f"{means['accuracy'] * 100:.2f}" == "53.37"  # 427 * 100 / 800 would print 53.38
    assert means["loss"] == 0.5


@given(right=st.integers(0, 2**60), count=st.integers(1, 2**60))
@example(right=121645100408832001, count=115)  # a quotient that two roundings get wrong
def test_accuracy_is_that_of_whole_numbers(right: int, count: int) -> None:
    assert Tally({"accuracy": right * UNITS}, count).means["accuracy"] == right / count


def test_metrics_are_summed_beside_the_loss_and_nothing_is_counted_without_accuracy() -> None:
    tally = LocalTally(
        CPU,
        metrics={"sum": lambda logits, _: logits.sum(), "count": lambda _, targets: (targets == 1).sum()},
        accuracy=False,
    )
    for size in (2, 3):
        tally.add(torch.tensor(size / 3), torch.full((size, 4), 0.25), torch.ones(size, dtype=torch.int64))
    assert tally.names == ["loss", "sum", "count"]
    units = [sum(round(Fraction(torch.tensor(size / 3).item()) * UNITS) for size in (2, 3)), 5 * UNITS, 5 * UNITS]
    assert tally.take(8).tolist() == [*units, 0]
    assert tally.take(8).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**36])
def test_metrics_out_of_range_are_counted(bad: float) -> None:
    tally = LocalTally(CPU, metrics={"own": lambda logits, _: logits.sum()})
    tally.add(torch.tensor(1.0), torch.tensor([bad]), torch.ones(1))
    assert tally.take(8).tolist()[-1] == 1


def test_sums_that_need_not_be_exact_have_no_range() -> None:
    tally = LocalTally(CPU, exact=False)
    for loss in (3e30, 1.0):
        tally.add(torch.tensor(loss), torch.ones(1), torch.ones(1))
    units, right, bad = tally.take(8).tolist()
    assert Tally({"loss": int(units)}, 2).means["loss"] == pytest.approx(1.5e30, rel=1e-6)
    assert (right, bad) == (2 * UNITS, 0)
    tally.add(torch.tensor(math.nan), torch.ones(1), torch.ones(1))
    assert tally.take(8).tolist() == [0, UNITS, 1]


def device_sums(step: int) -> Tensor:
    return torch.tensor([10 * step, step, 0, 0])


def expected_sums(step: int) -> Sums:
    return Sums(step, 64 * (step + 1), [10 * step, step], 0, 0)


def post(reader: SumsReader, step: int) -> None:
    reader.post(step, 64 * (step + 1), device_sums(step))


def test_sums_are_read_at_once_without_delay() -> None:
    reader = SumsReader(0, Mock())
    for step in range(3):
        post(reader, step)
        assert reader.peek() == [expected_sums(step)]
        assert reader.read() == [expected_sums(step)]
        assert (reader.read(), reader.peek()) == ([], [])


def test_sums_are_read_one_agreement_late() -> None:
    reader = SumsReader(1, Mock())
    assert (reader.read(), reader.peek(), reader.read(everything=True)) == ([], [], [])
    post(reader, 0)
    assert reader.read() == []
    assert reader.peek() == [expected_sums(0)]
    post(reader, 1)
    assert reader.read() == [expected_sums(0)]
    assert reader.peek() == [expected_sums(1)]
    assert reader.read() == []
    post(reader, 2)
    assert reader.peek() == [expected_sums(1), expected_sums(2)]
    assert reader.read(everything=True) == [expected_sums(1), expected_sums(2)]
    assert reader.read(everything=True) == []
