"""Models as in practice, with dropout, running statistics, schedules and clipping: the same bits everywhere."""

import hashlib
import math
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DistributedSampler

from ddp_circles import Config, Dataset, Split, fit, loop, run
from ddp_circles.errors import UserError
from ddp_circles.exact import ExactReducer
from tests.harness.ranks import Job, Outcome, run_ranks
from tests.harness.runs import bits, metrics, status

LENGTH, FEATURES, WIDTH = 4, 3, 12
TRAINED_ON, TESTED_ON = 50, 21
MICRO_BATCHES = 8
EVEN: dict[str, Any] = {"batch_size": 17}
"""Steps of 17, 17 and 16 samples: micro-batches of two or three, which is enough for batch norm."""
FEW: dict[str, Any] = {"batch_size": 15}
"""Steps of 15, 15, 15 and 5 samples, the last fewer than micro-batches."""
CLOCK = ("train/samples_per_second", "seconds")
THOROUGH = pytest.mark.thorough

INPUTS = torch.rand(TRAINED_ON + TESTED_ON, LENGTH, FEATURES, generator=torch.Generator().manual_seed(1))
TARGETS = (INPUTS.sum((1, 2)) > LENGTH * FEATURES / 2).float()
TOKENS = (INPUTS[:, :, 0] * 5).long()


def data(inputs: Tensor = INPUTS) -> Split:
    at = slice(TRAINED_ON), slice(TRAINED_ON, None)
    return Split(*(Dataset(inputs[part], TARGETS[part]) for part in at))


def quietly(**settings: Any) -> Config:
    defaults: dict[str, Any] = {"epochs": 2, "log_every": 100, "wandb": "disabled", "plots": False}
    return Config(**defaults | EVEN | settings)


# ---- the models


def flat(*layers: nn.Module) -> nn.Module:
    """Layers from [n, 12] to [n, 1]."""
    return nn.Sequential(nn.Flatten(), *layers, nn.Flatten(0))


def perceptron(*between: nn.Module) -> nn.Module:
    return flat(nn.Linear(WIDTH, 8), *between, nn.ReLU(), nn.Linear(8, 1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, 5, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(inputs)[0][:, -1])
        return logits.squeeze(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, 6)
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(6, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        embedded = self.embed(inputs)
        logits: Tensor = self.head(self.attention(embedded, embedded, embedded)[0].mean(1))
        return logits.squeeze(1)


class Pooled(nn.Module):
    """The mean over the positions of what `layers` return."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layers(inputs).mean(1)
        return logits.squeeze(1)


class Channels(nn.Module):
    """[n, 4, 3] to [n, 3, 4]."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.transpose(1, 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.first(inputs.flatten(1)).relu()).relu())
        return logits.squeeze(1)


class Before(nn.Module):
    """`change` is done to the inputs [n, 12] before all else; `buffer` and `seen` are there to be changed."""

    buffer: Tensor
    seen: Tensor
    fleeting: Tensor

    def __init__(self, change: "Callable[[Before, Tensor], Tensor]") -> None:
        super().__init__()
        self.layers, self.change = perceptron(), change
        self.begun = 0
        """Times that the training has begun: in the trial, and in each epoch."""
        self.register_buffer("buffer", torch.zeros(WIDTH))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fleeting", torch.zeros(WIDTH), persistent=False)

    def train(self, mode: bool = True) -> "Before":
        self.begun += mode
        super().train(mode)
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layers(self.change(self, inputs.flatten(1)))
        return logits


def moving_average(module: Before, inputs: Tensor) -> Tensor:
    if module.training:
        module.buffer = 0.9 * module.buffer + 0.1 * inputs.mean(0)
    return inputs - module.buffer


def counting(module: Before, inputs: Tensor) -> Tensor:
    if module.training:
        module.seen += len(inputs)
    return inputs / (1 + module.seen / 100)


def noisy(module: Before, inputs: Tensor) -> Tensor:
    if not module.training:
        return inputs
    return inputs * (1 + random.random()) * (1 + np.random.rand())  # noqa: NPY002


def always_noisy(module: Before, inputs: Tensor) -> Tensor:
    return F.dropout(inputs, 0.2)


def noisy_loss(logits: Tensor, targets: Tensor) -> Tensor:
    smooth = targets * (1 - 0.0005 * torch.rand(()))
    return F.binary_cross_entropy_with_logits(logits, smooth, reduction="sum")


def normalized(layer: int) -> nn.Module:
    model = perceptron()
    assert isinstance(model, nn.Sequential)
    model[layer] = parametrizations.spectral_norm(model[layer])
    return model


# ---- the optimizers


def two_groups(model: nn.Module) -> Optimizer:
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": others, "lr": 0.005, "weight_decay": 0}], lr=0.02
    )


def momentum(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.02)


def one_cycle(optimizer: Optimizer, steps: int = 6) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)


def warmed_up(optimizer: Optimizer) -> LRScheduler:
    parts = [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, 4)]
    return SequentialLR(optimizer, parts, milestones=[2])


