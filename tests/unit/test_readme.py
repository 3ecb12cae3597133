"""The README is true: options, promises, links, file tree and code."""

import dataclasses
import re
from pathlib import Path

import pytest

from ddp_circles.config import Config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "slurm/README.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").glob("*.md")]


def table(heading: str) -> list[list[str]]:
    """Cells of the table under `heading`, row by row."""
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_every_option_is_documented_with_its_default() -> None:
    documented = {row[0].split("`")[1].removeprefix("--"): row[-1] for row in table("Options")}
    fields = {field.name.replace("_", "-"): field.default for field in dataclasses.fields(Config)}
    assert set(documented) == set(fields) | {"recipe", "config"}
    for flag, default in fields.items():
        words = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        shown = {"None": "", "True": "on"}.get(words, words.removesuffix(".0"))
        assert documented[flag].strip("`").startswith(shown), flag


def test_every_promise_names_a_test_that_exists() -> None:
    rows = table("What it promises, and the test that proves it")
    assert rows
    for promise, tests in rows:
        named = re.findall(r"\((tests/[\w/.]+)\)", tests)
        assert named, promise
        for path in named:
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_are_not_broken(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)\)", document.read_text()):
        if target and not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_the_file_tree_is_complete() -> None:
    section = README.split("\n## The files\n", 1)[1].split("\n## ", 1)[0]
    listed = re.findall(r"^ +(\w+\.py)\b", section, re.MULTILINE)
    modules = [path for path in (ROOT / "ddp_circles").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(listed) == sorted(path.name for path in modules if path.parent.name != "verify")


def test_the_loop_shown_is_the_real_one() -> None:
    section = README.split("\n## The five steps\n", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    assert section in (ROOT / "ddp_circles/loop.py").read_text()


def test_the_example_shown_is_the_real_one() -> None:
    section = README.split("\n## Your own model and data\n", 1)[1].split("\n## ", 1)[0]
    shown = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(shown) == 2
    assert all(block in (ROOT / "examples/digits.py").read_text() for block in shown)


def test_no_placeholder_is_left() -> None:
    assert not [document for document in DOCUMENTS if re.search("@@[A-Z]+@@", document.read_text())]
