"""The verifier as real commands."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.runs import Command

MODULE = ("-m", "ddp_circles.verify", "--device=cpu")


def torchrun(folder: Path, size: int, *flags: object) -> tuple[int, str, dict[str, Any]]:
    """Exit code, output and verify.json of the verifier under torchrun."""
    launcher = ("-m", "torch.distributed.run", f"--nproc_per_node={size}")
    words = (sys.executable, *launcher, *MODULE, "--out", folder / "verify.json", *flags)
    with Command(folder / "log", *words, variables={"OMP_NUM_THREADS": "1"}) as command:
        code = command.wait(100)
    return code, command.output, json.loads((folder / "verify.json").read_text())


@pytest.mark.thorough
def test_four_ranks_are_verified_within_a_minute(tmp_path: Path) -> None:
    code, output, content = torchrun(tmp_path, 4)
    assert code == 0, output
    assert (content["passed"], content["complete"], content["findings"]) == (True, True, [])
    assert content["seconds"] < 60
    assert content["job"] == "4 ranks (torchrun), cpu, gloo"
    assert max(row["largest_bytes"] for row in content["collectives"]["operations"]) == 4 * 2**20
    assert output.count("PASSED") == 1
    assert "\x1b" not in output


def test_the_ranks_that_outlive_another_name_it_before_torchrun_ends_them(tmp_path: Path) -> None:
    code, output, content = torchrun(tmp_path, 3, "--inject=kill@1", "--max-bytes=1024")
    assert code == 1
    for rank in (0, 2):
        assert f"rank {rank}: " in output
    assert output.count("missing: rank 1 ") == 2
    assert [(finding["severity"], finding["ranks"]) for finding in content["findings"]] == [("missing", [1])]
