"""Start-up: ranks set by hand, ranks that never come, die or raise while the others join, and stops meanwhile."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ddp_circles import Config, fit
from ddp_circles.errors import UserError
from ddp_circles.job import watch, world
from ddp_circles.job.store import open_store
from tests.harness.ranks import Job, forget_launcher, free_port, run_ranks
from tests.harness.runs import PLAIN, QUIET, bits, checkpoint_steps, finish, metrics, status, train_hastily
from tests.harness.tracked import wait_until

SMALL = ("--n-samples=125", "--batch-size=16", "--epochs=2")
PATIENT = "--timeout=100"
"""Far more than a test may take: whatever ends in time has not waited for it."""


def by_hand(port: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` with the variables that are set by hand and no others."""
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE")}
    forget_launcher()
    os.environ.update(given | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
    return function(*arguments)


def train_hurriedly(*flags: object) -> None:
    """Train; messages about missing ranks come soon."""
    world.PATIENCE_SECONDS, world.STOP_SECONDS = 1.0, 1.0
    watch.SILENT_SECONDS, watch.WITNESS_SECONDS = 15.0, 1.5
    train_hastily(*flags)


def train_after_others(others: int, folder: Path, *flags: object) -> None:
    """Train hurriedly; rank 0 comes when so many `others` hear signals and are about to look for the store."""
    rank = os.environ["RANK"]
    if rank == "0":
        while len(list(folder.glob("rank*"))) < others:
            time.sleep(0.01)
    else:

        def look_visibly(*arguments: Any) -> Any:
            (folder / f"rank{rank}").touch()
            return open_store(*arguments)

        setattr(world, "open_store", look_visibly)  # noqa: B010 - a plain assignment has another type
    train_hurriedly(*flags)


def of(size: int) -> dict[str, str]:
    """The variables of a job of `size` ranks, of which fewer are started."""
    return {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}


# ---- by hand


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_set_by_hand_train_to_the_same_bits(size: int, tmp_path: Path) -> None:
    flags = (*QUIET, *SMALL)
    with Job(by_hand, size, free_port(), train_hastily, "--run-dir", tmp_path / "hand", *flags) as job:
        outcomes = job.wait(100)
    assert [outcome.code for outcome in outcomes] == [0] * size, outcomes
    assert f"start: {size} rank{'s' * (size > 1)} (environment), cpu, gloo" in outcomes[0].output
    assert bits(tmp_path / "hand") == finish(PLAIN, tmp_path / "plain", *SMALL)


@pytest.mark.parametrize("size", [1, 2])
def test_a_fault_by_hand_prints_its_traceback_once(size: int, tmp_path: Path) -> None:
    flags = ("--run-dir", tmp_path, *QUIET, *SMALL, "--fault=raise@0:5")
    with Job(by_hand, size, free_port(), train_hastily, *flags) as job:
        failed, *others = job.wait(60)
    assert failed.code == 1
    assert failed.output.count("Traceback (most recent call last)") == 1
    assert "InjectedFaultError: --fault asked for this in step 5" in failed.output
    for other in others:
        assert other.code == 1
        assert re.search(r"^rank 1: lost a peer: rank 0 \(host \S+\) raised InjectedFault", other.output, re.MULTILINE)
        assert "Traceback" not in other.output


def test_a_stop_by_hand_has_the_exit_code_that_asks_for_more(tmp_path: Path) -> None:
    flags = ("--run-dir", tmp_path, *QUIET, *SMALL, "--epochs=100000")
    with Job(by_hand, 2, free_port(), train_hastily, *flags) as job:
        job.wait_until((tmp_path / "metrics.jsonl").exists)
        job.signal(signal.SIGTERM, 1)
        outcomes = job.wait(60)
    assert [outcome.code for outcome in outcomes] == [75, 75], outcomes
    assert status(tmp_path) == "stopped"


def leave_it_behind(port: int, run_dir: Path, *flags: object) -> None:
    """Start this rank in a process of its own, as `nohup` in a shell does, and leave when it trains."""
    if os.fork():
        while not (run_dir / "metrics.jsonl").exists():
            time.sleep(0.01)
        os._exit(0)
    (run_dir.parent / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
    watch.BEAT_SECONDS = 0.1
    by_hand(port, train_hastily, "--run-dir", run_dir, *flags)


@pytest.fixture
def left_behind(tmp_path: Path) -> Iterator[Callable[[int], None]]:
    """Sends a signal to the processes that `leave_it_behind` has left, which are killed at the end."""

    def send(number: int) -> None:
        for file in tmp_path.glob("pid*"):
            with suppress(ProcessLookupError):
                os.kill(int(file.read_text()), number)

    yield send
    send(signal.SIGKILL)


def test_ranks_set_by_hand_outlive_the_shell_that_started_them(
    tmp_path: Path, left_behind: Callable[[int], None]
) -> None:
    run_dir = tmp_path / "run"
    with Job(leave_it_behind, 2, free_port(), run_dir, *QUIET, *SMALL, "--epochs=1000000") as job:
        assert [outcome.code for outcome in job.wait(60)] == [0, 0]
        seen = len(metrics(run_dir))
        wait_until(lambda: len(metrics(run_dir)) > seen + 100)  # a second or so: some looks at the launcher
        left_behind(signal.SIGTERM)
        wait_until(lambda: status(run_dir) == "stopped")
    assert checkpoint_steps(run_dir)[0] > 8 * seen


# ---- ranks that never come


@pytest.mark.parametrize(("size", "timeout"), [(2, 4), (3, 12)])
def test_a_rank_that_never_comes_is_named(size: int, timeout: int, tmp_path: Path) -> None:
    flags = ("--run-dir", tmp_path / "run", *QUIET, *SMALL, f"--timeout={timeout}")
    with Job(train_after_others, size - 1, size - 2, tmp_path, *flags, environment=of(size)) as job:
        outcomes = job.wait(60)
    last = size - 1
    for outcome in outcomes:
        lines = outcome.output.splitlines()
        if outcome.rank == 0:
            assert lines.pop(0).startswith(f"rank 0: still waiting for rank {last} of {size} (torchrun) at 127.0.0.1:")
        (line,) = lines
        assert line.startswith(f"rank {outcome.rank}: lost a peer: rank {last} was never seen (")
        assert outcome.code == 1
    assert f"; waited 1 s of {timeout} s" in outcomes[0].output
    said = "".join(outcome.output for outcome in outcomes)
    assert re.search(r"\(waited \d+ s for all ranks to join at 127\.0\.0\.1:", said)


def come_without_rank_0(port: int, *flags: object) -> None:
    """Rank 0 leaves before it serves the store."""
    if os.environ["RANK"] != "0":
        by_hand(port, train_hurriedly, *flags)


def test_rank_0_and_its_store_never_come(tmp_path: Path) -> None:
    port = free_port()
    with Job(come_without_rank_0, 3, port, "--run-dir", tmp_path, *QUIET, *SMALL, "--timeout=3") as job:
        _, *outcomes = job.wait(60)
    for rank, outcome in enumerate(outcomes, 1):
        waits, ends = outcome.output.splitlines()
        place = f"at 127.0.0.1:{port}"
        assert waits == f"rank {rank}: still waiting for rank 0 of 3 (environment) {place}; waited 1 s of 3 s"
        holder = "rank 0, which holds the job's store and does not answer"
        assert re.sub(r"waited \d+ s", "waited", ends) == (
            f"rank {rank}: lost a peer: {holder} (waited for all ranks to join {place})"
        )
        assert outcome.code == 1


def train_as_task_0(*flags: object) -> None:
    """Train as in an interactive shell that srun has started as one of four tasks, without the others."""
    forget_launcher()
    os.environ.update(
        {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}
        | {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "MASTER_PORT": str(free_port())}
    )
    train_hurriedly(*flags)


def test_a_shell_that_is_one_of_several_tasks_says_whom_it_waits_for(tmp_path: Path) -> None:
    with Job(train_as_task_0, 1, "--run-dir", tmp_path, *QUIET, *SMALL, "--timeout=2") as job:
        (outcome,) = job.wait(60)
    assert outcome.code == 1
    waits, ends = outcome.output.splitlines()
    assert waits.startswith("rank 0: still waiting for ranks 1-3 of 4 (srun) at 127.0.0.1:")
    assert re.match(r"rank 0: lost a peer: ranks 1-3 were never seen \(waited \d+ s for all ranks to join at ", ends)


# ---- ranks that end while they join


def end_in(place: str, victim: int, how: str, *flags: object) -> None:
    """Rank `victim` ends, or stays, at the beginning of `place`, a function of start-up."""
    if os.environ["RANK"] == str(victim):

        def end(*_: Any, **__: Any) -> None:
            if how == "raise":
                raise KeyError(place)
            os.kill(os.getpid(), getattr(signal, how))

        module = dist if place == "init_process_group" else world
        setattr(module, place, end)
    train_hurriedly(*flags)


@pytest.mark.parametrize(
    ("size", "victim", "place"),
    [
        (2, 0, "choose_device"),
        (3, 2, "init_process_group"),
        pytest.param(2, 1, "init_process_group", marks=pytest.mark.thorough),
        pytest.param(3, 0, "init_process_group", marks=pytest.mark.thorough),
        pytest.param(3, 1, "choose_device", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("how", ["SIGKILL", "raise"])
def test_a_rank_that_ends_while_it_joins_ends_the_others_soon(
    size: int, victim: int, place: str, how: str, tmp_path: Path
) -> None:
    flags = ("--run-dir", tmp_path, *QUIET, *SMALL, PATIENT)
    with Job(end_in, size, place, victim, how, *flags) as job:
        outcomes = job.wait(60)
    for outcome in outcomes:
        if outcome.rank == victim:
            assert outcome.code == (1 if how == "raise" else -signal.SIGKILL), outcome.output
            continue
        assert outcome.code == 1, outcome.output
        (line,) = re.findall(r"^rank \d: lost a peer: .*$", outcome.output, re.MULTILINE)
        word = "raised KeyError, " if how == "raise" else ""
        seen = rf"rank {outcome.rank}: lost a peer: rank {victim} \(host \S+\) {word}last seen in "
        assert re.match(seen, line), line
        assert "Traceback" not in outcome.output
    assert not (tmp_path / "status").exists()


@pytest.mark.parametrize("place", ["choose_device", "init_process_group"])
def test_the_store_dies_with_rank_0_while_the_others_join(place: str, tmp_path: Path) -> None:
    flags = ("--run-dir", tmp_path, *QUIET, *SMALL, PATIENT)
    with Job(by_hand, 3, free_port(), end_in, place, 0, "SIGKILL", *flags) as job:
        _, *outcomes = job.wait(60)
    for outcome in outcomes:
        assert outcome.code == 1, outcome.output
        assert "lost a peer: the store is gone too, with rank 0 or the launcher that held it" in outcome.output
        assert "Traceback" not in outcome.output


def test_a_network_card_that_is_not_there_is_said_with_the_variable_that_names_it(tmp_path: Path) -> None:
    flags = ("--run-dir", tmp_path, *QUIET, *SMALL, PATIENT)
    with Job(train_hurriedly, 2, *flags, environment={"GLOO_SOCKET_IFNAME": "none0"}) as job:
        outcomes = job.wait(60)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert any("name the one they share in GLOO_SOCKET_IFNAME" in outcome.output for outcome in outcomes), outcomes
    assert all("Traceback" not in outcome.output for outcome in outcomes)


# ---- stops


@pytest.mark.parametrize("hand", [False, True])
def test_a_rank_that_waits_for_others_can_be_stopped(hand: bool, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    call = (by_hand, 2, free_port(), train_after_others) if hand else (train_after_others, 2)
    flags = ("--run-dir", run_dir, *QUIET, *SMALL, PATIENT)
    with Job(*call, 1, tmp_path, *flags, environment=of(3)) as job:
        job.wait_until(lambda: "still waiting" in job.output(0))
        job.signal(signal.SIGTERM)
        outcomes = job.wait(30)
    for outcome in outcomes:
        assert outcome.code == (75 if hand else 0), outcome.output
        line = f"rank {outcome.rank}: stopped before all ranks had joined; nothing was trained since the start\n"
        says = hand or outcome.rank == 0  # once per node, where the ranks know of nodes
        assert outcome.output.endswith(line) if says else outcome.output == ""
    assert not (run_dir / "status").exists()


def test_a_rank_that_is_caught_while_it_connects_can_be_stopped(tmp_path: Path) -> None:
    flags = ("--run-dir", tmp_path, *QUIET, *SMALL, PATIENT)
    with Job(end_in, 2, "init_process_group", 1, "SIGSTOP", *flags) as job:
        job.wait_until(lambda: _is_stopped(job.processes[1].pid))
        job.signal(signal.SIGTERM, 0)
        job.processes[0].join(30)
        assert job.processes[0].exitcode == 0, job.output(0)


def _is_stopped(pid: int) -> bool:
    return "\nState:\tT" in Path(f"/proc/{pid}/status").read_text()


def come_late(go: Path, *flags: object) -> None:
    """The last rank comes when `go` is there."""
    world.PATIENCE_SECONDS, world.STOP_SECONDS = 0.5, 100.0
    while os.environ["RANK"] == "1" and not go.exists():
        time.sleep(0.05)
    train_hastily(*flags)


def test_stopped_while_it_waits_it_still_stops_together_with_those_who_come(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Job(come_late, 2, tmp_path / "go", "--run-dir", run_dir, *QUIET, *SMALL) as job:
        job.wait_until(lambda: "still waiting" in job.output(0))
        job.signal(signal.SIGTERM, 0)
        (tmp_path / "go").touch()
        outcomes = job.wait(60)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert (status(run_dir), checkpoint_steps(run_dir)[0]) == ("stopped", 1)


# ---- a group that is open already


def fit_in_an_open_group(run_dir: Path) -> str:
    dist.init_process_group("gloo")
    try:
        with pytest.raises(UserError) as refused:
            fit(Config(run_dir=run_dir, wandb="disabled", plots=False))
        return str(refused.value)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_open_process_group_is_refused_on_all_ranks(size: int, tmp_path: Path) -> None:
    (refusal,) = set(run_ranks(fit_in_an_open_group, size, tmp_path))
    assert "do not call init_process_group" in refusal
