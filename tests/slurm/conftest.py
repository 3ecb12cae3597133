"""One cluster and one undisturbed run for all tests here."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.cluster import Cluster, why_not
from tests.harness.runs import PLAIN, Bits, finish
from tests.harness.training import SETTINGS, Training


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Five nodes under Slurm: two for all, the others for tests that take nodes away from a job."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm"), size=5, node_timeout=5) as started:
        yield started


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Bits:
    """The bits of one plain process with the settings that all runs here share."""
    return finish(PLAIN, tmp_path_factory.mktemp("undisturbed"), *SETTINGS)


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """`Training.submit` into the test's own folder; a job that is still there at the end is cancelled."""
    submitted: list[Training] = []

    def remember(*arguments: str, **how: Any) -> Training:
        submitted.append(Training.submit(cluster, tmp_path, *arguments, **how))
        return submitted[-1]

    yield remember
    for training in submitted:
        training.cancel()
