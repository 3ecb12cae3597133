"""Exact sums against rational arithmetic: any order, any partition, up to the limit of their range and beyond."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.futures import Future

from ddp_circles import exact
from ddp_circles.contract import check_model
from ddp_circles.data import make_points
from ddp_circles.errors import UserError
from ddp_circles.exact import ExactReducer
from ddp_circles.fixed_point import GRADIENT_BITS, LOSS_BITS, dequantize, largest_term, quantize
from ddp_circles.metrics import LocalTally
from ddp_circles.models import Classifier, loss_sum

CPU = torch.device("cpu")
MICRO_BATCHES = 8
IN_RANGE = largest_term(MICRO_BATCHES, GRADIENT_BITS)

any_float = st.floats(width=32)
in_range = st.floats(width=32, min_value=-IN_RANGE, max_value=IN_RANGE, exclude_min=True, exclude_max=True)


def terms(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[list[float]]]:
    """Gradients of 1 to `MICRO_BATCHES` micro-batches, three elements each."""
    return st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=MICRO_BATCHES)


def tally_of(*losses: float) -> LocalTally:
    """One rank's tally of micro-batches with these losses, one right answer each."""
    tally = LocalTally(CPU)
    for loss in losses:
        tally.add(torch.tensor(loss), torch.zeros(1), torch.zeros(1))
    return tally


def make_reducer(model: nn.Module, tally: LocalTally | None = None) -> ExactReducer:
    """A reducer at world one; by default with one micro-batch of loss 0 in its tally."""
    tally = tally or tally_of(0.0)
    return ExactReducer(
        model, model, micro_batches=MICRO_BATCHES, tally=tally, stop_requested=lambda: False, device=CPU
    )


def sum_on_one_rank(gradients: Sequence[Sequence[float]], grouped: int = MICRO_BATCHES) -> tuple[Tensor, int]:
    """One rank's sum of a step's gradients, and its out-of-range flag. `grouped`: micro-batches rounded together."""
    model = nn.Linear(3, 1, bias=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "WAITING_ELEMENTS", 3 * grouped)
        reducer = make_reducer(model)
    for gradient, (_, context) in zip(gradients, reducer.passes(len(gradients)), strict=True):
        with context:
            model.weight.grad = torch.tensor([gradient])
    assert model.weight.grad is not None
    return model.weight.grad.clone(), int(reducer.agreed(0, last=True)[2])


def as_floats(integers: Tensor) -> Tensor:
    return dequantize(integers, GRADIENT_BITS, out=torch.empty(len(integers)))


@settings(deadline=None)
@given(integer=st.integers(-(2**62), 2**62))
def test_a_sum_is_rounded_once(integer: int) -> None:
    value = Fraction(as_floats(torch.tensor([integer])).item()) * 2**GRADIENT_BITS
    for towards in (-np.inf, np.inf):
        neighbour = Fraction(float(np.nextafter(np.float32(value / 2**GRADIENT_BITS), np.float32(towards))))
        assert abs(integer - value) <= abs(integer - neighbour * 2**GRADIENT_BITS)


@settings(deadline=None)
@given(gradients=terms(in_range), data=st.data())
def test_order_and_grouping_do_not_change_a_bit(gradients: list[list[float]], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(gradients))
    grouped = data.draw(st.integers(1, MICRO_BATCHES))
    expected, _ = sum_on_one_rank(gradients)
    assert sum_on_one_rank(shuffled, grouped)[0].numpy().tobytes() == expected.numpy().tobytes()


@settings(deadline=None)
@given(gradients=terms(in_range), data=st.data())
def test_partition_does_not_change_a_bit(gradients: list[list[float]], data: st.DataObject) -> None:
    owners = data.draw(st.lists(st.integers(0, 4), min_size=len(gradients), max_size=len(gradients)))
    per_rank = [
        sum((quantize(torch.tensor(g), GRADIENT_BITS) for g, o in zip(gradients, owners, strict=True) if o == rank),
            start=torch.zeros(3, dtype=torch.int64))
        for rank in range(5)
    ]  # fmt: skip
    added = sum(data.draw(st.permutations(per_rank)), start=torch.zeros(3, dtype=torch.int64))
    expected, _ = sum_on_one_rank(gradients)
    assert as_floats(added).numpy().tobytes() == expected.flatten().numpy().tobytes()