class Langevin(SGD):
    """Takes steps that draw random numbers."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)


def langevin(model: nn.Module) -> Optimizer:
    return Langevin(model.parameters(), lr=0.05)


def everything(steps: int = 6) -> dict[str, Any]:
    return {
        "model": perceptron(nn.BatchNorm1d(8), nn.Dropout(0.2)),
        "optimizer": two_groups,
        "scheduler": partial(one_cycle, steps=steps),
        "max_grad_norm": 0.05,
    }


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "lstm with dropout": lambda: {"model": Recurrent()},
    "attention with dropout": lambda: {"model": Attention(), "settings": FEW},
    "transformer layer": lambda: {
        "model": Pooled(
            nn.Linear(FEATURES, 6),
            nn.TransformerEncoderLayer(6, 2, dim_feedforward=8, dropout=0.2, batch_first=True),
            nn.Linear(6, 1),
        ),
    },
    "batch norm 1d": lambda: {"model": perceptron(nn.BatchNorm1d(8))},
    "batch norm 2d": lambda: {
        "model": nn.Sequential(
            nn.Unflatten(1, (1, LENGTH)), nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), flat(nn.ReLU(), nn.Linear(12, 1))
        ),
        "optimizer": adamw,
    },
    "layer norm": lambda: {"model": perceptron(nn.LayerNorm(8), nn.Dropout(0.5)), "settings": FEW},
    "repeated indices": lambda: {
        "model": Pooled(nn.Embedding(5, 6), nn.Linear(6, 1)),
        "data": data(TOKENS),
        "settings": FEW,
    },
    "tied weights": lambda: {"model": Tied(), "settings": FEW},
    "adamw, two groups": lambda: {"model": perceptron(), "optimizer": two_groups, "settings": FEW},
    "momentum and weight decay": lambda: {"model": perceptron(), "optimizer": momentum, "settings": FEW},
    "one cycle": lambda: {"model": perceptron(), "optimizer": momentum, "scheduler": one_cycle},
    "warm-up and cosine": lambda: {"model": perceptron(nn.Dropout(0.1)), "scheduler": warmed_up},
    "clipped": lambda: {"model": perceptron(), "max_grad_norm": 0.05, "settings": FEW},
    "norm alone": lambda: {"model": perceptron(), "max_grad_norm": math.inf},
    "instance norm": lambda: {
        "model": nn.Sequential(
            Channels(), nn.InstanceNorm1d(FEATURES, affine=True, track_running_stats=True), flat(nn.Linear(12, 1))
        ),
    },
    "reassigned average": lambda: {"model": Before(moving_average)},
    "counter": lambda: {"model": Before(counting), "settings": FEW},
    "constant buffer": lambda: {"model": Before(lambda module, x: x + module.buffer), "settings": FEW},
    "spectral norm": lambda: {"model": normalized(1), "settings": FEW},
    "spectral norm of one row": lambda: {"model": normalized(3), "settings": FEW},
    "random and numpy": lambda: {"model": Before(noisy), "settings": FEW},
    "drawn in evaluation too": lambda: {"model": Before(always_noisy), "settings": FEW},
    "drawn in the loss": lambda: {"model": perceptron(), "loss": noisy_loss, "settings": FEW},
    "noisy steps": lambda: {"model": perceptron(nn.Dropout(0.2)), "optimizer": langevin},
    "the package's own model": lambda: {
        "model": None, "data": None, "optimizer": two_groups, "max_grad_norm": 0.1, "settings": {"n_samples": 71},
    },
    "everything": everything,
}  # fmt: skip
NEEDS_SAMPLES = "instance norm"
"""The one that an empty batch stops, so that no rank may be idle."""
SIDE_BY_SIDE = "the package's own model"
"""The one whose micro-batches share a pass, and a bucket."""


# ---- one result at any number of ranks


class SmallBuckets(DistributedDataParallel):
    """DDP with buckets of two or three parameters."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, bucket_cap_mb=0.0001, **options)


def fitted(run_dir: Path, make: Callable[[], dict[str, Any]], **settings: Any) -> Any:
    """What `fit` returns for the arguments that `make` returns."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"data": data()} | make()
    return fit(quietly(run_dir=run_dir, **arguments.pop("settings", {}) | settings), **arguments)


def digest(state: dict[str, Tensor]) -> str:
    """The SHA-256 of parameters and buffers."""
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode() + value.detach().numpy().tobytes())
    return found.hexdigest()


def without_clock(row: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in row.items() if name not in CLOCK]


Found = dict[str, tuple[str, Any]]
"""By case: the digest of the trained model, and the last epoch's figures; or a refusal."""


def train_cases(folder: Path, names: list[str], several_buckets: bool = False, **settings: Any) -> Found:
    found: Found = {}
    counts: list[int] = []
    original = ExactReducer.reduce_bucket

    def noting(self: ExactReducer, bucket):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        counts.append(int(bucket.is_last()))
        return original(self, bucket)

    wrapper = SmallBuckets if several_buckets else DistributedDataParallel
    with mock.patch("ddp_circles.run.DistributedDataParallel", wrapper):
        ExactReducer.reduce_bucket = noting  # type: ignore[method-assign]
        for name in names:
            try:
                result = fitted(folder / name, CASES[name], **settings)
                found[name] = digest(result.model.state_dict()), without_clock(result.metrics)
            except UserError as error:
                found[name] = "refused", str(error)
    assert not counts or (0 in counts) == several_buckets
    return found


def rows_of(folder: Path, name: str) -> list[Any]:
    return [without_clock(row) for row in metrics(folder / name)] if (folder / name).exists() else []


