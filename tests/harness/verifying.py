"""Verifications by ranks of the fork server: one, or several one after the other, and what each found."""

import gc
import json
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch.nn.parallel import DistributedDataParallel

from ddp_circles.job import refusal
from ddp_circles.verify.__main__ import main
from tests.harness.ranks import Job

SMALL = ("--device=cpu", "--max-bytes=16384")


def verify(*flags: object) -> None:
    """Run the verifier's command line in this rank; where rank 0 refuses, the others do not wait long."""
    refusal.RANK_0_SPEAKS_SECONDS = 0.1
    sys.argv = ["verify", *map(str, flags)]
    main()


def report(folder: Path) -> dict[str, Any]:
    """The content of verify.json."""
    content: dict[str, Any] = json.loads((folder / "verify.json").read_text())
    return content


class Plan(NamedTuple):
    """One verification: its flags, and what is wrong meanwhile."""

    flags: tuple[str, ...] = ()
    trouble: Callable[[], AbstractContextManager[None]] = nullcontext


class Ended(NamedTuple):
    """One verification's end on all ranks."""

    codes: list[int]
    outputs: list[str]
    folder: Path


def verify_each(folder: Path, plans: dict[str, Plan]) -> list[tuple[int, int]]:
    """Run one verification after the other; returns exit codes, and how many replicas of the model each left."""
    results = []
    for name, plan in plans.items():
        print(f"== {name}", flush=True)
        with plan.trouble(), pytest.raises(SystemExit) as leaving:
            verify("--out", folder / name / "verify.json", *SMALL, *plan.flags)
        gc.collect()
        left = sum(type(held) is DistributedDataParallel for held in gc.get_objects())
        results.append((int(leaving.value.code or 0), left))
    return results


def end_each(
    folder: Path,
    size: int,
    plans: dict[str, Plan],
    timeout: float = 200,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Ended]:
    """The ends of several verifications by the same ranks, by name."""
    for name in plans:
        (folder / name).mkdir()
    with Job(verify_each, size, folder, plans, environment=environment) as job:
        outcomes = job.wait(timeout)
    assert [outcome.code for outcome in outcomes] == [0] * size, outcomes[0].output
    assert {left for outcome in outcomes for _, left in outcome.value} == {0}
    spoken = [re.split(r"^== .*\n", outcome.output, flags=re.MULTILINE)[1:] for outcome in outcomes]
    return {
        name: Ended(
            [outcome.value[number][0] for outcome in outcomes],
            [of_rank[number] for of_rank in spoken],
            folder / name,
        )
        for number, name in enumerate(plans)
    }


def check(kind: str, victim: int, codes: list[int], output: str, folder: Path) -> None:
    """The fault was found, the right rank is named, and no other."""
    assert set(codes) == {0 if kind == "slow" else 1}, output
    content = report(folder)
    assert content["complete"] == (kind != "kill")
    assert content["passed"] == (kind == "slow")
    severity = {"kill": "missing", "slow": "warning"}.get(kind, "wrong")
    # Where ranks share a device, warnings about speed are no news.
    found = [finding for finding in content["findings"] if kind == "slow" or finding["severity"] != "warning"]
    assert {(finding["severity"], *finding["ranks"]) for finding in found} == {(severity, victim)}, output
    checks = {"flip": "training", "warp": "training", "wrong": "collectives", "slow": "speed", "kill": "ranks"}[kind]
    assert all(finding["check"].startswith(checks) for finding in found)
