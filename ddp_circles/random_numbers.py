"""Random numbers that depend on the place where they are drawn, and not on the process that draws them.

Torch's generators, Python's `random` and `numpy.random` are seeded anew for each micro-batch and for each sample, from
the run's seed and their numbers: so the same numbers are drawn on any number of ranks and worker processes, and after
any resume. Generators of one's own (`torch.Generator()`, `numpy.random.default_rng()`) are out of reach.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

TORCHS = {"torch's generator": (torch.get_rng_state, torch.set_rng_state)}
OTHERS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "Python's random": (random.getstate, random.setstate),
    "numpy.random": (np.random.get_state, np.random.set_state),
}
"""How the state of each generator is read and written."""
CUDA = {"torch's generator on cuda": (torch.cuda.get_rng_state, torch.cuda.set_rng_state)}


def seed_torch(*key: int | str) -> int:
    """Seed torch's generators from `key`, which takes three microseconds; returns the seed."""
    number = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest())
    torch.default_generator.manual_seed(number)  # torch.manual_seed looks for all kinds of devices, each time
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)
    return number


def seed_generators(*key: int | str) -> None:
    """Seed all generators from `key`, which takes about ten microseconds."""
    number = seed_torch(*key)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002


class RandomStates:
    """The states of all generators at one moment; `but_torch`: without torch's."""

    def __init__(self, *, but_torch: bool = False) -> None:
        torchs = TORCHS | (CUDA if torch.cuda.is_initialized() else {})
        self._generators = OTHERS if but_torch else torchs | OTHERS
        self._states = {name: read() for name, (read, _) in self._generators.items()}

    def moved(self) -> list[str]:
        """The generators that were drawn from, or seeded, since."""
        now = {name: read() for name, (read, _) in self._generators.items()}
        return [name for name, state in self._states.items() if _comparable(now[name]) != _comparable(state)]

    def restore(self) -> None:
        """Put all states back."""
        for name, (_, write) in self._generators.items():
            write(self._states[name])


def _comparable(state: Any) -> Any:
    if isinstance(state, (torch.Tensor, np.ndarray)):
        return np.asarray(state).tobytes()
    has_array = isinstance(state, tuple) and any(isinstance(part, np.ndarray) for part in state)
    return tuple(map(_comparable, state)) if has_array else state


@contextmanager
def random_states_as_found() -> Iterator[None]:
    """Put the states of all generators back at the end, however the body ends."""
    found = RandomStates()
    try:
        yield
    finally:
        found.restore()
