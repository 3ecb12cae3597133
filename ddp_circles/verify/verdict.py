"""Judgement on rank 0: from what all ranks measured to findings that name who is at fault. Nothing is measured here.

Lists have one entry for each rank, in the order of ranks; `kinds` are lists of ranks whose devices must compute alike.
"""

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ddp_circles.checksums import majority
from ddp_circles.job.fingerprint import COMPUTATION
from ddp_circles.job.ranks import spell_ranks
from ddp_circles.terminal import visible
from ddp_circles.verify.collectives import ADDENDS, MOVING, Case, Wrong
from ddp_circles.verify.findings import Finding
from ddp_circles.verify.inventory import Inventory, ranks_by
from ddp_circles.verify.oracle import Run, Together, earliest, first_difference
from ddp_circles.verify.speed import deviation

DEVIATIONS = 5.0
"""A rank is slow above so many deviations: 1.4826 times the median absolute one, a standard deviation if normal."""


# ---- ranks that are missing


def judge_end(reason: str, missing: str) -> Finding:
    """The finding of a rank 0 that ends early for `reason`; `missing`: the ranks to blame in words, or nothing."""
    ranks = tuple(int(number) for number in re.findall(r"(?:^|; )rank (\d+)", missing))
    what = f"{missing} (rank 0: {reason})" if missing else f"no rank is missing, and the job cannot go on: {reason}"
    advice = (
        "read the end of its log and its host's (out of memory, Xid errors), then verify again without it"
        if ranks
        else "if nobody asked for the end, ranks wait for each other: look at the network between them"
    )
    return Finding("missing", "ranks", ranks, what, advice)


# ---- inventory


def judge_inventory(everyone: Sequence[Inventory]) -> list[Finding]:
    """A warning for each thing that should be the same on all ranks and is not."""
    found = []
    apart = {"host", "device", "uuid", "kind"}
    if len({one["kind"] for one in everyone}) > 1:
        apart.add(COMPUTATION)  # unlike kinds compute unlike bits
    for name in (name for name in everyone[0] if name not in apart):
        values = ranks_by([one[name] for one in everyone])
        if len(values) > 1:
            listed = "; ".join(f"{visible(value) or 'none'} on {spell_ranks(ranks)}" for value, ranks in values.items())
            smallest = min(len(ranks) for ranks in values.values())
            odd = tuple(sorted(rank for ranks in values.values() if len(ranks) == smallest for rank in ranks))
            odd = odd if 2 * len(odd) < len(everyone) else ()
            advice = "make the nodes alike if they should be; a mix is slower, and can keep the bits from being equal"
            found.append(Finding("warning", "inventory", odd, f"{name.replace('_', ' ')} differs: {listed}", advice))
    return found


# ---- collectives


