"""Distributed training of the circles classifier: the same seed gives the same bits on any number of ranks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddp_circles.config import Config
    from ddp_circles.data import Dataset, Split
    from ddp_circles.errors import UserError
    from ddp_circles.run import Result, fit

__all__ = ["Config", "Dataset", "Result", "Split", "UserError", "fit"]
__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "Dataset": "data",
    "Result": "run",
    "Split": "data",
    "UserError": "errors",
    "fit": "run",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: not everyone who imports the package needs torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"ddp_circles.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Name what can be imported too: for `help` and completion."""
    return sorted({*globals(), *__all__})
