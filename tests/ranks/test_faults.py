"""Ranks that die, raise, stall or diverge: who says what, what is saved, and how soon everything is over."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from torch.optim import Adam

from ddp_circles import loop
from ddp_circles.job import watch
from ddp_circles.job.ranks import read_ranks
from ddp_circles.job.world import open_world, telling_others
from tests.harness.devices import event
from tests.harness.ranks import Job, free_port
from tests.harness.runs import (
    QUIET,
    bits,
    checkpoint_steps,
    finish,
    metrics,
    newest_state,
    run,
    start,
    status,
    train_hastily,
)

SMALL = ("--n-samples=125", "--batch-size=16", "--epochs=10", "--checkpoint-steps=1")
"""70 steps, with a checkpoint after each."""


def train_counting_steps(*flags: object) -> None:
    """Train, and print how many optimizer steps this rank has taken when it leaves."""
    original, steps = Adam.step, 0

    def step(*arguments: Any) -> Any:
        nonlocal steps
        result = original(*arguments)
        steps += 1
        return result

    setattr(Adam, "step", step)  # noqa: B010 - a plain assignment has another type
    try:
        train_hastily(*flags)
    finally:
        print(f"{steps} optimizer steps", flush=True)


@pytest.mark.parametrize("kind", ["kill", "raise"])
@pytest.mark.parametrize("victim", [0, 2])
def test_survivors_neither_step_nor_save_without_their_peer(tmp_path: Path, kind: str, victim: int) -> None:
    # With four, one survivor has no connection of its own to the victim that its all-reduce waits on.
    with Job(train_counting_steps, 4, "--run-dir", tmp_path, *QUIET, *SMALL, f"--fault={kind}@{victim}:50") as job:
        job.wait_until((tmp_path / "fault").exists)
        outcomes = job.wait(20)
    assert outcomes[victim].code == (-signal.SIGKILL if kind == "kill" else 1)
    for outcome in outcomes:
        if outcome.rank == victim:
            continue
        assert outcome.code == 1
        assert "\n50 optimizer steps\n" in f"\n{outcome.output}"
        (line,) = re.findall(rf"^rank {outcome.rank}: lost a peer: (.*)$", outcome.output, re.MULTILINE)
        raised = "raised InjectedFaultError, " if kind == "raise" else ""
        assert re.match(rf"rank {victim} \(host \S+\) {raised}last seen in", line), line
        assert "; rank " not in line
        assert "Traceback" not in outcome.output
    assert checkpoint_steps(tmp_path)[0] == 50
    assert status(tmp_path) == ("running" if (kind, victim) == ("kill", 0) else "failed")


def test_not_a_number_fails_every_rank_at_its_step_with_one_message(tmp_path: Path) -> None:
    outcomes = run(3, tmp_path, *SMALL, "--fault=nan@2:50")
    assert [outcome.code for outcome in outcomes] == [1, 1, 1]
    messages = {outcome.output.partition(f"rank {outcome.rank}: ")[2] for outcome in outcomes}
    assert len(messages) == 1
    assert messages.pop().startswith(
        "in step 50, gradients, losses, metrics or changes of buffers were not finite, or beyond the range"
    )
    assert all("Traceback" not in outcome.output for outcome in outcomes)
    assert (status(tmp_path), checkpoint_steps(tmp_path)[0]) == ("failed", 50)
    assert finish(2, tmp_path, *SMALL).rows[-1][0] == 9  # the fault does not come again


def test_not_a_number_is_not_saved_in_fast_either(tmp_path: Path) -> None:
    """The ranks agree after the last step of an epoch; that very step's update is spoiled."""
    fast = (*SMALL, "--reduction=fast")
    outcomes = run(2, tmp_path, *fast, "--fault=nan@1:13")
    assert [outcome.code for outcome in outcomes] == [1, 1]
    for outcome in outcomes:
        assert f"rank {outcome.rank}: in step 13, " in outcome.output
    assert all(value.isfinite().all() for value in newest_state(tmp_path)["model"].values())
    assert finish(2, tmp_path, *fast).rows[-1][0] == 9


