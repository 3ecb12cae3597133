"""Map-style data sets, read sample by sample: the bits, who reads what and when, and how a reader's end is told."""

import hashlib
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DistributedSampler, IterableDataset, Subset, get_worker_info, random_split
from torch.utils.data import Dataset as TorchDataset

from ddp_circles import Config, Dataset, Result, Split, UserError
from ddp_circles import fit as package_fit
from ddp_circles.job import refusal
from ddp_circles.job.faults import InjectedFaultError
from tests.harness.ranks import Job, Outcome, run_ranks, wait_until
from tests.harness.runs import Bits, bits, checkpoint_steps, metrics, status

FEATURES = 3
TRAINED_ON, TESTED_ON, BATCH, MICRO_BATCHES, EPOCHS = 35, 21, 16, 8, 2
"""Steps of 16, 16 and 3 samples, the last fewer than micro-batches; evaluations in batches of 16 and 5."""
STEPS = 3
TRIED = 16
"""The first samples, which are also read before the first step."""
NOT_TRIED = 20
CLOCK = ("train/samples_per_second", "seconds")
INPUTS = torch.rand(TRAINED_ON + TESTED_ON, FEATURES, generator=torch.Generator().manual_seed(1))
TARGETS = (INPUTS.sum(1) > FEATURES / 2).float()
GONE_SECONDS = 2.0
"""Time that a worker process may take to end after its rank."""


def rows(part: str) -> slice:
    return slice(TRAINED_ON) if part == "train" else slice(TRAINED_ON, None)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0))


def quietly(**settings: Any) -> Config:
    defaults: dict[str, Any] = {
        "epochs": EPOCHS, "batch_size": BATCH, "log_every": 100, "wandb": "disabled", "plots": False,
        "checkpoint_seconds": 1000,
    }  # fmt: skip
    return Config(**defaults | settings)


def fit(*arguments: Any, **named: Any) -> Result:
    """Train as a program does by itself: here, a process from the fork server would start its own in that way too."""
    multiprocessing.set_start_method("fork", force=True)
    return package_fit(*arguments, **named)


def draw() -> list[float]:
    """Numbers from each generator that is seeded for each sample."""
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


class Samples(TorchDataset[Any]):
    """The samples of a part as they are; subclasses change what an item is."""

    def __init__(self, part: str) -> None:
        self.part, self.inputs, self.targets = part, INPUTS[rows(part)], TARGETS[rows(part)]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index], self.targets[index]


class Augmented(Samples):
    """Each item with numbers drawn for it."""

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index] + torch.tensor(draw()), self.targets[index]


