"""The bits and the speed, held against an earlier verify.json of this machine or of another one of its kind.

So a single rank has somebody to agree with, and a fault that all ranks share is seen.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddp_circles.errors import UserError
from ddp_circles.job.ranks import spell_ranks
from ddp_circles.reading import read_json
from ddp_circles.verify.findings import Finding
from ddp_circles.verify.inventory import PACKAGE, Inventory, ranks_by
from ddp_circles.verify.oracle import Run, Workload, earliest, first_difference
from ddp_circles.verify.verdict import from_step, slow_above, test_the_device

LARGEST_FILE = 2**28
"""Bytes of the longest verify.json that is read: one of ten thousand ranks has about 16 million."""
SHARED_FACTOR = 3.0
"""A kind on CPUs, or on devices that ranks share, is slow above so many times the earlier time.

It is generous: what disturbs all ranks alike cancels out between ranks, but not between then and now.
"""
LINK_FACTOR = 2.0
"""A link is slow below the earlier bandwidth divided by this: other jobs use the network too."""

Bandwidths = Mapping[tuple[str, int], float]
"""Of each operation, at its largest size in bytes: the bus bandwidth in bytes per second."""


@dataclass(frozen=True)
class Past:
    """The part of an earlier report that this job can be held against; by default none."""

    file: str = ""
    runs: Mapping[int, Mapping[str, Run]] = field(default_factory=dict)
    """For each seed and kind, what a rank computed alone."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """For each kind, the median of its ranks' computing times."""
    factor: float = SHARED_FACTOR
    """A kind is slow above so many times its `seconds`."""
    bandwidths: Bandwidths = field(default_factory=dict)
    """Empty where they say nothing about this job's."""
    lines: Sequence[str] = ()
    """What is compared and what is not, for people."""


# ---- the earlier file


def read_past(file: Path, seed: int, workload: Workload, everyone: Sequence[Inventory]) -> Past:
    """Read what a job whose ranks are `everyone` can be held against.

    Raises `UserError` for a file that cannot be used. One of other kinds, or of another version of this package, is no
    mistake: the lines say that it is not compared.
    """
    content = _read_report(file)
    try:
        trained, past = _past_of(file, content, everyone)
        packages = {one[PACKAGE] for one in (*content["inventory"], *everyone)}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise UserError(f"--against {file} is no report that this version can read: verify anew for one") from None
    if len(packages) > 1:
        return Past(lines=[f"Not compared with {file}: it is of another version of this package."])
    here = ranks_by([one["kind"] for one in everyone])
    if here.keys() & past.seconds.keys():
        _require_same_training(file, seed, workload, trained, list(past.runs))
    return past


def _read_report(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file, LARGEST_FILE)
    except OSError as error:
        raise UserError(f"--against {file} cannot be read: {error.strerror}; name an earlier verify.json") from None
    if not {"passed", "complete"} <= content.keys():
        raise UserError(f"--against {file} is no report of this program: name an earlier verify.json")
    if not content["complete"] or not content["passed"]:
        what = "did not pass" if content["complete"] else "is not complete"
        raise UserError(f"--against {file} {what}: name the verify.json of a verification that passed")
    return content


def _past_of(file: Path, content: Mapping[str, Any], everyone: Sequence[Inventory]) -> tuple[Workload, Past]:
    before, oracle, speed = content["inventory"], content["oracle"], content["speed"]
    kinds, here = (ranks_by([one["kind"] for one in job]) for job in (before, everyone))
    computing, trained = speed["compute"]["seconds"], content["workload"]
    past = Past(
        file=str(file),
        runs={
            told["seed"]: {row["kind"]: Run(row["digest"], row["sums"], row["key"]) for row in told["kinds"]}
            for told in oracle["told"]
        },
        seconds={kind: _median(computing, ranks) for kind, ranks in kinds.items()},
        factor=max(slow_above(job, SHARED_FACTOR) for job in (before, everyone)),
        bandwidths=largest(speed["collectives"]) if _linked_alike(before, everyone) else {},
        lines=[
            f"Compared with {file}: {kind}."
            if kind in kinds
            else f"Not compared with {file}: it is of kind {'; '.join(kinds)}, this is {kind}."
            for kind in here
        ],
    )
    return Workload(tuple(trained["hidden"]), trained["micro_batches"], trained["samples"]), past