def test_a_stalled_rank_is_named_with_place_and_age_and_nothing_is_left(tmp_path: Path) -> None:
    timeout = 3
    with start(3, tmp_path, *SMALL, "--fault=stall@1:50", f"--timeout={timeout}") as job:
        job.wait_until((tmp_path / "fault").exists)
        stalled_at = time.monotonic()
        outcomes = job.wait(timeout + 15)
        assert time.monotonic() - stalled_at < timeout + 15
    assert [outcome.code for outcome in outcomes] == [1, 1, 1]
    for rank in (0, 2):
        pattern = rf"rank {rank}: lost a peer: rank 1 \(host \S+\) last seen in train, epoch 7, step 50, (\d+) s ago"
        found = re.search(pattern, outcomes[rank].output)
        assert found, outcomes[rank].output
        assert timeout <= int(found[1]) <= timeout + 10
    assert "rank 1: the job has failed: rank 1 (host" in outcomes[1].output
    assert (status(tmp_path), checkpoint_steps(tmp_path)[0]) == ("failed", 50)


def train_with_little_patience(*flags: object) -> None:
    watch.STORE_SECONDS = 3.0
    train_hastily(*flags)


def test_nobody_waits_for_a_frozen_rank_that_holds_the_store(tmp_path: Path) -> None:
    """As under srun: there is no agent, and the store is in rank 0's process."""
    own = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(free_port())}
    flags = ("--run-dir", tmp_path, *QUIET, *SMALL, "--epochs=100000", "--timeout=3")
    with Job(train_with_little_patience, 2, *flags, environment=own) as job:
        job.wait_until((tmp_path / "metrics.jsonl").exists)
        job.signal(signal.SIGSTOP, 0)
        job.processes[1].join(30)
        assert job.processes[1].exitcode == 1, job.output(1)
        assert "rank 1: the store of the job does not answer; ending this process" in job.output(1)


def wait_like_nccl() -> None:
    """The ranks wait for a sum on the device, and no socket tells that rank 1 is gone."""
    watch.SILENT_SECONDS, watch.WITNESS_SECONDS = 3.0, 1.5
    ranks = read_ranks()
    with open_world(ranks, "cpu", "gloo", 100, {}) as world, telling_others(world.ranks, world.watch):
        world.watch.listening = lambda: bool(watch.waiting)
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        world.wait_for(event())


def test_a_rank_whose_heart_has_stopped_is_named_where_nothing_else_tells(tmp_path: Path) -> None:
    with Job(wait_like_nccl, 3) as job:
        outcomes = job.wait(40)
    assert [outcome.code for outcome in outcomes] == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        (line,) = re.findall(rf"^rank {rank}: lost a peer: (.*)$", outcomes[rank].output, re.MULTILINE)
        assert re.match(r"rank 1 \(host \S+\) last seen in start, epoch 0, step 0, \d+ s ago \(", line), line
    assert "(no heartbeat of rank 1 for 3 s)" in outcomes[0].output


def stall_in_evaluation(*flags: object) -> None:
    """Rank 1 does not come back from its second evaluation."""
    watch.GRACE_SECONDS, watch.WITNESS_SECONDS = 5.0, 1.5
    original, evaluations = loop.evaluate, 0

    def evaluate(*arguments: Any) -> Any:
        nonlocal evaluations
        evaluations += 1
        if evaluations == 2 and os.environ["RANK"] == "1":
            time.sleep(60)
        return original(*arguments)

    setattr(loop, "evaluate", evaluate)  # noqa: B010 - a plain assignment has another type
    train_hastily(*flags)


def test_a_rank_that_stalls_in_the_evaluation_is_named_there(tmp_path: Path) -> None:
    with Job(stall_in_evaluation, 2, "--run-dir", tmp_path, *QUIET, *SMALL, "--timeout=2") as job:
        outcomes = job.wait(40)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert re.search(
        r"rank 0: lost a peer: rank 1 \(host \S+\) last seen in evaluate, epoch 1, step 14, \d+ s ago",
        outcomes[0].output,
    ), outcomes[0].output


def test_a_fault_fires_once_for_each_run_directory(tmp_path: Path) -> None:
    flags = (*SMALL, "--fault=raise@0:3")
    (failed,) = run(1, tmp_path / "a", *flags)
    assert failed.code == 1
    finish(1, tmp_path / "a", *flags)
    (failed,) = run(1, tmp_path / "b", *flags)
    assert failed.code == 1
    assert metrics(tmp_path / "b") == []


def test_a_fault_on_a_rank_that_is_not_there(tmp_path: Path) -> None:
    (refused,) = run(1, tmp_path, *SMALL, "--fault=kill@1:3")
    assert refused.code == 2
    assert "error: --fault names rank 1, and the last rank of this world is 0" in refused.output
    (failed, _) = run(2, tmp_path, *SMALL, "--fault=raise@0:5")
    assert failed.code == 1
    (tmp_path / "fault").unlink()
    assert finish(1, tmp_path, *SMALL, "--fault=kill@1:30") == bits(tmp_path)  # only a first start is held to it
