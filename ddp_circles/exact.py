"""Gradient and metric sums that have the same bits on any number of ranks.

Floating-point addition is not associative: the sum of the ranks' gradients depends on how many ranks there are and on
the order in which the network adds them. Integer addition is associative. So each micro-batch's gradient is rounded, by
itself, to a multiple of 2^-44 held in an int64; these integers are added on the rank, then over all ranks, and turned
back into float32 once. Neither the rank that runs a micro-batch nor the order of addition can change a bit.
What a forward pass changes in buffers is summed likewise.

Resolution: 5.7e-14 is finer than the rounding of float32 for every gradient above 1e-6. Over whole trainings of the
default recipe, `model_3` and `model_4`, the weights were those of float64 sums, to the bit.

Range: 2^62 / V units for each of V micro-batches, 32768 at V = 8. A value outside it is counted in an integer that
travels with the sum, so that all ranks raise the same error at the same step instead of wrapping round.

Cost: eight bytes instead of four for each gradient on the wire, and a few element-wise operations. Loss, accuracy,
metrics, buffers, the range guard and the stop flag ride in the same collective. A rank's micro-batches go through a
small network side by side, in one pass (`SideBySideReducer`), through any other one after another (`ExactReducer`).
"""

# DistributedDataParallel compares the annotation objects of its hook: no postponed annotations in this module.

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import accumulate
from operator import itemgetter
from types import TracebackType
from typing import TypedDict, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ddp_circles.buffers import Buffers
from ddp_circles.checksums import OUT_OF_RANGE, Checksums, checksum
from ddp_circles.fixed_point import BUFFER_BITS, GRADIENT_BITS, LOSS_BITS, dequantize, largest_term, quantize
from ddp_circles.job.sums import sum_over_ranks
from ddp_circles.metrics import LocalTally
from ddp_circles.side_by_side import SideBySide

WAITING_ELEMENTS = 2**22
"""Most gradient elements that wait to be rounded together; those of one micro-batch always may."""
LOSS_SCALE = torch.tensor(2.0 ** (LOSS_BITS - GRADIENT_BITS))
"""Turns units of losses and metrics into those of gradients, so that all are rounded and range-checked together."""
BUFFER_SCALE = torch.tensor(2.0 ** (BUFFER_BITS - GRADIENT_BITS))
"""The same for changes of buffers."""


Pass = tuple[nn.Module, AbstractContextManager[object]]
"""The model that a micro-batch goes through, and the context of its forward and backward pass."""


class Surroundings(TypedDict):
    """The arguments that both reducers of exact sums take."""

    micro_batches: int
    """V."""
    tally: LocalTally
    stop_requested: Callable[[], bool]
    """Called once per step."""
    device: torch.device


