"""Links between two: every pair of nodes, or of ranks on one node, exchanges a pattern; both ways at once.

The pairs meet as in a round-robin tournament, so that each rank is in one pair at a time and many pairs exchange at the
same time. The bandwidth of a link is that of each direction.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ddp_circles.job.watch import waiting
from ddp_circles.job.world import World
from ddp_circles.verify.collectives import synchronize
from ddp_circles.verify.injection import Mark
from ddp_circles.verify.pattern import Difference, compare, salt_of, write

MOST_RANKS = 16
"""Ranks that exchange with each other where all are on one node."""
MOST_TURNS = 64
"""Others that each rank exchanges with; more nodes than that leave some pairs out."""
REPEATS = 3


@dataclass(frozen=True)
class Link:
    """One rank's side of a link: its shortest time for an exchange, and what was wrong with what it received."""

    rank: int
    peer: int
    bytes: int
    seconds: float
    difference: Difference | None


def players(hosts: Sequence[str]) -> list[int]:
    """The ranks that exchange with each other: the lowest of each host; on one host, the first `MOST_RANKS`."""
    leaders = [hosts.index(host) for host in dict.fromkeys(hosts)]
    return leaders if len(leaders) > 1 else list(range(len(hosts)))[:MOST_RANKS]


def tournament(ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Turns of pairs in which every two of `ranks` meet once, and no rank is in two pairs of a turn."""
    circle: list[int | None] = [*ranks, *([None] * (len(ranks) % 2))]
    half = len(circle) // 2
    turns = []
    for _ in circle[1:]:
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        turns.append([(one, other) for one, other in pairs if one is not None and other is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return turns


def measure(world: World, ranks: Sequence[int], most_bytes: int, seed: int, mark: Mark) -> list[Link]:
    """Exchange up to `most_bytes` with each of the other `ranks`, if this rank is one of them."""
    own = world.ranks.rank
    links = []
    for turn, pairs in enumerate(tournament(ranks)[:MOST_TURNS]):
        for pair in pairs:
            if own in pair:
                mark("links", turn)
                links.append(_measure_link(world, sum(pair) - own, max(1, most_bytes // 8), seed))
    return links


def _measure_link(world: World, peer: int, words: int, seed: int) -> Link:
    own = world.ranks.rank
    device = world.device if world.backend == "nccl" else torch.device("cpu")  # gloo sends from no other memory
    sent = write(torch.empty(words, dtype=torch.int64, device=device), salt_of(seed, own))
    received = [torch.zeros_like(sent) for _ in range(1 + REPEATS)]
    with waiting:
        seconds = [_exchange(sent, buffer, peer) for buffer in received]
    differences = (compare(buffer, salt_of(seed, peer)) for buffer in received)
    difference = next((one for one in differences if one is not None), None)
    return Link(own, peer, sent.nbytes, min(seconds[1:]), difference)  # the first one also waits for the peer


def _exchange(sent: Tensor, received: Tensor, peer: int) -> float:
    """Send and receive at the same time; returns the seconds."""
    synchronize(sent.device)
    begun = time.perf_counter()
    operations = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    synchronize(sent.device)
    return time.perf_counter() - begun
