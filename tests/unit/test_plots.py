"""The pictures: what is on them, that their bytes are settled, and that they are drawn from any run's figures."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import Tensor, nn

from ddp_circles.data import Dataset, Split, make_points
from ddp_circles.models import Classifier
from ddp_circles.records import plots
from tests.harness.programs.imports import import_run_and_draw
from tests.harness.ranks import run_ranks

PNG = b"\x89PNG\r\n\x1a\n"


class Half(nn.Module):
    """Says class 1 right of `edge`, class 0 left of it."""

    def __init__(self, edge: float) -> None:
        super().__init__()
        self.edge = edge

    def forward(self, inputs: Tensor) -> Tensor:
        return 5 * (inputs[:, 0] - self.edge)


class Constant(nn.Module):
    """The same logit everywhere."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.full((len(inputs),), self.logit)


def split_of(dataset: str, n_samples: int = 1000) -> Split:
    noise = 1.5 if dataset == "blobs" else 0.03
    return make_points(dataset, n_samples=n_samples, noise=noise, factor=0.8, test_fraction=0.2, data_seed=42)


def classifier(dataset: str) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(2, (), "relu", 4 if dataset == "blobs" else 2)
    nn.init.zeros_(model.layers[-1].bias)  # type: ignore[arg-type]
    return model


