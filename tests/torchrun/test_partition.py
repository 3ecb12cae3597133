"""The link between two nodes is lost: on both sides all is over soon, torchrun included."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.harness.runs import PROJECT, QUIET, Command

TIMEOUT = 10
LONG = ("--n-samples=125", "--batch-size=16", "--epochs=1000000", "--checkpoint-steps=10", f"--timeout={TIMEOUT}")


def can_make_networks() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    return subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"]).returncode == 0


@pytest.mark.skipif(not can_make_networks(), reason="needs root, network namespaces and the command ip")
@pytest.mark.parametrize(
    ("restarts", "patience"),
    [pytest.param(3, 20, marks=pytest.mark.thorough), *(pytest.param(n, 40, marks=pytest.mark.long) for n in (0, 3))],
)
def test_torchrun_does_not_outlive_its_ranks_on_either_side(restarts: int, patience: int, tmp_path: Path) -> None:
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
        variables={"PET_RDZV_CONF": f"idle_timeout={patience}"},
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