def compare(folder: Path, *runs: tuple[int, bool]) -> None:
    """Compare all cases, trained on one rank, with other `runs`: of a size, with several buckets or one."""
    (alone,) = run_ranks(train_cases, 1, folder / "alone", list(CASES))
    wrong = []
    for size, several_buckets in runs:
        left_out = {NEEDS_SAMPLES} if size > MICRO_BATCHES else set()
        left_out |= {SIDE_BY_SIDE} if several_buckets else set()
        names = [name for name in CASES if name not in left_out]
        run = folder / f"{size} {several_buckets}"
        results = run_ranks(train_cases, size, run, names, several_buckets, timeout=220)
        for name in names:
            same = all(found[name] == alone[name] for found in results)
            if not same or rows_of(run, name) != rows_of(folder / "alone", name):
                wrong.append((size, name))
            elif alone[name][0] != "refused":
                assert bits(run / name) == bits(folder / "alone" / name)
                assert digest(load_file(run / name / "model.safetensors")) == alone[name][0]
    assert wrong == []


def test_the_bits_are_the_same_at_any_number_of_ranks(tmp_path: Path) -> None:
    compare(tmp_path, (2, False), (3, True))


@THOROUGH
@pytest.mark.parametrize("runs", [((2, True), (3, False)), ((5, False), (9, True))])
def test_the_bits_are_the_same_at_more_numbers_of_ranks(tmp_path: Path, runs: tuple[tuple[int, bool], ...]) -> None:
    compare(tmp_path, *runs)


def test_each_case_is_trained_to_figures_that_mean_something(tmp_path: Path) -> None:
    """Which change from epoch to epoch; so the comparison above compares something."""
    (found,) = run_ranks(train_cases, 1, tmp_path, list(CASES))
    assert {name: text for name, (kind, text) in found.items() if kind == "refused"} == {}
    for name, make in CASES.items():
        first, last = metrics(tmp_path / name)
        assert first["train/loss"] != last["train/loss"], name
        assert first["test/loss"] != last["test/loss"], name
        given = make()
        own = {"optimizer", "scheduler", "max_grad_norm"} & set(given)
        rates = ["lr/0", "lr/1"] if given.get("optimizer") is two_groups else ["lr"] if own else []
        assert [key for key in last if key.startswith("lr")] == rates, name
        assert ("train/grad_norm" in last) == ("max_grad_norm" in given), name
    for row, rate in zip(metrics(tmp_path / "one cycle"), one_cycle_rates(), strict=True):
        assert row["lr"] == pytest.approx(rate, rel=1e-12)
    assert [row["lr"] for row in metrics(tmp_path / "momentum and weight decay")] == [0.05, 0.05]
    assert [(row["lr/0"], row["lr/1"]) for row in metrics(tmp_path / "adamw, two groups")] == [(0.02, 0.005)] * 2
    seen = load_file(tmp_path / "counter" / "model.safetensors")["seen"]
    assert (seen.dtype, seen.item()) == (torch.int64, 2 * TRAINED_ON)
    counted = load_file(tmp_path / "batch norm 1d" / "model.safetensors")["2.num_batches_tracked"]
    assert counted.item() == 2 * 3 * MICRO_BATCHES


def one_cycle_rates() -> list[float]:
    """The learning rates with which the third and the sixth step of two epochs were taken."""
    optimizer = momentum(perceptron())
    scheduler, rates = one_cycle(optimizer), []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates[2::3]


def test_another_seed_gives_other_bits(tmp_path: Path) -> None:
    names = ["transformer layer", "random and numpy"]
    found = [run_ranks(partial(train_cases, seed=seed), 1, tmp_path / str(seed), names)[0] for seed in (42, 43)]
    for name in names:
        assert found[0][name][0] != found[1][name][0]


@THOROUGH
def test_what_an_empty_batch_stops_is_refused_where_a_rank_is_idle(tmp_path: Path) -> None:
    found = [one[NEEDS_SAMPLES] for one in run_ranks(train_cases, 9, tmp_path, [NEEDS_SAMPLES])]
    assert found == [("refused", found[0][1])] * 9
    assert "model= failed on data.train.inputs[:0], as few as a step may leave a rank" in found[0][1]


# ---- random numbers


def masks_by_place(run_dir: Path, seed: int) -> dict[Any, bytes]:
    """The dropout masks of a training, by the arguments with which the loop had seeded before."""
    keys: list[Any] = []
    masks: dict[Any, bytes] = {}

    def noting(*key: int | str) -> None:
        keys.append(key)
        original(*key)

    def drop(module: Before, inputs: Tensor) -> Tensor:
        mask = F.dropout(torch.ones(WIDTH * 8), 0.5, module.training)
        if keys and module.training:
            assert keys[-1] not in masks
            masks[keys[-1]] = mask.numpy().tobytes()
        return inputs * mask.view(8, WIDTH)[0]

    original = run.__dict__["seed_torch"]
    with mock.patch("ddp_circles.run.seed_torch", noting):
        fitted(run_dir, lambda: {"model": Before(drop), "settings": FEW}, seed=seed)
    return masks


def test_each_micro_batch_of_each_step_has_its_own_mask(tmp_path: Path) -> None:
    (masks,) = run_ranks(masks_by_place, 1, tmp_path / "1", 42)
    assert len(masks) == 2 * (3 * MICRO_BATCHES + 5)
    assert len(set(masks.values())) == len(masks)
    shares = run_ranks(masks_by_place, 3, tmp_path / "3", 42)
    assert sum(map(len, shares)) == len(masks)
    assert {key: mask for share in shares for key, mask in share.items()} == masks
    (others,) = run_ranks(masks_by_place, 1, tmp_path / "seed", 43)
    assert not set(masks.values()) & set(others.values())


