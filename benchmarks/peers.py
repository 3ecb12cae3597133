"""The same training job for all contenders, each written as its own documentation would.

The job: a 2-10-10-1 network with ReLU, Adam, binary cross-entropy, a new order every epoch, and each epoch's mean loss
and accuracy over all ranks. No contender reads from the device within an epoch.
"""

import gc
import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ddp_circles import Config, fit
from ddp_circles.data import Dataset, Split, make_points

Figures = tuple[float, float]
"""Mean loss and accuracy of the last epoch, over all ranks."""
HIDDEN = (10, 10)
LEARNING_RATE = 0.01
SEED = 42


@dataclass(frozen=True)
class Job:
    """The training job. `batch_size` is per rank; `fused` gives the peers the fused optimizer too."""

    n_samples: int
    batch_size: int
    ranks: int
    device: Literal["cpu", "cuda"]
    fused: bool

    @property
    def train_samples(self) -> int:
        """Number of training points; a fifth is kept for testing."""
        return self.n_samples - -(-self.n_samples // 5)

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return -(-self.train_samples // (self.batch_size * self.ranks))

    def samples(self) -> Dataset:
        """The training points."""
        split = make_points(
            "circles", n_samples=self.n_samples, noise=0.03, factor=0.8, test_fraction=0.2, data_seed=SEED
        )
        return split.train

    def model(self) -> nn.Module:
        """The network with its initial weights."""
        torch.manual_seed(SEED)
        first, second = HIDDEN
        layers = (nn.Linear(2, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 1))
        return nn.Sequential(*layers, nn.Flatten(0))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Adam with its default implementation, or with the fused kernel."""
        return torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True if self.fused else None)


class Meter:
    """An epoch's loss and accuracy, summed on the device."""

    def __init__(self, device: torch.device | str) -> None:
        self._sums = torch.zeros(3, device=device)

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add one batch: its mean loss, logits and targets."""
        count = len(targets)
        self._sums[0] += loss.detach() * count
        self._sums[1] += ((logits.detach() > 0) == (targets > 0)).sum()
        self._sums[2] += count

    def read(self) -> Figures:
        """Mean loss and accuracy over all ranks."""
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        loss, correct, count = self._sums.tolist()
        return loss / count, correct / count


def local_device(job: Job) -> torch.device:
    """This rank's device."""
    if job.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def join_group(job: Job) -> None:
    """Open the process group from the launcher's environment, as the tutorial does; `leave_group` closes it."""
    dist.init_process_group("nccl" if job.device == "cuda" else "gloo")


def leave_group() -> None:
    """Close the process group if it is still open, after collecting all that refers to it.

    A DDP wrapper that outlives the group can hang: dropping the last reference joins gloo's threads, which wait for the
    interpreter.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def train_with_package(
    job: Job, samples: Dataset, epochs: int, *, reduction: Literal["exact", "fast"], v: int
) -> Figures:
    """This package as a user calls it, with log, heartbeats, checkpoints and evaluation (of one point)."""
    folder = Path(tempfile.gettempdir()) / f"ddp_circles-benchmark-{os.environ['MASTER_PORT']}"  # the same on all ranks
    config = Config(
        hidden=HIDDEN,
        lr=LEARNING_RATE,
        batch_size=job.batch_size * job.ranks,
        epochs=epochs,
        reduction=reduction,
        micro_batches=v,
        device=job.device,
        run_dir=folder,
        wandb="disabled",
        plots=False,
        log_every=epochs,
    )
    one = Dataset(samples.inputs[:1], samples.targets[:1])
    try:
        metrics = fit(config, data=Split(samples, one)).metrics
    finally:
        if int(os.environ["RANK"]) == 0:  # the only one that knows when all is written
            shutil.rmtree(folder, ignore_errors=True)
    return metrics["train/loss"], metrics["train/accuracy"]


def train_fast(job: Job, samples: Dataset, epochs: int) -> Figures:
    """This package, `--reduction fast`."""
    return train_with_package(job, samples, epochs, reduction="fast", v=8)


def train_exact(job: Job, samples: Dataset, epochs: int) -> Figures:
    """This package, `--reduction exact` with one micro-batch per rank."""
    return train_with_package(job, samples, epochs, reduction="exact", v=job.ranks)


def train_exact_default(job: Job, samples: Dataset, epochs: int) -> Figures:
    """This package by default: `--reduction exact --micro-batches 8`."""
    return train_with_package(job, samples, epochs, reduction="exact", v=8)


def train_floor(job: Job, samples: Dataset, epochs: int) -> Figures:
    """The bare arithmetic: batches are slices, gradients are views of one buffer that is all-reduced by hand.

    Accuracy is computed once per epoch, from all its logits.
    """
    device = local_device(job)
    join_group(job)
    model = job.model().to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
    flat = torch.zeros(sum(parameter.numel() for parameter in parameters), device=device)
    for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter)
    inputs, targets = samples.to(device)
    rank, loss_function, figures = dist.get_rank(), nn.BCEWithLogitsLoss(), (0.0, 0.0)
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(SEED + epoch)
        order = torch.randperm(len(inputs), generator=generator)[rank :: job.ranks].to(device)
        ordered_inputs, ordered_targets = inputs[order], targets[order]
        losses, outputs = [], []
        for start in range(0, len(order), job.batch_size):
            x = ordered_inputs[start : start + job.batch_size]
            y = ordered_targets[start : start + job.batch_size]
            logits = model(x)
            loss = loss_function(logits, y)
            losses.append(loss.detach())
            outputs.append(logits.detach())
            flat.zero_()
            loss.backward()
            if job.ranks > 1:
                dist.all_reduce(flat)
                flat /= job.ranks
            optimizer.step()
        meter = Meter(device)
        meter.add(torch.stack(losses).mean(), torch.cat(outputs), ordered_targets)
        figures = meter.read()
    return figures


def train_tutorial(job: Job, samples: Dataset, epochs: int) -> Figures:
    """The loop of PyTorch's DDP tutorial: DataLoader, DistributedSampler, DistributedDataParallel."""
    device = local_device(job)
    join_group(job)
    model = DistributedDataParallel(job.model().to(device))
    optimizer, loss_function = job.optimizer(model), nn.BCEWithLogitsLoss()
    dataset = TensorDataset(*samples)
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(dataset, seed=SEED)
    loader = DataLoader(dataset, batch_size=job.batch_size, sampler=sampler, pin_memory=job.device == "cuda")
    figures = (0.0, 0.0)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        meter = Meter(device)
        for inputs, targets in loader:
            x, y = inputs.to(device), targets.to(device)
            logits = model(x)
            loss = loss_function(logits, y)
            meter.add(loss, logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        figures = meter.read()
    return figures


def train_accelerate(job: Job, samples: Dataset, epochs: int) -> Figures:
    """Hugging Face Accelerate's basic loop."""
    accelerate: Any = importlib.import_module("accelerate")
    accelerator = accelerate.Accelerator(cpu=job.device == "cpu")
    model = job.model()
    loader = DataLoader(TensorDataset(*samples), batch_size=job.batch_size, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, job.optimizer(model), loader)
    loss_function, figures = nn.BCEWithLogitsLoss(), (0.0, 0.0)
    for _ in range(epochs):
        meter = Meter(accelerator.device)
        for inputs, targets in loader:
            optimizer.zero_grad()
            logits = model(inputs)
            loss = loss_function(logits, targets)
            meter.add(loss, logits, targets)
            accelerator.backward(loss)
            optimizer.step()
        figures = meter.read()
    importlib.import_module("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001
    return figures


def train_fabric(job: Job, samples: Dataset, epochs: int) -> Figures:
    """Lightning Fabric with its DDP strategy."""
    lightning: Any = importlib.import_module("lightning")
    fabric = lightning.Fabric(accelerator=_lightning_name(job), devices=job.ranks, strategy="ddp")
    fabric.launch()
    model = job.model()
    model, optimizer = fabric.setup(model, job.optimizer(model))
    dataset = TensorDataset(*samples)
    loader = fabric.setup_dataloaders(DataLoader(dataset, batch_size=job.batch_size, shuffle=True))
    loss_function, figures = nn.BCEWithLogitsLoss(), (0.0, 0.0)
    for _ in range(epochs):
        meter = Meter(fabric.device)
        for inputs, targets in loader:
            optimizer.zero_grad()
            logits = model(inputs)
            loss = loss_function(logits, targets)
            meter.add(loss, logits, targets)
            fabric.backward(loss)
            optimizer.step()
        figures = meter.read()
    return figures


def train_lightning(job: Job, samples: Dataset, epochs: int) -> Figures:
    """Lightning's Trainer with everything off that the job does not need."""
    lightning: Any = importlib.import_module("lightning")

    class Circles(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss_function, self.figures = job.model(), nn.BCEWithLogitsLoss(), (0.0, 0.0)

        def on_train_epoch_start(self) -> None:
            self.meter = Meter(self.device)

        def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
            inputs, targets = batch
            logits = self.model(inputs)
            loss: Tensor = self.loss_function(logits, targets)
            self.meter.add(loss, logits, targets)
            return loss

        def on_train_epoch_end(self) -> None:
            self.figures = self.meter.read()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return job.optimizer(self.model)

    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator=_lightning_name(job),
        devices=job.ranks,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    circles = Circles()
    trainer.fit(circles, DataLoader(TensorDataset(*samples), batch_size=job.batch_size, shuffle=True))
    return circles.figures


def _lightning_name(job: Job) -> str:
    return "gpu" if job.device == "cuda" else "cpu"


@dataclass(frozen=True)
class Contender:
    """One implementation of the job. `needs`: the package it requires."""

    label: str
    train: Callable[[Job, Dataset, int], Figures]
    needs: str = "torch"

    @property
    def installed(self) -> bool:
        """True if the required package is installed."""
        return importlib.util.find_spec(self.needs) is not None


FLOOR, TUTORIAL, FAST, EXACT, EXACT_DEFAULT = "floor", "tutorial", "fast", "exact", "exact-8"
CONTENDERS = {
    FLOOR: Contender("floor: bare arithmetic, one hand-flattened all-reduce", train_floor),
    FAST: Contender("ddp_circles, fast", train_fast),
    EXACT: Contender("ddp_circles, exact, V = W", train_exact),
    EXACT_DEFAULT: Contender("ddp_circles, exact, V = 8 (the default)", train_exact_default),
    TUTORIAL: Contender("tutorial: DDP, DataLoader, DistributedSampler", train_tutorial),
    "accelerate": Contender("Accelerate", train_accelerate, "accelerate"),
    "fabric": Contender("Fabric, DDP strategy", train_fabric, "lightning"),
    "lightning": Contender("Lightning Trainer", train_lightning, "lightning"),
}