class Changed(Samples):
    """Each item as `change` makes it."""

    def __init__(self, part: str, change: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__(part)
        self.change = change

    def __getitem__(self, index: int) -> Any:
        return self.change(self.inputs[index], self.targets[index])


class Read(NamedTuple):
    """A read of a sample, as `Logged` notes it."""

    rank: int
    process: int
    in_worker: bool
    part: str
    sample: int
    drawn: str


class Logged(Samples):
    """`Augmented`, with a line in the file `log` for each read."""

    def __init__(self, part: str, log: Path) -> None:
        super().__init__(part)
        self.log = log

    def __getitem__(self, index: int) -> Any:
        drawn, in_worker = draw(), int(get_worker_info() is not None)
        line = f"{os.environ['RANK']} {os.getpid()} {in_worker} {self.part} {index} {','.join(map(repr, drawn))}\n"
        descriptor = os.open(self.log, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
        os.write(descriptor, line.encode())
        os.close(descriptor)
        return self.inputs[index] + torch.tensor(drawn), self.targets[index]


def reads(log: Path) -> list[Read]:
    """The reads in their order."""
    found = (line.split() for line in log.read_text().splitlines())
    return [
        Read(int(rank), int(pid), worker == "1", part, int(index), drawn)
        for rank, pid, worker, part, index, drawn in found
    ]


def as_it_is(split: Split[Any]) -> Split[Any]:
    return split


def plain() -> Split[Any]:
    return Split(Samples("train"), Samples("test"))


def augmented() -> Split[Any]:
    return Split(Augmented("train"), Augmented("test"))


def logged(log: Path) -> Split[Any]:
    return Split(Logged("train", log), Logged("test", log))


def in_tensors() -> Split[Any]:
    return Split(*(Dataset(INPUTS[rows(part)], TARGETS[rows(part)]) for part in ("train", "test")))


def children() -> list[int]:
    """The processes that this one has started and that still run after a while."""
    return still_there(process.pid for process in psutil.Process().children(recursive=True))


def still_there(processes: Iterable[int]) -> list[int]:
    """Those of the processes that run after `GONE_SECONDS`."""
    known, deadline = set(processes), time.monotonic() + GONE_SECONDS
    while (left := [pid for pid in known if runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def runs(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def train(
    run_dir: Path,
    make: Callable[[], Any],
    workers: int = 0,
    settings: Mapping[str, Any] | None = None,
    others: Callable[[], dict[str, Any]] = dict,
) -> dict[str, float]:
    """Train; no worker process may be left at the end."""
    config = quietly(run_dir=run_dir, **(settings or {}))
    figures = fit(config, data=make(), workers=workers, **{"model": model()} | others()).metrics
    assert children() == []
    return figures


def trained(run_dir: Path, make: Callable[[], Any], size: int, workers: int, **settings: Any) -> Bits:
    """The bits of a run on `size` ranks with so many workers each."""
    run_ranks(train, size, run_dir, make, workers, settings, timeout=60)
    return bits(run_dir)


# ---- the same bits


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Bits:
    """The bits of one rank that reads augmented samples with a worker."""
    return trained(tmp_path_factory.mktemp("alone"), augmented, 1, 1)


OTHER_WORLDS = [
    (1, 0), (1, 2), (2, 1), (3, 0), (3, 2),
    *(pytest.param(*world, marks=pytest.mark.thorough) for world in ((2, 0), (2, 2), (3, 1), (4, 1), (5, 0), (8, 1))),
]  # fmt: skip


@pytest.mark.timeout(90)
@pytest.mark.parametrize("size, workers", OTHER_WORLDS)
def test_augmented_samples_train_to_the_same_bits(tmp_path: Path, alone: Bits, size: int, workers: int) -> None:
    assert trained(tmp_path, augmented, size, workers) == alone


def test_augmentation_matters(tmp_path: Path, alone: Bits) -> None:
    """Else the tests above would say little: other seeds, and no augmentation, give other bits."""
    others = [trained(tmp_path / "plain", plain, 1, 1), trained(tmp_path / "seed", augmented, 1, 1, seed=7)]
    assert len({alone.model, *(other.model for other in others)}) == 3


@pytest.fixture(scope="module")
def from_tensors(tmp_path_factory: pytest.TempPathFactory) -> Bits:
    return trained(tmp_path_factory.mktemp("tensors"), in_tensors, 1, 0)


def but_test_loss(found: Bits) -> tuple[str, list[tuple[Any, ...]]]:
    """All bits but those of the test losses.

    Samples that are read are evaluated in batches as large as those of training, tensors in larger ones; the loss of
    each piece is rounded, to a multiple of 2^-24.
    """
    return found.model, [row[:4] + row[5:] for row in found.rows]


@pytest.mark.timeout(90)
@pytest.mark.parametrize("size, workers", [(1, 0), (1, 2), (2, 0), (3, 1)])
def test_a_data_set_trains_to_the_bits_of_its_samples_in_tensors(
    tmp_path: Path, from_tensors: Bits, size: int, workers: int
) -> None:
    found = trained(tmp_path, plain, size, workers)
    assert but_test_loss(found) == but_test_loss(from_tensors)
    for row, expected in zip(found.rows, from_tensors.rows, strict=True):
        assert row[4] == pytest.approx(expected[4], rel=1e-6)


def one_batch_tested(make: Callable[[], Split[Any]]) -> Split[Any]:
    """As few samples to test on as make one batch, for tensors and data sets alike."""
    train_set, test_set = make()
    if isinstance(test_set, Dataset):
        return Split(train_set, Dataset(*(values[:BATCH] for values in test_set)))
    return Split(train_set, Subset(test_set, range(BATCH)))


def test_in_evaluation_batches_alike_all_bits_are_those_of_tensors(tmp_path: Path) -> None:
    expected = trained(tmp_path / "tensors", partial(one_batch_tested, in_tensors), 2, 0)
    assert trained(tmp_path / "read", partial(one_batch_tested, plain), 2, 1) == expected


def half_in_tensors(part: str) -> Split[Any]:
    return in_tensors()._replace(**{part: Samples(part)})


@pytest.mark.parametrize("part", ["train", "test"])
def test_one_part_may_be_in_tensors(tmp_path: Path, from_tensors: Bits, part: str) -> None:
    make = partial(half_in_tensors, part)
    found = {world: trained(tmp_path / str(world), make, *world) for world in ((1, 0), (1, 1), (2, 2), (3, 0))}
    assert len(set(found.values())) == 1
    if part == "train":
        assert found[1, 1] == from_tensors
    assert but_test_loss(found[1, 1]) == but_test_loss(from_tensors)


def cut(kind: str) -> Split[Any]:
    """The same samples in another of torch's data sets."""
    whole = Samples("train")
    parts: dict[str, Callable[[], TorchDataset[Any]]] = {
        "subset": lambda: Subset(whole, list(range(TRAINED_ON))),
        "concatenation": lambda: ConcatDataset([Subset(whole, range(11)), Subset(whole, range(11, TRAINED_ON))]),
        "random split": lambda: random_split(whole, [25, 10], torch.Generator().manual_seed(3))[0],
    }
    return Split(parts[kind](), Samples("test"))


def random_part() -> Split[Any]:
    """The samples of the random split, in tensors."""
    chosen = torch.randperm(TRAINED_ON, generator=torch.Generator().manual_seed(3))[:25]
    return Split(Dataset(INPUTS[chosen], TARGETS[chosen]), in_tensors().test)


def train_cuts(folder: Path) -> None:
    for kind in ("subset", "concatenation", "random split"):
        train(folder / kind, partial(cut, kind), 1)
    train(folder / "chosen", random_part)


def test_torchs_own_compositions_are_read_too(tmp_path: Path, from_tensors: Bits) -> None:
    run_ranks(train_cuts, 2, tmp_path)
    for kind in ("subset", "concatenation"):
        assert but_test_loss(bits(tmp_path / kind)) == but_test_loss(from_tensors)
    assert but_test_loss(bits(tmp_path / "random split")) == but_test_loss(bits(tmp_path / "chosen"))


def long_sum(inputs: Tensor, target: Tensor) -> Any:
    """A sum so long that torch computes it with all its threads."""
    return inputs * torch.rand(300_000).sum() / 150_000, target


def summed() -> Split[Any]:
    return Split(Changed("train", long_sum), Changed("test", long_sum))


def test_threads_of_the_rank_do_not_matter_to_what_is_read(tmp_path: Path) -> None:
    found = [trained(tmp_path / str(workers), summed, 1, workers, threads=2, epochs=1) for workers in (0, 1)]
    assert found[0] == found[1]


def unlike_targets(inputs: Tensor, target: Tensor) -> Any:
    """A target of one type or another, as a data set that reads several kinds of files may have."""
    return inputs, inputs[0].double() / 3 if target else inputs[0] / 3


def squares(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits - targets).square().sum()


def read_unlike_types(folder: Path) -> list[str]:
    """The bits with 0 and with 1 worker, or the refusal."""
    found = []
    for workers in (0, 1):
        split = Split(Changed("train", unlike_targets), Changed("test", unlike_targets))
        try:
            train(folder / str(workers), partial(as_it_is, split), workers, None, lambda: {"loss": squares})
            digest = hashlib.sha256((folder / str(workers) / "model.safetensors").read_bytes()).hexdigest()
            found.append(f"{digest} {[row['train/loss'] for row in metrics(folder / str(workers))]}")
        except (UserError, SystemExit) as error:
            found.append(type(error).__name__)
    return found


def test_samples_of_unlike_types_have_the_same_bits_in_workers_or_are_refused(tmp_path: Path) -> None:
    ((in_rank, in_worker),) = run_ranks(read_unlike_types, 1, tmp_path)
    assert in_rank == in_worker


# ---- each sample once, by its own rank


def order(epoch: int) -> list[int]:
    """The order of an epoch, as torch's sampler has it."""
    sampler = DistributedSampler(range(TRAINED_ON), num_replicas=1, rank=0, seed=42)  # type: ignore[arg-type, var-annotated]
    sampler.set_epoch(epoch)
    return list(sampler)


def share(samples: list[int], rank: int, size: int, first: int = 0) -> list[int]:
    """The samples of a rank in the order in which it trains on them, from step `first` on."""
    found = []
    for start in range(first * BATCH, len(samples), BATCH):
        positions = range(start, min(start + BATCH, len(samples)))
        for number in range(rank, MICRO_BATCHES, size):
            found += [samples[position] for position in positions if position % MICRO_BATCHES == number]
    return found


def check_shares(found: list[Read], size: int, workers: int, expected: dict[tuple[int, str], list[int]]) -> None:
    """Each rank has read what is expected of it, in order; only the first samples were also tried, in the rank."""
    for rank in range(size):
        for part in ("train", "test"):
            own = [read for read in found if (read.rank, read.part) == (rank, part)]
            tried = [read.sample for read in own if not read.in_worker]
            if workers:
                assert Counter(read.sample for read in own if read.in_worker) == Counter(expected[rank, part])
                assert len({read.process for read in own if read.in_worker}) <= workers
            else:
                split = len(tried) - len(expected[rank, part])
                assert tried[split:] == expected[rank, part], (rank, part)
                tried = tried[:split]
            assert set(tried) <= set(range(TRIED))
            assert len(tried) <= 3 * TRIED


def by_epoch(found: list[Read], size: int, epochs: int) -> dict[tuple[str, int, int], str]:
    """The numbers drawn for each part, epoch and sample; each was read once per epoch over all ranks."""
    drawn: dict[tuple[str, int], list[str]] = defaultdict(list)
    for read in found:
        drawn[read.part, read.sample].append(read.drawn)
    assert Counter(part for part, _ in drawn) == {"train": TRAINED_ON, "test": TESTED_ON}
    for (_, index), numbers in drawn.items():
        tried = len(numbers) - epochs
        assert tried == 0 if index >= TRIED else 0 < tried <= 3 * size
        assert tried % size == 0
    return {
        (part, epoch, index): numbers[epoch - epochs]
        for (part, index), numbers in drawn.items()
        for epoch in range(epochs)
    }


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int], str]:
    """The numbers drawn on one rank with one worker."""
    folder = tmp_path_factory.mktemp("numbers")
    trained(folder / "run", partial(logged, folder / "log"), 1, 1)
    return by_epoch(reads(folder / "log"), 1, EPOCHS)


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    "size, workers", [(1, 0), (2, 2), (3, 0), (5, 1), pytest.param(9, 1, marks=pytest.mark.thorough)]
)
def test_each_sample_is_read_once_by_its_rank_with_its_own_numbers(
    tmp_path: Path, numbers: dict[tuple[str, int, int], str], size: int, workers: int
) -> None:
    log = tmp_path / "log"
    trained(tmp_path / "run", partial(logged, log), size, workers)
    orders = {"train": [order(epoch) for epoch in range(EPOCHS)], "test": [list(range(TESTED_ON))] * EPOCHS}
    expected = {
        (rank, part): [index for one in orders[part] for index in share(one, rank, size)]
        for rank in range(size)
        for part in orders
    }
    check_shares(reads(log), size, workers, expected)
    assert by_epoch(reads(log), size, EPOCHS) == numbers


def test_numbers_differ_between_samples_epochs_parts_and_seeds(
    tmp_path: Path, numbers: dict[tuple[str, int, int], str]
) -> None:
    trained(tmp_path / "run", partial(logged, tmp_path / "log"), 1, 1, seed=43)
    of_another_seed = by_epoch(reads(tmp_path / "log"), 1, EPOCHS)
    single = [number for drawn in (numbers, of_another_seed) for key, number in drawn.items() if key[:2] != ("test", 1)]
    assert len(set(single)) == len(single) == 2 * (EPOCHS * TRAINED_ON + TESTED_ON)
    for place in range(3):  # each generator by itself
        assert len({number.split(",")[place] for number in single}) == len(single)
    for index in range(TESTED_ON):
        assert numbers["test", 0, index] == numbers["test", 1, index]


def test_fast_mode_reads_each_sample_once_too(tmp_path: Path) -> None:
    exact = trained(tmp_path / "exact", augmented, 1, 1)
    for size, workers in ((1, 0), (2, 2), (3, 0)):
        log = tmp_path / f"log {size}"
        fast = trained(tmp_path / str(size), partial(logged, log), size, workers, reduction="fast")
        drawn: dict[int, list[Read]] = defaultdict(list)
        for read in reads(log):
            if read.part == "train" and read.sample >= TRIED:
                drawn[read.sample].append(read)
        assert {index: len(found) for index, found in drawn.items()} == dict.fromkeys(range(TRIED, TRAINED_ON), EPOCHS)
        for row, expected in zip(fast.rows, exact.rows, strict=True):
            assert row == pytest.approx(expected, rel=1e-3)


# ---- killed and resumed in mid-epoch


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "fault, before, after",
    [
        ("raise@0:4", (2, 1), (3, 2)),
        ("kill@1:4", (2, 2), (1, 1)),
        ("kill@0:4", (1, 0), (2, 1)),
        ("kill@2:5", (3, 1), (2, 0)),
        pytest.param("raise@1:5", (3, 0), (1, 2), marks=pytest.mark.thorough),
        pytest.param("kill@0:3", (2, 2), (3, 1), marks=pytest.mark.thorough),  # between two epochs
    ],
)
def test_resumed_in_mid_epoch_only_what_is_left_is_read(
    tmp_path: Path, alone: Bits, fault: str, before: tuple[int, int], after: tuple[int, int]
) -> None:
    step = int(fault.partition(":")[2])
    run_dir, (size, workers) = tmp_path / "run", before
    settings = {"checkpoint_steps": 1, "fault": fault}
    with Job(train, size, run_dir, partial(logged, tmp_path / "before"), workers, settings) as job:
        outcomes = job.wait(60)
    assert all(outcome.code not in (0, None) for outcome in outcomes)
    assert checkpoint_steps(run_dir)[0] == step
    assert still_there(read.process for read in reads(tmp_path / "before")) == []
    size, workers = after
    assert trained(run_dir, partial(logged, tmp_path / "after"), size, workers) == alone
    expected = {(rank, "train"): share(order(1), rank, size, first=step - STEPS) for rank in range(size)}
    # The checkpoint after an epoch's last step is written before its evaluation, which the second start then does.
    evaluations = 2 if step == STEPS else 1
    expected |= {(rank, "test"): share(list(range(TESTED_ON)), rank, size) * evaluations for rank in range(size)}
    check_shares(reads(tmp_path / "after"), size, workers, expected)


# ---- kinds of items


class Joined(nn.Module):
    """Takes inputs in two parts, as a list or tuple, or as a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = model()

    def forward(self, inputs: Any) -> Tensor:
        one, other = (inputs["one"], inputs["other"]) if isinstance(inputs, dict) else inputs
        logits: Tensor = self.layers(torch.cat([one, other], dim=1))
        return logits


class Single(nn.Module):
    """Takes one number for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = model()

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layers(inputs.unsqueeze(1).expand(-1, FEATURES))
        return logits


class Pair(NamedTuple):
    one: Tensor
    other: Tensor


def structured(logits: Tensor, targets: Any) -> Tensor:
    """A loss whose targets are in a dictionary, with a Python number in it."""
    number = targets["number"].float()
    loss: Tensor = (logits - number).square().sum() + (logits * targets["parts"][0]).square().sum()
    return loss


ITEMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[], dict[str, Any]]]] = {
    "tensors": (lambda x, y: (x, y), dict),
    "a list": (lambda x, y: [x, y], dict),
    "numpy": (lambda x, y: (x.numpy(), np.float32(y)), dict),
    "numpy of float64": (lambda x, y: (x.double().numpy(), np.float64(y)), dict),
    "target of float": (lambda x, y: (x, float(y)), dict),
    "target of int": (lambda x, y: (x, int(y)), dict),
    "target of bool": (lambda x, y: (x, bool(y)), dict),
    "target of numpy's int": (lambda x, y: (x, np.int64(y)), dict),
    "target of a numpy scalar": (lambda x, y: (x, np.array(y)), dict),
    "target of int64": (lambda x, y: (x, y.long()), dict),
    "target of float64": (lambda x, y: (x, y.double()), dict),
    "tuple": (lambda x, y: ((x[:1], x[1:]), y), lambda: {"model": Joined()}),
    "list": (lambda x, y: ([x[:1], x[1:]], y), lambda: {"model": Joined()}),
    "named tuple": (lambda x, y: (Pair(x[:1], x[1:]), y), lambda: {"model": Joined()}),
    "dictionary": (lambda x, y: ({"one": x[:1], "other": x[1:].numpy()}, int(y)), lambda: {"model": Joined()}),
    "number": (lambda x, y: (float(x[0]), float(y)), lambda: {"model": Single()}),
    "number in a tensor": (lambda x, y: (x[0], y), lambda: {"model": Single()}),
    "classes": (
        lambda x, y: (x, int(3 * x[0])),
        lambda: {"model": nn.Sequential(*list(model())[:2], nn.Linear(4, 3))},  # type: ignore[call-overload]
    ),
    "regression on float": (lambda x, y: (x, float(x[0])), lambda: {"loss": squares}),
    "structured targets": (
        lambda x, y: (x, {"number": float(y), "parts": (x[1], x[0])}),
        lambda: {"loss": structured, "metrics": {"own": structured}},
    ),
}
ALIKE = (
    ("a list", "numpy", "numpy of float64", *(name for name in ITEMS if name.startswith("target of"))),
    ("tuple", "list", "named tuple", "dictionary"),
    ("number", "number in a tensor"),
)
CONVERTED = ("numpy of float64", "number")


