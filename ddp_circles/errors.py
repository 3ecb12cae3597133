"""Errors that end a training early, and the exit codes of the command lines."""

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75
"""Stopped by request, after a checkpoint."""


class UserError(ValueError):
    """A mistake that the user can put right: one clear message, exit code 2, no traceback."""

    def _render_traceback_(self) -> list[str]:
        """The message alone: what IPython shows in a notebook."""
        return [f"error: {self}"]


class OutOfRangeError(ArithmeticError):
    """A gradient, loss or metric that is not finite, or too large for the exact sums; raised on all ranks alike."""


class FileError(OSError):
    """A file that cannot be read or written; its text names the file and the reason."""

    def __str__(self) -> str:
        """The file and the reason, without the number of the error."""
        return f"{self.filename}: {self.strerror}"


class RunDirTakenError(Exception):
    """The run directory was removed, or taken by another run: nothing more is written there."""


class StopRequestedError(Exception):
    """All ranks agreed to stop here, and what was done so far is saved."""