def count_seedings(run_dir: Path) -> list[int]:
    """Calls that seed all generators, and torch's alone, for a model of the caller's own and for the package's."""
    counts: list[int] = []
    for own in (True, False):
        arguments = {"model": perceptron(nn.BatchNorm1d(8))} if own else {"model": None, "data": None}
        with (
            mock.patch("ddp_circles.run.seed_generators") as all_of_them,
            mock.patch("ddp_circles.run.seed_torch") as a,
        ):
            fitted(run_dir / str(own), partial(dict, arguments, optimizer=adamw))
        counts += [all_of_them.call_count, a.call_count > 0]
    return counts


@pytest.mark.parametrize("size", [1, 2])
def test_what_draws_nothing_is_hardly_seeded(tmp_path: Path, size: int) -> None:
    assert run_ranks(count_seedings, size, tmp_path) == [[0, True, 0, False]] * size


# ---- a plain loop


STEP = 100
"""Samples of a step: with fewer in a micro-batch, batch norm would blow up the rounding of a plain loop."""


def many() -> Split:
    """350 samples to train on, in four steps, and 60 to test on."""
    inputs = torch.rand(410, LENGTH, FEATURES, generator=torch.Generator().manual_seed(2))
    targets = (inputs.sum((1, 2)) > LENGTH * FEATURES / 2).float()
    return Split(Dataset(inputs[:350], targets[:350]), Dataset(inputs[350:], targets[350:]))


def followed() -> dict[str, Any]:
    model = flat(nn.Linear(WIDTH, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    own = {"optimizer": adamw, "scheduler": partial(one_cycle, steps=16), "max_grad_norm": 0.25}
    return {"model": model, "data": many(), **own}


def train_followed(run_dir: Path) -> None:
    fitted(run_dir, followed, epochs=4, batch_size=STEP)


def plain_loop() -> tuple[nn.Module, list[dict[str, float]]]:
    """The same training in plain PyTorch: the trained model, and the figures of each epoch."""
    torch.manual_seed(0)
    model: nn.Module = followed()["model"]
    optimizer = AdamW(model.parameters(), lr=0.02)
    scheduler = OneCycleLR(optimizer, max_lr=0.05, total_steps=16)
    train, test = many()
    numbers: Any = range(len(train.inputs))
    sampler: DistributedSampler[int] = DistributedSampler(numbers, num_replicas=1, rank=0, seed=42)
    figures = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        order = list(sampler)
        model.train()
        loss_sum, norm_sum, rate = 0.0, 0.0, 0.0
        for start in range(0, len(order), STEP):
            positions = range(start, min(start + STEP, len(order)))
            begun = {name: buffer.clone() for name, buffer in model.named_buffers()}
            changes: dict[str, list[Tensor]] = {name: [] for name in begun}
            optimizer.zero_grad()
            for part in range(MICRO_BATCHES):
                chosen = [order[position] for position in positions if position % MICRO_BATCHES == part]
                logits = model(train.inputs[chosen])
                loss = F.binary_cross_entropy_with_logits(logits, train.targets[chosen], reduction="sum")
                (loss / len(positions)).backward()
                loss_sum += loss.item()
                for name, buffer in model.named_buffers():
                    changes[name].append(buffer.double() - begun[name])
                    buffer.copy_(begun[name])
            for name, buffer in model.named_buffers():
                total = torch.stack(changes[name]).sum(0)
                buffer.copy_(begun[name] + (total / MICRO_BATCHES if buffer.is_floating_point() else total))
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()
            norm_sum += norm.item() * len(positions)
        model.eval()
        with torch.no_grad():
            tested = F.binary_cross_entropy_with_logits(model(test.inputs), test.targets).item()
        figures.append(
            {"loss": loss_sum / len(order), "tested": tested, "norm": norm_sum / len(order), "rate": rate}
        )  # fmt: skip
    return model, figures


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=THOROUGH), 3])
def test_a_plain_loop_arrives_at_the_same_figures_and_buffers(tmp_path: Path, size: int) -> None:
    run_ranks(train_followed, size, tmp_path)
    model, figures = plain_loop()
    assert figures[-1]["loss"] < figures[0]["loss"] - 0.01
    assert min(one["norm"] for one in figures) < 0.25 < max(one["norm"] for one in figures)
    for row, one in zip(metrics(tmp_path), figures, strict=True):
        assert (row["train/loss"], row["test/loss"]) == pytest.approx((one["loss"], one["tested"]), rel=1e-6)
        assert row["train/grad_norm"] == pytest.approx(one["norm"], rel=1e-5)
        assert row["lr"] == pytest.approx(one["rate"], rel=1e-12)
    saved, buffers = load_file(tmp_path / "model.safetensors"), dict(model.named_buffers())
    for name, buffer in buffers.items():
        assert buffer.dtype == saved[name].dtype
        torch.testing.assert_close(saved[name], buffer, rtol=1e-6, atol=1e-6)
    assert saved["2.num_batches_tracked"] == 4 * 4 * MICRO_BATCHES


# ---- killed and resumed