@settings(deadline=None)
@given(gradients=terms(in_range))
def test_error_is_bounded_by_one_rounding_per_term_and_one_of_the_sum(gradients: list[list[float]]) -> None:
    summed, out_of_range = sum_on_one_rank(gradients)
    assert out_of_range == 0
    for column, value in enumerate(summed.flatten().tolist()):
        truth = math.fsum(gradient[column] for gradient in gradients)
        half_ulp = float(np.spacing(np.float32(abs(value)))) / 2
        bound = len(gradients) * 2.0 ** -(GRADIENT_BITS + 1) + half_ulp
        assert abs(value - truth) <= bound * (1 + 1e-9) + abs(truth) * 2**-52


@settings(deadline=None)
@given(gradients=terms(any_float))
def test_every_sum_is_either_right_or_reported(gradients: list[list[float]]) -> None:
    summed, out_of_range = sum_on_one_rank(gradients)
    if all(abs(value) < IN_RANGE for gradient in gradients for value in gradient):
        assert out_of_range == 0
        integers = [sum(round(Fraction(g[column]) * 2**GRADIENT_BITS) for g in gradients) for column in range(3)]
        assert all(abs(integer) < 2**62 for integer in integers)
        expected = torch.tensor(integers, dtype=torch.int64)
        assert torch.equal(summed.flatten(), as_floats(expected))
    else:
        assert out_of_range > 0


@pytest.mark.parametrize("bits", [GRADIENT_BITS, LOSS_BITS])
@pytest.mark.parametrize("count", [1, 3, 6, 8, 1000])
def test_largest_terms_do_not_wrap_round(bits: int, count: int) -> None:
    limit = torch.tensor(largest_term(count, bits), dtype=torch.float32)
    largest = torch.nextafter(limit, torch.tensor(0.0))
    for sign in (1, -1):
        integers = quantize(sign * largest.expand(count), bits)
        assert int(integers.sum()) == count * int(integers[0])
        assert abs(count * int(integers[0])) < 2**63


@settings(deadline=None)
@given(
    losses=st.lists(st.floats(0, 250, width=32), min_size=MICRO_BATCHES, max_size=MICRO_BATCHES),
    data=st.data(),
)
def test_loss_sums_of_a_billion_samples_are_exact(losses: list[float], data: st.DataObject) -> None:
    shares = [torch.tensor(loss * (10**9 // MICRO_BATCHES)) for loss in losses]
    owners = data.draw(st.lists(st.integers(0, 2), min_size=MICRO_BATCHES, max_size=MICRO_BATCHES))
    ranks = [LocalTally(CPU) for _ in range(3)]
    for share, owner in zip(shares, owners, strict=True):
        ranks[owner].add(share, torch.zeros(2), torch.zeros(2))
    units, right, out_of_range = torch.stack([rank.take(MICRO_BATCHES) for rank in ranks]).sum(0).tolist()
    assert units == sum(round(Fraction(share.item()) * 2**LOSS_BITS) for share in shares)
    assert right == 2 * MICRO_BATCHES * 2**LOSS_BITS
    assert out_of_range == 0


LOSS_LIMIT = largest_term(MICRO_BATCHES, LOSS_BITS)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, LOSS_LIMIT, -LOSS_LIMIT, 1e30])
def test_loss_out_of_range_is_reported(loss: float) -> None:
    assert sums_of_losses([1.0, loss, 2.0])[2] == 1


@settings(deadline=None)
@given(losses=st.lists(st.floats(-LOSS_LIMIT, LOSS_LIMIT, width=32, exclude_min=True, exclude_max=True), min_size=1))
def test_losses_that_ride_with_the_gradients_are_exact(losses: list[float]) -> None:
    losses = losses[:MICRO_BATCHES]
    units = sum(round(Fraction(loss) * 2**LOSS_BITS) for loss in losses)
    assert sums_of_losses(losses) == [units, len(losses) * 2**LOSS_BITS, 0, 0]


def sums_of_losses(losses: Sequence[float]) -> list[int]:
    """Integers the ranks agree on after a step with these losses."""
    model = nn.Linear(3, 1, bias=False)
    reducer = make_reducer(model, tally=tally_of(*losses))
    with reducer.passes(1)[0][1]:
        model.weight.grad = torch.ones(1, 3)
    return cast(list[int], reducer.agreed(0, last=True).tolist())


def test_rounding_over_a_training_stays_below_that_of_float32() -> None:
    """Compare each step's gradients with float64 sums over the same micro-batches."""
    torch.manual_seed(42)
    model = Classifier(2, (10, 10), "relu", 2)
    parameters = list(model.parameters())
    inputs, targets = make_points(
        "circles", n_samples=1000, noise=0.03, factor=0.8, test_fraction=0.2, data_seed=42
    ).train
    tally = LocalTally(CPU)
    reducer = make_reducer(model, tally=tally)
    generator = torch.Generator().manual_seed(1)
    differing = elements = 0
    for _ in range(100):
        chosen = torch.randint(len(inputs), (64,), generator=generator)
        truth = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
        for number, (_, context) in enumerate(reducer.passes(MICRO_BATCHES)):
            share = chosen[number::MICRO_BATCHES]
            logits = model(inputs[share])
            loss = loss_sum(logits, targets[share])
            tally.add(loss, logits, targets[share])
            gradients = torch.autograd.grad(loss / 64, parameters)
            truth += torch.cat([gradient.flatten() for gradient in gradients]).double()
            with context:
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
        summed = torch.cat([cast(Tensor, parameter.grad).flatten() for parameter in parameters])
        error = (summed.double() - truth).abs()
        assert (error <= MICRO_BATCHES * 2.0 ** -(GRADIENT_BITS + 1) + truth.abs() * 2.0**-24).all()
        differing += int((summed != truth.float()).sum())
        elements += summed.numel()
        for parameter in parameters:
            parameter.data -= 0.1 * cast(Tensor, parameter.grad)
    assert differing < 0.01 * elements


# ---- models that are refused, and models that are not


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.SyncBatchNorm(4), "normalises over all ranks' samples"),
        (nn.BatchNorm1d(4, momentum=None), "averages over all batches so far"),
        (nn.LazyBatchNorm1d(momentum=None), "averages over all batches so far"),
        (nn.BatchNorm2d(4, momentum=None), "averages over all batches so far"),
    ],
)
def test_models_that_average_over_other_samples_are_refused(module: nn.Module, why: str) -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Sequential(module), nn.Linear(4, 1))
    with pytest.raises(
        UserError, match=rf"--reduction exact cannot train 1\.0 \({type(module).__name__}\).*{why}.*fast"
    ):
        check_model(model)


