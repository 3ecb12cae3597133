"""Faults on request, to rehearse what a cluster does to a run, in a training and in verify alike.

Imports no torch.
"""

import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from ddp_circles.errors import UserError

KINDS = ("kill", "raise", "stall", "nan", "flip", "warp")
"""Faults of a training; `ddp_circles.verify` rehearses some of them and others of its own."""
SPOILING = ("nan", "flip", "warp")
"""Those that spoil a gradient."""
CORRUPTING = ("flip", "warp")
"""Those that nobody sees: the gradient stays finite. They can last."""


class InjectedFaultError(RuntimeError):
    """Raised by `--fault raise@RANK:STEP`."""


@dataclass(frozen=True)
class Fault:
    """One planned fault: `kind` happens on `rank`."""

    kind: str
    rank: int
    step: int | None = None
    """Global step of a training; None in verify, where the seed chooses the place."""
    lasting: bool = False
    """True if it happens in each step from `step` on, in the same way."""

    @classmethod
    def parse(
        cls, text: str, flag: str = "--fault", form: str = "KIND@RANK:STEP", kinds: Sequence[str] = KINDS
    ) -> "Fault":
        """Read `text`, which must have the `form` of `flag`; raises `UserError` for anything else.

        Corrupting kinds may have a step in any form, and a + behind it if they last.
        """
        match = re.fullmatch(r"(\w+)@(\d+)(?::(\d+)(\+)?)?", text)
        kind, rank, step, lasting = match.groups() if match else ("", "0", None, None)
        corrupting = kind in CORRUPTING
        has_step = form.endswith(":STEP") or (corrupting and step is not None)
        if kind not in kinds or (step is not None) != has_step or (lasting and not corrupting):
            more = f"{'' if form.endswith(':STEP') else ':STEP or '}:STEP+ behind {' and '.join(CORRUPTING)}"
            raise UserError(f"{flag} must be {form} with KIND one of {', '.join(kinds)}, or {more}, got {text!r}")
        return cls(kind, int(rank), None if step is None else int(step), lasting is not None)

    def __str__(self) -> str:
        step = "" if self.step is None else f":{self.step}"
        return f"{self.kind}@{self.rank}{step}{'+' * self.lasting}"


def strike(kind: str) -> NoReturn:
    """`kill` this process, or `stall` it for ever."""
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(3600)
