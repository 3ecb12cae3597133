"""Memory, copies, files, links and counters by themselves: what is found, whose fault it is, and what is no fault."""

import math
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddp_circles import memory as machine
from ddp_circles.errors import UserError
from ddp_circles.verify import copies, counters, links, memory, probes
from ddp_circles.verify.copies import Copied, Stored
from ddp_circles.verify.counters import Reading
from ddp_circles.verify.links import Link
from ddp_circles.verify.memory import Held
from ddp_circles.verify.pattern import PIECES, Difference, compare, write
from ddp_circles.verify.report import Report
from ddp_circles.verify.settings import Settings

CPU = torch.device("cpu")
WRONG = Difference(3, 16, "0x01", "0x02")


def words(count: int, salt: int = 3, block: int = 0) -> torch.Tensor:
    return write(torch.empty(count, dtype=torch.int64), salt, block)


def nothing(*_: object) -> None:
    """Mark nothing."""


# ---- the pattern


def test_the_pattern_uses_every_bit_and_no_two_words_are_alike() -> None:
    pattern = words(3 * PIECES["cpu"] + 5)
    for bit in range(64):
        assert 0.48 < ((pattern >> bit) & 1).double().mean().item() < 0.52
    everything = torch.cat([pattern, *(words(len(pattern), salt, block) for salt, block in ((3, 1), (3, 2), (4, 0)))])
    assert len(everything.unique()) == len(everything)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, PIECES["cpu"] + 9), st.integers(0, 63), st.booleans())
def test_one_bit_is_found_wherever_it_is(position: int, bit: int, inverted: bool) -> None:
    held = words(PIECES["cpu"] + 10)
    held = ~held if inverted else held
    assert compare(held, 3, inverted=inverted) is None
    right = int(held[position]) % 2**64
    held[position] ^= torch.tensor(2**bit - 2**64 * (bit == 63))
    seen = right ^ 1 << bit
    assert compare(held, 3, inverted=inverted) == Difference(1, 8 * position, f"0x{right:016x}", f"0x{seen:016x}")


def test_wrong_bytes_are_counted_over_the_whole() -> None:
    held = words(2 * PIECES["cpu"])
    held[5] = ~held[5]
    held[-1] ^= 0x0101
    difference = compare(held, 3)
    assert difference is not None
    assert (difference.bytes, difference.offset) == (8 + 2, 40)


# ---- memory


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BLOCK", 1024)
    monkeypatch.setattr(memory, "HOLD_SECONDS", 0.0)


@pytest.mark.usefixtures("small")
def test_memory_that_holds_is_right_and_is_filled_to_the_last_word() -> None:
    marks: list[tuple[str, int]] = []
    held = memory.check(CPU, 2 * 1024 + 21, 3, 60, lambda phase, step: marks.append((phase, step)))
    assert held == Held(2 * 1024 + 16, {})
    assert marks == [("memory", number) for number in (0, 1, 2)] * 3  # filled, read, read inverted
    assert memory.check(CPU, 7, 3, 60, nothing) == Held(0, {})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("stuck_at", [0, 1])
@pytest.mark.parametrize("bit", range(8))
def test_a_bit_that_is_stuck_is_found_whatever_it_should_have_held(
    stuck_at: int, bit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = memory._fill
    taken: list[torch.Tensor] = []

    def fill(*arguments: Any) -> list[torch.Tensor]:
        taken[:] = original(*arguments)
        return taken

    def hold(_: torch.device) -> None:
        word = taken[1][17:18]
        word.copy_(word | 1 << bit if stuck_at else word & ~(1 << bit))

    monkeypatch.setattr(memory, "_fill", fill)
    monkeypatch.setattr(memory, "_hold", hold)
    held = memory.check(CPU, 3 * 1024, 3, 60, nothing)
    assert list(held.wrong) == [1]
    assert (held.wrong[1].bytes, held.wrong[1].offset) == (1, 17 * 8)


@pytest.mark.usefixtures("small")
def test_a_block_that_cannot_be_had_ends_the_filling(monkeypatch: pytest.MonkeyPatch) -> None:
    given_out = iter([torch.empty(128, dtype=torch.int64) for _ in range(2)])

    def empty(*_: object, **__: object) -> torch.Tensor:
        for block in given_out:
            return block
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", empty)
    assert memory.check(CPU, 10 * 1024, 3, 60, nothing) == Held(2 * 1024, {})


@pytest.mark.usefixtures("small")
def test_filling_ends_when_its_time_is_over() -> None:
    assert memory.check(CPU, 10 * 1024, 3, 0, nothing) == Held(1024, {})


@given(st.floats(0.01, 0.95), st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2**40)), min_size=1))
def test_ranks_of_one_place_share_what_is_free_there(share: float, ranks: list[tuple[str, int]]) -> None:
    places, free = zip(*ranks, strict=True)
    sizes = memory.sizes(share, places, free)
    for place in set(places):
        least = min(amount for other, amount in ranks if other == place)
        here = [size for other, size in zip(places, sizes, strict=True) if other == place]
        assert len(set(here)) == 1
        assert share * least - len(here) - 1 <= sum(here) <= share * least


