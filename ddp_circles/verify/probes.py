"""The verdict of rank 0 on memory, copies, files, links and counters, from what all ranks found, in their order.

Functions that end in `section` give the entries in verify.json, each with a summary of one sentence.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

from ddp_circles.job.ranks import spell_ranks
from ddp_circles.terminal import visible
from ddp_circles.verify.copies import COPY_BYTES, FILE_BYTES, Copied, Stored
from ddp_circles.verify.counters import FAILED, PENDING, THROTTLING, UNCORRECTED, Reading
from ddp_circles.verify.findings import Finding, Severity
from ddp_circles.verify.inventory import ranks_by
from ddp_circles.verify.links import Link
from ddp_circles.verify.memory import BLOCK, Held
from ddp_circles.verify.pattern import Difference

Section = dict[str, Any]
Pair = tuple[int, int]

SLOW_LINK = 0.5
"""A link between nodes is slow below this share of the median of the others."""
LEAST_PAIRS = 3
MOST_NAMED = 8
"""Links of one kind that get a finding."""


# ---- memory


def judge_memory(found: Sequence[Held]) -> list[Finding]:
    """A finding for each rank whose memory lost something."""
    return [_lost(rank, held) for rank, held in enumerate(found) if held.wrong]


def _lost(rank: int, held: Held) -> Finding:
    block, difference = next(iter(held.wrong.items()))
    what = (
        f"the memory of {spell_ranks([rank])} did not hold what was written to it: {_spell_bytes(_lost_bytes(held))}, "
        f"in {len(held.wrong)} of {-(-held.bytes // BLOCK)} blocks; in block {block}, {difference}"
    )
    advice = f"take {spell_ranks([rank])} out of the job and run the vendor's memory test on its device"
    return Finding("wrong", "memory", (rank,), what, advice)


def _lost_bytes(held: Held) -> int:
    return sum(difference.bytes for difference in held.wrong.values())


def memory_section(found: Sequence[Held]) -> Section:
    """The bytes that were filled, rank by rank."""
    filled, wrong = [held.bytes for held in found], sum(map(_lost_bytes, found))
    summary = f"{_spell_range(filled, 2**30)} GiB per rank held a pattern, then its inverse, and were read again"
    return {
        "bytes": filled,
        "wrong": wrong,
        "summary": summary if any(filled) else "none was filled; --memory 0.5, say, fills half of what is free",
    }


# ---- copies and files


def judge_copies(found: Sequence[Copied]) -> list[Finding]:
    """A finding for each rank whose pattern came back wrong."""
    return [
        _changed("copies", rank, "a pattern came back from its device", copied.difference)
        for rank, copied in enumerate(found)
        if copied.difference is not None
    ]


def copies_section(before: Section | None, device: str, found: Sequence[Copied]) -> Section:
    """The latest bandwidths, of both ways together, rank by rank; `before`: the entry so far; `device`: its type."""
    speeds = [2 * copied.bytes / copied.seconds for copied in found]
    way = "from pinned memory to the device and back" if device == "cuda" else "from memory to memory and back"
    return {
        "bandwidths": speeds,
        "wrong": sum(_wrong_bytes(one.difference) for one in found) + (before["wrong"] if before else 0),
        "summary": f"{COPY_BYTES // 2**20} MiB {way}, at {_spell_range(speeds, 1e9)} GB/s",
    }


def judge_files(found: Sequence[Stored | None]) -> list[Finding]:
    """A finding for each file that came back wrong, and a warning for each that could not be written."""
    findings = []
    for rank, stored in enumerate(found):
        if stored is not None and stored.difference is not None:
            findings.append(_changed("file", rank, f"a file in {visible(stored.folder)} came back", stored.difference))
        if stored is not None and stored.error:
            what = f"{spell_ranks([rank])} could not write and read a file in {visible(stored.folder)}: {stored.error}"
            advice = "make room there, or name another folder in --out: a training's checkpoints need one that works"
            findings.append(Finding("warning", "file", (rank,), what, advice))
    return findings


def file_section(found: Sequence[Stored | None]) -> Section:
    """The folders of the files, by rank."""
    stored = {rank: one for rank, one in enumerate(found) if one is not None and not one.error}
    folders = ", ".join(dict.fromkeys(one.folder for one in stored.values()))
    way = f"written by {spell_ranks(stored)} to {visible(folders)}, dropped from the page cache and read again"
    return {
        "folders": {rank: one.folder for rank, one in stored.items()},
        "wrong": sum(_wrong_bytes(one.difference) for one in stored.values()),
        "summary": f"{FILE_BYTES // 2**20} MiB {way}" if stored else "none could be written and read",
    }


def _changed(check: str, rank: int, what: str, difference: Difference) -> Finding:
    what = f"{spell_ranks([rank])}: {what} with {_spell_bytes(difference.bytes)}; {difference}"
    advice = f"verify again without {spell_ranks([rank])}; look at its host's log for errors of memory, PCIe or disk"
    return Finding("wrong", check, (rank,), what, advice)


# ---- links


def judge_links(found: Sequence[Sequence[Link]], *, between_nodes: bool) -> list[Finding]:
    """A finding for wrong links, and a warning for slow ones between nodes: for a rank that all have in common, one."""
    links = list(chain(*found))
    wrong = {_pair(link): link for link in links if link.difference is not None}
    findings = _name("wrong", wrong, lambda pair: _spell_wrong_link(wrong[pair]))
    speeds = bandwidths(links)
    if between_nodes and len(speeds) >= LEAST_PAIRS:
        medians = dict(zip(speeds, medians_of_others(list(speeds.values())), strict=True))
        slow = [pair for pair in speeds if speeds[pair] < SLOW_LINK * medians[pair]]
        findings += _name("warning", slow, lambda pair: _spell_slow_link(speeds[pair], medians[pair]))
    return findings


def medians_of_others(values: Sequence[float]) -> list[float]:
    """For each of two or more ascending `values`, the median of all the others."""
    below, above = (len(values) - 2) // 2, (len(values) - 1) // 2
    return [
        (values[below + (below >= number)] + values[above + (above >= number)]) / 2 for number in range(len(values))
    ]


def bandwidths(links: Iterable[Link]) -> dict[Pair, float]:
    """Bytes per second in each direction, by pair, slowest first; the slower side's time counts."""
    speeds: dict[Pair, float] = {}
    for link in links:
        speed = link.bytes / link.seconds
        speeds[_pair(link)] = min(speed, speeds.get(_pair(link), speed))
    return dict(sorted(speeds.items(), key=lambda item: item[1]))