def train_items(folder: Path, workers: int) -> dict[str, dict[str, float]]:
    """The last figures of each kind of item."""
    found = {}
    for name, (change, others) in ITEMS.items():
        print(f"-- {name}", flush=True)
        torch.manual_seed(0)
        split = Split(Changed("train", change), Changed("test", change))
        found[name] = train(folder / name, partial(as_it_is, split), workers, {"epochs": 1}, others)
    return found


@pytest.mark.timeout(200)
def test_items_of_all_kinds(tmp_path: Path, from_tensors: Bits) -> None:
    found = {}
    for size, workers in ((1, 0), (2, 1)):
        with Job(train_items, size, tmp_path / str(size), workers) as job:
            outcomes = job.wait(90)
        assert [outcome.code for outcome in outcomes] == [0] * size, "\n".join(
            outcome.output[-3000:] for outcome in outcomes
        )
        found[size] = outcomes[0].value
        said = dict(part.split("\n", 1) for part in outcomes[0].output.split("-- ")[1:])
        for name, text in said.items():
            lines = ["the inputs of data= are converted from torch.float64 to torch.float32, as the parameters are"]
            assert [line for line in text.splitlines() if "converted" in line] == (lines if name in CONVERTED else [])
    for name in ITEMS:
        model_of = {size: (tmp_path / str(size) / name / "model.safetensors").read_bytes() for size in found}
        assert model_of[1] == model_of[2], name
        figures = [{key: value for key, value in found[size][name].items() if key not in CLOCK} for size in found]
        assert figures[0] == figures[1], name
        assert ("train/accuracy" in figures[0]) == (name not in ("regression on float", "structured targets")), name
    rows_of = {name: {key: value for key, value in found[1][name].items() if key not in CLOCK} for name in ITEMS}
    for first, *rest in (("tensors", *ALIKE[0]), *ALIKE[1:]):
        for name in rest:
            assert rows_of[name] == rows_of[first], name
    # The fields of `Bits` in their order, in which the first epoch's training figures are those of tensors.
    assert (rows_of["tensors"]["train/loss"], rows_of["tensors"]["train/accuracy"]) == from_tensors.rows[0][2:4]


