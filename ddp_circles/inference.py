"""A finished run's model at work: points to raw logits to prediction probabilities to prediction labels."""

import codecs
import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import rich.markup
import rich.progress
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from ddp_circles.config import Config, read_toml
from ddp_circles.data import make_points
from ddp_circles.errors import FileError, UserError, naming
from ddp_circles.models import Classifier, class_count, labels_of, probabilities_of
from ddp_circles.reading import read_bytes
from ddp_circles.records.files import replacing
from ddp_circles.terminal import visible

COORDINATES = ("x1", "x2")
LARGEST = torch.finfo(torch.float32).max
OWN_MODEL_BYTES = 2**28
"""Beyond the model of the configuration: a file up to here is read, to say how a model of the user's own differs."""
BLOCK_ROWS = 8192
"""Rows of a CSV file that are predicted at once: memory does not grow with the file."""
LONGEST_LINE = 1 << 16
"""In characters; a file without line ends is refused before it fills the memory."""


class Predictions(NamedTuple):
    """Predictions for n points.

    `logits` and `probabilities`: float32, [n] for two classes (of class 1), [n, classes] for more. `labels`: [n], the
    numbers of the classes.
    """

    logits: Tensor
    probabilities: Tensor
    labels: Tensor

    @property
    def names(self) -> list[str]:
        """The names of `columns`."""
        each = [""] if self.logits.ndim == 1 else [f"_{number}" for number in range(self.logits.shape[1])]
        return [*("logit" + name for name in each), *("probability" + name for name in each), "label"]

    @property
    def columns(self) -> list[list[float]]:
        """Logits, probabilities and labels, a list for each column of a table."""
        return torch.column_stack(self).T.tolist()

    @property
    def first_overflow(self) -> int | None:
        """The first point whose logits are not finite, if any."""
        bad = self.logits.isfinite().logical_not().nonzero()
        return int(bad[0, 0]) if len(bad) else None


def load_model(run_dir: Path) -> tuple[Config, nn.Module]:
    """Load the configuration and the trained model of a finished run, on the CPU and ready to predict.

    Raises `UserError` for a folder that is no run directory, for a run that is not finished, and for a model that is
    damaged or does not fit the configuration.
    """
    if not run_dir.is_dir():
        raise UserError(f"there is no run directory {run_dir}")
    config = _read_config(run_dir / "config.toml")
    torch.set_num_threads(config.threads)
    with torch.device("meta"):  # shapes alone
        model = Classifier(len(COORDINATES), config.hidden, config.activation, class_count(config.dataset))
    expected = model.state_dict()
    limit = sum(weight.nbytes for weight in expected.values()) + OWN_MODEL_BYTES
    weights = _read_weights(run_dir / "model.safetensors", limit)
    _check_weights(weights, expected, run_dir)
    model.load_state_dict(weights, assign=True)
    return config, model.eval()


def _read_config(path: Path) -> Config:
    try:
        with naming(path):
            if not path.exists():
                raise UserError(f"{path.parent} is not a run directory: it has no {path.name}")
        return Config(**read_toml(path))
    except (FileError, UserError) as error:
        raise UserError(str(error).removeprefix("--config ")) from None


def _read_weights(path: Path, limit: int) -> dict[str, Tensor]:
    try:
        return load(read_bytes(path, limit))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}: the run is not finished; continue it first") from None
    except (FileError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None


def _check_weights(weights: dict[str, Tensor], expected: dict[str, Tensor], run_dir: Path) -> None:
    for name in sorted(weights.keys() | expected.keys()):
        found, wanted = (
            f"{tensors[name].dtype} {list(tensors[name].shape)}" if name in tensors else "missing"
            for tensors in (weights, expected)
        )
        if found != wanted:
            raise UserError(
                f"model.safetensors in {run_dir} is not of the classifier in config.toml: {name} is {found} in the "
                f"first and {wanted} by the second. If the run trained a model= of its own, load the file "
                "into that model: predict cannot build it"
            )
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"the model in {run_dir} has weights that are not finite: the training diverged")


@torch.inference_mode()
def predict(model: nn.Module, inputs: Tensor) -> Predictions:
    """Predict for points, float32 [n, 2]."""
    logits = model(inputs)
    probabilities = probabilities_of(logits)
    return Predictions(logits, probabilities, labels_of(probabilities))


def parse_points(texts: Sequence[str]) -> Tensor:
    """Read points `X1,X2` as float32 [n, 2]; raises `UserError` naming the first that is none."""
    points = []
    for text in texts:
        try:
            points.append(_coordinates(text.split(",")))
        except ValueError as error:
            raise UserError(f"--points {text!r} is not X1,X2: {error}") from None
    return torch.tensor(points, dtype=torch.float32)


def _coordinates(fields: Sequence[str]) -> list[float]:
    """Read the two coordinates of a point; raises `ValueError` saying what is wrong with them."""
    if len(fields) != len(COORDINATES):
        raise ValueError(f"expected {len(COORDINATES)} columns separated by a comma, found {len(fields)}")
    return list(map(_coordinate, fields))


def _coordinate(field: str) -> float:
    value = _number(field)
    if value is None:
        raise ValueError(f"{field!r} is not a number")
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{field!r} is not a finite float32")
    return value


def _number(field: str) -> float | None:
    """The number in `field`, if it is one; Python's `1_000` counts as none."""
    try:
        return float(field) if "_" not in field else None
    except ValueError:
        return None


