"""The benchmarks run: each measures what it says, at a size that proves nothing about speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.runs import PROJECT


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_throughput_of_contenders_that_need_no_other_package(tmp_path: Path) -> None:
    contenders = ["floor", "exact-8"]
    words = ["--ranks", "2", "--starts", "1", "--rounds", "1", "--epochs", "1", "--n-samples", "400"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.throughput", *words, "--only", *contenders, "--output", tmp_path / "found"],
        cwd=PROJECT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert set(found["2"]) == set(contenders)
    losses = [figures["loss"] for figures in found["2"].values()]
    assert losses == pytest.approx([losses[0]] * len(losses), abs=0.02)  # all train the same network
    assert {path.name for path in tmp_path.iterdir()} == {"found.json", "found.md", "found.png"}
