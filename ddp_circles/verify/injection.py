"""Faults on order, to rehearse what the checks must find."""

import os
import random
import re
import signal
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddp_circles.errors import UserError
from ddp_circles.fixed_point import GRADIENT_BITS, quantize

KINDS = ("flip", "slow", "wrong", "die", "hang")
PHASES = ("collectives", "speed", "alone", "together")
"""Where a rank dies or hangs: in one of the first `STEPS` steps of one of these."""
STEPS = 4
SLOW_WORK = 3
"""How many times its work a rank does that rehearses being slow."""
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type of each size, to get at a number's bits."""


@dataclass(frozen=True)
class Injection:
    """`kind` happens on `rank`; `seed` chooses where."""

    kind: str
    rank: int
    seed: int

    @classmethod
    def parse(cls, text: str, seed: int) -> "Injection":
        """Read `KIND@RANK`; raises `UserError` for anything else."""
        match = re.fullmatch(r"(\w+)@(\d+)", text)
        if match is None or match[1] not in KINDS:
            raise UserError(f"--inject must be KIND@RANK with KIND one of {', '.join(KINDS)}, got {text!r}")
        return cls(match[1], int(match[2]), seed)


@dataclass(frozen=True)
class Spoiled:
    """A collective that goes wrong: its number, whether in what is sent, and where in the buffer, from 0 to 1."""

    case: int
    in_what_is_sent: bool
    where: float


class Trouble:
    """What an injection does to this rank; on other ranks, and without an injection, nothing."""

    def __init__(self, injection: Injection | None, rank: int) -> None:
        self._injection = injection if injection is not None and injection.rank == rank else None

    def _choices(self, kind: str, of: str) -> random.Random | None:
        """The source of random choices about `of`, if this rank is to have trouble of this kind."""
        if self._injection is None or self._injection.kind != kind:
            return None
        return random.Random(f"{self._injection.seed} {kind} {of}")  # noqa: S311 - where a rehearsed fault strikes

    @property
    def work(self) -> int:
        """How many times a piece of work is done."""
        return 1 if self._choices("slow", "") is None else SLOW_WORK

    def reach(self, phase: str, step: int) -> None:
        """Die or hang, if this is the place for it."""
        for kind in ("die", "hang"):
            choices = self._choices(kind, "place")
            if choices is not None and (phase, step) == (choices.choice(PHASES), choices.randrange(STEPS)):
                _strike(kind)

    def wrong_case(self, count: int, seed: int) -> Spoiled | None:
        """Which of `count` collectives goes wrong."""
        choices = self._choices("wrong", f"collective {seed}")
        if choices is None:
            return None
        return Spoiled(choices.randrange(count), choices.random() < 0.5, choices.random())

    def flip(self, run: str, step: int, steps: int, model: nn.Module) -> None:
        """Flip a bit in this step of the training `run`, if it is the one, of `steps`, for it."""
        choices = self._choices("flip", f"run {run}")
        if choices is not None and step == choices.randrange(steps):
            flip_once(model, choices)


def _strike(kind: str) -> None:
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(3600)


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
            element.view(torch.int32).copy_(right ^ _bit(bit % 32))
            if not torch.equal(quantize(element, GRADIENT_BITS), before):
                break
        return flipped

    handle = parameter.register_hook(flip)


def _bit(number: int) -> int:
    """The int32 with one bit set."""
    return 1 << number if number < 31 else -(1 << 31)
