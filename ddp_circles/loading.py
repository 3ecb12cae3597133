"""Samples from a map-style data set, read by torch's DataLoader while they are needed, each rank its own.

The order does not depend on ranks and workers, so a resume in mid-epoch is index arithmetic: nothing is read twice or
passed over. Before each sample is read, all generators are seeded from the seed, the epoch and the sample.
"""

import ctypes
import multiprocessing
import os
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.utils import data
from torch.utils.data import DataLoader, default_collate, get_worker_info

from ddp_circles.data import mapped
from ddp_circles.errors import SampleError
from ddp_circles.explain import explain, kind_of
from ddp_circles.job.stop import STOP_SIGNALS
from ddp_circles.micro_batches import MicroBatch
from ddp_circles.random_numbers import seed_generators
from ddp_circles.sharding import Sharding

DIE_WITH_PARENT = 1
"""Linux's PR_SET_PDEATHSIG."""
LOST_WORKER = r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*?)(?:\. |$)"
"""The processes, and what befell them, in torch's message."""


class MapStyle(Protocol):
    """A data set with a length, whose items are (inputs, target); inputs may be a tuple, list or dictionary."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Request(NamedTuple):
    """The samples of a step that one rank needs, micro-batch by micro-batch."""

    epoch: int
    samples: list[int]


class Reader(data.Dataset[Any]):
    """Reads samples from `dataset`, in this process or in a worker: each with random numbers of its own.

    `name`: how messages call it, `data.train` or `data.test`. Once set, float64 inputs are converted to `inputs_type`,
    and targets to `targets_type`.
    """

    def __init__(self, dataset: MapStyle, name: str, seed: int) -> None:
        self.name, self.length = name, len(dataset)
        self._dataset, self._seed = dataset, seed
        self._fingerprint = getattr(dataset, "fingerprint", "")
        self.inputs_type: torch.dtype | None = None
        self.targets_type: torch.dtype | None = None
        self.reading: Tensor | None = None
        """Process and sample of each worker, in memory that they share."""

    def describe(self) -> str:
        """Length and, if the data set has one, its `fingerprint`: what tells it from others."""
        return f"{self.length} samples {self._fingerprint}".rstrip()

    def __getitem__(self, request: Request) -> tuple[Any, Any] | str:
        """Inputs and targets of a step; or why they cannot be had, as a text that passes between processes."""
        threads = torch.get_num_threads()
        if threads > 1:  # a worker has one, on which the bits of a sum may depend
            torch.set_num_threads(1)
        try:
            return self.read(*request)
        except SampleError as error:
            return str(error)
        finally:
            if threads > 1:
                torch.set_num_threads(threads)

    def read(self, epoch: int, samples: Iterable[int]) -> tuple[Any, Any]:
        """Inputs and targets of `samples`, collated; raises `SampleError`."""
        numbers = list(samples)
        items = [self._item(epoch, sample) for sample in numbers]
        try:
            inputs, targets = default_collate(items)
        except Exception as error:
            raise SampleError(
                f"{self.name}: samples {', '.join(map(str, numbers))} cannot be put into one batch: {explain(error)}. "
                "All must have the same shapes and types"
            ) from None
        for values in (inputs, targets):
            mapped(lambda tensor: self._check_finite(tensor, numbers), values)
        if (to := self.inputs_type) is not None:
            inputs = mapped(lambda tensor: tensor.to(to) if tensor.dtype == torch.float64 else tensor, inputs)
        if self.targets_type is not None:
            targets = targets.to(self.targets_type)
        return inputs, targets

    def _item(self, epoch: int, sample: int) -> Any:
        if self.reading is not None and (worker := get_worker_info()) is not None:
            self.reading[worker.id, 1] = sample
        seed_generators(self._seed, self.name, epoch, sample)
        try:
            item = self._dataset[sample]
        except Exception as error:
            raise SampleError(f"{self.name}[{sample}] failed: {explain(error)}") from None
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise SampleError(
                f"{self.name}[{sample}] must be (inputs, target), with several inputs ((one, other), target), "
                f"got {kind_of(item)}"
            )
        return item

    def _check_finite(self, values: Tensor, samples: list[int]) -> Tensor:
        if values.is_floating_point() and not values.isfinite().all():
            bad = values.isfinite().reshape(len(values), -1).all(dim=1).logical_not().nonzero()
            raise SampleError(f"{self.name}[{samples[int(bad[0])]}] holds a number that is not finite: leave it out")
        return values


class Loaded:
    """The samples that a `Reader` reads, with `workers` processes of this rank or in the rank itself."""

    in_memory = False

    def __init__(self, reader: Reader, *, workers: int, device: torch.device) -> None:
        self._reader, self._device = reader, device
        self.nothing = MicroBatch(0, *mapped(lambda tensor: tensor[:0].to(device), reader.read(0, [0])))
        self._plan = _Plan()
        if workers:
            reader.reading = torch.zeros(workers, 2, dtype=torch.int64).share_memory_()
        self._loader: DataLoader[Any] | None = DataLoader(
            reader,
            batch_size=None,  # the reader puts the samples together
            sampler=self._plan,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else it draws from the global one
        )
        self._contents: Iterator[Any] = iter(())

    def __len__(self) -> int:
        """The number of samples."""
        return self._reader.length

    def steps(self, order: Tensor, sharding: Sharding, *, first: int, epoch: int) -> Iterator[list[MicroBatch]]:
        """For each step from `first` on: this rank's micro-batches, without those that hold no sample.

        Raises `SampleError` for samples that cannot be read.
        """
        assert self._loader is not None
        self._plan.requests = (
            Request(epoch, torch.cat(list(samples.values())).tolist())
            for step in range(first, sharding.steps)
            if (samples := _samples(order, sharding, step))
        )
        self._contents = iter(self._loader)
        for step in range(first, sharding.steps):
            yield self._take({number: len(samples) for number, samples in _samples(order, sharding, step).items()})

    def _take(self, sizes: dict[int, int]) -> list[MicroBatch]:
        """The micro-batches of one step, with their sizes by number."""
        if not sizes:
            return []
        content = next(self._contents)
        if isinstance(content, str):
            raise SampleError(content)
        content = mapped(lambda tensor: tensor.to(self._device, non_blocking=True), content)
        # Each lies in memory of its own: the last bits of a product may depend on where its factors begin.
        parts = zip(accumulate(sizes.values(), initial=0), sizes.items(), strict=False)
        return [MicroBatch(number, *mapped(partial(_copy, start, size), content)) for start, (number, size) in parts]

    @contextmanager
    def naming_lost_workers(self) -> Iterator[None]:
        """Turn the end of a worker process, which torch reports anywhere in the body, into a `SampleError`."""
        try:
            yield
        except RuntimeError as error:
            if (lost := re.match(LOST_WORKER, str(error))) is None:
                raise
            samples = self._readings()
            for process in map(int, lost[1].split(", ")):
                if process in samples:
                    sample = f"{self._reader.name}[{samples[process]}]"
                    raise SampleError(f"worker process {process}, which read {sample}, {lost[2]}") from None
            raise

    def close(self) -> None:
        """End the worker processes, in bounded time."""
        if (shut_down := getattr(self._contents, "_shutdown_workers", None)) is not None:
            shut_down()  # the iterator may live on in a traceback, and torch has no public way
        readings = self._readings()
        for process in multiprocessing.active_children():
            if process.pid in readings:  # one that hangs in the data set
                process.kill()
                process.join()
        self._contents, self._loader = iter(()), None

    def _readings(self) -> dict[int, int]:
        """The sample that each worker reads, by its process."""
        return dict([] if self._reader.reading is None else self._reader.reading.tolist())


class _Plan(data.Sampler[Request]):
    """The requests of an epoch, for the loader to hand out."""

    def __init__(self) -> None:
        self.requests: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


def _samples(order: Tensor, sharding: Sharding, step: int) -> dict[int, Tensor]:
    """The samples of this rank's micro-batches in a step, by number; without those that hold none."""
    parts = {number: slice(*sharding.bounds(step, number)) for number in sharding.owned()}
    return {
        number: order[number :: sharding.micro_batches][part]
        for number, part in parts.items()
        if part.start < part.stop
    }


def _copy(start: int, size: int, values: Tensor) -> Tensor:
    return values[start : start + size].clone()


def _as_it_is(content: Any) -> Any:
    return content


def _begin_worker(number: int) -> None:
    """Note this worker's process, and let it end with the rank that it reads for, and with nothing else."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)  # else it would hold the rank's locks and sockets on
    for stop in STOP_SIGNALS:  # some launchers send them to all processes, and the rank has to finish its step
        signal.signal(stop, signal.SIG_IGN)
    worker = get_worker_info()
    assert worker is not None
    reading = cast(Reader, worker.dataset).reading
    assert reading is not None
    reading[number, 0] = os.getpid()