class _IntegerSums(ABC):
    """From a rank's integers to the gradients of all ranks: a DDP communication hook; at world one called directly.

    `bare`: the module, all of whose parameters must take part in the loss. `replica`: the DDP wrapper of the module
    that micro-batches go through; in a world of one that module.
    """

    def __init__(self, bare: nn.Module, replica: nn.Module, **given: Unpack[Surroundings]) -> None:
        self.micro_batches, self._tally = given["micro_batches"], given["tally"]
        self._stop_requested, device = given["stop_requested"], given["device"]
        self._named = [(name, value) for name, value in bare.named_parameters() if value.requires_grad]
        self._parameters = [parameter for _, parameter in self._named]
        self._places = {id(parameter): place for place, parameter in enumerate(self._parameters)}
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._size = sum(self._sizes)
        self._offsets = list(accumulate(self._sizes, initial=0))
        self._integers: Tensor | None = None
        """The sum over this rank's micro-batches, in the order of the parameters; None if there is none."""
        self._checksums: Checksums | None = None
        """Those of an audited step."""
        self._limit = torch.tensor([largest_term(self.micro_batches, GRADIENT_BITS)], device=device)
        self._bad, *self._flags = torch.tensor([[0], [0], [1]], device=device).unbind()
        self._sums = torch.zeros(len(self._tally.names) + 2, dtype=torch.int64, device=device)
        self._alone = not isinstance(replica, DistributedDataParallel)
        if isinstance(replica, DistributedDataParallel):
            # Held weakly: DDP keeps its hook's state where no garbage collector sees it, and this holds the replica.
            replica.register_comm_hook(weakref.proxy(self), type(self).reduce_bucket)
        else:
            self._own = torch.zeros(self._size, device=device)
            self._gradients = _unflatten_dense_tensors(self._own, self._parameters)

    @abstractmethod
    def reduce_bucket(self, bucket: GradBucket) -> Future[Tensor]:
        """Sum one DDP bucket over all ranks. Registered as DistributedDataParallel's communication hook."""

    def agreed(self, step: int, *, last: bool) -> Tensor:  # noqa: ARG002 - the arguments of `FastReducer.agreed`
        """Units by name, values out of range and stop requests of all ranks in the last step; int64."""
        return self._sums

    # ---- the audit of a step

    @abstractmethod
    def recomputation(self, *, idle: bool) -> Pass:
        """The pass of micro-batches that another rank owns: of them nothing but checksums stays.

        `idle`: it has none in this step, and the pass is that of an empty one.
        """

    def begin_audit(self, checksums: Checksums) -> None:
        """Note the checksums of the next step, and publish them with its sums."""
        self._checksums = checksums

    def take_published(self) -> Tensor:
        """The checksums that all ranks have published in the last step, as a row of integers."""
        assert self._checksums is not None
        width = self._checksums.width
        row = self._sums[-width:]
        self._sums = self._sums[:-width]
        if self._checksums.received:
            by_name, beyond = self._tally.width, len(self._tally.names) + 2
            rode = torch.cat([self._sums[:by_name], self._sums[beyond:]])
            self._checksums.received.append(checksum(rode, self._size).view(1))
        return row

    def end_audit(self) -> None:
        """Let the next steps go unaudited."""
        self._checksums = None

    def _checksum_of(self, parameters: Sequence[Tensor], integers: Tensor) -> Tensor:
        """The checksum of integers that lie one behind the other as `parameters` do; int64 of shape [1]."""
        pieces = integers.split([parameter.numel() for parameter in parameters])
        placed = sorted(zip((self._places[id(one)] for one in parameters), pieces, strict=True), key=itemgetter(0))
        total, begin = torch.zeros_like(self._flags[0]), 0
        # Parameters that follow each other lie in one row.
        for end in range(1, len(placed) + 1):
            if end == len(placed) or placed[end][0] != placed[end - 1][0] + 1:
                row = torch.cat([piece for _, piece in placed[begin:end]])
                total += checksum(row, self._offsets[placed[begin][0]])
                begin = end
        return total

    # ---- what rides with the gradients

    def _riding(self, units: Tensor, accuracy: Tensor, below: Tensor) -> list[Tensor]:
        """The integers that ride with the gradients: units by name, out-of-range flag, stop flag.

        `below`: True if all that was rounded was below the limit of its range; NaN is not.
        """
        bad = torch.logical_not(below, out=self._bad)
        return [units, accuracy, bad, self._flags[self._stop_requested()]]

    def _deliver(self, riding: list[Tensor]) -> None:
        """End a step at world one: the rank's integers are the sum."""
        assert self._integers is not None
        dequantize(self._integers, GRADIENT_BITS, out=self._own)
        self._integers = None
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._sums = torch.cat(riding)

    def _pieces(self, bucket: GradBucket) -> list[Tensor]:
        """This rank's integers of a bucket's parameters."""
        # They are found by parameter, not by offset: DDP rebuilds its buckets, in another order, after the first step.
        assert self._integers is not None
        pieces = self._integers.split(self._sizes)
        return [pieces[self._places[id(parameter)]] for parameter in bucket.parameters()]

    def _hand_out(self, total: Tensor, bucket: GradBucket) -> Future[Tensor]:
        """Put the gradients at the head of a sum over all ranks into a bucket; what rode with the last one follows."""
        buffer = bucket.buffer()
        size = buffer.numel()
        if self._checksums is not None:
            self._checksums.received.append(self._checksum_of(bucket.parameters(), total[:size]))
        if bucket.is_last():
            self._integers, self._sums = None, total[size:]
        # With its device, the future notes an event on this thread's stream, and DDP's own stream waits for that.
        future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
        future.set_result(dequantize(total[:size], GRADIENT_BITS, out=buffer))
        return future


