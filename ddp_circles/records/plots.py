"""Pictures of a run: the decision boundary, train beside test, and the learning curves.

Every picture is a PNG file with the same bytes for the same figures, whatever the user's matplotlib settings.
"""

import copy
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from ddp_circles.data import Dataset, Split
from ddp_circles.models import labels_of, probabilities_of
from ddp_circles.records.files import replacing
from ddp_circles.records.metrics_file import figure_names, read_rows

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#7A1F3D", "#56B4E9", "#D55E00", "#F0E442", "#333333")
"""Okabe and Ito's palette, distinct under every kind of colour vision; the purple is darker, farther from the green."""
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "p", "*")
INK = "#222222"
WRONG = "#C4004F"
"""The rings around misclassified points."""
DARKER = 0.55
"""Brightness of a class's points relative to its colour, which paints the region, so that they stand out from it."""
LEGEND_COLUMNS = 6
POINTS_SHOWN = 1500
"""Most points drawn in one panel."""
GRID = 400
"""Grid points along the longer side of the plane, at which the model is evaluated."""

STYLE: dict[str, Any] = {
    "font.size": 12.0,
    "axes.titlesize": 13.0,
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "savefig.dpi": 150,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
}


def draw_run(model: nn.Module, split: Split | None, run_dir: Path) -> None:
    """Draw the learning curves of a run and, for classes of points in the plane, the decision boundary.

    `split`: None for samples that are not in tensors.
    """
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    rows = read_rows(run_dir / "metrics.jsonl")
    draw_curves(rows, folder / "curves.png")
    classified = any("test/accuracy" in row for row in rows)
    if classified and split is not None:
        inputs = split.train.inputs
        if inputs.shape[1:] == (2,) and inputs.dtype == torch.float32:
            draw_decision_boundary(model, split, folder / "decision_boundary.png")


@style.context(STYLE, after_reset=True)
@torch.inference_mode()
def draw_decision_boundary(model: nn.Module, split: Split, path: Path) -> None:
    """Draw the predictions of `model` everywhere in the plane, under the training points and under the test points.

    `model` maps float32 [n, 2] to logits, [n] for two classes or [n, classes]; a copy on the CPU is evaluated, so that
    it stays as it is. Each place has the colour of its predicted class, paler where the probability is lower; each
    point a darker shade of its true class's, and a ring if it is misclassified. The accuracies are over all points; of
    many points a fixed random sample is drawn. Raises `OSError` if `path` cannot be written. Source: the tutorial's
    `plot_decision_boundary`.
    """
    model = copy.deepcopy(model).cpu().eval()
    split = Split(*(samples.to(torch.device("cpu")) for samples in split))
    (left, right), (bottom, top) = limits = _limits(split)
    regions = _regions(model, limits, split.train.inputs.dtype)
    classes = len(regions)
    text_lines = (max(len(samples.inputs) for samples in split) > POINTS_SHOWN) + classes // LEGEND_COLUMNS
    size = (10.2, 4.5 * (top - bottom) / (right - left) + 1.35 + 0.25 * text_lines)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    ringed = 0
    for axes, name, samples in zip(panels, ("Train", "Test"), split, strict=True):
        _draw_regions(axes, regions, limits)
        wrong = labels_of(probabilities_of(_logits(model, samples.inputs))) != samples.targets
        ringed += _draw_points(axes, samples, wrong, classes)
        count = len(samples.inputs)
        share = f"\n{POINTS_SHOWN:,} of {count:,} points shown" if count > POINTS_SHOWN else ""
        accuracy = int((~wrong).sum()) / count * 100
        axes.set_title(f"{name}: accuracy {accuracy:.2f}%{share}")
        axes.set(xlabel="$x_1$", aspect="equal", xlim=limits[0], ylim=limits[1])
        axes.label_outer()
    panels[0].set_ylabel("$x_2$")
    _add_legend(figure, classes, boundary=len(np.unique(regions.argmax(axis=0))) > 1, rings=ringed > 0)
    _save(figure, path)


@style.context(STYLE, after_reset=True)
def draw_curves(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw loss, accuracy and metrics by epoch, training and test, from the rows of metrics.jsonl.

    Raises `OSError` if `path` cannot be written.
    """
    names = figure_names(rows[-1]) if rows else ["loss", "accuracy"]
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(5.0 * columns, 4.2 * lines), layout="constrained")
    titles = {"loss": ("Loss", "Mean loss per sample"), "accuracy": ("Accuracy", "Right answers (%)")}
    for number, name in enumerate(names, start=1):
        axes = figure.add_subplot(lines, columns, number)
        _curves(axes, rows, name, scale=100 if name == "accuracy" else 1)
        title, label = titles.get(name, (name, "Mean per sample"))
        axes.set(title=title, ylabel=label)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Store `figure` as PNG."""
    with replacing(path) as file:
        # Without the name and version of the program, which would change the bytes.
        figure.savefig(file, format="png", metadata={"Software": None})


def _limits(split: Split) -> tuple[tuple[float, float], tuple[float, float]]:
    """Choose the part of the plane that both panels show: all points and a margin, neither side very short."""
    points = torch.cat([samples.inputs for samples in split]).double()
    low, high = points.amin(dim=0), points.amax(dim=0)
    middle, spans = (low + high) / 2, high - low
    half = 0.56 * spans.clamp(min=float(spans.max()) / 2 or 1.0)
    (left, bottom), (right, top) = (middle - half).tolist(), (middle + half).tolist()
    return (left, right), (bottom, top)


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in inputs.split(16384)])  # bounds the memory that the layers need