# ---- what is refused before the first step


class OwnGenerator(Samples):
    """Draws from a generator of its own, which nobody seeds."""

    def __init__(self, part: str) -> None:
        super().__init__(part)
        self.generator = np.random.default_rng(3)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index] * self.generator.random(), self.targets[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(INPUTS, TARGETS, strict=True)


class Unmeasured(Samples):
    def __len__(self) -> int:
        raise OSError("the index file is missing")


class Fingerprinted(Samples):
    def __init__(self, part: str, fingerprint: Any, length: int | None = None) -> None:
        super().__init__(part)
        self.fingerprint, self.length = fingerprint, length or len(self.inputs)

    def __len__(self) -> int:
        return self.length


def fail(inputs: Tensor, target: Tensor) -> Any:
    raise KeyError("no such\npicture")


def unlike(inputs: Tensor, target: Tensor) -> Any:
    return inputs[: 1 + int(target)], target


def changed(change: Callable[[Tensor, Tensor], Any], part: str = "train") -> dict[str, Any]:
    return {"data": plain()._replace(**{part: Changed(part, change)})}


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "stream": (lambda: {"data": plain()._replace(train=Stream())}, "data= must be Split.*data.train is .*Stream$"),
    "no length": (lambda: {"data": plain()._replace(test=Unmeasured("test"))}, "data.test.*the index file is missing"),
    "empty": (lambda: {"data": plain()._replace(test=Subset(Samples("test"), []))}, "^data.test holds no samples"),
    "negative": (lambda: {"workers": -1}, "^workers= must be a whole number, 0 or more, got -1$"),
    "true": (lambda: {"workers": True}, "^workers= must be a whole number, 0 or more, got True$"),
    "text": (lambda: {"workers": "2"}, "^workers= must be a whole number, 0 or more, got '2'$"),
    "half": (lambda: {"workers": 1.5}, "^workers= must be a whole number, 0 or more, got 1.5$"),
    "tensors": (lambda: {"data": in_tensors(), "workers": 2}, "^workers= read map-style data sets, and here all"),
    "points": (lambda: {"model": None, "data": None, "workers": 2}, "^workers= read map-style data sets"),
    "number as fingerprint": (
        lambda: {"data": plain()._replace(train=Fingerprinted("train", 5))},
        "^data.train.fingerprint must be a text, got int$",
    ),
    "generator": (
        lambda: {"data": plain()._replace(train=OwnGenerator("train"))},
        "^data.train gives other samples when it is read again with the same random numbers",
    ),
    "raises": (lambda: changed(fail), r"^data.train\[0\] failed: KeyError: .*no such.*test_data_sets.py, line \d+\)$"),
    "raises in the test": (lambda: changed(fail, "test"), r"^data.test\[0\] failed: KeyError: "),
    "no pair": (lambda: changed(lambda x, _: x), r"^data.train\[0\] must be \(inputs, target\).* got shape \[3\]"),
    "triple": (lambda: changed(lambda x, y: (x, y, y)), r"^data.train\[0\] must be \(inputs, .* got tuple of 3$"),
    "dictionary": (lambda: changed(lambda x, y: {"x": x, "y": y}), r"^data.train\[0\] must be \(inputs, target\)"),
    "nothing": (lambda: changed(lambda x, y: None), r"^data.train\[0\] must be \(inputs, target\).* got NoneType$"),
    "nan": (lambda: changed(lambda x, y: (x * torch.nan, y)), r"^data.train\[0\] holds nan, not a finite number"),
    "infinite target": (
        lambda: changed(lambda x, y: (x, torch.inf), "test"),
        r"^data.test\[0\] holds inf, not a finite number",
    ),
    "shapes": (lambda: changed(unlike), r"^data.train\[\d+\] is .*, and the first one was "),
    "objects": (lambda: changed(lambda x, y: (object(), y)), r"^data.train\[0\] cannot be put into a batch"),
    "texts": (lambda: changed(lambda x, y: ("a picture", y)), "^data.train.* holds 'a picture', which is no tensor"),
    "names beside numbers": (lambda: changed(lambda x, y: ({"x": x, "name": "a"}, y)), r"^data.train\[0\] holds 'a'"),
    "class": (lambda: changed(lambda x, y: (x, 7)), "^data.train.targets: sample 0 holds 7, not a number between 0"),
}  # fmt: skip


