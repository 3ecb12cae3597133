"""The README and the documents are true: options, promises, links, file tree and code."""

import dataclasses
import re
from pathlib import Path

import pytest

from ddp_circles.config import Config

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PROMISES, REFERENCE, OWN_MODEL = (ROOT / "docs" / f"{name}.md" for name in ("promises", "reference", "own_model"))
DOCUMENTS = [README, ROOT / "slurm/README.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").glob("*.md")]
MOST_LINES = 250
"""Of the README, to be read in one go."""


def section(document: Path, heading: str) -> str:
    """The text under a `heading` of any level, as far as the next one of level two."""
    return re.split(rf"^#+ {heading}\n", document.read_text(), flags=re.MULTILINE)[1].split("\n## ", 1)[0]


def table(document: Path, heading: str) -> list[list[str]]:
    """Cells of the table under `heading`, row by row."""
    rows = [line.strip("|").split("|") for line in section(document, heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def anchors(document: Path) -> set[str]:
    """The names by which links reach the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MOST_LINES


def test_every_option_is_documented_with_its_default() -> None:
    documented = {row[0].split("`")[1].removeprefix("--"): row[-1] for row in table(REFERENCE, "Options")}
    fields = {field.name.replace("_", "-"): field.default for field in dataclasses.fields(Config)}
    assert set(documented) == set(fields) | {"recipe", "config"}
    for flag, default in fields.items():
        words = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        shown = {"None": "", "True": "on"}.get(words, words.removesuffix(".0"))
        assert documented[flag].strip("`").startswith(shown), flag


@pytest.mark.parametrize(
    ("document", "heading"), [(README, "The promise"), (PROMISES, "What it promises, and the test that proves it")]
)
def test_every_promise_names_a_test_that_exists(document: Path, heading: str) -> None:
    rows = table(document, heading)
    assert rows
    for promise, tests in rows:
        named = re.findall(r"\(([\w/.]*tests/[\w/.]+)\)", tests)
        assert named, promise
        for path in named:
            assert (document.parent / path).exists(), path


def test_every_promise_of_the_readme_is_in_the_full_list() -> None:
    everywhere = section(PROMISES, "What it promises, and the test that proves it")
    for _, tests in table(README, "The promise"):
        for path in re.findall(r"\((tests/[\w/.]+)\)", tests):
            assert path in everywhere


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_are_not_broken(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", document.read_text()):
        if not target.startswith("http"):
            path = document.parent / target if target else document
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_the_file_tree_is_complete() -> None:
    listed = re.findall(r"^ +(\w+\.py)\b", section(REFERENCE, "The files"), re.MULTILINE)
    modules = [path for path in (ROOT / "ddp_circles").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(listed) == sorted(path.name for path in modules if path.parent.name != "verify")


@pytest.mark.parametrize(
    ("document", "heading", "source"),
    [
        (README, "The five steps", "ddp_circles/loop.py"),
        (README, "Your own model and data", "examples/digits.py"),
        (OWN_MODEL, "Your own model and data", "examples/digits.py"),
    ],
)
def test_the_code_shown_is_the_real_one(document: Path, heading: str, source: str) -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", section(document, heading), re.DOTALL)
    assert shown in (ROOT / source).read_text()


def test_no_placeholder_is_left() -> None:
    assert not [document for document in DOCUMENTS if re.search("@@[A-Z]+@@", document.read_text())]
