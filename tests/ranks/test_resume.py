"""Killed anywhere and continued at any size, from whatever checkpoint is good: the bits of a run left alone."""

import hashlib
import json
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ddp_circles.records import run_dir as run_dirs
from ddp_circles.records.checkpoint import VERSION, Checkpoints, State, encode
from ddp_circles.records.recorder import Recorder
from tests.harness.ranks import Job, Outcome
from tests.harness.runs import (
    PLAIN,
    QUIET,
    Bits,
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

STEPS_PER_EPOCH = 7
TINY = ("--n-samples=125", "--batch-size=16", "--epochs=4", "--checkpoint-seconds=1000")
"""28 steps in 4 epochs; the last of each is smaller."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Bits:
    """The bits of a run that nobody disturbs."""
    return finish(PLAIN, tmp_path_factory.mktemp("alone"), *TINY)


def kill_at(
    step: int, size: int, run_dir: Path, every: int, *flags: str, variables: Mapping[str, str] | None = None
) -> None:
    """Train with a checkpoint every `every` steps until the last rank is killed before `step`; then kill the others.

    Rank 0 may still be writing the checkpoint that is due by then, so it gets the time.
    """
    (run_dir / "fault").unlink(missing_ok=True)
    flags = (f"--checkpoint-steps={every}", f"--fault=kill@{size - 1}:{step}", *flags)
    with start(size, run_dir, *TINY, *flags, variables=variables) as job:
        job.processes[-1].join(60)
        assert job.processes[-1].exitcode == -signal.SIGKILL, job.output(size - 1)
        due = step // every * every
        while checkpoint_steps(run_dir)[0] != due and job.processes[0].is_alive():
            job.processes[0].join(0.01)
        job.signal(signal.SIGKILL)
    assert checkpoint_steps(run_dir)[0] == due


# The sizes of the worlds that train one after the other: every size is continued at every other one.
WORLDS = {
    1: (1, 2, 1, 3),
    2: (3, 1, 4, 1),
    3: (2, 3, 2, 4),
    4: (4, 2, 3),
    5: (3, 4, 3),
    6: (4, 3, 1),
    7: (2, 1, 4, 2),
}


@pytest.mark.parametrize("every", WORLDS)
def test_killed_and_continued_at_other_sizes(tmp_path: Path, alone: Bits, every: int) -> None:
    *worlds, last = WORLDS[every]
    for count, size in enumerate(worlds, start=1):
        step = every + 7 * count - 3
        kill_at(step, size, tmp_path, every)
    assert finish(last, tmp_path, *TINY) == alone


def test_a_run_killed_between_training_and_evaluation_evaluates(tmp_path: Path, alone: Bits) -> None:
    kill_at(2 * STEPS_PER_EPOCH, 2, tmp_path, STEPS_PER_EPOCH)
    state = newest_state(tmp_path)
    assert (state["epoch"], state["step"], state["train"][1]) == (1, STEPS_PER_EPOCH, 100)
    assert finish(3, tmp_path, *TINY) == alone


def test_plain_runs_are_continued_by_ranks_and_the_other_way_round(tmp_path: Path, alone: Bits) -> None:
    kill_at(10, PLAIN + 1, tmp_path, 3)
    kill_at(20, 3, tmp_path, 3)
    assert finish(PLAIN, tmp_path, *TINY) == alone


def test_fast_runs_are_continued(tmp_path: Path) -> None:
    kill_at(17, 2, tmp_path, 7, "--reduction=fast")
    fast = finish(3, tmp_path, *TINY, "--reduction=fast")
    undisturbed = finish(3, tmp_path / "undisturbed", *TINY, "--reduction=fast")
    for row, expected in zip(fast.rows, undisturbed.rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


# ---- what may change, and what may not


def test_other_settings_are_refused_by_name_and_free_ones_accepted(tmp_path: Path, alone: Bits) -> None:
    kill_at(10, 1, tmp_path, 5)
    for flags, names in (
        (("--lr=0.5", "--hidden", "3"), ("--lr (0.01 there, 0.5 here)", "--hidden (10 10 there, 3 here)")),
        (("--batch-size=8", "--micro-batches=4", "--seed=1"), ("--batch-size", "--micro-batches", "--seed")),
        (("--reduction=fast", "--threads=2", "--optimizer=sgd"), ("--reduction", "--threads", "--optimizer")),
        (("--dataset=moons", "--noise=0.1", "--data-seed=7"), ("--dataset", "--noise", "--data-seed")),
        (("--activation=none", "--factor=0.5", "--test-fraction=0.3"), ("--activation", "--factor", "--test-fraction")),
    ):
        (outcome,) = run(1, tmp_path, *TINY, *flags)
        assert_refused(outcome, "holds a run with other settings", *names, "Choose another --run-dir")
        assert outcome.output.count(" there, ") == len(names)
    free = ("--log-every=2", "--timeout=99", "--checkpoint-steps=2", "--checkpoint-seconds=5", "--wandb-project=other")
    assert finish(2, tmp_path, *TINY, *free) == alone


def assert_refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome.output
    assert outcome.output.startswith("error: ") or "\nerror: " in outcome.output
    assert "Traceback" not in outcome.output
    for word in words:
        assert word in outcome.output


def test_a_finished_run_says_so_and_grows_on_demand(tmp_path: Path, alone: Bits) -> None:
    short = (*TINY, "--epochs=2")
    finish(2, tmp_path, *short)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and ".lock" not in path.name}
    for resume in ("auto", "must"):
        first, second = run(2, tmp_path, *short, f"--resume={resume}")
        assert (first.code, second.code) == (0, 0)
        assert f"{tmp_path} is finished after 2 epochs: ask for more --epochs to go on" in first.output
    assert {path: path.read_bytes() for path in before} == before
    assert finish(3, tmp_path, *TINY) == alone


def test_must_wants_a_checkpoint_and_never_wants_none(tmp_path: Path, alone: Bits) -> None:
    outcomes = run(2, tmp_path / "empty", *TINY, "--resume=must")
    assert_refused(outcomes[0], "--resume must: there is no checkpoint in", "empty/checkpoints")
    assert (outcomes[1].code, outcomes[1].output) == (2, "")

    kill_at(10, 1, tmp_path, 5, "--seed=1")
    assert finish(1, tmp_path, *TINY, "--resume=never") == alone
    assert newest_state(tmp_path)["settings"]["seed"] == 42


def test_never_discards_once_however_often_the_launcher_starts_again(tmp_path: Path, alone: Bits) -> None:
    kill_at(10, 1, tmp_path, 5, "--seed=1")
    never = (*TINY, "--resume=never", "--checkpoint-steps=5")
    kill_at(10, 2, tmp_path, 5, "--resume=never", variables={"DDP_CIRCLES_START": "job 7"})
    with start(3, tmp_path, *never, variables={"DDP_CIRCLES_START": "job 7"}) as job:
        outcome, *_ = job.wait(60)
    assert "continue after step 10" in outcome.output
    assert bits(tmp_path) == alone
    with start(1, tmp_path, *never, "--epochs=1", variables={"DDP_CIRCLES_START": "job 8"}) as job:
        job.wait(60)
    assert len(metrics(tmp_path)) == 1


def test_an_end_that_lies_behind_is_refused(tmp_path: Path, alone: Bits) -> None:
    kill_at(17, 1, tmp_path, 1)  # in the third of four epochs
    (outcome,) = run(1, tmp_path, *TINY, "--epochs=2")
    assert_refused(outcome, f"--epochs 2: {tmp_path} has come to epoch 3 already; ask for as many, or more")
    assert finish(2, tmp_path, *TINY) == alone


def test_results_are_not_overwritten_where_no_checkpoint_is_left(tmp_path: Path, alone: Bits) -> None:
    finish(1, tmp_path, *TINY, "--epochs=1")
    shutil.rmtree(tmp_path / "checkpoints")
    (outcome,) = run(1, tmp_path, *TINY)
    assert_refused(outcome, "holds a trained model and no checkpoint to go on from", "--resume never")
    assert len(metrics(tmp_path)) == 1
    assert finish(1, tmp_path, *TINY, "--resume=never") == alone


def test_a_folder_with_a_configuration_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("epochs = 1\n")
    for resume in ("auto", "never"):
        (outcome,) = run(1, tmp_path, "--config", tmp_path / "config.toml", f"--resume={resume}")
        assert_refused(outcome, f"--run-dir {tmp_path} would overwrite {tmp_path / 'config.toml'}")
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


# ---- damage


class Malicious:
    """Unpickled without care, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.mkdir, (self.path,))


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "malicious":
        content = pickle.dumps(Malicious(path.with_name("trap")))
        content = len(content).to_bytes(8) + content
        content = hashlib.sha256(content).digest() + content
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        content = {"cut short": content[:middle], "empty": b"", "flipped": flipped}[kind]
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["cut short", "empty", "flipped", "malicious"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, alone: Bits, kind: str) -> None:
    kill_at(17, 1, tmp_path, 4)
    newest, *_ = Checkpoints(tmp_path / "checkpoints").files()
    damage(newest, kind)
    outcomes = run(2, tmp_path, *TINY)
    assert f"warning: checkpoint {newest} is passed over: " in outcomes[0].output
    assert "continue after step 12" in outcomes[0].output
    assert outcomes[1].output == ""
    assert bits(tmp_path) == alone
    assert not newest.with_name("trap").exists()


