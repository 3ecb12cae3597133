"""Points and models are the tutorial's, bit for bit; logits become probabilities and labels as in the tutorial."""

import hashlib
import json
import math
import os
import re
import resource
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import make_blobs, make_circles, make_moons
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from ddp_circles import Config, data, fit, intake, memory, points
from ddp_circles.data import Split, make_points
from ddp_circles.errors import UserError
from ddp_circles.models import Classifier, class_count, correct_count, labels_of, loss_sum, probabilities_of
from tests.harness.ranks import run_ranks

CIRCLES = {"n_samples": 1000, "noise": 0.03, "factor": 0.8, "test_fraction": 0.2, "data_seed": 42}
BLOBS = CIRCLES | {"noise": 1.5}


def tutorials_circles() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    X, y = make_circles(1000, noise=0.03, factor=0.8, random_state=42)  # noqa: N806 - the tutorial's names
    X = torch.from_numpy(X).type(torch.float)  # noqa: N806
    y = torch.from_numpy(y).type(torch.float)
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, random_state=42)  # noqa: N806
    return X_train, y_train, X_test, y_test


def tutorials_blobs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    X_blob, y_blob = make_blobs(n_samples=1000, n_features=2, centers=4, cluster_std=1.5, random_state=42)  # noqa: N806
    X_blob = torch.from_numpy(X_blob).type(torch.float)  # noqa: N806
    y_blob = torch.from_numpy(y_blob).type("torch.LongTensor")
    X_train, X_test, y_train, y_test = train_test_split(X_blob, y_blob, test_size=0.2, random_state=42)  # noqa: N806
    return X_train, y_train, X_test, y_test


def moons() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    X, y = make_moons(1000, noise=0.03, random_state=42)  # noqa: N806
    X = torch.from_numpy(X).type(torch.float)  # noqa: N806
    y = torch.from_numpy(y).type(torch.float)
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, random_state=42)  # noqa: N806
    return X_train, y_train, X_test, y_test


def parts(split: Split) -> list[Tensor]:
    return [*split.train, *split.test]


def same(some: Split, others: Split) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(parts(some), parts(others), strict=True))


