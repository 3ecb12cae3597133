"""Command line: points to raw logits to prediction probabilities to prediction labels, by a finished run's model."""

import codecs
import csv
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, NamedTuple

from ddp_circles.config import Config, read_toml
from ddp_circles.errors import UserError
from ddp_circles.records.files import SUFFIX, flush_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
COORDINATES = ("x1", "x2")
LARGEST = (2 - 2.0**-23) * 2.0**127
"""The largest float32."""
BLOCK_BYTES = 1 << 18
"""How much of a CSV file is read at once: memory does not grow with the file."""
LONGEST_LINE = 1 << 16
TOO_LONG = f"longer than {LONGEST_LINE} characters"
NUMBER = "%.9g"
"""Nine digits: enough to read back the same float32."""


class Predictions(NamedTuple):
    """What a model says of n points.

    `logits` and `probabilities`: float32, [n] for two classes (of class 1), [n, classes] for more. `labels`: [n], the
    numbers of the classes.
    """

    logits: "Tensor"
    probabilities: "Tensor"
    labels: "Tensor"


def main() -> None:
    """`python -m ddp_circles.predict`: parse, predict, and leave with the exit code of the contract."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a terminated run tidies up like Ctrl-C
    sys.exit(_run_command_line(sys.argv[1:]))


def _run_command_line(arguments: list[str]) -> int:
    try:
        print(_answer(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _answer(arguments: list[str]) -> str:
    """Do what the command line asks for and return what it prints."""
    import tyro

    @dataclass(frozen=True)
    class CommandLine:
        """Predict with the model of a finished run: raw logits, prediction probabilities, prediction labels.

        With two classes, logit and probability are those of class 1; with more, there is one of each for every class.
        The last digits of logits and probabilities can depend on how many points are computed together.
        """

        run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_DIR")]
        """Folder of the run."""
        points: Annotated[tuple[str, ...], tyro.conf.arg(metavar="X1,X2 [X1,X2 ...]", help_behavior_hint="")] = ()
        """Predict for these points."""
        csv: Annotated[Path | None, tyro.conf.arg(metavar="IN.csv", help_behavior_hint="")] = None
        """Predict for the points of a file: one a line, two columns separated by a comma, under a header with any
        names or none. Use with --out."""
        out: Annotated[Path | None, tyro.conf.arg(metavar="OUT.csv", help_behavior_hint="")] = None
        """Where the lines of --csv go, each with its logits, probabilities and label; always with a header. The file
        appears when it is complete."""
        show: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
        """Predict for the first N test points of the run, beside the truth."""

    chosen = tyro.cli(CommandLine, args=arguments, prog="python -m ddp_circles.predict")
    if [chosen.points != (), chosen.csv is not None, chosen.show is not None].count(True) != 1:
        raise UserError("give exactly one of --points, --csv and --show")
    if (chosen.csv is None) != (chosen.out is None):
        raise UserError("--csv IN.csv and --out OUT.csv belong together")
    config, model = load_model(chosen.run_dir)
    import torch

    torch.set_num_threads(config.threads)
    if chosen.show is not None:
        return show_test_points(config, model, chosen.show)
    if chosen.csv is not None and chosen.out is not None:
        return f"wrote {predict_csv(model, chosen.csv, chosen.out):,} predictions to {chosen.out}"
    return _table(model, parse_points(chosen.points))


def load_model(run_dir: Path) -> tuple[Config, "nn.Module"]:
    """The configuration and the trained model of a finished run, on the CPU and ready to predict.

    Raises `UserError` for what is no run directory, not finished, damaged, or no model of its configuration.
    """
    if not run_dir.is_dir():
        raise UserError(f"there is no run directory {run_dir}")
    config = _read_config(run_dir / "config.toml")
    weights = _read_weights(run_dir / "model.safetensors")

    from ddp_circles.models import Classifier, class_count

    model = Classifier(len(COORDINATES), config.hidden, config.activation, class_count(config.dataset))
    _check_weights(weights, model.state_dict(), run_dir)
    model.load_state_dict(weights)
    return config, model.eval()


def _read_config(path: Path) -> Config:
    if not path.exists():
        raise UserError(f"{path.parent} is not a run directory: it has no {path.name}")
    try:
        return Config(**read_toml(path))
    except UserError as error:
        raise UserError(str(error).removeprefix("--config ")) from None


def _read_weights(path: Path) -> "dict[str, Tensor]":
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}: the run is not finished; continue it first") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _check_weights(weights: "dict[str, Tensor]", expected: "dict[str, Tensor]", run_dir: Path) -> None:
    def described(tensors: "dict[str, Tensor]", name: str) -> str:
        return f"{tensors[name].dtype} {list(tensors[name].shape)}" if name in tensors else "missing"

    for name in sorted(weights.keys() | expected.keys()):
        found, wanted = described(weights, name), described(expected, name)
        if found != wanted:
            raise UserError(
                f"model.safetensors does not fit config.toml in {run_dir}: {name} is {found} in the first and {wanted} "
                "by the second; if the run trained a model of its own, load the file into that model"
            )
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"the model in {run_dir} has weights that are not finite: the training diverged")


def predict(model: "nn.Module", inputs: "Tensor") -> Predictions:
    """Take points, float32 [n, 2], to raw logits, those to probabilities, and those to labels."""
    import torch

    from ddp_circles.models import labels_of, probabilities_of

    with torch.inference_mode():
        logits = model(inputs)
        probabilities = probabilities_of(logits)
        return Predictions(logits, probabilities, labels_of(probabilities))


def parse_points(texts: Sequence[str]) -> "Tensor":
    """Read points `X1,X2` as float32 [n, 2]; raises `UserError` naming the first that is none."""
    import torch

    points = []
    for text in texts:
        try:
            points.append(_coordinates(text.split(",")))
        except ValueError as error:
            raise UserError(f"--points {text!r} is not X1,X2: {error}") from None
    return torch.tensor(points, dtype=torch.float32)


def show_test_points(config: Config, model: "nn.Module", count: int) -> str:
    """Predictions and truth of the run's first `count` test points, as a table.

    Raises `UserError` if there are not so many.
    """
    from ddp_circles.data import make_points

    test = make_points(**config.points).test
    if not 1 <= count <= len(test.inputs):
        raise UserError(f"--show must be between 1 and {len(test.inputs)}, the number of test points, got {count}")
    return _table(model, test.inputs[:count], test.targets[:count])


def predict_csv(model: "nn.Module", source: Path, target: Path, *, block_bytes: int = BLOCK_BYTES) -> int:
    """Write the lines of `source` with their predictions to `target`, and return how many points there were.

    Memory does not grow with the file. `target` is replaced when all is written; before that it is left alone. A
    progress bar shows on a terminal. Raises `UserError` naming the line of a row that is not two finite numbers, and
    for a file that cannot be read or written.
    """
    import torch

    target = target.resolve()
    count = 0
    try:
        if target.exists() and (not target.is_file() or (source.exists() and target.samefile(source))):
            raise UserError(f"--out {target} must be a file, and another than --csv {source}")
        with _opened(source) as file, _replacing(target) as out:
            first = _first_line(file, source)
            header = _header(first)
            nothing = predict(model, torch.empty(0, len(COORDINATES)))
            csv.writer(out, lineterminator="\n").writerow([*(header or COORDINATES), *_names(nothing)])
            blocks = _blocks(file, source, block_bytes, *((2, b"") if header else (1, first)))
            for number, lines in blocks:
                out.write(_predict_lines(model, lines, source, number))
                count += len(lines)
    except OSError as error:
        raise UserError(f"--csv {source} cannot be taken to --out {target}: {error.strerror}") from None
    return count


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file to read from; on a terminal, with a progress bar for what has been read."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"--csv {path} cannot be read: {error}") from None
    with file:
        size = os.fstat(file.fileno()).st_size
        if not sys.stderr.isatty() or size == 0:
            yield file
            return
        from rich.console import Console
        from rich.progress import wrap_file

        with wrap_file(file, size, description=path.name, console=Console(stderr=True), transient=True) as watched:
            yield watched


@contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    """A text file that takes the place of `path` if all goes well, and vanishes if not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}")
    try:
        with temporary.open("x", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def _first_line(file: IO[bytes], source: Path) -> bytes:
    first = file.readline(LONGEST_LINE + 1)
    if not first:
        raise UserError(f"--csv {source} is empty")
    if len(first) > LONGEST_LINE:
        raise _bad_line(source, 1, TOO_LONG)
    return first.removeprefix(codecs.BOM_UTF8)


def _header(line: bytes) -> list[str] | None:
    """The names of the columns, if `line` is two fields and none is a number; else None: it is the first point."""
    try:
        names = next(csv.reader([_decode(line)], strict=True), [])
    except csv.Error:
        return None
    return names if len(names) == len(COORDINATES) and not any(map(_is_number, names)) else None


def _blocks(
    file: IO[bytes], source: Path, block_bytes: int, number: int, rest: bytes
) -> Iterator[tuple[int, list[str]]]:
    """Lines, many at a time, with the number of the first; what was read of them already is `rest`."""
    while block := file.read(block_bytes):
        whole, newline, rest = (rest + block).rpartition(b"\n")
        if newline:
            lines = _decode(whole).split("\n")
            yield number, lines
            number += len(lines)
        if len(rest) > LONGEST_LINE:
            raise _bad_line(source, number, TOO_LONG)
    if rest:
        yield number, _decode(rest).removesuffix("\n").split("\n")


def _decode(content: bytes) -> str:
    """Text in which bytes that are no UTF-8 stand for themselves, so that names of columns pass unchanged."""
    return content.decode("utf-8", errors="surrogateescape")


def _predict_lines(model: "nn.Module", lines: list[str], source: Path, number: int) -> str:
    """The lines of the result; `number` is that of the first of `lines` in `source`."""
    fields, inputs = _parse(lines, source, number)
    predictions = predict(model, inputs)
    overflow = _first_overflow(predictions)
    if overflow is not None:
        raise _bad_line(source, number + overflow, "so far out that the logits are not finite")
    columns = _columns(predictions)
    template = ",".join(["%s", "%s", *[NUMBER] * (len(columns) - 1), "%d\n"])
    texts = map(str.strip, fields)  # of which each row takes two
    return "".join(map(template.__mod__, zip(texts, texts, *columns, strict=True)))


def _parse(lines: list[str], source: Path, number: int) -> "tuple[list[str], Tensor]":
    """The fields of all lines, one after the other, and the points they stand for, float32 [n, 2].

    Raises `UserError` for the first line that is not two finite numbers.
    """
    if max(map(len, lines)) <= LONGEST_LINE:
        with suppress(csv.Error, ValueError):
            return _points(list(csv.reader(lines, strict=True)), len(lines))
    return _points([_row(line, source, at) for at, line in enumerate(lines, number)], len(lines))


def _points(rows: list[list[str]], count: int) -> "tuple[list[str], Tensor]":
    """What `_parse` returns; raises `ValueError` if one of the rows is bad or there are not `count`."""
    import torch

    fields = [field for row in rows for field in row]
    values = torch.tensor([float(field) for field in fields], dtype=torch.float64)
    if len(rows) != count or set(map(len, rows)) != {len(COORDINATES)}:
        raise ValueError("not a point in each line")
    if not (values.abs() <= LARGEST).all() or "_" in "".join(fields):
        raise ValueError("not all of them finite numbers")
    return fields, values.to(torch.float32).reshape(-1, len(COORDINATES))


def _row(line: str, source: Path, number: int) -> list[str]:
    if len(line) > LONGEST_LINE:
        raise _bad_line(source, number, TOO_LONG)
    try:
        row = next(csv.reader([line], strict=True), [])
        _coordinates(row)
    except (csv.Error, ValueError) as error:
        raise _bad_line(source, number, str(error)) from None
    return row


def _bad_line(source: Path, number: int, reason: str) -> UserError:
    return UserError(f"--csv {source}, line {number}: {reason}")


def _coordinates(fields: Sequence[str]) -> list[float]:
    """The coordinates in one row; raises `ValueError` saying what is wrong with it."""
    if len(fields) != len(COORDINATES):
        raise ValueError(f"expected {len(COORDINATES)} columns separated by a comma, found {len(fields)}")
    for field in fields:
        if not _is_number(field):
            raise ValueError(f"{field!r} is not a number")
        if not abs(float(field)) <= LARGEST:
            raise ValueError(f"{field!r} is not a finite float32")
    return [float(field) for field in fields]


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return "_" not in field


def _first_overflow(predictions: Predictions) -> int | None:
    """Which point is the first whose logits are not finite; None where all are."""
    finite = predictions.logits.isfinite().reshape(len(predictions.labels), -1).all(dim=1)
    return None if finite.all() else int(finite.logical_not().nonzero()[0])


def _names(predictions: Predictions) -> list[str]:
    """The names of `_columns`."""
    logits = predictions.logits
    each = [""] if logits.ndim == 1 else [f"_{number}" for number in range(logits.shape[1])]
    return [*("logit" + name for name in each), *("probability" + name for name in each), "label"]


def _columns(predictions: Predictions) -> list[list[float]]:
    """Logits, probabilities and labels, a list for each column of a table."""
    logits, probabilities, labels = predictions
    figures = [tensor if tensor.ndim == 2 else tensor.unsqueeze(1) for tensor in (logits, probabilities)]
    return [*figures[0].T.tolist(), *figures[1].T.tolist(), labels.tolist()]


def _table(model: "nn.Module", inputs: "Tensor", truth: "Tensor | None" = None) -> str:
    """Predictions for `inputs`, a line each, beside the `truth` where it is known."""
    import numpy as np

    predictions = predict(model, inputs)
    overflow = _first_overflow(predictions)
    if overflow is not None:
        raise UserError(f"point {overflow + 1} is so far out that its logits are not finite")
    names = [*COORDINATES, *_names(predictions)]
    *figures, labels = inputs.T.tolist() + _columns(predictions)
    columns = [_aligned([str(np.float32(value)) for value in figure]) for figure in figures]
    columns.append([f"{label:.0f}" for label in labels])
    if truth is not None:
        names.append("truth")
        columns.append([f"{label:.0f}" for label in truth.tolist()])
    widths = [max(len(name), *map(len, column)) for name, column in zip(names, columns, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in [names, *zip(*columns, strict=True)])


def _aligned(numbers: list[str]) -> list[str]:
    """The same numbers with their points one below the other."""
    parts = [number.partition(".") for number in numbers]
    left, right = (max(len(part[side]) for part in parts) for side in (0, 2))
    return [whole.rjust(left) + (point or " ") + rest.ljust(right) for whole, point, rest in parts]


if __name__ == "__main__":
    main()