def show_test_points(config: Config, model: nn.Module, count: int) -> str:
    """Tabulate predictions and truth of the run's first `count` test points.

    Raises `UserError` if there are not so many.
    """
    test = make_points(**config.points).test
    if not 1 <= count <= len(test.inputs):
        raise UserError(f"--show must be between 1 and {len(test.inputs)}, the number of test points, got {count}")
    return table(model, test.inputs[:count], test.targets[:count])


def table(model: nn.Module, inputs: Tensor, truth: Tensor | None = None) -> str:
    """Tabulate predictions for `inputs`, a line each, beside the `truth` where it is known.

    Raises `UserError` naming the first point whose logits are not finite.
    """
    predictions = predict(model, inputs)
    if (overflow := predictions.first_overflow) is not None:
        raise UserError(f"point {overflow + 1} is so far out that its logits are not finite")
    names = [*COORDINATES, *predictions.names]
    *figures, labels = inputs.T.tolist() + predictions.columns
    columns = [_aligned([str(np.float32(value)) for value in figure]) for figure in figures]
    columns.append([f"{label:.0f}" for label in labels])
    if truth is not None:
        names.append("truth")
        columns.append([f"{label:.0f}" for label in truth.tolist()])
    widths = [max(len(name), *map(len, column)) for name, column in zip(names, columns, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in [names, *zip(*columns, strict=True)])


def _aligned(numbers: list[str]) -> list[str]:
    """Pad numbers so that their decimal points stand one below the other."""
    parts = [number.partition(".") for number in numbers]
    left, right = (max(len(part[side]) for part in parts) for side in (0, 2))
    return [whole.rjust(left) + (point or " ") + rest.ljust(right) for whole, point, rest in parts]


def predict_csv(model: nn.Module, source: Path, target: Path, *, block_rows: int = BLOCK_ROWS) -> int:
    """Write the rows of `source` with their predictions to `target`; returns the number of points.

    `target` is replaced when all is written; before that it is left alone. A progress bar shows on a terminal. Raises
    `UserError` naming the line of a row that is not two finite numbers, and for a file that cannot be read or written.
    """
    target = target.resolve()
    count = 0
    try:
        if target.exists() and (not target.is_file() or (source.exists() and target.samefile(source))):
            raise UserError(f"--out {target} must be a file, and another than --csv {source}")
        with _open(source) as file, replacing(target) as binary:
            out = codecs.getwriter("utf-8")(binary, "surrogateescape")
            rows = _read_rows(file, source)
            first = next(rows, None)
            if first is None:
                raise UserError(f"--csv {source} is empty")
            _, fields, point = first
            header = COORDINATES if point else fields
            names = predict(model, torch.empty(0, len(COORDINATES))).names
            csv.writer(out, lineterminator="\n").writerow([*header, *names])
            rows = chain([first], rows) if point else rows
            while points := _predict_rows(model, islice(rows, block_rows), out, source):
                count += points
    except OSError as error:
        raise UserError(f"--csv {source} cannot be taken to --out {target}: {error.strerror}") from None
    return count


def _open(source: Path) -> AbstractContextManager[TextIO]:
    """Open a file to read; on a terminal, a progress bar shows how far the reading is."""
    try:
        return rich.progress.open(
            source,
            "rt",
            encoding="utf-8-sig",  # without the mark that some programs put first
            errors="surrogateescape",  # names of columns in another encoding pass unchanged
            newline="",
            description=rich.markup.escape(visible(source.name)),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty() or not source.is_file(),
        )
    except OSError as error:
        raise UserError(f"--csv {source} cannot be read: {error}") from None


def _read_rows(file: TextIO, source: Path) -> Iterator[tuple[int, list[str], list[float]]]:
    """Read a CSV file row by row: the number of its first line, its fields, and its coordinates, for a header none.

    The first row is a header if it has two fields of which none is a number. Raises `UserError` for the first row that
    is neither that nor a point.
    """
    reader = csv.reader(_lines(file), strict=True)
    line = 1
    try:
        for fields in reader:
            is_header = line == 1 and list(map(_number, fields)) == [None] * len(COORDINATES)
            yield line, fields, [] if is_header else _coordinates(fields)
            line = reader.line_num + 1
    except (csv.Error, ValueError) as error:
        raise UserError(f"--csv {source}, line {line}: {error}") from None


def _lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise csv.Error(f"longer than {LONGEST_LINE} characters")
        yield line


def _predict_rows(
    model: nn.Module, rows: Iterable[tuple[int, list[str], list[float]]], out: codecs.StreamWriter, source: Path
) -> int:
    """Write `rows` with their predictions to `out`; returns the number of rows."""
    # Flat lists: as many lists as there are rows would keep Python's garbage collector busy for half of the time.
    lines: list[int] = []
    texts: list[str] = []
    values: list[float] = []
    for line, fields, point in rows:
        lines.append(line)
        texts += map(str.strip, fields)
        values += point
    predictions = predict(model, torch.tensor(values, dtype=torch.float32).reshape(-1, len(COORDINATES)))
    if (overflow := predictions.first_overflow) is not None:
        raise UserError(f"--csv {source}, line {lines[overflow]}: so far out that the logits are not finite")
    columns = predictions.columns
    # Nine digits are enough to read back the same float32; numbers never need quotes.
    template = ",".join(["%s", "%s", *["%.9g"] * (len(columns) - 1), "%d\n"])
    out.write("".join(map(template.__mod__, zip(texts[::2], texts[1::2], *columns, strict=True))))
    return len(lines)
