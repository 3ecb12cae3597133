"""The tutorial's data sets as tensors, split into training and test samples as in the tutorial."""

import hashlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, NamedTuple

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import TypeVar

from ddp_circles.errors import UserError
from ddp_circles.memory import require_memory

CACHED_FROM = 2_000_000
"""Sets of at least this many samples are made once per node, kept in a file there, and shared by its ranks."""
CACHED_PARTS = ("train_inputs", "train_targets", "test_inputs", "test_targets")
BYTES_PER_SAMPLE = 48
"""Memory that making a sample takes at least: scikit-learn's points, their noise and a shuffled copy."""
CACHE_WAIT_SECONDS = 3600.0
"""Longest wait for another rank of the node to make a set; 10^8 samples take two minutes."""


class Dataset(NamedTuple):
    """Samples and their targets.

    `inputs`: shape [n, ...]. `targets`: shape [n], zeros and ones for two classes, float32 once `fit` has taken them,
    int64 numbers for more; shape [n, ...] for a loss of the caller's own.
    """

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Dataset":
        """Copy to `device`; samples already there are shared."""
        return Dataset(self.inputs.to(device), self.targets.to(device))


Samples_co = TypeVar("Samples_co", default=Dataset, covariant=True)


class Split(NamedTuple, Generic[Samples_co]):
    """Training samples and test samples: each a `Dataset`, or a map-style data set of (inputs, target)."""

    train: Samples_co
    test: Samples_co


def mapped(function: Callable[[Tensor], Any], values: Any) -> Any:
    """`values` with each tensor in its tuples, lists and dictionaries replaced by what `function` makes of it."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, Mapping):
        return {key: mapped(function, value) for key, value in values.items()}
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*(mapped(function, value) for value in values))
    if isinstance(values, (tuple, list)):
        return type(values)(mapped(function, value) for value in values)
    return values


def leaves(values: Any) -> list[Tensor]:
    """The tensors in `values`, in their order."""
    found: list[Tensor] = []
    mapped(found.append, values)
    return found


def same(one: Any, other: Any) -> bool:
    """True for equal tensors, in structures alike; NaN equals NaN."""
    pairs = list(zip(leaves(one), leaves(other), strict=False))
    return len(pairs) == len(leaves(one)) == len(leaves(other)) and all(
        a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124
        for a, b in pairs
    )


def digest(tensors: Iterable[Tensor]) -> str:
    """Compute the SHA-256 of `tensors`, in hexadecimal; the same on any device."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def make_points(dataset: str, *, n_samples: int, **options: Any) -> Split:
    """Make `circles`, `moons` or `blobs` and split them, as `points.generate` says; the same arguments, the same bits.

    Sets of `CACHED_FROM` samples or more are made once per node and mapped into memory by all its ranks. Raises
    `UserError` if memory or disk cannot hold so many.
    """
    arguments = options | {"dataset": dataset, "n_samples": n_samples}
    with _naming_n_samples(n_samples):
        return _cached(arguments)[0] if n_samples >= CACHED_FROM else _generate(arguments)


def cached_points(**arguments: Any) -> tuple[Split, str]:
    """The set that `make_points` takes from this node's cache, and its digest, for a comparison between nodes."""
    with _naming_n_samples(arguments["n_samples"]):
        return _cached(arguments)


@contextmanager
def _naming_n_samples(n_samples: int) -> Iterator[None]:
    """Turn a lack of memory or disk space into a `UserError`."""
    try:
        require_memory(n_samples * BYTES_PER_SAMPLE)
        yield
    except MemoryError as error:
        raise UserError(f"--n-samples {n_samples} needs more memory than there is ({error}): use fewer") from None
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--n-samples {n_samples}: so many points are kept in a file, and it cannot be written ({error}): "
            "make room there, set TMPDIR to another folder, or use fewer"
        ) from None


def _generate(arguments: dict[str, Any]) -> Split:
    from ddp_circles import points  # noqa: PLC0415 - scikit-learn takes seconds to import, most ranks do without

    return points.generate(**arguments)


def _cached(arguments: dict[str, Any]) -> tuple[Split, str]:
    """Load the set from this node's cache, with its digest; the first rank to ask makes it while the others wait."""
    recipe = json.dumps(arguments | {name: version(name) for name in ("scikit-learn", "numpy")}, sort_keys=True)
    cache = Path(tempfile.gettempdir()) / f"ddp_circles-{os.geteuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if not _is_ours(cache, stat.S_ISDIR):
        raise UserError(
            f"{cache} is not a folder that belongs to you and that nobody else can write to: the points of big sets "
            "are kept there. Remove it, or set TMPDIR to another folder"
        )
    file = cache / f"{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.safetensors"
    checksum = file.with_suffix(".sha256")
    with FileLock(file.with_suffix(".lock"), timeout=CACHE_WAIT_SECONDS):
        split = _load(file, checksum, arguments)
        if split is None:
            for stale in (file, checksum):  # not overwritten: a running training may have it mapped
                stale.unlink(missing_ok=True)
            _store(_generate(arguments), file)
            checksum.write_bytes(_digest(file))
            _keep_private(checksum)
            split = _load(file, checksum, arguments)
        if split is None:
            raise OSError(f"{file} has changed since it was written")
        return split, checksum.read_bytes().hex()


def _is_ours(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """True if `path` is of that kind, no link, belongs to this user, and nobody else may write to it."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return is_kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _keep_private(file: Path) -> None:
    with suppress(PermissionError):  # some file systems have no modes; `_is_ours` looks at what there is
        file.chmod(0o600)


def _load(file: Path, checksum: Path, arguments: dict[str, Any]) -> Split | None:
    """The stored set; None if it is not there, damaged, or not the set that was asked for."""
    if not (_is_ours(file, stat.S_ISREG) and _is_ours(checksum, stat.S_ISREG)):
        return None
    if checksum.read_bytes() != _digest(file):
        return None
    loaded = load_file(file)  # mapped: the pages are shared by the node's ranks
    if {name: (part.dtype, tuple(part.shape)) for name, part in loaded.items()} != _expected_parts(arguments):
        return None
    parts = [loaded[name] for name in CACHED_PARTS]
    return Split(Dataset(*parts[:2]), Dataset(*parts[2:]))


def _expected_parts(arguments: dict[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The types and shapes of a stored set's parts."""
    classes = torch.int64 if arguments["dataset"] == "blobs" else torch.float32
    tested = math.ceil(arguments["n_samples"] * arguments["test_fraction"])  # as scikit-learn rounds
    expected = []
    for count in (arguments["n_samples"] - tested, tested):
        expected += [(torch.float32, (count, 2)), (classes, (count,))]
    return dict(zip(CACHED_PARTS, expected, strict=True))


def _store(split: Split, file: Path) -> None:
    try:
        save_file(dict(zip(CACHED_PARTS, [*split.train, *split.test], strict=True)), file)
        _keep_private(file)
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def _digest(file: Path) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()