def test_without_a_good_checkpoint_nothing_starts_over_by_itself(tmp_path: Path) -> None:
    kill_at(17, 1, tmp_path, 4)
    files = Checkpoints(tmp_path / "checkpoints").files()
    for path, kind in zip(files, ("empty", "malicious", "cut short"), strict=True):
        damage(path, kind)
    rows = metrics(tmp_path)
    for resume in ("auto", "must"):
        first, second = run(2, tmp_path, *TINY, f"--resume={resume}")
        assert_refused(first, "no good checkpoint is left", *map(str, files))
        assert (second.code, second.output) == (2, "")
    assert metrics(tmp_path) == rows
    assert not (tmp_path / "checkpoints" / "trap").exists()


OTHER: dict[int, tuple[State, str]] = {
    1: (
        {"version": VERSION - 1},
        f"another version of this package wrote it (its form is {VERSION - 1}, not {VERSION}); no good checkpoint",
    ),
    2: ({"optimizer": {"state": {}, "param_groups": []}}, "holds a run with another optimizer"),
    3: ({"optimizer": {}}, "holds a run with another optimizer"),
}


@pytest.mark.parametrize("size", OTHER)
def test_a_whole_checkpoint_of_something_else_is_refused(tmp_path: Path, alone: Bits, size: int) -> None:
    kill_at(17, 1, tmp_path, 4)
    newest, *_ = Checkpoints(tmp_path / "checkpoints").files()
    changes, said = OTHER[size]
    newest.write_bytes(encode(newest_state(tmp_path) | changes))
    first, *others = run(size, tmp_path, *TINY)
    assert_refused(first, said)
    assert [(other.code, other.output) for other in others] == [(2, "")] * (size - 1)
    assert finish(size, tmp_path, *TINY, "--resume=never") == alone


