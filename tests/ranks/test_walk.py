"""The README's walk from the command line to the sum over all ranks is the way that a step really takes."""

import re
import traceback
from pathlib import Path

import pytest
from torch import Tensor

from ddp_circles import exact
from ddp_circles.job.sums import sum_over_ranks
from tests.harness.ranks import run_ranks, train
from tests.harness.runs import PROJECT, QUIET


def calls_at_the_first_sum(*flags: object) -> list[tuple[str, str]]:
    """Train, and return the calls of the package that led to the first sum of gradients, as (name, file)."""
    package = PROJECT / "ddp_circles"
    seen: list[tuple[str, str]] = []

    def noting(numbers: Tensor) -> Tensor:
        frames = [(frame.name, Path(frame.filename)) for frame in traceback.extract_stack()]
        if not seen:
            seen.extend((name, str(file.relative_to(PROJECT))) for name, file in frames if package in file.parents)
        return sum_over_ranks(numbers)

    setattr(exact, "sum_over_ranks", noting)  # noqa: B010 - a plain assignment has another type
    with pytest.raises(SystemExit, match=r"^0$"):
        train(*flags)
    return seen


def test_the_files_named_call_each_other_in_their_order(tmp_path: Path) -> None:
    section = (PROJECT / "README.md").read_text().split("\n## The five steps\n", 1)[1].split("\n## ", 1)[0]
    walk = re.findall(r"^\d\. \[`(\w+)`\]\((ddp_circles/[\w/]+\.py)\)", section, re.MULTILINE)
    calls = run_ranks(calls_at_the_first_sum, 2, "--run-dir", tmp_path, *QUIET, "--epochs=1")[0]
    assert [call for call in calls if call in walk] == walk
    files = [file for _, file in calls]
    assert sorted(set(files), key=files.index) == [file for _, file in walk]
    assert len(walk) <= 5
    assert len(calls) <= 10
