"""`launch/kubernetes.yaml`: pods that share a run directory, with flags that the trainer takes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ddp_circles.train import parse_command_line
from tests.harness.runs import PROJECT, TRAINER

CLAIM, JOB = list(yaml.safe_load_all((PROJECT / "launch/kubernetes.yaml").read_text()))
REPLICAS: dict[str, Any] = JOB["spec"]["pytorchReplicaSpecs"]


@pytest.mark.parametrize("role", REPLICAS)
def test_each_pod_trains_in_the_shared_run_directory(role: str) -> None:
    pod = REPLICAS[role]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"  # the operator looks for it
    assert container["command"] == ["python", *TRAINER]
    config = parse_command_line(container["args"])
    (volume,) = pod["volumes"]
    (mount,) = container["volumeMounts"]
    assert volume["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    assert (mount["name"], config.run_dir) == (volume["name"], Path(mount["mountPath"]) / JOB["metadata"]["name"])
    assert "env" not in container, "RANK and the like come from the operator"
