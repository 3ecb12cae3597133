"""For a rank of the fork server, which has not imported matplotlib yet: when the package does."""

import sys
from pathlib import Path


def import_run_and_draw(picture: Path) -> tuple[set[str], set[str]]:
    """Import the composition root, then draw a picture; returns matplotlib's modules after each."""
    import ddp_circles.run  # noqa: F401

    before = _modules()
    from ddp_circles.records import plots

    plots.draw_curves([], picture)
    return before, _modules()


def _modules() -> set[str]:
    return {name for name in sys.modules if name.partition(".")[0] == "matplotlib"}
