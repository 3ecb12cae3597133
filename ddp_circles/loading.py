"""Samples from a map-style data set, read by torch's DataLoader while they are needed, each rank its own.

The order does not depend on ranks and workers, so a resume in mid-epoch is index arithmetic: nothing is read twice or
passed over. Before each sample is read, all generators are seeded from the seed, the epoch and the sample.
"""

import ctypes
import gc
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils import data
from torch.utils.data import DataLoader, default_collate, get_worker_info

from ddp_circles.data import leaves, mapped
from ddp_circles.errors import SampleError, UserError
from ddp_circles.explain import explain, kind_of
from ddp_circles.job.stop import STOP_SIGNALS
from ddp_circles.micro_batches import MicroBatch
from ddp_circles.random_numbers import RandomStates, seed_generators
from ddp_circles.sharding import Sharding

IDLE = -1
LOST_SECONDS = 3.0
"""Time in which a worker that is about to end does."""
DIE_WITH_PARENT = 1
"""Linux's PR_SET_PDEATHSIG."""


class MapStyle(Protocol):
    """A data set with a length, whose items are (inputs, target); inputs may be a tuple, list or dictionary."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Request(NamedTuple):
    """The samples of a step that one rank needs, micro-batch by micro-batch."""

    epoch: int
    samples: list[int]


class Needs(NamedTuple):
    """The needs of model and loss, as the trial has found them."""

    inputs_type: torch.dtype | None = None
    """Type that float64 inputs are converted to."""
    targets_type: torch.dtype | None = None
    """Type that targets are converted to."""
    largest_target: int | None = None
    """Targets below 0 or above it are refused."""
    labels: bool = False
    """True if targets between two labels are refused."""


class Reader(data.Dataset[Any]):
    """Reads samples from `dataset`, in this process or in a worker: each with random numbers of its own.

    `name`: how messages call it, `data.train` or `data.test`.
    """

    def __init__(self, dataset: MapStyle, name: str, seed: int) -> None:
        self.name, self.length = name, len(dataset)
        self._dataset, self._seed = dataset, seed
        self._fingerprint = getattr(dataset, "fingerprint", "")
        self._form: Any = None
        """The form of all items, from the first read."""
        self._first = ""
        """The same in words."""
        self.needs = Needs()
        self.empty: tuple[Any, Any] = (None, None)
        """Inputs and targets of no sample, on the device."""
        self.reading: Tensor | None = None
        """The sample that each worker reads, or `IDLE`; in memory that they share."""

    def describe(self) -> str:
        """Length and, if the data set has one, its `fingerprint`: what tells it from others."""
        return f"{self.length} samples {self._fingerprint}".rstrip()

    def check_handing_over(self) -> None:
        """Raise `UserError` if a worker could not hand over what it has read: the rank would wait for it for ever."""
        try:
            pickle.dumps(mapped(Tensor.cpu, self.empty))
        except Exception as error:
            raise UserError(
                f"{self.name} has samples that a worker cannot hand over: {explain(error)}. Define their types at "
                "the top level of a module, or leave workers= out"
            ) from None

    def __getitem__(self, request: Request) -> tuple[Any, Any] | str:
        """Inputs and targets of a step; or why they cannot be had, as a text that passes between processes."""
        threads = torch.get_num_threads()
        if threads > 1:  # a worker has one, on which the bits of a sum may depend
            torch.set_num_threads(1)
        content: tuple[Any, Any] | str
        try:
            content = self.read(*request)
        except SampleError as error:
            content = str(error)
        finally:
            if threads > 1:
                torch.set_num_threads(threads)
        self._note(IDLE)
        return content

    @torch.no_grad()
    def read(self, epoch: int, samples: Iterable[int]) -> tuple[Any, Any]:
        """Inputs and targets of `samples`, collated; raises `SampleError`."""
        numbers = list(samples)
        items = [self._item(epoch, sample) for sample in numbers]
        try:
            inputs, targets = default_collate(items)
        except Exception as error:
            raise SampleError(f"{self.name}[{numbers[0]}] cannot be put into a batch: {explain(error)}") from None
        if (stray := _stray((inputs, targets))) is not None:
            raise SampleError(
                f"{self.name}[{numbers[0]}] holds {stray!r}, which is no tensor, array or number: number classes from "
                "0, and leave texts out"
            )
        for values in leaves((inputs, targets)):
            if values.is_floating_point():
                self._check(values.isfinite(), values, numbers, "a finite number: leave it out")
        if (most := self.needs.largest_target) is not None:
            within = (targets >= 0) & (targets <= most)
            if self.needs.labels:
                within &= targets == targets.long()
            self._check(within, targets, numbers, f"a {'label' if self.needs.labels else 'target'} from 0 to {most}")
        if (to := self.needs.inputs_type) is not None:
            inputs = mapped(lambda tensor: tensor.to(to) if tensor.dtype == torch.float64 else tensor, inputs)
        return inputs, targets if self.needs.targets_type is None else targets.to(self.needs.targets_type)

    def _item(self, epoch: int, sample: int) -> Any:
        self._note(sample)
        seed_generators(self._seed, self.name, epoch, sample)
        try:
            item = self._dataset[sample]
        except Exception as error:
            raise SampleError(f"{self.name}[{sample}] failed: {explain(error)}") from None
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            count = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
            raise SampleError(
                f"{self.name}[{sample}] must be (inputs, target), with several inputs ((one, other), target), "
                f"got {kind_of(item)}{count}"
            )
        # Compared with one item of all, and not within a batch: the samples of a batch depend on the number of ranks.
        form = _form_of(item)
        if self._form is None:
            self._form, self._first = form, _spell(item)
        if form != self._form:
            raise SampleError(
                f"{self.name}[{sample}] is {_spell(item)}, and the first one was {self._first}: give all samples the "
                "same shapes and types"
            )
        return item

    def _note(self, sample: int) -> None:
        """Note what this worker reads, for the case that it does not survive it."""
        if self.reading is not None and (worker := get_worker_info()) is not None:
            self.reading.numpy()[worker.id] = sample  # much faster than through torch

    def _check(self, good: Tensor, values: Tensor, samples: list[int], expected: str) -> None:
        """Raise `SampleError` if an element is not `good`, naming its sample."""
        if not good.all():
            row = int(good.reshape(len(good), -1).all(dim=1).logical_not().nonzero()[0])
            value = values[row][good[row].logical_not()][0].item()
            raise SampleError(f"{self.name}[{samples[row]}] holds {value}, not {expected}")


def _form_of(value: Any) -> Any:
    """The structure of an item, with shapes and types, to be compared."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.shape, value.dtype
    if isinstance(value, Mapping):
        return {key: _form_of(one) for key, one in value.items()}
    return list(map(_form_of, value)) if isinstance(value, (tuple, list)) else type(value)