def fleeting(module: Before, inputs: Tensor) -> Tensor:
    if module.training:
        module.fleeting.add_(inputs.mean(0))
    return inputs * (1 + module.fleeting)


RESUMED: dict[str, Callable[[], dict[str, Any]]] = {
    "everything": lambda: everything(9),
    "warm-up and cosine": lambda: CASES["warm-up and cosine"]() | {"optimizer": momentum, "max_grad_norm": 0.05},
    "reassigned average": CASES["reassigned average"],
    "spectral norm": lambda: {"model": normalized(1)},
    "a buffer that is not saved with the model": lambda: {"model": Before(fleeting)},
    "lstm with dropout": CASES["lstm with dropout"],
    "noisy steps": lambda: {"model": perceptron(), "optimizer": langevin},
    "noisy steps of the package's own model": lambda: {
        "model": None,
        "data": None,
        "optimizer": langevin,
        "settings": {"n_samples": 60},
    },
}


MAY_BE_REFUSED = ("a buffer that is not saved with the model", "noisy steps", "noisy steps of the package's own model")


def train_resumed(run_dir: Path, name: str, fault: str | None = None) -> None:
    fitted(run_dir, RESUMED[name], epochs=3, checkpoint_steps=1, fault=fault)


def wait_for(job: Job) -> list[Outcome]:
    outcomes = job.wait(100)
    assert None not in [outcome.code for outcome in outcomes], outcomes[0].output
    return outcomes


def same_run(one: Path, other: Path) -> None:
    """Check that two runs have the same bits, in all figures."""
    assert [without_clock(row) for row in metrics(one)] == [without_clock(row) for row in metrics(other)]
    assert bits(one) == bits(other)


@pytest.mark.parametrize(
    "name, faults",
    [
        ("everything", ((2, "raise@1:2"), (3, "raise@0:4"), (1, "raise@0:7"))),
        ("everything", ((3, "kill@1:1"), (2, "kill@0:5"))),
        ("warm-up and cosine", ((1, "raise@0:1"), (3, "raise@2:5"), (2, "raise@1:8"))),
        ("reassigned average", ((2, "raise@1:2"), (3, "raise@0:4"))),
        ("spectral norm", ((2, "raise@1:2"), (3, "raise@0:4"))),
        ("a buffer that is not saved with the model", ((1, "raise@0:2"), (3, "raise@0:4"))),
        ("noisy steps", ((1, "raise@0:2"), (1, "raise@0:4"))),
        ("noisy steps of the package's own model", ((1, "raise@0:2"), (1, "raise@0:4"))),
        pytest.param("lstm with dropout", ((2, "raise@1:2"), (3, "raise@0:4")), marks=THOROUGH),
    ],
)
def test_a_run_that_was_killed_ends_with_the_same_bits(
    tmp_path: Path, name: str, faults: tuple[tuple[int, str], ...]
) -> None:
    """Some may be refused instead, on one rank already, but not end with other ones."""
    with Job(train_resumed, 1, tmp_path / "alone", name) as job:
        (first,) = wait_for(job)
    if name in MAY_BE_REFUSED and "UserError" in first.output:
        return
    assert first.code == 0, first.output
    for size, fault in faults:
        (tmp_path / "killed" / "fault").unlink(missing_ok=True)
        with Job(train_resumed, size, tmp_path / "killed", name, fault) as job:
            assert 0 not in [outcome.code for outcome in wait_for(job)]
        assert status(tmp_path / "killed") != "finished"
    run_ranks(train_resumed, 2, tmp_path / "killed", name)
    same_run(tmp_path / "alone", tmp_path / "killed")


def stop_in_evaluation(run_dir: Path, epoch: int) -> str:
    """Train, and be asked to stop, on rank 0 alone, when the evaluation after `epoch` begins."""
    original: Any = loop.evaluate

    def stopping(training: Any, progress: Any, *rest: Any) -> Any:
        if progress.epoch == epoch and os.environ["RANK"] == "0":
            signal.raise_signal(signal.SIGTERM)
        return original(training, progress, *rest)

    with mock.patch("ddp_circles.loop.evaluate", stopping):
        try:
            train_resumed(run_dir, "everything")
        except SystemExit:
            return "stopped"
    return "finished"


def test_a_run_that_was_stopped_in_evaluation_ends_with_the_same_bits(tmp_path: Path) -> None:
    run_ranks(train_resumed, 1, tmp_path / "alone", "everything")
    for size, epoch in ((2, 0), (3, 1)):
        assert run_ranks(stop_in_evaluation, size, tmp_path / "stopped", epoch) == ["stopped"] * size
        assert status(tmp_path / "stopped") == "stopped"
    run_ranks(train_resumed, 1, tmp_path / "stopped", "everything")
    same_run(tmp_path / "alone", tmp_path / "stopped")


# ---- refused


def fails(_: Optimizer) -> LRScheduler:
    raise RuntimeError("no such schedule")


