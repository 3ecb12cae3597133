"""Side by side or one by one: tried at each start, decided alike by all ranks, and the same bits either way they go."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddp_circles import Config, Dataset, Split, fit, passes
from tests.harness.ranks import Job, forget_launcher, run_ranks, train
from tests.harness.runs import PLAIN, QUIET, Bits, bits, run

SETTINGS = ("--n-samples=200", "--epochs=2", "--checkpoint-steps=1")
WARNING = "warning: micro-batches run one by one: side by side, {} gives them other bits (32 rows among "


def use_a_kernel_that_counts_slices() -> None:
    """Make the batched product depend on the number of its matrices."""
    bmm = Tensor.bmm

    def counting(one: Tensor, other: Tensor) -> Tensor:
        product = bmm(one, other)
        return product * (1 + 2.0**-20) if len(one) == 3 else product

    setattr(Tensor, "bmm", counting)  # noqa: B010 - a plain assignment has another type


def train_where_kernels_count(odd_rank: int | None, *flags: object) -> None:
    """Train; on `odd_rank` alone, or on all ranks, with that kernel."""
    if odd_rank is None or int(os.environ["RANK"]) == odd_rank:
        use_a_kernel_that_counts_slices()
    train(*flags)


def train_one_by_one(*flags: object) -> None:
    """Train in one plain process, one micro-batch after the other."""
    forget_launcher()
    passes.MOST_WORK = 0
    train(*flags)


def finish(
    function: Callable[..., None], size: int, run_dir: Path, *arguments: object, flags: tuple[str, ...] = ()
) -> tuple[Bits, list[str]]:
    """The bits of a finished run, and the ranks' outputs."""
    with Job(function, size, *arguments, "--run-dir", run_dir, *QUIET, *SETTINGS, *flags) as job:
        outcomes = job.wait(60)
    assert [outcome.code for outcome in outcomes] == [0] * size, outcomes[0].output
    return bits(run_dir), [outcome.output for outcome in outcomes]


def way(run_dir: Path) -> str:
    """The way that the run's micro-batches went, as its summary says."""
    text: str = json.loads((run_dir / "summary.json").read_text())["micro_batches_run"]
    return text


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> Bits:
    """The bits of the passes one by one."""
    run_dir = tmp_path_factory.mktemp("one_by_one")
    expected, (output,) = finish(train_one_by_one, 1, run_dir)
    assert way(run_dir) == "one by one: each micro-batch is large"
    assert "warning" not in output
    return expected


@pytest.mark.parametrize(("size", "odd_rank"), [(1, None), (2, None), (3, None), (4, None), (2, 1), (3, 0)])
def test_where_a_bit_differs_the_passes_run_one_by_one(
    tmp_path: Path, one_by_one: Bits, size: int, odd_rank: int | None
) -> None:
    """V = 8 makes three slices on three ranks, but the kernel is found out on any number, and by one rank for all."""
    found, outputs = finish(train_where_kernels_count, size, tmp_path, odd_rank)
    assert found == one_by_one
    assert way(tmp_path) == "one by one: side by side, their bits differ"
    warning = WARNING.format(f"rank {odd_rank or 0} (host {socket.gethostname()})")
    assert [warning in output for output in outputs] == [True] + [False] * (size - 1)
    assert outputs[0].count("warning: ") == 1


def test_side_by_side_and_one_by_one_train_alike_but_for_rounding(tmp_path: Path, one_by_one: Bits) -> None:
    found, (output,) = finish(train, 1, tmp_path)
    assert way(tmp_path) == "side by side"
    assert "warning" not in output
    for row, expected in zip(found.rows, one_by_one.rows, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


def test_a_run_that_goes_on_in_the_other_way_says_so(tmp_path: Path) -> None:
    finish(train_one_by_one, 1, tmp_path)
    for epochs, warned in ((3, True), (4, False)):  # afterwards it is a run side by side
        _, (output,) = finish(train, 1, tmp_path, flags=(f"--epochs={epochs}",))
        expected = "goes on where micro_batches_run was one by one and is side by side: the same bits are not promised"
        assert (expected in output) == warned


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--micro-batches=1",), "side by side"),
        (("--recipe=model_4", "--epochs=2"), "side by side"),
        (("--hidden", 300, 300), "one by one: each micro-batch is large"),
        (("--batch-size=0", "--n-samples=60000", "--hidden", 30, 30), "one by one: each micro-batch is large"),
        (("--reduction=fast",), "one by one: each rank has one micro-batch"),
    ],
)
def test_the_summary_says_which_way_and_why(tmp_path: Path, flags: tuple[object, ...], expected: str) -> None:
    for size in (PLAIN, 2):
        outcomes = run(size, tmp_path / str(size), *SETTINGS, "--epochs=1", *flags)
        assert {outcome.code for outcome in outcomes} == {0}, outcomes[0].output
        assert way(tmp_path / str(size)) == expected


def train_on_targets(run_dir: Path, targets: torch.Tensor) -> dict[str, float]:
    """Train the default network on samples of one's own."""
    inputs = torch.arange(200.0).view(100, 2) / 200
    data = Split(Dataset(inputs, targets), Dataset(inputs, targets))
    config = Config(run_dir=run_dir, batch_size=30, epochs=2, wandb="disabled", plots=False)
    return fit(config, data=data).metrics


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool])
def test_targets_of_any_type_train_the_default_network(tmp_path: Path, dtype: torch.dtype) -> None:
    targets = (torch.arange(100) % 2).to(dtype)
    found = [run_ranks(train_on_targets, size, tmp_path / f"{size}", targets)[0]["train/loss"] for size in (1, 3)]
    assert found[0] == found[1]
    assert way(tmp_path / "3") == "side by side"


def test_soft_targets_train_alike_and_have_no_accuracy(tmp_path: Path) -> None:
    targets = torch.linspace(0, 1, 100, dtype=torch.float64)
    found = [run_ranks(train_on_targets, size, tmp_path / f"{size}", targets)[0] for size in (1, 2)]
    assert {figures["test/loss"] for figures in found} == {found[0]["test/loss"]}
    assert "test/accuracy" not in found[0]
    assert found[0]["test/loss"] == pytest.approx(0.7, abs=0.05)


def train_with_a_metric(run_dir: Path) -> None:
    config = Config(run_dir=run_dir, n_samples=100, epochs=1, wandb="disabled", plots=False)
    fit(config, metrics={"count": lambda logits, _: logits.sum() * 0 + len(logits)})


def test_a_metric_of_ones_own_is_taken_of_each_micro_batch(tmp_path: Path) -> None:
    run_ranks(train_with_a_metric, 2, tmp_path)
    assert way(tmp_path) == "one by one: model=, loss=, metrics= or a data set that is not in tensors was given"
