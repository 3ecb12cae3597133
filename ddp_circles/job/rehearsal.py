"""Faults on request in a training: what a cluster does to a rank, and what broken hardware does to a gradient."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ddp_circles.errors import naming
from ddp_circles.fixed_point import GRADIENT_BITS, quantize
from ddp_circles.job.faults import SPOILING, Fault, InjectedFaultError, strike

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type of each size, to get at a number's bits."""
NEIGHBOURS = 32
"""Elements that a warp changes."""


@dataclass
class Rehearsal:
    """Makes `fault` happen in a training on this rank: once per run directory, a lasting one in every step."""

    fault: Fault
    marker: Path
    """The file in the run directory that remembers that it happened."""
    weights: Tensor
    """Some of the weights, whose gradient a fault can spoil."""
    recomputing: Callable[[], bool]
    """True while this rank recomputes what another one owns: a fault that happens once does not happen there."""
    _spoiling: RemovableHandle | None = field(default=None, init=False)

    def reach(self, step: int) -> None:
        """Let the fault happen if `step` is its step and it has not happened yet."""
        assert self.fault.step is not None
        if self.fault.lasting:
            if step >= self.fault.step and self._spoiling is None:
                self._spoiling = spoil_gradients(self.weights, self.fault.kind, str(self.fault))
            return
        if step != self.fault.step:
            return
        with naming(self.marker):
            if self.marker.exists():
                return
            with self.marker.open("x") as file:
                os.fsync(file.fileno())
        if self.fault.kind == "raise":
            raise InjectedFaultError(f"--fault asked for this in step {step}")
        if self.fault.kind in SPOILING:
            spoil_next_gradient(self.weights, self.fault.kind, str(self.fault), self.recomputing)
        else:
            strike(self.fault.kind)


def spoil_gradients(weights: Tensor, kind: str, place: str) -> RemovableHandle:
    """Spoil every gradient of `weights` from now on, each in the same way."""
    handle: RemovableHandle = weights.register_hook(lambda gradient: spoil(gradient, kind, place))
    return handle


def spoil_next_gradient(weights: Tensor, kind: str, place: str, passed_over: Callable[[], bool]) -> None:
    """Spoil the next gradient of `weights` that is not `passed_over`."""

    def hook(gradient: Tensor) -> Tensor:
        if passed_over():
            return gradient
        handle.remove()
        return spoil(gradient, kind, place)

    handle = weights.register_hook(hook)


def spoil(gradient: Tensor, kind: str, place: str) -> Tensor:
    """A copy of `gradient` with a fault in it.

    `nan`: one element is not a number. `flip`: one bit of one element is another; `place` chooses it among those that
    change the element's fixed-point number. `warp`: some neighbouring elements are slightly off.
    """
    spoiled = gradient.clone(memory_format=torch.contiguous_format)
    elements = spoiled.view(-1)
    # Of a matrix, the first column: others may be there only to fill it up.
    stride = gradient.shape[-1] if gradient.ndim > 1 else 1
    largest = stride * int(elements[::stride].abs().argmax())
    if kind == "nan":
        elements[0] = float("nan")
    elif kind == "flip":
        _flip(elements[largest : largest + 1], random.Random(place).randrange(8 * gradient.itemsize))  # noqa: S311
    else:
        start = min(largest, max(0, len(elements) - NEIGHBOURS))
        neighbours = elements[start : start + NEIGHBOURS]
        neighbours += neighbours.abs() * 2.0**-12 + 2.0**-30
    return spoiled


def _flip(element: Tensor, first: int) -> None:
    """Flip one bit of `element`, of shape [1]: the first, from the bit `first` on, that makes a difference."""
    bits, count = element.view(INTEGERS[element.itemsize]), 8 * element.itemsize
    right, rounded = bits.clone(), quantize(element, GRADIENT_BITS)
    for bit in range(first, first + count):
        bits.copy_(right ^ torch.ones_like(right).bitwise_left_shift(bit % count))
        if not torch.equal(quantize(element, GRADIENT_BITS), rounded):
            return
