"""Errors that end a training early, and the exit codes of the command lines."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75
"""Stopped by request, after a checkpoint where one can be written."""


class UserError(ValueError):
    """A mistake that the user can put right: one clear message, exit code 2, no traceback."""

    def _render_traceback_(self) -> list[str]:
        """The message alone: what IPython shows in a notebook."""
        return [f"error: {self}"]


class LoneMistakeError(UserError):
    """A mistake that one rank alone meets, and has to tell."""


class OutOfRangeError(ArithmeticError):
    """A gradient, loss or metric that is not finite, or too large for the exact sums; raised on all ranks alike."""


class HardwareError(Exception):
    """Ranks that computed different bits where all must compute the same; raised on all ranks alike.

    `sound_step`: checkpoints after this step may hold wrong weights; None if all are sound.
    """

    def __init__(self, message: str, sound_step: int | None = None) -> None:
        super().__init__(message)
        self.sound_step = sound_step


class SampleError(Exception):
    """A sample of the caller's data set that cannot be read, by name; met by one rank alone."""


class FileError(OSError):
    """A file that cannot be read or written; its text names the file and the reason."""

    def __str__(self) -> str:
        """The file and the reason, without the number of the error."""
        return f"{self.filename}: {self.strerror}"


@contextmanager
def naming(path: Path, *passing: type[OSError]) -> Iterator[None]:
    """Turn an `OSError` in the body into a `FileError` about `path`, unless it is one of `passing`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (FileError, *passing)):
            raise
        raise FileError(error.errno, error.strerror or str(error), str(path)) from None


class RunDirTakenError(Exception):
    """The run directory was removed, or taken by another run: nothing more is written there."""


class StopRequestedError(Exception):
    """All ranks agreed to stop here, after a checkpoint where one can be written; or not all had joined yet."""
