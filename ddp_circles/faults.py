"""Faults on order, to rehearse what a cluster does to a run: each fires once per run directory."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ddp_circles.config import Fault


class InjectedFaultError(RuntimeError):
    """Raised by `--fault raise@RANK:STEP`."""


class Numbered(Protocol):
    """A step that knows its number."""

    @property
    def number(self) -> int:
        """The global step."""


StepT = TypeVar("StepT", bound=Numbered)


def with_fault(steps: Iterator[StepT], fault: Fault, marker: Path, model: nn.Module) -> Iterator[StepT]:
    """Pass `steps` on and let `fault` happen before its step; on the fault's rank only.

    `marker` remembers that it happened, in the run directory. `nan` makes one element of the first parameter's gradient
    not a number.
    """
    for step in steps:
        if step.number == fault.step and _first_time(marker):
            _happen(fault.kind, step.number, model)
        yield step


def _first_time(marker: Path) -> bool:
    try:
        descriptor = os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    os.fsync(descriptor)
    os.close(descriptor)
    return True


def _happen(kind: str, step: int, model: nn.Module) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "raise":
        raise InjectedFaultError(f"--fault asked for this in step {step}")
    elif kind == "stall":
        while True:
            time.sleep(3600)
    else:
        first = next(model.parameters())

        def poison(gradient: Tensor) -> Tensor:
            handle.remove()
            poisoned = gradient.clone()
            poisoned.view(-1)[0] = torch.nan
            return poisoned

        handle = first.register_hook(poison)
