"""Console lines and warnings: standard output for what happens, standard error for warnings."""

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path


def open_streams() -> None:
    """Let no print end a program, neither over a closed stream nor over a character that the terminal cannot show."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would get the number, and what libraries print
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = (
        stream or open(number, "w", closefd=False)  # noqa: SIM115
        for number, stream in ((1, sys.stdout), (2, sys.stderr))
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not so in a notebook
            stream.reconfigure(errors="backslashreplace")


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


def beside_python(name: str) -> str:
    """The program `name` of this Python's environment as a word of a shell command, to be started from this folder.

    PATH does not tell: the launch scripts put the environment on theirs, which is not the user's.
    """
    program = Path(sys.executable).parent / name
    if not program.exists():
        return name
    with contextlib.suppress(OSError, ValueError):  # this folder may be gone; or the program lies elsewhere
        program = program.relative_to(Path.cwd())
    return shlex.quote(str(program))


def remark(text: str) -> None:
    """Print `text` on standard error; one that cannot be written neither ends a training nor changes how it ends."""
    with contextlib.suppress(OSError):
        print(visible_lines(text), file=sys.stderr, flush=True)


def complain(message: str) -> None:
    """Print a message that ends the program."""
    remark(f"error: {message}")


def warn(message: str) -> None:
    """Print a warning."""
    remark(f"warning: {message}")


def say(line: str) -> None:
    """Print a line; a reader that left, or a full disk, ends the output and not the training."""
    try:
        print(visible_lines(line), flush=True)
    except OSError as error:
        warn(f"no more lines on standard output: {error.strerror}")
        # What is buffered must have somewhere to go, or Python fails over it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
