"""Distributed training of the circles classifier: the same seed gives the same bits on any number of ranks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddp_circles.config import Config
    from ddp_circles.train import fit

__all__ = ["Config", "fit"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used, so that `python -m ddp_circles.train` stays clean."""
    if name == "Config":
        from ddp_circles.config import Config

        return Config
    if name == "fit":
        from ddp_circles.train import fit

        return fit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
