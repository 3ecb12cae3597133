"""Gradient and metric sums that have the same bits on any number of ranks.

Floating-point addition is not associative: the sum of the ranks' gradients depends on how many ranks there are and on
the order in which the network adds them. Integer addition is associative. So each micro-batch's gradient is rounded, by
itself, to a multiple of 2^-44 held in an int64; these integers are added on the rank, then over all ranks, and turned
back into float32 once. Neither the rank that runs a micro-batch nor the order of addition can change a bit.

Resolution: 5.7e-14 is finer than the rounding of float32 for every gradient above 1e-6. Over whole trainings of the
default recipe, `model_3` and `model_4`, the weights were those of float64 sums, to the bit.

Range: 2^62 / V units for each of V micro-batches, 32768 at V = 8. A value outside it is counted in an integer that
travels with the sum, so that all ranks raise the same error at the same step instead of wrapping round.

Cost: eight bytes instead of four for each gradient on the wire, a few element-wise operations for each micro-batch, and
V small backward passes instead of one large one. Loss, accuracy, metrics, the range guard and the stop flag ride in
the same collective.
"""

# DistributedDataParallel compares the annotation objects of its hook: no postponed annotations in this module.

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ddp_circles.fixed_point import GRADIENT_BITS, LOSS_BITS, dequantize, largest_term, quantize
from ddp_circles.job.watch import waiting
from ddp_circles.metrics import LocalTally

WAITING_ELEMENTS = 2**22
"""Most gradient elements that wait to be rounded together; those of one micro-batch always may."""
LOSS_SCALE = torch.tensor(2.0 ** (LOSS_BITS - GRADIENT_BITS))
"""Turns units of losses and metrics into those of gradients, so that all are rounded and range-checked together."""


Pass = tuple[nn.Module, AbstractContextManager[object]]
"""The model that a micro-batch goes through, and the context of its forward and backward pass."""


