"""The parts of `ddp_circles.verify` by themselves: patterns, whose fault it is, what is slow, what the report says."""

import json
import threading
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore

from ddp_circles.errors import UserError
from ddp_circles.fixed_point import GRADIENT_BITS, quantize
from ddp_circles.job.faults import Fault
from ddp_circles.job.ranks import spell_ranks
from ddp_circles.job.rehearsal import INTEGERS, NEIGHBOURS, spoil, spoil_next_gradient
from ddp_circles.models import loss_sum
from ddp_circles.verify import collectives, oracle, speed, verdict
from ddp_circles.verify.board import Board
from ddp_circles.verify.collectives import Case, Wrong
from ddp_circles.verify.findings import Finding, failed, merged, worst_first
from ddp_circles.verify.injection import Trouble
from ddp_circles.verify.inventory import Inventory, ranks_by
from ddp_circles.verify.oracle import Run, Together
from ddp_circles.verify.report import Report
from ddp_circles.verify.settings import FAULTS, Settings
from ddp_circles.verify.speed import Timing
from tests.harness.runs import PROJECT

CPU = torch.device("cpu")
WORLDS = st.one_of(st.integers(1, 40), st.sampled_from([100, 256, 257, 1000]))


# ---- patterns


@settings(deadline=None, max_examples=40)
@given(
    world_size=WORLDS,
    dtype=st.sampled_from(list(collectives.DTYPES)),
    seed=st.integers(0, 2**32 - 1),
    start=st.integers(0, 5000),
)
def test_sum_and_maximum_are_those_of_the_contributions(world_size: int, dtype: str, seed: int, start: int) -> None:
    for operation in ("all-reduce sum", "all-reduce max"):
        case = Case(operation, dtype, seed, start + 7, start)
        sent = [collectives.contribution(case, rank, world_size, CPU) for rank in range(world_size)]
        exact = torch.stack(sent).to(torch.float64 if dtype != "int64" else torch.int64)
        assert (exact >= 0).all()
        assert (exact.sum(0) <= collectives.LIMITS[dtype]).all()  # so every partial sum is exact, in any order
        result = exact.sum(0) if operation == "all-reduce sum" else exact.max(0).values
        right = collectives.expected(case, world_size, CPU)
        assert right.dtype == collectives.DTYPES[dtype]
        assert torch.equal(right.to(exact.dtype), result)


def test_ranks_contribute_different_numbers() -> None:
    for dtype in collectives.DTYPES:
        case = Case("all-reduce sum", dtype, 1, 64)
        sent = [collectives.contribution(case, rank, 4, CPU).tolist() for rank in range(4)]
        assert all(len(set(values)) == 4 for values in zip(*sent, strict=True))


