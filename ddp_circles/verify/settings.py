"""The flags of `python -m ddp_circles.verify`; imports no torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ddp_circles.config import LONGEST_TIMEOUT, MOST_THREADS
from ddp_circles.errors import UserError
from ddp_circles.job.faults import Fault

FAULTS = ("flip", "warp", "slow", "wrong", "kill", "stall")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Check this machine, or this cluster: collectives, speed, and a training that must give every rank the same bits.

    Ends with 0 if everything passed and with 1 if not; findings about speed are warnings and fail nothing.
    """

    max_bytes: int = 0
    """Largest buffer of a collective; 0: 64 MiB with nccl, 4 MiB with gloo."""
    minutes: float = 0.0
    """Go on with new seeds until so much time has passed; 0: one round."""
    seed: int = 42
    """Seed of the first round: of patterns, weights, points and order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; auto: cuda if available."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Communication library; auto: nccl on cuda, else gloo."""
    threads: int = 1
    """CPU threads per rank."""
    timeout: float = 120.0
    """Seconds within which all ranks have ended once one of them is gone or silent; 20 or more."""
    memory: float | None = None
    """Share of the free memory to fill and read again, once; by default 0.8 on cuda and none on the CPU."""
    inject: str | None = None
    """Rehearse a fault, as KIND@RANK: flip a bit of a gradient, warp some elements of one, slow, wrong element in a
    collective, kill, stall; flip and warp also as KIND@RANK:STEP, or :STEP+ from there on."""
    against: Path | None = None
    """Earlier verify.json, of this machine or another one of its kind, that bits and speed must agree with."""
    out: Path = Path("verify.json")
    """File for all figures, written by rank 0."""

    def __post_init__(self) -> None:
        def require(holds: bool, flag: str, expected: str, value: object) -> None:
            if not holds:
                raise UserError(f"{flag} must be {expected}, got {value!r}")

        require(self.max_bytes >= 0, "--max-bytes", "0 or more", self.max_bytes)
        require(0 <= self.minutes < math.inf, "--minutes", "a finite number, 0 or more", self.minutes)
        require(0 <= self.seed < 2**32, "--seed", f"between 0 and {2**32 - 1}", self.seed)
        require(1 <= self.threads <= MOST_THREADS, "--threads", f"between 1 and {MOST_THREADS}", self.threads)
        require(self.memory is None or 0 < self.memory <= 0.95, "--memory", "above 0 and at most 0.95", self.memory)
        require(20 <= self.timeout <= LONGEST_TIMEOUT, "--timeout", f"between 20 and {LONGEST_TIMEOUT}", self.timeout)
        self.fault()

    def fault(self) -> Fault | None:
        """The fault to rehearse; raises `UserError` for an `inject` that cannot be read."""
        return Fault.parse(self.inject, "--inject", "KIND@RANK", FAULTS) if self.inject is not None else None