class ExactReducer:
    """Integer sums: the same bits for every number of ranks. A DDP communication hook; at world one called directly.

    `bare`: the module, all of whose parameters must take part in the loss. `replica`: its DDP wrapper; in a world of
    one `bare` itself. `micro_batches`: V, of which this rank runs `owned`. `stop_requested`: called once per step.
    """

    def __init__(
        self,
        bare: nn.Module,
        replica: nn.Module,
        *,
        micro_batches: int,
        owned: int,
        tally: LocalTally,
        stop_requested: Callable[[], bool],
        device: torch.device,
    ) -> None:
        self.micro_batches = micro_batches
        self._named = [(name, value) for name, value in bare.named_parameters() if value.requires_grad]
        self._parameters = [parameter for _, parameter in self._named]
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._size = sum(self._sizes)
        self._waiting: list[Tensor] = []
        self._most_waiting = max(1, min(owned, WAITING_ELEMENTS // self._size)) * len(self._named)
        self._integers: Tensor | None = None
        self._peaks: list[Tensor] = []
        self._limit = torch.tensor([largest_term(micro_batches, GRADIENT_BITS)], device=device)
        self._tally = tally
        self._stop_requested = stop_requested
        self._bad, *self._flags = torch.tensor([[0], [0], [1]], device=device).unbind()
        self._sums = torch.zeros(len(tally.names) + 2, dtype=torch.int64, device=device)
        self._reduced = False
        if replica is bare:
            self._own = torch.zeros(self._size, device=device)
            self._gradients = _unflatten_dense_tensors(self._own, self._parameters)
        # Micro-batches that are not reduced yet bypass DDP, as under no_sync(), without the cost of its forward pass.
        self._accumulating: Pass = (bare, _AtExit(self.accumulate))
        self._reducing: Pass = (replica, _AtExit(self.deliver_own if replica is bare else self.finish))
        if isinstance(replica, DistributedDataParallel):
            # Held weakly: DDP keeps its hook's state where no garbage collector sees it, and this holds the replica.
            replica.register_comm_hook(weakref.proxy(self), ExactReducer.reduce_bucket)

    def passes(self, count: int) -> list[Pass]:
        """The passes of this rank's `count` micro-batches in one step; the last one sums over all ranks."""
        return [self._accumulating] * (count - 1) + [self._reducing]

    def weight(self, samples: int) -> float:
        """The factor of a micro-batch's summed loss in a step of `samples` over all ranks: gradients are added up."""
        return 1.0 / samples

    def agreed(self, step: int, *, last: bool) -> Tensor:  # noqa: ARG002 - the arguments of `FastReducer.agreed`
        """Units by name, values out of range and stop requests of all ranks in the last step; int64."""
        return self._sums

    def accumulate(self) -> None:
        """Take over the gradients of one micro-batch, and clear them."""
        if len(self._waiting) == self._most_waiting:
            self._add_waiting()
        for name, parameter in self._named:
            if parameter.grad is None:
                raise ValueError(self._without_gradient(name))
            self._waiting.append(parameter.grad)
            parameter.grad = None

    def finish(self) -> None:
        """End a step's last backward pass, in which the hook has put the sums in place."""
        if not self._reduced:  # DDP waits for a missing gradient, and would say so only in the next step
            missing = [name for name, parameter in self._named if parameter.grad is None]
            raise ValueError(self._without_gradient(*missing))
        self._reduced = False

    @staticmethod
    def _without_gradient(*names: str) -> str:
        return f"no gradient for {', '.join(map(repr, names))}: every parameter must take part in the loss"

    def deliver_own(self) -> None:
        """End a step's last backward pass at world one: the rank's integers are the sum."""
        self.accumulate()
        values, accuracy = self._tally.take_apart()
        units = self._add_waiting(values * LOSS_SCALE)
        assert self._integers is not None
        dequantize(self._integers, GRADIENT_BITS, out=self._own)
        self._integers = None
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._sums = self._metrics(units, accuracy)

    def reduce_bucket(self, bucket: GradBucket) -> Future[Tensor]:
        """Sum one DDP bucket over all ranks: the last micro-batch's gradients plus those accumulated before.

        Registered as DistributedDataParallel's communication hook.
        """
        if self._waiting:
            self._add_waiting()
        buffer = bucket.buffer()
        if bucket.is_last():
            return self._sum_last(bucket, buffer)
        integers = self._rounded([buffer])
        self._add_accumulated(integers, bucket)
        return _sum_meanwhile(buffer, integers)

    def _sum_last(self, bucket: GradBucket, buffer: Tensor) -> Future[Tensor]:
        """Sum the bucket that completes the backward pass, with everything else that travels with the gradients.

        Raises if the all-reduce fails.
        """
        size = buffer.numel()
        values, accuracy = self._tally.take_apart()
        rounded = self._rounded([buffer, values * LOSS_SCALE])
        integers = rounded[:size]
        self._add_accumulated(integers, bucket)
        total = torch.cat([integers, self._metrics(rounded[size:], accuracy)])
        # Waits right here: nothing is left to compute meanwhile, and handing the result over between threads costs more
        # than the sum of a small model.
        with waiting:
            dist.all_reduce(total)
        self._sums = total[size:]
        self._integers = None
        self._reduced = True
        future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
        future.set_result(dequantize(total[:size], GRADIENT_BITS, out=buffer))
        return future

    def _add_accumulated(self, integers: Tensor, bucket: GradBucket) -> None:
        """Add the integers of the micro-batches before to a bucket's `integers`."""
        # They are found by parameter, not by offset: DDP rebuilds its buckets, in another order, after the first step.
        if self._integers is not None:
            pieces = dict(zip(self._parameters, self._integers.split(self._sizes), strict=True))
            integers += torch.cat([pieces[cast(nn.Parameter, parameter)] for parameter in bucket.parameters()])

    def _add_waiting(self, *riding: Tensor) -> Tensor:
        """Round each waiting micro-batch's gradients by themselves and add them to the rank's integers.

        Returns the integers of the `riding` tensors, which are rounded in the same operation.
        """
        elements = len(self._waiting) // len(self._named) * self._size
        rounded = self._rounded([*self._waiting, *riding])
        self._waiting.clear()
        rows = rounded[:elements].view(-1, self._size)
        integers = rows.sum(0) if len(rows) > 1 else rows[0]
        self._integers = integers if self._integers is None else self._integers.add_(integers)
        return rounded[elements:]

    def _rounded(self, values: list[Tensor]) -> Tensor:
        """Round all `values` into one row of integers; remembers the largest magnitude."""
        row = _flatten_dense_tensors(values)
        self._peaks.append(torch.linalg.vector_norm(row, torch.inf))
        return quantize(row, GRADIENT_BITS)

    def _metrics(self, units: Tensor, accuracy: Tensor) -> Tensor:
        """The integers that ride with the last bucket: units by name, out-of-range flag, stop flag."""
        peaks, self._peaks = self._peaks, []
        peak = peaks[0] if len(peaks) == 1 else torch.stack(peaks).max()  # NaN counts as the largest
        bad = torch.logical_not(peak < self._limit, out=self._bad)
        return torch.cat([units.view(-1, self._tally.width).sum(0), accuracy, bad, self._flags[self._stop_requested()]])


def _sum_meanwhile(buffer: Tensor, local: Tensor) -> Future[Tensor]:
    """Sum a bucket into `buffer` while the backward pass goes on."""

    def deliver(summed: Future[list[Tensor]]) -> Tensor:
        # Reading the value raises if the all-reduce failed; otherwise the rank would go on with its own sums.
        return dequantize(summed.value()[0], GRADIENT_BITS, out=buffer)

    future: Future[Tensor] = dist.all_reduce(local, async_op=True).get_future().then(deliver)
    return future


class _AtExit:
    """A context that calls `finish` unless its body raised."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
