"""An audit of the hardware: in some steps each rank recomputes what another one owns, and both must get the same bits.

Exact sums make every difference a fault of the hardware. Each rank first recomputes the micro-batches of another rank,
then runs its own; the checksums of both ride in the step's one collective. Where two differ, every rank computes that
micro-batch once more, and those that are alone with an answer, or contradict themselves, are named before the sum is
applied. The sum that arrives must have the checksum of what was sent, and all ranks the same weights.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ddp_circles.checksums import LASTS, Checksums, Layout, Published, checksum, judge, majority
from ddp_circles.errors import HardwareError
from ddp_circles.exact import ExactReducer, SideBySideReducer
from ddp_circles.job.devices import device_uuid
from ddp_circles.job.fingerprint import device_name
from ddp_circles.job.world import World
from ddp_circles.metrics import Arriving
from ddp_circles.micro_batches import MicroBatch

Entry = tuple[Any, Any, nn.Module, AbstractContextManager[object]]
"""Inputs, targets, the model to run them through and the context for it."""
Share = Callable[[int], list[MicroBatch]]
"""From a rank to its micro-batches in the step."""
Seeded = Callable[[Iterable[MicroBatch]], Iterator[MicroBatch]]
"""Seeds the generators before each micro-batch."""
MOST_NAMED = 8
"""Most ranks that are shown where nobody can be accused."""


@dataclass
class Audit:
    """Audits a step of a training every so many: wraps the micro-batches that its loop runs."""

    every: int
    world: World
    reducer: ExactReducer | SideBySideReducer
    nothing: MicroBatch
    """The micro-batch of a rank without a sample."""
    parameters: Sequence[Tensor]
    """The weights that are trained, float32."""
    count: int = 0
    """Steps of the run that were audited."""
    recomputing: bool = field(default=False, init=False)
    """True while this rank recomputes what another one owns."""

    def is_due(self, step: int) -> bool:
        """True for the global steps that are audited."""
        return step % self.every == 0

    def watched(self, step: int) -> int | None:
        """The rank whose micro-batches this one recomputes in global step `step`; None if that is not audited."""
        return self._layout(step).watched_by(self.world.ranks.rank) if self.is_due(step) else None

    def around(
        self, own: Iterable[Entry], pieces: list[MicroBatch], step: int, share: Share, seeded: Seeded
    ) -> Iterator[Entry]:
        """The micro-batches of an audited step: another rank's, then this rank's `own`, which are made of `pieces`.

        Raises `HardwareError` on all ranks, at the end, if not all ranks have computed the same.
        """
        layout, rank = self._layout(step), self.world.ranks.rank
        watched = layout.watched_by(rank)
        watched_pieces = share(watched)
        numbers, watched_numbers = self._numbers(pieces, rank), self._numbers(watched_pieces, watched)
        checksums = Checksums(layout, rank, numbers, watched_numbers, self._weights())
        self.reducer.begin_audit(checksums)
        yield from self._recomputed(watched_pieces, seeded)
        yield from own
        row = Arriving(torch.cat([self.reducer.take_published(), *checksums.received]))
        numbers_read = row.read(self.world.wait_for)
        published, received = Published.from_row(layout, numbers_read[: layout.width]), numbers_read[layout.width :]
        if not published.diverged:  # else the loop says so
            self._check_weights(published.weights, step)
            if published.disputed:
                yield from self._settle(published, checksums, step, share, seeded)
            if received and not published.arrived(received):
                raise HardwareError(
                    f"audit of step {step}: {self._name()} received another sum than all ranks have sent: the network "
                    "or the addition is at fault. The step was not applied; the same command goes on from the last "
                    "checkpoint"
                )
        self.reducer.end_audit()
        self.count += 1

    def finish(self, step: int) -> None:
        """Compare the weights once more, after the last `step`; raises `HardwareError` on all ranks."""
        self._check_weights(self.world.gather(int(self._weights())), step)

    def _layout(self, step: int) -> Layout:
        """The layout of what is published in `step`: a rank recomputes each of the others in turn; alone, itself."""
        size = self.world.ranks.world_size
        distance = 1 + step // self.every % (size - 1) if size > 1 else 0
        return Layout(size, self.reducer.micro_batches, distance)

    def _audited_before(self, step: int) -> int:
        """The last step before `step` that was audited."""
        return max(0, (step - 1) // self.every * self.every)

    def _numbers(self, pieces: list[MicroBatch], rank: int) -> list[int]:
        """The numbers of the micro-batches that the `pieces` of `rank` hold; without a sample its own number."""
        if isinstance(self.reducer, SideBySideReducer):
            return list(range(rank, self.reducer.micro_batches, self.world.ranks.world_size)) or [rank]
        return [piece.number for piece in pieces] or [rank]

    def _weights(self) -> Tensor:
        """The checksum of the weights, of shape [1]."""
        weights = torch.cat([parameter.detach().flatten() for parameter in self.parameters])
        return checksum(weights.view(torch.int32)).view(1)

    def _recomputed(self, pieces: list[MicroBatch], seeded: Seeded) -> Iterator[Entry]:
        """The `pieces` of another rank, with the pass that leaves nothing but their checksums."""
        self.recomputing = True
        for piece in seeded(pieces or [self.nothing]):
            yield (*piece[1:], *self.reducer.recomputation(idle=not pieces))
        self.recomputing = False

    def _settle(
        self, published: Published, checksums: Checksums, step: int, share: Share, seeded: Seeded
    ) -> Iterator[Entry]:
        """All that is disputed, once more on every rank; then raises `HardwareError` on all ranks."""
        layout, disputed = published.layout, published.disputed
        answers: dict[int, int] = {}
        for owner in sorted({layout.parties(number)[0] for number in disputed}):
            checksums.again.clear()
            pieces = share(owner)
            yield from self._recomputed(pieces, seeded)
            found = torch.cat(checksums.again).tolist()
            answers |= dict(zip(self._numbers(pieces, owner), found, strict=False))
        third = self.world.gather([answers.get(number, 0) for number in disputed])
        deeds = judge(published, third)
        parties = sorted({rank for number in disputed for rank in layout.parties(number)})
        dispute = f"the ranks disagree on {layout.spell(disputed)}"
        lasts = not deeds or any(deed.endswith(LASTS) for deed in deeds.values())
        self._accuse(step, deeds, dispute, parties, sound_step=self._audited_before(step) if lasts else None)

    def _check_weights(self, weights: list[int], step: int) -> None:
        """Raise `HardwareError` on all ranks if not all had the same weights before `step`."""
        if len(set(weights)) == 1:
            return
        usual, sound = majority(weights), self._audited_before(step)
        odd = [rank for rank, found in enumerate(weights) if usual is not None and found != usual]
        deeds = dict.fromkeys(odd, f"holds other weights than the others, which were alike before step {sound}")
        dispute = f"the weights differ, which were alike before step {sound}"
        self._accuse(step, deeds, dispute, range(len(weights)), sound_step=sound)

    def _accuse(
        self, step: int, deeds: dict[int, str], dispute: str, parties: Sequence[int], *, sound_step: int | None
    ) -> NoReturn:
        """Raise `HardwareError` on all ranks: what each rank at fault did; of none, what is in dispute between whom.

        `sound_step`: the last step before which nothing was wrong, if later ones may have been.
        """
        names = self.world.gather(self._name())
        told = "; ".join(f"{names[rank]} {deed}" for rank, deed in sorted(deeds.items()))
        if not told:
            shown = "; ".join(names[rank] for rank in parties[:MOST_NAMED]) + "; ..." * (len(parties) > MOST_NAMED)
            told = f"{dispute}, and nobody can say which of them is wrong: {shown}"
        deleted = "" if sound_step is None else f", and checkpoints after step {sound_step} are deleted"
        raise HardwareError(
            f"audit of step {step}: {told}. This is a fault of hardware, or of a model whose results depend on more "
            f"than its inputs; the step was not applied{deleted}. Take the device out of the job, or check it with "
            "python -m ddp_circles.verify; the same command goes on from the last checkpoint",
            sound_step,
        )

    def _name(self) -> str:
        """This rank with its host and device."""
        device = self.world.device
        return f"{self.world.ranks.name[:-1]}, {device}, {device_name(device)} {device_uuid(device)}".rstrip() + ")"
