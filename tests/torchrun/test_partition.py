"""The link between two nodes is lost: on both sides all is over soon, torchrun included."""

import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.harness.networks import needs_networks
from tests.harness.runs import PROJECT, QUIET, Command

TIMEOUT = 10
LONG = ("--n-samples=125", "--batch-size=16", "--epochs=1000000", "--checkpoint-steps=10", f"--timeout={TIMEOUT}")


@needs_networks
@pytest.mark.parametrize(
    ("restarts", "variables"),
    [
        pytest.param(0, {}, marks=pytest.mark.thorough),  # as the Slurm scripts have it
        pytest.param(3, {}, marks=pytest.mark.long),
        pytest.param(3, {"PET_RDZV_CONF": "idle_timeout=20"}, marks=pytest.mark.long),
    ],
)
def test_torchrun_does_not_outlive_its_ranks_on_either_side(
    restarts: int, variables: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "launch").mkdir()
    shutil.copy(PROJECT / "launch/multi_node.sh", tmp_path / "launch")
    (tmp_path / "launch/setup.sh").write_text(f'PATH="{sys.prefix}/bin:$PATH"\n')
    options = ["--nodes=2", "--head=node1", "--id=run-1", "--ranks=1", f"--max-restarts={restarts}"]
    words = [word for option in options for word in option.split("=")]
    with Command(
        tmp_path / "log",
        *("bash", PROJECT / "tests/harness/programs/two_nodes.sh", tmp_path),
        *("bash", "launch/multi_node.sh", *words, "--", *QUIET, *LONG),
        cwd=tmp_path,
        variables=variables,
    ) as nodes:
        nodes.wait_until((tmp_path / "runs/run-1/metrics.jsonl").exists)
        (tmp_path / "cut").touch()
        cut = time.monotonic()
        nodes.wait(TIMEOUT + 100)
        seconds = time.monotonic() - cut
    codes = [(tmp_path / f"node{number}.code").read_text() for number in (1, 2)]
    logs = "\n".join((tmp_path / f"node{number}.log").read_text() for number in (1, 2))
    assert codes == ["1\n", "1\n"], logs
    assert seconds < TIMEOUT + 60, logs
    assert "ranks of this one have ended: ending it" in logs