def _spell(value: Any) -> str:
    """The same in words."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_spell(one)}' for key, one in value.items())}}}"
    return f"({', '.join(map(_spell, value))})" if isinstance(value, (tuple, list)) else type(value).__name__


class Loaded:
    """The samples that a `Reader` reads, with `workers` processes of this rank or in the rank itself."""

    in_memory = False

    def __init__(self, reader: Reader, *, workers: int, device: torch.device) -> None:
        self._reader, self._device = reader, device
        self.nothing = MicroBatch(0, *reader.empty)
        self._plan = _Plan()
        if workers:
            reader.reading = torch.full((workers,), IDLE).share_memory_()
        self._loader: DataLoader[Any] = DataLoader(
            reader,
            batch_size=None,  # the reader puts the samples together
            sampler=self._plan,
            num_workers=workers,
            # Shares the data set, lambdas and all, and makes workers that end with the rank: other ways copy it.
            multiprocessing_context="fork" if workers else None,
            collate_fn=_as_it_is,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_be_worker,
            generator=torch.Generator(),  # else it draws from the global one
        )
        self._contents: Iterator[Any] = iter(())
        self.watched: Callable[[int], int | None] = lambda _step: None
        """From a global step to the rank whose micro-batches `share` will be asked for, to have them read ahead."""
        self._ahead: tuple[int, int | None] | None = None
        """The step, and the rank, whose micro-batches come next, if it is another rank's turn."""

    def __len__(self) -> int:
        """The number of samples."""
        return self._reader.length

    def steps(self, order: Tensor, sharding: Sharding, *, first: int, epoch: int) -> Iterator[list[MicroBatch]]:
        """For each step from `first` on: this rank's micro-batches, without those that hold no sample.

        Raises `SampleError` for samples that cannot be read.
        """
        self._plan.requests = (
            Request(epoch, torch.cat(list(samples.values())).tolist())
            for step, share in self._shares(sharding, first, epoch)
            if (samples := _samples(order, share, step))
        )
        with self._naming_lost_workers():
            self._contents = self._begin()
        for step in range(first, sharding.steps):
            own = self._take(_samples(order, sharding, step))
            self._ahead = step, self.watched(epoch * sharding.steps + step)
            yield own

    def _shares(self, sharding: Sharding, first: int, epoch: int) -> Iterator[tuple[int, Sharding]]:
        """Steps and shardings in the order in which they are read: of each step this rank's, then the watched one's."""
        for step in range(first, sharding.steps):
            yield step, sharding
            watched = self.watched(epoch * sharding.steps + step)
            if watched is not None:
                yield step, replace(sharding, rank=watched)

    def share(self, order: Tensor, sharding: Sharding, *, step: int, epoch: int) -> list[MicroBatch]:
        """The micro-batches of one step and of any rank's `sharding`; those not watched the rank reads by itself.

        Raises `SampleError` for samples that cannot be read.
        """
        samples = _samples(order, sharding, step)
        if self._ahead == (step, sharding.rank):
            self._ahead = None
            return self._take(samples)
        return self._read_here(epoch, samples)

    def _read_here(self, epoch: int, samples: dict[int, Tensor]) -> list[MicroBatch]:
        """The micro-batches of `samples` by number, read by the rank, whose random numbers stay as they are.

        Ends the workers, which may share open files with it.
        """
        self.close()
        states = RandomStates()
        content = self._reader[Request(epoch, torch.cat(list(samples.values())).tolist())] if samples else ""
        states.restore()
        return self._cut(content, samples) if samples else []

    def _take(self, samples: dict[int, Tensor]) -> list[MicroBatch]:
        """The micro-batches of the `samples` by number, which come next."""
        if not samples:
            return []
        with self._naming_lost_workers():
            content = next(self._contents)
        return self._cut(content, samples)

    def _cut(self, content: tuple[Any, Any] | str, samples: dict[int, Tensor]) -> list[MicroBatch]:
        """The micro-batches of `samples`, which `content` holds one behind the other, on the device."""
        if isinstance(content, str):
            raise SampleError(content)
        content = mapped(lambda tensor: tensor.to(self._device, non_blocking=True), content)
        sizes = {number: len(found) for number, found in samples.items()}
        # Each lies in memory of its own: the last bits of a product may depend on where its factors begin.
        parts = zip(accumulate(sizes.values(), initial=0), sizes.items(), strict=False)
        return [MicroBatch(number, *mapped(partial(_copy, start, size), content)) for start, (number, size) in parts]

    def _begin(self) -> Iterator[Any]:
        """Begin an epoch; the first one starts the worker processes."""
        if not self._loader.num_workers or self._workers():
            return iter(self._loader)
        # A worker must not collect the rank's garbage: process groups in it wait for threads that the worker lacks.
        gc.collect()
        frozen = gc.get_freeze_count()
        gc.freeze()
        # Torch would raise the end of a worker wherever the rank is at that moment; it also looks in `next`.
        in_main_thread = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            return iter(self._loader)
        finally:
            if in_main_thread:
                signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
            if not frozen:
                gc.unfreeze()

    def _workers(self) -> list[BaseProcess]:
        """The worker processes, which torch gives no public name."""
        workers: list[BaseProcess] = getattr(self._contents, "_workers", [])
        return workers

    @contextmanager
    def _naming_lost_workers(self) -> Iterator[None]:
        """Raise `SampleError` in place of what torch raises over a worker that is gone, or over its remains."""
        try:
            yield
        except Exception:
            deadline = time.monotonic() + LOST_SECONDS * bool(self._workers())
            while time.monotonic() < deadline:
                for number, worker in enumerate(self._workers()):
                    if worker.exitcode is not None:
                        raise SampleError(self._describe(number, worker.pid, worker.exitcode)) from None
                time.sleep(0.02)
            raise

    def _describe(self, number: int, pid: int | None, code: int) -> str:
        assert self._reader.reading is not None
        sample = int(self._reader.reading[number])
        work = f"read {self._reader.name}[{sample}]" if sample != IDLE else f"was idle, a reader of {self._reader.name}"
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"worker process {pid}, which {work}, {end}{', perhaps for lack of memory' * (code == -signal.SIGKILL)}"

    def close(self) -> None:
        """End the worker processes, in bounded time."""
        workers = self._workers()
        if workers:
            self._contents._shutdown_workers()  # type: ignore[attr-defined]  # noqa: SLF001 - may live on in a traceback
        for worker in workers:
            if worker.is_alive():  # one that hangs in the data set
                worker.kill()
            worker.join()


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


def _be_worker(_number: int) -> None:
    """Let this worker end with the rank that it reads for, and with nothing else."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)  # else it would hold the rank's locks and sockets on
    for stop in STOP_SIGNALS:  # some launchers send them to all processes, and the rank has to finish its step
        signal.signal(stop, signal.SIG_IGN)


def _stray(values: Any) -> Any:
    """The first of the collated `values` that is no tensor, if any."""
    if isinstance(values, Tensor):
        return None
    if isinstance(values, (Mapping, tuple, list)):
        parts = values.values() if isinstance(values, Mapping) else values
        return next((stray for part in parts if (stray := _stray(part)) is not None), None)
    return values
