"""Lines about epochs on standard output, and a progress bar where somebody watches."""

import sys
import time

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddp_circles.records.metrics_file import Row, figure_names
from ddp_circles.terminal import say


class Console:
    """A line on standard output every `every` epochs and, where standard error is a terminal, a progress bar there."""

    def __init__(self, every: int, total_epochs: int) -> None:
        self._every = every
        self._drawn_at = 0.0
        terminal = Terminal(stderr=True)
        terminal.quiet = not sys.stderr.isatty() or terminal.is_dumb_terminal
        self._bar = Progress(
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            console=terminal,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # prints above the bar; elsewhere it would print to standard error
            disable=terminal.quiet,
        )
        self._epochs = self._bar.add_task("epoch", total=total_epochs)

    def log(self, row: Row) -> None:
        """Print the line if it is due, and draw the bar."""
        if row["epoch"] % self._every == 0:
            say(f"Epoch: {row['epoch']} | {_figures(row, 'train')} | {_figures(row, 'test')}")
        self._bar.update(self._epochs, completed=row["epoch"] + 1)
        if time.monotonic() - self._drawn_at > 0.1:  # a redraw costs more than a short epoch
            self._bar.start()  # does nothing while it is on
            self._bar.refresh()
            self._drawn_at = time.monotonic()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.stop()


def _figures(row: Row, part: str) -> str:
    """The figures of `part`, `train` or `test`, as text."""
    texts = []
    for name in figure_names(row):
        value, short = row[f"{part}/{name}"], "acc" if name == "accuracy" else name
        title = f"Test {short}" if part == "test" else short.capitalize() if name in ("loss", "accuracy") else short
        texts.append(f"{title}: {value * 100:.2f}%" if name == "accuracy" else f"{title}: {value:.5f}")
    return ", ".join(texts)
