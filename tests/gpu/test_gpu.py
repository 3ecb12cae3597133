"""The promise on CUDA: the same bits on one rank and on several that share the device."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from ddp_circles import Config
from examples import digits
from tests.harness.ranks import run_ranks, train_on
from tests.harness.runs import bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

FLAGS = ("--device", "cuda", "--backend", "gloo", "--wandb", "disabled", "--no-plots")


def weights_digest(size: int, folder: Path, *flags: object) -> str:
    outcomes = train_on(size, "--run-dir", folder, *FLAGS, *flags, timeout=240)
    assert [outcome.code for outcome in outcomes] == [0] * size, outcomes[0].output
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--n-samples", 613, "--batch-size", 37),
        ("--recipe", "model_4"),
        ("--hidden", 1024, 1024),  # several buckets
    ],
)
def test_same_bits_on_one_device(tmp_path: Path, flags: tuple[object, ...]) -> None:
    alone = weights_digest(1, tmp_path / "1", "--epochs", 5, *flags)
    assert {weights_digest(size, tmp_path / str(size), "--epochs", 5, *flags) for size in (2, 4)} == {alone}


def test_nccl_gives_the_bits_of_gloo(tmp_path: Path) -> None:
    gloo, nccl = (
        weights_digest(1, tmp_path / backend, "--epochs", 5, "--backend", backend) for backend in ("gloo", "nccl")
    )
    assert gloo == nccl


@pytest.mark.timeout(300)
def test_divergence_is_detected_although_sums_are_read_late(tmp_path: Path) -> None:
    outcomes = train_on(2, "--run-dir", tmp_path, *FLAGS, "--fault", "nan@1:20", timeout=200)
    for rank, outcome in enumerate(outcomes):
        assert outcome.code == 1
        assert f"rank {rank}: in step 20" in outcome.output


@pytest.mark.timeout(600)
@pytest.mark.parametrize("flags", [(), ("--hidden", 1024, 1024)])
def test_an_audit_changes_no_bit_and_names_the_rank(tmp_path: Path, flags: tuple[object, ...]) -> None:
    short = ("--epochs", 5, *flags)
    clean = weights_digest(1, tmp_path / "1", *short)
    assert weights_digest(3, tmp_path / "3", *short, "--audit-steps", 1) == clean
    for kind in ("flip", "warp"):
        run_dir, faulty = tmp_path / kind, ("--audit-steps", 5, "--fault", f"{kind}@1:20")
        for rank, outcome in enumerate(train_on(3, "--run-dir", run_dir, *FLAGS, *short, *faulty, timeout=200)):
            assert outcome.code == 1
            assert f"rank {rank}: audit of step 20: rank 1 (host" in outcome.output


def train_digits(run_dir: Path, workers: int, epochs: int) -> None:
    """Train the example: convolutions, batch norm, dropout, AdamW, a schedule, clipping, samples from pinned memory."""
    changed = {"epochs": epochs, "device": "cuda", "backend": "gloo", "wandb": "disabled", "plots": False}
    setattr(digits, "Config", lambda **settings: Config(**settings | changed))  # noqa: B010 - not a type any more
    setattr(digits, "OneCycleLR", lambda optimizer, **given: OneCycleLR(optimizer, **given | {"total_steps": 48}))  # noqa: B010
    sys.argv = ["digits.py", f"--run-dir={run_dir}", f"--workers={workers}"]
    digits.main()


@pytest.mark.timeout(600)
def test_a_real_model_has_the_same_bits_on_one_device(tmp_path: Path) -> None:
    run_ranks(train_digits, 1, tmp_path / "1", 0, 4, timeout=200)
    for size, workers in ((1, 2), (2, 2), (3, 0)):
        run_ranks(train_digits, size, tmp_path / f"{size} {workers}", workers, 4, timeout=200)
        assert bits(tmp_path / f"{size} {workers}") == bits(tmp_path / "1")
    run_ranks(train_digits, 2, tmp_path / "resumed", 0, 2, timeout=200)
    run_ranks(train_digits, 1, tmp_path / "resumed", 2, 4, timeout=200)
    assert bits(tmp_path / "resumed") == bits(tmp_path / "1")
