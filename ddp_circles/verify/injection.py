"""Faults on request, to rehearse what the checks must find."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from ddp_circles.job.faults import CORRUPTING, Fault, strike
from ddp_circles.job.rehearsal import spoil_gradients, spoil_next_gradient

PHASES = ("collectives", "speed", "alone", "together")
"""A rank is killed or stalls in one of the first `STEPS` steps of one of these."""
STEPS = 4

Mark = Callable[[str, int], None]
"""Notes that this rank has reached a step of a phase."""


@dataclass(frozen=True)
class Tamper:
    """One element of one collective is made wrong."""

    case: int
    in_what_is_sent: bool
    """Else in what this rank receives."""
    offset: int


class Trouble:
    """The `fault` on this rank, at places that `seed` chooses; None: no fault on this rank."""

    def __init__(self, fault: Fault | None, seed: int) -> None:
        self._fault = fault
        self._kind = fault.kind if fault is not None else None
        self._seed = seed

    def _choices(self, about: str) -> random.Random:
        return random.Random(f"{self._seed} {self._kind} {about}")  # noqa: S311 - where a rehearsed fault strikes

    @property
    def work(self) -> int:
        """Times that a piece of work is done: a rank that rehearses being slow does it three times."""
        return 3 if self._kind == "slow" else 1

    def reach(self, phase: str, step: int) -> None:
        """Be killed or stall, if this is the place for it."""
        if self._kind in ("kill", "stall"):
            choices = self._choices("place")
            if (phase, step) == (choices.choice(PHASES), choices.randrange(STEPS)):
                strike(self._kind)

    def tamper(self, sizes: Sequence[int], seed: int) -> Tamper | None:
        """Choose one of the collectives of this round, which send so many elements each, and an element of it."""
        if self._kind != "wrong":
            return None
        choices = self._choices(f"collective {seed}")
        case = choices.randrange(len(sizes))
        return Tamper(case, choices.random() < 0.5, int(choices.random() * sizes[case]))

    def corrupt(self, run: str, step: int, steps: int, model: nn.Module) -> None:
        """Spoil a gradient in this step of the training `run`, if it is the one, of `steps`, for it.

        A lasting fault spoils all gradients from its step on, alike in each run.
        """
        if (fault := self._fault) is None or fault.kind not in CORRUPTING:
            return
        choices = self._choices("model" if fault.lasting else f"run {run}")
        if step == (choices.randrange(steps) if fault.step is None else fault.step):
            weights, place = choices.choice(list(model.parameters())), str(choices.random())
            if fault.lasting:
                spoil_gradients(weights, fault.kind, place)
            else:
                spoil_next_gradient(weights, fault.kind, place, lambda: False)
