"""The training and test loop, and nothing but the loop.

for each epoch:
    for each step:                      # positions [kB, (k+1)B) of the epoch's order
        zero the gradients
        for each micro-batch of this rank:
            forward pass, loss, backward
        step the optimizer
        agree on loss, metrics and stop requests
    evaluate on the test set
"""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ddp_circles.audit import Audit, Entry
from ddp_circles.errors import OutOfRangeError, StopRequestedError
from ddp_circles.exact import ExactReducer, SideBySideReducer
from ddp_circles.fast import FastReducer
from ddp_circles.job.world import World
from ddp_circles.metrics import LocalTally, Progress, Sums, SumsReader, Tally
from ddp_circles.micro_batches import MicroBatch, Source
from ddp_circles.optimization import Optimization
from ddp_circles.sharding import Sharding, TensorSampler

LossFunction = Callable[[Tensor, Tensor], Tensor]
EVALUATION_BATCH = 65536
"""Test samples between two agreements of the ranks, at most."""
GRAD_NORM = "grad_norm"
"""The gradient's norm among the figures of training: the mean over the epoch's steps, weighted by their samples."""


class Step(NamedTuple):
    """One step as a rank sees it."""

    number: int
    """Global step, counted from 0 over the whole run."""
    weight: Tensor
    """Factor of a summed loss that makes the reducer's sum the step's mean; float32, a scalar or one for each slice."""
    micro_batches: Iterable[Entry]
    """Inputs, targets, the model to run them through and the context for it; the last sums over all ranks.

    One entry for each micro-batch, or one for all of them side by side. In an audited step those of another rank come
    first, which add nothing.
    """


class Events(Protocol):
    """The loop's connection to the world around it, on every rank."""

    def before_step(self, step: int) -> None:
        """Act before global step `step`: heartbeats, planned faults."""

    def stop_requested(self) -> bool:
        """True once this rank was asked to stop."""

    def save_due(self, steps_done: int) -> bool:
        """True when it is time for a checkpoint."""

    def save(self, progress: Progress) -> None:
        """Write a checkpoint."""

    def phase(self, name: str, progress: Progress) -> None:
        """Note that `train` or `evaluate` begins."""

    def epoch_done(self, progress: Progress, test: Tally) -> None:
        """Record an epoch that is trained and evaluated."""


