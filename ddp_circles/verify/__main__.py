"""Command line: does this machine, or this cluster, compute right? Collectives and a training whose answer is known.

inventory; then, with a new seed each time until the time is over:
    collectives     every element of every result checked
    speed           once: bandwidths, and each rank's own computing
    oracle          every rank trains alone, then all train together: the same bits, or somebody is at fault
report
"""

import math
import os
import re
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from ddp_circles import cli
from ddp_circles.config import LONGEST_TIMEOUT, MOST_THREADS
from ddp_circles.errors import UserError
from ddp_circles.job.ranks import Ranks
from ddp_circles.job.stop import stop_requested
from ddp_circles.job.watch import WAITED, Watch
from ddp_circles.job.world import World, is_lost_peer, open_world, pin_threads

if TYPE_CHECKING:
    from ddp_circles.verify.injection import Injection
    from ddp_circles.verify.report import Report

EXIT_FOUND = 1
LAST_WORDS_SECONDS = 10.0
"""Of the timeout, kept for saying who is missing and for writing the report."""
SPEECH_SECONDS = 8.0
"""How long the store may take to say who is missing."""
LINGER_SECONDS = 1.0
"""How much longer the rank that holds the store stays when all have spoken, for them to read the verdict."""
ALL_WAITED = "all ranks waited"
"""What the watch says when it finds no rank at fault."""
MAX_BYTES = {"nccl": 64 * 2**20, "gloo": 4 * 2**20}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Check this machine, or this cluster: collectives, speed, and a training that must give every rank the same bits.

    Ends with 0 if everything passed and with 1 if not; findings about speed are warnings and fail nothing.
    """

    max_bytes: int = 0
    """Largest buffer of a collective; 0: 64 MiB with nccl, 4 MiB with gloo."""
    minutes: float = 0.0
    """Go on with new seeds until so much time has passed; 0: one round."""
    seed: int = 42
    """Seed of the first round: of patterns, weights, points and order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: cuda where there is one."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Who moves the data; auto: nccl on cuda, else gloo."""
    threads: int = 1
    """CPU threads per rank."""
    timeout: float = 120.0
    """Seconds within which all ranks have ended once one of them is gone or silent; 20 or more."""
    inject: str | None = None
    """Rehearse a fault, as KIND@RANK: flip a bit of a gradient, slow, wrong element in a collective, die, hang."""
    out: Path = Path("verify.json")
    """Where rank 0 writes all figures."""

    def __post_init__(self) -> None:
        def require(holds: bool, flag: str, expected: str, value: object) -> None:
            if not holds:
                raise UserError(f"{flag} must be {expected}, got {value!r}")

        require(self.max_bytes >= 0, "--max-bytes", "0 or more", self.max_bytes)
        require(0 <= self.minutes < math.inf, "--minutes", "a finite number, 0 or more", self.minutes)
        require(0 <= self.seed < 2**32, "--seed", f"between 0 and {2**32 - 1}", self.seed)
        require(1 <= self.threads <= MOST_THREADS, "--threads", f"between 1 and {MOST_THREADS}", self.threads)
        require(20 <= self.timeout <= LONGEST_TIMEOUT, "--timeout", f"between 20 and {LONGEST_TIMEOUT}", self.timeout)


def main() -> None:
    """Check, and leave with 0 if everything passed, 1 with findings, 2 for bad input."""
    with stop_requested.listening():
        sys.exit(cli.run(_verify))


def _verify(ranks: Ranks) -> int:
    settings = cli.parse(Settings, sys.argv[1:], program="ddp_circles.verify", quiet=not ranks.is_main)
    pin_threads(settings.threads)
    return verify(settings, ranks)


def verify(settings: Settings, ranks: Ranks) -> int:
    """Run all checks on all ranks of the job; the exit code. Raises `UserError` for what the user can put right."""
    injection = _read_injection(settings, ranks)
    watch = Watch(ranks.rank, ranks.world_size, launched=ranks.launched)
    watch.start()
    try:
        with open_world(ranks, settings.device, settings.backend, settings.timeout) as world:
            watch.connect(world.store)
            return _verify_in_world(settings, world, watch, injection)
    finally:
        watch.stop()


