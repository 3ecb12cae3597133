"""The tutorial's points, made by scikit-learn; in a module of its own, since only one rank needs the import."""

import torch
from sklearn import datasets
from sklearn.model_selection import train_test_split

from ddp_circles.data import Dataset, Split
from ddp_circles.models import BLOB_CENTRES


def generate(dataset: str, n_samples: int, noise: float, factor: float, test_fraction: float, data_seed: int) -> Split:
    """Make the training points and the test points: inputs, float32 [n, 2], and targets.

    `noise` is the standard deviation of the points, for blobs that of each blob. Targets are float32 zeros and ones for
    `circles` and `moons`, int64 numbers for `blobs`. Source: scikit-learn's `make_circles`, `make_moons`, `make_blobs`
    and `train_test_split`.
    """
    if dataset == "circles":
        points, classes = datasets.make_circles(n_samples, noise=noise, factor=factor, random_state=data_seed)
    elif dataset == "moons":
        points, classes = datasets.make_moons(n_samples, noise=noise, random_state=data_seed)
    else:
        points, classes = datasets.make_blobs(
            n_samples, n_features=2, centers=BLOB_CENTRES, cluster_std=noise, random_state=data_seed
        )
    inputs = torch.from_numpy(points).to(torch.float32)
    targets = torch.from_numpy(classes).to(torch.int64 if dataset == "blobs" else torch.float32)
    del points, classes
    train_inputs, test_inputs, train_targets, test_targets = train_test_split(
        inputs, targets, test_size=test_fraction, random_state=data_seed
    )
    return Split(Dataset(train_inputs, train_targets), Dataset(test_inputs, test_targets))