class SideBySideReducer(_IntegerSums):
    """Exact sums for micro-batches that go through the network side by side, in one pass."""

    def __init__(self, network: SideBySide, replica: nn.Module, **given: Unpack[Surroundings]) -> None:
        super().__init__(network.bare, replica, **given)
        self._network = network
        self._scales = torch.full((self._size + 1,), 2.0**GRADIENT_BITS, device=self._limit.device)
        self._scales[-1] = 2.0**LOSS_BITS
        self._most_units = self._limit * 2.0**GRADIENT_BITS
        self._pass: Pass = (replica, _AtExit(self.finish))
        self._riders: list[Tensor] = []
        if not self._alone:
            self._dependent = torch.cat([parameter.flatten() for parameter in self._parameters]).sum()
            """A number that depends on every parameter."""

    def passes(self, count: int) -> list[Pass]:  # noqa: ARG002 - always one
        """The one pass of this rank's micro-batches in one step, which sums over all ranks."""
        return [self._pass]

    def weight(self, samples: int) -> Tensor:
        """The factors of the slices' losses in a step of `samples` over all ranks: gradients are added up."""
        return torch.full((self._network.slices,), 1.0 / samples, device=self._limit.device)

    def finish(self) -> None:
        """End the backward pass: round each slice's gradient and loss; sum them on the rank, then over the ranks."""
        losses, accuracy = self._tally.take_apart()
        scaled = self._network.take_gradients(losses).mul_(self._scales)  # by powers of two, so without rounding
        below = torch.linalg.vector_norm(scaled, torch.inf) < self._most_units
        slices = scaled.round_().long()
        integers = slices.sum(0)
        self._integers = integers[:-1]
        riding = self._riding(integers[-1:], accuracy, below)
        if (checksums := self._checksums) is not None:
            checksums.own.append(self._checksums_of(scaled, slices))
            checksums.sent += checksum(integers)
            riding.append(checksums.row(below))
        if self._alone:
            self._deliver(riding)
        else:
            self._riders = riding
            self._dependent.backward(retain_graph=True)  # gives every parameter a gradient: DDP calls the hook

    def recomputation(self, *, idle: bool) -> Pass:  # noqa: ARG002 - its slices are empty then
        """The pass of micro-batches that another rank owns: of them nothing but checksums stays."""
        return self._network, _AtExit(self._recompute)

    def _recompute(self) -> None:
        losses, _ = self._tally.take_apart()
        scaled = self._network.take_gradients(losses).mul_(self._scales).round_()
        assert self._checksums is not None
        self._checksums.again.append(self._checksums_of(scaled, scaled.long()))

    def _checksums_of(self, scaled: Tensor, slices: Tensor) -> Tensor:
        """The checksums of the slices' integers, from the numbers of which they were made."""
        return checksum(slices).where(scaled.abs().amax(1) < self._most_units, OUT_OF_RANGE)

    def reduce_bucket(self, bucket: GradBucket) -> Future[Tensor]:
        """Sum the one DDP bucket over all ranks, with everything that rides with it. Raises if that fails.

        The sum of the rank's integers is all that counts, not the floating-point numbers in the bucket.
        """
        assert bucket.is_last()
        total = sum_over_ranks(torch.cat([*self._pieces(bucket), *self._riders]))
        return self._hand_out(total, bucket)


