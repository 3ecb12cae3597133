"""The least a script needs before its first step: torch, the same points, a process group, a model in DDP."""

import os

import torch
import torch.distributed as dist
from sklearn.datasets import make_circles
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    """Join the process group and take one step."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29444"}.items():
        os.environ.setdefault(name, value)
    dist.init_process_group("gloo")
    points, classes = make_circles(1000, noise=0.03, factor=0.8, random_state=42)
    inputs, targets = torch.from_numpy(points).float(), torch.from_numpy(classes).float()
    inputs, _, targets, _ = train_test_split(inputs, targets, test_size=0.2, random_state=42)
    torch.manual_seed(42)
    layers = (nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 1), nn.Flatten(0))
    model = DistributedDataParallel(nn.Sequential(*layers))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    share = slice(dist.get_rank(), 64, dist.get_world_size())
    optimizer.zero_grad()
    nn.functional.binary_cross_entropy_with_logits(model(inputs[share]), targets[share]).backward()
    optimizer.step()


if __name__ == "__main__":
    main()