METRICS_DAMAGE: dict[int, tuple[Callable[[bytes], bytes], str]] = {
    1: (lambda content: b"", "it lacks epochs (0-1), and other lines may be changed"),
    2: (lambda content: content.replace(b'"test/loss"', b'"test/lost"', 1), "it lacks epochs (0), and other lines"),
    3: (lambda content: content.replace(b'"test/accuracy": 0.', b'"test/accuracy": 1.', 1), "a line was changed"),
}


@pytest.mark.parametrize("size", METRICS_DAMAGE)
def test_metrics_that_were_lost_or_changed_are_said_once(tmp_path: Path, alone: Bits, size: int) -> None:
    kill_at(17, size, tmp_path, 8)  # the checkpoint after step 16 has two of four epochs behind it
    file = tmp_path / "metrics.jsonl"
    change, what = METRICS_DAMAGE[size]
    damaged = change(file.read_bytes())
    assert damaged != file.read_bytes()
    file.write_bytes(damaged)
    outcomes = run(size, tmp_path, *TINY, *(["--plots"] if size == 1 else []))
    assert [outcome.code for outcome in outcomes] == [0] * size, outcomes[0].output
    assert outcomes[0].output.count("warning: ") == 1
    assert f"warning: {file} is not as the run left it: {what}" in outcomes[0].output
    assert [outcome.output for outcome in outcomes[1:]] == [""] * (size - 1)
    assert hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest() == alone.model
    assert [row["epoch"] for row in metrics(tmp_path)][-2:] == [2, 3]
    outcomes = run(size, tmp_path, *TINY, "--epochs=5")
    assert "continue after step 28" in outcomes[0].output
    assert "warning" not in outcomes[0].output


