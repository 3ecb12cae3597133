"""Loss and accuracy as integer sums: equal to the last digit at any number of ranks."""

import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ddp_circles.fixed_point import LOSS_BITS, largest_term, quantize
from ddp_circles.models import correct_count

POLL_SECONDS = 2e-5
"""Time between two checks for a sum from the device; far below the time of a step."""


@dataclass
class Tally:
    """Sums over all ranks: loss in units of 2^-24, right answers, samples. Plain integers, without limit."""

    loss_units: int = 0
    correct: int = 0
    count: int = 0

    @property
    def loss(self) -> float:
        """Mean loss per sample."""
        return self.loss_units / 2.0**LOSS_BITS / self.count

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.count


@dataclass
class Progress:
    """The position of a run: `step` steps of `epoch` are done, with `train` summed over them and all ranks."""

    epoch: int = 0
    step: int = 0
    train: Tally = field(default_factory=Tally)


class LocalTally:
    """Losses and right answers of one rank's micro-batches since they were last taken."""

    def __init__(self, device: torch.device) -> None:
        self._nothing = torch.zeros(3, dtype=torch.int64, device=device)
        self._losses: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._targets: list[Tensor] = []

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Remember one micro-batch: its summed loss (scalar), logits and targets."""
        self._losses.append(loss.detach())
        self._logits.append(logits.detach())
        self._targets.append(targets)

    def take_apart(self) -> tuple[Tensor, Tensor]:
        """Each micro-batch's summed loss, float32 of shape [micro-batches], and right answers, an int64 scalar.

        Since the last call; raises if nothing was added.
        """
        losses, logits, targets = torch.stack(self._losses), _joined(self._logits), _joined(self._targets)
        self._losses.clear()
        self._logits.clear()
        self._targets.clear()
        return losses, correct_count(logits, targets)

    def take(self, terms: int) -> Tensor:
        """Loss units, right answers and micro-batches out of range since the last call; int64 of shape [3].

        Each micro-batch's loss is rounded by itself, so the sum does not depend on which rank ran it. `terms`: the
        most such losses that are added up, over all ranks, before they are read.
        """
        if not self._losses:
            return self._nothing.clone()
        losses, correct = self.take_apart()
        bad = (losses.abs() < largest_term(terms, LOSS_BITS)).logical_not_().sum()
        return torch.stack([quantize(losses, LOSS_BITS).sum(), correct, bad])


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class Sums(NamedTuple):
    """The sums over all ranks at one agreement; equal on all ranks."""

    step: int
    """The global step after which they agreed."""
    seen: int
    """Samples of the epoch seen by then."""
    loss_units: int
    correct: int
    out_of_range: int
    stop_requests: int


class SumsReader:
    """Reads `Sums` from the device: at once on the CPU, one agreement late on CUDA, where reading at once would wait.

    The delay is the same on all ranks, so they act on a sum at the same step. On CUDA an all-reduce only joins a queue,
    and it is the reading that waits for a missing rank: after `seconds` it raises `ConnectionError`. `waiting`
    is entered meanwhile.
    """

    def __init__(self, delay: int, seconds: float, waiting: AbstractContextManager[object]) -> None:
        self._delay = delay
        self._seconds = seconds
        self._waiting = waiting
        self._pending: deque[tuple[int, int, Tensor, torch.cuda.Event | None]] = deque()

    def post(self, step: int, seen: int, sums: Tensor) -> None:
        """Take the integers of one agreement: loss units, right answers, out of range, stop requests; int64 [4]."""
        event = None
        if sums.is_cuda:
            sums = sums.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, seen, sums, event))

    def read(self, *, everything: bool = False) -> list[Sums]:
        """The sums that are due, oldest first; each is returned once."""
        due = len(self._pending) if everything else max(0, len(self._pending) - self._delay)
        return [self._value(*self._pending.popleft()) for _ in range(due)]

    def peek(self) -> list[Sums]:
        """The sums that are not due yet; they will be returned again."""
        return [self._value(*pending) for pending in self._pending]

    def _value(self, step: int, seen: int, sums: Tensor, event: torch.cuda.Event | None) -> Sums:
        if event is not None:
            with self._waiting:
                self._wait(event)
        return Sums(step, seen, *sums.tolist())

    def _wait(self, event: torch.cuda.Event) -> None:
        deadline = time.monotonic() + self._seconds
        while not event.query():
            if time.monotonic() > deadline:
                raise ConnectionError(f"no sum of all ranks came within {self._seconds:.0f} s")
            time.sleep(POLL_SECONDS)