def test_memory_is_available_as_far_as_the_tightest_group_leaves_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, file in (("CGROUPS", ""), ("OWN_CGROUPS", "own"), ("MEMINFO", "meminfo")):
        monkeypatch.setattr(machine, name, tmp_path / file)
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   8000 kB\nHugePages_Total: 0\n")
    (tmp_path / "own").write_text("0::/\n")
    assert machine.available_memory() == memory.free_memory(CPU) == 8000 * 1024
    for own, names in (
        ("0::/job/step", ("memory.max", "memory.current", "inactive_file")),
        ("4:memory:/job/step", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ):
        (tmp_path / "own").write_text(f"{own}\n")
        job = tmp_path / ("memory" if "memory" in own else "") / "job"
        job.mkdir(parents=True)
        (job / names[0]).write_text("1000000\n")
        assert machine.available_memory() == 1000000
        (job / names[1]).write_text("700000\n")
        (job / "memory.stat").write_text(f"cache 5\nother_{names[2]} 7\n{names[2]} 200000\n")
        assert machine.available_memory() == 1000000 - (700000 - 200000)
        (job / names[0]).write_text("400000\n")
        assert machine.available_memory() == 0


def test_the_machine_has_some_memory_left() -> None:
    assert 0 < machine.available_memory() < machine.machine_memory()


def test_lost_memory_is_named_with_its_rank_and_place() -> None:
    found = [Held(2**28, {}), Held(10**9, {2: WRONG, 3: WRONG}), Held(0, {})]
    (finding,) = probes.judge_memory(found)
    assert (finding.severity, finding.check, finding.ranks) == ("wrong", "memory", (1,))
    assert "6 wrong bytes, in 2 of 4 blocks; in block 2, the word at offset 16 should be 0x01 and is" in finding.what
    section = probes.memory_section(found)
    assert (section["bytes"], section["wrong"]) == ([2**28, 10**9, 0], 6)
    assert "0 to 0.931 GiB per rank" in section["summary"]
    assert "--memory" in probes.memory_section([Held(0, {})])["summary"]


# ---- copies and files


def test_a_copy_comes_back_as_it_was() -> None:
    copied = copies.copy_there_and_back(CPU, 5)
    assert (copied.bytes, copied.difference) == (copies.COPY_BYTES, None)
    assert copied.seconds > 0


def test_a_copy_that_does_not_arrive_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_copy", nothing)
    difference = copies.copy_there_and_back(CPU, 5).difference
    assert difference is not None
    assert difference.bytes > 0.99 * copies.COPY_BYTES


def test_a_file_is_read_as_it_was_written_and_leaves_nothing_behind(tmp_path: Path) -> None:
    assert copies.store_and_read(tmp_path, 5) == Stored(str(tmp_path), None)
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_to_write_to_it_is_a_temporary_file(tmp_path: Path) -> None:
    assert copies.store_and_read(tmp_path / "none", 5) == Stored(tempfile.gettempdir(), None)


@pytest.mark.parametrize("spoil", [lambda content: content[:-8], lambda content: b"\1" * len(content)])
def test_a_file_that_is_short_or_wrong_is_found(
    spoil: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_through_file", lambda _, content: spoil(content))
    difference = copies.store_and_read(tmp_path, 5).difference
    assert difference is not None
    assert difference.bytes >= 7  # of a short file, the last word; one of its bytes may be 0


def test_a_full_disk_is_a_warning_and_no_wrong_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full.open("r+b", buffering=0))
    stored = copies.store_and_read(Path.cwd(), 5)
    assert (stored.difference, stored.error) == (None, "No space left on device")
    (finding,) = probes.judge_files([None, stored])
    assert (finding.severity, finding.check, finding.ranks) == ("warning", "file", (1,))
    assert "No space left on device" in finding.what
    assert probes.file_section([None, stored])["summary"] == "none could be written and read"


def test_wrong_copies_and_files_are_named_with_their_rank() -> None:
    for findings, check in (
        (probes.judge_copies([Copied(64, 1.0, None), Copied(64, 1.0, WRONG)]), "copies"),
        (probes.judge_files([None, Stored("/a\n", WRONG), Stored("/a", None)]), "file"),
    ):
        (finding,) = findings
        assert (finding.severity, finding.check, finding.ranks) == ("wrong", check, (1,))
        assert "with 3 wrong bytes; the word at offset 16 should be 0x01 and is 0x02" in finding.what
        assert "\n" not in finding.what


def test_wrong_copies_of_all_rounds_are_counted() -> None:
    section = probes.copies_section(None, "cuda", [Copied(10**9, 0.5, WRONG), Copied(10**9, 0.25, None)])
    section = probes.copies_section(section, "cuda", [Copied(10**9, 0.5, WRONG), Copied(10**9, 0.25, None)])
    assert section["wrong"] == 6
    assert section["bandwidths"] == [4e9, 8e9]
    assert section["summary"] == "4 MiB from pinned memory to the device and back, at 4 to 8 GB/s"


# ---- links


@given(st.lists(st.integers(0, 99), unique=True, max_size=20))
def test_in_a_tournament_every_two_meet_once_and_nobody_twice_at_a_time(ranks: list[int]) -> None:
    turns = links.tournament(ranks)
    met = Counter(frozenset(pair) for turn in turns for pair in turn)
    assert met == Counter(map(frozenset, combinations(ranks, 2)))
    assert all(len({rank for pair in turn for rank in pair}) == 2 * len(turn) for turn in turns)
    assert len(turns) <= len(ranks)


@pytest.mark.parametrize(
    ("hosts", "players"),
    [("aabbc", [0, 2, 4]), ("abab", [0, 1]), ("aaa", [0, 1, 2]), ("a", [0]), ("a" * 20, list(range(16)))],
)
def test_one_rank_of_each_node_exchanges_or_the_ranks_of_one_node(hosts: str, players: list[int]) -> None:
    assert links.players(hosts) == players


def sides(speeds: dict[tuple[int, int], float], **wrong: tuple[int, int]) -> list[list[Link]]:
    """What the ranks find whose pairs have these bandwidths; `wrong`: who received something wrong from whom."""
    found: list[list[Link]] = [[] for _ in range(1 + max(map(max, speeds)))]
    for (one, other), speed in speeds.items():
        for rank, peer, factor in ((one, other, 1.0), (other, one, 0.9)):
            difference = WRONG if (rank, peer) in wrong.values() else None
            found[rank].append(Link(rank, peer, 1000, factor * 1000 / speed, difference))
    return found


def even(*ranks: int, **slow: tuple[int, int]) -> dict[tuple[int, int], float]:
    return {pair: 4e8 if pair in slow.values() else 1e9 for pair in combinations(ranks, 2)}


def test_the_bandwidth_of_a_pair_is_that_of_its_slower_side() -> None:
    section = probes.links_section(sides({(0, 1): 4e9, (0, 2): 1e9, (1, 2): 2e9}), between_nodes=True)
    assert [pair["ranks"] for pair in section["pairs"]] == [[0, 2], [1, 2], [0, 1]]
    assert [pair["bandwidth"] for pair in section["pairs"]] == pytest.approx([1e9, 2e9, 4e9])
    assert section["summary"] == (
        "3 pairs of nodes exchanged 1,000 bytes: in the median 2 GB/s each way, at the slowest, ranks 0, 2, 1 GB/s"
    )
    assert probes.links_section([[]], between_nodes=False)["summary"] == "there is only one rank"


def test_a_wrong_link_is_named_with_both_its_ranks_and_the_direction() -> None:
    (finding,) = probes.judge_links(sides(even(0, 1, 2), wrong=(2, 1)), between_nodes=False)
    assert (finding.severity, finding.check, finding.ranks) == ("wrong", "links", (1, 2))
    assert "ranks 1-2 carried 3 wrong bytes from rank 1 to rank 2; the word at offset 16" in finding.what


def test_a_rank_whose_links_are_all_wrong_is_named_alone() -> None:
    (finding,) = probes.judge_links(sides(even(0, 1, 2, 3), a=(0, 2), b=(1, 2), c=(2, 3)), between_nodes=False)
    assert (finding.severity, finding.ranks) == ("wrong", (2,))
    assert "one of 3 such links, all of rank 2" in finding.what
    assert "carried 3 wrong bytes from rank 2 to rank 0" in finding.what
    separate = probes.judge_links(sides(even(0, 1, 2, 3), a=(0, 1), b=(2, 3)), between_nodes=False)
    assert [finding.ranks for finding in separate] == [(0, 1), (2, 3)]


def test_slow_links_are_warned_about_between_nodes_only_and_if_there_are_three() -> None:
    slow = {"slow": (0, 1)}
    (finding,) = probes.judge_links(sides(even(0, 3, 5) | {(0, 3): 4e8}), between_nodes=True)
    assert (finding.severity, finding.check, finding.ranks) == ("warning", "links", (0, 3))
    assert "is slow: 0.4 GB/s, where the others have 1 in the median" in finding.what
    assert probes.judge_links(sides(even(0, 1, 2, **slow)), between_nodes=False) == []
    assert probes.judge_links(sides(even(0, 1, **slow)), between_nodes=True) == []
    assert probes.judge_links(sides(even(0, 1, 2) | {(0, 1): 5.1e8}), between_nodes=True) == []


def test_a_node_whose_links_are_all_slow_is_warned_about_once() -> None:
    speeds = even(0, 1, 2, 3, a=(0, 2), b=(1, 2), c=(2, 3))
    (finding,) = probes.judge_links(sides(speeds), between_nodes=True)
    assert (finding.severity, finding.ranks) == ("warning", (2,))


def test_of_many_wrong_links_some_are_named_and_all_are_counted() -> None:
    wrong = {f"w{number}": (number, number + 1) for number in range(0, 40, 2)}
    findings = probes.judge_links(sides(dict.fromkeys(wrong.values(), 1000000000.0), **wrong), between_nodes=False)
    assert len(findings) == probes.MOST_NAMED
    assert all("one of 20 such links" in finding.what for finding in findings)


@given(st.lists(st.floats(0, 1e6), min_size=2))
def test_the_median_of_the_others_is_that_of_all_but_one(values: list[float]) -> None:
    values.sort()
    right = [statistics.median(values[:number] + values[number + 1 :]) for number in range(len(values))]
    assert probes.medians_of_others(values) == right


# ---- counters


class NVMLError(Exception):
    """The error of NVML's own."""


class GPU:
    """One GPU, and the part of nvidia-ml-py that is used."""

    def __init__(self) -> None:
        self.errors, self.rows, self.reasons = [7, 0], [1, 2, 0, 0], 0x1
        self.opened = self.closed = 0
        self.module = SimpleNamespace(
            NVMLError=NVMLError,
            NVML_MEMORY_ERROR_TYPE_CORRECTED=0,
            NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1,
            NVML_VOLATILE_ECC=0,
            nvmlInit=self.open,
            nvmlShutdown=self.close,
            nvmlDeviceGetHandleByUUID=self.find,
            nvmlDeviceGetTotalEccErrors=lambda handle, kind, counter: self.errors[kind],
            nvmlDeviceGetRemappedRows=lambda handle: tuple(self.rows),
            nvmlDeviceGetCurrentClocksEventReasons=lambda handle: self.reasons,
        )

    def open(self) -> None:
        self.opened += 1

    def close(self) -> None:
        self.closed += 1

    def find(self, uuid: str) -> str:
        if uuid != "GPU-1-2-3":
            raise NVMLError("Not Found")
        return uuid


def refuse(*_: object) -> None:
    raise NVMLError("Not Supported")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> GPU:
    gpu = GPU()
    monkeypatch.setitem(sys.modules, "pynvml", gpu.module)
    return gpu


def test_counters_are_read_by_the_id_of_the_gpu(gpu: GPU) -> None:
    right = Reading(
        {
            "uncorrected ECC errors": 0,
            "corrected ECC errors": 7,
            "remapped rows": 3,
            "pending row remaps": 0,
            "failed row remaps": 0,
            "hardware slowdown": 0,
            "thermal slowdown by software": 0,
            "thermal slowdown by hardware": 0,
        }
    )
    assert counters.read_counters("1-2-3") == right
    assert counters.read_counters("4") == Reading({}, "NVML: Not Found")
    assert gpu.opened == gpu.closed == 2


def test_counters_that_a_gpu_does_not_have_are_left_out(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.module, "nvmlDeviceGetTotalEccErrors", refuse)
    monkeypatch.setattr(gpu.module, "nvmlDeviceGetRemappedRows", refuse)
    assert len(counters.read_counters("1-2-3").counters) == 3
    monkeypatch.setattr(gpu.module, "nvmlDeviceGetCurrentClocksEventReasons", refuse)
    assert counters.read_counters("1-2-3") == Reading({})


def test_where_nvml_is_missing_the_report_says_so(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.module, "nvmlInit", refuse)
    broken = counters.read_counters("1-2-3")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    missing = counters.read_counters("1-2-3")
    found = [(missing, missing), (broken, broken), (missing, missing)]
    assert probes.judge_counters(found) == []
    assert probes.counters_section(found)["summary"] == (
        "not read on ranks 0, 2: nvidia-ml-py is not installed; not read on rank 1: NVML: Not Supported"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"errors": [900, 0]}, None),  # corrected
        ({"rows": [5, 5, 0, 0]}, None),  # remapped, and done
        ({"reasons": 0x1 | 0x2 | 0x4 | 0x10 | 0x100}, None),  # idle, or held to a power or a clock
        ({"errors": [7, 2]}, "reports 2 more uncorrected ECC errors than before"),
        ({"rows": [1, 2, 1, 0]}, "reports pending row remaps: 1"),
        ({"rows": [1, 2, 0, 1]}, "reports failed row remaps: 1"),
        ({"reasons": 0x8}, "reports hardware slowdown"),
        ({"reasons": 0x20}, "reports thermal slowdown by software"),
        ({"reasons": 0x48}, "reports hardware slowdown, thermal slowdown by hardware"),
    ],
)
def test_what_a_gpu_counts_meanwhile_is_warned_about(change: dict[str, Any], words: str | None, gpu: GPU) -> None:
    before = counters.read_counters("1-2-3")
    for name, value in change.items():
        setattr(gpu, name, value)
    findings = probes.judge_counters([(before, before), (before, counters.read_counters("1-2-3"))])
    assert [(finding.severity, finding.check, finding.ranks) for finding in findings] == (
        [("warning", "counters", (1,))] if words else []
    )
    assert all(finding.what == f"the GPU of rank 1 {words}" for finding in findings)


