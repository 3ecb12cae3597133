"""One verification over all ranks: each rank posts its measurements on the board; rank 0 judges them.

inventory; then, with a new seed each time until the time is over:
    copies          to the device and back; once: a file, and memory that is filled and read again
    collectives     every element of every result checked
    speed           once: bandwidths, each rank's own computing, and links between two
    oracle          every rank trains alone, then all train together: the same bits, or somebody is at fault
counters of the GPUs, compared with those after the inventory
report
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, NoReturn, cast

from ddp_circles import cli
from ddp_circles.config import flags_of
from ddp_circles.errors import StopRequestedError, UserError
from ddp_circles.job.devices import device_uuid
from ddp_circles.job.process import be_deterministic, fix_workspace, pin_threads
from ddp_circles.job.ranks import Ranks, this_host
from ddp_circles.job.watch import NOBODY, WAITED
from ddp_circles.job.world import World, first_sentence, is_lost_peer, open_world
from ddp_circles.verify import against, collectives, copies, links, memory, oracle, probes, speed, verdict
from ddp_circles.verify.against import Past
from ddp_circles.verify.alarm import alarm
from ddp_circles.verify.board import Board
from ddp_circles.verify.collectives import DTYPES, Case, Wrong
from ddp_circles.verify.copies import Copied, Stored
from ddp_circles.verify.counters import Reading, read_counters
from ddp_circles.verify.findings import Finding
from ddp_circles.verify.injection import Trouble
from ddp_circles.verify.inventory import Inventory, ranks_by, take_inventory
from ddp_circles.verify.links import Link
from ddp_circles.verify.memory import Held
from ddp_circles.verify.oracle import Run, Together, Workload
from ddp_circles.verify.pattern import Difference, salt_of
from ddp_circles.verify.report import Report
from ddp_circles.verify.settings import Settings
from ddp_circles.verify.speed import Timing

LAST_WORDS_SECONDS = 10.0
"""Part of the timeout that is kept for saying who is missing and for writing the report."""
FILLING_SHARE = 0.1
"""Part of the timeout in which memory may be filled, so that ranks with less of it do not wait too long for others."""
POSTED = (Wrong, Case, Timing, Run, Together, Workload, Difference, Held, Copied, Stored, Link, Reading)


def verify(settings: Settings, ranks: Ranks) -> int:
    """Run all checks on all ranks of the job; returns the exit code.

    Raises `UserError` for what the user can put right; ends the process where another rank is gone or silent.
    """
    pin_threads(settings.threads)
    fix_workspace()
    fault, last = settings.fault(), ranks.world_size - 1
    if fault is not None and fault.rank > last:
        raise UserError(f"--inject names rank {fault.rank}, and the last rank of this world is {last}")
    if fault is not None and (fault.step or 0) >= oracle.STEPS:
        raise UserError(f"--inject names step {fault.step}, and the last step of a training is {oracle.STEPS - 1}")
    trouble = Trouble(fault if fault is not None and fault.rank == ranks.rank else None, settings.seed)
    device, backend, timeout = settings.device, settings.backend, settings.timeout
    try:
        with open_world(ranks, device, backend, timeout, flags_of(settings)) as world:
            session = Session(settings, world, trouble)
            with alarm(world.watch, settings.timeout - LAST_WORDS_SECONDS, session.tell_end):
                try:
                    return session.run()
                except UserError:
                    raise
                except Exception as error:
                    session.fail(error)
    except StopRequestedError:  # in start-up; later, the alarm hears of it
        return 1


class Session:
    """The checks in their order. Rank 0 alone runs the methods named `judge`, with what all ranks found."""

    def __init__(self, settings: Settings, world: World, trouble: Trouble) -> None:
        self._settings = settings
        self._world = world
        self._watch = world.watch
        self._trouble = trouble
        self._ranks = world.ranks
        self._on_cuda = world.device.type == "cuda"
        self._size = world.ranks.world_size
        self._max_bytes = settings.max_bytes or (64 if world.backend == "nccl" else 4) * 2**20
        self._board = Board(world.store, self._ranks.rank, self._size, POSTED)
        given = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
        self._report = Report(settings.out, world.describe(), given)
        self._sections = self._report.sections
        self._probes: dict[str, probes.Section] = self._sections.setdefault("probes", {})
        self._past = Past()
        self._round = 0

    def run(self) -> int:
        """Run all checks, in rounds with new seeds until the time is over; the exit code, the same on every rank.

        Raises `UserError` on every rank if rank 0 could not write its figures.
        """
        be_deterministic()
        deadline = time.monotonic() + 60 * self._settings.minutes
        workload: Workload = self._take_inventory()
        dtypes: list[str] = self._board.agree(collectives.supported(self._world), self._judge_dtypes)
        seconds = self._time_computing()
        counters = self._read_counters()
        for self._round in count():
            seed = (self._settings.seed + self._round) % 2**32
            self._check_copies(seed)
            if self._round == 0:
                self._check_file(seed)
                self._check_memory(seed)
            self._check_collectives(dtypes, seed)
            if self._round == 0:
                self._measure_speed(seconds)
                self._check_links(seed)
            self._train(workload, seed)
            if not self._board.agree(None, partial(self._judge_time, deadline)):
                break
        if counters is not None:
            self._probe("counters", (counters, self._read_counters()), probes.judge_counters, probes.counters_section)
        code: int = self._board.agree(None, lambda _: self._report.close(complete=True))
        self._board.part()
        return code

    def _mark(self, phase: str, step: int) -> None:
        self._watch.mark(phase, self._round, step)
        self._trouble.reach(phase, step)

    def _judge_time(self, deadline: float, _: object) -> bool:
        go_on = time.monotonic() < deadline
        self._report.end_round(self._settings.minutes, last=not go_on)
        return go_on

    # ---- an early end

    def fail(self, error: Exception) -> NoReturn:
        """End the process over an error, with the traceback unless another rank is the cause."""
        if is_lost_peer(error):
            reason, word = f"a collective failed ({first_sentence(error)})", WAITED
        else:
            cli.print_traceback(self._ranks)
            reason, word = f"{type(error).__name__}: {error}", f"raised {type(error).__name__}"
        self._watch.end(word, partial(self.tell_end, reason, word))

    def tell_end(self, reason: str, word: str, missing: str) -> None:
        """Say why this rank ends before its time and who is missing; rank 0 writes what is known so far."""
        missing = "" if missing == NOBODY else missing
        self._watch.say(f"{reason}; missing: {missing or 'no rank'}")
        if self._ranks.is_main:
            why = reason if word == WAITED else f"{reason}: it {word}"
            self._report.findings.append(verdict.judge_end(why, missing))
            self._report.close(complete=False)

    # ---- inventory

    def _take_inventory(self) -> Workload:
        """Compare what the ranks run on, and read what they are held against; returns what they train."""
        self._mark("inventory", 0)
        refusal = _why_not_to(self._settings.out) if self._ranks.is_main else ""
        mine = take_inventory(self._world, self._settings.threads)
        refusal, workload = self._board.agree((refusal, mine), self._judge_inventory)
        if refusal:
            raise UserError(refusal)
        return cast(Workload, workload)

    def _judge_inventory(self, found: Sequence[tuple[str, Inventory]]) -> tuple[str, Workload]:
        everyone = [inventory for _, inventory in found]
        self._report.findings += verdict.judge_inventory(everyone)
        on_cuda = all(inventory["device"].startswith("cuda") for inventory in everyone)
        workload = oracle.choose_workload(self._size, on_cuda=on_cuda)
        kinds = ranks_by([one["kind"] for one in everyone])
        self._sections |= {"inventory": everyone, "kinds": kinds, "workload": asdict(workload)}
        return found[0][0] or self._read_past(workload), workload

    def _read_past(self, workload: Workload) -> str:
        """Read the earlier report; returns why that cannot be done, or nothing."""
        file, seed = self._settings.against, self._settings.seed
        try:
            if file is not None:
                self._past = against.read_past(file, seed, workload, self._sections["inventory"])
                self._sections["against"] = self._past.lines
        except UserError as error:
            return str(error)
        return ""

    # ---- probes

    def _probe(
        self,
        name: str,
        found: Any,
        judge: Callable[[list[Any]], list[Finding]],
        section: Callable[[list[Any]], probes.Section],
    ) -> None:
        """Have rank 0 `judge` what all ranks found, and enter it in the report."""

        def enter(everyone: list[Any]) -> None:
            self._report.findings += judge(everyone)
            self._probes[name] = section(everyone)

        self._board.agree(found, enter)

    def _check_copies(self, seed: int) -> None:
        self._mark("copies", 0)
        copied = copies.copy_there_and_back(self._world.device, salt_of(seed, self._ranks.rank))
        section = partial(probes.copies_section, self._probes.get("copies"), self._world.device.type)
        self._probe("copies", copied, probes.judge_copies, section)

    def _check_file(self, seed: int) -> None:
        """Write and read a file, one rank on each host."""
        self._mark("file", 0)
        folder = self._settings.out.parent
        stored = None if self._ranks.local_rank else copies.store_and_read(folder, salt_of(seed, self._ranks.rank))
        self._probe("file", stored, probes.judge_files, probes.file_section)

    def _check_memory(self, seed: int) -> None:
        self._mark("memory", 0)
        device, seconds = self._world.device, FILLING_SHARE * self._settings.timeout
        sizes: list[int] = self._board.agree(memory.free_memory(device), self._share_memory)
        held = memory.check(device, sizes[self._ranks.rank], salt_of(seed, self._ranks.rank), seconds, self._mark)
        self._probe("memory", held, probes.judge_memory, probes.memory_section)

    def _share_memory(self, free: Sequence[int]) -> list[int]:
        """The bytes that each rank may fill: ranks of one host share the memory of its CPU, or of one GPU."""
        share = self._settings.memory
        if share is None:
            share = memory.ON_CUDA if self._on_cuda else 0.0
        places = [(inventory["host"], inventory["uuid"]) for inventory in self._sections["inventory"]]
        return memory.sizes(share, places, free)

    def _check_links(self, seed: int) -> None:
        players: list[int] = self._board.agree(this_host(), links.players)
        found = links.measure(self._world, players, self._max_bytes, seed, self._mark)
        between = not self._ranks.one_machine
        judge = partial(probes.judge_links, between_nodes=between)
        self._probe("links", found, judge, partial(probes.links_section, between_nodes=between))

    def _read_counters(self) -> Reading | None:
        """The counters of this rank's GPU; None on a CPU."""
        return read_counters(device_uuid(self._world.device)) if self._on_cuda else None

    # ---- collectives

    @staticmethod
    def _judge_dtypes(supported: Sequence[list[str]]) -> list[str]:
        return [name for name in DTYPES if all(name in names for names in supported)]

    def _check_collectives(self, dtypes: Sequence[str], seed: int) -> None:
        todo = collectives.cases(self._size, self._max_bytes, dtypes, seed)
        tamper = self._trouble.tamper([case.elements for case in todo], seed)
        found = collectives.check(self._world, enumerate(todo), tamper, self._mark)
        look_closer = partial(self._look_closer, todo)
        closer = collectives.check(self._world, self._board.agree(found, look_closer), tamper, self._mark)
        self._board.agree((found, closer), partial(self._judge_collectives, todo))

    def _look_closer(self, todo: Sequence[Case], found: Sequence[list[Wrong]]) -> list[tuple[int, Case]]:
        return verdict.look_closer(todo, chain(*found), self._size)

    def _judge_collectives(self, todo: Sequence[Case], found: Sequence[tuple[list[Wrong], list[Wrong]]]) -> None:
        wrongs, closer = ([*chain(*of_ranks)] for of_ranks in zip(*found, strict=True))
        self._report.findings += verdict.judge_collectives(todo, wrongs, closer, self._size)
        before = self._sections.get("collectives")
        self._sections["collectives"] = collectives.section(before, todo, wrongs, self._size, self._round)

    # ---- speed

    def _time_computing(self) -> float:
        return speed.time_computing(self._world.device, self._trouble.work)

    def _measure_speed(self, seconds: float) -> None:
        """Time the collectives, and before and after this rank's own computing, which has taken `seconds` so far."""
        seconds = min(seconds, self._time_computing())
        timings = speed.measure(self._world, self._max_bytes, self._mark)
        self._board.agree((min(seconds, self._time_computing()), timings), self._judge_speed)

    def _judge_speed(self, found: Sequence[tuple[float, list[Timing]]]) -> None:
        seconds, timings = zip(*found, strict=True)
        factor = verdict.slow_above(self._sections["inventory"])
        self._report.findings += verdict.judge_speed(seconds, self._sections["kinds"].values(), factor)
        section = speed.section(seconds, timings, verdict.slow_rule(factor))
        self._sections["speed"] = section
        self._report.findings += against.judge_speed(
            self._past, self._sections["kinds"], seconds, section["collectives"]
        )

    # ---- training oracle

    def _train(self, workload: Workload, seed: int) -> None:
        train_alone = partial(oracle.train_alone, self._world, workload, seed, self._trouble, self._mark)
        alone, shares_alone = train_alone("alone")
        run, shares = oracle.train_together(self._world, workload, seed, self._trouble, self._mark)
        together = oracle.compare(run, shares, alone, shares_alone)
        repeat = self._board.agree(alone, self._judge_repetition)
        again = train_alone("alone again")[0] if self._ranks.rank in repeat else None
        self._board.agree((alone, together, again), partial(self._judge_trainings, seed))

    def _judge_repetition(self, alone: Sequence[Run]) -> list[int]:
        return verdict.ranks_to_repeat(self._sections["kinds"].values(), alone)

    def _judge_trainings(self, seed: int, found: Sequence[tuple[Run, Together, Run | None]]) -> None:
        alone, together = [one for one, _, _ in found], [one for _, one, _ in found]
        again = {rank: one for rank, (_, _, one) in enumerate(found) if one is not None}
        fleet = self._sections["kinds"]
        findings = verdict.judge_trainings(list(fleet.values()), alone, together, again)
        findings += against.judge_trainings(self._past, seed, fleet, alone)
        self._report.findings += findings
        self._sections["oracle"] = oracle.section(
            self._sections.get("oracle"), fleet, alone, together, again, seed=seed, wrong=bool(findings)
        )


def _why_not_to(out: Path) -> str:
    """Why the figures cannot be written to `out`; empty if they can."""
    if out.is_dir():
        return f"--out {out} is a folder: name a file"
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        return f"--out {out} cannot be written: {out.parent} is no folder, or not to be written to"
    return ""