@pytest.mark.parametrize("operation", ["broadcast", "all-gather"])
def test_what_is_moved_uses_every_bit(operation: str) -> None:
    for dtype in collectives.DTYPES:
        sent = collectives.contribution(Case(operation, dtype, 1, 4096), 1, 4, CPU)
        integers = sent.view(INTEGERS[sent.dtype.itemsize])
        for bit in range(8 * sent.dtype.itemsize):
            assert 1500 < int(((integers >> bit) & 1).sum()) < 2600


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
@pytest.mark.parametrize("max_bytes", [1, 100, 4 * 2**20])
def test_cases_go_from_one_element_to_the_largest_buffer(world_size: int, max_bytes: int) -> None:
    todo = collectives.cases(world_size, max_bytes, collectives.DTYPES, 3)
    for operation in collectives.OPERATIONS:
        for dtype, kind in collectives.DTYPES.items():
            sizes = [case.elements for case in todo if (case.operation, case.dtype) == (operation, dtype)]
            most = max(1, max_bytes // kind.itemsize)
            assert min(sizes) == 1
            assert max(sizes) == (max(1, most // world_size) if operation == "all-gather" else most)
    assert {case.root for case in todo if case.operation == "broadcast"} == set(range(world_size))


def test_one_bit_is_found_wherever_it_is() -> None:
    case = Case("all-gather", "float32", 5, 10)
    right = collectives.expected(case, 3, CPU)
    assert collectives.compare(case, 7, 2, right.clone(), right) == []
    for offset in (0, 13, 29):
        received = right.clone()
        received.view(torch.int32)[offset] ^= 1 << 13
        (wrong,) = collectives.compare(case, 7, 2, received, right)
        assert (wrong.case, wrong.rank, wrong.count, wrong.sources) == (7, 2, 1, [offset // 10])
        assert wrong.examples[0]["offset"] == offset
        assert wrong.examples[0]["expected"] != wrong.examples[0]["seen"]


def test_a_zero_with_a_sign_is_wrong() -> None:
    case = Case("all-reduce sum", "float32", 5, 2)
    (wrong,) = collectives.compare(case, 0, 0, torch.tensor([1.0, -0.0]), torch.tensor([1.0, 0.0]))
    assert wrong.examples == [{"offset": 1, "expected": "0.0", "seen": "-0.0"}]


# ---- whose fault a wrong collective is

SUM, MOVED = Case("all-reduce sum", "float32", 0, 40), Case("broadcast", "int64", 0, 40, root=1)
GATHER = Case("all-gather", "int64", 0, 40)


def wrong(case: int, rank: int, *sources: int, offset: int = 0) -> Wrong:
    return Wrong(case, rank, 1, list(sources), [{"offset": offset, "expected": "1", "seen": "2"}])


@pytest.mark.parametrize(
    ("case", "world_size", "found", "closer", "blamed"),
    [
        (MOVED, 4, [wrong(0, 0, 1), wrong(0, 2, 1), wrong(0, 3, 1)], [], (1,)),  # all but the source: the source
        (MOVED, 4, [wrong(0, rank, 1) for rank in range(4)], [], (1,)),  # the source's own copy too
        (MOVED, 4, [wrong(0, 3, 1)], [], (3,)),  # one receiver
        (MOVED, 2, [wrong(0, 0, 1)], [], (0,)),
        (MOVED, 2, [wrong(0, 0, 1), wrong(0, 1, 1)], [], (1,)),
        (GATHER, 3, [wrong(0, rank, 2) for rank in range(3)], [], (2,)),
        (GATHER, 3, [wrong(0, 1, 0, 1, 2)], [], (1,)),  # one receiver gets much wrong
        (SUM, 3, [wrong(0, 1)], [], (1,)),
        (SUM, 3, [wrong(0, rank) for rank in range(3)], [wrong(0, rank, 2) for rank in range(3)], (2,)),
        (SUM, 2, [wrong(0, rank) for rank in range(2)], [wrong(0, rank, 0) for rank in range(2)], (0,)),
        (SUM, 3, [wrong(0, rank) for rank in range(3)], [], ()),  # the addends are right: nobody can be named
        (SUM, 1, [wrong(0, 0)], [], (0,)),
    ],
)
def test_who_is_blamed_for_a_wrong_collective(
    case: Case, world_size: int, found: list[Wrong], closer: list[Wrong], blamed: tuple[int, ...]
) -> None:
    (finding,) = verdict.judge_collectives([case], found, closer, world_size)
    assert (finding.severity, finding.ranks) == ("wrong", blamed)
    assert str(case) in finding.what
    assert finding.advice
    if not blamed:
        assert "addend" in finding.what


def test_only_sums_that_are_wrong_everywhere_are_looked_into() -> None:
    found = [wrong(0, 1), *(wrong(1, rank, offset=33) for rank in range(3)), *(wrong(2, rank, 1) for rank in range(3))]
    ((number, case),) = verdict.look_closer([SUM, SUM, GATHER], found, 3)
    assert number == 1
    assert case.operation == "all-gather of addends"
    assert case.start <= 33 < case.stop
    assert case.elements * 3 <= SUM.elements


def test_two_ranks_are_told_what_cannot_be_known() -> None:
    (finding,) = verdict.judge_collectives([MOVED], [wrong(0, 0, 1)], [], 2)
    assert "cannot be ruled out" in finding.what
    (finding,) = verdict.judge_collectives([MOVED], [wrong(0, 0, 1)], [], 3)
    assert "cannot be ruled out" not in finding.what


# ---- speed


@settings(deadline=None)
@given(st.lists(st.floats(1.0, 1.9), min_size=2, max_size=50))
def test_noise_below_the_factor_is_no_outlier(seconds: list[float]) -> None:
    assert verdict.judge_speed(seconds, [range(len(seconds))], 2.0) == []


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_a_rank_with_three_times_the_work_is_an_outlier(size: int) -> None:
    for rank in range(size):
        seconds = [1.0 + 0.05 * other for other in range(size)]
        seconds[rank] *= 3
        (finding,) = verdict.judge_speed(seconds, [range(size)], 2.0)
        assert (finding.severity, finding.ranks) == ("warning", (rank,))
        assert ("with two ranks" in finding.what) == (size == 2)


def test_ranks_are_compared_with_their_kind_only() -> None:
    assert verdict.judge_speed([1.0, 1.0, 9.0, 9.1], [[0, 1], [2, 3]], 2.0) == []
    assert verdict.judge_speed([1.0, 1.0, 9.0], [[0, 1], [2]], 2.0) == []


def test_where_ranks_vary_much_the_deviations_decide() -> None:
    seconds = [1.0, 2.0, 3.0, 4.0, 5.0, 6.5]
    assert verdict.judge_speed(seconds, [range(6)], 2.0) == []
    seconds[-1] = 3.0 + 5 * 1.4826 * 1.0 + 0.01  # the others' median and median absolute deviation are 3 and 1
    assert [finding.ranks for finding in verdict.judge_speed(seconds, [range(6)], 2.0)] == [(5,)]


def test_bandwidths_are_defined_as_in_nccl_tests() -> None:
    timings = [[Timing(operation, 4000, 1e-3, 1e-5) for operation in speed.OPERATIONS]] * 4
    broadcast, reduce, gather = speed.bandwidths(timings)
    assert [row["algorithm_bandwidth"] for row in (broadcast, reduce, gather)] == pytest.approx([4e6] * 3)
    assert broadcast["bus_bandwidth"] == pytest.approx(4e6)
    assert reduce["bus_bandwidth"] == pytest.approx(4e6 * 2 * 3 / 4)
    assert gather["bus_bandwidth"] == pytest.approx(4e6 * 3 / 4)


def test_three_times_the_work_takes_longer() -> None:
    assert 0 < 1.5 * speed.time_computing(CPU, 1) < speed.time_computing(CPU, 3)


def test_sizes_end_at_the_largest() -> None:
    assert speed.sizes(4 * 2**20) == [4, 64, 1024, 16384, 262144, 4194304]
    assert speed.sizes(1000) == [4, 64, 1000]
    assert speed.sizes(1) == [4]


# ---- the training oracle's judgement


def alone(*keys: str) -> list[Run]:
    return [Run(key, [1, 2, 3 if key == keys[0] else 0], key) for key in keys]


def test_a_minority_is_named() -> None:
    runs = alone("a", "b", "a", "a")
    assert verdict.ranks_to_repeat([range(4)], runs) == [0, 1, 2, 3]
    lasting, passing = dict(enumerate(runs)), dict(enumerate(alone("a", "c", "a", "a")))
    for again, words in ((lasting, "a lasting fault"), (passing, "comes and goes")):
        (finding,) = verdict.judge_alone(range(4), runs, again)
        assert (finding.severity, finding.ranks) == ("wrong", (1,))
        assert words in finding.what
        assert "ranks 0, 2-3" in finding.what
        assert "from step 2 on" in finding.what


def test_ranks_that_agree_are_not_repeated() -> None:
    runs = alone("a", "a", "a")
    assert verdict.ranks_to_repeat([range(3)], runs) == []
    assert verdict.judge_alone(range(3), runs, {}) == []


def test_of_two_ranks_the_one_that_departs_from_itself_is_named() -> None:
    runs = alone("a", "b")
    (finding,) = verdict.judge_alone(range(2), runs, dict(enumerate(alone("a", "c"))))
    assert finding.ranks == (1,)
    assert "departs from itself" in finding.what


def test_of_two_ranks_that_each_stay_with_their_result_nobody_is_named() -> None:
    runs = alone("a", "b")
    (finding,) = verdict.judge_alone(range(2), runs, dict(enumerate(runs)))
    assert (finding.severity, finding.ranks) == ("wrong", ())
    assert "it cannot be said which" in finding.what


def test_a_single_rank_is_held_against_itself() -> None:
    assert verdict.ranks_to_repeat([[0, 1], [2]], alone("a", "a", "b")) == [2]
    assert verdict.judge_alone([0], alone("a"), {0: alone("a")[0]}) == []
    (finding,) = verdict.judge_alone([0], alone("a"), {0: alone("b")[0]})
    assert finding.ranks == (0,)


@pytest.mark.parametrize(
    ("together", "blamed"),
    [
        ([Together("a", None, None)] * 3, None),
        # one computed something else, so that the sum is another one for all
        ([Together("x", None, 4), Together("x", 4, 4), Together("x", None, 4)], (1,)),
        # and went on to differ from its own training alone before that
        ([Together("x", None, 4), Together("x", 2, 2), Together("x", None, 4)], (1,)),
        ([Together("x", None, 4)] * 3, ()),  # all parts right, the sum wrong
        ([Together("a", None, None), Together("a", None, None), Together("x", None, 4)], (2,)),  # wrong on one only
        ([Together("a", None, None), Together("x", None, None), Together("a", None, None)], (1,)),  # other weights
        ([Together("x", None, None)] * 3, ()),
    ],
)
def test_who_is_blamed_for_a_wrong_training_together(together: list[Together], blamed: tuple[int, ...] | None) -> None:
    findings = verdict.judge_together(range(3), alone("a", "a", "a"), together, mixed=False)
    assert [finding.ranks for finding in findings] == ([] if blamed is None else [blamed])


def test_a_sum_with_a_wrong_part_in_it_is_not_blamed_on_the_network() -> None:
    together = [Together("x", None, 4), Together("x", None, 4), Together("x", None, 3)]
    assert verdict.judge_together(range(3), alone("a", "a", "b"), together, mixed=False) == []


def test_a_mixed_fleet_is_compared_within_each_kind() -> None:
    runs, together = alone("a", "a", "b", "b"), [Together(key, 0, 0) for key in "xxyy"]
    fleet = [[0, 1], [2, 3]]
    assert verdict.judge_trainings(fleet, runs, together, {}) == []
    together[3] = Together("z", 0, 0)
    assert [finding.ranks for finding in verdict.judge_trainings(fleet, runs, together, {})] == [()]
    section = oracle.section(None, {"p": [0, 1], "q": [2, 3]}, runs, together, {}, seed=1, wrong=True)
    assert "within each kind" in section["method"]
    assert [row["together"] for row in section["kinds"]] == ["2 of 2 agree", "1 of 2 agree"]


def test_a_run_is_held_against_a_run_step_by_step() -> None:
    whole, shares = Run("a", [1, 2, 3], ""), {0: [4, 5, 6], 1: [7, 8, 9]}
    for run, own, account in (
        (Run("a", [1, 2, 3], ""), {1: [7, 8, 9]}, Together("a", None, None)),
        (Run("b", [1, 2, 0], ""), {1: [7, 0, 9]}, Together("b", 1, 2)),
        (Run("b", [1, 2], ""), {1: [7, 8]}, Together("b", 2, 2)),
    ):
        assert oracle.compare(run, own, whole, shares) == account


def test_points_are_exact_and_every_rank_has_a_share() -> None:
    for world_size in (1, 4, 9, 1000):
        workload = oracle.choose_workload(world_size, on_cuda=False)
        assert workload.micro_batches >= world_size
    train_set, test_set = oracle.make_points(oracle.choose_workload(1, on_cuda=False), 3)
    for points, classes in (train_set, test_set):
        assert torch.equal(points * oracle.GRID, (points * oracle.GRID).round())
        assert 0.2 < classes.mean().item() < 0.6


def changed_gradients(fault: Fault | None, seed: int, run: str) -> list[torch.Tensor]:
    """The gradients of all parameters after each step of the oracle has had its chance to be spoiled."""
    workload = oracle.choose_workload(1, on_cuda=False)
    model = oracle.make_model(workload, seed)
    points, classes = oracle.make_points(workload, seed)[1]
    trouble = Trouble(fault, seed)
    for step in range(oracle.STEPS):
        trouble.corrupt(run, step, oracle.STEPS, model)
    loss_sum(model(points), classes).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("place", [None, 5])
@pytest.mark.parametrize("lasting", [False, True])
def test_a_flip_changes_one_bit_that_matters(place: int | None, lasting: bool) -> None:
    fault = Fault("flip", 0, place, lasting)
    for seed in range(8):
        right, wrong, later = (
            changed_gradients(fault if faulty else None, seed, run)
            for faulty, run in ((False, "alone"), (True, "alone"), (True, "alone again"))
        )
        differences = [(was.view(torch.int32) ^ now.view(torch.int32)) for was, now in zip(right, wrong, strict=True)]
        ((change,),) = [found[found != 0].tolist() for found in differences if found.any()]
        assert (change % 2**32).bit_count() == 1
        assert any(
            not torch.equal(quantize(was, GRADIENT_BITS), quantize(now, GRADIENT_BITS))
            for was, now in zip(right, wrong, strict=True)
        )
        pairs = zip(wrong, later, strict=True)
        assert not lasting or all(torch.equal(one.view(torch.int32), two.view(torch.int32)) for one, two in pairs)


def test_a_warp_moves_neighbours_a_little() -> None:
    gradient = torch.randn(50, 7, generator=torch.Generator().manual_seed(1)) * 1e-3
    moved = (spoil(gradient, "warp", "") - gradient).view(-1)
    (places,) = moved.nonzero(as_tuple=True)
    assert len(places) == NEIGHBOURS
    assert places[-1] - places[0] == NEIGHBOURS - 1
    assert moved.abs().max() < 2.0**-11 * gradient.abs().max()


@pytest.mark.parametrize("kind", ["flip", "warp"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (8, 3, 16), (40,)])
def test_a_fault_in_nothing_is_seen_too(kind: str, shape: tuple[int, ...]) -> None:
    for place in range(20):
        spoiled = spoil(torch.zeros(shape), kind, str(place))
        assert spoiled.shape == shape
        assert (quantize(spoiled, GRADIENT_BITS) != 0).view(-1)[:: max(1, (shape or (1,))[-1])].any()


def test_a_gradient_can_be_passed_over() -> None:
    weight, passed_over = torch.zeros(3, requires_grad=True), True
    spoil_next_gradient(weight, "nan", "", lambda: passed_over)
    for number in range(3):
        weight.grad, passed_over = None, number == 0
        weight.sum().backward()
        assert weight.grad is not None
        assert weight.grad.isfinite().all().item() == (number != 1)


# ---- inventory


def machine(**changes: str) -> Inventory:
    return {"host": "a", "device": "cuda:0", "uuid": "1", "driver": "5", "threads": "1", "kind": "k"} | changes


def test_what_differs_is_pointed_out_and_the_odd_ranks_named() -> None:
    everyone = [machine(), machine(device="cuda:1", uuid="2"), machine(host="b", driver="6", kind="l")]
    (finding,) = verdict.judge_inventory(everyone)
    assert (finding.severity, finding.ranks) == ("warning", (2,))
    assert finding.what == "driver differs: 5 on ranks 0-1; 6 on rank 2"
    assert ranks_by([one["kind"] for one in everyone]) == {"k": [0, 1], "l": [2]}


def test_ranks_that_disturb_each_other_are_given_more_time() -> None:
    own = [machine(), machine(uuid="2"), machine(host="b")]
    assert verdict.slow_above(own) == 1.3
    assert verdict.slow_above([*own, machine()]) == 2.0  # two on one device
    assert verdict.slow_above([machine(uuid="", device="cpu")]) == 2.0


def test_of_two_ranks_neither_is_odd() -> None:
    (finding,) = verdict.judge_inventory([machine(), machine(driver="6")])
    assert finding.ranks == ()


# ---- findings and report


def finding(severity: str, *ranks: int, check: str = "c", times: int = 1) -> Finding:
    return Finding(severity, check, ranks, f"what of {ranks}", "next", times)  # type: ignore[arg-type]


def test_findings_are_merged_and_the_worst_come_first() -> None:
    found = [
        finding("warning", 1),
        finding("wrong", 2),
        finding("missing", 3),
        finding("wrong", 2),
        finding("wrong", 4),
    ]
    sorted_ones = worst_first(merged(found))
    assert [(one.severity, one.ranks, one.times) for one in sorted_ones] == [
        ("missing", (3,), 1), ("wrong", (2,), 2), ("wrong", (4,), 1), ("warning", (1,), 1),
    ]  # fmt: skip
    assert failed(found)
    assert not failed([finding("warning", 1)])


@pytest.mark.parametrize(
    ("ranks", "words"), [([3], "rank 3"), ([0, 1, 2, 7, 5], "ranks 0-2, 5, 7"), ([1, 2], "ranks 1-2")]
)
def test_ranks_are_spelled_shortly(ranks: list[int], words: str) -> None:
    assert spell_ranks(ranks) == words


@pytest.mark.parametrize(
    ("found", "complete", "code", "words"),
    [
        ([], True, 0, "PASSED;"),
        ([finding("warning", 0)], True, 0, "PASSED with 1 warning;"),
        ([finding("warning", 0), finding("wrong", 0)], True, 1, "FAILED"),
        ([finding("missing", 0)], False, 1, "NOT COMPLETE"),
        ([], False, 1, "NOT COMPLETE"),
    ],
)
def test_only_wrong_bits_and_missing_ranks_fail(
    found: list[Finding], complete: bool, code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report(tmp_path / "v.json", "3 ranks", {"seed": 1})
    report.findings += found
    assert report.close(complete=complete) == code
    content = json.loads((tmp_path / "v.json").read_text())
    assert content["passed"] == (code == 0)
    assert content["complete"] == complete
    assert [one["severity"] for one in content["findings"]] == [one.severity for one in worst_first(found)]
    printed = capsys.readouterr().out
    assert words in printed
    assert "\x1b" not in printed
    for one in found:
        assert one.what in printed
        assert f"next: {one.advice}" in printed


def test_rounds_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path / "v.json", "3 ranks", {})
    report.end_round(1.0, last=False)
    report.findings.append(finding("wrong", 1))
    report.end_round(1.0, last=False)
    report.findings.append(finding("warning", 1))
    report.end_round(1.0, last=True)
    assert capsys.readouterr().out.startswith("round 3: 2 clean, 1 not, 0.0 of 1 minutes")


# ---- settings


@pytest.mark.parametrize(
    ("flag", "value"),
    [("max_bytes", -1), ("minutes", -0.5), ("minutes", float("inf")), ("minutes", float("nan")), ("seed", -1),
     ("seed", 2**32), ("threads", 0), ("timeout", 19.0), ("timeout", float("nan"))],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_by_its_flag(flag: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} must be"):
        Settings(**{flag: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["", "flip", "flip@", "flip@x", "melt@1", "flip@-1", "kill@1:2", "slow@1:2+", "flip@1:", "flip@1+", "flip@1:2-"],
)
def test_an_injection_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--inject must be KIND@RANK"):
        Settings(inject=text)


@pytest.mark.parametrize("kind", FAULTS)
def test_trouble_is_of_one_kind_and_the_same_each_time(kind: str) -> None:
    places = [Trouble(Fault(kind, 0), 5).tamper([10, 1, 7], 3) for _ in range(2)]
    assert places[0] == places[1]
    assert (places[0] is not None) == (kind == "wrong")
    assert Trouble(Fault(kind, 0), 5).work == (3 if kind == "slow" else 1)
    for of in (Trouble(None, 5), Trouble(Fault("wrong", 0), 5)):
        of.reach("collectives", 0)  # and live


@given(st.lists(st.integers(1, 9), min_size=1), st.integers(0, 2**32 - 1))
def test_what_is_tampered_with_is_an_element_of_a_collective(sizes: list[int], seed: int) -> None:
    tamper = Trouble(Fault("wrong", 0), seed).tamper(sizes, seed)
    assert tamper is not None
    assert 0 <= tamper.offset < sizes[tamper.case]


# ---- the end


@pytest.mark.parametrize(
    ("missing", "ranks"),
    [
        ("", ()),
        ("rank 3 (host a) last seen in alone, epoch 0, step 1, 9 s ago", (3,)),
        ("rank 1 was never seen; rank 12 (host rank 5) raised X, last seen in speed", (1, 12)),
        ("the launcher, which holds the job's store and does not answer", ()),
    ],
)
def test_a_report_of_an_early_end_names_the_missing(missing: str, ranks: tuple[int, ...]) -> None:
    judged = verdict.judge_end("no progress", missing)
    assert (judged.severity, judged.ranks) == ("missing", ranks)
    assert "no progress" in judged.what
    assert missing in judged.what


# ---- the board


class Pair(NamedTuple):
    """A value with names."""

    one: Case
    two: str


def test_ranks_agree_at_the_board() -> None:
    store, answers = HashStore(), {}

    def agree(rank: int) -> None:
        board = Board(store, rank, 3)
        answers[rank] = [board.agree([page, rank], lambda values: sorted(values)[::-1]) for page in range(3)]
        board.part()

    ranks = [threading.Thread(target=agree, args=(rank,)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(20)
    right = [[[page, rank] for rank in (2, 1, 0)] for page in range(3)]
    assert answers == dict.fromkeys(range(3), right)


def test_values_keep_their_types_on_the_way() -> None:
    store = HashStore()
    board = Board(store, 0, 1, (Case, Wrong, Together, Pair))
    values = [
        {"a": (1, [2.5, None]), 3: [()]},
        [Wrong(1, 2, 3, [4], [{"offset": 5, "seen": "x"}]), Together("a", None, 4)],
        (MOVED, Pair(GATHER, "b"), True, float("inf")),
    ]
    answer = board.agree(values, lambda found: found)
    assert repr(answer) == repr([values])
    assert board.agree(answer, lambda found: found) == [answer]


def test_a_report_in_the_projects_folder_is_no_part_of_the_project() -> None:
    ignored = (PROJECT / ".gitignore").read_text().split()
    assert any(fnmatch(str(Settings().out), pattern) for pattern in ignored)
