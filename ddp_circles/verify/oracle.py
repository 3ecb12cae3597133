"""A training that knows the right answer: every rank alone and all ranks together must arrive at the same bits.

Alone, a rank runs every micro-batch itself and communicates nothing; together, the ranks share the micro-batches and
add their gradients exactly. Both go through the package's own loop. Compared are not only the weights at the end: of
every micro-batch the bits of its gradient are summed, and of every step the bits of the summed gradient, so that a
single flipped bit is seen even where rounding would hide it from the weights, together with the step it happened in.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ddp_circles.data import Dataset
from ddp_circles.errors import OutOfRangeError
from ddp_circles.exact import ExactReducer
from ddp_circles.job.ranks import Ranks
from ddp_circles.job.world import World
from ddp_circles.loop import Training, train
from ddp_circles.metrics import LocalTally, Progress, Tally
from ddp_circles.models import Classifier, loss_sum
from ddp_circles.verify.board import Mark
from ddp_circles.verify.findings import Finding, spell_ranks
from ddp_circles.verify.injection import Trouble

EPOCHS = 2
STEPS_PER_EPOCH = 12
STEPS = EPOCHS * STEPS_PER_EPOCH
TOLD = 20
"""Rounds that verify.json tells of rank by rank: the first, and those in which something was wrong."""
GRID = 64
"""Points have whole coordinates up to this, divided by it: made of integers, they are the same on every device."""


@dataclass(frozen=True)
class Workload:
    """What is trained: the widths of the hidden layers, V, and the samples of each micro-batch."""

    hidden: tuple[int, ...]
    micro_batches: int
    samples: int


def choose_workload(world_size: int, *, on_cuda: bool) -> Workload:
    """A workload that gives every rank a share of every step; eight micro-batches up to eight ranks."""
    micro_batches = 8 * -(-world_size // 8)
    return Workload((1024, 1024, 1024), micro_batches, 256) if on_cuda else Workload((64, 64), micro_batches, 32)


@dataclass(frozen=True)
class Run:
    """What one training left: equal runs have equal fields."""

    digest: str
    """SHA-256 of weights, loss and accuracy."""
    sums: list[int]
    """For each step, the bits of the summed gradient, added up."""
    shares: dict[int, list[int]] = field(repr=False)
    """For each micro-batch that this rank ran, by its number: for each step the bits of its gradient, added up."""

    @property
    def key(self) -> str:
        """One word for everything that this rank computed."""
        return hashlib.sha256(repr((self.digest, self.sums, sorted(self.shares.items()))).encode()).hexdigest()


def train_alone(world: World, workload: Workload, seed: int, trouble: Trouble, mark: Mark, run: str) -> Run:
    """Train in this rank, without a word to the others."""
    alone = World(Ranks(), world.device, world.backend, world.store, world.timeout, world.number)
    model = make_model(workload, seed).to(world.device)
    witness = Witness(model, partial(mark, run), partial(trouble.flip, f"{run} {seed}"))
    return _train(_make_training(model, model, alone, workload, seed, witness), witness)


def train_together(world: World, workload: Workload, seed: int, trouble: Trouble, mark: Mark) -> Run:
    """Train on all ranks."""
    model = make_model(workload, seed).to(world.device)
    witness = Witness(model, partial(mark, "together"), partial(trouble.flip, f"together {seed}"))
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return _train(_make_training(model, replica, world, workload, seed, witness), witness)


def make_model(workload: Workload, seed: int) -> Classifier:
    """The classifier with the initial weights of `seed`."""
    torch.manual_seed(seed)
    return Classifier(2, workload.hidden, "relu", 2)


def make_points(workload: Workload, seed: int) -> tuple[Dataset, Dataset]:
    """Points within and without a circle, to train and to test on; without one rounding, so the same everywhere."""
    trained = STEPS_PER_EPOCH * workload.micro_batches * workload.samples
    tested = workload.micro_batches * workload.samples
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(-GRID, GRID + 1, (trained + tested, 2), generator=generator)
    classes = (points.square().sum(1) < GRID**2 // 2).float()
    inputs = points.float() / GRID
    return Dataset(inputs[:trained], classes[:trained]), Dataset(inputs[trained:], classes[trained:])


def _make_training(
    model: nn.Module,
    replica: nn.Module,
    world: World,
    workload: Workload,
    seed: int,
    witness: "Witness",
) -> Training:
    train_set, test_set = make_points(workload, seed)
    tally = LocalTally(world.device)
    return Training(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01, fused=True),
        loss=loss_sum,
        reducer=ExactReducer(
            model,
            replica,
            micro_batches=workload.micro_batches,
            owned=-(-workload.micro_batches // world.ranks.world_size),
            tally=tally,
            stop_requested=lambda: False,
            device=world.device,
        ),
        tally=tally,
        world=world,
        train_set=train_set.to(world.device),
        test_set=test_set.to(world.device),
        batch_size=workload.micro_batches * workload.samples,
        seed=seed,
        events=witness,
    )


def _train(training: Training, witness: "Witness") -> Run:
    ended = "trained"
    try:
        train(training, epochs=EPOCHS, progress=Progress())
    except OutOfRangeError:
        ended = "out of range"
        witness.close_step()
    sums, noted = witness.figures()
    ranks = training.world.ranks
    owned = range(ranks.rank, training.reducer.micro_batches, ranks.world_size)
    shares = {stream: noted[number :: len(owned)] for number, stream in enumerate(owned)}
    return Run(_digest(training.model, witness.tallies, ended), sums, shares)


def _digest(model: nn.Module, tallies: Sequence[int], ended: str) -> str:
    digest = hashlib.sha256(f"{ended} {tallies}".encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


class Witness:
    """Notes the bits of all gradients that pass through a training; the training's `Events`.

    `mark(step)` and `flip(step, steps, model)` are called before each step.
    """

    def __init__(self, model: nn.Module, mark: Any, flip: Any) -> None:
        self._model = model
        self._mark = mark
        self._flip = flip
        self._parameters = list(model.parameters())
        self._zero = torch.zeros((), dtype=torch.int64, device=self._parameters[0].device)
        self._passing: list[Tensor] = []
        self._hooks: list[RemovableHandle] = []
        self._shares: list[Tensor] = []
        self._sums: list[Tensor] = []
        self.tallies: list[int] = []
        """Loss units, right answers and samples of each epoch, trained and tested."""

    def before_step(self, step: int) -> None:
        """Note what the step before left in the gradients."""
        self.close_step()
        self._mark(step)
        self._flip(step, STEPS, self._model)
        # behind the hook of a flip, so that it sees what the flip left
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
            self.tallies += [tally.loss_units, tally.correct, tally.count]


def _bits_of(gradient: Tensor) -> Tensor:
    return gradient.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)


# ---- on rank 0: whose fault it is


@dataclass(frozen=True)
class Alone:
    """What a rank tells of its training alone."""

    digest: str
    key: str
    sums: list[int]

    @classmethod
    def of(cls, run: Run) -> "Alone":
        """The short form of `run`."""
        return cls(run.digest, run.key, run.sums)


@dataclass(frozen=True)
class Together:
    """What a rank tells of the training together, held against its own training alone."""

    digest: str
    share: int | None
    """The first step in which it computed another gradient than alone; None if there is none."""
    sum: int | None
    """The first step in which the summed gradient was another one than alone."""

    @classmethod
    def of(cls, run: Run, alone: Run) -> "Together":
        """Where `run` departs from `alone`."""
        steps = [first_difference(share, alone.shares[stream]) for stream, share in run.shares.items()]
        return cls(run.digest, _earliest(steps), first_difference(run.sums, alone.sums))


def first_difference(these: Sequence[int], those: Sequence[int]) -> int | None:
    """The first position where two sequences differ, be it that one has ended; None for equal ones."""
    for position in range(max(len(these), len(those))):
        if these[position : position + 1] != those[position : position + 1]:
            return position
    return None


def _earliest(steps: Iterable[int | None]) -> int | None:
    return min((step for step in steps if step is not None), default=None)


def majority(keys: Sequence[str]) -> str | None:
    """What more than half of `keys` say."""
    key, count = Counter(keys).most_common(1)[0]
    return key if 2 * count > len(keys) else None


def ranks_to_repeat(kinds: Iterable[Sequence[int]], alone: Sequence[Alone]) -> list[int]:
    """Who trains alone a second time: kinds that disagree, and single ranks, which have nobody else to agree with."""
    return [rank for kind in kinds if len(kind) == 1 or len({alone[rank].key for rank in kind}) > 1 for rank in kind]


def judge_alone(kind: Sequence[int], alone: Sequence[Alone], again: Mapping[int, Alone]) -> list[Finding]:
    """Who is at fault by the trainings alone of the ranks of one kind; `again`: those that were repeated."""
    usual = majority([alone[rank].key for rank in kind])
    unsteady = [rank for rank in kind if rank in again and again[rank].key != alone[rank].key]
    outvoted = [rank for rank in kind if usual is not None and alone[rank].key != usual]
    reference = next((alone[rank] for rank in kind if alone[rank].key == usual), None)
    findings = []
    for rank in sorted({*outvoted, *unsteady}):
        if rank in outvoted and reference is not None:
            step = first_difference(alone[rank].sums, reference.sums)
            who = spell_ranks(other for other in kind if other not in outvoted)
            what = f"trained alone, {spell_ranks([rank])} departs from {who} {_from_step(step)}"
        else:
            step = first_difference(alone[rank].sums, again[rank].sums)
            what = f"trained alone twice, {spell_ranks([rank])} departs from itself {_from_step(step)}"
        if rank in outvoted:
            what += (
                "; a second time it differs again: a fault that comes and goes"
                if rank in unsteady
                else ("; a second time it gets the same again: a lasting fault")
            )
        findings.append(Finding("wrong", "training alone", (rank,), what, _test_the_device(rank)))
    steady = [rank for rank in kind if rank not in unsteady]
    if usual is None and len({alone[rank].key for rank in steady}) > 1:
        what = (
            f"trained alone, {spell_ranks(steady)} disagree, and each gets its own result a second time: it cannot be "
            "said which of them is wrong, not by the training together either, which holds the gradients of all"
        )
        advice = (
            "verify again with more ranks of this kind, or compare the digest with that of another machine of this kind"
        )
        findings.append(Finding("wrong", "training alone", (), what, advice))
    return findings


def judge_together(
    ranks: Sequence[int], alone: Sequence[Alone], together: Sequence[Together], *, mixed: bool
) -> list[Finding]:
    """Who is at fault by the training together; `ranks`: one kind of a fleet that is `mixed`, or else all."""
    if not mixed:
        step = _earliest(step for rank in ranks for step in (together[rank].share, together[rank].sum))
        if step is not None:
            return _judge_step(step, ranks, alone, together)
    usual = majority([together[rank].digest for rank in ranks])
    odd = tuple(rank for rank in ranks if usual is not None and together[rank].digest != usual)
    if usual is None or odd:
        what = f"trained together, {spell_ranks(odd or ranks)} ended with other weights than the other ranks"
        return [Finding("wrong", "training together", odd, what, _test_the_device(*odd))]
    if (
        not mixed
        and any(alone[rank].digest != usual for rank in ranks)
        and len({alone[rank].key for rank in ranks}) == 1
    ):
        what = "trained together, all ranks ended with other weights than alone, though all gradients were the same"
        return [
            Finding(
                "wrong", "training together", (), what, "verify again; if it recurs, this is a fault of the software"
            )
        ]
    return []


def _judge_step(step: int, ranks: Sequence[int], alone: Sequence[Alone], together: Sequence[Together]) -> list[Finding]:
    """Who is at fault where something departs from the trainings alone in `step` for the first time."""
    computed = [rank for rank in ranks if together[rank].share == step]
    received = tuple(rank for rank in ranks if together[rank].sum == step)
    if computed:
        return [
            Finding(
                "wrong",
                "training together",
                (rank,),
                f"trained together, {spell_ranks([rank])} computed another gradient in step {step} than alone; "
                "its part is in the sum, so that all ranks went on with the same wrong weights",
                _test_the_device(rank),
            )
            for rank in computed
        ]
    if len({alone[rank].key for rank in ranks}) > 1:
        return []  # the trainings alone disagree already, and the sum holds the gradients of all
    if 2 * len(received) < len(ranks):
        what = (
            f"trained together, {spell_ranks(received)} got a wrong sum of gradients in step {step}, the others did not"
        )
        return [
            Finding(
                "wrong", "training together", received, what, f"test the link and the device of {spell_ranks(received)}"
            )
        ]
    what = (
        f"trained together, the sum of gradients in step {step} was wrong on {spell_ranks(received)}, though each rank "
        "had computed its part as it did alone: it went wrong on the way or in the addition"
    )
    advice = (
        "look at the findings about collectives; soak with --minutes to see whether it recurs; try another --backend"
    )
    return [Finding("wrong", "training together", (), what, advice)]


def _from_step(step: int | None) -> str:
    return "in its gradients, which rounding then hid" if step is None else f"from step {step} on"


def _test_the_device(*ranks: int) -> str:
    if not ranks:
        return "verify again with more ranks"
    return f"take {spell_ranks(ranks)} out of the job, run the vendor's diagnostics on its device, and verify again"


def judge(
    fleet: Sequence[Sequence[int]], alone: Sequence[Alone], together: Sequence[Together], again: Mapping[int, Alone]
) -> list[Finding]:
    """Everything that one round of trainings shows; `fleet`: the ranks of each kind."""
    mixed = len(fleet) > 1
    findings = []
    for kind in fleet:
        findings += judge_alone(kind, alone, again)
        findings += judge_together(kind, alone, together, mixed=mixed)
    return findings


def section(
    before: dict[str, Any] | None,
    fleet: Mapping[str, Sequence[int]],
    alone: Sequence[Alone],
    together: Sequence[Together],
    again: Mapping[int, Alone],
    *,
    seed: int,
    wrong: bool,
) -> dict[str, Any]:
    """What verify.json says of all rounds so far: `before`, and one more."""
    before = before or {"rounds": 0, "failed_rounds": 0, "kinds": [], "told": []}
    told = {
        "seed": seed,
        "alone": [one.digest for one in alone],
        "together": [one.digest for one in together],
        "again": {rank: one.digest for rank, one in again.items()},
    }
    first_or_wrong = (wrong or not before["told"]) and len(before["told"]) < TOLD
    rows = [_row(kind, ranks, alone, together, mixed=len(fleet) > 1) for kind, ranks in fleet.items()]
    return {
        "rounds": before["rounds"] + 1,
        "failed_rounds": before["failed_rounds"] + wrong,
        "steps": STEPS,
        "method": _method(len(fleet), len(alone)),
        "kinds": before["kinds"] if before["failed_rounds"] and not wrong else rows,
        "told": [*before["told"], told] if first_or_wrong else before["told"],
    }


def _row(
    kind: str, ranks: Sequence[int], alone: Sequence[Alone], together: Sequence[Together], *, mixed: bool
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
            "A fault that repeats to the bit is not seen: compare the digest with that of another machine of this kind."
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
