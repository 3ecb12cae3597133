"""Distributed training of the circles classifier: the same seed gives the same bits on any number of ranks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddp_circles.config import Config
    from ddp_circles.data import Dataset, Split
    from ddp_circles.train import fit

__all__ = ["Config", "Dataset", "Split", "fit"]
__version__ = "0.1.0"

_HOMES = {"Config": "config", "Dataset": "data", "Split": "data", "fit": "train"}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used, so that `python -m ddp_circles.train` stays clean."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"ddp_circles.{_HOMES[name]}"), name)
