"""One result for every number of ranks: weights and figures of a run against those of one plain process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ddp_circles import Config, Dataset, Split, fit
from ddp_circles.exact import ExactReducer
from ddp_circles.sharding import TensorSampler
from tests.harness.ranks import Job, run_ranks, train
from tests.harness.runs import PLAIN, QUIET, Bits, bits, checkpoint_steps, finish, run, start, status

RECIPES = {
    "default": ("--epochs=3",),
    "sgd, full batch": ("--recipe=model_3", "--epochs=15"),
    # 613 samples to train on and 154 to test on: neither divides by the batch, the micro-batches or the ranks
    "adam, uneven": ("--n-samples=767", "--batch-size=37", "--epochs=2"),
    "odd widths": ("--hidden", "7", "5", "3", "--n-samples=1250", "--batch-size=501", "--epochs=3"),
    "no hidden layer": ("--dataset=moons", "--hidden", "--batch-size=100", "--epochs=3"),
    "two threads": ("--threads=2", "--hidden", "64", "64", "--n-samples=3000", "--batch-size=1000", "--epochs=2"),
    "large test set": ("--n-samples=40000", "--test-fraction=0.9", "--batch-size=1000", "--epochs=1"),
    "V = 1": ("--micro-batches=1", "--epochs=2"),
    "one by one": ("--hidden", "200", "200", "--batch-size=512", "--epochs=3"),
    "blobs, V = 6": ("--recipe=model_4", "--batch-size=50", "--micro-batches=6", "--optimizer=adam", "--epochs=2"),
}
Oracle = Callable[..., Bits]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """The bits of one plain process, trained once for each set of flags."""
    known: dict[tuple[str, ...], Bits] = {}

    def train(*flags: str) -> Bits:
        if flags not in known:
            known[flags] = finish(PLAIN, tmp_path_factory.mktemp("alone"), *flags)
        return known[flags]

    return train


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_recipes_train_alike_on_any_number_of_ranks(tmp_path: Path, alone: Oracle, recipe: str, size: int) -> None:
    assert finish(size, tmp_path, *RECIPES[recipe]) == alone(*RECIPES[recipe])


@pytest.mark.parametrize(
    "instructions",
    [
        {"ATEN_CPU_CAPABILITY": "default"},
        {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
        {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"},
    ],
)
def test_any_instructions_train_alike_on_any_number_of_ranks(tmp_path: Path, instructions: dict[str, str]) -> None:
    """Among them fewer than this machine has, which round differently."""
    found = []
    for size in (1, 2, 3, 5):
        with start(size, tmp_path / str(size), *RECIPES["odd widths"], variables=instructions) as job:
            assert {outcome.code for outcome in job.wait(60)} == {0}
        found.append(bits(tmp_path / str(size)))
    assert found == found[:1] * 4


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (2, ("--micro-batches=1",)),  # a rank without any micro-batch
        (4, ("--micro-batches=3",)),
        (2, ("--micro-batches=3",)),  # one rank has fewer than the other
        (3, ("--batch-size=5",)),  # fewer samples in a step than micro-batches
        (3, ("--batch-size=1",)),
        (2, ("--batch-size=33", "--micro-batches=32")),
        (3, ("--batch-size=0", "--micro-batches=100")),  # more micro-batches than samples
    ],
)
def test_uneven_shares_train_alike(tmp_path: Path, alone: Oracle, size: int, flags: tuple[str, ...]) -> None:
    tiny = ("--n-samples=43", "--epochs=2", *flags)
    assert finish(size, tmp_path, *tiny) == alone(*tiny)


def test_idle_ranks_are_warned_about_once(tmp_path: Path) -> None:
    flags = ("--n-samples=20", "--epochs=1", "--micro-batches=2")
    outcomes = [outcome for size in (2, 4) for outcome in run(size, tmp_path / str(size), *flags)]
    warned = ["2 ranks have nothing to compute: --micro-batches 2 feeds no more" in one.output for one in outcomes]
    assert warned == [False, False, True, False, False, False]


def test_different_seeds_train_differently(tmp_path: Path, alone: Oracle) -> None:
    flags = ("--n-samples=43", "--epochs=2", "--micro-batches=1")
    assert finish(PLAIN, tmp_path, *flags, "--seed=43").model != alone(*flags).model


# ---- several buckets


def train_counting_buckets(*flags: object) -> None:
    """Train, and print how many parameters each bucket held."""
    original, buckets = ExactReducer.reduce_bucket, []

    def counting(self: ExactReducer, bucket):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        buckets.append(len(bucket.parameters()))
        return original(self, bucket)

    ExactReducer.reduce_bucket = counting  # type: ignore[method-assign]
    try:
        train(*flags)
    finally:
        print("buckets:", *buckets, flush=True)


def test_rebuilt_buckets_do_not_change_a_bit(tmp_path: Path, alone: Oracle) -> None:
    """Wider than DDP's first bucket of one mebibyte: from the second step on there are several, in another order."""
    flags = ("--hidden", "600", "600", "--n-samples=50", "--batch-size=10", "--epochs=1")
    for size in (2, 3):
        run_dir = tmp_path / str(size)
        with Job(train_counting_buckets, size, "--run-dir", run_dir, *QUIET, *flags) as job:
            outcomes = job.wait(60)
        assert [outcome.code for outcome in outcomes] == [0] * size, outcomes[0].output
        counts = outcomes[0].output.partition("buckets: ")[2].split()
        assert len(counts) > 4
        assert counts[0] not in counts[1:]
        assert bits(run_dir) == alone(*flags)