@dataclass(frozen=True)
class Training:
    """The parts of one training, wired together.

    `model` is the module without DDP; `reducer` may wrap it. `batch_size` is global, 0 for the full batch.
    """

    model: nn.Module
    optimizer: Optimization
    loss: LossFunction
    reducer: ExactReducer | SideBySideReducer | FastReducer
    tally: LocalTally
    world: World
    train_set: Source
    test_set: Source
    batch_size: int
    seed: int
    events: Events
    evaluation_batch: int = EVALUATION_BATCH
    """Most test samples that go through `model` together, over all ranks."""
    seed_generators: Callable[..., object] | None = None
    """Seeds the generators that may be drawn from, from the place of a pass; None if there is none."""
    gradient_norm: Callable[[], Tensor] | None = None
    """The mean norm of the gradient over the steps since the last call, in units of 2^-24; int64 of shape [1]."""
    audit: Audit | None = None
    """None if no step is audited."""

    def sharding(self, samples: int, batch_size: int) -> Sharding:
        """The cut of `samples` for the ranks of this world."""
        ranks, size = self.world.ranks, min(batch_size or samples, samples)
        return Sharding(samples, size, self.reducer.micro_batches, ranks.rank, ranks.world_size)

    def seeded(self, part: str, step: int, micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """Seed the generators before each of the `micro_batches` of a step, and at its end, for the optimizer."""
        for micro_batch in micro_batches:
            if self.seed_generators is not None:
                self.seed_generators(self.seed, part, step, micro_batch.number)
            yield micro_batch
        if self.seed_generators is not None:
            self.seed_generators(self.seed, part, step, "end")


def train(training: Training, *, epochs: int, progress: Progress) -> None:
    """Train and evaluate until `epochs` epochs are done, starting from `progress`.

    Raises `OutOfRangeError` and `StopRequestedError` on all ranks alike.
    """
    test_set = training.test_set
    sharding = training.sharding(len(test_set), training.evaluation_batch)
    in_order = torch.arange(sharding.samples)
    steps = partial(test_set.steps, in_order, sharding, first=0, epoch=0)
    held = list(steps()) if test_set.in_memory else None
    while progress.epoch < epochs:
        training.events.phase("train", progress)
        train_epoch(training, progress)
        training.events.phase("evaluate", progress)
        test = evaluate(training, progress, sharding, steps() if held is None else held)
        training.events.epoch_done(progress, test)
        progress.epoch, progress.step, progress.train = progress.epoch + 1, 0, Tally()


def train_epoch(training: Training, progress: Progress) -> None:
    """Take the steps of one epoch that are still to do."""
    loss_function, optimizer, tally = training.loss, training.optimizer, training.tally
    training.model.train()
    for step in agreeing_steps(training, progress):
        optimizer.zero_grad()  # 3. zero the gradients
        for inputs, targets, model, context in step.micro_batches:
            with context:
                logits = model(inputs)  # 1. forward pass
                loss = loss_function(logits, targets)  # 2. loss, and what accuracy needs
                tally.add(loss, logits, targets)
                loss.backward(step.weight)  # 4. backward, of the step's mean loss; the last one sums over all ranks
        optimizer.step()  # 5. step: the same on every rank


@torch.inference_mode()
def evaluate(training: Training, progress: Progress, sharding: Sharding, steps: Iterable[list[MicroBatch]]) -> Tally:
    """Sum the figures over the test set: every sample once, cut alike at any number of ranks, outside of DDP.

    The ranks agree after `EVALUATION_BATCH` samples, which may be those of several `steps`.
    """
    model, tally, total = training.model, training.tally, Tally()
    stop_flag = torch.zeros(1, dtype=torch.int64, device=training.world.device)
    reader = SumsReader(0, training.world.wait_for)
    model.eval()
    together = max(1, min(sharding.steps, EVALUATION_BATCH // sharding.batch_size))
    numbered = enumerate(steps)
    for first in range(0, sharding.steps, together):
        for step, pieces in islice(numbered, together):
            for _, inputs, targets in training.seeded("test", step, pieces):
                logits = model(inputs)
                tally.add(training.loss(logits, targets), logits, targets)
        sums = tally.take(sharding.micro_batches * together)
        local = torch.cat([sums, stop_flag.fill_(training.events.stop_requested())])
        reader.post(first, sharding.seen(first + together), training.world.sum(local))
        (agreed,) = reader.read()
        _add(tally, tally.names, total, agreed, f"in the evaluation after epoch {progress.epoch}")
        if agreed.stop_requests:
            training.events.save(progress)
            raise StopRequestedError
    return total


def agreeing_steps(training: Training, progress: Progress) -> Iterator[Step]:
    """The epoch's remaining steps; after each, take in what the ranks agreed on, then save or stop if that is due."""
    sharding = training.sharding(len(training.train_set), training.batch_size)
    names = [*[GRAD_NORM][: training.gradient_norm is not None], *training.tally.names]
    add = partial(_add, training.tally, names)
    delay = 1 if training.world.device.type == "cuda" else 0
    reader = SumsReader(delay, training.world.wait_for)
    steps = sharding.steps
    for step in local_steps(training, progress, sharding):
        training.events.before_step(step.number)
        yield step
        progress.step += 1
        last = progress.step == steps
        sums = training.reducer.agreed(progress.step - 1, last=last)
        if sums is None:
            continue
        if training.gradient_norm is not None:
            sums = torch.cat([training.gradient_norm(), sums])
        reader.post(step.number, sharding.seen(progress.step), sums)
        stop = False
        for due in reader.read(everything=last):
            add(progress.train, due, f"in step {due.step}")
            stop = stop or due.stop_requests > 0
        # On CUDA some sums are read late. They are waited for only here, since a diverged step must not be saved.
        if (stop or training.events.save_due(step.number + 1)) and not any(late.out_of_range for late in reader.peek()):
            settled = deepcopy(progress)
            for pending in reader.peek():  # as a checkpoint must hold it
                add(settled.train, pending, f"in step {pending.step}")
            training.events.save(settled)
        if stop:
            raise StopRequestedError


def local_steps(training: Training, progress: Progress, sharding: Sharding) -> Iterator[Step]:
    """This rank's share of the epoch's remaining steps."""
    order = TensorSampler(sharding.samples, seed=training.seed).order(progress.epoch)
    first, last = progress.step, sharding.steps - 1
    weight, last_weight = (training.reducer.weight(sharding.step_size(step)) for step in (0, last))
    steps = training.train_set.steps(order, sharding, first=first, epoch=progress.epoch)
    for step, pieces in enumerate(steps, first):
        number = progress.epoch * sharding.steps + step
        passes = training.reducer.passes(len(pieces))
        seeded = partial(training.seeded, "train", number)
        micro_batches: Iterable[Entry] = (
            (*piece[1:], *way)
            for piece, way in zip(seeded(pieces or [training.train_set.nothing]), passes, strict=True)
        )
        if training.audit is not None and training.audit.is_due(number):
            share = partial(_share, training, progress.epoch, step, order, sharding)
            micro_batches = training.audit.around(micro_batches, pieces, number, share, seeded)
        yield Step(number=number, weight=weight if step < last else last_weight, micro_batches=micro_batches)


def _share(training: Training, epoch: int, step: int, order: Tensor, sharding: Sharding, rank: int) -> list[MicroBatch]:
    """The micro-batches of a step that `rank` owns."""
    return training.train_set.share(order, replace(sharding, rank=rank), step=step, epoch=epoch)


def _add(local: LocalTally, names: list[str], total: Tally, sums: Sums, where: str) -> None:
    if sums.out_of_range:
        beyond = ", or beyond the range of the exact sums" if local.exact else ""
        raise OutOfRangeError(
            f"{where}, gradients, losses, metrics or changes of buffers were not finite{beyond}: the training diverged "
            "(try a smaller learning rate), or inputs or targets are too large (scale them)"
        )
    for name, units in zip(names, sums.units, strict=True):
        weight = sums.seen - total.count if name == GRAD_NORM else 1
        total.units[name] = total.units.get(name, 0) + units * weight
    total.count = sums.seen
