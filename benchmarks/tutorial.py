"""The tutorial's training as a script, with DDP as torch's documentation shows it: python -m benchmarks.tutorial.

The work of the package's default run: the same points, network, optimizer, batch size and epochs, a test after each
epoch, the figures of all ranks. Without tracking, checkpoints, pictures, or anything against failures.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import make_circles
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

EPOCHS = 60
BATCH = 64
"""Samples per step over all ranks."""
LOSS = nn.BCEWithLogitsLoss()


def main() -> None:
    """Train, print a line every ten epochs, and save the weights to the path given, if one is."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29444"}.items():
        os.environ.setdefault(name, value)
    dist.init_process_group("gloo")
    points, classes = make_circles(1000, noise=0.03, factor=0.8, random_state=42)
    inputs, targets = torch.from_numpy(points).float(), torch.from_numpy(classes).float()
    inputs, test_inputs, targets, test_targets = train_test_split(inputs, targets, test_size=0.2, random_state=42)
    train_set, test_set = TensorDataset(inputs, targets), TensorDataset(test_inputs, test_targets)
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(train_set, seed=42)
    test_sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(test_set, shuffle=False)
    loader = DataLoader(train_set, batch_size=BATCH // dist.get_world_size(), sampler=sampler)
    test_loader = DataLoader(test_set, batch_size=len(test_set), sampler=test_sampler)
    torch.manual_seed(42)
    layers = (nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 1), nn.Flatten(0))
    model = DistributedDataParallel(nn.Sequential(*layers))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        model.train()
        train_sums = torch.zeros(3)
        for x, y in loader:
            logits = model(x)
            loss = LOSS(logits, y)
            add(train_sums, loss, logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        test_sums = torch.zeros(3)
        with torch.inference_mode():
            for x, y in test_loader:
                logits = model(x)
                add(test_sums, LOSS(logits, y), logits, y)
        train_figures, test_figures = means(train_sums), means(test_sums)
        if dist.get_rank() == 0 and epoch % 10 == 0:
            print(epoch, train_figures, test_figures)
    if dist.get_rank() == 0 and len(sys.argv) > 1:
        torch.save(model.module.state_dict(), Path(sys.argv[1]))
    dist.destroy_process_group()


def add(sums: Tensor, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
    """Add a batch to the sums of loss, right answers and samples."""
    sums[0] += loss.detach() * len(targets)
    sums[1] += ((logits.detach() > 0) == (targets > 0)).sum()
    sums[2] += len(targets)


def means(sums: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy over all ranks."""
    dist.all_reduce(sums)
    loss, right, samples = sums.tolist()
    return loss / samples, right / samples


if __name__ == "__main__":
    main()