def test_a_machine_that_computes_otherwise_is_named_by_what_differs(tmp_path: Path) -> None:
    kill_at(10, 1, tmp_path, 5)
    before = newest_state(tmp_path)["fingerprint"]
    with start(1, tmp_path, *TINY, variables={"MKL_CBWR": "COMPATIBLE"}) as job:
        (outcome,) = job.wait(60)
    fingerprint = json.loads((tmp_path / "summary.json").read_text())["fingerprint"]
    assert fingerprint == before | {"mkl_cbwr": "COMPATIBLE", "computation": fingerprint["computation"]}
    (warning,) = [line for line in outcome.output.splitlines() if line.startswith("warning: ")]
    assert "goes on where mkl_cbwr was not set and is COMPATIBLE" in warning
    assert warning.endswith(": the same bits are not promised")
    assert "torch was" not in warning
    assert "threads was" not in warning


# ---- a full disk


def train_on_a_full_disk(limit: int, after_saves: int, *flags: object) -> None:
    """From some checkpoint on no file may grow beyond `limit` bytes."""
    original, saves = Recorder.save_or_raise, 0

    def save(self: Any, progress: Any) -> None:
        nonlocal saves
        saves += 1
        if saves > after_saves:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        original(self, progress)

    Recorder.save_or_raise = save  # type: ignore[method-assign]
    train_hastily(*flags)


def test_a_full_disk_costs_checkpoints_and_not_the_training(tmp_path: Path) -> None:
    wide = (*TINY, "--hidden", "80", "80", "--checkpoint-steps=4")
    undisturbed = finish(PLAIN, tmp_path / "undisturbed", *wide)
    run_dir = tmp_path / "full"
    with Job(train_on_a_full_disk, 2, 20_000, 3, "--run-dir", run_dir, *QUIET, *wide) as job:
        first, second = job.wait(60)
    for step in (12, 16, 20, 24, 28):
        assert f"warning: no checkpoint after step {step}: " in first.output
    assert "the older ones stay" in first.output
    assert (first.code, second.code, status(run_dir)) == (1, 0, "failed")
    assert "File too large" in first.output
    assert [row["epoch"] for row in metrics(run_dir)] == [0, 1, 2, 3]
    assert checkpoint_steps(run_dir) == [8, 4, 0]
    assert not list(run_dir.rglob("*.partial"))
    assert finish(2, run_dir, *wide) == undisturbed


# ---- one writer


def train_impatiently(*flags: object) -> None:
    run_dirs.LOCK_WAIT_SECONDS = 0.2
    train_hastily(*flags)


def test_a_second_start_on_the_same_directory_names_the_holder(tmp_path: Path) -> None:
    long = (*TINY, "--epochs=100000")
    with start(1, tmp_path, *long) as holder:
        holder.wait_until(lambda: "start: " in holder.output(0))
        with Job(train_impatiently, 2, "--run-dir", tmp_path, *QUIET, *long) as late:
            first, second = late.wait(60)
        assert_refused(first, f"--run-dir {tmp_path} is in use by process {holder.processes[0].pid} on ")
        assert (second.code, second.output) == (2, "")
        assert holder.processes[0].is_alive()
        assert status(tmp_path) == "running"
