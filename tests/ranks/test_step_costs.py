"""The cost of a step in counts that no noise can change: calls, collectives, reads from the device."""

import gc
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ddp_circles import Config, fit, loop
from tests.harness.ranks import run_ranks

STEPS_PER_EPOCH = 13


def counted_run(folder: Path, epochs: int, settings: dict[str, Any]) -> Counter[str]:
    """Train quietly and count, in the training alone, calls of any kind, collectives, and reads of tensors."""
    counts: Counter[str] = Counter()
    inside = False

    def profile(_frame: FrameType, event: str, function: Any) -> None:
        if inside and event in ("call", "c_call"):
            counts["calls"] += 1
            if event == "c_call" and getattr(function, "__name__", "") in (
                "item",
                "tolist",
                "numpy",
                "cpu",
                "__bool__",
            ):
                counts["reads"] += 1

    train_epoch = loop.train_epoch

    def counted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            counts["collectives"] += inside
            return collective(*arguments, **options)

        return counting

    def watched_epoch(*arguments: Any) -> None:
        nonlocal inside
        inside = True
        train_epoch(*arguments)
        inside = False

    dist.all_reduce, dist.all_gather = counted(dist.all_reduce), counted(dist.all_gather)
    setattr(loop, "train_epoch", watched_epoch)  # noqa: B010 - a plain assignment has another type
    sys.setprofile(profile)
    try:
        fit(Config(run_dir=folder, epochs=epochs, wandb="disabled", plots=False, log_every=1000, **settings))
    finally:
        sys.setprofile(None)
    return counts


def per_step(folder: Path, size: int, settings: dict[str, Any]) -> dict[str, float]:
    """Counts per step: the difference of long and short runs, so that what is done once does not count."""
    short = run_ranks(counted_run, size, folder / "short", 2, settings)[0]
    long = run_ranks(counted_run, size, folder / "long", 6, settings)[0]
    return {name: (long[name] - short[name]) / (4 * STEPS_PER_EPOCH) for name in ("calls", "collectives", "reads")}


@pytest.mark.parametrize(
    ("size", "settings", "calls"),
    [
        (1, {"reduction": "fast"}, 360),
        (1, {"micro_batches": 1}, 375),
        (1, {"micro_batches": 8}, 375),
        (1, {"micro_batches": 32}, 375),
        (2, {"micro_batches": 8}, 565),
        (2, {"micro_batches": 2, "hidden": (300, 300)}, 545),  # one by one
        (1, {"micro_batches": 8, "hidden": (300, 300)}, 1300),
    ],
)
def test_a_step_stays_lean(tmp_path: Path, size: int, settings: dict[str, Any], calls: int) -> None:
    counted = per_step(tmp_path, size, settings)
    assert counted["calls"] <= calls
    assert counted["reads"] <= 1  # of numbers that all ranks agreed on, together
    assert counted["collectives"] == (size > 1)  # gradients, loss, accuracy, guard and stop flag in one


@pytest.mark.parametrize("size", [1, 2])
def test_an_audited_step_has_no_more_collectives(tmp_path: Path, size: int) -> None:
    counted = per_step(tmp_path, size, {"audit_steps": 1})
    assert counted["collectives"] == (size > 1)  # checksums ride with the gradients
    assert counted["reads"] <= 2
    assert counted["calls"] <= 900


def test_fast_agrees_seldom(tmp_path: Path) -> None:
    counted = per_step(tmp_path, 2, {"reduction": "fast"})
    assert counted["collectives"] == 1 / STEPS_PER_EPOCH  # DDP's own all-reduce is called from C++
    assert counted["reads"] <= 0.1
    assert counted["calls"] <= 440


def test_memory_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    short, long = (run_ranks(held_objects, 1, tmp_path / str(epochs), epochs)[0] for epochs in (3, 12))
    assert long - short < 50


def held_objects(folder: Path, epochs: int) -> int:
    """The number of tensors that are alive after a training."""
    result = fit(Config(run_dir=folder, epochs=epochs, wandb="disabled", plots=False, log_every=1000))
    gc.collect()
    assert result.metrics["epoch"] == epochs - 1
    return sum(isinstance(held, torch.Tensor) for held in gc.get_objects())