def refusals(run_dir: Path) -> dict[str, str]:
    """What is said about each of the mistakes; anything but a `UserError` by its type."""
    said = {}
    for name, (make, _) in REFUSED.items():
        try:
            fit(quietly(run_dir=run_dir / name), **{"model": model(), "data": plain()} | make())
            said[name] = "trained"
        except UserError as error:
            said[name] = str(error)
        except Exception as error:
            said[name] = f"not told as a UserError: {type(error).__name__}: {error}"
        assert children() == []
    return said


@pytest.mark.timeout(120)
@pytest.mark.parametrize("size", [1, 2])
def test_what_cannot_be_read_is_refused_before_the_first_step(tmp_path: Path, size: int) -> None:
    with Job(refusals, size, tmp_path) as job:
        outcomes = job.wait(90)
    for outcome in outcomes:
        assert outcome.code == 0, outcome.output
        said = outcome.value
        wrong = {name: text for name, text in said.items() if not re.search(REFUSED[name][1], text, re.DOTALL)}
        assert wrong == {}
        assert not any("\n" in text for text in said.values())
        assert said == outcomes[0].value
    assert list(tmp_path.iterdir()) == []


# ---- what fails on the way


class Faulty(Samples):
    """Does `what` to sample `at`, or on rank `rank` alone to any from there on; notes the processes that read it."""

    def __init__(self, part: str, processes: Path, what: str = "", at: int = 0, rank: int | None = None) -> None:
        super().__init__(part)
        self.processes, self.what, self.at, self.rank = processes, what, at, rank

    def __getitem__(self, index: int) -> Any:
        (self.processes / str(os.getpid())).touch()
        inputs, target = super().__getitem__(index)
        here = index == self.at if self.rank is None else index >= self.at and int(os.environ["RANK"]) == self.rank
        return FAULTS[self.what](inputs, target) if self.what and here else (inputs, target)


