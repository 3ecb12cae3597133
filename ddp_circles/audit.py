"""An audit of the hardware: in some steps each rank recomputes what another one owns, and both must get the same bits.

Exact sums make every difference a fault of the hardware. Each rank first recomputes the micro-batches of another rank,
then runs its own; the checksums of both ride in the step's one collective. Where two differ, every rank computes that
micro-batch once more, and those that are alone with an answer, or contradict themselves, are named before the sum is
applied.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ddp_circles.checksums import OUT_OF_RANGE, Checksums, checksum
from ddp_circles.errors import HardwareError
from ddp_circles.exact import ExactReducer, SideBySideReducer
from ddp_circles.job.devices import device_uuid
from ddp_circles.job.fingerprint import device_name
from ddp_circles.job.watch import waiting
from ddp_circles.job.world import World
from ddp_circles.metrics import Arriving
from ddp_circles.micro_batches import MicroBatch
from ddp_circles.terminal import spell_numbers

Entry = tuple[Any, Any, nn.Module, AbstractContextManager[object]]
"""Inputs, targets, the model to run them through and the context for it."""
Share = Callable[[int], list[MicroBatch]]
"""From a rank to its micro-batches in the step."""
Seeded = Callable[[Iterable[MicroBatch]], Iterator[MicroBatch]]
"""Seeds the generators before each micro-batch."""

ENDINGS = (
    "twice, with different bits",
    "unlike the others, and like them when asked again: the fault passes",
    "unlike the others, when asked again too: the fault lasts",
)
"""What a rank at fault did with its micro-batches."""


@dataclass(frozen=True)
class Published:
    """The checksums that all ranks have published in one audited step; the same on all ranks."""

    own: list[int]
    """For each micro-batch the checksum of its owner, 0 without a sample; of a rank that owns none, of all it sends."""
    again: list[int]
    """The same, recomputed by another rank."""
    weights: list[int]
    """For each rank, of its weights."""
    distance: int
    """From the rank that recomputes to the one that owns."""

    @classmethod
    def from_row(cls, row: list[int], ranks: int, distance: int) -> "Published":
        """Cut a row as `Checksums.row` has it."""
        places = (len(row) - ranks) // 2
        return cls(row[:places], row[places : 2 * places], row[2 * places :], distance)

    @property
    def diverged(self) -> bool:
        """True if a micro-batch is out of range by the word of two ranks: no fault of the hardware."""
        return OUT_OF_RANGE in (own for own, again in zip(self.own, self.again, strict=True) if own == again)

    @property
    def disputed(self) -> list[int]:
        """The micro-batches of which two ranks have different checksums."""
        pairs = zip(self.own, self.again, strict=True)
        return [number for number, (own, again) in enumerate(pairs) if own != again]


@dataclass
class Audit:
    """Audits a step of a training every so many: wraps the micro-batches that its loop runs."""

    every: int
    world: World
    reducer: ExactReducer | SideBySideReducer
    parameters: Sequence[Tensor]
    """The weights, float32, the same on all ranks."""
    count: int = 0
    """Steps of the run that were audited."""
    recomputing: bool = field(default=False, init=False)
    """True while this rank recomputes what another one owns."""

    def watched(self, step: int) -> int | None:
        """The rank whose micro-batches this one recomputes in global step `step`; None if that is not audited."""
        ranks = self.world.ranks
        return None if step % self.every else (ranks.rank + self._distance(step)) % ranks.world_size

    def around(
        self, own: Iterable[Entry], pieces: list[MicroBatch], step: int, share: Share, seeded: Seeded
    ) -> Iterator[Entry]:
        """The micro-batches of a step, if it is audited: those of another rank, then this rank's `own`, of `pieces`.

        Raises `HardwareError` on all ranks, at the end, if not all ranks have computed the same.
        """
        watched = self.watched(step)
        if watched is None:
            yield from own
            return
        rank, size = self.world.ranks.rank, self.world.ranks.world_size
        watched_pieces = share(watched)
        checksums = Checksums(
            self._numbers(pieces, rank),
            self._numbers(watched_pieces, watched),
            self._weights(),
            rank=rank,
            places=max(self.reducer.micro_batches, size),
            ranks=size,
        )
        self.reducer.begin_audit(checksums)
        yield from self._recomputed(watched_pieces, seeded)
        yield from own
        row = Arriving(self.reducer.take_published()).read(self.world.patience, waiting)
        published = Published.from_row(row, size, self._distance(step))
        if not published.diverged:  # else the loop says so
            self._check_weights(published.weights, step)
            if published.disputed:
                yield from self._settle(published, checksums, step, share, seeded)
        self.reducer.end_audit()
        self.count += 1

    def _distance(self, step: int) -> int:
        """How far behind a rank the one is that it recomputes: each of the others in turn; alone, itself."""
        size = self.world.ranks.world_size
        return 1 + step // self.every % (size - 1) if size > 1 else 0

    def _numbers(self, pieces: list[MicroBatch], rank: int) -> list[int]:
        """The numbers of the micro-batches of `rank` that its `pieces` hold."""
        if isinstance(self.reducer, SideBySideReducer):
            return list(range(rank, self.reducer.micro_batches, self.world.ranks.world_size))
        return [piece.number for piece in pieces]

    def _weights(self) -> Tensor:
        """The checksum of the weights, of shape [1]."""
        weights = torch.cat([parameter.detach().flatten() for parameter in self.parameters])
        return checksum(weights.view(torch.int32)).view(1)

    def _recomputed(self, pieces: list[MicroBatch], seeded: Seeded) -> Iterator[Entry]:
        """The `pieces` of another rank, with the pass that leaves nothing but their checksums."""
        self.recomputing = True
        for piece in seeded(pieces):
            yield (*piece[1:], *self.reducer.recomputation())
        self.recomputing = False

    def _settle(
        self, published: Published, checksums: Checksums, step: int, share: Share, seeded: Seeded
    ) -> Iterator[Entry]:
        """All that is disputed, once more on every rank; then raises `HardwareError` on all ranks."""
        size, answers = self.world.ranks.world_size, dict.fromkeys(published.disputed, 0)
        for owner in sorted({number % size for number in published.disputed}):
            checksums.again.clear()
            pieces = share(owner)
            yield from self._recomputed(pieces, seeded)
            found = torch.cat(checksums.again).tolist() if pieces else []
            of_owner = dict(zip(self._numbers(pieces, owner), found, strict=False))
            answers |= {number: one for number, one in of_owner.items() if number in answers}
        third = self.world.gather(list(answers.values()))
        self._accuse(step, judge(published, third), f"the ranks disagree on {_spell(published.disputed)}")

    def _check_weights(self, weights: list[int], step: int) -> None:
        """Raise `HardwareError` on all ranks if not all had the same weights before `step`."""
        if len(set(weights)) > 1:
            usual = majority(weights)
            odd = [rank for rank, found in enumerate(weights) if usual is not None and found != usual]
            since = f"the weights changed after step {max(0, step - self.every)}: checkpoints since then may hold them"
            self._accuse(
                step, dict.fromkeys(odd, f"holds other weights than the others ({since})"), f"weights differ ({since})"
            )

    def _accuse(self, step: int, deeds: dict[int, str], dispute: str) -> NoReturn:
        """Raise `HardwareError` on all ranks: what each rank at fault did; of none, what is in dispute."""
        device = self.world.device
        mine = f"{device_name(device)} {device_uuid(device)}".rstrip()
        names = self.world.gather(f"{self.world.ranks.name[:-1]}, {device}, {mine})")
        told = "; ".join(f"{names[rank]} {deed}" for rank, deed in sorted(deeds.items()))
        if not told:
            told = f"{dispute}, and nobody can say which of them is wrong: {'; '.join(names)}"
        raise HardwareError(
            f"audit of step {step}: {told}. This is a fault of hardware, or of a model whose results depend on more "
            "than its inputs; the step was not applied. Take the device out of the job, or check it with "
            "python -m ddp_circles.verify; the run goes on from its last checkpoint"
        )


def judge(published: Published, third: Sequence[Sequence[int]]) -> dict[int, str]:
    """The ranks at fault and what each has done; `third`: for each rank, what it found of the disputed when asked last.

    At fault is who departs from the majority of the last answers, or where there is none, from itself.
    """
    wrong: dict[int, list[int]] = {}
    endings: dict[int, int] = {}
    for number, answers in zip(published.disputed, zip(*third, strict=True), strict=True):
        usual = majority(answers)
        owner = number % len(third)
        first = [(owner, published.own[number]), ((owner - published.distance) % len(third), published.again[number])]
        for rank, answer in enumerate(answers):
            right = answer if usual is None else usual
            if any(found != right for found in (answer, *(found for by, found in first if by == rank))):
                wrong.setdefault(rank, []).append(number)
                ending = 0 if usual is None or len(third) == 1 else 1 + (answer != right)
                endings[rank] = max(ending, endings.get(rank, 0))
    return {rank: f"computed {_spell(numbers)} {ENDINGS[endings[rank]]}" for rank, numbers in wrong.items()}


def majority(values: Sequence[int]) -> int | None:
    """The value that more than half of `values` are, if there is one."""
    value, count = Counter(values).most_common(1)[0]
    return value if 2 * count > len(values) else None


def _spell(numbers: Sequence[int]) -> str:
    return f"micro-batch{'es' * (len(numbers) > 1)} {spell_numbers(numbers)}"
