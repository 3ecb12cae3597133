"""`launch/kubernetes.yaml`: pods that share a run directory and are given time to save."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddp_circles.train import parse_command_line
from tests.harness.runs import PROJECT, TRAINER

CLAIM, JOB = list(yaml.safe_load_all((PROJECT / "launch/kubernetes.yaml").read_text()))
REPLICAS: dict[str, Any] = JOB["spec"]["pytorchReplicaSpecs"]


def test_it_is_a_job_of_one_master_and_some_workers() -> None:
    assert (JOB["apiVersion"], JOB["kind"], CLAIM["kind"]) == ("kubeflow.org/v1", "PyTorchJob", "PersistentVolumeClaim")
    assert (list(REPLICAS), REPLICAS["Master"]["replicas"]) == (["Master", "Worker"], 1)
    assert JOB["spec"]["runPolicy"]["backoffLimit"] > 10


@pytest.mark.parametrize("role", REPLICAS)
def test_each_pod_trains_in_the_shared_run_directory_and_continues_after_an_eviction(role: str) -> None:
    # Exit code 75 is below 128, where the policy ExitCode would give the job up.
    assert REPLICAS[role]["restartPolicy"] == "OnFailure"
    pod = REPLICAS[role]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert "/" not in container["image"]
    assert container["command"] == ["python", *TRAINER]
    config = parse_command_line(container["args"])
    (volume,) = pod["volumes"]
    (mount,) = container["volumeMounts"]
    assert volume["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    assert (mount["name"], config.run_dir) == (volume["name"], Path(mount["mountPath"]) / JOB["metadata"]["name"])
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert "env" not in container, shlex.join(container["args"])


def test_the_image_that_it_describes_installs_the_project_as_it_is_pinned() -> None:
    lines = (PROJECT / "launch/kubernetes.yaml").read_text().splitlines()
    found = [line.removeprefix("#").strip() for line in lines if line.startswith("#   ")]
    assert [line.split()[0] for line in found[2:]] == ["FROM", "COPY", "RUN", "WORKDIR"]
    assert "constraints.txt" in found[4]