def in_a_worker(act: Callable[[], Any]) -> Callable[[Tensor, Tensor], Any]:
    def do(inputs: Tensor, target: Tensor) -> Any:
        if get_worker_info() is not None:
            act()
        return inputs, target

    return do


def nowhere(inputs: Tensor, target: Tensor) -> Any:
    """Inputs of a class that other processes do not know."""

    class Local(NamedTuple):
        values: Tensor

    return Local(inputs), target


FAULTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "raise": fail,
    "no pair": lambda x, _: x,
    "nan": lambda x, y: (x * torch.nan, y),
    "shape": lambda x, y: (x[:2], y),
    "none": lambda x, _: (x, None),
    "kill": in_a_worker(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "leave": in_a_worker(lambda: os._exit(3)),
    "end": in_a_worker(lambda: sys.exit(0)),
}
FAILED = r"failed: KeyError: 'no such\\npicture' \(test_data_sets.py, line \d+\)$"
SAMPLE = rf"data.train\[{NOT_TRIED}\]"
ON_THE_WAY: dict[str, tuple[int, int, str, dict[str, Any], str]] = {
    "raises in the rank": (1, 0, "train", {"what": "raise"}, f"{SAMPLE} {FAILED}"),
    "raises in a worker": (1, 2, "train", {"what": "raise"}, f"{SAMPLE} {FAILED}"),
    "raises in one of two ranks": (2, 0, "train", {"what": "raise"}, f"{SAMPLE} {FAILED}"),
    "raises in the evaluation": (2, 1, "test", {"what": "raise"}, rf"data.test\[{NOT_TRIED}\] {FAILED}"),
    "raises on rank 1 alone": (
        2, 0, "train", {"what": "raise", "at": TRIED, "rank": 1}, rf"data.train\[\d+\] {FAILED}",
    ),
    "raises in a worker of rank 1": (
        2, 2, "train", {"what": "raise", "at": TRIED, "rank": 1}, rf"data.train\[\d+\] {FAILED}",
    ),
    "shapes": (2, 1, "train", {"what": "shape"}, rf"data.train\[{NOT_TRIED}\] is .*, and the first one was "),
    "shapes in the rank": (1, 0, "train", {"what": "shape"}, rf"data.train\[{NOT_TRIED}\] is .*, and the first"),
    "no target": (1, 1, "train", {"what": "none"}, rf"data.train\[{NOT_TRIED}\] is .*, and the first one was "),
    "no pair": (1, 1, "train", {"what": "no pair"}, rf"{SAMPLE} must be \(inputs, target\)"),
    "nan": (2, 0, "train", {"what": "nan"}, f"{SAMPLE} holds nan, not a finite number"),
    "nan in the evaluation": (1, 1, "test", {"what": "nan"}, rf"data.test\[{NOT_TRIED}\] holds nan, not a finite"),
    "a worker is killed": (1, 2, "train", {"what": "kill"}, rf"worker process \d+, which read {SAMPLE}, "),
    "a worker of two ranks is killed": (2, 1, "train", {"what": "kill"}, rf"worker process \d+, which read {SAMPLE}"),
    "a worker is killed in the evaluation": (
        1, 1, "test", {"what": "kill"}, rf"worker process \d+, which read data.test\[{NOT_TRIED}\], ",
    ),
    "a worker leaves": (1, 1, "train", {"what": "leave"}, rf"worker process \d+, which read {SAMPLE}, "),
    "a worker ends": (1, 1, "train", {"what": "end"}, rf"worker process \d+, which read {SAMPLE}, "),
}  # fmt: skip


def script(
    run_dir: Path,
    make: Callable[[], Any],
    workers: int,
    settings: Mapping[str, Any] | None = None,
    own: nn.Module | None = None,
) -> None:
    """Train as a script does; what it does not catch reaches the interpreter. No worker may be left by then."""
    refusal.RANK_0_SPEAKS_SECONDS = 0.1
    code: Any = 0
    try:
        fit(quietly(run_dir=run_dir, **(settings or {})), model=own or model(), data=make(), workers=workers)
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if left := children():
        print(f"LEFT {left}", flush=True)
    sys.exit(code)


def faulty(processes: Path, part: str, fault: dict[str, Any]) -> Split[Any]:
    fault = {"at": NOT_TRIED} | fault
    return Split(*(Faulty(one, processes, **(fault if one == part else {})) for one in Split._fields))


def said_of_samples(outcomes: list[Outcome]) -> list[str]:
    """The lines about samples; all else that may be said is that a peer was lost."""
    lines = [line for outcome in outcomes for line in outcome.output.splitlines()]
    expected = r"start: |rank \d: lost a peer: rank \d \(host \S+\) raised SampleError, |Epoch: "
    return [line for line in lines if not re.match(expected, line)]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ON_THE_WAY)