def of_another_optimizer(_: Optimizer) -> LRScheduler:
    return StepLR(adamw(perceptron()), 1)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "plateau": ({"scheduler": ReduceLROnPlateau}, "scheduler= ReduceLROnPlateau waits for a figure of each epoch"),
    "plateau in a sequence": (
        {"scheduler": lambda o: SequentialLR(o, [ReduceLROnPlateau(o), StepLR(o, 1)], [1])},
        "scheduler= failed: .*ReduceLROnPlateau",
    ),
    "lbfgs": (
        {"optimizer": lambda model: torch.optim.LBFGS(model.parameters())},
        "optimizer= LBFGS computes the loss several times",
    ),
    "an instance": (
        {"optimizer": adamw(perceptron())},
        r"optimizer= must be a function from the model .*got torch\.optim\.adamw\.AdamW",
    ),
    "a text": ({"optimizer": "adamw"}, "optimizer= must be a function from the model .*got str"),
    "no optimizer": ({"optimizer": lambda model: None}, "optimizer= must return a torch optimizer, got NoneType"),
    "an optimizer that fails": (
        {"optimizer": lambda model: AdamW(model.parameters(), lr=-1)},
        r"optimizer= failed: ValueError: Invalid learning rate: -1",
    ),
    "another model's": ({"optimizer": lambda _: adamw(perceptron())}, "has parameters that are not the model's"),
    "too few": (
        {"optimizer": lambda model: AdamW(model[1].parameters())},
        r"optimizer= leaves out 3\.weight, 3\.bias, which would stay as they are",
    ),
    "a scheduler that fails": ({"scheduler": fails}, "scheduler= failed: RuntimeError: no such schedule"),
    "a scheduler itself": ({"scheduler": StepLR(adamw(perceptron()), 1)}, "scheduler= must be a function from"),
    "no scheduler": ({"scheduler": lambda optimizer: 3}, "scheduler= must return a torch scheduler, got int"),
    "a scheduler of another optimizer": ({"scheduler": of_another_optimizer}, "scheduler= .*optimizer"),
    "a class with a state": (
        {"scheduler": lambda optimizer: LambdaLR(optimizer, Factor())},
        r"scheduler= LambdaLR cannot be saved: its state_dict\(\) holds more than tensors and plain values",
    ),
    "0": ({"max_grad_norm": 0}, "max_grad_norm= must be a number above 0, .*got 0"),
    "-1": ({"max_grad_norm": -1}, "max_grad_norm= must be a number above 0, .*got -1"),
    "nan": ({"max_grad_norm": math.nan}, "max_grad_norm= must be a number above 0, .*got nan"),
    "True": ({"max_grad_norm": True}, "max_grad_norm= must be a number above 0, .*got True"),
    "a number as text": ({"max_grad_norm": "1"}, "max_grad_norm= must be a number above 0, .*got '1'"),
}


class Factor:
    """A schedule with a state that is not plain."""

    def __init__(self) -> None:
        self.factor = Decoy()

    def __call__(self, step: int) -> float:
        return 1.0


class Decoy:
    """Nothing that a checkpoint could hold."""


def refusals(folder: Path) -> dict[str, str]:
    said = {}
    for name, (arguments, _) in REFUSED.items():
        try:
            fitted(folder / name, lambda given=arguments: {"model": perceptron()} | given)  # type: ignore[misc]
            said[name] = "trained"
        except UserError as error:
            said[name] = str(error)
    return said


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=THOROUGH), 3])
def test_what_cannot_be_used_is_refused_with_one_message(tmp_path: Path, size: int) -> None:
    results = run_ranks(refusals, size, tmp_path)
    said = results[0]
    assert {name: text for name, text in said.items() if not re.match(f".*{REFUSED[name][1]}", text)} == {}
    assert results == [said] * size
    assert not any("\n" in text for text in said.values())
    assert list(tmp_path.iterdir()) == []


CHANGED: dict[str, dict[str, Any]] = {
    "learning rate": {"optimizer": lambda model: AdamW(model.parameters(), lr=0.03)},
    "learning rate in a late digit": {"optimizer": lambda model: AdamW(model.parameters(), lr=0.02 + 1e-12)},
    "weight decay": {"optimizer": lambda model: AdamW(model.parameters(), lr=0.02, weight_decay=0.1)},
    "kind": {"optimizer": lambda model: torch.optim.Adam(model.parameters(), lr=0.02)},
    "groups": {"optimizer": two_groups},
    "no optimizer of one's own": {"optimizer": None},
    "schedule": {"scheduler": lambda optimizer: StepLR(optimizer, 4)},
    "its factor": {"scheduler": lambda optimizer: StepLR(optimizer, 3, gamma=0.2)},
    "no schedule": {"scheduler": None},
    "norm": {"max_grad_norm": 0.6},
    "no norm": {"max_grad_norm": None},
}


def three_by_three(optimizer: Optimizer) -> LRScheduler:
    return StepLR(optimizer, 3)


def changed_on_resume(run_dir: Path) -> dict[str, str]:
    begun = {"model": perceptron(), "optimizer": adamw, "scheduler": three_by_three, "max_grad_norm": 0.5}
    fitted(run_dir, lambda: begun, epochs=1)
    said = {}
    for name, change in CHANGED.items():
        try:
            fitted(run_dir, lambda given=change: begun | {"model": perceptron()} | given)  # type: ignore[misc]
            said[name] = "trained"
        except UserError as error:
            said[name] = str(error)
    fitted(run_dir, lambda: begun | {"model": perceptron()})
    return said


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_is_not_continued_with_another_optimization(tmp_path: Path, size: int) -> None:
    said = run_ranks(changed_on_resume, size, tmp_path)
    text = f"{tmp_path} holds a run with another optimizer=, scheduler= or max_grad_norm=. Choose another run_dir="
    assert {name: line for one in said for name, line in one.items() if not line.startswith(text)} == {}
    assert len(metrics(tmp_path)) == 2


