"""Interruptions cost a job time, and nothing else: the batch scripts, run by a real Slurm.

A job spends most of its time waiting for Slurm, so the interruptions are rehearsed side by side; each test then waits
for its own.
"""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster, Job, wait_until
from tests.harness.runs import Bits
from tests.harness.training import Training

pytestmark = pytest.mark.timeout(600)

REHEARSED_AT_ONCE = 3
QUICK = "scancel --signal=USR1 without torchrun"
"""The one interruption of a default run."""


def scancel_with_usr1(training: Training) -> None:
    """Ask the ranks to stop, as by hand."""
    training.interrupt("scancel", "--signal=USR1", training.job_id)


def requeue(training: Training) -> None:
    """Put the job back into the queue from outside: ranks and batch script get TERM."""
    training.interrupt("scontrol", "requeue", training.job_id)


def preempt(training: Training) -> None:
    """Let a job of a higher-priority partition want the nodes."""
    nodes = f"--nodelist={training.job().fields['NodeList']}"
    training.interrupt("sbatch", "--partition=urgent", nodes, "--exclusive", "--output=/dev/null", "--wrap=true")


def reach_the_time_limit(training: Training) -> None:
    """Bring the limit so near that Slurm gives its early warning the next time it looks, which is every 30 s."""
    job = f"JobId={training.job_id}"
    training.interrupt("scontrol", "update", job, "TimeLimit=10")
    wait_until(lambda: training.job().restarts == 1, "the job is back in the queue", 120)
    training.cluster.run("scontrol", "update", job, "TimeLimit=60")


def cut_the_power(training: Training) -> None:
    """Take one of the job's nodes away for as long as Slurm needs to see it."""
    node = training.cluster.nodes[-1]
    training.cluster.power_off(node)
    training.wait("PENDING")
    training.cluster.power_on(node)


@dataclass(frozen=True)
class Interruption:
    """Something that happens to a job: what, to which job, on which of the cluster's nodes."""

    happen: Callable[[Training], None]
    nodes: slice
    options: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    script: str = "train.sbatch"
    log_line: str = "stopped by request: back into the queue"


INTERRUPTIONS = {
    "power cut": Interruption(
        cut_the_power, slice(3, 5), arguments=("--checkpoint-steps=10",), log_line="DUE TO NODE FAILURE"
    ),
    "time limit": Interruption(reach_the_time_limit, slice(1), options=("--time=60", "--signal=B:USR1@600")),
    "scancel --signal=USR1": Interruption(scancel_with_usr1, slice(2)),
    "preemption": Interruption(preempt, slice(2, 3)),
    # --resume never discards what was there before the job, and nothing that the job itself has done
    "requeue": Interruption(requeue, slice(1), arguments=("--resume=never",), log_line="DUE TO JOB REQUEUE"),
    QUICK: Interruption(
        scancel_with_usr1,
        slice(2),
        script="srun.sbatch",
        options=("--ntasks-per-node=1",),
        arguments=("--resume=never",),
    ),
}


@dataclass(frozen=True)
class Rehearsal:
    """The course of an interrupted job."""

    training: Training
    job: Job
    steps_before: int
    """Steps surely done before the interruption."""


def rehearse(interruption: Interruption, cluster: Cluster, folder: Path) -> Rehearsal:
    """Submit a job, interrupt it in the middle, and wait for its end."""
    nodes = cluster.nodes[interruption.nodes]
    options = (f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", *interruption.options)
    training = Training.submit(
        cluster, folder, "--wandb=offline", *interruption.arguments, script=interruption.script, options=options
    )
    try:
        steps = training.wait_for_some_steps()
        interruption.happen(training)
        return Rehearsal(training, training.wait(), steps)
    finally:
        training.cancel()


@pytest.fixture(scope="module")
def rehearsals(
    request: pytest.FixtureRequest, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Rehearsal]]]:
    """The rehearsals of all interruptions that are selected, some at once."""
    selected = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(REHEARSED_AT_ONCE) as pool:
        yield {
            name: pool.submit(rehearse, interruption, cluster, tmp_path_factory.mktemp("job"))
            for name, interruption in INTERRUPTIONS.items()
            if name in selected
        }


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.thorough) for name in INTERRUPTIONS]
)
def test_an_interrupted_job_ends_with_the_undisturbed_bits(
    name: str, rehearsals: dict[str, Future[Rehearsal]], undisturbed: Bits
) -> None:
    rehearsal = rehearsals[name].result()
    training, job = rehearsal.training, rehearsal.job
    log = training.log

    assert (job.state, job.exit_code) == ("COMPLETED", 0), log
    # seen on a busy machine: on the node that is back, Slurm ends the job's new start as well
    assert job.restarts == 1 or (name == "power cut" and job.restarts == 2), log
    assert INTERRUPTIONS[name].log_line in log
    assert f"start {job.restarts}: finished" in log
    resumed_from = int(re.findall(r"^continue after step (\d+)", log, re.MULTILINE)[0])
    if name == "power cut":
        assert resumed_from > 0
        assert resumed_from % 10 == 0
    else:
        assert resumed_from >= rehearsal.steps_before, "the checkpoint is of the step reached"
    assert training.bits == undisturbed, "each epoch once, with the undisturbed figures and weights"
    assert len(training.wandb_runs()) == 1
