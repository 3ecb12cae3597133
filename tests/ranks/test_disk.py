"""Killed at any file operation, after any power cut, with any disk error: the resumed run has the undisturbed bits."""

import errno
import io
import os
import random
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from ddp_circles.errors import EXIT_STOPPED
from ddp_circles.job.faults import InjectedFaultError
from ddp_circles.job.rehearsal import Rehearsal
from ddp_circles.records import files
from ddp_circles.records.metrics_file import MetricsFile
from tests.harness.disk import (
    ERRORS,
    NOTE,
    WRITES,
    Content,
    Disk,
    Fail,
    Full,
    Handler,
    Kill,
    Operation,
    Perform,
    Record,
    Refuse,
    count_moments,
    lay_out,
    read,
    read_journal,
    train_plain_watched,
    train_watched,
)
from tests.harness.ranks import Job, Outcome
from tests.harness.runs import PLAIN, Bits, bits, finish, run, status

SMALL = ("--n-samples=50", "--batch-size=16", "--epochs=3", "--micro-batches=4", "--checkpoint-steps=2")
"""9 steps in 3 epochs; 6 checkpoints, of which 3 are dropped."""
SIZES = (1, 2, 3)
MOSTLY_ONE = (1, 1, 1, 2, 3)
"""Sizes of disturbed runs; only rank 0 writes, and the others cost time."""
ENDS_WITHIN = 45.0
"""Seconds in which all ranks must have ended, whatever happens to rank 0."""
SAMPLE = 3
"""Disturbances of each kind and scene that `--all` tries."""

Defect = Callable[[], None]


@dataclass(frozen=True, eq=False)
class Scene:
    """A run to be disturbed: what it finds in its directory, and what it does where nothing disturbs it."""

    name: str
    before: Content
    flags: tuple[str, ...]
    journal: list[Operation]
    bits: Bits

    def begin(self, run_dir: Path) -> None:
        """Make the directory as the run finds it."""
        if self.before:
            lay_out(self.before, run_dir)


def make_scene(folder: Path, name: str, defect: Defect | None = None) -> Scene:
    """Let a run happen: a `new` one, one `resumed` after a kill, or one `over` another that has finished."""
    expected = finish(1, folder / "undisturbed", *SMALL)
    run_dir, flags = folder / "scene", ("--resume=never",) if name == "over" else ()
    if name == "resumed":
        assert kill(60, 1, run_dir)
    elif name == "over":
        finish(1, run_dir, *SMALL, "--seed=1")
    before = read(run_dir) if run_dir.exists() else {}
    (outcome,) = watched(Record(folder / "journal"), 1, run_dir, *flags, defect=defect)
    assert outcome.code == 0, outcome.output
    assert bits(run_dir) == expected
    journal, disk = read_journal(folder / "journal"), Disk(before)
    for operation in journal:
        disk.apply(operation)
    assert disk.left() == read(run_dir), "a file was changed by a call that is not in the journal"
    return Scene(name, before, flags, journal, expected)


