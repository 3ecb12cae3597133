"""Collectives with known answers: every element of every result is checked, to the bit, by the rank that received it.

Two patterns, both functions of (seed, rank, index), which every rank can compute for all ranks:

- What is only moved (broadcast, all-gather) is arbitrary bits of the type's full width.
- What is added or compared is whole numbers so small that every partial sum is exact: rank r contributes
  a(i) + (r // K) b(i) where i % K = r % K, and 0 elsewhere. So sum and maximum over all ranks have a closed form, and
  ranks contribute different numbers. K is 1 unless the world is too large for the type (bfloat16: 16 ranks).
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddp_circles.job.world import World, is_lost_peer
from ddp_circles.verify.board import Board, Mark
from ddp_circles.verify.findings import Finding, spell_ranks
from ddp_circles.verify.injection import INTEGERS, Trouble

DTYPES = {"int64": torch.int64, "float32": torch.float32, "bfloat16": torch.bfloat16}
LIMITS = {"int64": 2**62, "float32": 2**24, "bfloat16": 2**8}
"""The largest sum: all whole numbers up to here are exact."""
GROUPS = {"int64": 2**20, "float32": 2**11, "bfloat16": 2**4}
"""How many ranks may contribute to one element."""
OPERATIONS = ("broadcast", "all-reduce sum", "all-reduce max", "all-gather")
MOVING = ("broadcast", "all-gather", "all-gather of addends")
EXAMPLES = 4
"""Wrong elements told of in full, and broken sums looked into."""
TOLD = 1000
"""Wrong results that verify.json tells of."""
TOLD_SOURCES = 64
"""Sources of wrong elements that a rank tells of."""
BARRIERS = 3
"""Barriers in each round."""
LATE_SECONDS = 0.02
"""How late one rank comes to each."""


@dataclass(frozen=True)
class Case:
    """One collective: `operation` on elements `start` to `stop` of a pattern; `root` is the source of a broadcast.

    `start` is 0 but in an `all-gather of addends`, which shows what each rank contributed to a part of a sum.
    """

    operation: str
    dtype: str
    seed: int
    stop: int
    start: int = 0
    root: int = 0

    @property
    def elements(self) -> int:
        """How many elements each rank sends."""
        return self.stop - self.start

    def __str__(self) -> str:
        source = f" from rank {self.root}" if self.operation == "broadcast" else ""
        return f"{self.operation}{source} of {self.elements} {self.dtype}"


@dataclass(frozen=True)
class Wrong:
    """What one rank received wrong in one case."""

    case: int
    rank: int
    count: int
    sources: list[int]
    """Whose elements they are, where elements have a source."""
    examples: list[dict[str, Any]]
    """The first few: `offset`, `expected`, `seen`."""


@dataclass(frozen=True)
class Tamper:
    """A rehearsed fault: one element is spoiled, in what this rank sends or in what it received."""

    in_what_is_sent: bool
    offset: int


Closer = list[tuple[int, Case]]
"""Further cases, each with the number of the case that it looks into."""


def cases(world_size: int, max_bytes: int, dtypes: Iterable[str], seed: int) -> list[Case]:
    """All collectives to check, from one element to `max_bytes`: the same on every rank.

    Buffers are one element short of powers of 16, to be uneven, and the largest; an all-gather's result counts as its
    buffer. The source of broadcasts moves on from case to case, and one size comes from each rank.
    """
    made: list[Case] = []
    for dtype in dtypes:
        largest = max(1, max_bytes // DTYPES[dtype].itemsize)
        sizes = sorted({1, largest, *(16**power - 1 for power in range(1, 16) if 16**power <= largest)})
        for operation in OPERATIONS:
            parts = sorted({max(1, size // world_size) for size in sizes}) if operation == "all-gather" else sizes
            roots = [(seed + len(made) + step) % world_size for step in range(len(parts))]
            made += [Case(operation, dtype, seed, part, root=root) for part, root in zip(parts, roots, strict=True)]
    each = min(16**3 - 1, max(1, max_bytes // 8))
    return made + [Case("broadcast", "int64", seed, each, root=root) for root in range(world_size)]


def supported(world: World) -> list[str]:
    """The types that this backend can add."""
    return [name for name, dtype in DTYPES.items() if _can_add(torch.ones(1, dtype=dtype, device=world.device))]


def _can_add(one: Tensor) -> bool:
    try:
        dist.all_reduce(one)
    except (RuntimeError, TypeError) as error:
        if is_lost_peer(error):
            raise
        return False
    return True


# ---- patterns


def contribution(case: Case, rank: int, world_size: int, device: torch.device) -> Tensor:
    """What `rank` sends in `case`."""
    index = torch.arange(case.start, case.stop, device=device)
    dtype = DTYPES[case.dtype]
    if case.operation in ("broadcast", "all-gather"):
        return _mixed(index, case.seed * 8191 + rank).to(INTEGERS[dtype.itemsize]).view(dtype)
    groups = _groups(case.dtype, world_size)
    first, step = _coefficients(case, index, world_size)
    return torch.where(index % groups == rank % groups, first + step * (rank // groups), 0).to(dtype)


def expected(case: Case, world_size: int, device: torch.device) -> Tensor:
    """What every rank must receive in `case`."""
    if case.operation == "broadcast":
        return contribution(case, case.root, world_size, device)
    if case.operation in MOVING:
        return torch.cat([contribution(case, rank, world_size, device) for rank in range(world_size)])
    index = torch.arange(case.start, case.stop, device=device)
    groups = _groups(case.dtype, world_size)
    first, step = _coefficients(case, index, world_size)
    terms = (world_size - index % groups + groups - 1) // groups
    largest = first + step * (terms - 1)
    total = first * terms + step * (terms * (terms - 1) // 2)
    return (largest if case.operation == "all-reduce max" else total).to(DTYPES[case.dtype])


def _groups(dtype: str, world_size: int) -> int:
    return -(-world_size // GROUPS[dtype])


def _coefficients(case: Case, index: Tensor, world_size: int) -> tuple[Tensor, Tensor]:
    terms = -(-world_size // _groups(case.dtype, world_size))
    limit = LIMITS[case.dtype]
    first = _mixed(index, case.seed * 8191 + 1).remainder_(limit // (2 * terms))
    return first, _mixed(index, case.seed * 8191 + 2).remainder_(limit // terms**2) + 1


def _mixed(index: Tensor, salt: int) -> Tensor:
    """64 well-mixed bits for each index: two rounds of multiply and shift, as in SplitMix64."""
    bits = (index + (salt % 2**31) * 0x9E3779B9) * 0x3F58476D1CE4E5B9
    bits = (bits ^ (bits >> 29 & 2**35 - 1)) * 0x14D049BB133111EB  # torch shifts the sign in: mask it out
    return bits ^ (bits >> 32 & 2**32 - 1)


def _as_integers(values: Tensor) -> Tensor:
    return values.view(INTEGERS[values.dtype.itemsize])


# ---- on a rank


def check(world: World, todo: Sequence[Case], trouble: Trouble, mark: Mark) -> list[Wrong]:
    """Run the cases and return what this rank received wrong."""
    found = []
    for number, case in enumerate(todo):
        mark("collectives", number)
        found += run_case(world, number, case, tamper_with(todo, number, trouble))
    return found


def check_closer(world: World, todo: Sequence[Case], closer: Closer, trouble: Trouble) -> list[Wrong]:
    """Run the further cases that `look_closer` asked for."""
    found = []
    for number, case in closer:
        tamper = tamper_with(todo, number, trouble)
        found += run_case(world, number, case, tamper if tamper is not None and tamper.in_what_is_sent else None)
    return found


def tamper_with(todo: Sequence[Case], number: int, trouble: Trouble) -> Tamper | None:
    """What a rehearsed fault does to this rank in case `number`: nothing, but in one case."""
    spoiled = trouble.wrong_case(len(todo), todo[0].seed)
    if spoiled is None or spoiled.case != number:
        return None
    case = todo[number]
    return Tamper(spoiled.in_what_is_sent, int(spoiled.where * case.elements))


def run_case(world: World, number: int, case: Case, tamper: Tamper | None) -> list[Wrong]:
    """Run one case; at most one entry, of what this rank received wrong."""
    ranks, device = world.ranks, world.device
    sent = contribution(case, ranks.rank, ranks.world_size, device)
    right = expected(case, ranks.world_size, device)
    sends = case.operation != "broadcast" or case.root == ranks.rank
    if tamper is not None and tamper.in_what_is_sent and sends and case.start <= tamper.offset < case.stop:
        _spoil_sent(case, sent, tamper.offset - case.start)
    received = perform(case.operation, sent, case.root, ranks.world_size)
    if tamper is not None and not (tamper.in_what_is_sent and sends):
        _as_integers(received)[tamper.offset] ^= 1
    return compare(case, number, ranks.rank, received, right)


def _spoil_sent(case: Case, sent: Tensor, offset: int) -> None:
    """Make one element wrong so that no sum and no maximum hides it."""
    if case.operation in ("broadcast", "all-gather"):
        _as_integers(sent)[offset] ^= 1
    else:
        sent[offset] = LIMITS[case.dtype]


def perform(operation: str, sent: Tensor, root: int, world_size: int) -> Tensor:
    """Run one collective on `sent`, which may be overwritten, and return what this rank received."""
    if operation == "broadcast":
        dist.broadcast(sent, root)
        return sent
    if operation.startswith("all-gather"):
        received = sent.new_empty(world_size * sent.numel())
        dist.all_gather(list(received.split(sent.numel())), sent)
        return received
    dist.all_reduce(sent, dist.ReduceOp.MAX if operation == "all-reduce max" else dist.ReduceOp.SUM)
    return sent


def compare(case: Case, number: int, rank: int, received: Tensor, right: Tensor) -> list[Wrong]:
    """What differs between `received` and what is `right`, to the bit; at most one entry."""
    differs = _as_integers(received) != _as_integers(right)
    count = int(differs.sum())
    if not count:
        return []
    offsets = differs.nonzero().view(-1)
    sources = (offsets // case.elements).unique()[:TOLD_SOURCES].tolist() if case.operation in MOVING else []
    examples = [
        {"offset": offset, "expected": _spell(case, right[offset]), "seen": _spell(case, received[offset])}
        for offset in offsets[:EXAMPLES].tolist()
    ]
    return [Wrong(number, rank, count, [case.root] if case.operation == "broadcast" else sources, examples)]


def _spell(case: Case, value: Tensor) -> str:
    if case.operation in ("broadcast", "all-gather"):
        digits = 2 * value.dtype.itemsize
        return f"0x{int(_as_integers(value)) % 16**digits:0{digits}x}"
    return str(value.item())


def check_barriers(board: Board, world: World, seed: int, mark: Mark) -> list[int]:
    """Barriers, each with one rank that comes late; returns those that this rank left before all had entered."""
    ranks, left_early = world.ranks, []
    for number in range(BARRIERS):
        mark("barriers", number)
        if (seed + number) % ranks.world_size == ranks.rank:
            time.sleep(LATE_SECONDS)
        name = f"barrier {seed} {number}"
        board.count(name, 1)
        dist.barrier(device_ids=[world.device.index] if world.backend == "nccl" else None)
        if board.count(name, 0) < ranks.world_size:
            left_early.append(number)
    return left_early


# ---- on rank 0: whose fault it is


def look_closer(todo: Sequence[Case], wrongs: Sequence[Wrong], world_size: int) -> Closer:
    """Further cases that show who spoiled a sum: the same addends, gathered instead of added, around what was wrong.

    Needed only where every rank received the sum wrong.
    """
    closer = []
    for number, found in _by_case(wrongs).items():
        case = todo[number]
        if case.operation not in MOVING and len(found) == world_size:
            part = max(1, case.elements // world_size)
            start = found[0].examples[0]["offset"] // part * part
            stop = min(start + part, case.elements)
            closer.append((number, replace(case, operation="all-gather of addends", start=start, stop=stop)))
    return closer[:EXAMPLES]


def attribute(
    todo: Sequence[Case], wrongs: Sequence[Wrong], closer_wrongs: Sequence[Wrong], world_size: int
) -> list[Finding]:
    """Whose fault each wrong case is."""
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
        findings.append(_finding(todo[number], found, ranks, why))
    return findings


def _blame_moving(found: Sequence[Wrong], world_size: int) -> tuple[tuple[int, ...], str]:
    """Who spoiled elements that have a source: the source if all others got it wrong, else those who did."""
    receivers: dict[int, set[int]] = {}
    for wrong in found:
        for source in wrong.sources:
            receivers.setdefault(source, set()).add(wrong.rank)
    bad_sources, bad_receivers = set(), set()
    for source, ranks in receivers.items():
        if source in ranks or len(ranks) == world_size - 1 > 1:
            bad_sources.add(source)
        else:
            bad_receivers |= ranks
    if bad_sources and len(bad_receivers - bad_sources) == 0:
        return tuple(sorted(bad_sources)), f"those of {spell_ranks(bad_sources)} arrive wrong everywhere"
    blamed = bad_sources | bad_receivers
    return tuple(sorted(blamed)), f"{spell_ranks(bad_receivers)} received wrong what others received right"


def _finding(case: Case, found: Sequence[Wrong], ranks: tuple[int, ...], why: str) -> Finding:
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


def blame_barriers(early: Sequence[Sequence[int]]) -> list[Finding]:
    """A finding if ranks left barriers early; `early`: the barriers that each rank left early."""
    ranks = tuple(rank for rank, numbers in enumerate(early) if numbers)
    if not ranks:
        return []
    what = f"{spell_ranks(ranks)} left a barrier before all ranks had entered it"
    return [
        Finding(
            "wrong",
            "collectives",
            ranks,
            what,
            "this is a fault of the backend: try another version, or --backend gloo",
        )
    ]


def _by_case(wrongs: Iterable[Wrong]) -> dict[int, list[Wrong]]:
    grouped: dict[int, list[Wrong]] = {}
    for wrong in wrongs:
        grouped.setdefault(wrong.case, []).append(wrong)
    return grouped


def section(
    before: dict[str, Any] | None, todo: Sequence[Case], wrongs: Sequence[Wrong], world_size: int, round_number: int
) -> dict[str, Any]:
    """What verify.json says of all rounds so far: `before`, and one more."""
    rows = {row["operation"]: dict(row) for row in before["operations"]} if before else {}
    for number, case in enumerate(todo):
        row = rows.setdefault(
            case.operation,
            {"operation": case.operation, "types": [], "largest_bytes": 0, "buffers": 0, "elements": 0, "wrong": 0},
        )
        received = case.elements * (world_size if case.operation == "all-gather" else 1)
        if case.dtype not in row["types"]:
            row["types"] = [*row["types"], case.dtype]
        row["largest_bytes"] = max(row["largest_bytes"], received * DTYPES[case.dtype].itemsize)
        row["buffers"] += 1
        row["elements"] += received * world_size
        row["wrong"] += sum(wrong.count for wrong in wrongs if wrong.case == number)
    told = [asdict(wrong) | {"case": str(todo[wrong.case]), "round": round_number} for wrong in wrongs]
    return {"operations": list(rows.values()), "wrong": [*(before["wrong"] if before else []), *told][:TOLD]}
