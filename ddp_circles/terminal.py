"""Console lines and warnings: standard output for what happens, standard error for warnings."""

import contextlib
import os
import sys
from collections.abc import Iterable


def visible(text: str) -> str:
    """`text` as one line that is safe to print: control characters, line ends too, are spelled as escapes.

    For text that comes from a file, the store or the environment and becomes part of a line.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def visible_lines(text: str) -> str:
    """`text` with its line ends, and each of its lines made visible."""
    return "\n".join(map(visible, text.split("\n")))


def spell_numbers(numbers: Iterable[int]) -> str:
    """`0-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def warn(message: str) -> None:
    """Print a warning line; a standard error that cannot be written is no reason to end a training."""
    with contextlib.suppress(OSError):
        print(f"warning: {visible_lines(message)}", file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Print a line; a reader that left, or a full disk, ends the output and not the training."""
    try:
        print(visible_lines(line), flush=True)
    except OSError as error:
        warn(f"no more lines on standard output: {error.strerror}")
        # What is buffered must have somewhere to go, or Python fails over it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
