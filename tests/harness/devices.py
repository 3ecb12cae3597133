"""Stand-ins for what only CUDA has."""

import math
from typing import cast

import torch


class _Event:
    def __init__(self, times: float) -> None:
        self._times = times

    def query(self) -> bool:
        self._times -= 1
        return self._times < 0


def event(times: float = math.inf) -> torch.cuda.Event:
    """An event that is reached at the query after `times` others."""
    return cast(torch.cuda.Event, _Event(times))