def _linked_alike(before: Sequence[Inventory], everyone: Sequence[Inventory]) -> bool:
    """Tell whether both jobs have as many hosts, with as many ranks of each kind, on links of their own."""
    layouts = [
        sorted((kind, count) for (_, kind), count in Counter((one["host"], one["kind"]) for one in job).items())
        for job in (before, everyone)
    ]
    backends = {one["backend"] for one in (*before, *everyone)}
    return len(everyone) > 1 and layouts[0] == layouts[1] and len(backends) == 1 and min(backends).startswith("nccl")


def largest(rows: Sequence[Mapping[str, Any]]) -> Bandwidths:
    """The bandwidths at the largest size of each operation; `rows` are those of verify.json, smaller sizes first."""
    last = {row["operation"]: row for row in rows}
    return {(operation, row["bytes"]): float(row["bus_bandwidth"]) for operation, row in last.items()}


def _require_same_training(file: Path, seed: int, workload: Workload, trained: Workload, seeds: Sequence[int]) -> None:
    if trained != workload:
        last = trained.micro_batches
        raise UserError(
            f"--against {file} is of a training of {last} micro-batches of {trained.samples}, and this job's is of "
            f"{workload.micro_batches} of {workload.samples}: verify with {last - 7} to {last} ranks like its own, or "
            "name the verify.json of a job of this size"
        )
    if seed not in seeds:
        listed = " or ".join(map(str, seeds))
        raise UserError(f"--against {file} has no digest for --seed {seed}: give --seed {listed}")


# ---- judgement


def judge_trainings(past: Past, seed: int, fleet: Mapping[str, Sequence[int]], alone: Sequence[Run]) -> list[Finding]:
    """A finding for each kind in which ranks trained otherwise than then; `fleet`: the ranks of each kind."""
    findings = []
    for kind, reference in past.runs.get(seed, {}).items():
        ranks = fleet.get(kind, ())
        departing = [rank for rank in ranks if alone[rank].key != reference.key]
        if departing:
            steps = [first_difference(alone[rank].sums, reference.sums) for rank in departing]
            first = alone[departing[steps.index(earliest(steps))]]
            who = spell_ranks(departing) + (" (all of this kind)" if len(departing) == len(ranks) > 1 else "")
            what = f"trained alone, {who} computed otherwise than in {past.file}, {from_step(first, reference)}"
            advice = _advice(departing, everyone=len(departing) == len(ranks))
            findings.append(Finding("wrong", "against", tuple(departing), what, advice))
    return findings


def _advice(departing: Sequence[int], *, everyone: bool) -> str:
    alone = test_the_device(*departing)
    if not everyone:
        return alone
    return (
        "either machine may be at fault, or a library differs that the kind does not name: hold a third machine of "
        f"this kind against the same file; if it agrees, {alone}"
    )


def judge_speed(
    past: Past, fleet: Mapping[str, Sequence[int]], seconds: Sequence[float], rows: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    """A warning for each kind that computes, and each collective that transmits, much slower than then."""
    findings = []
    for kind, before in past.seconds.items():
        ranks = fleet.get(kind, ())
        now = _median(seconds, ranks) if ranks else 0.0
        if now > past.factor * before:
            what = (
                f"{spell_ranks(ranks)}: computing takes {now * 1e3:.3g} ms in the median, {now / before:.1f} times as "
                f"long as in {past.file} (warned about above {past.factor:g} times)"
            )
            advice = "look for other jobs there, heat, a power cap, a lower clock"
            findings.append(Finding("warning", "against", tuple(ranks), what, advice))
    for (operation, size), now in largest(rows).items():
        before = past.bandwidths.get((operation, size), 0.0)
        if now < before / LINK_FACTOR:
            what = (
                f"{operation} of {size:,} bytes: {now / 1e9:.3g} GB/s, and {before / 1e9:.3g} in {past.file} (warned "
                f"about below 1/{LINK_FACTOR:g})"
            )
            advice = "look for other jobs on the network, a link that is down or slow, other settings of NCCL"
            findings.append(Finding("warning", "against", (), what, advice))
    return findings


def _median(seconds: Sequence[float], ranks: Sequence[int]) -> float:
    return statistics.median(float(seconds[rank]) for rank in ranks)
