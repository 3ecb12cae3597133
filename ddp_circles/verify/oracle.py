"""A training that knows the right answer: every rank alone and all ranks together must arrive at the same bits.

Alone, a rank runs every micro-batch itself and communicates nothing; together, the ranks share the micro-batches and
add their gradients exactly. Both go through the package's own loop. Compared are not only the weights at the end: of
every micro-batch the bits of its gradient are summed, and of every step the bits of the summed gradient, so that a
single flipped bit is seen even where rounding would hide it from the weights, together with the step it happened in.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_circles.data import Dataset
from ddp_circles.errors import OutOfRangeError
from ddp_circles.exact import ExactReducer
from ddp_circles.fixed_point import LOSS_BITS
from ddp_circles.job.ranks import Ranks
from ddp_circles.job.watch import waiting
from ddp_circles.job.world import World
from ddp_circles.loop import Training, train
from ddp_circles.metrics import LocalTally, Progress, Tally
from ddp_circles.micro_batches import OneByOne
from ddp_circles.models import loss_sum
from ddp_circles.optimization import Optimization, default_optimizer
from ddp_circles.verify.injection import Mark, Trouble
from ddp_circles.verify.model import Model

EPOCHS = 2
STEPS_PER_EPOCH = 12
STEPS = EPOCHS * STEPS_PER_EPOCH
GRID = 64
"""Points have whole coordinates up to this, divided by it: made of integers, they are the same on every device."""


@dataclass(frozen=True)
class Workload:
    """The training: the widths of the hidden layers, V, and the samples of each micro-batch."""

    hidden: tuple[int, ...]
    micro_batches: int
    samples: int


def choose_workload(world_size: int, *, on_cuda: bool) -> Workload:
    """A workload that gives every rank a share of every step; eight micro-batches up to eight ranks."""
    micro_batches = 8 * -(-world_size // 8)
    return Workload((1024, 1024, 1024), micro_batches, 256) if on_cuda else Workload((64, 64), micro_batches, 32)


@dataclass(frozen=True)
class Run:
    """A rank's account of one training: equal runs have equal fields."""

    digest: str
    """SHA-256 of weights, loss and accuracy."""
    sums: list[int]
    """For each step, the bits of the summed gradient, added up."""
    key: str
    """One word for everything that this rank computed, each gradient included."""


Shares = dict[int, list[int]]
"""For each micro-batch that a rank ran, by its number: for each step the bits of its gradient, added up."""


@dataclass(frozen=True)
class Together:
    """A rank's account of the training together, held against its own training alone."""

    digest: str
    share: int | None
    """The first step in which it computed another gradient than alone; None if there is none."""
    sum: int | None
    """The first step in which the summed gradient was another one than alone."""


def compare(run: Run, shares: Shares, alone: Run, shares_alone: Shares) -> Together:
    """Hold a training together against one alone."""
    steps = [first_difference(share, shares_alone[number]) for number, share in shares.items()]
    return Together(run.digest, earliest(steps), first_difference(run.sums, alone.sums))


def first_difference(these: Sequence[int], those: Sequence[int]) -> int | None:
    """The first position where two sequences differ, be it that one has ended; None for equal ones."""
    for position in range(max(len(these), len(those))):
        if these[position : position + 1] != those[position : position + 1]:
            return position
    return None


def earliest(steps: Iterable[int | None]) -> int | None:
    """The smallest number among `steps`; None if there is none."""
    return min((step for step in steps if step is not None), default=None)


def train_alone(
    world: World, workload: Workload, seed: int, trouble: Trouble, mark: Mark, run: str
) -> tuple[Run, Shares]:
    """Train in this rank, without a word to the others; `run` tells repetitions apart."""
    alone = replace(world, ranks=Ranks())
    model = make_model(workload, seed).to(world.device)
    return _train(alone, workload, seed, model, model, Witness(model, run, seed, trouble, mark))