def train_with_rate_of(rates: dict[int, float], run_dir: Path) -> None:
    rate = rates[int(os.environ["RANK"])]
    fitted(run_dir, lambda: {"model": perceptron(), "optimizer": lambda model: SGD(model.parameters(), lr=rate)})


def test_optimizers_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    with Job(train_with_rate_of, 3, {0: 0.1, 1: 0.1, 2: 0.2}, tmp_path) as job:
        outcomes = wait_for(job)
    for outcome in outcomes:
        assert outcome.code == 1
        assert (
            "UserError: rank 2 was given other optimizer=, scheduler= or max_grad_norm= than rank 0" in outcome.output
        )
    assert list(tmp_path.iterdir()) == []


# ---- what the trial cannot see


def begins_late(do: Callable[[Before, Tensor], object], *, in_training: bool = True) -> dict[str, Any]:
    """A model that begins with something in the second epoch, after one beginning in the trial and one in the first."""

    def change(module: Before, inputs: Tensor) -> Tensor:
        if module.begun == 3 and module.training == in_training:
            do(module, inputs)
        return inputs + module.buffer

    return {"model": Before(change)}


def replace(module: Before, inputs: Tensor) -> None:
    module.buffer = module.buffer + 0.1


def replace_twice(module: Before, inputs: Tensor) -> None:
    module.buffer = module.buffer + 0.1
    module.buffer = module.buffer + 0.1


def replace_for_a_while(module: Before, inputs: Tensor) -> None:
    """Replace the buffer in the epoch's first pass, twice; the second tensor may lie where the one before did."""
    if module.buffer.sum() == 0:
        replace_twice(module, inputs)


def on_the_last_rank(module: Before, inputs: Tensor) -> None:
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        random.random()


def another_buffer() -> dict[str, Any]:
    """A model that always counts, and that averages too in the second epoch."""

    def change(module: Before, inputs: Tensor) -> Tensor:
        if module.training:
            module.seen += len(inputs)
            if module.begun == 3:
                module.buffer += inputs.mean(0)
        return inputs + module.buffer

    return {"model": Before(change)}


NOT_SEEDED, NOT_SUMMED = r"random numbers were drawn \({}\).*were not seeded", r"changed buffers \(buffer\).*not summed"
LATE: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "random": (lambda: begins_late(lambda *_: random.random()), NOT_SEEDED.format("Python's random")),
    "numpy": (lambda: begins_late(lambda *_: np.random.rand()), NOT_SEEDED.format(r"numpy\.random")),  # noqa: NPY002
    "in evaluation": (
        lambda: begins_late(lambda *_: random.random(), in_training=False),
        NOT_SEEDED.format("Python's random"),
    ),
    "on one rank": (lambda: begins_late(on_the_last_rank), NOT_SEEDED.format("Python's random")),
    "in place": (lambda: begins_late(lambda module, x: module.buffer.add_(x.mean(0))), NOT_SUMMED),
    "replaced": (lambda: begins_late(replace), NOT_SUMMED),
    "replaced twice": (lambda: begins_late(replace_twice), NOT_SUMMED),
    "replaced in one pass": (lambda: begins_late(replace_for_a_while), NOT_SUMMED),
    "replaced in evaluation": (lambda: begins_late(replace, in_training=False), NOT_SUMMED),
    "behind autograd's back": (lambda: begins_late(lambda module, x: module.buffer.data.add_(x.mean(0))), NOT_SUMMED),
    "another buffer": (another_buffer, NOT_SUMMED),
}


def train_late(folder: Path) -> dict[str, str]:
    said = {}
    for name, (make, _) in LATE.items():
        try:
            fitted(folder / name, make, epochs=3)
            said[name] = "trained"
        except UserError as error:
            said[name] = str(error)
    return said


def train_late_dropout(run_dir: Path) -> None:
    def change(module: Before, inputs: Tensor) -> Tensor:
        return F.dropout(inputs, 0.3, module.training and module.begun == 3)

    fitted(run_dir, lambda: {"model": Before(change)}, epochs=3)


def test_dropout_that_begins_in_a_later_epoch_has_the_same_bits(tmp_path: Path) -> None:
    for size in (1, 2, 3):
        run_ranks(train_late_dropout, size, tmp_path / str(size))
        same_run(tmp_path / "1", tmp_path / str(size))


@pytest.mark.parametrize("size", [1, 3])
def test_what_begins_in_a_later_epoch_is_refused_at_its_end(tmp_path: Path, size: int) -> None:
    results = run_ranks(train_late, size, tmp_path)
    said = results[0]
    assert {name: text for name, text in said.items() if not re.search(LATE[name][1], text)} == {}
    assert results == [said] * size
    for name in LATE:
        assert len(metrics(tmp_path / name)) == 1
        assert status(tmp_path / name) == "failed"


