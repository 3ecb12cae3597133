"""Faults on request, to rehearse what the checks must find."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddp_circles.fixed_point import GRADIENT_BITS, quantize
from ddp_circles.job.faults import strike

PHASES = ("collectives", "speed", "alone", "together")
"""A rank is killed or stalls in one of the first `STEPS` steps of one of these."""
STEPS = 4
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type of each size, to get at a number's bits."""

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
    """The fault of `kind` on this rank, at places that `seed` chooses; None: no fault on this rank."""

    def __init__(self, kind: str | None, seed: int) -> None:
        self._kind = kind
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

    def flip(self, run: str, step: int, steps: int, model: nn.Module) -> None:
        """Flip a bit in this step of the training `run`, if it is the one, of `steps`, for it."""
        if self._kind == "flip":
            choices = self._choices(f"run {run}")
            if step == choices.randrange(steps):
                flip_once(model, choices)


def flip_once(model: nn.Module, choices: random.Random) -> None:
    """Flip one bit in the next gradient of one of the model's parameters: in its largest element, where it matters."""
    parameter = choices.choice(list(model.parameters()))
    first_bit = choices.randrange(32)

    def flip(gradient: Tensor) -> Tensor:
        handle.remove()
        flipped = gradient.clone(memory_format=torch.contiguous_format)
        element = flipped.view(-1)[flipped.abs().argmax() :][:1]
        before, right = quantize(element, GRADIENT_BITS), element.view(torch.int32).clone()
        for bit in range(first_bit, first_bit + 32):
            element.view(torch.int32).copy_(right ^ torch.tensor(1 << bit % 32).to(torch.int32))
            if not torch.equal(quantize(element, GRADIENT_BITS), before):
                break
        return flipped

    handle = parameter.register_hook(flip)
