"""Faults on request, to rehearse what a cluster does to a run: `KIND@RANK:STEP` in a training, `KIND@RANK` in verify.

Imports no torch by itself.
"""

import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ddp_circles.errors import UserError, naming

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("kill", "raise", "stall", "nan")
"""Faults of a training; `ddp_circles.verify` rehearses `kill`, `stall` and others of its own."""


class InjectedFaultError(RuntimeError):
    """Raised by `--fault raise@RANK:STEP`."""


@dataclass(frozen=True)
class Fault:
    """One planned fault: `kind` happens on `rank`."""

    kind: str
    rank: int
    step: int | None = None
    """Global step of a training; None in verify, where the seed chooses the place."""

    @classmethod
    def parse(
        cls, text: str, flag: str = "--fault", form: str = "KIND@RANK:STEP", kinds: Sequence[str] = KINDS
    ) -> "Fault":
        """Read `text`, which must have the `form` of `flag`; raises `UserError` for anything else."""
        match = re.fullmatch(r"(\w+)@(\d+)" + (r":(\d+)" if form.endswith(":STEP") else ""), text)
        if match is None or match[1] not in kinds:
            raise UserError(f"{flag} must be {form} with KIND one of {', '.join(kinds)}, got {text!r}")
        return cls(match[1], *map(int, match.groups()[1:]))


@dataclass(frozen=True)
class Rehearsal:
    """Makes `fault` happen in a training on this rank, once per run directory."""

    fault: Fault
    marker: Path
    """The file in the run directory that remembers that it happened."""
    weights: "Tensor"
    """Some of the weights, whose gradient a fault can spoil."""

    def reach(self, step: int) -> None:
        """Let the fault happen if `step` is its step and it has not happened yet."""
        if step != self.fault.step:
            return
        with naming(self.marker):
            if self.marker.exists():
                return
            with self.marker.open("x") as file:
                os.fsync(file.fileno())
        if self.fault.kind == "raise":
            raise InjectedFaultError(f"--fault asked for this in step {step}")
        if self.fault.kind == "nan":
            spoil_next_gradient(self.weights)
        else:
            strike(self.fault.kind)


def strike(kind: str) -> NoReturn:
    """`kill` this process, or `stall` it for ever."""
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(3600)


def spoil_next_gradient(weights: "Tensor") -> None:
    """Make one element of the next gradient of `weights` not a number."""

    def spoil(gradient: "Tensor") -> "Tensor":
        handle.remove()
        spoiled = gradient.clone()
        spoiled.view(-1)[0] = float("nan")
        return spoiled

    handle = weights.register_hook(spoil)
