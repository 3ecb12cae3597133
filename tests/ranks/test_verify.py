"""The verifier over several ranks: faults on order, real ones, and none; who is named, and how soon all is over.

The long form, with 20 tries for each kind of fault and 50 clean runs: `bash launch/test.sh -m long tests/ranks -s`
"""

import functools
import gc
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddp_circles.verify import LAST_WORDS_SECONDS
from tests.harness.ranks import LAUNCHER_VARIABLES, Job, Outcome

SMALL = ("--device=cpu", "--max-bytes=16384")
KINDS = ("flip", "slow", "wrong", "die")
TRIES, CLEAN_RUNS = 20, 50


def verify(*flags: object) -> None:
    """Run the verifier's command line in this rank; where rank 0 refuses, the others do not wait long."""
    import sys

    from ddp_circles import cli

    cli.RANK_0_SPEAKS_SECONDS = 0.1
    sys.argv = ["verify", *map(str, flags)]
    module.main()


def run(size: int, folder: Path, *flags: object, function: Callable[..., None] = verify) -> list[Outcome]:
    """How each rank ends."""
    with Job(function, size, "--out", folder / "verify.json", *SMALL, *flags) as job:
        return job.wait(100)


def report(folder: Path) -> dict[str, Any]:
    """What verify.json says."""
    content: dict[str, Any] = json.loads((folder / "verify.json").read_text())
    return content


def check(kind: str, victim: int, outcomes: list[Outcome], folder: Path) -> None:
    """The fault was found, the right rank is named, and no other."""
    told = "\n".join(outcome.output for outcome in outcomes)
    survivors = [outcome for outcome in outcomes if kind != "die" or outcome.rank != victim]
    assert {outcome.code for outcome in survivors} == {0 if kind == "slow" else 1}, told
    if kind == "die":
        assert outcomes[victim].code == -signal.SIGKILL
        assert all(f"missing: rank {victim} " in outcome.output for outcome in survivors), told
        if victim == 0:
            assert not (folder / "verify.json").exists()
            return
    content = report(folder)
    assert content["complete"] == (kind != "die")
    assert content["passed"] == (kind == "slow")
    severity = {"die": "missing", "slow": "warning"}.get(kind, "wrong")
    assert content["findings"], told
    assert {(finding["severity"], *finding["ranks"]) for finding in content["findings"]} == {(severity, victim)}, told
    checks = {"flip": ("training",), "wrong": ("collectives",), "slow": ("speed",), "die": ("ranks",)}[kind]
    assert all(finding["check"].startswith(checks) for finding in content["findings"])


def rehearse(kind: str, size: int, victim: int, seed: int, folder: Path) -> None:
    """Order a fault and look whether it is found."""
    folder.mkdir(exist_ok=True)
    check(kind, victim, run(size, folder, f"--inject={kind}@{victim}", "--seed", seed), folder)


@pytest.mark.parametrize(
    ("kind", "size", "victim", "seed"),
    [
        ("flip", 2, 1, 2),
        ("flip", 4, 3, 3),
        ("wrong", 2, 1, 1),
        ("wrong", 3, 0, 2),
        ("wrong", 4, 2, 3),
        ("slow", 2, 1, 1),
        ("slow", 3, 2, 2),
        ("die", 3, 1, 1),
        ("die", 2, 0, 2),
    ],
)
def test_an_ordered_fault_is_found_and_the_right_rank_named(
    kind: str, size: int, victim: int, seed: int, tmp_path: Path
) -> None:
    rehearse(kind, size, victim, seed, tmp_path)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_clean_run_passes(size: int, tmp_path: Path) -> None:
    outcomes = run(size, tmp_path)
    assert [outcome.code for outcome in outcomes] == [0] * size, outcomes[0].output
    content = report(tmp_path)
    assert (content["passed"], content["complete"], content["findings"]) == (True, True, [])
    assert [len(content["inventory"]), len(content["speed"]["compute"]["seconds"])] == [size, size]
    assert {row["operation"]: row["wrong"] for row in content["collectives"]["operations"]} == {
        "broadcast": 0, "all-reduce sum": 0, "all-reduce max": 0, "all-gather": 0,
    }  # fmt: skip
    (kind,) = content["oracle"]["kinds"]
    assert (kind["alone"], kind["together"]) == (f"{size} of {size} agree", f"{size} of {size} agree, as alone")
    assert "PASSED" in outcomes[0].output
    assert all(outcome.output == "" for outcome in outcomes[1:])


def verify_plainly(*flags: object) -> None:
    """Run the verifier in a process that knows of no launcher."""
    for name in list(os.environ):
        if name.startswith((*LAUNCHER_VARIABLES, "LOCAL_")):
            del os.environ[name]
    verify(*flags)


def test_one_plain_process_says_what_it_cannot_see(tmp_path: Path) -> None:
    (outcome,) = run(1, tmp_path, function=verify_plainly)
    assert outcome.code == 0, outcome.output
    content = report(tmp_path)
    assert (content["passed"], content["job"]) == (True, "1 rank (one process), cpu, gloo")
    assert list(content["oracle"]["told"][0]["again"]) == ["0"]
    assert "A fault that repeats to the bit is not seen" in " ".join(outcome.output.split())