@pytest.mark.parametrize(
    "dataset, arguments, by_hand, target_type",
    [
        ("circles", CIRCLES, tutorials_circles, torch.float32),
        ("blobs", BLOBS, tutorials_blobs, torch.int64),
        ("moons", CIRCLES, moons, torch.float32),
    ],
)
def test_points_are_those_of_scikit_learn(
    dataset: str,
    arguments: dict[str, float],
    by_hand: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]],
    target_type: torch.dtype,
) -> None:
    split = make_points(dataset, **arguments)  # type: ignore[arg-type]
    for ours, theirs in zip(parts(split), by_hand(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert [tuple(part.shape) for part in parts(split)] == [(800, 2), (800,), (200, 2), (200,)]
    assert (split.train.inputs.dtype, split.train.targets.dtype) == (torch.float32, target_type)
    assert same(split, make_points(dataset, **arguments))  # type: ignore[arg-type]
    assert len(split.train.targets.unique()) == class_count(dataset)


def test_the_first_point_is_the_published_one() -> None:
    X, y = make_circles(1000, noise=0.03, random_state=42)  # noqa: N806
    np.testing.assert_allclose(X[0], [0.75424625, 0.23148074], atol=1e-8)  # as printed in the tutorial's notebook
    split = make_points("circles", **CIRCLES)  # type: ignore[arg-type]
    made = torch.cat([split.train.inputs, split.test.inputs])
    assert (made == torch.from_numpy(X[0]).float()).all(dim=1).sum() == 1
    assert y.mean() == 0.5


def test_uneven_sets_lose_no_point() -> None:
    arguments = CIRCLES | {"n_samples": 613, "test_fraction": 0.23}
    split = make_points("circles", **arguments)  # type: ignore[arg-type]
    assert (len(split.train.inputs), len(split.test.inputs)) == (613 - 141, 141)  # 0.23 * 613 = 140.99, rounded up


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every set is stored, in a folder of this test."""
    monkeypatch.setattr(data, "CACHED_FROM", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_stored_set_is_the_same_and_made_once(small_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = points.generate("blobs", **BLOBS)  # type: ignore[arg-type]
    assert same(make_points("blobs", **BLOBS), fresh)  # type: ignore[arg-type]
    assert not same(make_points("blobs", **(BLOBS | {"data_seed": 1})), fresh)  # type: ignore[arg-type]
    monkeypatch.setattr(points, "generate", None)
    assert same(make_points("blobs", **BLOBS), fresh)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["*.safetensors", "*.sha256"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_stored_set_is_made_again(small_cache: Path, name: str, damage: str) -> None:
    fresh = points.generate("circles", **CIRCLES)  # type: ignore[arg-type]
    make_points("circles", **CIRCLES)  # type: ignore[arg-type]
    [file] = small_cache.glob(f"*/{name}")
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        *before, last = content
        file.write_bytes(bytes(before) + (b"" if damage == "cut" else bytes([last ^ 255])))
    assert same(make_points("circles", **CIRCLES), fresh)  # type: ignore[arg-type]
    assert file.read_bytes() == content


def store_on_a_small_disk(folder: str) -> tuple[str, list[str]]:
    """Make a stored set where no file can have more than 4,000 bytes; returns the refusal, and what is left."""
    data.CACHED_FROM = 1
    tempfile.tempdir = folder
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))
    with pytest.raises(UserError) as refused:
        make_points("circles", **CIRCLES)  # type: ignore[arg-type]
    return str(refused.value), [path.suffix for path in Path(folder).glob("*/*")]


def test_a_full_disk_is_the_users_to_put_right_and_leaves_nothing(tmp_path: Path) -> None:
    [(refusal, left)] = run_ranks(store_on_a_small_disk, 1, str(tmp_path))
    assert re.match(r"^--n-samples 1000: .* cannot be written .*File too large.* set TMPDIR ", refusal)
    assert left == [".lock"]


def test_a_set_that_cannot_be_stored_is_the_users_to_put_right(small_cache: Path) -> None:
    (small_cache / f"ddp_circles-{os.getuid()}").touch()  # where the cache's folder should be
    with pytest.raises(UserError, match=r"^--n-samples 1000: .* cannot be written .* set TMPDIR "):
        make_points("circles", **CIRCLES)  # type: ignore[arg-type]


def cache_of(folder: Path) -> Path:
    return folder / f"ddp_circles-{os.geteuid()}"


@pytest.mark.parametrize("planted", ["another's", "open to the group", "open to all", "a link"])
def test_a_cache_that_others_can_write_to_is_refused(
    small_cache: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    cache = cache_of(small_cache)
    make_points("circles", **CIRCLES)  # type: ignore[arg-type]
    if planted == "another's":
        original = Path.lstat

        def lstat(path: Path) -> os.stat_result:
            found = list(original(path))
            found[stat.ST_UID] += path == cache
            return os.stat_result(found)

        monkeypatch.setattr(Path, "lstat", lstat)
    elif planted == "a link":
        cache.rename(small_cache / "elsewhere")
        cache.symlink_to(small_cache / "elsewhere")
    else:
        cache.chmod(0o720 if planted == "open to the group" else 0o702)
    with pytest.raises(UserError, match=rf"^{cache} is not a folder that belongs to you .* TMPDIR "):
        make_points("circles", **CIRCLES)  # type: ignore[arg-type]


@pytest.mark.parametrize("planted", ["fewer points", "other types", "other names", "a link", "open to all", "a pipe"])
def test_a_stored_set_that_is_not_the_one_asked_for_is_made_again(small_cache: Path, planted: str) -> None:
    fresh = points.generate("circles", **CIRCLES)  # type: ignore[arg-type]
    make_points("circles", **CIRCLES)  # type: ignore[arg-type]
    [file] = small_cache.glob("*/*.safetensors")
    stored = dict(zip(data.CACHED_PARTS, parts(fresh), strict=True))
    if planted == "fewer points":
        stored = {name: part[:1] for name, part in stored.items()}
    elif planted == "other types":
        stored["train_targets"] = stored["train_targets"].double()
    elif planted == "other names":
        stored["more"] = stored.pop("test_targets")
    save_file(stored, file)
    file.with_suffix(".sha256").write_bytes(hashlib.sha256(file.read_bytes()).digest())
    if planted == "a link":
        file.rename(small_cache / "elsewhere")
        file.symlink_to(small_cache / "elsewhere")
    elif planted == "open to all":
        file.chmod(0o666)
    elif planted == "a pipe":
        file.unlink()
        os.mkfifo(file)
    assert same(make_points("circles", **CIRCLES), fresh)  # type: ignore[arg-type]
    assert file.is_file()
    assert not file.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("dataset", ["circles", "moons", "blobs"])
@pytest.mark.parametrize("n_samples, test_fraction", [(2, 0.5), (613, 0.23), (1000, 0.2), (997, 0.01)])
def test_what_is_stored_is_what_was_asked_for(
    small_cache: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, n_samples: int, test_fraction: float
) -> None:
    asked = CIRCLES | {"n_samples": n_samples, "test_fraction": test_fraction}
    umask = os.umask(0o002)  # as in many places, where a user's own group is no danger
    try:
        fresh = make_points(dataset, **asked)  # type: ignore[arg-type]
    finally:
        os.umask(umask)
    monkeypatch.setattr(points, "generate", None)
    assert same(make_points(dataset, **asked), fresh)  # type: ignore[arg-type]


def fit_on_two_nodes(folder: Path, odd_rank: int | None) -> str:
    """Train with a cache for each rank, as on a node of its own; `odd_rank` makes other points."""
    rank = int(os.environ["RANK"])
    intake.CACHED_FROM = data.CACHED_FROM = 1  # type: ignore[attr-defined]
    tempfile.tempdir = str(folder / str(rank))
    Path(tempfile.tempdir).mkdir()
    if rank == odd_rank:
        generate = points.generate
        setattr(points, "generate", lambda **asked: generate(**(asked | {"noise": 0.5})))  # noqa: B010 - as above
    try:
        fit(Config(run_dir=folder / "run", epochs=1, wandb="disabled", plots=False))
    except UserError as refused:
        return str(refused)
    return ""


@pytest.mark.parametrize("size, odd_rank", [(1, None), (2, None), (2, 1), (3, 2), (3, 0)])
def test_nodes_with_other_points_do_not_train(tmp_path: Path, size: int, odd_rank: int | None) -> None:
    refusals = run_ranks(fit_on_two_nodes, size, tmp_path, odd_rank)
    assert len(set(refusals)) == 1
    named = {None: r"", 0: r"rank 1 \(host .*", 1: r"rank 1 \(host .*", 2: r"rank 2 \(host .*"}[odd_rank]
    told = r"has made other points than rank 0 \(host .* the nodes need the same versions of scikit-learn.*"
    assert re.fullmatch(named + (told if named else ""), refusals[0])


TOO_MUCH_MEMORY = r"^--n-samples 1000 needs more memory than there is \(.+\): use fewer$"


def take_two_exbibytes(**_arguments: object) -> None:
    """Make points, if there were the memory for it."""
    np.empty(2**58)


def test_more_points_than_memory_holds_are_the_users_to_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "generate", take_two_exbibytes)
    with pytest.raises(UserError, match=TOO_MUCH_MEMORY):
        make_points("circles", **CIRCLES)  # type: ignore[arg-type]


def fit_beyond_memory(folder: Path, settings: dict[str, Any]) -> tuple[str, float]:
    """Train with `settings` on a machine of 16 GiB; returns the refusal, and MiB that this took."""
    setattr(memory, "machine_memory", lambda: 2**34)  # noqa: B010 - a plain assignment has another type
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        fit(Config(run_dir=folder / "run", epochs=1, wandb="disabled", plots=False, **settings))
    return str(caught.value), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"n_samples": 2**31 - 1}, "n_samples=2147483647 needs"),
        ({"hidden": (65536, 65536)}, "hidden= needs"),
        ({"hidden": (65536, 65536), "reduction": "fast", "optimizer": "sgd"}, "hidden= needs"),
        ({"hidden": (65536,), "batch_size": 0, "n_samples": 10**6}, "hidden= needs"),
    ],
)
def test_what_the_machine_cannot_hold_is_refused_before_it_is_asked_for(
    tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    for refusal, taken in run_ranks(fit_beyond_memory, 2, tmp_path, settings):
        assert re.match(rf"^{named} more memory than there is \(at least [\d,.]+ GiB, of 16\.0\): use ", refusal)
        assert taken < 300


def test_a_limit_on_any_group_above_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = memory.machine_memory()
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    for own, name in (("0::/job/step", "memory.max"), ("4:memory:/job/step", "memory/memory.limit_in_bytes")):
        (tmp_path / "own").write_text(f"9:name=systemd:/\n{own}\n")
        folder, _, file = f"/{name}".rpartition("/")
        root = tmp_path / folder.lstrip("/")
        for group, limit in ((root / "job/step", "max"), (root / "job", str(10**6)), (root / "job/other", "7")):
            group.mkdir(parents=True, exist_ok=True)
            (group / file).write_text(f"{limit}\n")
        assert memory.machine_memory() == 10**6
        (root / "job" / file).unlink()
        assert memory.machine_memory() >= machine
    with pytest.raises(MemoryError, match=r"^at least 2\.0 GiB, of 1\.0$"):
        memory.require_memory(2**31, 2**30)


def make_at_once(folder: str) -> tuple[float, list[str]]:
    """Make a stored set beside other ranks; returns a sum over it, and the names in the cache then."""
    data.CACHED_FROM = 1
    tempfile.tempdir = folder
    split = make_points("circles", **CIRCLES)  # type: ignore[arg-type]
    return float(split.train.inputs.double().sum()), sorted(path.name for path in Path(folder).glob("*/*"))


def test_ranks_that_ask_at_once_make_one_set(tmp_path: Path) -> None:
    [(total, names), *others] = run_ranks(make_at_once, 3, str(tmp_path))
    assert {other for other, _ in others} == {total}
    assert len([name for name in names if name.endswith(".safetensors")]) == 1


class CircleModelV1(nn.Module):
    """The tutorial's, with its names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_1 = nn.Linear(in_features=2, out_features=10)
        self.layer_2 = nn.Linear(in_features=10, out_features=10)
        self.layer_3 = nn.Linear(in_features=10, out_features=1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer_3(self.layer_2(self.layer_1(x)))
        return logits


class CircleModelV2(nn.Module):
    """The tutorial's, with its names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_1 = nn.Linear(in_features=2, out_features=10)
        self.layer_2 = nn.Linear(in_features=10, out_features=10)
        self.layer_3 = nn.Linear(in_features=10, out_features=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer_3(self.relu(self.layer_2(self.relu(self.layer_1(x)))))
        return logits


def model_0() -> nn.Module:
    return nn.Sequential(nn.Linear(in_features=2, out_features=5), nn.Linear(in_features=5, out_features=1))


def blob_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 4))


@pytest.mark.parametrize(
    "by_hand, hidden, activation, classes",
    [
        (model_0, (5,), "none", 2),
        (CircleModelV1, (10, 10), "none", 2),
        (CircleModelV2, (10, 10), "relu", 2),
        (blob_model, (8, 8), "none", 4),
    ],
)
def test_models_are_the_tutorials(
    by_hand: Callable[[], nn.Module], hidden: tuple[int, ...], activation: str, classes: int
) -> None:
    torch.manual_seed(42)
    theirs = by_hand()
    torch.manual_seed(42)
    ours = Classifier(2, hidden, activation, classes)
    for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    inputs = make_points("circles", **CIRCLES).test.inputs  # type: ignore[arg-type]
    logits = ours(inputs)
    assert torch.equal(logits, theirs(inputs).squeeze(1) if classes == 2 else theirs(inputs))
    assert logits.shape == ((200,) if classes == 2 else (200, 4))


def test_a_model_without_hidden_layers_is_linear() -> None:
    assert [tuple(weight.shape) for weight in Classifier(2, (), "relu", 2).parameters()] == [(1, 2), (1,)]


def test_an_empty_batch_gives_empty_logits() -> None:
    assert Classifier(2, (5,), "relu", 2)(torch.zeros(0, 2)).shape == (0,)
    assert Classifier(2, (5,), "relu", 4)(torch.zeros(0, 2)).shape == (0, 4)


def test_binary_logits_become_probabilities_and_labels() -> None:
    logits = torch.cat([torch.tensor([0.0, -0.0, 1e-9, -1e-9, 100.0, -100.0]), torch.linspace(-9, 9, 1001)])
    probabilities = probabilities_of(logits)
    assert torch.equal(probabilities, torch.sigmoid(logits))
    labels = labels_of(probabilities)
    assert torch.equal(labels, torch.round(torch.sigmoid(logits)))
    targets = (torch.arange(len(logits)) % 2).float()
    assert correct_count(logits, targets).item() == torch.eq(targets, torch.round(torch.sigmoid(logits))).sum().item()


def test_class_logits_become_probabilities_and_labels() -> None:
    logits = torch.randn(500, 4, generator=torch.Generator().manual_seed(1)) * 5
    probabilities = probabilities_of(logits)
    assert torch.equal(probabilities, torch.softmax(logits, dim=1))
    labels = labels_of(probabilities)
    assert torch.equal(labels, torch.softmax(logits, dim=1).argmax(dim=1))
    targets = torch.arange(500) % 4
    assert correct_count(logits, targets).item() == torch.eq(targets, labels).sum().item()


def test_losses_are_sums_of_cross_entropies() -> None:
    logits = torch.tensor([-2.0, 0.0, 3.5])
    targets = torch.tensor([1.0, 0.0, 1.0])
    by_hand = math.log1p(math.exp(2.0)) + math.log(2.0) + math.log1p(math.exp(-3.5))
    assert loss_sum(logits, targets).item() == pytest.approx(by_hand, rel=1e-6)
    rows = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    of_rows = math.log(sum(math.exp(value) for value in (1, 2, 3, 4))) - 2 + math.log(4)
    assert loss_sum(rows, torch.tensor([1, 3])).item() == pytest.approx(of_rows, rel=1e-6)


def test_published_tables_name_their_source() -> None:
    tables = json.loads((Path(__file__).parents[1] / "data" / "published_tables.json").read_text())
    assert "02_pytorch_classification.ipynb of mrdbourke/pytorch-deep-learning" in tables["what"]
    assert [len(tables[name]) for name in ("model_1", "model_3", "model_4")] == [10, 10, 10]
