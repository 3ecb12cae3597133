"""Loss, accuracy and metrics as integer sums: equal to the last digit at any number of ranks."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ddp_circles.fixed_point import LOSS_BITS, largest_term, quantize
from ddp_circles.models import correct_count

Metric = Callable[[Tensor, Tensor], Tensor]
"""Logits and targets to the SUM over the samples, a scalar."""
WaitFor = Callable[[torch.cuda.Event], None]
"""Waits until the device has reached an event."""


@dataclass
class Tally:
    """Sums over all ranks: loss, accuracy and metrics by name, in units of 2^-24. Plain integers, without limit."""

    units: dict[str, int] = field(default_factory=dict)
    count: int = 0
    """Samples."""

    @property
    def means(self) -> dict[str, float]:
        """Means per sample, by name; of right answers the share, 0 to 1."""
        return {name: units / (self.count << LOSS_BITS) for name, units in self.units.items()}


@dataclass
class Progress:
    """The position of a run: `step` steps of `epoch` are done, with `train` summed over them and all ranks."""

    epoch: int = 0
    step: int = 0
    train: Tally = field(default_factory=Tally)


class LocalTally:
    """Losses, metrics and right answers of one rank's micro-batches since they were last taken.

    `accuracy`: count right answers. `exact`: sum integers, and take values out of range for a fault; otherwise the sums
    are those of integers only below 5e8, and larger ones are rounded.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        metrics: Mapping[str, Metric] | None = None,
        accuracy: bool = True,
        exact: bool = True,
    ) -> None:
        self.exact = exact
        self._metrics = list((metrics or {}).values())
        self._accuracy = accuracy
        self.names = ["loss", *(metrics or {}), *["accuracy"][:accuracy]]
        """The names of the units in `take`."""
        self.width = 1 + len(self._metrics)
        """Values that `take_apart` returns for each micro-batch."""
        self._nothing = torch.zeros(len(self.names) + 1, dtype=torch.int64, device=device)
        self._values: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._targets: list[Tensor] = []

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Remember one micro-batch: its summed loss (scalar), logits and targets; or several, a loss for each."""
        self._values.append(loss.detach())
        logits = logits.detach()
        for metric in self._metrics:
            self._values.append(metric(logits, targets))
        if self._accuracy:
            self._logits.append(logits)
            self._targets.append(targets)

    def latest(self) -> Tensor:
        """The last micro-batch's summed loss and metrics, which are not taken; float32 of shape [width]."""
        return torch.stack(self._values[-self.width :]).float()

    def take_apart(self) -> tuple[Tensor, Tensor]:
        """Each micro-batch's summed loss and metrics, float32 of shape [micro-batches * width]; units of accuracy.

        Since the last call; raises if nothing was added. The units: int64 of shape [1], or [0] without accuracy.
        """
        values = self._values[0] if len(self._values) == 1 else torch.stack(self._values)
        values, units = values.flatten().float(), self._nothing[:0]
        if self._accuracy:
            units = correct_count(_joined(self._logits), _joined(self._targets)).mul(2**LOSS_BITS).view(1)
        self._values.clear()
        self._logits.clear()
        self._targets.clear()
        return values, units

    def take(self, terms: int) -> Tensor:
        """Units, by the order of `names`, and values out of range since the last call; int64, or float64 if not exact.

        Each micro-batch's values are rounded by themselves, so the sum does not depend on which rank ran it. `terms`:
        the most such values of one name that are added up, over all ranks, before they are read.
        """
        if not self._values:
            return self._nothing.clone()
        values, accuracy = self.take_apart()
        if self.exact:
            good, units = values.abs() < largest_term(terms, LOSS_BITS), quantize(values, LOSS_BITS)
        else:
            good, units = values.isfinite(), values.double().nan_to_num_(0, 0, 0).mul_(2.0**LOSS_BITS).round_()
        bad = good.logical_not_().sum().view(1)
        return torch.cat([units.view(-1, self.width).sum(0), accuracy, bad])


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class Sums(NamedTuple):
    """The sums over all ranks at one agreement; equal on all ranks."""

    step: int
    """The global step after which they agreed."""
    seen: int
    """Samples of the epoch seen by then."""
    units: list[int]
    """In units of 2^-24, by the order of `LocalTally.names`."""
    out_of_range: int
    stop_requests: int


class Arriving:
    """Whole numbers on their way from the device to the host."""

    def __init__(self, numbers: Tensor) -> None:
        self._event = None
        if numbers.is_cuda:
            # Into pinned memory, which is what makes it asynchronous. Read before the event, it would hold anything.
            numbers = numbers.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._numbers = numbers

    def fetch(self, wait_for: WaitFor) -> Tensor:
        """The numbers on the CPU, once they are there."""
        if self._event is not None:
            wait_for(self._event)
        return self._numbers

    def read(self, wait_for: WaitFor) -> list[int]:
        """Read the numbers once they are there."""
        numbers: list[int] = self.fetch(wait_for).tolist()
        return numbers


class SumsReader:
    """Reads `Sums` from the device: at once on the CPU, one agreement late on CUDA, where reading at once would wait.

    The delay is the same on all ranks, so they act on a sum at the same step. On CUDA an all-reduce only joins a queue,
    and it is the reading that waits for a missing rank, and raises what `wait_for` does.
    """

    def __init__(self, delay: int, wait_for: WaitFor) -> None:
        self._delay = delay
        self._wait_for = wait_for
        self._pending: deque[tuple[int, int, Arriving]] = deque()

    def post(self, step: int, seen: int, sums: Tensor) -> None:
        """Take the whole numbers of one agreement: units by name, values out of range, stop requests."""
        self._pending.append((step, seen, Arriving(sums)))

    def read(self, *, everything: bool = False) -> list[Sums]:
        """The sums that are due, oldest first; each is returned once."""
        due = len(self._pending) if everything else max(0, len(self._pending) - self._delay)
        return [self._value(*self._pending.popleft()) for _ in range(due)]

    def peek(self) -> list[Sums]:
        """The sums that are not due yet; they will be returned again."""
        return [self._value(*pending) for pending in self._pending]

    def _value(self, step: int, seen: int, sums: Arriving) -> Sums:
        *units, out_of_range, stop_requests = map(int, sums.read(self._wait_for))
        return Sums(step, seen, units, out_of_range, stop_requests)
