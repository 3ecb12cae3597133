"""Micro-batches side by side against plain autograd, one micro-batch at a time; what the trial at a start notices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ddp_circles.data import Dataset
from ddp_circles.micro_batches import Slices, slices_of
from ddp_circles.models import Classifier, correct_count, labels_of, probabilities_of, slice_losses
from ddp_circles.sharding import Sharding
from ddp_circles.side_by_side import SideBySide, can_go_side_by_side, find_difference

NETWORKS = {
    "default": ((10, 10), "relu", 2),
    "odd": ((7, 5, 3), "relu", 2),
    "linear": ((8, 8), "none", 4),
    "wide": ((100, 33), "relu", 4),
    "no hidden layer": ((), "relu", 2),
    "power of two": ((32,), "relu", 2),
}
WORLDS = range(1, 10)


def make(name: str, samples: int) -> tuple[Classifier, Dataset]:
    """A network and samples for it."""
    hidden, activation, classes = NETWORKS[name]
    torch.manual_seed(samples)
    bare = Classifier(2, hidden, activation, classes)
    targets = torch.randint(0, classes, (samples,))
    return bare, Dataset(torch.randn(samples, 2), targets.float() if classes == 2 else targets)


def run_step(bare: Classifier, data: Dataset, sharding: Sharding) -> tuple[Tensor, Tensor, Tensor]:
    """One rank's rows of gradient and loss for a step with all of `data`; its right answers, and the targets it saw."""
    [[(_, inputs, targets)]] = Slices(data).steps(torch.arange(sharding.samples), sharding, first=0, epoch=0)
    network = SideBySide(bare, len(inputs))
    logits = network(inputs)
    losses = slice_losses(logits, targets, slices=network.slices)
    losses.backward(torch.ones_like(losses))
    return network.take_gradients(losses.detach()), correct_count(logits, targets), targets


def plain_rows(bare: Classifier, data: Dataset, micro_batches: int) -> Tensor:
    """The same rows in float64, one micro-batch after the other, without a line of the package."""
    layers: Any = nn.Sequential(*bare.layers).double()
    rows = []
    for number in range(micro_batches):
        inputs, targets = data.inputs[number::micro_batches].double(), data.targets[number::micro_batches]
        logits = layers(inputs)
        if bare.binary:
            loss = F.binary_cross_entropy_with_logits(logits[:, 0], targets.double(), reduction="sum")
        else:
            loss = F.cross_entropy(logits, targets, reduction="sum")
        gradients = torch.autograd.grad(loss, list(layers.parameters()))
        rows.append(torch.cat([*(gradient.flatten() for gradient in gradients), loss.detach().view(1)]))
    layers.float()
    return torch.stack(rows)


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(sorted(NETWORKS)), samples=st.integers(1, 300), micro_batches=st.integers(1, 12))
def test_each_slice_has_the_gradient_and_the_loss_of_its_micro_batch(
    name: str, samples: int, micro_batches: int
) -> None:
    bare, data = make(name, samples)
    rows, right, _ = run_step(bare, data, Sharding(samples, samples, micro_batches, 0, 1))
    expected = plain_rows(bare, data, micro_batches)
    assert torch.allclose(rows[:micro_batches].double(), expected, rtol=1e-4, atol=1e-4)
    assert not rows[micro_batches:].any()  # a vacant slice adds nothing
    labels = labels_of(probabilities_of(bare(data.inputs)))
    assert abs(int(right) - int((labels == data.targets).sum())) <= 1  # a logit near 0 may fall on either side


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    ("samples", "micro_batches"), [(64, 8), (37, 8), (501, 8), (3, 8), (200, 5), (2000, 16), (40, 1)]
)
def test_a_micro_batch_has_the_same_bits_on_any_number_of_ranks(name: str, samples: int, micro_batches: int) -> None:
    bare, data = make(name, samples)
    rows_of_a_slice = len(run_step(bare, data, Sharding(samples, samples, micro_batches, 0, 1))[2])
    rows_of_a_slice //= slices_of(micro_batches, 1)
    assert find_difference(bare, data, rows_of_a_slice, micro_batches) == ""
    alone, right, _ = run_step(bare, data, Sharding(samples, samples, micro_batches, 0, 1))
    for world_size in WORLDS:
        shardings = [Sharding(samples, samples, micro_batches, rank, world_size) for rank in range(world_size)]
        counted = 0
        for sharding in shardings:
            rows, own_right, _ = run_step(bare, data, sharding)
            counted += int(own_right)
            for place, number in enumerate(sharding.owned()):
                assert torch.equal(rows[place].view(torch.int32), alone[number].view(torch.int32)), (world_size, number)
        assert counted == int(right)


# ---- the trial


Change = Callable[[Tensor], Tensor]


def nudge_by_count(product: Tensor) -> Tensor:
    """As a kernel might that is chosen by the number of slices."""
    return product * (1 + 2.0**-20) if len(product) == 4 else product


def nudge_the_last(product: Tensor) -> Tensor:
    """As a kernel might that treats the rest of a loop in another way."""
    nudged = product.clone()
    nudged[-1] *= 1 + 2.0**-20
    return nudged


@pytest.mark.parametrize("change", [nudge_by_count, nudge_the_last])
def test_a_kernel_that_depends_on_count_or_place_is_noticed(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    bare, data = make("default", 100)
    assert find_difference(bare, data, 32, 8) == ""
    bmm = Tensor.bmm
    monkeypatch.setattr(Tensor, "bmm", lambda one, other: change(bmm(one, other)))
    assert find_difference(bare, data, 32, 8).startswith("32 rows among ")


def test_the_numbers_of_slices_that_are_tried_are_those_of_all_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, data = make("default", 100)
    tried, forward = set(), SideBySide.forward

    def noting(network: SideBySide, inputs: Tensor) -> Tensor:
        tried.add(len(inputs))
        return forward(network, inputs)

    monkeypatch.setattr(SideBySide, "forward", noting)
    for micro_batches, expected in ((1, {1}), (2, {2}), (5, {2, 3, 5}), (8, {2, 3, 4, 8}), (13, {2, 3, 4, 5, 7, 13})):
        tried.clear()
        find_difference(bare, data, 32, micro_batches)
        assert tried == expected


def test_a_network_that_was_changed_does_not_go_side_by_side() -> None:
    bare, data = make("default", 100)
    assert can_go_side_by_side(bare)
    bare.layers.insert(1, nn.LayerNorm(10))
    assert not can_go_side_by_side(bare)
    assert not can_go_side_by_side(nn.Linear(2, 1))

    class Shifted(Classifier):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) + 1

    assert find_difference(Shifted(2, (10,), "relu", 2), data, 32, 8) == "logits of 32 rows"