def _read_injection(settings: Settings, ranks: Ranks) -> "Injection | None":
    if settings.inject is None:
        return None
    from ddp_circles.verify.injection import Injection

    injection = Injection.parse(settings.inject, settings.seed)
    if injection.rank >= ranks.world_size:
        raise UserError(
            f"--inject names rank {injection.rank}, and the last rank of this world is {ranks.world_size - 1}"
        )
    return injection


def _verify_in_world(settings: Settings, world: World, watch: Watch, injection: "Injection | None") -> int:
    from ddp_circles.verify.board import Alarm, Board
    from ddp_circles.verify.injection import Trouble
    from ddp_circles.verify.report import Report
    from ddp_circles.verify.session import Session

    ranks = world.ranks
    report = Report(settings.out, world.describe(), asdict(settings) | {"out": str(settings.out)})
    last_words = LastWords(world, watch, report)
    trouble = Trouble(injection, ranks.rank)
    patience = settings.timeout - LAST_WORDS_SECONDS
    others = world.store if ranks.world_size > 1 else None
    with Alarm(others, patience=patience, on_cuda=world.device.type == "cuda", ring=last_words.say) as alarm:

        def mark(phase: str, step: int) -> None:
            watch.mark(phase, session.round, step)
            alarm.progress(f"{phase}, step {step}")
            trouble.reach(phase, step)

        board = Board(world.store, ranks.rank, ranks.world_size)
        session = Session(world, board, trouble, report, mark, settings.max_bytes or MAX_BYTES[world.backend])
        try:
            return session.run(settings.out, threads=settings.threads, seed=settings.seed, minutes=settings.minutes)
        except UserError:
            raise
        except Exception as error:
            if is_lost_peer(error):
                last_words.say(f"a collective failed ({_first_sentence(error)})")
            cli.print_traceback(ranks)
            last_words.say(f"{type(error).__name__}: {error}", f"raised {type(error).__name__}")


def _first_sentence(error: Exception) -> str:
    """What a backend's long message says, without the place in its source."""
    return re.sub(r"\[\S+:\d+\] ", "", " ".join(str(error).split())).split(". ")[0][:200]


class LastWords:
    """How a rank ends when the job cannot go on: it says who is missing, and rank 0 writes what is known so far."""

    def __init__(self, world: World, watch: Watch, report: "Report") -> None:
        self._ranks = world.ranks
        self._watch = watch
        self._report = report
        self._once = threading.Lock()

    def say(self, reason: str, word: str = WAITED) -> NoReturn:
        """Say it, once, from whichever thread comes first, and end the process: a collective may never return."""
        self._once.acquire()  # for good
        store_is_silent = threading.Timer(SPEECH_SECONDS, self._give_up, (reason,))
        store_is_silent.daemon = True
        store_is_silent.start()
        ranks, watch = self._ranks, self._watch
        try:
            if ranks.is_main:
                watch.stop()  # it would end this process before the report is written
            watch.report_end(word)
            names = watch.name_missing() if ranks.world_size > 1 else ""
            store_is_silent.cancel()
            names = "" if names == ALL_WAITED else names
            self._print(reason, names or "no rank")
            if ranks.is_main:
                self._close_report(reason if word == WAITED else f"{reason}: it {word}", names)
            if ranks.serves_store:
                watch.linger()
                time.sleep(LINGER_SECONDS)
        finally:
            sys.stdout.flush()
            os._exit(EXIT_FOUND)

    def _give_up(self, reason: str) -> NoReturn:
        holder = "the launcher" if self._ranks.store_is_the_agents else "rank 0"
        try:
            self._print(reason, f"{holder}, which holds the job's store and does not answer")
        finally:
            os._exit(EXIT_FOUND)

    def _print(self, reason: str, missing: str) -> None:
        print(f"rank {self._ranks.rank}: {reason}; missing: {missing}", file=sys.stderr, flush=True)

    def _close_report(self, reason: str, names: str) -> None:
        from ddp_circles.verify.findings import Finding

        missing = tuple(int(number) for number in re.findall(r"(?:^|; )rank (\d+)", names))
        what = f"{names} (rank 0: {reason})" if names else f"no rank is missing, and the job cannot go on: {reason}"
        advice = (
            "read the end of its log and its host's (out of memory, Xid errors), then verify again without it"
            if missing
            else "if nobody asked for the end, ranks wait for each other: look at the network between them"
        )
        self._report.findings.append(Finding("missing", "ranks", missing, what, advice))
        self._report.close(complete=False)


if __name__ == "__main__":
    main()
