"""A plain PyTorch loop, written out here, is the oracle: any number of ranks arrives at its losses."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import make_blobs, make_circles
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from tests.harness.ranks import train_on

THOROUGH = pytest.mark.thorough


@dataclass(frozen=True)
class Case:
    """One configuration, as flags and for the plain loop."""

    samples: int
    test_fraction: float
    batch_size: int
    optimizer: str
    lr: float
    epochs: int
    blobs: bool = False
    seed: int = 42

    @property
    def flags(self) -> list[object]:
        return [
            "--dataset", "blobs" if self.blobs else "circles", "--noise", 1.5 if self.blobs else 0.05,
            "--n-samples", self.samples, "--test-fraction", self.test_fraction, "--batch-size", self.batch_size,
            "--optimizer", self.optimizer, "--lr", self.lr, "--epochs", self.epochs, "--seed", self.seed,
            "--hidden", 7, 6, "--wandb", "disabled", "--no-plots",
        ]  # fmt: skip

    def points(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.blobs:
            X, y = make_blobs(self.samples, centers=4, cluster_std=1.5, random_state=42)  # noqa: N806
        else:
            X, y = make_circles(self.samples, noise=0.05, factor=0.8, random_state=42)  # noqa: N806
        X = torch.tensor(X, dtype=torch.float32)  # noqa: N806
        y = torch.tensor(y, dtype=torch.int64 if self.blobs else torch.float32)
        return tuple(train_test_split(X, y, test_size=self.test_fraction, random_state=42))


CASES = {
    "uneven everywhere": Case(613, 0.23, 37, "adam", 0.01, 4),
    "full batch": Case(613, 0.23, 0, "adam", 0.05, 30),
    "batch larger than the set": Case(101, 0.23, 1000, "adam", 0.02, 20, seed=7),
    "batch smaller than the micro-batches": Case(53, 0.4, 3, "sgd", 0.1, 4),
    "blobs": Case(613, 0.23, 101, "sgd", 0.05, 6, blobs=True),
}


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.dtype == torch.int64:
        return F.cross_entropy(logits, targets)
    return F.binary_cross_entropy_with_logits(logits.squeeze(1), targets)


@cache
def plain_loop(name: str) -> tuple[float, float]:
    """Training loss of the last epoch, and test loss after it."""
    case = CASES[name]
    X_train, X_test, y_train, y_test = case.points()  # noqa: N806
    torch.manual_seed(case.seed)
    model = nn.Sequential(
        nn.Linear(2, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4 if case.blobs else 1)
    )  # fmt: skip
    kind: Any = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[case.optimizer]
    optimizer = kind(model.parameters(), lr=case.lr)
    numbers: Any = range(len(X_train))
    sampler: DistributedSampler[int] = DistributedSampler(numbers, num_replicas=1, rank=0, seed=case.seed)
    total = 0.0
    for epoch in range(case.epochs):
        sampler.set_epoch(epoch)
        order = list(sampler)
        total = 0.0
        size = case.batch_size or len(order)
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            optimizer.zero_grad()
            loss = mean_loss(model(X_train[batch]), y_train[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
    with torch.inference_mode():
        return total / len(X_train), mean_loss(model(X_test), y_test).item()


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=THOROUGH), 3, pytest.param(4, marks=THOROUGH)])
@pytest.mark.parametrize("reduction", ["exact", "fast"])
@pytest.mark.parametrize("name", CASES)
def test_the_losses_are_those_of_a_plain_loop(name: str, reduction: str, size: int, tmp_path: Path) -> None:
    outcomes = train_on(size, *CASES[name].flags, "--reduction", reduction, "--run-dir", tmp_path)
    assert {outcome.code for outcome in outcomes} == {0}, outcomes[0].output
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["train/loss"], last["test/loss"]) == pytest.approx(plain_loop(name), abs=1e-4)


def test_the_cases_are_worth_comparing() -> None:
    """Each has trained away from where it began, and none has come to rest at zero."""
    for name, case in CASES.items():
        trained, tested = plain_loop(name)
        begun = 1.3863 if case.blobs else 0.6931  # the logarithm of the number of classes
        assert 0.01 < trained < 2 * begun, name
        assert abs(trained - begun) > 1e-3, name
        assert tested > 0.01, name