# ---- what cannot be summed


def train_model(run_dir: Path, model: nn.Module, micro_batches: int) -> None:
    config = Config(run_dir=run_dir, n_samples=50, epochs=2, micro_batches=micro_batches, wandb="disabled", plots=False)
    fit(config, model=model)


class Forgetful(nn.Module):
    """Has a layer that takes no part in the result."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(2, 1)
        self.forgotten = nn.Linear(2, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.used(inputs)
        return logits.squeeze(1)


@pytest.mark.parametrize(("size", "micro_batches"), [(1, 8), (2, 8), (2, 2)])
def test_parameter_without_gradient_is_named_on_every_rank(tmp_path: Path, size: int, micro_batches: int) -> None:
    with Job(train_model, size, tmp_path, Forgetful(), micro_batches) as job:
        outcomes = job.wait(60)
    assert [outcome.code for outcome in outcomes] == [1] * size
    for outcome in outcomes:
        assert "UserError: model= has parameters that take no part in the loss: forgotten.weight" in outcome.output


class Tied(nn.Module):
    """Uses one matrix twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.last(self.second(self.first(inputs).relu()))
        return logits.squeeze(1)


def train_tied(run_dir: Path) -> None:
    torch.manual_seed(1)
    train_model(run_dir, Tied(), 8)


def test_tied_weights_are_trained_and_stored(tmp_path: Path) -> None:
    for size in (1, 3):
        run_ranks(train_tied, size, tmp_path / str(size))
    assert bits(tmp_path / "1") == bits(tmp_path / "3")
    stored = load_file(tmp_path / "1" / "model.safetensors")
    assert stored["first.weight"].equal(stored["second.weight"])


class Flat(nn.Module):
    """One logit for each sample, after `middle`."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), middle, nn.Linear(4, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layers(inputs)
        return logits.squeeze(1)


def test_batch_norm_over_all_ranks_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with Job(train_model, 2, tmp_path, Flat(nn.SyncBatchNorm(4)), 8) as job:
        outcomes = job.wait(60)
    for outcome in outcomes:
        assert 'UserError: reduction="exact" cannot train layers.1 (SyncBatchNorm)' in outcome.output
    assert not (tmp_path / "status").exists()


# ---- beyond the range

BATCH, OUTLIER = 10, 17


def train_with_outlier(run_dir: Path, value: float) -> None:
    """One sample of the first epoch is far out: one micro-batch of one rank sees it."""
    inputs = torch.ones(60, 2)
    inputs[OUTLIER] = value
    samples = Dataset(inputs, torch.arange(60) % 2.0)
    config = Config(
        run_dir=run_dir, batch_size=BATCH, epochs=1, checkpoint_steps=1, log_every=100, wandb="disabled", plots=False
    )
    fit(config, data=Split(samples, samples))


@pytest.mark.parametrize("value", [1e9, -1e30, 3e38])
def test_out_of_range_is_raised_on_every_rank_at_the_same_step(tmp_path: Path, value: float) -> None:
    step = TensorSampler(60, seed=42).order(0).tolist().index(OUTLIER) // BATCH
    for size in (1, 3):
        run_dir = tmp_path / str(size)
        with Job(train_with_outlier, size, run_dir, value) as job:
            outcomes = job.wait(60)
        assert [outcome.code for outcome in outcomes] == [1] * size
        messages = {outcome.output.partition(f"rank {outcome.rank}: ")[2] for outcome in outcomes}
        assert len(messages) == 1, messages
        assert messages.pop().startswith(f"in step {step}, ")
        assert (status(run_dir), checkpoint_steps(run_dir)[0]) == ("failed", step)
