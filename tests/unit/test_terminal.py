"""Whatever text comes from a file, the store or the environment, no byte of it controls the terminal."""

import io
import sys
import unicodedata
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ddp_circles import cli
from ddp_circles.errors import UserError
from ddp_circles.job.ranks import Ranks
from ddp_circles.job.watch import Watch
from ddp_circles.records import wandb_copy
from ddp_circles.terminal import beside_python, say, spell_numbers, visible, warn
from ddp_circles.verify.findings import Finding
from ddp_circles.verify.report import Report

NASTY = "\x1b[2J\x1b]0;title\x07\x9b31m\r\b\x7f\u202e\u2066\u200b\u2028\u2029\x85\ud800 [/red] [bold]é漢"
TEXTS = st.text(st.integers(0, sys.maxunicode).map(chr) | st.sampled_from(NASTY + "\n"), max_size=30)


def control(text: str) -> set[str]:
    """The characters of `text` that a terminal obeys instead of showing them, line ends apart."""
    return {one for one in text if one != "\n" and unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp")}


@given(TEXTS)
@example(NASTY)
def test_visible_text_is_one_line_and_says_what_was_there(text: str) -> None:
    shown = visible(text)
    assert not control(shown)
    assert "\n" not in shown
    if text.isascii() and "\\" not in text:
        assert shown.encode().decode("unicode_escape") == text
    assert visible("café 漢 /a-b_c") == "café 漢 /a-b_c"


def refuse(text: str) -> None:
    cli.refuse(Ranks(), UserError(text))


def print_traceback(text: str) -> None:
    try:
        raise LookupError(text)
    except LookupError:
        cli.print_traceback(Ranks(world_size=2))


def copy(error: type[Exception]) -> Callable[[str], None]:
    def fail(text: str) -> None:
        with (
            patch.object(sys, "argv", ["wandb_copy", "RUN"]),
            patch.object(wandb_copy, "_copy", side_effect=error(text)),
            pytest.raises(SystemExit),
        ):
            wandb_copy.main()

    return fail


def report(text: str) -> None:
    one = dict.fromkeys(("host", "name", "uuid", "device", "torch", "backend", "driver"), text)
    kind = {"kind": text, "ranks": [0], "alone": text, "together": text, "digest": text}
    with TemporaryDirectory() as folder:
        made = Report(Path(folder) / "verify.json", text, {})
        made.findings.append(Finding("wrong", text, (0,), text, text))
        made.sections["inventory"] = [one | {"instruction_set": text, "threads": text}]
        made.sections["oracle"] = {"kinds": [kind], "method": "all"}
        made.close(complete=True)


SINKS: dict[str, Callable[[str], Any]] = {
    "say": say,
    "warn": warn,
    "refuse": refuse,
    "print_traceback": print_traceback,
    "Watch.say": lambda text: Watch(Ranks()).say(text),
    "copy refused": copy(UserError),
    "copy failed": copy(RuntimeError),
    "report": report,
}


@pytest.mark.parametrize("sink", SINKS)
@settings(max_examples=40, deadline=None)
@given(TEXTS)
@example(NASTY)
def test_no_sink_passes_control_characters_on(sink: str, text: str) -> None:
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        SINKS[sink](text)
    assert printed.getvalue()
    assert not control(printed.getvalue())


@pytest.mark.parametrize("sink", ["say", "warn", "refuse", "print_traceback", "Watch.say", "copy refused"])
def test_our_own_line_ends_stay(sink: str) -> None:
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        SINKS[sink]("one\ntwo")
    assert [line for line in printed.getvalue().splitlines() if line.endswith("two")]
    assert not [line for line in printed.getvalue().splitlines() if line.endswith("onetwo")]


@pytest.mark.parametrize(
    "numbers, spelled", [([], ""), ([3], "3"), ([7, 0, 2, 1, 3], "0-3, 7"), ([1, 3, 5], "1, 3, 5"), ([8, 9], "8-9")]
)
def test_numbers_are_spelled_as_ranges(numbers: list[int], spelled: str) -> None:
    assert spell_numbers(numbers) == spelled


@pytest.mark.parametrize("place, said", [("a b/.venv", "'a b/.venv/bin/wandb'"), ("..", "{}/bin/wandb")])
def test_a_program_is_named_so_that_the_name_works_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, said: str
) -> None:
    here = tmp_path / "here"
    program = (here / place / "bin" / "wandb").resolve()
    program.parent.mkdir(parents=True)
    here.mkdir(exist_ok=True)
    program.touch()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    assert beside_python("wandb") == said.format(tmp_path)
    assert beside_python("torchrun") == "torchrun", "not there: left to PATH"