@pytest.mark.parametrize("kind", ["flip", "wrong"])
def test_one_rank_finds_its_own_faults_by_itself(kind: str, tmp_path: Path) -> None:
    rehearse(kind, 1, 0, 1, tmp_path)


def test_the_digest_depends_on_the_seed_alone(tmp_path: Path) -> None:
    digests = []
    for size, seed in ((1, 5), (3, 5), (2, 6)):
        (folder := tmp_path / f"{size}").mkdir()
        run(size, folder, "--seed", seed)
        digests.append(report(folder)["oracle"]["kinds"][0]["digest"])
    assert digests[0] == digests[1] != digests[2]


def verify_and_count_replicas(*flags: object) -> None:
    """Print how many replicas of the model are still there at the end."""
    from torch.nn.parallel import DistributedDataParallel

    try:
        verify(*flags)
    finally:
        gc.collect()
        print(f"{sum(type(left) is DistributedDataParallel for left in gc.get_objects())} replicas left")


def test_a_soak_counts_its_rounds_and_what_was_wrong_in_them(tmp_path: Path) -> None:
    outcomes = run(2, tmp_path, "--minutes=0.05", "--inject=wrong@1", function=verify_and_count_replicas)
    assert "\n0 replicas left\n" in f"\n{outcomes[1].output}"
    assert [outcome.code for outcome in outcomes] == [1, 1]
    content = report(tmp_path)
    rounds = content["oracle"]["rounds"]
    assert rounds > 1
    assert content["oracle"]["failed_rounds"] == 0
    assert [[finding["ranks"], finding["times"]] for finding in content["findings"]] == [[[1], rounds]]
    assert f"round {rounds}: 0 clean, {rounds} not, " in outcomes[0].output


# ---- ranks that fall silent


