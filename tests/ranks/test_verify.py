"""The verifier over several ranks: faults on request, real ones, and none; who is named, and how soon all is over.

Most of it is rehearsed by few ranks, one verification after the other. The long form, with 50 tries for each kind of
fault and 300 clean runs: `bash launch/test.sh -m long tests/ranks -s`
"""

import functools
import itertools
import math
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import distributed

from ddp_circles import loop
from ddp_circles.job.faults import Fault
from ddp_circles.models import loss_sum
from ddp_circles.verify import oracle, session, speed
from ddp_circles.verify.injection import PHASES, STEPS, Trouble
from tests.harness.ranks import LAUNCHER_VARIABLES, Job, Outcome, free_port
from tests.harness.verifying import SMALL, Ended, Plan, check, end_each, report, verify

TRIES, CLEAN_RUNS = 50, 300


# ---- several verifications by the same ranks


@contextmanager
def lasting_fault(*victims: int) -> Iterator[None]:
    """Some ranks compute their losses wrong, always in the same way."""

    def spoiled(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return loss_sum(logits, targets) * (1 + 2.0**-20)

    with patch.object(oracle, "loss_sum", spoiled if int(os.environ["RANK"]) in victims else loss_sum):
        yield


@contextmanager
def wrong_addition() -> Iterator[None]:
    """Large sums of float32 come out wrong on all ranks, though every rank sends what it should."""
    original = distributed.all_reduce

    def all_reduce(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        work = original(tensor, *arguments, **options)
        if tensor.dtype == torch.float32 and tensor.numel() == 4095:
            tensor[17] += 1
        return work

    with patch.object(distributed, "all_reduce", all_reduce):
        yield


@contextmanager
def mixed_fleet() -> Iterator[None]:
    """Rank 2 is of another kind, and rounds otherwise."""
    other = {"MKL_CBWR": "COMPATIBLE"} if os.environ["RANK"] == "2" else {}
    with lasting_fault(2), patch.dict(os.environ, other):
        yield


@contextmanager
def no_launcher() -> Iterator[None]:
    """This process knows of no launcher."""
    with patch.dict(os.environ):
        for name in list(os.environ):
            if name.startswith((*LAUNCHER_VARIABLES, "LOCAL_")):
                del os.environ[name]
        yield


@contextmanager
def three_rounds() -> Iterator[None]:
    """The time is over after the third round."""
    original = session.Session._judge_time

    def judge_time(self: session.Session, _: float, found: object) -> bool:
        return original(self, math.inf if self._round < 2 else 0.0, found)

    with patch.object(session.Session, "_judge_time", judge_time):
        yield


PLANS: dict[int, dict[str, Plan]] = {
    1: {
        "clean": Plan(("--seed=5",)),
        "plain": Plan(trouble=no_launcher),
        "flip@0": Plan(("--inject=flip@0", "--seed=1")),
        "wrong@0": Plan(("--inject=wrong@0", "--seed=1")),
    },
    2: {
        "clean": Plan(("--seed=6",)),
        "flip@1": Plan(("--inject=flip@1", "--seed=2")),
        "wrong@1": Plan(("--inject=wrong@1", "--seed=1")),
        "slow@1": Plan(("--inject=slow@1", "--seed=1")),
        "lasting": Plan(trouble=functools.partial(lasting_fault, 1)),
        "soak": Plan(("--minutes=1", "--inject=wrong@1"), three_rounds),
    },
    3: {
        "clean": Plan(("--seed=5",)),
        "wrong@0": Plan(("--inject=wrong@0", "--seed=2")),
        "slow@2": Plan(("--inject=slow@2", "--seed=2")),
        "flip@2": Plan(("--inject=flip@2:3+", "--seed=2")),
        "lasting": Plan(trouble=functools.partial(lasting_fault, 2)),
        "addition": Plan(trouble=wrong_addition),
        "mixed": Plan(trouble=mixed_fleet),
        "no such rank": Plan(("--inject=flip@3",)),
        "no such step": Plan(("--inject=flip@1:24",)),
        "no such folder": Plan(("--out=/nowhere/verify.json",)),
        "no such flag": Plan(("--max-byte=3",)),
        "no such backend": Plan(("--backend=nccl",)),
    },
    4: {
        "clean": Plan(),
        "flip@3": Plan(("--inject=flip@3", "--seed=3")),
        "wrong@2": Plan(("--inject=wrong@2", "--seed=3")),
        "warp@1": Plan(("--inject=warp@1:7", "--seed=3")),
    },
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Ended]:
    """The end of a planned verification; the first call for a number of ranks runs all its plans."""

    @functools.cache
    def run(size: int) -> dict[str, Ended]:
        return end_each(tmp_path_factory.mktemp(f"{size}"), size, PLANS[size])

    return lambda size, name: run(size)[name]


@pytest.mark.parametrize(
    ("size", "name"), [(size, name) for size, plans in PLANS.items() for name in plans if "@" in name]
)
def test_a_rehearsed_fault_is_found_and_the_right_rank_named(
    size: int, name: str, ended: Callable[[int, str], Ended]
) -> None:
    kind, victim = name.split("@")
    codes, outputs, folder = ended(size, name)
    check(kind, int(victim), codes, outputs[0], folder)


@pytest.mark.parametrize("size", PLANS)
def test_a_clean_run_passes(size: int, ended: Callable[[int, str], Ended]) -> None:
    codes, outputs, folder = ended(size, "clean")
    assert codes == [0] * size, outputs[0]
    content = report(folder)
    assert (content["passed"], content["complete"], content["findings"]) == (True, True, [])
    assert [len(content["inventory"]), len(content["speed"]["compute"]["seconds"])] == [size, size]
    assert {row["operation"]: row["wrong"] for row in content["collectives"]["operations"]} == {
        "broadcast": 0, "all-reduce sum": 0, "all-reduce max": 0, "all-gather": 0,
    }  # fmt: skip
    (kind,) = content["oracle"]["kinds"]
    assert (kind["alone"], kind["together"]) == (f"{size} of {size} agree", f"{size} of {size} agree, as alone")
    assert "PASSED" in outputs[0]
    assert all(output == "" for output in outputs[1:])


def test_one_plain_process_says_what_it_cannot_see(ended: Callable[[int, str], Ended]) -> None:
    codes, outputs, folder = ended(1, "plain")
    assert codes == [0], outputs[0]
    content = report(folder)
    assert (content["passed"], content["job"]) == (True, "1 rank (one process), cpu, gloo")
    assert list(content["oracle"]["told"][0]["again"]) == ["0"]
    assert "A fault that repeats to the bit is not seen" in " ".join(outputs[0].split())


def test_the_digest_depends_on_the_seed_alone(ended: Callable[[int, str], Ended]) -> None:
    digests = [report(ended(size, "clean").folder)["oracle"]["kinds"][0]["digest"] for size in (1, 3, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_a_soak_counts_its_rounds_and_what_was_wrong_in_them(ended: Callable[[int, str], Ended]) -> None:
    codes, outputs, folder = ended(2, "soak")
    assert codes == [1, 1]
    content = report(folder)
    assert (content["oracle"]["rounds"], content["oracle"]["failed_rounds"]) == (3, 0)
    assert [[finding["ranks"], finding["times"]] for finding in content["findings"]] == [[[1], 3]]
    assert "round 3: 0 clean, 3 not, " in outputs[0]


# ---- faults that nobody ordered


def test_a_lasting_fault_is_told_from_a_passing_one(ended: Callable[[int, str], Ended]) -> None:
    codes, _, folder = ended(3, "lasting")
    assert codes == [1] * 3
    (finding,) = report(folder)["findings"]
    assert (finding["check"], finding["ranks"]) == ("training alone", [2])
    assert "a lasting fault" in finding["what"]


def test_two_ranks_cannot_tell_whose_a_lasting_fault_is(ended: Callable[[int, str], Ended]) -> None:
    codes, _, folder = ended(2, "lasting")
    assert codes == [1] * 2
    (finding,) = report(folder)["findings"]
    assert finding["ranks"] == []
    assert "it cannot be said which of them is wrong" in finding["what"]
    assert finding["advice"].startswith("verify again with more ranks")


def test_where_the_addition_itself_is_wrong_no_rank_is_accused(ended: Callable[[int, str], Ended]) -> None:
    codes, _, folder = ended(3, "addition")
    assert codes == [1] * 3
    (finding,) = report(folder)["findings"]
    assert (finding["check"], finding["ranks"]) == ("collectives", [])
    assert "of 4095 float32" in finding["what"]
    assert "rank 0 at offset 17 expected" in finding["what"]


def test_a_mixed_fleet_is_compared_within_each_kind_and_says_so(ended: Callable[[int, str], Ended]) -> None:
    codes, outputs, folder = ended(3, "mixed")
    assert codes == [0] * 3, outputs[0]
    content = report(folder)
    assert [finding["severity"] for finding in content["findings"]] == ["warning"]
    assert content["findings"][0]["what"] == "mkl cbwr differs: none on ranks 0-1; COMPATIBLE on rank 2"
    assert [kind["ranks"] for kind in content["oracle"]["kinds"]] == [[0, 1], [2]]
    assert "compared within each kind, and" in " ".join(outputs[0].split())


# ---- bad input


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no such rank", "--inject names rank 3"),
        ("no such step", "--inject names step 24, and the last step of a training is 23"),
        ("no such folder", "--out /nowhere/verify.json cannot be written"),
        ("no such flag", "--max-byte"),
        ("no such backend", "--backend nccl"),
    ],
)
def test_bad_input_is_said_once_and_ends_with_2(name: str, message: str, ended: Callable[[int, str], Ended]) -> None:
    codes, outputs, _ = ended(3, name)
    assert codes == [2, 2, 2]
    assert message in outputs[0]
    assert outputs[1:] == ["", ""]
    assert "Traceback" not in outputs[0]


# ---- ranks that fall silent


def verify_impatiently(patience: float, *flags: object) -> None:
    """Of a timeout of 20 seconds, wait for `patience` only."""
    session.LAST_WORDS_SECONDS = 20 - patience
    verify("--timeout=20", *flags)


def verify_and_tell(folder: Path, patience: float) -> None:
    """Leave a file when the checks have begun."""
    original = speed.measure

    def measure(*arguments: Any) -> Any:
        (folder / f"rank{os.environ['RANK']}").touch()
        return original(*arguments)

    with patch.object(speed, "measure", measure):
        verify_impatiently(patience, "--out", folder / "verify.json", *SMALL, "--minutes=1")


def wait_for(job: Job, *files: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, job.output(0)
        time.sleep(0.02)


def run(size: int, folder: Path, *flags: object) -> list[Outcome]:
    """Verify with ranks of its own; returns how each ends."""
    with Job(verify, size, "--out", folder / "verify.json", *SMALL, *flags) as job:
        return job.wait(100)


def rehearse_kill(size: int, victim: int, seed: int, folder: Path) -> None:
    """Order a rank's death and look whether it is named."""
    outcomes = run(size, folder, f"--inject=kill@{victim}", "--seed", seed)
    assert outcomes[victim].code == -signal.SIGKILL
    survivors = [outcome for outcome in outcomes if outcome.rank != victim]
    for outcome in survivors:
        assert f"missing: rank {victim} (host " in outcome.output
    if victim == 0:
        assert {outcome.code for outcome in survivors} == {1}
        assert not (folder / "verify.json").exists()
    else:
        codes = [outcome.code or 0 for outcome in survivors]
        check("kill", victim, codes, survivors[0].output, folder)


@pytest.mark.parametrize(("size", "victim", "seed"), [(3, 1, 1), (2, 0, 2)])
def test_a_rank_that_dies_is_named(size: int, victim: int, seed: int, tmp_path: Path) -> None:
    rehearse_kill(size, victim, seed, tmp_path)


@pytest.mark.parametrize("patience", [3, pytest.param(10, marks=pytest.mark.long)])
def test_a_frozen_rank_is_named_and_the_others_end_within_the_timeout(patience: float, tmp_path: Path) -> None:
    frozen, timeout = 1, 20
    with Job(verify_and_tell, 3, tmp_path, patience) as job:
        wait_for(job, tmp_path / f"rank{frozen}")
        job.signal(signal.SIGSTOP, frozen)
        begun = time.monotonic()
        for rank in (0, 2):
            job.processes[rank].join(2 * timeout)
        seconds = time.monotonic() - begun
        outcomes = job.wait(0)
    assert [outcome.code for outcome in outcomes] == [1, None, 1]
    assert seconds < timeout, outcomes[0].output
    for rank in (0, 2):
        assert f"missing: rank {frozen} (host " in outcomes[rank].output
    (finding,) = report(tmp_path)["findings"]
    assert (finding["severity"], finding["ranks"]) == ("missing", [frozen])


@pytest.mark.thorough
def test_a_frozen_rank_that_holds_the_store_is_named_too(tmp_path: Path) -> None:
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(free_port())}
    with Job(verify_and_tell, 3, tmp_path, 3, environment=environment) as job:
        wait_for(job, tmp_path / "rank0")
        job.signal(signal.SIGSTOP, 0)
        begun = time.monotonic()
        for rank in (1, 2):
            job.processes[rank].join(40)
        seconds = time.monotonic() - begun
        outcomes = job.wait(0)
    assert [outcome.code for outcome in outcomes] == [None, 1, 1]
    assert seconds < 20
    for rank in (1, 2):
        assert "missing: rank 0, which holds the job's store and does not answer" in outcomes[rank].output


def test_a_request_to_stop_ends_all_ranks_with_a_report(tmp_path: Path) -> None:
    with Job(verify_and_tell, 2, tmp_path, 10) as job:
        wait_for(job, *(tmp_path / f"rank{rank}" for rank in range(2)))
        job.signal(signal.SIGTERM)
        outcomes = job.wait(30)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert "asked to end by SIGTERM" in outcomes[0].output + outcomes[1].output
    content = report(tmp_path)
    assert (content["passed"], content["complete"]) == (False, False)
    assert [finding["ranks"] for finding in content["findings"]] == [[]]


def verify_with_a_patient_victim(victim: int, *flags: object) -> None:
    """The rank that hangs speaks last, so that any other that accuses itself is first.

    When the others give up, it must have been silent for half of its patience, on a busy machine too.
    """
    verify_impatiently(7 if os.environ["RANK"] == str(victim) else 6, *flags)


def seed_for(kind: str, *place: object) -> int:
    """A seed with which a fault of this kind strikes at `place`, a phase and a step of it."""
    for seed in itertools.count():
        choices = Trouble(Fault(kind, 0), seed)._choices("place")
        if (choices.choice(PHASES), choices.randrange(STEPS)) == place:
            return seed
    raise AssertionError


@pytest.mark.parametrize(
    ("phase", "step"),
    [
        ("together", 1),  # the others wait in DDP's second forward pass
        pytest.param("collectives", 2, marks=pytest.mark.thorough),
        pytest.param("speed", 0, marks=pytest.mark.thorough),
        pytest.param("alone", 0, marks=pytest.mark.thorough),  # where DDP is built
        pytest.param("together", 2, marks=pytest.mark.thorough),  # in the reducer's all-reduce
    ],
)
def test_a_rank_that_hangs_in_its_own_code_says_where_and_those_that_wait_are_not_accused(
    phase: str, step: int, tmp_path: Path
) -> None:
    flags = ("--out", tmp_path / "verify.json", *SMALL, "--inject=stall@2", "--seed", seed_for("stall", phase, step))
    with Job(verify_with_a_patient_victim, 3, 2, *flags) as job:
        outcomes = job.wait(60)
    assert [outcome.code for outcome in outcomes] == [1, 1, 1], outcomes[0].output
    (finding,) = report(tmp_path)["findings"]
    assert (finding["severity"], finding["ranks"]) == ("missing", [2])
    assert re.search(r"hangs in strike \(faults\.py, line \d+\), last seen in " + phase, finding["what"])


def verify_with_a_hanging_evaluation(victim: int, *flags: object) -> None:
    """One rank does not come back from the evaluation after its training together."""
    original = loop.evaluate

    def evaluate(training: loop.Training, *arguments: Any) -> Any:
        if training.world.ranks.world_size > 1 and os.environ["RANK"] == str(victim):
            time.sleep(60)
        return original(training, *arguments)

    with patch.object(loop, "evaluate", evaluate):
        verify_with_a_patient_victim(victim, *flags)


@pytest.mark.thorough
def test_a_rank_that_hangs_in_the_evaluation_says_where(tmp_path: Path) -> None:
    victim = 1
    with Job(verify_with_a_hanging_evaluation, 2, victim, "--out", tmp_path / "verify.json", *SMALL) as job:
        outcomes = job.wait(60)
    assert [outcome.code for outcome in outcomes] == [1, 1], outcomes[0].output
    (finding,) = report(tmp_path)["findings"]
    assert finding["ranks"] == [victim]
    assert "hangs in evaluate (test_verify.py, line " in finding["what"]


# ---- the long form


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["flip", "warp", "slow", "wrong", "kill"])
def test_each_fault_is_found_every_time(kind: str, tmp_path: Path) -> None:
    choices, plans = random.Random(kind), dict[int, dict[str, Plan]]()
    for number in range(TRIES):
        size = choices.choice((2, 3, 4))
        victim, seed = choices.randrange(size), choices.randrange(2**32)
        if kind == "kill":
            (folder := tmp_path / str(number)).mkdir()
            rehearse_kill(size, victim, seed, folder)
        else:
            plans.setdefault(size, {})[f"{number} {victim}"] = Plan((f"--inject={kind}@{victim}", f"--seed={seed}"))
    for size, planned in plans.items():
        for name, (codes, outputs, folder) in end_each(tmp_path, size, planned, 60 * len(planned)).items():
            check(kind, int(name.split()[1]), codes, outputs[0], folder)
    print(f"{kind}: found, and the right rank named, in {TRIES} of {TRIES} tries")


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_clean_runs_raise_no_alarm(tmp_path: Path) -> None:
    choices = random.Random("clean")
    for size in (2, 3, 4):
        plans = {f"{size} {number}": Plan((f"--seed={choices.randrange(2**32)}",)) for number in range(CLEAN_RUNS // 3)}
        for codes, outputs, folder in end_each(tmp_path, size, plans, 60 * len(plans)).values():
            assert codes == [0] * size, outputs[0]
            assert report(folder)["findings"] == []
    print(f"no finding, not even a warning, in {CLEAN_RUNS} clean runs")