def test_a_sample_that_fails_on_the_way_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    size, workers, part, fault, said = ON_THE_WAY[name]
    processes, run_dir = tmp_path / "processes", tmp_path / "run"
    processes.mkdir()
    with Job(script, size, run_dir, partial(faulty, processes, part, fault), workers) as job:
        outcomes = job.wait(40)
    output = "\n".join(outcome.output for outcome in outcomes)
    assert [outcome.code for outcome in outcomes] == [1] * size, output
    said_lines = said_of_samples(outcomes)
    assert len(said_lines) == 1, output
    (line,) = said_lines
    assert re.search(rf"^rank \d: {said}", line), line
    if fault.get("rank") is not None:
        assert line.startswith(f"rank {fault['rank']}: ")
    assert status(run_dir) == "failed"
    assert still_there(int(one.name) for one in processes.iterdir()) == []


class Mislabelled(Samples):
    """One sample has a target that does not go with the logits, which the samples that are tried do not show."""

    def __init__(self, part: str, dtype: torch.dtype) -> None:
        super().__init__(part)
        self.targets = self.targets.to(dtype)
        self.targets[NOT_TRIED] = 7


def mislabelled(dtype: torch.dtype) -> Split[Any]:
    return Split(Mislabelled("train", dtype), Samples("test"))


def classify(run_dir: Path) -> None:
    script(run_dir, mislabelled_classes, 0, None, nn.Linear(FEATURES, 3))


def mislabelled_classes() -> Split[Any]:
    whole = mislabelled(torch.int64).train
    return Split(whole, Subset(whole, range(TRIED)))


def decide(run_dir: Path) -> None:
    script(run_dir, partial(mislabelled, torch.float32), 0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("task", [classify, decide])
def test_a_target_that_does_not_go_with_the_logits_is_named_too(tmp_path: Path, task: Callable[[Path], None]) -> None:
    with Job(task, 1, tmp_path) as job:
        (outcome,) = job.wait(40)
    assert outcome.code == 1, outcome.output
    assert re.search(rf"^rank 0: .*\b{NOT_TRIED}\b", outcome.output, re.MULTILINE), outcome.output
    assert "Traceback" not in outcome.output


def local_classes() -> Split[Any]:
    return Split(Changed("train", nowhere), Changed("test", nowhere))


@pytest.mark.timeout(60)
def test_what_a_worker_cannot_hand_over_is_said_and_not_waited_for(tmp_path: Path) -> None:
    with Job(train, 1, tmp_path, local_classes, 1, None, first_of_several) as job:
        (outcome,) = job.wait(20)
    assert outcome.code == 1, f"{outcome.code}\n{outcome.output}"
    assert re.search(
        r"UserError: data.train has samples that a worker cannot hand over.*[Pp]ickle", outcome.output, re.MULTILINE
    ), outcome.output


class First(nn.Module):
    """Takes the first of several inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = model()

    def forward(self, inputs: Any) -> Tensor:
        logits: Tensor = self.layers(inputs[0])
        return logits


def first_of_several() -> dict[str, Any]:
    return {"model": First()}


# ---- the ends of worker processes


class Slow(Samples):
    """Takes a while to read."""

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.01)
        return super().__getitem__(index)


def slow() -> Split[Any]:
    return Split(Slow("train"), Slow("test"))


def workers_of(job: Job) -> list[list[int]]:
    """The processes that each rank has started."""
    return [[child.pid for child in psutil.Process(rank.pid).children(recursive=True)] for rank in job.processes]


def wait_for_workers(job: Job, run_dir: Path, each: int) -> list[list[int]]:
    """Wait until each rank trains, with so many workers for each part of the data."""
    job.wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir)) > 0)
    found = workers_of(job)
    assert [len(workers) for workers in found] == [2 * each] * len(found)
    return found


@pytest.mark.timeout(60)
@pytest.mark.parametrize("victim", [0, 1])
def test_workers_end_with_a_rank_that_is_killed(tmp_path: Path, victim: int) -> None:
    with Job(train, 2, tmp_path, slow, 2, {"epochs": 100_000}) as job:
        workers = wait_for_workers(job, tmp_path, 2)
        job.signal(signal.SIGKILL, victim)
        assert still_there(workers[victim]) == []
        outcomes = job.wait(30)
        assert still_there(workers[1 - victim]) == []
    assert outcomes[victim].code == -signal.SIGKILL
    assert outcomes[1 - victim].code == 1
    assert f"lost a peer: rank {victim} (host" in outcomes[1 - victim].output


@pytest.mark.timeout(90)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("everyone", [False, True])
def test_a_stop_request_ends_in_a_checkpoint_and_without_workers(
    tmp_path: Path, number: signal.Signals, everyone: bool
) -> None:
    """`everyone`: it reaches the workers as well, as from a terminal or from Slurm."""
    with Job(script, 2, tmp_path / "run", slow, 2, {"epochs": 100_000}) as job:
        workers = wait_for_workers(job, tmp_path / "run", 2)
        for process in [pid for some in workers for pid in some] if everyone else []:
            os.kill(process, number)
        job.signal(number)
        outcomes = job.wait(30)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output + outcomes[1].output
        assert still_there(pid for some in workers for pid in some) == []
    assert status(tmp_path / "run") == "stopped"
    assert "LEFT" not in outcomes[0].output
    match = re.search(r"stopped after step (\d+); to continue", outcomes[0].output)
    assert match is not None, outcomes[0].output
    assert checkpoint_steps(tmp_path / "run")[0] == int(match[1])
    epochs = int(match[1]) // STEPS + 1
    expected = trained(tmp_path / "undisturbed", plain, 1, 1, epochs=epochs)
    assert trained(tmp_path / "run", plain, 1, 2, epochs=epochs) == expected


def stuck_samples() -> tuple[int, int]:
    """The first samples of the second and of the first micro-batch of the second step."""
    return share(order(0), 1, MICRO_BATCHES, first=1)[0], share(order(0), 0, MICRO_BATCHES, first=1)[0]


class Stuck(Samples):
    """In workers, one sample never comes, and the one before it in the order of the first epoch fails."""

    def __getitem__(self, index: int) -> Any:
        if get_worker_info() is not None and index == stuck_samples()[0]:
            time.sleep(3600)
        if get_worker_info() is not None and index == stuck_samples()[1]:
            time.sleep(0.5)
            raise OSError("the file system is gone")
        return super().__getitem__(index)


def stuck() -> Split[Any]:
    return Split(Stuck("train"), Samples("test"))


@pytest.mark.timeout(90)
def test_a_rank_that_fails_does_not_wait_for_a_worker_that_is_stuck(tmp_path: Path) -> None:
    with Job(script, 1, tmp_path, stuck, 2) as job:
        (outcome,) = job.wait(45)
    assert outcome.code == 1, outcome.output
    said_lines = said_of_samples([outcome])
    assert len(said_lines) == 1, outcome.output
    (line,) = said_lines
    assert f"data.train[{stuck_samples()[1]}] failed: OSError: the file system is gone" in line


# ---- what the samples are known by


def train_fingerprinted(fingerprints: dict[int, Any], run_dir: Path, length: int | None = None) -> None:
    own = Fingerprinted("train", fingerprints[int(os.environ["RANK"])], length)
    fit(quietly(run_dir=run_dir), model=model(), data=Split(own, Samples("test")), workers=1)


def test_other_data_are_refused_on_a_resume(tmp_path: Path) -> None:
    run_ranks(train_fingerprinted, 1, {0: "one"}, tmp_path)
    for fingerprint, length in (("two", None), ("one", TRAINED_ON - 1), ("", None)):
        with Job(train_fingerprinted, 1, {0: fingerprint}, tmp_path, length) as job:
            (outcome,) = job.wait(60)
        assert outcome.code == 1
        assert f"UserError: {tmp_path} holds a run with other data. Choose another run_dir=" in outcome.output
    run_ranks(train_fingerprinted, 2, {0: "one", 1: "one"}, tmp_path)
    assert len(metrics(tmp_path)) == EPOCHS


def test_data_sets_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    with Job(train_fingerprinted, 3, {0: "one", 1: "one", 2: "two"}, tmp_path) as job:
        outcomes = job.wait(60)
    for outcome in outcomes:
        assert outcome.code == 1
        assert "UserError: rank 2 was given other data than rank 0: make them alike" in outcome.output
    assert list(tmp_path.iterdir()) == []


# ---- the process and its memory


def states_around(run_dir: Path, workers: int) -> list[bool]:
    """Whether each generator, and torch's threads, are as they were before."""
    torch.set_num_threads(2)
    own = model()
    before = [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), torch.get_num_threads()]  # noqa: NPY002
    fit(quietly(run_dir=run_dir), model=own, data=augmented(), workers=workers)
    after = [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), torch.get_num_threads()]  # noqa: NPY002
    return [one == other for one, other in zip(before, after, strict=True)]


