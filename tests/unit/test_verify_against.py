"""An earlier report by itself: what of it can be used, and what a difference means."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ddp_circles.errors import UserError
from ddp_circles.verify import against
from ddp_circles.verify.against import Past
from ddp_circles.verify.inventory import Inventory
from ddp_circles.verify.oracle import Run, Workload

WORKLOAD = Workload((4, 4), 8, 2)
GPU, CPU = "torch 1, GPU", "torch 1, cpu"
SIZES = (4, 64)


def rank(host: str, number: int, kind: str = GPU, backend: str = "nccl 2") -> Inventory:
    return {"host": host, "uuid": f"{number}", "kind": kind, "backend": backend, "package": "p"}


def ranks(hosts: str = "aabb", **changes: str) -> list[Inventory]:
    return [rank(host, number, **changes) for number, host in enumerate(hosts)]


def earlier(inventory: list[Inventory], *runs: Run) -> dict[str, Any]:
    """The content of a verify.json; each run is that of a round, from seed 7 on."""
    kinds = sorted({one["kind"] for one in inventory})
    return {
        "passed": True,
        "complete": True,
        "inventory": inventory,
        "workload": asdict(WORKLOAD),
        "speed": {
            "compute": {"seconds": [0.1 * (number + 1) for number in range(len(inventory))]},
            "collectives": [
                {"operation": operation, "bytes": size, "bus_bandwidth": 1e9 * size}
                for operation in ("broadcast", "all-gather")
                for size in SIZES
            ],
        },
        "oracle": {
            "told": [
                {"seed": 7 + number, "kinds": [{"kind": kind} | asdict(run) for kind in kinds]}
                for number, run in enumerate(runs)
            ]
        },
    }


RUN = Run("a", [1, 2, 3], "k")
CONTENT = earlier(ranks(), RUN, Run("b", [4], "l"))


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Past]:
    """Write and read a report, for a job."""

    def write_and_read(
        content: object, seed: int = 7, workload: Workload = WORKLOAD, job: list[Inventory] | None = None
    ) -> Past:
        file = tmp_path / "old.json"
        file.write_text(json.dumps(content))
        return against.read_past(file, seed, workload, job or ranks())

    return write_and_read


def test_an_earlier_report_is_read(read: Callable[..., Past]) -> None:
    past = read(CONTENT)
    assert past.runs == {7: {GPU: RUN}, 8: {GPU: Run("b", [4], "l")}}
    assert past.seconds == {GPU: pytest.approx(0.25)}
    assert past.factor == 1.3
    assert past.bandwidths == {("broadcast", 64): 64e9, ("all-gather", 64): 64e9}
    assert past.lines == [f"Compared with {past.file}: {GPU}."]


@pytest.mark.parametrize(
    ("job", "linked"),
    [
        (ranks("ccdd"), True),
        (ranks("abcd"), False),  # more hosts
        (ranks("aab"), False),
        (ranks(backend="nccl 3"), False),
        (ranks(kind="torch 1, other GPU"), False),
    ],
)
def test_bandwidths_are_compared_only_where_ranks_lie_alike(
    job: list[Inventory], linked: bool, read: Callable[..., Past]
) -> None:
    assert bool(read(CONTENT, job=job).bandwidths) == linked


def test_those_of_cpus_and_of_single_ranks_never_are(read: Callable[..., Past]) -> None:
    for job in (ranks(backend="gloo"), ranks("a")):
        assert read(earlier(job, RUN), job=job).bandwidths == {}


def test_ranks_that_shared_a_device_are_given_more_time(read: Callable[..., Past]) -> None:
    shared = [rank("a", 0), rank("a", 0)]
    assert read(earlier(shared, RUN), job=ranks("aa")).factor == against.SHARED_FACTOR
    assert read(earlier(ranks("aa"), RUN), job=shared).factor == against.SHARED_FACTOR


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passed": False}, "did not pass"),
        ({"passed": False, "complete": False}, "is not complete"),
        ({"oracle": {}}, "no report that this version can read"),
        ({"speed": {"compute": {"seconds": ["fast"]}}}, "no report that this version can read"),
        (
            {"speed": CONTENT["speed"] | {"collectives": [{"operation": "x", "bytes": 1, "bus_bandwidth": "fast"}]}},
            "no report that this version can read",
        ),
        ({"inventory": [{}]}, "no report that this version can read"),
        ({"workload": None}, "no report that this version can read"),
    ],
)
def test_a_report_that_cannot_be_used_is_refused(
    change: dict[str, Any], message: str, read: Callable[..., Past]
) -> None:
    with pytest.raises(UserError, match=f"--against .*old.json.* {message}"):
        read(CONTENT | change)


@pytest.mark.parametrize("content", [[], 5, {}, {"passed": True}])
def test_what_is_no_report_is_refused(content: object, read: Callable[..., Past]) -> None:
    with pytest.raises(UserError, match=r"--against .*old.json .*name an earlier verify.json"):
        read(content)


def test_another_seed_or_training_is_refused_with_the_cure(read: Callable[..., Past]) -> None:
    with pytest.raises(UserError, match="has no digest for --seed 9: give --seed 7 or 8"):
        read(CONTENT, seed=9)
    with pytest.raises(UserError, match="16 of 2: verify with 1 to 8 ranks"):
        read(CONTENT, workload=Workload((4, 4), 16, 2))


def test_another_kind_is_named_whatever_its_seed(read: Callable[..., Past]) -> None:
    past = read(CONTENT, seed=9, job=ranks(kind=CPU))
    assert past.lines == [f"Not compared with {past.file}: it is of kind {GPU}, this is {CPU}."]
    assert against.judge_trainings(past, 7, {CPU: [0, 1, 2, 3]}, [RUN] * 4) == []


def test_another_version_of_the_package_is_not_compared(read: Callable[..., Past]) -> None:
    content = copy.deepcopy(CONTENT)
    for one in content["inventory"]:
        one["package"] = "q"
    past = read(content, seed=9)
    assert "Not compared" in past.lines[0]
    assert not past.runs
    assert not past.seconds
    assert not past.bandwidths


# ---- judgement

OTHER, LATER, HIDDEN = Run("x", [0, 2, 3], "x"), Run("y", [1, 2, 0], "y"), Run("a", [1, 2, 3], "z")


@pytest.mark.parametrize(
    ("alone", "blamed", "words"),
    [
        ([RUN, RUN, RUN], None, ""),
        ([RUN, OTHER, RUN], (1,), "from step 0 on"),
        ([RUN, LATER, OTHER], (1, 2), "from step 0 on"),
        ([LATER, LATER, HIDDEN], (0, 1, 2), "(all of this kind) computed otherwise than in f, from step 2 on"),
        ([RUN, RUN, HIDDEN], (2,), "in its gradients, which rounding then hid"),
    ],
)
def test_the_ranks_that_depart_from_the_earlier_report_are_named(
    alone: list[Run], blamed: tuple[int, ...] | None, words: str
) -> None:
    past = Past("f", {7: {GPU: RUN}})
    findings = against.judge_trainings(past, 7, {GPU: [0, 1, 2]}, alone)
    assert [finding.ranks for finding in findings] == ([] if blamed is None else [blamed])
    for finding in findings:
        assert (finding.severity, finding.check) == ("wrong", "against")
        assert words in finding.what
        assert ("a third machine" in finding.advice) == (len(finding.ranks) == 3)
    assert against.judge_trainings(past, 8, {GPU: [0, 1, 2]}, alone) == []


def test_kinds_are_held_against_themselves() -> None:
    past = Past("f", {7: {GPU: RUN, CPU: OTHER}})
    fleet = {CPU: [0], GPU: [1, 2], "new": [3]}
    assert against.judge_trainings(past, 7, fleet, [OTHER, RUN, RUN, LATER]) == []
    (finding,) = against.judge_trainings(past, 7, fleet, [RUN, RUN, RUN, LATER])
    assert finding.ranks == (0,)


@pytest.mark.parametrize(("factor", "seconds", "slow"), [(1.3, 1.29, False), (1.3, 1.31, True), (3.0, 2.9, False)])
def test_a_kind_is_warned_about_above_the_factor(factor: float, seconds: float, slow: bool) -> None:
    past = Past("f", seconds={GPU: 1.0, CPU: 1.0}, factor=factor)
    findings = against.judge_speed(past, {GPU: [0, 2, 3]}, [9.0, 9.0, seconds, 0.5], [])
    assert [(finding.severity, finding.ranks) for finding in findings] == ([("warning", (0, 2, 3))] if slow else [])


def test_a_slow_link_is_warned_about_at_the_largest_size_alone() -> None:
    past = Past("f", bandwidths={("broadcast", 64): 10.0, ("all-gather", 64): 10.0})
    rows = [
        {"operation": operation, "bytes": size, "bus_bandwidth": rate}
        for operation, size, rate in (("broadcast", 4, 0.1), ("broadcast", 64, 4.9), ("all-gather", 64, 5.1))
    ]
    (finding,) = against.judge_speed(past, {}, [], rows)
    assert (finding.severity, finding.ranks) == ("warning", ())
    assert "broadcast of 64 bytes" in finding.what
    assert against.judge_speed(past, {}, [], rows[:1]) == []
