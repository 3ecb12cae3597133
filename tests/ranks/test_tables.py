"""The tutorial's published results, digit for digit, at every number of ranks."""

import json
from pathlib import Path

import pytest

from ddp_circles.config import RECIPES
from tests.harness.ranks import train_on

TABLES = json.loads((Path(__file__).parents[1] / "data" / "published_tables.json").read_text())
QUIET = ("--wandb", "disabled", "--no-plots")


def printed(size: int, run_dir: Path, *flags: object) -> list[str]:
    """The epochs' lines on the console; fails if another rank than 0 speaks."""
    speaker, *others = train_on(size, "--run-dir", run_dir, *QUIET, *flags, timeout=560)
    assert [speaker.code, *(other.code for other in others)] == [0] * size, speaker.output
    assert [other.output for other in others] == [""] * len(others)
    return [line for line in speaker.output.splitlines() if line.startswith("Epoch:")]


def published(name: str) -> list[str]:
    """The rows of the published table as this program prints them."""
    words = "Epoch: {} | Loss: {:.5f}, Acc: {:.2f}% | Test loss: {:.5f}, Test acc: {:.2f}%"
    return [words.format(*row) for row in TABLES[name]]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("model_4", size) for size in (1, 2, 3, 4)),
        *((name, size) for name in ("model_1", "model_3") for size in (1, 2)),
        *(pytest.param(name, size, marks=pytest.mark.thorough) for name in ("model_1", "model_3") for size in (3, 4)),
    ],
)
def test_every_published_row_is_printed(name: str, size: int, tmp_path: Path) -> None:
    through_last_row = () if size == 1 else ("--epochs", TABLES[name][-1][0] + 1)
    lines = printed(size, tmp_path, "--recipe", name, *through_last_row)
    if size == 1:  # the whole recipe, whose last epoch's line comes after the table
        assert lines.pop().startswith(f"Epoch: {RECIPES[name]['epochs'] - 1} | ")
    assert lines == published(name)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("model_4", size) for size in (2, 3, 4)),
        *(pytest.param("model_1", size, marks=pytest.mark.thorough) for size in (2, 3)),
    ],
)
def test_every_published_row_is_printed_in_fast_mode(name: str, size: int, tmp_path: Path) -> None:
    through_last_row = ("--epochs", TABLES[name][-1][0] + 1)
    assert printed(size, tmp_path, "--recipe", name, "--reduction", "fast", *through_last_row) == published(name)


@pytest.mark.parametrize("size", [1, 3])
def test_model_0_finds_that_a_line_cannot_part_circles(size: int, tmp_path: Path) -> None:
    lines = printed(size, tmp_path, "--recipe", "model_0")
    assert [line.split()[1] for line in lines] == [*(str(row[0]) for row in TABLES["model_0_seed"]), "99"]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] == 99
    for part in ("train", "test"):
        assert last[f"{part}/loss"] == pytest.approx(0.693, abs=0.005)
        assert last[f"{part}/accuracy"] == pytest.approx(0.5, abs=0.05)
