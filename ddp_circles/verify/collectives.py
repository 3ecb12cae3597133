"""Collectives with known answers: every element of every result is checked, to the bit, by the rank that received it.

Two patterns, both functions of (seed, rank, index), which every rank can compute for all ranks:

- For what is only moved (broadcast, all-gather): arbitrary bits of the type's full width.
- For what is added or compared: whole numbers so small that every partial sum is exact. Rank r contributes
  a(i) + (r // K) b(i) where i % K = r % K, and 0 elsewhere. So sum and maximum over all ranks have a closed form, and
  ranks contribute different numbers. K is 1 unless the world is too large for the type (bfloat16: 16 ranks).
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddp_circles.checksums import mixed
from ddp_circles.job.rehearsal import INTEGERS
from ddp_circles.job.watch import waiting
from ddp_circles.job.world import World, is_lost_peer
from ddp_circles.verify.injection import Mark, Tamper
from ddp_circles.verify.pattern import salt_of

DTYPES = {"int64": torch.int64, "float32": torch.float32, "bfloat16": torch.bfloat16}
LIMITS = {"int64": 2**62, "float32": 2**24, "bfloat16": 2**8}
"""The largest sum: all whole numbers up to here are exact."""
GROUPS = {"int64": 2**20, "float32": 2**11, "bfloat16": 2**4}
"""The most ranks that may contribute to one element."""
OPERATIONS = ("broadcast", "all-reduce sum", "all-reduce max", "all-gather")
ADDENDS = "all-gather of addends"
"""A closer look at a wrong sum: each rank's part of it, gathered instead of added."""
MOVING = ("broadcast", "all-gather", ADDENDS)


@dataclass(frozen=True)
class Case:
    """One collective: `operation` on elements `start` to `stop` of a pattern; `root` is the source of a broadcast.

    `start` is 0 except in a closer look.
    """

    operation: str
    dtype: str
    seed: int
    stop: int
    start: int = 0
    root: int = 0

    @property
    def elements(self) -> int:
        """The number of elements that each rank sends."""
        return self.stop - self.start

    def __str__(self) -> str:
        source = f" from rank {self.root}" if self.operation == "broadcast" else ""
        return f"{self.operation}{source} of {self.elements} {self.dtype}"


@dataclass(frozen=True)
class Wrong:
    """The elements that one rank received wrong in one case."""

    case: int
    rank: int
    count: int
    sources: list[int]
    """The ranks that sent them, where elements have a source; 64 at the most."""
    examples: list[dict[str, Any]]
    """The first four: `offset`, `expected`, `seen`."""


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


# ---- patterns


def contribution(case: Case, rank: int, world_size: int, device: torch.device) -> Tensor:
    """The elements that `rank` sends in `case`."""
    index = torch.arange(case.start, case.stop, device=device)
    dtype = DTYPES[case.dtype]
    if case.operation in ("broadcast", "all-gather"):
        return mixed(index, salt_of(case.seed, rank)).to(INTEGERS[dtype.itemsize]).view(dtype)
    groups = _groups(case.dtype, world_size)
    first, step = _coefficients(case, index, world_size)
    return torch.where(index % groups == rank % groups, first + step * (rank // groups), 0).to(dtype)


def expected(case: Case, world_size: int, device: torch.device) -> Tensor:
    """The elements that every rank must receive in `case`."""
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
    first = mixed(index, salt_of(case.seed, 1)).remainder_(limit // (2 * terms))
    return first, mixed(index, salt_of(case.seed, 2)).remainder_(limit // terms**2) + 1


def _as_integers(values: Tensor) -> Tensor:
    return values.view(INTEGERS[values.dtype.itemsize])


# ---- on a rank


def supported(world: World) -> list[str]:
    """The types that this backend can add."""
    return [name for name, dtype in DTYPES.items() if _can_add(torch.ones(1, dtype=dtype, device=world.device))]


def _can_add(one: Tensor) -> bool:
    try:
        with waiting:
            dist.all_reduce(one)
            synchronize(one.device)
    except (RuntimeError, TypeError) as error:
        if is_lost_peer(error):
            raise
        return False
    return True


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what was asked of it: on CUDA, a collective only joins a queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check(world: World, todo: Iterable[tuple[int, Case]], tamper: Tamper | None, mark: Mark) -> list[Wrong]:
    """Run numbered cases; returns what this rank received wrong. With `tamper`, one of them is made to go wrong."""
    found: list[Wrong] = []
    for number, case in todo:
        mark("collectives", number)
        spoiled = tamper if tamper is not None and tamper.case == number else None
        found += _run_case(world, number, case, spoiled)
    return found


def _run_case(world: World, number: int, case: Case, tamper: Tamper | None) -> list[Wrong]:
    ranks, device = world.ranks, world.device
    sent = contribution(case, ranks.rank, ranks.world_size, device)
    right = expected(case, ranks.world_size, device)
    sends = case.operation != "broadcast" or case.root == ranks.rank
    before = tamper is not None and tamper.in_what_is_sent and sends
    if tamper is not None and before and case.start <= tamper.offset < case.stop:
        _spoil_sent(case, sent, tamper.offset - case.start)
    with waiting:
        received = perform(case.operation, sent, case.root, ranks.world_size)
        synchronize(device)
    if tamper is not None and not before and case.operation != ADDENDS:
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
    """Hold `received` against what is `right`, to the bit; returns one entry if they differ, else none."""
    differs = _as_integers(received) != _as_integers(right)
    count = int(differs.sum())
    if not count:
        return []
    offsets = differs.nonzero().view(-1)
    sources = (offsets // case.elements).unique()[:64].tolist() if case.operation in MOVING else []
    examples = [
        {"offset": offset, "expected": _spell(case, right[offset]), "seen": _spell(case, received[offset])}
        for offset in offsets[:4].tolist()
    ]
    return [Wrong(number, rank, count, [case.root] if case.operation == "broadcast" else sources, examples)]


def _spell(case: Case, value: Tensor) -> str:
    if case.operation in ("broadcast", "all-gather"):
        digits = 2 * value.dtype.itemsize
        return f"0x{int(_as_integers(value)) % 16**digits:0{digits}x}"
    return str(value.item())


# ---- the report


def section(
    before: dict[str, Any] | None, todo: Sequence[Case], wrongs: Sequence[Wrong], world_size: int, round_number: int
) -> dict[str, Any]:
    """The entry in verify.json for all rounds: `before`, and one more. Lists at most a thousand wrong results."""
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
    return {"operations": list(rows.values()), "wrong": [*(before["wrong"] if before else []), *told][:1000]}
