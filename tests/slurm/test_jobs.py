"""Jobs that nobody interrupts: where they run changes no bits, faults are bounded, jobs do not meet."""

from collections.abc import Callable

import pytest

from tests.slurm.cluster import Cluster, Job
from tests.slurm.training import EPOCHS, STEPS_PER_EPOCH, Training, Undisturbed, read_rows

pytestmark = pytest.mark.timeout(200)

Submit = Callable[..., Training]


def test_torchrun_and_srun_on_two_nodes_give_the_plain_runs_model(
    submit: Submit, cluster: Cluster, undisturbed: Undisturbed
) -> None:
    nodes = f"--nodelist={','.join(cluster.nodes[:2])}"
    with_torchrun = submit(options=("--nodes=2", "--gpus-per-node=2", nodes), variables={"RANKS_PER_NODE": ""})
    with_srun = submit(options=("--nodes=2", "--ntasks-per-node=2", nodes), script="srun.sbatch")
    jobs = [training.wait() for training in (with_torchrun, with_srun)]
    assert_side_by_side(jobs)
    for training, job in zip((with_torchrun, with_srun), jobs, strict=True):
        assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 0), training.log
        assert training.summary["world_size"] == 4
        assert training.model == undisturbed.model
        assert read_rows(training.run_dir) == undisturbed.rows


def test_two_jobs_of_one_user_on_one_node_do_not_collide(
    submit: Submit, cluster: Cluster, undisturbed: Undisturbed
) -> None:
    node = f"--nodelist={cluster.nodes[0]}"
    trainings = [submit(options=(node,)), submit(options=(node,))]
    jobs = [training.wait() for training in trainings]

    assert {job.fields["NodeList"] for job in jobs} == {cluster.nodes[0]}
    assert_side_by_side(jobs)
    assert trainings[0].run_dir != trainings[1].run_dir
    for training in trainings:
        assert training.status == "finished", training.log
        assert training.model == undisturbed.model


def assert_side_by_side(jobs: list[Job]) -> None:
    assert max(job.fields["StartTime"] for job in jobs) < min(job.fields["EndTime"] for job in jobs)


@pytest.mark.parametrize(("script", "code"), [("train.sbatch", 1), ("srun.sbatch", 2)])
def test_a_bad_flag_fails_the_job_at_once(script: str, code: int, submit: Submit) -> None:
    training = submit("--epoch-count=5", script=script)
    job = training.wait()

    assert (job.state, job.exit_code, job.restarts) == ("FAILED", code, 0)
    assert training.log.count("--epoch-count") >= 1
    assert "failed before training began" in training.log
    assert not training.run_dir.exists()


def test_a_killed_rank_is_started_again_from_the_last_checkpoint(submit: Submit, undisturbed: Undisturbed) -> None:
    middle = EPOCHS // 2 * STEPS_PER_EPOCH
    training = submit(f"--fault=kill@0:{middle}", "--checkpoint-steps=10")
    job = training.wait()

    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 0), training.log
    assert "retry 1 of 3" in training.log
    assert training.summary["resumed_from_step"] == middle
    assert training.model == undisturbed.model
    assert read_rows(training.run_dir) == undisturbed.rows


def test_a_cancelled_job_stays_cancelled_and_can_be_continued(submit: Submit, undisturbed: Undisturbed) -> None:
    cancelled = submit()
    steps = cancelled.wait_for_some_steps()
    cancelled.interrupt("scancel", cancelled.job_id)
    assert cancelled.wait().state == "CANCELLED"
    assert cancelled.status == "stopped"

    continued = submit(f"--run-dir={cancelled.run_dir}", script="srun.sbatch")
    assert continued.wait().state == "COMPLETED", continued.log
    assert cancelled.status == "finished"
    assert cancelled.summary["resumed_from_step"] >= steps
    assert cancelled.model == undisturbed.model
