"""Command line: does this machine, or this cluster, compute right? Collectives and a training whose answer is known."""

import sys

from ddp_circles import cli
from ddp_circles.job.ranks import Ranks, parent_at_start, set_thread_variables
from ddp_circles.job.stop import stop_requested
from ddp_circles.verify.settings import Settings


def main() -> None:
    """Check, and leave with 0 if everything passed, 1 with findings, 2 for bad input."""
    parent_at_start()  # the launcher may die during the slow imports
    with stop_requested.listening():
        sys.exit(cli.run(_verify))


def _verify(ranks: Ranks) -> int:
    settings = cli.parse(Settings, sys.argv[1:], program="ddp_circles.verify", quiet=not ranks.is_main)
    set_thread_variables(settings.threads)  # before torch is imported
    from ddp_circles.verify.session import verify  # noqa: PLC0415 - the seam: no torch before this line

    return verify(settings, ranks)


if __name__ == "__main__":
    main()