def row(epoch: int, loss: float = 0.5, accuracy: float = 0.75) -> dict[str, float]:
    return {
        "epoch": epoch,
        "train/loss": loss,
        "train/accuracy": accuracy,
        "test/loss": loss + 0.1,
        "test/accuracy": accuracy - 0.25,
    }


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures drawn, before they become pixels."""
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    return figures


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("dataset", ["circles", pytest.param("moons", marks=pytest.mark.thorough), "blobs"])
def test_picture_of_boundary_is_a_png_with_the_same_bytes_each_time(tmp_path: Path, dataset: str) -> None:
    split, model = split_of(dataset), classifier(dataset)
    for name in ("a.png", "b.png"):
        plots.draw_decision_boundary(model, split, tmp_path / name)
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(PNG)
    assert content == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
    height, width = imread(tmp_path / "a.png").shape[:2]
    assert 1400 < width < 1700
    assert 500 < height < 1500


def test_bytes_do_not_depend_on_the_users_settings_which_stay(tmp_path: Path) -> None:
    plots.draw_curves([row(0), row(1)], tmp_path / "a.png")
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9, "savefig.dpi": 40}):
        before = dict(mpl.rcParams)
        plots.draw_curves([row(0), row(1)], tmp_path / "b.png")
        assert dict(mpl.rcParams) == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_pyplot_and_no_matplotlib_before_it_is_needed(tmp_path: Path) -> None:
    [(before, after)] = run_ranks(import_run_and_draw, 1, tmp_path / "a.png")
    assert not before
    assert "matplotlib.figure" in after
    assert "matplotlib.pyplot" not in after


def test_unwritable_path_raises_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        plots.draw_curves([row(0)], tmp_path / "missing" / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_model_is_left_as_it_was(drawn: list[Figure], tmp_path: Path) -> None:
    for training in (True, False):
        model = nn.Sequential(nn.Dropout(0.5), classifier("circles")).train(training)
        model[0].train(not training)
        modes = [module.training for module in model.modules()]
        plots.draw_decision_boundary(model, split_of("circles"), tmp_path / "a.png")
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    titles = [figure.axes[0].get_title(loc="left") for figure in drawn]
    assert titles[0] == titles[1]  # nothing is dropped out in either mode


@pytest.mark.parametrize("dataset", ["circles", "blobs"])
def test_panels_show_train_and_test_alike(drawn: list[Figure], tmp_path: Path, dataset: str) -> None:
    split, model = split_of(dataset), classifier(dataset)
    plots.draw_decision_boundary(model, split, tmp_path / "a.png")
    figure = drawn[0]
    train, test = figure.axes
    for axes, samples, name in ((train, split.train, "Train"), (test, split.test, "Test")):
        logits = model(samples.inputs)
        labels = logits.argmax(dim=1) if dataset == "blobs" else (logits.sigmoid() > 0.5).float()
        right = int((labels == samples.targets).sum()) / len(labels) * 100
        assert axes.get_title(loc="left") == f"{name}: accuracy {right:.2f}%"
        assert axes.get_aspect() == 1
        (left, right_edge), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert (samples.inputs > torch.tensor([left, bottom])).all()
        assert (samples.inputs < torch.tensor([right_edge, top])).all()
        *shown, rings = [
            np.asarray(part.get_offsets()) for part in axes.collections if not isinstance(part, ContourSet)
        ]
        for number, points in enumerate(shown):
            assert np.array_equal(points, samples.inputs[samples.targets == number].numpy())
        assert np.array_equal(rings, samples.inputs[labels != samples.targets].numpy())
        assert axes.get_xlabel() == "$x_1$"
    assert train.get_xlim() == test.get_xlim()
    assert train.get_ylim() == test.get_ylim()
    assert train.get_ylabel() == "$x_2$"
    classes = [f"class {number}" for number in range(4 if dataset == "blobs" else 2)]
    assert legend_of(figure) == [*classes, "decision boundary", "misclassified"]


def test_boundary_is_where_the_label_changes(drawn: list[Figure], tmp_path: Path) -> None:
    edge = 0.3
    plots.draw_decision_boundary(Half(edge), split_of("circles"), tmp_path / "a.png")
    axes = drawn[0].axes[0]
    lines = [part for part in axes.collections if isinstance(part, ContourSet)]
    vertices = np.concatenate([np.asarray(path.vertices) for line in lines for path in line.get_paths()])
    low, high = axes.get_xlim()
    assert np.abs(vertices[:, 0] - edge).max() < (high - low) / plots.GRID
    assert np.ptp(vertices[:, 1]) > 0.98 * np.ptp(axes.get_ylim())
    picture = np.asarray(axes.images[0].get_array())
    columns = np.linspace(low, high, picture.shape[1])
    bluer = picture[..., 2] > picture[..., 0]
    assert np.array_equal(bluer, np.broadcast_to(columns < edge, bluer.shape))


def test_places_of_the_plane_are_asked_in_their_order(tmp_path: Path) -> None:
    class Coordinates(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.stack([inputs[:, 0], inputs[:, 1], torch.zeros(len(inputs))], dim=1)

    limits = ((-2.0, 2.0), (-1.0, 1.0))
    regions = np.log(plots._regions(Coordinates(), limits, torch.float32))
    assert regions.shape == (3, plots.GRID // 2, plots.GRID)
    assert regions[0, 7] - regions[2, 7] == pytest.approx(np.linspace(-2, 2, plots.GRID), abs=1e-4)
    assert regions[1, :, 7] - regions[2, :, 7] == pytest.approx(np.linspace(-1, 1, plots.GRID // 2), abs=1e-4)


def test_of_many_points_a_part_is_drawn_and_all_are_counted(drawn: list[Figure], tmp_path: Path) -> None:
    count = 20_000
    inputs = torch.rand(count, 2)
    targets = (torch.arange(count) % 2).float()  # a class for every second point: an even stride would miss one
    samples = Dataset(inputs, targets)
    for _ in range(2):
        plots.draw_decision_boundary(Constant(1.0), Split(samples, samples), tmp_path / "a.png")
    shown = [[np.asarray(part.get_offsets()) for part in figure.axes[0].collections] for figure in drawn]
    for first, second in zip(*shown, strict=True):
        assert np.array_equal(first, second)
    *classes, rings = shown[0]
    assert sum(map(len, classes)) == plots.POINTS_SHOWN
    assert np.array_equal(rings, classes[0])  # all are said to be of class 1
    for number, points in enumerate(classes):
        assert len(points) > plots.POINTS_SHOWN / 2.5
        of_class = {tuple(point) for point in inputs[targets == number].tolist()}
        assert {tuple(point) for point in points.astype(np.float32).tolist()} <= of_class
    title = drawn[0].axes[0].get_title(loc="left")
    assert title == "Train: accuracy 50.00%\n1,500 of 20,000 points shown"


def test_a_set_sorted_by_class_is_drawn_in_proportion() -> None:
    chosen = plots._subset(100_000)
    assert len(set(chosen.tolist())) == plots.POINTS_SHOWN
    assert 0.4 < float((chosen < 50_000).float().mean()) < 0.6


@pytest.mark.parametrize("logit", [0.0, 3.0, -3.0, math.nan, math.inf])
def test_one_answer_everywhere_has_no_boundary(drawn: list[Figure], tmp_path: Path, logit: float) -> None:
    samples = Dataset(torch.ones(2, 2), torch.zeros(2))
    plots.draw_decision_boundary(Constant(logit), Split(samples, samples), tmp_path / "a.png")
    assert legend_of(drawn[0]) == ["class 0", "class 1", *(["misclassified"] if not logit <= 0 else [])]


def test_ten_classes_are_told_apart(tmp_path: Path, drawn: list[Figure]) -> None:
    torch.manual_seed(0)
    samples = Dataset(torch.randn(100, 2), torch.arange(100) % 10)
    plots.draw_decision_boundary(nn.Linear(2, 10), Split(samples, samples), tmp_path / "a.png")
    assert len(set(plots.class_marks(10))) == 10
    assert len(legend_of(drawn[0])) == 12


# Viénot, Brettel and Mollon (1999) on linear RGB: what people without L cones, and without M cones, see.
SEEN_BY = {
    "protanopes": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    "deuteranopes": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
    "others": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
}


def lab(colour: str | tuple[float, float, float], seen: list[list[float]]) -> "np.ndarray[Any, Any]":
    """CIE L*a*b* of a colour as seen by someone: distances in it are those the eye sees."""
    srgb = np.array(to_rgb(colour))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(seen) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ linear / np.array([0.9505, 1.0, 1.089]) + 1e-4)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("who", SEEN_BY)
def test_colours_are_told_apart_by(who: str) -> None:
    used = [plots.COLOURS[:4], (plots.COLOURS[0], plots.COLOURS[5])]
    for colours in used:
        for one, other in itertools.combinations(colours, 2):
            distance = np.linalg.norm(lab(one, SEEN_BY[who]) - lab(other, SEEN_BY[who]))
            assert distance > 20, (who, one, other)  # 2 is what a trained eye just notices


@pytest.mark.parametrize("who", SEEN_BY)
def test_points_stand_out_from_each_other_and_from_the_regions_of_all_classes(who: str) -> None:
    points = [lab(plots._point_colour(colour), SEEN_BY[who]) for colour in plots.COLOURS[:4]]
    for one, other in itertools.combinations(points, 2):
        assert np.linalg.norm(one - other) > 12
    for point, region in itertools.product(points, plots.COLOURS[:4]):
        red, green, blue = (1 - 0.4 * (1 - part) for part in to_rgb(region))
        assert np.linalg.norm(point - lab((red, green, blue), SEEN_BY[who])) > 30, region


def test_curves_hold_the_rows_in_percent(drawn: list[Figure], tmp_path: Path) -> None:
    rows = [row(epoch, loss=1 / (epoch + 1), accuracy=epoch / 100) for epoch in range(60)]
    plots.draw_curves(json.loads(json.dumps(rows)), tmp_path / "a.png")
    losses, accuracies = drawn[0].axes
    for axes, key, scale in ((losses, "loss", 1), (accuracies, "accuracy", 100)):
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines) == {"train", "test"}
        for part, line in lines.items():
            assert np.array_equal(line.get_xdata(), range(60))
            assert list(np.asarray(line.get_ydata())) == [one[f"{part}/{key}"] * scale for one in rows]
        train, test = lines["train"], lines["test"]
        assert train.get_color() != test.get_color()
        assert train.get_linestyle() != test.get_linestyle()
        assert train.get_marker() != test.get_marker()
        legend = axes.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == ["train", "test"]
        assert axes.get_xlabel() == "Epoch"
        assert all(tick == round(tick) for tick in axes.get_xticks())
    assert "%" in accuracies.get_ylabel()


def test_curves_are_those_of_the_figures_that_there_are(drawn: list[Figure], tmp_path: Path) -> None:
    both = row(0) | {"train/mae": 1.0, "test/mae": 2.0, "train/samples_per_second": 3.0}
    without = {name: value for name, value in both.items() if "accuracy" not in name}
    for rows, titles in (([both], ["Loss", "Accuracy", "mae"]), ([without] * 2, ["Loss", "mae"])):
        plots.draw_curves(rows, tmp_path / "a.png")
        assert [axes.get_title(loc="left") for axes in drawn[-1].axes] == titles
        assert [list(np.asarray(line.get_ydata())) for line in drawn[-1].axes[-1].lines] == [
            [1.0] * len(rows),
            [2.0] * len(rows),
        ]


@pytest.mark.parametrize("epoch", [pytest.param(0, marks=pytest.mark.thorough), 7])
def test_one_epoch_can_be_seen(tmp_path: Path, epoch: int) -> None:
    plots.draw_curves([row(epoch)], tmp_path / "one.png")
    plots.draw_curves([], tmp_path / "none.png")
    marks = []
    for colour in (plots.COLOURS[0], plots.COLOURS[5]):
        of_colour = [
            np.abs(imread(tmp_path / name)[..., :3] - np.array(to_rgb(colour))).sum(axis=2) < 0.05
            for name in ("one.png", "none.png")
        ]
        marks.append(int(of_colour[0].sum()) - int(of_colour[1].sum()))
    assert min(marks) > 100  # pixels besides those of the legend, in both panels together


@pytest.mark.parametrize(
    "value",
    [math.nan, *(pytest.param(value, marks=pytest.mark.thorough) for value in (math.inf, -math.inf, 1e30, 0.0))],
)
def test_odd_figures_are_drawn_without_a_warning(tmp_path: Path, value: float) -> None:
    plots.draw_curves([row(0), row(1, loss=value)], tmp_path / "a.png")
    plots.draw_curves([row(0, loss=value)], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
