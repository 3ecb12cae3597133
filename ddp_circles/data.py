"""The data sets of the tutorial as tensors, split as there."""

import hashlib
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddp_circles.config import Config, UserError

BLOB_CENTRES = 4
CACHED_FROM = 2_000_000
"""From so many samples on a set is stored, and shared by the ranks of a node."""
CACHE_WAIT_SECONDS = 3600.0
"""How long a rank waits for another one of the node to make a set; 10^8 samples take two minutes."""
CACHE_FILES = ("train_inputs.npy", "train_targets.npy", "test_inputs.npy", "test_targets.npy")


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

    def digest(self) -> str:
        """One word for all samples, on whatever device: their SHA-256 in hexadecimal."""
        found = hashlib.sha256()
        for part in (*self.train, *self.test):
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()


def make_points(config: Config) -> Split:
    """The points that `config` asks for; raises `UserError` where memory or disk cannot hold so many."""
    try:
        return make_split(
            config.dataset,
            n_samples=config.n_samples,
            noise=config.noise,
            factor=config.factor,
            test_fraction=config.test_fraction,
            data_seed=config.data_seed,
        )
    except MemoryError as error:
        raise UserError(
            f"--n-samples {config.n_samples} needs more memory than there is ({error}): use fewer"
        ) from None
    except OSError as error:
        raise UserError(
            f"--n-samples {config.n_samples}: so many points are kept in a file, and it cannot be written ({error}): "
            "make room there, set TMPDIR to another folder, or use fewer"
        ) from None


def is_cached(n_samples: int) -> bool:
    """Whether a set of so many samples is made once per node, and kept there in a file."""
    return n_samples >= CACHED_FROM


def make_split(
    dataset: str, *, n_samples: int, noise: float, factor: float, test_fraction: float, data_seed: int
) -> Split:
    """Make `circles`, `moons` or `blobs` with scikit-learn and split them; the same arguments give the same bits.

    `noise` is the standard deviation of the points, for blobs that of each of the 4 blobs. From `CACHED_FROM` samples
    on, the set is made once per node and mapped into memory by all ranks there; raises `OSError` if it cannot be
    stored. Source: scikit-learn's `make_circles`, `make_moons`, `make_blobs` and `train_test_split`, called as in the
    tutorial's notebook.
    """
    arguments: dict[str, Any] = {
        "dataset": dataset,
        "n_samples": n_samples,
        "noise": noise,
        "factor": factor,
        "test_fraction": test_fraction,
        "data_seed": data_seed,
    }
    return _cached(arguments) if is_cached(n_samples) else _generate(**arguments)


def _generate(dataset: str, n_samples: int, noise: float, factor: float, test_fraction: float, data_seed: int) -> Split:
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
    inputs = torch.from_numpy(points).to(torch.float32)
    targets = torch.from_numpy(classes).to(torch.int64 if dataset == "blobs" else torch.float32)
    del points, classes
    train_inputs, test_inputs, train_targets, test_targets = train_test_split(
        inputs, targets, test_size=test_fraction, random_state=data_seed
    )
    return Split(Dataset(train_inputs, train_targets), Dataset(test_inputs, test_targets))


def _cached(arguments: dict[str, Any]) -> Split:
    """The set from this node's cache; the first rank to ask makes it, under a lock, and the others wait."""
    import numpy as np
    from filelock import FileLock

    recipe = json.dumps(arguments | {name: version(name) for name in ("scikit-learn", "numpy")}, sort_keys=True)
    cache = Path(tempfile.gettempdir()) / f"ddp_circles-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    folder = cache / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    with FileLock(f"{folder}.lock", timeout=CACHE_WAIT_SECONDS):
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            _store(_generate(**arguments), folder)
    # Copy-on-write: the pages are shared by the node's ranks, and torch gets the writable memory that it insists on.
    parts = [torch.from_numpy(np.load(folder / name, mmap_mode="c")) for name in CACHE_FILES]
    return Split(Dataset(*parts[:2]), Dataset(*parts[2:]))


def _store(split: Split, folder: Path) -> None:
    """Write the parts of `split` and their checksums; the folder gets its name when it is whole."""
    import numpy as np

    made = folder.with_suffix(".partial")
    shutil.rmtree(made, ignore_errors=True)  # what a start that was killed here left behind
    made.mkdir()
    try:
        for name, part in zip(CACHE_FILES, [*split.train, *split.test], strict=True):
            np.save(made / name, part.numpy())
        (made / "checksums.json").write_text(json.dumps(_checksums(made)))
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _is_whole(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "checksums.json").read_text()) == _checksums(folder))
    except (OSError, ValueError):
        return False


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for name in CACHE_FILES:
        with (folder / name).open("rb") as file:
            sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def class_count(dataset: str) -> int:
    """How many classes the points of `dataset` have."""
    return BLOB_CENTRES if dataset == "blobs" else 2
