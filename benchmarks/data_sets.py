"""A map-style data set of a million samples, read by two workers: python -m benchmarks.data_sets.

Compares `fit` with a plain loop over a DataLoader, with the same network, batch size and workers, on one rank: samples
per second, in turn, and the peak memory of the rank by the length of the data set. `cheap` samples are a look into a
table, so that all that is done for each sample shows; `costly` ones draw random numbers for half a millisecond.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.throughput import RESULTS, SPAWN, Spread, circumstances, quiet
from ddp_circles import Config, Split, fit

FEATURES, CLASSES, BATCH, WORKERS = 32, 10, 512, 2
LENGTHS = (10**5, 10**6)


class Virtual(Dataset[tuple[Tensor, int]]):
    """`length` samples that are made when they are read."""

    def __init__(self, length: int, *, costly: bool) -> None:
        self.length, self.costly = length, costly
        self.table = torch.rand(4096, FEATURES, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample = self.table[index % len(self.table)]
        if self.costly:
            for _ in range(20):
                sample = (sample + 0.01 * torch.randn(FEATURES)).clamp(0, 1)
        return sample, index % CLASSES


def network() -> nn.Module:
    """The network that all train."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def train_plainly(data: Virtual) -> float:
    """Train one epoch in a plain loop; returns samples per second."""
    model, loss_function = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=WORKERS)
    started, total = time.monotonic(), torch.zeros(())
    for inputs, targets in loader:
        loss = loss_function(model(inputs), targets)
        total += loss.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return len(data) / (time.monotonic() - started)


def train_here(data: Virtual, reduction: Literal["exact", "fast"]) -> float:
    """Train one epoch with `fit`; returns samples per second."""
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            run_dir=Path(folder), epochs=1, batch_size=BATCH, reduction=reduction, wandb="disabled", plots=False
        )
        split = Split(train=data, test=Virtual(BATCH, costly=False))
        return fit(config, model=network(), data=split, workers=WORKERS).metrics["train/samples_per_second"]


CONTENDERS: dict[str, Callable[[Virtual], float]] = {
    "plain": train_plainly,
    "exact": partial(train_here, reduction="exact"),
    "fast": partial(train_here, reduction="fast"),
}


def measure(name: str, length: int, costly: bool) -> tuple[float, float]:
    """Samples per second of one contender, and the peak memory of its rank in MiB."""
    torch.set_num_threads(1)
    with quiet():
        speed = CONTENDERS[name](Virtual(length, costly=costly))
    return speed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_apart(name: str, length: int, *, costly: bool) -> tuple[float, float]:
    """The same in a process of its own, which may have workers."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(measure, name, length, costly).result()


def main() -> None:
    """Measure in turn, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_sets", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    document = circumstances(arguments, "cpu")
    kinds: dict[str, tuple[int, bool]] = {"cheap": (LENGTHS[1], False), "costly": (LENGTHS[0], True)}
    memory: dict[str, Any] = {}
    for kind, (length, costly) in kinds.items():
        rounds = [
            {name: measure_apart(name, length, costly=costly) for name in CONTENDERS} for _ in range(arguments.rounds)
        ]
        for name in CONTENDERS:
            document[f"{kind}, {name}, samples per second"] = asdict(Spread.of([one[name][0] for one in rounds]))
            ratios = [one[name][0] / one["plain"][0] for one in rounds]
            document[f"{kind}, {name} over plain"] = asdict(Spread.of(ratios))
            if not costly:
                memory[name] = {str(length): max(one[name][1] for one in rounds)}
    for name in CONTENDERS:
        memory[name][str(LENGTHS[0])] = measure_apart(name, LENGTHS[0], costly=False)[1]
    document["peak memory of the rank in MiB, by length"] = memory
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "data_sets.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in document.items() if name not in ("packages", "arguments")}))


if __name__ == "__main__":
    main()