def train_mended(run_dir: Path, broken: bool) -> str:
    """Train a model that draws random numbers in the second epoch, if it is `broken`; return its refusal."""

    def change(module: Before, inputs: Tensor) -> Tensor:
        return inputs + random.random() if broken and module.begun == 3 and module.training else inputs

    try:
        fitted(run_dir, lambda: {"model": Before(change)}, epochs=3, checkpoint_steps=1)
        return ""
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=THOROUGH)])
def test_a_model_that_was_mended_after_its_refusal_ends_with_the_bits_of_a_good_one(tmp_path: Path, size: int) -> None:
    """Nothing of the epoch that was refused is in the checkpoint that the run goes on from."""
    run_ranks(train_mended, size, tmp_path / "good", False)
    refused = run_ranks(train_mended, size, tmp_path / "mended", True)
    assert all("were not seeded" in text for text in refused)
    assert run_ranks(train_mended, size, tmp_path / "mended", False) == [""] * size
    same_run(tmp_path / "good", tmp_path / "mended")


# ---- optimizers and buffers out of the ordinary


class Trusting(torch.optim.Optimizer):
    """Steps by the gradient over its length, which it computes by a product; its momentum is in float64."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            gradient = parameter.grad.flatten()
            momentum = self.state[parameter].setdefault("momentum", torch.zeros(gradient.shape, dtype=torch.float64))
            momentum.mul_(0.9).add_(gradient / (torch.dot(gradient, gradient).sqrt() + 1e-8))
            parameter.sub_(0.05 * momentum.float().view_as(parameter))


def train_by_trust(run_dir: Path, epochs: int) -> None:
    def make() -> dict[str, Any]:
        layers = nn.Linear(LENGTH * FEATURES, 33), nn.ReLU(), nn.Linear(33, 7), nn.Linear(7, 1)
        return {
            "model": nn.Sequential(nn.Flatten(), *layers, nn.Flatten(0)),
            "optimizer": lambda own: Trusting(own.parameters()),
        }

    fitted(run_dir, make, epochs=epochs)


def test_an_optimizer_of_ones_own_has_the_same_bits_on_any_number_of_ranks_and_resumed(tmp_path: Path) -> None:
    run_ranks(train_by_trust, 1, tmp_path / "1", 4)
    for size in (2, 3):
        run_ranks(train_by_trust, size, tmp_path / str(size), 2)
        run_ranks(train_by_trust, 5 - size, tmp_path / str(size), 4)
        same_run(tmp_path / "1", tmp_path / str(size))


class Marked(nn.Module):
    """A model that writes the same to a buffer in each pass; in evaluation it may change another one, later."""

    ready: Tensor
    mask: Tensor
    average: Tensor

    def __init__(self, disturbs: bool) -> None:
        super().__init__()
        self.layers, self.disturbs, self.tested = perceptron(), disturbs, 0
        self.register_buffer("ready", torch.tensor(True))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("average", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.ready.fill_(True)
        self.mask.copy_(torch.tensor([0.0, -torch.inf]))
        if self.training:
            self.average.add_(inputs.mean() if len(inputs) else 0.0)
        else:
            self.tested += 1
            if self.disturbs and self.tested > 8:
                self.average.add_(1)
        logits: Tensor = self.layers(inputs)
        return logits


def train_marked(run_dir: Path, disturbs: bool) -> str:
    try:
        fitted(run_dir, lambda: {"model": Marked(disturbs)}, epochs=3)
        return ""
    except UserError as error:
        return str(error)


def test_buffers_that_are_written_and_stay_as_they_are_need_no_sums(tmp_path: Path) -> None:
    for size in (1, 3):
        assert run_ranks(train_marked, size, tmp_path / str(size), False) == [""] * size
        same_run(tmp_path / "1", tmp_path / str(size))


@pytest.mark.parametrize("size", [1, 2])
def test_a_buffer_that_evaluation_disturbs_is_refused(tmp_path: Path, size: int) -> None:
    said = run_ranks(train_marked, size, tmp_path, True)
    assert all("buffers were changed out of training (average)" in text for text in said)


# ---- fast


def fast_everything() -> dict[str, Any]:
    return everything(60) | {"settings": {"reduction": "fast", "epochs": 20}}


FAST: dict[str, Callable[[], dict[str, Any]]] = {
    "everything": fast_everything,
    "reassigned average": lambda: {"model": Before(moving_average), "settings": {"reduction": "fast", "epochs": 20}},
    "counter": lambda: {"model": Before(counting), "settings": {"reduction": "fast", "epochs": 20}},
    "a late average": lambda: another_buffer() | {"settings": {"reduction": "fast", "epochs": 2}},
}


def train_fast(folder: Path) -> dict[str, str]:
    """The digests of the trained models."""
    return {name: digest(fitted(folder / name, make).model.state_dict()) for name, make in FAST.items()}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_fast_trains_all_of_it(tmp_path: Path, size: int) -> None:
    """On all ranks to the same weights and buffers, by which the test samples are judged."""
    results = run_ranks(train_fast, size, tmp_path)
    differ = [name for name in FAST if len({found[name] for found in results}) > 1]
    wrong = []
    for name, make in FAST.items():
        rows, model = metrics(tmp_path / name), make()["model"].eval()
        model.load_state_dict(load_file(tmp_path / name / "model.safetensors"))
        test = data().test
        with torch.no_grad():
            expected = F.binary_cross_entropy_with_logits(model(test.inputs), test.targets).item()
        if rows[-1]["test/loss"] != pytest.approx(expected, rel=1e-6):
            wrong.append((name, rows[-1]["test/loss"], expected))
        assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert (differ, wrong) == ([], [])
    rows = metrics(tmp_path / "everything")
    assert all(row["train/grad_norm"] > 0 for row in rows)
    assert rows[-1]["lr/0"] < rows[5]["lr/0"]
