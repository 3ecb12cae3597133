"""The tutorial's data sets as tensors, split into training and test samples as in the tutorial."""

import hashlib
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from ddp_circles.errors import UserError

CACHED_FROM = 2_000_000
"""Sets of at least this many samples are cached on disk, and shared by the ranks of a node."""
CACHE_WAIT_SECONDS = 3600.0
"""Longest wait for another rank of the node to make a set; 10^8 samples take two minutes."""
CACHE_FILES = ("train_inputs.npy", "train_targets.npy", "test_inputs.npy", "test_targets.npy")


class Dataset(NamedTuple):
    """Samples and their targets.

    `inputs`: float32 of shape [n, features]. `targets`: shape [n]; float32 zeros and ones for two classes, int64 class
    numbers for more.
    """

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Dataset":
        """Copy to `device`; samples already there are shared."""
        return Dataset(self.inputs.to(device), self.targets.to(device))


class Split(NamedTuple):
    """Training samples and test samples."""

    train: Dataset
    test: Dataset

    def digest(self) -> str:
        """Compute the SHA-256 of all samples, in hexadecimal; the same on any device."""
        found = hashlib.sha256()
        for part in (*self.train, *self.test):
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()


def make_points(
    dataset: str, *, n_samples: int, noise: float, factor: float, test_fraction: float, data_seed: int
) -> Split:
    """Make `circles`, `moons` or `blobs` and split them; the same arguments give the same bits.

    `noise` is the standard deviation of the points, for blobs that of each blob. Sets of `CACHED_FROM` samples or more
    are made once per node and mapped into memory by all its ranks. Raises `UserError` if memory or disk
    cannot hold so many.
    """
    arguments: dict[str, Any] = {
        "dataset": dataset,
        "n_samples": n_samples,
        "noise": noise,
        "factor": factor,
        "test_fraction": test_fraction,
        "data_seed": data_seed,
    }
    try:
        return _cached(arguments) if is_cached(n_samples) else _generate(arguments)
    except MemoryError as error:
        raise UserError(f"--n-samples {n_samples} needs more memory than there is ({error}): use fewer") from None
    except OSError as error:
        raise UserError(
            f"--n-samples {n_samples}: so many points are kept in a file, and it cannot be written ({error}): "
            "make room there, set TMPDIR to another folder, or use fewer"
        ) from None


def is_cached(n_samples: int) -> bool:
    """Tell if a set of `n_samples` is made once per node and kept in files there."""
    return n_samples >= CACHED_FROM


def _generate(arguments: dict[str, Any]) -> Split:
    from ddp_circles import points  # noqa: PLC0415 - scikit-learn takes seconds to import, most ranks do without

    return Split(*(Dataset(*part) for part in points.generate(**arguments)))


def _cached(arguments: dict[str, Any]) -> Split:
    """Load the set from this node's cache; the first rank to ask makes it under a lock, while the others wait."""
    recipe = json.dumps(arguments | {name: version(name) for name in ("scikit-learn", "numpy")}, sort_keys=True)
    cache = Path(tempfile.gettempdir()) / f"ddp_circles-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    folder = cache / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    with FileLock(f"{folder}.lock", timeout=CACHE_WAIT_SECONDS):
        if not _is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
            _store(_generate(arguments), folder)
    # Copy-on-write: the pages are shared by the node's ranks, and torch gets the writable memory that it insists on.
    parts = [torch.from_numpy(np.load(folder / name, mmap_mode="c")) for name in CACHE_FILES]
    return Split(Dataset(*parts[:2]), Dataset(*parts[2:]))


def _store(split: Split, folder: Path) -> None:
    """Write the parts of `split` and their checksums; `folder` appears when it is complete."""
    made = folder.with_suffix(".partial")
    shutil.rmtree(made, ignore_errors=True)  # left behind by a start that was killed here
    made.mkdir()
    try:
        for name, part in zip(CACHE_FILES, [*split.train, *split.test], strict=True):
            np.save(made / name, part.numpy())
        (made / "checksums.json").write_text(json.dumps(_checksums(made)))
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _is_complete(folder: Path) -> bool:
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
