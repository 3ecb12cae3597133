"""The checks in their order, over all ranks: what a rank finds goes over the board, and rank 0 judges."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from ddp_circles.errors import UserError
from ddp_circles.exact import be_deterministic
from ddp_circles.job.world import World
from ddp_circles.verify import collectives, oracle, speed
from ddp_circles.verify.board import Board, Mark
from ddp_circles.verify.collectives import DTYPES, Case, Wrong
from ddp_circles.verify.injection import Trouble
from ddp_circles.verify.inventory import Inventory, differences, kinds, sharing, take_inventory
from ddp_circles.verify.oracle import Alone, Together
from ddp_circles.verify.report import Report

SEEDS = 2**32
"""Seeds are whole numbers below this."""


class Session:
    """One verification. The functions named `judge` run on rank 0 alone, with what all ranks found, in their order."""

    def __init__(
        self, world: World, board: Board, trouble: Trouble, report: Report, mark: Mark, max_bytes: int
    ) -> None:
        self._world = world
        self._board = board
        self._trouble = trouble
        self._report = report
        self._mark = mark
        self._max_bytes = max_bytes
        self._size = world.ranks.world_size
        self.round = 0
        """The round that is being run, counted from 0."""

    def run(self, out: Path, *, threads: int, seed: int, minutes: float) -> int:
        """All checks, in rounds with new seeds until `minutes` have passed; the exit code, the same on every rank.

        Raises `UserError` on every rank if rank 0 could not write its figures to `out`.
        """
        be_deterministic()
        deadline = time.monotonic() + 60 * minutes
        on_cuda = self._take_inventory(out, threads)
        workload = oracle.choose_workload(self._size, on_cuda=on_cuda)
        dtypes = self._agree_on_dtypes()
        probe = speed.Probe(self._world.device, self._trouble.work)
        probe.measure()
        for self.round in count():
            round_seed = (seed + self.round) % SEEDS
            self._check_collectives(dtypes, round_seed)
            if self.round == 0:
                self._measure_speed(probe)
            self._train(workload, round_seed)
            if not self._goes_on(deadline, minutes):
                break
        code: int = self._board.agree(None, lambda _: self._report.close(complete=True))
        self._board.part()
        return code

    def _goes_on(self, deadline: float, minutes: float) -> bool:
        def judge(_: object) -> bool:
            go_on = time.monotonic() < deadline
            self._report.end_round(minutes, last=not go_on)
            return go_on

        return bool(self._board.agree(None, judge))

    def _take_inventory(self, out: Path, threads: int) -> bool:
        """Whether all ranks compute on CUDA devices."""

        def judge(found: Sequence[tuple[str | None, Inventory]]) -> tuple[str | None, bool]:
            everyone = [inventory for _, inventory in found]
            self._report.findings += differences(everyone)
            self._report.sections |= {"inventory": everyone, "kinds": kinds(everyone)}
            return found[0][0], all(inventory["device"].startswith("cuda") for inventory in everyone)

        self._mark("inventory", 0)
        refusal = _why_not_to(out) if self._world.ranks.is_main else None
        refusal, on_cuda = self._board.agree((refusal, take_inventory(self._world, threads)), judge)
        if refusal is not None:
            raise UserError(refusal)
        return bool(on_cuda)

    def _agree_on_dtypes(self) -> list[str]:
        def judge(supported: Sequence[list[str]]) -> list[str]:
            return [name for name in DTYPES if all(name in names for names in supported)]

        dtypes: list[str] = self._board.agree(collectives.supported(self._world), judge)
        return dtypes

    def _check_collectives(self, dtypes: Sequence[str], seed: int) -> None:
        todo = collectives.cases(self._size, self._max_bytes, dtypes, seed)
        wrongs: list[Wrong] = []

        def judge_first(found: Sequence[list[dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
            wrongs.extend(_wrongs(found))
            return [(number, asdict(case)) for number, case in collectives.look_closer(todo, wrongs, self._size)]

        def judge(found: Sequence[tuple[list[dict[str, Any]], list[int]]]) -> None:
            closer = _wrongs([of_rank for of_rank, _ in found])
            self._report.findings += collectives.attribute(todo, wrongs, closer, self._size)
            self._report.findings += collectives.blame_barriers([early for _, early in found])
            section = self._report.sections.get("collectives")
            self._report.sections["collectives"] = collectives.section(section, todo, wrongs, self._size, self.round)

        found = collectives.check(self._world, todo, self._trouble, self._mark)
        answer = self._board.agree([asdict(wrong) for wrong in found], judge_first)
        closer = [(number, Case(**case)) for number, case in answer]
        found = collectives.check_closer(self._world, todo, closer, self._trouble)
        early = collectives.check_barriers(self._board, self._world, seed, self._mark)
        self._board.agree(([asdict(wrong) for wrong in found], early), judge)

    def _measure_speed(self, probe: speed.Probe) -> None:
        def judge(found: Sequence[tuple[float, list[dict[str, Any]]]]) -> None:
            seconds = [of_rank for of_rank, _ in found]
            timings = [[speed.Timing(**timing) for timing in of_rank] for _, of_rank in found]
            sections = self._report.sections
            factor = speed.choose_factor(self._world.device, shared=sharing(sections["inventory"]))
            self._report.findings += speed.slow_ranks(seconds, list(sections["kinds"].values()), factor)
            sections["speed"] = speed.section(seconds, timings, factor)

        probe.measure()
        timings = speed.measure(self._world, self._max_bytes, self._mark)
        probe.measure()
        self._board.agree((probe.seconds, [asdict(timing) for timing in timings]), judge)

    def _train(self, workload: oracle.Workload, seed: int) -> None:
        alone: list[Alone] = []
        together: list[Together] = []
        fleet: dict[str, list[int]] = self._report.sections.get("kinds", {})

        def judge_first(found: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[int]:
            alone.extend(Alone(**of_rank) for of_rank, _ in found)
            together.extend(Together(**of_rank) for _, of_rank in found)
            return oracle.ranks_to_repeat(fleet.values(), alone)

        def judge(found: Sequence[dict[str, Any] | None]) -> None:
            again = {rank: Alone(**of_rank) for rank, of_rank in enumerate(found) if of_rank is not None}
            findings = oracle.judge(list(fleet.values()), alone, together, again)
            self._report.findings += findings
            section = self._report.sections.get("oracle")
            self._report.sections["oracle"] = oracle.section(
                section, fleet, alone, together, again, seed=seed, wrong=bool(findings)
            )

        train_alone = partial(oracle.train_alone, self._world, workload, seed, self._trouble, self._mark)
        mine = train_alone("alone")
        ours = oracle.train_together(self._world, workload, seed, self._trouble, self._mark)
        repeat = self._board.agree((asdict(Alone.of(mine)), asdict(Together.of(ours, mine))), judge_first)
        again = asdict(Alone.of(train_alone("alone again"))) if self._world.ranks.rank in repeat else None
        self._board.agree(again, judge)


def _wrongs(found: Sequence[list[dict[str, Any]]]) -> list[Wrong]:
    return [Wrong(**wrong) for of_rank in found for wrong in of_rank]


def _why_not_to(out: Path) -> str | None:
    """Why the figures cannot be written to `out`; None if they can."""
    if out.is_dir():
        return f"--out {out} is a folder: name a file"
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        return f"--out {out} cannot be written: {out.parent} is no folder, or not to be written to"
    return None
