"""The way of a rank's micro-batches through the network: side by side where that pays and keeps the bits, else in turn.

The choice is the same at any number of ranks: it depends on configuration, samples and kind of device alone.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ddp_circles.config import Config
from ddp_circles.data import Split
from ddp_circles.intake import Intake
from ddp_circles.job.world import World
from ddp_circles.loop import EVALUATION_BATCH, LossFunction
from ddp_circles.micro_batches import ROWS, Cut, cut_one_by_one, cut_side_by_side, rows_of, slices_of
from ddp_circles.models import slice_losses
from ddp_circles.side_by_side import SideBySide, can_go_side_by_side, find_difference
from ddp_circles.terminal import warn

MOST_WORK = 2**19
"""Most rows times elements of the matrices, for each micro-batch of a step that holds a sample.

Above it, arithmetic outweighs the fixed costs of a pass. Rows and slices that zeros fill up are counted too.
"""
MOST_VALUES = 2**24
"""Most values that V slices hold together, activations and gradients."""
LARGE = "each micro-batch is large"


@dataclass(frozen=True)
class Passes:
    """The module that micro-batches go through, its loss, and the cut of the samples for it."""

    network: nn.Module
    weights: Tensor
    """Some weights, to whose gradient a fault can be done."""
    loss: LossFunction
    cut: Cut
    evaluation_batch: int
    """Most test samples that go through the network together, over all ranks."""
    way: str
    """`side by side`; or `one by one`, and why."""


def choose_passes(config: Config, world: World, given: Intake, split: Split) -> Passes:
    """The passes of this training, the same on all ranks; warns if they would give other bits side by side."""
    if config.reduction == "fast":
        return _one_by_one(given, "each rank has one micro-batch")
    if not given.is_default:
        return _one_by_one(given, "model=, loss= or metrics= was given")
    if not can_go_side_by_side(given.model):
        return _one_by_one(given, "the network has other layers than linear ones and ReLU")
    if any(inputs.dtype != torch.float32 or inputs.ndim != 2 or targets.ndim != 1 for inputs, targets in split):
        return _one_by_one(given, "data= has inputs that are not float32 [n, 2], or targets that are not [n]")
    if ROWS * sum(parameter.numel() for parameter in given.model.parameters()) > MOST_WORK:
        return _one_by_one(given, LARGE)
    count, trained, tested = config.micro_batches, len(split.train.inputs), len(split.test.inputs)
    network = SideBySide(given.model, slices_of(count, world.ranks.world_size))
    batch = min(config.batch_size or trained, trained)
    most_rows = min(
        MOST_WORK * min(count, batch) // count // network.elements,
        (MOST_VALUES // count - network.elements) // network.width,
    )
    rows, most_rows = rows_of(batch, count), most_rows // ROWS * ROWS
    if rows > most_rows:
        return _one_by_one(given, LARGE)
    evaluation_batch = min(max(EVALUATION_BATCH, ROWS * count), most_rows * count)
    shapes = {rows, rows_of(min(evaluation_batch, tested), count)}
    differences = [find_difference(given.model, split.train, shape, count) for shape in sorted(shapes)]
    for name, difference in world.gather((world.ranks.name, "".join(differences))):
        if difference:
            if world.ranks.is_main:
                warn(f"micro-batches run one by one: side by side, {name} gives them other bits ({difference})")
            return _one_by_one(given, "side by side, their bits differ")
    loss = partial(slice_losses, slices=network.slices)
    return Passes(network, network.matrices[0], loss, cut_side_by_side, evaluation_batch, "side by side")


def _one_by_one(given: Intake, why: str) -> Passes:
    weights = next(parameter for parameter in given.model.parameters() if parameter.requires_grad)
    return Passes(given.model, weights, given.loss, cut_one_by_one, EVALUATION_BATCH, f"one by one: {why}")
