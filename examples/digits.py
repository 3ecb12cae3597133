"""Read hand-written digits with a small convolutional network: 99 % of the test images, in half a minute on a CPU.

    python examples/digits.py
    torchrun --nproc_per_node=4 examples/digits.py --workers 2

Both end with the same weights, to the bit. Stopped or killed, either goes on where the other was.
"""

import argparse
import hashlib
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset

from ddp_circles import Config, Split, fit


class Digits(Dataset[tuple[Tensor, int]]):
    """Images [n, 1, 8, 8] and their classes; at each look an image is moved at random, by up to `shift` pixels."""

    def __init__(self, images: Tensor, classes: list[int], *, shift: int) -> None:
        self.images, self.classes, self.shift = F.pad(images, [shift] * 4), classes, shift
        self.fingerprint = hashlib.sha256(self.images.numpy().tobytes() + bytes(classes)).hexdigest()

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        top, left = torch.randint(2 * self.shift + 1, (2,)).tolist()  # the same on any rank and in any worker
        return self.images[index, :, top : top + 8, left : left + 8], self.classes[index]


def load() -> Split[Digits]:
    """Split scikit-learn's 1797 digits into a training set, which moves, and a test set, which does not."""
    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    trained, tested, trained_classes, tested_classes = train_test_split(
        images, classes.tolist(), test_size=0.2, stratify=classes, random_state=42
    )
    return Split(train=Digits(trained, trained_classes, shift=1), test=Digits(tested, tested_classes, shift=0))


def convolution(channels: int, filters: int) -> nn.Sequential:
    """Convolve 3 x 3 pixels, normalise, rectify."""
    return nn.Sequential(nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU())


def network() -> nn.Sequential:
    """The network, from images [n, 1, 8, 8] to logits [n, 10]."""
    features = (convolution(1, 16), convolution(16, 32), nn.MaxPool2d(2), convolution(32, 64), nn.MaxPool2d(2))
    return nn.Sequential(*features, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 2 * 2, 10))


def adamw(model: nn.Module) -> Optimizer:
    """AdamW that decays weights, but no biases and no parameters of batch norm."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01)


def main() -> None:
    """Train, and say how well it went."""
    parser = argparse.ArgumentParser(description="Train a small convolutional network on scikit-learn's digits.")
    parser.add_argument("--run-dir", default="runs/digits", help="folder of the results")
    parser.add_argument("--reduction", choices=["exact", "fast"], default="exact", help="fast: plain DDP")
    parser.add_argument("--workers", type=int, default=0, help="processes per rank that read the samples")
    args = parser.parse_args()

    config = Config(batch_size=128, epochs=25, log_every=5, run_dir=args.run_dir, reduction=args.reduction)
    data = load()
    steps = config.epochs * math.ceil(len(data.train) / config.batch_size)
    torch.manual_seed(config.seed)  # the same initial weights on every rank
    result = fit(
        config,
        model=network(),
        data=data,
        optimizer=adamw,
        scheduler=lambda optimizer: OneCycleLR(optimizer, max_lr=0.01, total_steps=steps),
        max_grad_norm=1.0,
        workers=args.workers,
    )
    if result.is_main:
        print(f"test accuracy {result.metrics['test/accuracy']:.1%}, files in {result.run_dir}")


if __name__ == "__main__":
    main()