class ExactReducer(_IntegerSums):
    """Exact sums for micro-batches that go through the network one after another.

    `buffers`: those that its forward pass changes, if any.
    """

    def __init__(
        self, bare: nn.Module, replica: nn.Module, *, buffers: Buffers | None = None, **given: Unpack[Surroundings]
    ) -> None:
        super().__init__(bare, replica, **given)
        self._buffers = buffers
        self._idle = False
        """True in a step that leaves this rank no sample."""
        self._waiting: list[Tensor] = []
        self._most_waiting = max(1, WAITING_ELEMENTS // self._size) * len(self._named)
        self._peaks: list[Tensor] = []
        self._reduced = False
        # Micro-batches that are not reduced yet bypass DDP, as under no_sync(), without the cost of its forward pass.
        self._accumulating: Pass = (bare, _AtExit(self.accumulate))
        self._reducing: Pass = (replica, _AtExit(self.deliver_own if self._alone else self.finish))

    def passes(self, count: int) -> list[Pass]:
        """The passes of this rank's `count` micro-batches in one step; the last one sums over all ranks.

        If there is none: that of an empty one.
        """
        self._idle = count == 0
        return [self._accumulating] * (count - 1) + [self._reducing]

    def weight(self, samples: int) -> Tensor:
        """The factor of a micro-batch's summed loss in a step of `samples` over all ranks: gradients are added up."""
        return torch.full((), 1.0 / samples, device=self._limit.device)

    def accumulate(self) -> None:
        """Take over the gradients of one micro-batch, and clear them."""
        if len(self._waiting) == self._most_waiting:
            self._add_waiting()
        gradients = self._take_gradients()
        self._waiting += gradients
        if self._buffers is not None:
            self._buffers.take_changes()
        if self._checksums is not None:
            self._checksums.own.append(self._checksum_of_pass(gradients, self._buffers))

    def _take_gradients(self) -> list[Tensor]:
        """The gradients of one micro-batch, which are cleared."""
        gradients = []
        for name, parameter in self._named:
            if parameter.grad is None:
                raise ValueError(self._without_gradient(name))
            gradients.append(parameter.grad)
            parameter.grad = None
        return gradients

    def recomputation(self, *, idle: bool) -> Pass:
        """The pass of a micro-batch that another rank owns: of it nothing but a checksum stays."""
        for parameter in self._parameters:
            parameter.grad = None
        return self._accumulating[0], _AtExit(partial(self._recompute, idle=idle))

    def _recompute(self, *, idle: bool) -> None:
        gradients, buffers = self._take_gradients(), self._buffers
        if buffers is not None:  # an empty micro-batch changes nothing that counts
            buffers.put_back() if idle else buffers.take_changes()
        assert self._checksums is not None
        self._checksums.again.append(self._checksum_of_pass(gradients, None if idle else buffers))
        self._tally.take_apart()
        if buffers is not None:
            buffers.changes()
            buffers.counts()

    def _checksum_of_pass(self, gradients: list[Tensor], buffers: Buffers | None) -> Tensor:
        """The checksum of the integers that the last micro-batch adds to all sums but the accuracy's; of shape [1]."""
        changes, counts = buffers.latest() if buffers is not None else ([], [])
        row = _flatten_dense_tensors([*gradients, *_scaled(self._tally.latest(), changes)])
        below = torch.linalg.vector_norm(row, torch.inf) < self._limit
        return checksum(torch.cat([quantize(row, GRADIENT_BITS), *counts])).where(below, OUT_OF_RANGE)

    def finish(self) -> None:
        """End a step's last backward pass, in which the hook has put the sums in place."""
        if not self._reduced:  # DDP waits for a missing gradient, and would say so only in the next step
            missing = [name for name, parameter in self._named if parameter.grad is None]
            raise ValueError(self._without_gradient(*missing))
        self._reduced = False
        self._end_step()

    @staticmethod
    def _without_gradient(*names: str) -> str:
        return f"no gradient for {', '.join(map(repr, names))}: every parameter must take part in the loss"

    def deliver_own(self) -> None:
        """End a step's last backward pass at world one."""
        self.accumulate()
        values, accuracy = self._tally.take_apart()
        units = self._add_waiting(*self._to_round(values))
        if self._checksums is not None and self._integers is not None:
            self._checksums.sent += checksum(self._integers)
        self._deliver(self._all_riding(units, len(values), accuracy))
        self._end_step()

    def reduce_bucket(self, bucket: GradBucket) -> Future[Tensor]:
        """Sum one DDP bucket over all ranks: the last micro-batch's gradients plus those accumulated before.

        The bucket that completes the backward pass carries all that rides with the gradients. Raises if its sum fails.
        """
        if self._waiting:
            self._add_waiting()
        buffer = bucket.buffer()
        if not bucket.is_last():
            integers = self._rounded([buffer])
            self._add_accumulated(integers, bucket)
            if self._checksums is None:
                return self._sum_meanwhile(bucket, integers)
            # On CUDA what comes after a sum that is not waited for runs on a stream of its own: no place for checksums.
            return self._hand_out(sum_over_ranks(integers), bucket)
        if self._buffers is not None:
            # The forward pass is over. An empty micro-batch changes nothing that counts.
            self._buffers.put_back() if self._idle else self._buffers.take_changes()
        values, accuracy = self._tally.take_apart()
        rounded = self._rounded([buffer, *self._to_round(values)])
        integers, units = rounded[: buffer.numel()], rounded[buffer.numel() :]
        self._add_accumulated(integers, bucket)
        self._reduced = True
        riding = self._all_riding(units, len(values), accuracy)
        # Waits right here: nothing is left to compute meanwhile, and handing the result over between threads costs more
        # than the sum of a small model.
        return self._hand_out(sum_over_ranks(torch.cat([integers, *riding])), bucket)

    def _sum_meanwhile(self, bucket: GradBucket, local: Tensor) -> Future[Tensor]:
        """Sum a bucket while the backward pass goes on."""
        buffer = bucket.buffer()

        def deliver(summed: Future[list[Tensor]]) -> Tensor:
            # Reading the value raises if the all-reduce failed; otherwise the rank would go on with its own sums. On
            # CUDA this runs on another stream, behind the sum: the future keeps its memory, and DDP waits for both.
            return dequantize(summed.value()[0], GRADIENT_BITS, out=buffer)

        future: Future[Tensor] = dist.all_reduce(local, async_op=True).get_future().then(deliver)
        return future

    def _add_accumulated(self, integers: Tensor, bucket: GradBucket) -> None:
        """Add the integers of the micro-batches before to a bucket's `integers`."""
        if self._integers is not None:
            integers += torch.cat(self._pieces(bucket))
        if self._checksums is not None:
            self._checksums.sent += self._checksum_of(bucket.parameters(), integers)

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

    def _take_peak(self) -> Tensor:
        """The largest magnitude since the last call; NaN counts as the largest."""
        peaks, self._peaks = self._peaks, []
        return peaks[0] if len(peaks) == 1 else torch.stack(peaks).max()

    def _to_round(self, values: Tensor) -> list[Tensor]:
        """What is rounded beside the gradients at the end of a step: losses and metrics, and changes of buffers."""
        return _scaled(values, [] if self._buffers is None else self._buffers.changes())

    def _all_riding(self, units: Tensor, count: int, accuracy: Tensor) -> list[Tensor]:
        """The integers that ride with the gradients, from the units of `_to_round`, of which `count` are of values."""
        by_name, below = units[:count].view(-1, self._tally.width).sum(0), self._take_peak() < self._limit
        buffers = self._buffers
        changes = [] if buffers is None else [buffers.added_up(units[count:]), buffers.counts()]
        riding = [*self._riding(by_name, accuracy, below), *changes]
        if self._checksums is not None:
            self._checksums.sent += checksum(torch.cat([by_name, *changes]), self._size)
            riding.append(self._checksums.row(below))
        return riding

    def end_audit(self) -> None:
        """Let the next steps go unaudited."""
        super().end_audit()
        self._end_step()

    def _end_step(self) -> None:
        """Take the sums of the buffers' changes out of those that rode; of an audited step, only when that is over."""
        if self._buffers is not None and self._checksums is None:
            self._sums, changes = self._sums.split([len(self._sums) - self._buffers.width, self._buffers.width])
            self._buffers.apply(changes)


def _scaled(values: Tensor, changes: list[Tensor]) -> list[Tensor]:
    """Losses and metrics, and changes of buffers, in the unit of gradients."""
    return [values * LOSS_SCALE, *(change * BUFFER_SCALE for change in changes)]


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