def wait_for(job: Job, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def verify_and_tell(folder: Path, patience: float, *flags: object) -> None:
    """Leave a file when the checks have begun; of a timeout of 20 seconds, wait for `patience`."""
    from ddp_circles.verify import __main__ as module
    from ddp_circles.verify import speed

    module.LAST_WORDS_SECONDS = 20 - patience
    original = speed.measure

    def measure(*arguments: Any) -> Any:
        (folder / f"rank{os.environ['RANK']}").touch()
        return original(*arguments)

    setattr(speed, "measure", measure)  # noqa: B010 - a plain assignment has another type
    verify(*flags)


@pytest.mark.parametrize("patience", [3, pytest.param(10, marks=pytest.mark.long)])
def test_a_frozen_rank_is_named_and_the_others_end_within_the_timeout(patience: float, tmp_path: Path) -> None:
    frozen, timeout = 1, 20
    flags = ("--out", tmp_path / "verify.json", "--device=cpu", f"--timeout={timeout}", "--minutes=1")
    with Job(verify_and_tell, 3, tmp_path, patience, *flags) as job:
        wait_for(job, (tmp_path / f"rank{frozen}").exists)
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


@pytest.mark.long
def test_a_frozen_rank_that_holds_the_store_is_named_too(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    flags = ("--out", tmp_path / "verify.json", "--device=cpu", "--timeout=20", "--minutes=1")
    with Job(verify_and_tell, 3, tmp_path, 3, *flags, environment=environment) as job:
        wait_for(job, (tmp_path / "rank0").exists)
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


def verify_impatiently(*flags: object) -> None:
    """Wait for three seconds only."""
    from ddp_circles.verify import __main__ as module

    module.LAST_WORDS_SECONDS = 17.0
    verify(*flags)


def test_a_rank_that_hangs_in_its_own_code_says_where(tmp_path: Path) -> None:
    outcomes = run(3, tmp_path, "--inject=hang@2", "--timeout=20", function=verify_impatiently)
    assert {outcome.code for outcome in outcomes} == {1}
    (finding,) = report(tmp_path)["findings"]
    assert (finding["severity"], finding["ranks"]) == ("missing", [2])
    assert "hangs in _strike (injection.py, line " in finding["what"]


def test_a_request_to_stop_ends_all_ranks_with_a_report(tmp_path: Path) -> None:
    flags = ("--out", tmp_path / "verify.json", *SMALL, "--minutes=5")
    with Job(verify_and_tell, 2, tmp_path, 20 - LAST_WORDS_SECONDS, *flags) as job:
        wait_for(job, lambda: all((tmp_path / f"rank{rank}").exists() for rank in range(2)))
        job.signal(signal.SIGTERM)
        outcomes = job.wait(30)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert "asked to end by SIGTERM" in outcomes[0].output + outcomes[1].output
    content = report(tmp_path)
    assert (content["passed"], content["complete"]) == (False, False)
    assert [finding["ranks"] for finding in content["findings"]] == [[]]


# ---- faults that nobody ordered


def verify_with_a_lasting_fault(victim: int, *flags: object) -> None:
    """One rank computes its losses wrong, always in the same way."""
    from ddp_circles.models import loss_sum as original
    from ddp_circles.verify import oracle

    def loss_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return original(logits, targets) * (1 + 2.0**-20)

    if os.environ["RANK"] == str(victim):
        setattr(oracle, "loss_sum", loss_sum)  # noqa: B010 - a plain assignment has another type
    verify(*flags)


def test_a_lasting_fault_is_told_from_a_passing_one(tmp_path: Path) -> None:
    outcomes = run(3, tmp_path, function=functools.partial(verify_with_a_lasting_fault, 2))
    assert {outcome.code for outcome in outcomes} == {1}
    (finding,) = report(tmp_path)["findings"]
    assert (finding["check"], finding["ranks"]) == ("training alone", [2])
    assert "a lasting fault" in finding["what"]


def test_two_ranks_cannot_tell_whose_a_lasting_fault_is(tmp_path: Path) -> None:
    outcomes = run(2, tmp_path, function=functools.partial(verify_with_a_lasting_fault, 1))
    assert {outcome.code for outcome in outcomes} == {1}
    (finding,) = report(tmp_path)["findings"]
    assert finding["ranks"] == []
    assert "it cannot be said which of them is wrong" in finding["what"]
    assert finding["advice"].startswith("verify again with more ranks")


def verify_with_a_wrong_addition(*flags: object) -> None:
    """Large sums of float32 come out wrong on all ranks, though every rank sends what it should."""
    from torch import distributed

    original = distributed.all_reduce

    def all_reduce(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        work = original(tensor, *arguments, **options)
        if tensor.dtype == torch.float32 and tensor.numel() == 4095:
            tensor[17] += 1
        return work

    setattr(distributed, "all_reduce", all_reduce)  # noqa: B010 - a plain assignment has another type
    verify(*flags)


def test_where_the_addition_itself_is_wrong_no_rank_is_accused(tmp_path: Path) -> None:
    outcomes = run(3, tmp_path, function=verify_with_a_wrong_addition)
    assert {outcome.code for outcome in outcomes} == {1}
    (finding,) = report(tmp_path)["findings"]
    assert (finding["check"], finding["ranks"]) == ("collectives", [])
    assert "of 4095 float32" in finding["what"]
    assert "rank 0 at offset 17 expected" in finding["what"]


def verify_as_a_mixed_fleet(*flags: object) -> None:
    """The last rank is of another kind, and rounds otherwise."""
    if os.environ["RANK"] == "2":
        os.environ["MKL_CBWR"] = "COMPATIBLE"
        verify_with_a_lasting_fault(2, *flags)
    verify(*flags)


def test_a_mixed_fleet_is_compared_within_each_kind_and_says_so(tmp_path: Path) -> None:
    outcomes = run(3, tmp_path, function=verify_as_a_mixed_fleet)
    assert {outcome.code for outcome in outcomes} == {0}, outcomes[0].output
    content = report(tmp_path)
    assert [finding["severity"] for finding in content["findings"]] == ["warning"]
    assert content["findings"][0]["what"] == "mkl cbwr differs: none on ranks 0-1; COMPATIBLE on rank 2"
    assert [kind["ranks"] for kind in content["oracle"]["kinds"]] == [[0, 1], [2]]
    assert "compared within each kind, and" in " ".join(outcomes[0].output.split())


# ---- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--inject", "flip@3"), "--inject names rank 3"),
        (("--out", "/nowhere/verify.json"), "--out /nowhere/verify.json cannot be written"),
        (("--max-byte", "3"), "--max-byte"),
        (("--backend", "nccl"), "--backend nccl"),
    ],
)
def test_bad_input_is_said_once_and_ends_with_2(flags: tuple[str, ...], message: str) -> None:
    with Job(verify, 3, "--device=cpu", *flags) as job:
        outcomes = job.wait(60)
    assert [outcome.code for outcome in outcomes] == [2, 2, 2]
    assert message in outcomes[0].output
    assert [outcome.output for outcome in outcomes[1:]] == ["", ""]
    assert "Traceback" not in outcomes[0].output


# ---- the long form


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_is_found_every_time(kind: str, tmp_path: Path) -> None:
    choices = random.Random(kind)
    for number in range(TRIES):
        size = choices.choice((2, 3, 4))
        rehearse(kind, size, choices.randrange(size), choices.randrange(2**32), tmp_path / str(number))
    print(f"{kind}: found, and the right rank named, in {TRIES} of {TRIES} tries")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_clean_runs_raise_no_alarm(tmp_path: Path) -> None:
    choices = random.Random("clean")
    for _ in range(CLEAN_RUNS):
        outcomes = run(choices.choice((2, 3, 4)), tmp_path, "--seed", choices.randrange(2**32))
        assert {outcome.code for outcome in outcomes} == {0}, outcomes[0].output
        assert report(tmp_path)["findings"] == []
    print(f"no finding, not even a warning, in {CLEAN_RUNS} clean runs")