@pytest.fixture(scope="module", params=["new", "resumed", "over"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"), request.param)


def watched(
    handle: Handler, size: int, run_dir: Path, *flags: str, defect: Defect | None = None, seconds: float = ENDS_WITHIN
) -> list[Outcome]:
    """Train in `run_dir` with `handle` between rank 0 and the disk; every rank ends in bounded time."""
    with Job(train_watched, size, handle, defect, run_dir, *SMALL, *flags) as job:
        outcomes = job.wait(seconds)
    for outcome in outcomes:
        assert outcome.code is not None, f"rank {outcome.rank} of {size} hung:\n{outcome.output}"
    return outcomes


def kill(moment: int, size: int, run_dir: Path, *flags: str, defect: Defect | None = None) -> bool:
    """Kill rank 0 at a moment of its run; returns False if it ended before."""
    first, *_ = watched(Kill(moment), size, run_dir, *flags, defect=defect)
    assert first.code in (0, -signal.SIGKILL), first.output
    return first.code != 0


def resume(scene: Scene, size: int, run_dir: Path) -> None:
    """Continue undisturbed; the status was true before, and nothing is found damaged."""
    if scene.name != "over" and (run_dir / "status").exists() and status(run_dir) == "finished":
        assert bits(run_dir) == scene.bits
    outcomes = run(size, run_dir, *SMALL, *scene.flags, timeout=ENDS_WITHIN)
    for outcome in outcomes:
        assert outcome.code == 0, f"rank {outcome.rank} of {size} ended with {outcome.code}:\n{outcome.output}"
    assert "passed over" not in outcomes[0].output, outcomes[0].output
    assert bits(run_dir) == scene.bits, outcomes[0].output


# ---- the three kinds of disturbance: a number says which one it is; False past the last


def kill_and_resume(scene: Scene, number: int, seed: int, run_dir: Path) -> bool:
    """Kill the run at a moment, and two times in five its continuation, at any moment."""
    scene.begin(run_dir)
    dice = random.Random(f"{seed} {number}")
    size = dice.choice(MOSTLY_ONE)
    killed = kill(number, size, run_dir, *scene.flags)
    if killed and dice.random() < 0.4:
        kill(dice.randint(1, count_moments(scene.journal)), dice.choice(SIZES), run_dir, *scene.flags)
    resume(scene, dice.choice([other for other in SIZES if other != size]), run_dir)
    return killed


def cut_power_and_resume(scene: Scene, number: int, seed: int, run_dir: Path) -> bool:
    """Continue from what a power cut may leave of the run."""
    states = states_after_power_cuts(scene, seed)
    if number > len(states):
        return False
    lay_out(states[number - 1], run_dir)
    resume(scene, random.Random(f"{seed} {number}").choice(SIZES), run_dir)
    return True


@cache
def states_after_power_cuts(scene: Scene, seed: int) -> list[Content]:
    """All different directories that a power cut at any moment of the run may leave."""
    dice, disk = random.Random(seed), Disk(scene.before)
    states: dict[tuple[tuple[str, bytes | None], ...], Content] = {}
    for operation in scene.journal:
        disk.apply(operation)
        states |= {tuple(sorted(state.items())): state for state in disk.after_a_power_cut(dice)}
    return list(states.values())


def fail_and_resume(scene: Scene, number: int, seed: int, run_dir: Path) -> bool:
    """Let an operation of the run fail, once or from then on: the run says so, or is none the worse for it."""
    scene.begin(run_dir)
    dice = random.Random(f"{seed} {number}")
    fail = Fail(number, ERRORS[number % len(ERRORS)], lasting=dice.random() < 0.5)
    first, *_ = watched(fail, dice.choice(MOSTLY_ONE), run_dir, *scene.flags)
    failed = re.search(f"^{NOTE}(E[A-Z]+) ", first.output, re.MULTILINE)
    if first.code == 0:
        assert bits(run_dir) == scene.bits, first.output
        assert scene.name != "resumed" or "continue after step" in first.output, first.output
    else:
        assert failed, first.output
        check_refusal(first, os.strerror(getattr(errno, failed[1])), run_dir)
        gets_out = not fail.lasting or failed[1] == "ENOSPC"
        if scene.name == "new" and gets_out and (run_dir / "status").exists():
            assert status(run_dir) == "failed", first.output
    resume(scene, dice.choice(SIZES), run_dir)
    return failed is not None


def check_refusal(first: Outcome, reason: str, run_dir: Path) -> None:
    """One message, without a traceback, that names a file and the reason."""
    assert first.code in (1, 2), first.output
    assert "Traceback" not in first.output
    speaker = "error: " if first.code == 2 else "rank 0: "
    said = re.findall(f"^{speaker}.*", first.output, re.MULTILINE)
    assert len(said) == 1, first.output
    assert str(run_dir) in said[0]
    assert reason in said[0] or "no space left for a whole line" in said[0], said


Disturbance = Callable[[Scene, int, int, Path], bool]
DISTURBANCES: tuple[Disturbance, ...] = (kill_and_resume, cut_power_and_resume, fail_and_resume)


def how_many(disturb: Disturbance, scene: Scene, seed: int) -> int:
    """The number of different disturbances of a kind."""
    if disturb is cut_power_and_resume:
        return len(states_after_power_cuts(scene, seed))
    return count_moments(scene.journal) if disturb is kill_and_resume else len(scene.journal)


def rehearse(disturb: Disturbance, scene: Scene, numbers: Iterable[int], seed: int, folder: Path) -> int:
    """Try disturbances until there is no more; returns how many there were, and fails with all that went wrong."""
    wrong, tried = [], 0
    for number in numbers:
        try:
            if not disturb(scene, number, seed, folder / str(number)):
                break
        except Exception as error:  # damaged results may raise anything where they are read
            wrong.append(f"{disturb.__name__} {number}: {type(error).__name__}: {error}")
        tried += 1
    assert not wrong, f"seed {seed}, {len(wrong)} of {tried}:\n" + "\n".join(wrong)
    return tried


@pytest.mark.thorough
@pytest.mark.parametrize("disturb", DISTURBANCES)
def test_some_disturbances(scene: Scene, disturb: Disturbance, tmp_path: Path) -> None:
    seed = 0
    dice, total = random.Random(f"{scene.name} {disturb.__name__}"), how_many(disturb, scene, seed)
    numbers = [dice.randint(total * part // SAMPLE + 1, total * (part + 1) // SAMPLE) for part in range(SAMPLE)]
    assert rehearse(disturb, scene, numbers, seed, tmp_path) == SAMPLE


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("disturb", DISTURBANCES)
def test_all_disturbances(scene: Scene, disturb: Disturbance, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    seed = pytestconfig.getoption("seed") or random.SystemRandom().randrange(1, 2**32)
    print(f"seed {seed}")
    total = how_many(disturb, scene, seed)
    assert rehearse(disturb, scene, range(1, total + 2), seed, tmp_path) == total


# ---- a disk that stays full, or refuses one file


STEP_4 = "checkpoints/step-000000000004.checkpoint"
ENDLESS = ("--epochs=1000000",)


@pytest.mark.parametrize("size", [PLAIN, 1, 2, 3])
def test_a_stop_on_a_full_disk_says_what_is_saved(tmp_path: Path, size: int) -> None:
    arguments = (Full(STEP_4), *(() if size == PLAIN else (None,)), tmp_path, *SMALL, *ENDLESS)
    with Job(train_plain_watched if size == PLAIN else train_watched, max(1, size), *arguments) as job:
        job.wait_until(lambda: "no checkpoint after step 8" in job.output(0))
        job.signal(signal.SIGTERM)
        first, *others = job.wait(ENDS_WITHIN)
    assert first.code == (EXIT_STOPPED if size == PLAIN else 0), first.output
    assert re.search(
        r"^stopped after step \d+, not saved; the last checkpoint is step 4; to continue: ", first.output, re.MULTILINE
    )
    assert "Traceback" not in first.output
    assert [(other.code, other.output) for other in others] == [(0, "")] * len(others)
    assert status(tmp_path) == "stopped"


@pytest.mark.parametrize("size", [2, 3])
def test_on_a_full_disk_the_first_error_counts(tmp_path: Path, size: int) -> None:
    fault = f"--fault=raise@{size - 1}:7"
    first, *_, last = watched(Full(STEP_4), size, tmp_path, *ENDLESS, fault, defect=forget_the_fault)
    assert first.code == 1
    assert f"lost a peer: rank {size - 1} " in first.output
    assert "raised InjectedFaultError" in first.output
    assert "Traceback" not in first.output
    assert "InjectedFaultError: --fault asked for this in step 7" in last.output
    assert status(tmp_path) == "failed"


def forget_the_fault() -> None:
    """Let a planned fault happen without a file that remembers it, which only rank 0 could write here."""

    def reach(rehearsal: Rehearsal, step: int) -> None:
        if step == rehearsal.fault.step:
            raise InjectedFaultError(f"--fault asked for this in step {step}")

    setattr(Rehearsal, "reach", reach)  # noqa: B010 - a plain assignment has another type


@pytest.mark.parametrize(
    "size, name, error",
    [
        (1, "metrics.jsonl", errno.ENOSPC),
        (2, "checkpoints/step-000000000009.checkpoint", errno.ESTALE),
        (3, "model.safetensors", errno.ENOSPC),
        (1, "summary.json", errno.ESTALE),
    ],
)
def test_final_files_that_cannot_be_written_are_named(tmp_path: Path, size: int, name: str, error: int) -> None:
    file = name.rpartition("/")[2]
    handle = Refuse(error, ("pwrite",) if name == "metrics.jsonl" else ("write", "replace"), (f"*{file}*",))
    first, *others = watched(handle, size, tmp_path, "--checkpoint-seconds=1000")
    check_refusal(first, os.strerror(error), tmp_path / name)
    assert first.code == 1
    assert "after a cure the same command goes on from the last checkpoint" in first.output
    assert [(other.code, other.output) for other in others] == [(0, "")] * len(others)
    assert status(tmp_path) == "failed"
    outcome, *_ = run(size, tmp_path, *SMALL)
    assert "continue after step " in outcome.output
    assert bits(tmp_path) == finish(1, tmp_path / "undisturbed", *SMALL)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_folders_is_good_enough(tmp_path: Path, error: int) -> None:
    first, *_ = watched(Refuse(error, ("fsync",), (".", "checkpoints")), 2, tmp_path / "run")
    assert (first.code, "warning" in first.output) == (0, False), first.output
    assert bits(tmp_path / "run") == finish(1, tmp_path / "undisturbed", *SMALL)


# ---- faults that these rehearsals have found


class Unreadable:
    """Lets nobody list the checkpoints."""

    def __call__(self, operation: Operation, perform: Perform) -> Any:
        if operation.call in ("listdir", "scandir") and operation.path == "checkpoints":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), operation.path)
        return perform()


@pytest.mark.thorough
@pytest.mark.parametrize("scene", ["resumed"], indirect=True)
def test_checkpoints_that_may_not_be_listed_are_no_reason_to_start_over(scene: Scene, tmp_path: Path) -> None:
    scene.begin(run_dir := tmp_path / "run")
    (outcome,) = watched(Unreadable(), 1, run_dir)
    assert outcome.code != 0
    assert read(run_dir)["metrics.jsonl"] == scene.before["metrics.jsonl"]


@pytest.mark.thorough
@pytest.mark.parametrize("scene", ["over"], indirect=True)
def test_a_run_that_starts_over_is_not_finished(scene: Scene, tmp_path: Path) -> None:
    scene.begin(run_dir := tmp_path / "run")
    gone = list(map(str, scene.journal)).index("unlink model.safetensors")
    assert kill(count_moments(scene.journal[: gone + 1]) + 1, 1, run_dir, *scene.flags)
    assert not (run_dir / "model.safetensors").exists()
    assert status(run_dir) != "finished"


# ---- proofs that each kind notices a package that is broken


@contextmanager
def replacing_without_flush(path: Path) -> Iterator[BinaryIO]:
    temporary = path.with_name(f".{path.name}{files.SUFFIX}")
    with temporary.open("xb") as file:
        yield file
    temporary.replace(path)


def forget_to_flush() -> None:
    files.replacing = replacing_without_flush


@contextmanager
def replacing_in_place(path: Path) -> Iterator[BinaryIO]:
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_in_place() -> None:
    files.replacing = replacing_in_place


@contextmanager
def replacing_unseen(path: Path) -> Iterator[io.FileIO]:
    with io.FileIO(path, "w") as file:
        yield file


def write_past_the_journal() -> None:
    setattr(files, "replacing", replacing_unseen)  # noqa: B010 - a plain assignment has another type


def lose_lines() -> None:
    write = MetricsFile._write

    def careless_write(file: MetricsFile) -> None:
        try:
            write(file)
        except OSError:
            del file._tail[file._written :]

    setattr(MetricsFile, "_write", careless_write)  # noqa: B010 - a plain assignment has another type


@pytest.mark.thorough
def test_a_call_that_the_journal_does_not_see_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a call that is not in the journal"):
        make_scene(tmp_path, "new", write_past_the_journal)


@pytest.mark.thorough
def test_a_power_cut_finds_files_that_are_not_flushed(tmp_path: Path) -> None:
    broken = make_scene(tmp_path, "new", forget_to_flush)
    last = how_many(cut_power_and_resume, broken, 0)
    with pytest.raises(AssertionError, match=r"seed 0, 3 of 3:\n"):
        rehearse(cut_power_and_resume, broken, range(last - 2, last + 1), 0, tmp_path)


@pytest.mark.thorough
def test_a_kill_finds_a_checkpoint_that_is_written_in_place(tmp_path: Path) -> None:
    broken = make_scene(tmp_path / "scene", "new", write_in_place)
    saves = [number for number, operation in enumerate(broken.journal) if "/step-" in operation.path]
    before = next(number for number in saves[len(saves) // 2 :] if broken.journal[number].call in WRITES)
    run_dir = tmp_path / "killed"
    assert kill(count_moments(broken.journal[: before + 1]), 1, run_dir, defect=write_in_place)
    with pytest.raises(AssertionError, match="passed over"):
        resume(broken, 1, run_dir)


@pytest.mark.thorough
def test_an_error_finds_lines_that_are_lost(tmp_path: Path) -> None:
    broken = make_scene(tmp_path / "scene", "new", lose_lines)
    number = next(number for number, operation in enumerate(broken.journal, 1) if operation.call == "pwrite")
    run_dir = tmp_path / "failed"
    (outcome,) = watched(Fail(number, errno.EIO, lasting=False), 1, run_dir, defect=lose_lines)
    assert outcome.code == 0
    with pytest.raises(AssertionError):
        bits(run_dir)


def test_a_power_cut_takes_what_was_not_flushed() -> None:
    creation = os.O_CREAT | os.O_WRONLY
    steps = [
        (Operation("open", ".new", 5, flags=creation), {"old": b"1"}, {"old": b"1", ".new": b""}),
        (Operation("write", ".new", 5, data=b"22"), {"old": b"1"}, {"old": b"1", ".new": b""}),
        (Operation("fsync", ".new", 5), {"old": b"1"}, {"old": b"1", ".new": b"22"}),
        (Operation("replace", ".new", target="old"), {"old": b"1"}, {"old": b"22"}),
        (Operation("open", ".", 6), {"old": b"1"}, {"old": b"22"}),
        (Operation("fsync", ".", 6), {"old": b"22"}, {"old": b"22"}),
        (Operation("pwrite", "old", 5, start=2, data=b"3"), {"old": b"22"}, {"old": b"22"}),
        (Operation("unlink", "old"), {"old": b"22"}, {}),
    ]
    disk, dice = Disk({"old": b"1"}), random.Random(0)
    for operation, flushed, all_names in steps:
        disk.apply(operation)
        least, most, some = disk.after_a_power_cut(dice)
        assert (least, most) == (flushed, all_names), operation
        assert some.get("old", b"22") in (b"1", b"22", b"223", b"22\0")