def test_the_report_adds_up_the_counters_of_all_gpus(gpu: GPU) -> None:
    reading = counters.read_counters("1-2-3")
    section = probes.counters_section([(reading, reading)] * 2)
    assert section["summary"].startswith("uncorrected ECC errors 0, corrected ECC errors 14, remapped rows 6, ")
    assert section["ranks"][1]["before"]["counters"] == reading.counters
    assert probes.counters_section([(Reading({}), Reading({}))])["summary"] == "the GPUs have none"


# ---- settings and report


@pytest.mark.parametrize("share", [0.0, -0.1, 0.951, math.inf, math.nan])
def test_a_share_of_the_memory_that_cannot_be_filled_is_refused(share: float) -> None:
    with pytest.raises(UserError, match=r"--memory must be above 0 and at most 0\.95"):
        Settings(memory=share)


def test_shares_of_the_memory_are_above_0_and_at_most_095() -> None:
    assert [Settings(memory=share).memory for share in (None, 1e-9, 0.95)] == [None, 1e-9, 0.95]


def test_the_report_has_a_line_for_each_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path / "v.json", "3 ranks", {})
    report.sections["probes"] = {
        "links": {"summary": "[red]all\x1b", "wrong": 12345},
        "counters": {"summary": "none"},
    }
    report.close(complete=True)
    printed = capsys.readouterr().out
    assert "|links    | [red]all\\x1b  | 12,345|" in printed
    assert "|counters | none          |       |" in printed
