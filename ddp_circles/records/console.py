"""Lines about epochs on standard output, and a progress bar where somebody watches."""

import sys
import time

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddp_circles.records.metrics_file import Row, figure_names
from ddp_circles.terminal import say


class _Terminal(Terminal):
    """Standard error; the cursor stays, for a process that is killed could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:  # noqa: FBT002 - rich's own form
        return show


class Console:
    """A line on standard output every `every` epochs and after the last; a bar where standard error is a terminal."""

    def __init__(self, every: int, total_epochs: int) -> None:
        self._every = every
        self._total_epochs = total_epochs
        self._drawn_at = 0.0
        terminal = _Terminal(stderr=True)
        self.watched = sys.stderr.isatty() and not terminal.is_dumb_terminal
        """True if there is a bar."""
        terminal.quiet = not self.watched
        self._bar = Progress(
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=terminal,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # prints above the bar; elsewhere it would print to standard error
            disable=not self.watched,
        )
        self._epochs = self._bar.add_task("epoch", total=total_epochs, loss="")

    def log(self, row: Row) -> None:
        """Print the line if it is due, and show the loss beside the bar."""
        done = int(row["epoch"]) + 1
        if row["epoch"] % self._every == 0 or done == self._total_epochs:
            say(f"Epoch: {row['epoch']} | {_figures(row, 'train')} | {_figures(row, 'test')}")
        self._bar.update(self._epochs, loss=f"loss {row['train/loss']:.5f}")
        self.move(done)

    def move(self, epochs: float) -> None:
        """Draw the bar after so many `epochs`, at most every tenth of a second."""
        if self.watched and time.monotonic() - self._drawn_at > 0.1:
            self._bar.update(self._epochs, completed=epochs)
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
