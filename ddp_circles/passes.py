"""The way of a rank's micro-batches through the network: side by side where that pays and keeps the bits, else in turn.

The choice is the same at any number of ranks: it depends on configuration, samples and kind of device alone.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ddp_circles.config import Config
from ddp_circles.contract import Part
from ddp_circles.data import Dataset, Split
from ddp_circles.intake import Intake
from ddp_circles.job.world import World
from ddp_circles.loading import Loaded
from ddp_circles.loop import EVALUATION_BATCH, LossFunction
from ddp_circles.micro_batches import ROWS, OneByOne, Slices, Source, rows_of, slices_of
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
    """The module that micro-batches go through, its loss, and the samples as it needs them."""

    network: nn.Module
    weights: Tensor
    """Some weights, to whose gradient a fault can be done."""
    loss: LossFunction
    train_set: Source
    test_set: Source
    evaluation_batch: int
    """Most test samples that go through the network together, over all ranks."""
    way: str
    """`side by side`; or `one by one`, and why."""
    read_in_rank: bool = False
    """True if the rank reads samples by itself, which seeds its generators."""

    @contextmanager
    def reading(self) -> Iterator[None]:
        """End the processes that read samples with the body."""
        with ExitStack() as at_end:
            for part in (self.train_set, self.test_set):
                if isinstance(part, Loaded):
                    at_end.callback(part.close)
            yield


def choose_passes(config: Config, world: World, given: Intake, split: Split[Part]) -> Passes:
    """The passes of this training, the same on all ranks; warns if they would give other bits side by side."""
    if config.reduction == "fast":
        return _one_by_one(config, world, given, split, "each rank has one micro-batch")
    if given.is_default and isinstance(split.train, Dataset) and isinstance(split.test, Dataset):
        passes, why = _side_by_side(config, world, given.model, Split(split.train, split.test))
    else:
        passes, why = None, "model=, loss=, metrics= or a data set that is not in tensors was given"
    return passes or _one_by_one(config, world, given, split, why)


def _side_by_side(config: Config, world: World, model: nn.Module, split: Split) -> tuple[Passes | None, str]:
    """The passes side by side; or none, and why."""
    if not can_go_side_by_side(model):
        return None, "the network has other layers than linear ones and ReLU"
    if any(inputs.dtype != torch.float32 or inputs.ndim != 2 or targets.ndim != 1 for inputs, targets in split):
        return None, "data= has inputs that are not float32 [n, 2], or targets that are not [n]"
    if ROWS * sum(parameter.numel() for parameter in model.parameters()) > MOST_WORK:
        return None, LARGE
    count, trained, tested = config.micro_batches, len(split.train.inputs), len(split.test.inputs)
    network = SideBySide(model, slices_of(count, world.ranks.world_size))
    batch = min(config.batch_size or trained, trained)
    most_rows = min(
        MOST_WORK * min(count, batch) // count // network.elements,
        (MOST_VALUES // count - network.elements) // network.width,
    )
    rows, most_rows = rows_of(batch, count), most_rows // ROWS * ROWS
    if rows > most_rows:
        return None, LARGE
    evaluation_batch = min(max(EVALUATION_BATCH, ROWS * count), most_rows * count)
    shapes = {rows, rows_of(min(evaluation_batch, tested), count)}
    differences = [find_difference(model, split.train, shape, count) for shape in sorted(shapes)]
    for name, difference in world.gather((world.ranks.name, "".join(differences))):
        if difference:
            if world.ranks.is_main:
                warn(f"micro-batches run one by one: side by side, {name} gives them other bits ({difference})")
            return None, "side by side, their bits differ"
    loss, (train_set, test_set) = partial(slice_losses, slices=network.slices), map(Slices, split)
    return Passes(network, network.matrices[0], loss, train_set, test_set, evaluation_batch, "side by side"), ""


def _one_by_one(config: Config, world: World, given: Intake, split: Split[Part], why: str) -> Passes:
    weights = next(parameter for parameter in given.model.parameters() if parameter.requires_grad)
    train_set, test_set = (
        OneByOne(part) if isinstance(part, Dataset) else Loaded(part, workers=given.workers, device=world.device)
        for part in split
    )
    # Samples that are read come in batches as large as those of training, which surely fit into memory.
    batch = EVALUATION_BATCH if test_set.in_memory else config.batch_size or EVALUATION_BATCH
    read_in_rank = not given.workers and not (train_set.in_memory and test_set.in_memory)
    return Passes(given.model, weights, given.loss, train_set, test_set, batch, f"one by one: {why}", read_in_rank)