def test_models_that_cannot_be_summed_are_refused() -> None:
    with pytest.raises(UserError, match=r"float32 parameters; weight is torch\.float64"):
        check_model(nn.Linear(2, 1).double())
    with pytest.raises(UserError, match="nothing to train"):
        check_model(nn.Linear(2, 1).requires_grad_(requires_grad=False))
    with pytest.raises(UserError, match="nothing to train"):
        check_model(nn.ReLU(), exact=False)
    with pytest.raises(UserError, match="lazy parameter, weight"):
        check_model(nn.LazyLinear(1))
    with pytest.raises(UserError, match=r"model= must be a torch\.nn\.Module, got function"):
        check_model(tally_of)  # type: ignore[arg-type]
    turned = nn.Linear(3, 4)
    turned.weight = nn.Parameter(torch.rand(3, 4).t())
    with pytest.raises(UserError, match=r"0\.weight has strides .*: make it contiguous\(\)"):
        check_model(nn.Sequential(turned))


def test_harmless_models_are_accepted() -> None:
    check_model(nn.Sequential(nn.Linear(2, 4), nn.GroupNorm(2, 4), nn.Dropout(0.0), nn.Linear(4, 1)))
    check_model(nn.SyncBatchNorm(4), exact=False)
    check_model(nn.BatchNorm1d(4, momentum=None), exact=False)
    check_model(nn.Sequential(nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)))
    check_model(nn.BatchNorm1d(4, momentum=None, track_running_stats=False))
    check_model(nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.1), nn.AlphaDropout(0.5), nn.RReLU()))
    check_model(nn.Sequential(nn.MultiheadAttention(4, 2, dropout=0.1), nn.LSTM(4, 4, num_layers=2, dropout=0.1)))
    check_model(nn.Sequential(nn.InstanceNorm1d(4), nn.MultiheadAttention(4, 2), nn.LSTM(4, 4, num_layers=2)))


def test_parameter_without_gradient_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1, bias=False), "unused": nn.Linear(2, 1, bias=False)})
    reducer = make_reducer(model)
    with (
        pytest.raises(ValueError, match=r"no gradient for 'unused\.weight': every parameter must take part"),
        reducer.passes(1)[0][1],
    ):
        next(model.parameters()).grad = torch.zeros(1, 2)


