"""`slurm/verify.sbatch` over two nodes: passed, and with a rank that dies on one of them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.cluster import FINAL_STATES, Cluster, Job
from tests.harness.runs import PROJECT

pytestmark = [pytest.mark.timeout(400), pytest.mark.thorough]


def verify(cluster: Cluster, folder: Path, *flags: str) -> tuple[Job, str, dict[str, Any]]:
    """The ended job, its log and its figures."""
    job_id = cluster.submit(
        f"--chdir={folder}",
        f"--output={folder}/%x-%j.out",
        "--nodes=2",
        f"--nodelist={','.join(cluster.nodes[:2])}",
        "slurm/verify.sbatch",
        "--device=cpu",
        "--max-bytes=65536",
        *flags,
        cwd=PROJECT,
        VIRTUAL_ENV=sys.prefix,
        RANKS_PER_NODE="1",
    )
    job = cluster.wait_for_job(job_id, *FINAL_STATES, seconds=300)
    figures = json.loads((folder / f"verify-{job_id}.json").read_text())
    return job, (folder / f"verify-{job_id}.out").read_text(), figures


def test_two_nodes_are_verified(cluster: Cluster, tmp_path: Path) -> None:
    job, log, figures = verify(cluster, tmp_path)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), log
    assert (figures["passed"], figures["job"]) == (True, "2 ranks on 2 nodes (torchrun), cpu, gloo")
    assert [one["host"] for one in figures["inventory"]] == cluster.nodes[:2]
    assert "PASSED" in log


def test_the_node_whose_rank_dies_is_named(cluster: Cluster, tmp_path: Path) -> None:
    job, log, figures = verify(cluster, tmp_path, "--inject=kill@1")
    assert (job.state, job.exit_code) == ("FAILED", 1), log
    assert not figures["complete"]
    (finding,) = figures["findings"]
    assert (finding["severity"], finding["ranks"]) == ("missing", [1])
    assert f"rank 1 (host {cluster.nodes[1]})" in finding["what"]
