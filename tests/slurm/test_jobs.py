"""Jobs that nobody interrupts: where they run changes no bits, faults are bounded, jobs do not meet."""

from collections.abc import Callable

import pytest

from tests.harness.cluster import Cluster, Job
from tests.harness.runs import Bits
from tests.harness.training import EPOCHS, STEPS_PER_EPOCH, Training

pytestmark = [pytest.mark.timeout(400), pytest.mark.thorough]

Submit = Callable[..., Training]


@pytest.fixture(scope="module")
def side_by_side(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Training, Job]]:
    """Both batch scripts with four ranks each, at the same time on the same two nodes, after their end.

    torchrun starts as many ranks on a node as Slurm counts GPUs there.
    """
    nodes = ("--nodes=2", f"--nodelist={','.join(cluster.nodes[:2])}")
    folder = tmp_path_factory.mktemp("jobs")
    trainings = {
        "torchrun": Training.submit(
            cluster, folder, options=(*nodes, "--gpus-per-node=2"), variables={"RANKS_PER_NODE": ""}
        ),
        "srun": Training.submit(cluster, folder, options=(*nodes, "--ntasks-per-node=2"), script="srun.sbatch"),
    }
    try:
        return {launcher: (training, training.wait()) for launcher, training in trainings.items()}
    finally:
        for training in trainings.values():
            training.cancel()


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_four_ranks_on_two_nodes_give_the_plain_runs_model(
    launcher: str, side_by_side: dict[str, tuple[Training, Job]], undisturbed: Bits
) -> None:
    training, job = side_by_side[launcher]
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 0), training.log
    assert f"start: 4 ranks on 2 nodes ({launcher})" in training.log
    assert training.summary["world_size"] == 4
    assert training.bits == undisturbed


def test_two_jobs_of_one_user_on_the_same_nodes_do_not_collide(
    side_by_side: dict[str, tuple[Training, Job]],
) -> None:
    trainings, jobs = zip(*side_by_side.values(), strict=True)
    assert len({job.fields["NodeList"] for job in jobs}) == 1
    assert max(job.fields["StartTime"] for job in jobs) < min(job.fields["EndTime"] for job in jobs)
    assert len({training.run_dir for training in trainings}) == 2
    assert [training.status for training in trainings] == ["finished", "finished"]
    assert not any("retry" in training.log for training in trainings)


@pytest.mark.parametrize(("script", "code"), [("train.sbatch", 1), ("srun.sbatch", 2)])
def test_a_bad_flag_fails_the_job_at_once(script: str, code: int, submit: Submit) -> None:
    training = submit("--epoch-count=5", script=script)
    job = training.wait()

    assert (job.state, job.exit_code, job.restarts) == ("FAILED", code, 0)
    assert training.log.count("--epoch-count") >= 1
    assert "failed before training began" in training.log
    assert not training.run_dir.exists()


def test_a_killed_rank_is_started_again_from_the_last_checkpoint(submit: Submit, undisturbed: Bits) -> None:
    middle = EPOCHS // 2 * STEPS_PER_EPOCH
    training = submit(f"--fault=kill@0:{middle}", "--checkpoint-steps=10")
    job = training.wait()

    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 0), training.log
    assert "retry 1 of 3" in training.log
    assert training.summary["resumed_from_step"] == middle
    assert training.bits == undisturbed


def test_a_cancelled_job_stays_cancelled_and_can_be_continued(submit: Submit, undisturbed: Bits) -> None:
    cancelled = submit()
    steps = cancelled.wait_for_some_steps()
    cancelled.interrupt("scancel", cancelled.job_id)
    assert cancelled.wait().state == "CANCELLED"
    assert cancelled.status == "stopped"

    continued = submit(f"--run-dir={cancelled.run_dir}", script="srun.sbatch")
    assert continued.wait().state == "COMPLETED", continued.log
    assert cancelled.summary["resumed_from_step"] >= steps
    assert cancelled.bits == undisturbed