@pytest.mark.parametrize("workers", [0, 1])
def test_generators_and_threads_are_left_as_they_were(tmp_path: Path, workers: int) -> None:
    assert run_ranks(states_around, 1, tmp_path, workers) == [[True] * 4]


class Virtual(TorchDataset[Any]):
    """As many samples as you like, computed when they are read."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return INPUTS[index % len(INPUTS)], TARGETS[index % len(INPUTS)]


def peak_memory(run_dir: Path, length: int) -> int:
    """The most memory in bytes that this rank has used, in the first few steps of an epoch."""
    with pytest.raises(InjectedFaultError):
        fit(
            quietly(run_dir=run_dir, batch_size=512, fault="raise@0:4"),
            model=model(),
            data=Split(Virtual(length), Samples("test")),
            workers=2,
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.timeout(90)
def test_memory_does_not_grow_with_the_number_of_samples_but_for_their_order(tmp_path: Path) -> None:
    """The order has 8 bytes for each sample; it is made in one go, and a step takes its part."""
    ((few,), (many,)) = (run_ranks(peak_memory, 1, tmp_path / str(length), length) for length in (100_000, 1_000_000))
    assert many - few < 25e6


def train_again_and_again(folder: Path) -> None:
    for number in range(10):
        train(folder / str(number), plain, 1, {"epochs": 1})


@pytest.mark.timeout(90)
def test_workers_outlive_what_earlier_trainings_have_left(tmp_path: Path) -> None:
    """A worker that collects the garbage of earlier trainings ends process groups whose threads it does not have."""
    run_ranks(train_again_and_again, 2, tmp_path, timeout=60)
    assert len({bits(tmp_path / str(number)) for number in range(10)}) == 1


@pytest.mark.timeout(90)
def test_the_harness_finds_a_process_that_is_left() -> None:
    with Job(time.sleep, 1, 60) as job:
        assert still_there([job.processes[0].pid]) == [job.processes[0].pid]
        job.signal(signal.SIGKILL)
        wait_until(lambda: not runs(job.processes[0].pid), 5, lambda: True, str)


# ---- a worker that is lost while it has nothing to do


def train_and_lose_a_worker(run_dir: Path) -> None:
    """A worker that reads the training samples is killed in the evaluation."""

    class Deadly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model()

        def forward(self, inputs: Tensor) -> Tensor:
            if not self.training and metrics_file.exists() and metrics_file.stat().st_size:
                for child in psutil.Process().children():
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
            logits: Tensor = self.layers(inputs)
            return logits

    metrics_file = run_dir / "metrics.jsonl"
    train(run_dir, as_tensors_to_test_on, 1, {"epochs": 4}, lambda: {"model": Deadly()})


def as_tensors_to_test_on() -> Split[Any]:
    tested = [Samples("test")[index] for index in range(TESTED_ON)]
    inputs, targets = (torch.stack([torch.as_tensor(part) for part in parts]) for parts in zip(*tested, strict=True))
    return Split(Samples("train"), Dataset(inputs, targets))


def test_a_worker_that_is_lost_between_epochs_is_named(tmp_path: Path) -> None:
    with Job(train_and_lose_a_worker, 1, tmp_path) as job:
        (outcome,) = job.wait(60)
    assert outcome.code == 1, outcome.output
    named = r"^rank 0: worker process \d+, which was idle.* was killed by SIGKILL"
    assert re.search(named, outcome.output, re.MULTILINE), outcome.output
    assert "Traceback" not in outcome.output