def links_section(found: Sequence[Sequence[Link]], *, between_nodes: bool) -> Section:
    """The bandwidths of all pairs, in bytes per second, slowest first."""
    links = list(chain(*found))
    speeds = list(bandwidths(links).items())
    section: Section = {
        "pairs": [{"ranks": list(pair), "bandwidth": speed} for pair, speed in speeds],
        "wrong": sum(_wrong_bytes(link.difference) for link in links),
        "summary": "there is only one rank",
    }
    if speeds:
        (pair, slowest), median = speeds[0], statistics.median(speed for _, speed in speeds)
        size = links[0].bytes
        who = f"pair{'s' * (len(speeds) > 1)} of {'nodes' if between_nodes else 'ranks on one node'}"
        section["summary"] = (
            f"{len(speeds)} {who} exchanged {size:,} bytes: in the median {median / 1e9:.3g} GB/s each way, at the "
            f"slowest, {spell_ranks(pair)}, {slowest / 1e9:.3g} GB/s"
        )
    return section


def _pair(link: Link) -> Pair:
    return min(link.rank, link.peer), max(link.rank, link.peer)


def _name(severity: Severity, pairs: Iterable[Pair], spell: Callable[[Pair], str]) -> list[Finding]:
    """A finding about the one rank that all `pairs` have in common, else one for each, for `MOST_NAMED` at the most."""
    pairs = list(pairs)
    common = tuple(set.intersection(*map(set, pairs))) if pairs else ()
    many = f" (one of {len(pairs)} such links)" if len(pairs) > 1 else ""
    named: list[tuple[tuple[int, ...], Pair]] = [(pair, pair) for pair in pairs[:MOST_NAMED]]
    if len(common) == 1:
        many = f" (one of {len(pairs)} such links, all of {spell_ranks(common)})"
        named = [(common, pairs[0])]
    advice = "compare with the other links: look at the cable, the card and the port, and at the log of both hosts"
    return [
        Finding(severity, "links", ranks, f"the link between {spell_ranks(pair)}{many} {spell(pair)}", advice)
        for ranks, pair in named
    ]


def _spell_wrong_link(link: Link) -> str:
    wrong = link.difference
    return f"carried {_spell_bytes(_wrong_bytes(wrong))} from rank {link.peer} to rank {link.rank}; {wrong}"


def _spell_slow_link(speed: float, median: float) -> str:
    return f"is slow: {speed / 1e9:.3g} GB/s, where the others have {median / 1e9:.3g} in the median"


# ---- counters


def judge_counters(found: Sequence[tuple[Reading, Reading]]) -> list[Finding]:
    """A warning for each rank whose GPU counted errors meanwhile, or is in trouble; readings before and after."""
    findings = []
    for rank, (before, after) in enumerate(found):
        counted = after.counters
        grown = counted.get(UNCORRECTED, 0) - before.counters.get(UNCORRECTED, 0)
        troubles = [f"{grown} more {UNCORRECTED} than before"] * (grown > 0)
        troubles += [f"{name}: {counted[name]}" for name in (PENDING, FAILED) if counted.get(name)]
        troubles += [name for name in THROTTLING.values() if counted.get(name)]
        if troubles:
            what = f"the GPU of {spell_ranks([rank])} reports {', '.join(troubles)}"
            advice = "reset the GPU when it is idle, look at its cooling and power, and replace it if that recurs"
            findings.append(Finding("warning", "counters", (rank,), what, advice))
    return findings


def counters_section(found: Sequence[tuple[Reading, Reading]]) -> Section:
    """The counters before and after all checks, rank by rank."""
    refusals = ranks_by([after.refusal for _, after in found])
    refusals.pop("", None)
    names = dict.fromkeys(name for _, after in found for name in after.counters)
    totals = [f"{name} {sum(after.counters.get(name, 0) for _, after in found)}" for name in names]
    unread = [f"not read on {spell_ranks(ranks)}: {visible(refusal)}" for refusal, ranks in refusals.items()]
    return {
        "ranks": [{"before": asdict(before), "after": asdict(after)} for before, after in found],
        "summary": "; ".join([*([", ".join(totals)] if totals else []), *unread]) or "the GPUs have none",
    }


def _wrong_bytes(difference: Difference | None) -> int:
    return difference.bytes if difference else 0


def _spell_bytes(count: int) -> str:
    return f"{count:,} wrong byte{'s' * (count > 1)}"


def _spell_range(values: Sequence[float], unit: float) -> str:
    low, high = (f"{value / unit:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
