"""The changes that docs/change.md shows can be made as they stand, together, and keep the promise."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.harness.runs import PROJECT, QUIET, TRAINER, bits, metrics

PAGE = (PROJECT / "docs" / "change.md").read_text()
CHOICES = ("--dataset=quantiles", "--optimizer=adamw", "--epochs=2", "--n-samples=200")


def make_changes(folder: Path) -> int:
    """Change the files in `folder` as the page's diffs say; returns the number of diffs."""
    diffs = re.findall(r"^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for diff in diffs:
        for name, changes in re.findall(r"^(ddp_circles/\S+)\n((?:[-+ .].*\n)+)", diff, re.MULTILINE):
            file = folder / name
            for change in changes.split("...\n"):
                lines = change.splitlines(keepends=True)
                old, new = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
                text = file.read_text()
                assert text.count(old) == 1, f"{name} does not have, once:\n{old}"
                file.write_text(text.replace(old, new))
    return len(diffs)


def test_the_changes_shown_work_together_on_any_number_of_ranks(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "ddp_circles", tmp_path / "ddp_circles", ignore=shutil.ignore_patterns("__pycache__"))
    assert make_changes(tmp_path) == 4
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=3")
    for name, launcher in {"one": (), "three": torchrun}.items():
        done = subprocess.run(
            [sys.executable, *launcher, *TRAINER, *QUIET, *CHOICES, "--run-dir", tmp_path / name],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert all(0 < row["test/brier"] < 1 for row in metrics(tmp_path / name))
    assert bits(tmp_path / "one") == bits(tmp_path / "three")