def train_together(world: World, workload: Workload, seed: int, trouble: Trouble, mark: Mark) -> tuple[Run, Shares]:
    """Train on all ranks."""
    model = make_model(workload, seed).to(world.device)
    with waiting:
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # DDP's forward pass may wait for the other ranks too: in the second one they agree on its buckets.
    replica.register_forward_pre_hook(lambda *_: waiting.__enter__())
    replica.register_forward_hook(lambda *_: waiting.__exit__(), always_call=True)
    return _train(world, workload, seed, model, replica, Witness(model, "together", seed, trouble, mark))


def make_model(workload: Workload, seed: int) -> Model:
    """The model with the initial weights of `seed`."""
    torch.manual_seed(seed)
    return Model(workload.hidden)


def make_points(workload: Workload, seed: int) -> tuple[Dataset, Dataset]:
    """Points within and without a circle, to train and to test on; without one rounding, so the same everywhere."""
    trained = STEPS_PER_EPOCH * workload.micro_batches * workload.samples
    tested = workload.micro_batches * workload.samples
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(-GRID, GRID + 1, (trained + tested, 2), generator=generator)
    classes = (points.square().sum(1) < GRID**2 // 2).float()
    inputs = points.float() / GRID
    return Dataset(inputs[:trained], classes[:trained]), Dataset(inputs[trained:], classes[trained:])


def _train(
    world: World, workload: Workload, seed: int, model: nn.Module, replica: nn.Module, witness: "Witness"
) -> tuple[Run, Shares]:
    train_set, test_set = make_points(workload, seed)
    tally = LocalTally(world.device)
    training = Training(
        model=model,
        optimizer=Optimization(model, default_optimizer("adam", lr=0.001)),
        loss=loss_sum,
        reducer=ExactReducer(
            model,
            replica,
            micro_batches=workload.micro_batches,
            tally=tally,
            stop_requested=lambda: False,
            device=world.device,
        ),
        tally=tally,
        world=world,
        train_set=OneByOne(train_set.to(world.device)),
        test_set=OneByOne(test_set.to(world.device)),
        batch_size=workload.micro_batches * workload.samples,
        seed=seed,
        events=witness,
    )
    ended = "trained"
    try:
        train(training, epochs=EPOCHS, progress=Progress())
    except OutOfRangeError:
        ended = "out of range"
        witness.close_step()
    sums, noted = witness.figures()
    owned = range(world.ranks.rank, workload.micro_batches, world.ranks.world_size)
    shares = {micro_batch: noted[number :: len(owned)] for number, micro_batch in enumerate(owned)}
    digest = _digest(model, witness.tallies, ended)
    key = hashlib.sha256(repr((digest, sums, sorted(shares.items()))).encode()).hexdigest()
    return Run(digest, sums, key), shares


def _digest(model: nn.Module, tallies: Sequence[int], ended: str) -> str:
    digest = hashlib.sha256(f"{ended} {tallies}".encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


class Witness:
    """Notes the bits of all gradients that pass through the training `run`; the training's `Events`."""

    def __init__(self, model: nn.Module, run: str, seed: int, trouble: Trouble, mark: Mark) -> None:
        self._model = model
        self._mark: Callable[[int], None] = partial(mark, run)
        self._corrupt = partial(trouble.corrupt, f"{run} {seed}")
        self._parameters = list(model.parameters())
        self._zero = torch.zeros((), dtype=torch.int64, device=self._parameters[0].device)
        self._passing: list[Tensor] = []
        self._hooks: list[Any] = []
        self._shares: list[Tensor] = []
        self._sums: list[Tensor] = []
        self.tallies: list[int] = []
        """Loss units, right answers and samples of each epoch, trained and tested."""

    def before_step(self, step: int) -> None:
        """Note what the step before left in the gradients."""
        self.close_step()
        self._mark(step)
        self._corrupt(step, STEPS, self._model)
        # behind the hook of a fault, so that it sees what the fault left
        self._hooks = [parameter.register_hook(self._note) for parameter in self._parameters]

    def _note(self, gradient: Tensor) -> None:
        self._passing.append(_bits_of(gradient))

    def close_step(self) -> None:
        """Note what the step that was just taken left in the gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._passing:
            self._shares.append(torch.stack(self._passing).view(-1, len(self._parameters)).sum(1))
            self._sums.append(
                sum((_bits_of(cast(Tensor, parameter.grad)) for parameter in self._parameters), self._zero)
            )
            self._passing.clear()

    def figures(self) -> tuple[list[int], list[int]]:
        """The sums of all steps, and the shares of all steps and micro-batches, in the order in which they were run."""
        return torch.stack(self._sums).tolist(), torch.cat(self._shares).tolist()

    def stop_requested(self) -> bool:
        """Never: nothing is saved here."""
        return False

    def save_due(self, steps_done: int) -> bool:  # noqa: ARG002 - the protocol's argument
        """Never."""
        return False

    def save(self, progress: Progress) -> None:
        """Nothing to save."""

    def phase(self, name: str, progress: Progress) -> None:  # noqa: ARG002 - the protocol's arguments
        """Note what the epoch's last step left."""
        self.close_step()

    def epoch_done(self, progress: Progress, test: Tally) -> None:
        """Note loss and accuracy."""
        for tally in (progress.train, test):
            self.tallies += [tally.units["loss"], tally.units["accuracy"] >> LOSS_BITS, tally.count]


def _bits_of(gradient: Tensor) -> Tensor:
    return gradient.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)


# ---- the report


def section(
    before: dict[str, Any] | None,
    fleet: Mapping[str, Sequence[int]],
    alone: Sequence[Run],
    together: Sequence[Together],
    again: Mapping[int, Run],
    *,
    seed: int,
    wrong: bool,
) -> dict[str, Any]:
    """The entry in verify.json for all rounds so far: `before`, and one more.

    Lists up to twenty rounds rank by rank: the first, and those in which something was wrong.
    """
    before = before or {"rounds": 0, "failed_rounds": 0, "kinds": [], "told": []}
    told = {
        "seed": seed,
        "alone": [one.digest for one in alone],
        "together": [one.digest for one in together],
        "again": {rank: one.digest for rank, one in again.items()},
        "kinds": [{"kind": kind} | asdict(usual([alone[rank] for rank in ranks])) for kind, ranks in fleet.items()],
    }
    first_or_wrong = (wrong or not before["told"]) and len(before["told"]) < 20
    rows = [_row(kind, ranks, alone, together, mixed=len(fleet) > 1) for kind, ranks in fleet.items()]
    return {
        "rounds": before["rounds"] + 1,
        "failed_rounds": before["failed_rounds"] + wrong,
        "steps": STEPS,
        "method": _method(len(fleet), len(alone)),
        "kinds": before["kinds"] if before["failed_rounds"] and not wrong else rows,
        "told": [*before["told"], told] if first_or_wrong else before["told"],
    }


def usual(runs: Sequence[Run]) -> Run:
    """The most common of `runs`."""
    key, _ = Counter(run.key for run in runs).most_common(1)[0]
    return next(run for run in runs if run.key == key)


def _row(
    kind: str, ranks: Sequence[int], alone: Sequence[Run], together: Sequence[Together], *, mixed: bool
) -> dict[str, Any]:
    digest, agree = Counter(alone[rank].digest for rank in ranks).most_common(1)[0]
    final, agree_together = Counter(together[rank].digest for rank in ranks).most_common(1)[0]
    comparison = "" if mixed else ", as alone" if final == digest else ", not as alone"
    return {
        "kind": kind,
        "ranks": list(ranks),
        "alone": f"{agree} of {len(ranks)} agree",
        "together": f"{agree_together} of {len(ranks)} agree{comparison}",
        "digest": digest,
    }


def _method(kinds: int, ranks: int) -> str:
    if ranks == 1:
        return (
            "One rank: it trained alone twice and once through DistributedDataParallel, and was compared with itself. "
            "A fault that repeats to the bit is not seen, unless --against names the verify.json of another machine of "
            "this kind."
        )
    if kinds > 1:
        return (
            f"The ranks are of {kinds} kinds, which may round differently: they are compared within each kind, and the "
            "training together, in which all kinds mix, is not compared with those alone."
        )
    limits = (
        " With two ranks, a difference is seen; whose fault it is, only if a rank departs from itself."
        if ranks == 2
        else ""
    )
    return f"Each rank trained alone, then all together: each gradient, each sum and all weights are compared.{limits}"