def look_closer(todo: Sequence[Case], wrongs: Iterable[Wrong], world_size: int) -> list[tuple[int, Case]]:
    """Further cases that show who spoiled a sum: the same addends, gathered instead of added, around what was wrong.

    They are needed where every rank received the sum wrong; four at the most. Each comes with the number of the case
    that it looks into.
    """
    closer = []
    for number, found in _by_case(wrongs).items():
        case = todo[number]
        if case.operation not in MOVING and len(found) == world_size:
            part = max(1, case.elements // world_size)
            start = found[0].examples[0]["offset"] // part * part
            stop = min(start + part, case.elements)
            closer.append((number, replace(case, operation=ADDENDS, start=start, stop=stop)))
    return closer[:4]


def judge_collectives(
    todo: Sequence[Case], wrongs: Iterable[Wrong], closer_wrongs: Iterable[Wrong], world_size: int
) -> list[Finding]:
    """A finding for each case that went wrong; `closer_wrongs` is what the closer look brought."""
    gathered = _by_case(closer_wrongs)
    findings = []
    for number, found in _by_case(wrongs).items():
        receivers = tuple(wrong.rank for wrong in found)
        ranks: tuple[int, ...]
        if world_size == 1:
            ranks, why = (0,), "there is no other rank"
        elif todo[number].operation in MOVING:
            ranks, why = _blame_moving(found, world_size)
        elif len(found) < world_size:
            ranks, why = receivers, f"{spell_ranks(receivers)} received it wrong, the others right"
        elif number in gathered:
            ranks, why = _blame_moving(gathered[number], world_size)
            why = f"all ranks received it wrong; of the addends, gathered one by one, {why}"
        else:
            ranks, why = (), "all ranks received it wrong, though each addend, gathered by itself, arrives right"
        if world_size == 2 and len(found) == 1 and receivers[0] not in found[0].sources:
            why += "; with two ranks, the link between them or the sender cannot be ruled out: add a third"
        findings.append(_wrong_collective(todo[number], found, ranks, why))
    return findings


def _blame_moving(found: Sequence[Wrong], world_size: int) -> tuple[tuple[int, ...], str]:
    """Blame for elements that have a source: the source if all others got it wrong, else those who did."""
    receivers = defaultdict(set)
    for wrong in found:
        for source in wrong.sources:
            receivers[source].add(wrong.rank)
    bad_sources, bad_receivers = set(), set()
    for source, ranks in receivers.items():
        if source in ranks or len(ranks) == world_size - 1 > 1:
            bad_sources.add(source)
        else:
            bad_receivers |= ranks
    if bad_sources >= bad_receivers:
        return tuple(sorted(bad_sources)), f"those of {spell_ranks(bad_sources)} arrive wrong everywhere"
    blamed = tuple(sorted(bad_sources | bad_receivers))
    return blamed, f"{spell_ranks(bad_receivers)} received wrong what others received right"


def _wrong_collective(case: Case, found: Sequence[Wrong], ranks: tuple[int, ...], why: str) -> Finding:
    example = found[0].examples[0]
    count = sum(wrong.count for wrong in found)
    what = (
        f"{case}: {count} wrong element{'s' * (count > 1)}; rank {found[0].rank} at offset "
        f"{example['offset']} expected {example['expected']} and saw {example['seen']}; {why}"
    )
    if not ranks:
        advice = "the reduction itself or a link is at fault, or it does not recur: soak with --minutes to learn more"
    else:
        advice = f"verify again without {spell_ranks(ranks)}; test its memory, its device and its link to the others"
    return Finding("wrong", "collectives", ranks, what, advice)


def _by_case(wrongs: Iterable[Wrong]) -> dict[int, list[Wrong]]:
    grouped = defaultdict(list)
    for wrong in wrongs:
        grouped[wrong.case].append(wrong)
    return grouped


# ---- speed


def slow_above(everyone: Sequence[Inventory], shared: float = 2.0) -> float:
    """A rank is slow above so many times the others' median: CPU ranks, and ranks on one device, disturb each other.

    `shared`: the factor for those that do.
    """
    owned = {(one["host"], one["uuid"]) for one in everyone if one["uuid"]}
    return 1.3 if len(owned) == len(everyone) else shared


def judge_speed(seconds: Sequence[float], kinds: Iterable[Sequence[int]], factor: float) -> list[Finding]:
    """A warning for each rank that computes much slower than the other ranks of its kind."""
    found = []
    for kind in kinds:
        for rank in kind if len(kind) > 1 else ():
            others = [seconds[other] for other in kind if other != rank]
            middle = statistics.median(others)
            if seconds[rank] > max(factor * middle, middle + DEVIATIONS * 1.4826 * deviation(others, middle)):
                found.append(_slow(rank, seconds[rank], seconds[rank] / middle, factor, len(others)))
    return found


def slow_rule(factor: float) -> str:
    """The rule of `judge_speed`, for people."""
    return (
        f"A rank is warned about above {factor:g} times the median of the others of its kind and above "
        f"{DEVIATIONS:g} deviations (1.4826 times their median absolute deviation) from it."
    )


def _slow(rank: int, seconds: float, ratio: float, factor: float, others: int) -> Finding:
    who = "the other rank's" if others == 1 else f"the median of the {others} other ranks"
    what = (
        f"{spell_ranks([rank])} computes slowly: {seconds * 1e3:.3g} ms, {ratio:.1f} times {who} "
        f"(warned about above {factor:g} times it and {DEVIATIONS:g} deviations)"
    )
    if others == 1:
        what += "; with two ranks nobody can say which of them is as it should be"
    advice = "every step of a training waits for it: look for another job there, heat, a power cap, a lower clock"
    return Finding("warning", "speed", (rank,), what, advice)


# ---- the training oracle


def ranks_to_repeat(kinds: Iterable[Sequence[int]], alone: Sequence[Run]) -> list[int]:
    """The ranks that train alone again: kinds that disagree, and single ranks, which have nobody else to agree with."""
    return [rank for kind in kinds if len(kind) == 1 or len({alone[rank].key for rank in kind}) > 1 for rank in kind]


def judge_trainings(
    kinds: Sequence[Sequence[int]], alone: Sequence[Run], together: Sequence[Together], again: Mapping[int, Run]
) -> list[Finding]:
    """Everything that one round of trainings shows; `again`: those alone that were repeated."""
    findings = []
    for kind in kinds:
        findings += judge_alone(kind, alone, again)
        findings += judge_together(kind, alone, together, mixed=len(kinds) > 1)
    return findings


def judge_alone(kind: Sequence[int], alone: Sequence[Run], again: Mapping[int, Run]) -> list[Finding]:
    """Judge the trainings alone of one kind, by majority and by what was repeated."""
    usual = majority([alone[rank].key for rank in kind])
    unsteady = [rank for rank in kind if rank in again and again[rank].key != alone[rank].key]
    outvoted = [rank for rank in kind if usual is not None and alone[rank].key != usual]
    findings = []
    for rank in sorted({*outvoted, *unsteady}):
        if rank in outvoted:
            reference = next(alone[other] for other in kind if alone[other].key == usual)
            others = spell_ranks(other for other in kind if other not in outvoted)
            what = f"trained alone, {spell_ranks([rank])} departs from {others} {from_step(alone[rank], reference)}; "
            what += (
                "a second time it differs again: a fault that comes and goes"
                if rank in unsteady
                else "a second time it gets the same again: a lasting fault"
            )
        else:
            step = from_step(alone[rank], again[rank])
            what = f"trained alone twice, {spell_ranks([rank])} departs from itself {step}"
        findings.append(Finding("wrong", "training alone", (rank,), what, test_the_device(rank)))
    steady = [rank for rank in kind if rank not in unsteady]
    if usual is None and len({alone[rank].key for rank in steady}) > 1:
        what = (
            f"trained alone, {spell_ranks(steady)} disagree, and each gets its own result a second time: it cannot be "
            "said which of them is wrong, not by the training together either, which holds the gradients of all"
        )
        advice = (
            "verify again with more ranks of this kind, or compare the digest with that of another machine of this kind"
        )
        findings.append(Finding("wrong", "training alone", (), what, advice))
    return findings


def judge_together(
    ranks: Sequence[int], alone: Sequence[Run], together: Sequence[Together], *, mixed: bool
) -> list[Finding]:
    """Judge one kind; in a `mixed` fleet, the training together is not held against those alone."""
    if not mixed:
        step = earliest(step for rank in ranks for step in (together[rank].share, together[rank].sum))
        if step is not None:
            return _judge_step(step, ranks, alone, together)
    usual = majority([together[rank].digest for rank in ranks])
    odd = tuple(rank for rank in ranks if usual is not None and together[rank].digest != usual)
    if usual is None or odd:
        what = f"{spell_ranks(odd or ranks)} ended with other weights than the other ranks"
        return [_wrong_together(odd, what, test_the_device(*odd))]
    agreed = len({alone[rank].key for rank in ranks}) == 1
    if not mixed and agreed and alone[ranks[0]].digest != usual:
        what = "all ranks ended with other weights than alone, though all gradients were the same"
        return [_wrong_together((), what, "verify again; if it recurs, this is a fault of the software")]
    return []


def _judge_step(step: int, ranks: Sequence[int], alone: Sequence[Run], together: Sequence[Together]) -> list[Finding]:
    """Judge the first `step` in which something departs from the trainings alone."""
    computed = [rank for rank in ranks if together[rank].share == step]
    received = tuple(rank for rank in ranks if together[rank].sum == step)
    if computed:
        what = (
            f"computed another gradient in step {step} than alone; its part is in the sum, so that all ranks went on "
            "with the same wrong weights"
        )
        return [_wrong_together((rank,), f"{spell_ranks([rank])} {what}", test_the_device(rank)) for rank in computed]
    if len({alone[rank].key for rank in ranks}) > 1:
        return []  # the trainings alone disagree already, and the sum holds the gradients of all
    if 2 * len(received) < len(ranks):
        who = spell_ranks(received)
        what = f"{who} got a wrong sum of gradients in step {step}, the others did not"
        return [_wrong_together(received, what, f"test the link and the device of {who}")]
    what = (
        f"the sum of gradients in step {step} was wrong on {spell_ranks(received)}, though each rank "
        "had computed its part as it did alone: it went wrong on the way or in the addition"
    )
    advice = (
        "look at the findings about collectives; soak with --minutes to see whether it recurs; try another --backend"
    )
    return [_wrong_together((), what, advice)]


def _wrong_together(ranks: tuple[int, ...], what: str, advice: str) -> Finding:
    return Finding("wrong", "training together", ranks, f"trained together, {what}", advice)


def from_step(one: Run, other: Run) -> str:
    """From where on two unequal runs differ, for people."""
    step = first_difference(one.sums, other.sums)
    return "in its gradients, which rounding then hid" if step is None else f"from step {step} on"


def test_the_device(*ranks: int) -> str:
    """The next thing to do about `ranks`."""
    if not ranks:
        return "verify again with more ranks"
    return f"take {spell_ranks(ranks)} out of the job, run the vendor's diagnostics on its device, and verify again"