def _regions(model: nn.Module, limits: tuple[tuple[float, float], ...], dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """Evaluate the probability of each class on a grid over the plane; shape [classes, rows, columns]."""
    spans = [high - low for low, high in limits]
    counts = [max(2, round(GRID * span / max(spans))) for span in spans]
    columns, rows = (
        torch.linspace(low, high, count, dtype=dtype) for (low, high), count in zip(limits, counts, strict=True)
    )
    places = torch.cartesian_prod(rows, columns).flip(1)
    probabilities = probabilities_of(_logits(model, places))
    if probabilities.ndim == 1:
        probabilities = torch.stack([1 - probabilities, probabilities], dim=1)
    return probabilities.T.reshape(-1, len(rows), len(columns)).numpy()


def _draw_regions(axes: Axes, regions: np.ndarray[Any, Any], limits: tuple[tuple[float, float], ...]) -> None:
    classes = len(regions)
    palette = np.array([to_rgb(colour) for colour, _ in class_marks(classes)])
    sureness = (regions.max(axis=0) * classes - 1) / (classes - 1)
    strength = (0.12 + 0.28 * sureness)[..., np.newaxis]
    extent = (*limits[0], *limits[1])
    picture = 1 - strength * (1 - palette[regions.argmax(axis=0)])
    axes.imshow(np.clip(picture, 0, 1), extent=extent, origin="lower", interpolation="bilinear", aspect="auto")
    for number in range(classes):
        lead = regions[number] - np.delete(regions, number, axis=0).max(axis=0)
        if lead.min() < 0 < lead.max():
            axes.contour(lead, levels=[0], extent=extent, origin="lower", colors=INK, linewidths=1.4)


def _draw_points(axes: Axes, samples: Dataset, wrong: Tensor, classes: int) -> int:
    """Draw the points by class, those that are `wrong` with a ring; returns the number of rings."""
    shown = _subset(len(samples.inputs))
    inputs, targets, ringed = samples.inputs[shown].numpy(), samples.targets[shown].numpy(), wrong[shown].numpy()
    size = 36 if len(inputs) <= 250 else 24
    for number, (colour, marker) in enumerate(class_marks(classes)):
        x1, x2 = inputs[targets == number].T
        look: dict[str, Any] = {"color": _point_colour(colour), "edgecolors": "white", "linewidths": 0.6}
        axes.scatter(x1, x2, s=size, marker=marker, zorder=3, **look)  # above the boundary
    if ringed.any():
        x1, x2 = inputs[ringed].T
        width = 1.4 if len(x1) <= 50 else 0.7  # many rings overlap
        axes.scatter(x1, x2, s=3.5 * size, facecolors="none", edgecolors=WRONG, linewidths=width, zorder=4)
    return int(ringed.sum())


def _point_colour(colour: str) -> tuple[float, float, float]:
    red, green, blue = to_rgb(colour)
    return DARKER * red, DARKER * green, DARKER * blue


def _subset(count: int) -> Tensor:
    """Choose which of `count` points are drawn: all, or a random sample that is the same each time."""
    if count <= POINTS_SHOWN:
        return torch.arange(count)
    chosen = np.random.default_rng(0).choice(count, POINTS_SHOWN, replace=False)
    return torch.from_numpy(np.sort(chosen))


def _add_legend(figure: Figure, classes: int, *, boundary: bool, rings: bool) -> None:
    handles = [
        Line2D(
            [], [], color=_point_colour(colour), marker=marker, markersize=8, linestyle="none", label=f"class {number}"
        )
        for number, (colour, marker) in enumerate(class_marks(classes))
    ]
    if boundary:
        handles.append(Line2D([], [], color=INK, linewidth=1.4, label="decision boundary"))
    if rings:
        ring = Line2D([], [], color=WRONG, marker="o", markersize=11, markeredgewidth=1.4, linestyle="none")
        ring.set(label="misclassified", markerfacecolor="none")
        handles.append(ring)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), LEGEND_COLUMNS))


def class_marks(classes: int) -> list[tuple[str, str]]:
    """Colour and marker of each class: the colour of its region, which its points have darker."""
    return list(islice(zip(cycle(COLOURS), cycle(MARKERS)), classes))


def _curves(axes: Axes, rows: Sequence[Mapping[str, float]], name: str, *, scale: float) -> None:
    """Draw the column `name` of the rows by epoch, training and test, distinct by colour, stroke and marker."""
    epochs = [row["epoch"] for row in rows]
    every = max(1, len(epochs) // 12)
    for part, colour, stroke, marker, first in (
        ("train", COLOURS[0], "-", "o", 0),
        ("test", COLOURS[5], "--", "^", every // 2),
    ):
        values = [row[f"{part}/{name}"] * scale for row in rows]
        axes.plot(epochs, values, color=colour, linestyle=stroke, marker=marker, markevery=(first, every), label=part)
    if len(epochs) == 1:
        axes.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
    axes.set_xlabel("Epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True)
    axes.legend()
