"""Console lines and warnings: standard output for what happens, standard error for warnings."""

import contextlib
import os
import sys


def warn(message: str) -> None:
    """Print a warning line; a standard error that cannot be written is no reason to end a training."""
    with contextlib.suppress(OSError):
        print(f"warning: {message}", file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Print a line; a reader that left, or a full disk, ends the output and not the training."""
    try:
        print(line, flush=True)
    except OSError as error:
        warn(f"no more lines on standard output: {error.strerror}")
        # What is buffered must have somewhere to go, or Python fails over it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
