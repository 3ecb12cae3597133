"""The data sets of the tutorial as tensors, split as there."""

from typing import NamedTuple

import torch
from torch import Tensor

BLOB_CENTRES = 4


class Dataset(NamedTuple):
    """Samples and their classes.

    `inputs`: float32 of shape [n, features]. `targets`: shape [n]; float32 zeros and ones for two classes, int64 class
    numbers for more.
    """

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Dataset":
        """The same samples on `device`."""
        return Dataset(self.inputs.to(device), self.targets.to(device))


class Split(NamedTuple):
    """What is trained on, what is tested on."""

    train: Dataset
    test: Dataset


def make_split(
    dataset: str, *, n_samples: int, noise: float, factor: float, test_fraction: float, data_seed: int
) -> Split:
    """Make `circles`, `moons` or `blobs` with scikit-learn and split them; the same arguments give the same bits.

    `noise` is the standard deviation of the points, for blobs that of each of the 4 blobs. Source: scikit-learn's
    `make_circles`, `make_moons`, `make_blobs` and `train_test_split`, called as in the tutorial's notebook.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    if dataset == "circles":
        points, classes = datasets.make_circles(n_samples, noise=noise, factor=factor, random_state=data_seed)
    elif dataset == "moons":
        points, classes = datasets.make_moons(n_samples, noise=noise, random_state=data_seed)
    else:
        points, classes = datasets.make_blobs(
            n_samples, n_features=2, centers=BLOB_CENTRES, cluster_std=noise, random_state=data_seed
        )
    target_type = torch.int64 if dataset == "blobs" else torch.float32
    inputs = torch.from_numpy(points).to(torch.float32)
    targets = torch.from_numpy(classes).to(target_type)
    train_inputs, test_inputs, train_targets, test_targets = train_test_split(
        inputs, targets, test_size=test_fraction, random_state=data_seed
    )
    return Split(Dataset(train_inputs, train_targets), Dataset(test_inputs, test_targets))


def class_count(dataset: str) -> int:
    """How many classes the points of `dataset` have."""
    return BLOB_CENTRES if dataset == "blobs" else 2
