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
from ddp_circles.micro_batches import ROWS, Cut, cut_one_by_one, cut_side_by_side, filled_up, slices_of
from ddp_circles.models import slice_losses
from ddp_circles.side_by_side import SideBySide, can_go_side_by_side, find_difference
from ddp_circles.terminal import warn

MOST_WORK = 2**21
"""Most rows of a slice times elements of the matrices: above it, arithmetic outweighs the fixed costs of a pass."""
MOST_IN_ALL = 2**30
"""Most of the same over all V slices: their activations and gradients are held at once."""


@dataclass(frozen=True)
class Passes:
    """The module that micro-batches go through, its loss, and the cut of the samples for it."""

    network: nn.Module
    weights: Tensor
    """The first of the weights, as gradients come to them."""
    loss: LossFunction
    cut: Cut
    evaluation_batch: int
    """Test samples between two agreements of the ranks, at most."""
    way: str
    """`side by side`; or `one by one`, and why."""


def choose_passes(config: Config, world: World, given: Intake, split: Split) -> Passes:
    """The passes of this training, the same on all ranks; says so if they could be quicker on another machine."""
    if config.reduction == "fast":
        return _one_by_one(given, "each rank has one micro-batch")
    if not given.is_own:
        return _one_by_one(given, "model=, loss= or metrics= was given")
    if not can_go_side_by_side(given.model):
        return _one_by_one(given, "the network has other layers than linear ones and ReLU")
    if any(inputs.dtype != torch.float32 or inputs.ndim != 2 or targets.ndim != 1 for inputs, targets in split):
        return _one_by_one(given, "data= has inputs that are not float32 [n, 2], or targets that are not [n]")
    count, large = config.micro_batches, "each micro-batch is large"
    if ROWS * sum(parameter.numel() for parameter in given.model.parameters()) > MOST_WORK:
        return _one_by_one(given, large)
    network = SideBySide(given.model, slices_of(count, world.ranks.world_size))
    most_rows = min(MOST_WORK, MOST_IN_ALL // count) // network.elements // ROWS * ROWS
    trained, tested = (len(part.inputs) for part in split)
    rows = _rows(config.batch_size or trained, trained, count)
    if rows > most_rows:
        return _one_by_one(given, large)
    evaluation_batch = min(EVALUATION_BATCH, most_rows * count)
    shapes = sorted({rows, _rows(evaluation_batch, tested, count)})
    tries = [find_difference(given.model, split.train, shape, count) for shape in shapes]
    if differences := [difference for tried in world.gather(tries) for difference in tried if difference]:
        if world.ranks.is_main:
            warn(
                f"micro-batches run one by one: side by side, this machine gives them other bits ({differences[0]}), "
                "which no result here depends on"
            )
        return _one_by_one(given, "side by side, this machine gives them other bits")
    loss = partial(slice_losses, slices=network.slices)
    return Passes(network, network.matrices[0], loss, cut_side_by_side, evaluation_batch, "side by side")


def _rows(batch: int, samples: int, micro_batches: int) -> int:
    """Rows of a slice for steps of `batch` samples, as `micro_batches.rows_of` has them."""
    return filled_up(-(-min(batch, samples) // micro_batches), ROWS)


def _one_by_one(given: Intake, why: str) -> Passes:
    weights = next(parameter for parameter in given.model.parameters() if parameter.requires_grad)
    return Passes(given.model, weights, given.loss, cut_one_by_one, EVALUATION_BATCH, f"one by one: {why}")