# ---- the hook


UNIT = 2.0**-GRADIENT_BITS


class FakeBucket:
    """One of two DDP buckets, one parameter each. As in DDP, the last bucket holds the first parameter."""

    def __init__(self, model: nn.Module, *, last: bool) -> None:
        first, second = model.parameters()
        self._parameter = first if last else second
        self._last = last
        self.gradients = torch.full((self._parameter.numel(),), 3 * UNIT)

    def buffer(self) -> Tensor:
        return self.gradients

    def is_last(self) -> bool:
        return self._last

    def parameters(self) -> list[nn.Parameter]:
        return [self._parameter]


class FakeNetwork:
    """An all-reduce that adds 10 to every element, as if from other ranks, or fails."""

    def __init__(self) -> None:
        self.failure: Exception | None = None

    def all_reduce(self, tensor: Tensor, *, async_op: bool = False) -> "FakeNetwork | None":
        if async_op:
            self.future: Future[list[Tensor]] = Future()
            self.sent = tensor
            return self
        if self.failure is not None:
            raise self.failure
        tensor += 10
        return None

    def sum_over_ranks(self, numbers: Tensor) -> Tensor:
        self.all_reduce(numbers)
        return numbers

    def get_future(self) -> Future[list[Tensor]]:
        return self.future

    def complete(self) -> None:
        """Complete the collective in flight."""
        if self.failure is not None:
            self.future.set_exception(self.failure)  # type: ignore[arg-type]
        else:
            self.future.set_result([self.sent + 10])


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> FakeNetwork:
    made = FakeNetwork()
    monkeypatch.setattr(dist, "all_reduce", made.all_reduce)
    monkeypatch.setattr(exact, "sum_over_ranks", made.sum_over_ranks)
    return made


def test_a_failed_all_reduce_raises_where_gradients_are_awaited(network: FakeNetwork) -> None:
    model = nn.Linear(3, 2)
    reducer, early, last = make_reducer(model), FakeBucket(model, last=False), FakeBucket(model, last=True)
    network.failure = RuntimeError("gloo/transport/tcp: connection closed by peer")
    future = reducer.reduce_bucket(early)  # type: ignore[arg-type]
    network.complete()
    with pytest.raises(RuntimeError, match="connection closed by peer"):
        future.wait()
    with pytest.raises(RuntimeError, match="connection closed by peer"):
        reducer.reduce_bucket(last)  # type: ignore[arg-type]
    assert torch.equal(early.gradients, torch.full((2,), 3 * UNIT))
    assert torch.equal(last.gradients, torch.full((6,), 3 * UNIT))


def test_the_sum_over_all_ranks_replaces_local_gradients(network: FakeNetwork) -> None:
    model = nn.Linear(3, 2)
    reducer, early, last = make_reducer(model), FakeBucket(model, last=False), FakeBucket(model, last=True)
    for parameter, units in zip(model.parameters(), (1.0, 2.0), strict=True):
        parameter.grad = torch.full_like(parameter, units * UNIT)
    reducer.accumulate()
    future = reducer.reduce_bucket(early)  # type: ignore[arg-type]
    network.complete()
    assert torch.equal(future.wait(), torch.full((2,), (3 + 2 + 10) * UNIT))
    assert torch.equal(reducer.reduce_bucket(last).wait(), torch.full((6,), (3 + 1 + 10) * UNIT))  # type: ignore[arg-type]
    assert torch.equal(last.gradients, torch.full((6,), (3 + 1 + 10) * UNIT))
    assert reducer.agreed(0, last=True).tolist() == [10, 2**LOSS_BITS + 10, 10, 10]


def test_large_models_round_fewer_gradients_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = sum_on_one_rank([[1.0, 2.0, 3.0]] * MICRO_BATCHES)
    monkeypatch.setattr(exact, "WAITING_ELEMENTS", 7)
    model = nn.Linear(3, 1, bias=False)
    reducer = make_reducer(model)
    for waiting in (1, 2, 1, 2):
        model.weight.grad = torch.ones(1, 3)
        reducer.accumulate()
        assert len(reducer._waiting) == waiting
    assert torch.equal(sum_on_one_rank([[1.0, 2.0, 3.0]] * MICRO_BATCHES)[0], expected)
