"""The model, data, loss and metrics of a run: made or taken in, checked, and compared over the ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import nn

from ddp_circles.config import Config
from ddp_circles.contract import Part, check_data, check_metrics, check_model, identify
from ddp_circles.data import CACHED_FROM, Dataset, Split, cached_points, digest, make_points
from ddp_circles.errors import UserError
from ddp_circles.job.ranks import spell_ranks
from ddp_circles.job.world import World
from ddp_circles.loading import Reader
from ddp_circles.loop import LossFunction
from ddp_circles.memory import require_memory
from ddp_circles.metrics import Metric
from ddp_circles.models import Classifier, class_count, loss_sum
from ddp_circles.optimization import MakeOptimizer, MakeScheduler, Optimization, default_optimizer
from ddp_circles.side_by_side import can_go_side_by_side
from ddp_circles.trial import TOLERANCE, Trial, Verdict

T = TypeVar("T")


@dataclass(frozen=True)
class Brought:
    """The arguments of `fit` beside the configuration; None for what the configuration is to make."""

    model: nn.Module | None = None
    data: Split[Any] | None = None
    loss: LossFunction | None = None
    metrics: Mapping[str, Metric] | None = None
    optimizer: MakeOptimizer | None = None
    scheduler: MakeScheduler | None = None
    max_grad_norm: float | None = None
    workers: int = 0


@dataclass(frozen=True)
class Intake:
    """The parts of a run that its caller may bring, checked."""

    model: nn.Module
    optimization: Optimization
    loss: LossFunction
    metrics: dict[str, Metric]
    is_default: bool
    """True if model, loss and metrics are the configuration's."""
    workers: int
    identities: dict[str, Any]
    """What tells data, metrics and optimization from others, by name; a run that goes on must have the same."""
    verdict: Verdict | None
    """On samples, model, loss and metrics; None where points are still to be made for a model that needs no trial."""


def take_in(config: Config, world: World, brought: Brought) -> Intake:
    """Check what the caller of `fit` has brought, before anything is written; raises the same `UserError` on all ranks.

    What was not brought is the configuration's.
    """
    # Each rank checks what it was given, and all raise what one finds.
    parts = world.together(partial(_check_data, config, brought))
    metrics = world.together(partial(check_metrics, brought.metrics))
    bare, optimization = world.together(partial(_make_model, config, world, brought))
    identity = identify(parts) if parts is not None else ""
    is_own = any(part is not None for part in (brought.optimizer, brought.scheduler, brought.max_grad_norm))
    optimization_identity = optimization.identity() if is_own else ""
    world.check_alike(
        {
            "data": identity,
            "model= or none": str(brought.model is not None),
            "loss= or none": str(brought.loss is not None),
            "metrics": " ".join(metrics),
            "optimizer=, scheduler= or max_grad_norm=": optimization_identity,
            "layers": str([(name, type(layer).__qualname__) for name, layer in bare.named_modules()]),
            "initial parameters and buffers": digest([*bare.parameters(), *bare.buffers()]),
        }
    )
    verdict = None
    own_parts = (brought.model, brought.data, brought.loss, brought.metrics)
    if any(part is not None for part in own_parts) or not can_go_side_by_side(bare):
        split = on_device(parts or share_points(config, world), world.device)
        verdict = _try(config, world, bare, brought, metrics, split)
    return Intake(
        model=bare,
        optimization=optimization,
        loss=brought.loss or loss_sum,
        metrics=metrics,
        is_default=brought.model is None and brought.loss is None and not metrics,
        workers=brought.workers,
        identities={"data": identity or None, "metrics": tuple(metrics), "optimization": optimization_identity or None},
        verdict=verdict,
    )


def _check_data(config: Config, brought: Brought) -> Split[Part] | None:
    parts = check_data(brought.data, config.seed) if brought.data is not None else None
    if isinstance(brought.workers, bool) or not isinstance(brought.workers, Integral) or brought.workers < 0:
        raise UserError(f"workers= must be a whole number, 0 or more, got {brought.workers!r}")
    if brought.workers and (parts is None or all(isinstance(part, Dataset) for part in parts)):
        raise UserError("workers= read map-style data sets, and here all samples are in tensors: leave it out")
    return parts


def on_device(parts: Split[Part], device: torch.device) -> Split[Part]:
    """The samples; those in tensors on the device."""
    return Split(*(part.to(device) if isinstance(part, Dataset) else part for part in parts))


def _try(
    config: Config,
    world: World,
    model: nn.Module,
    brought: Brought,
    metrics: Mapping[str, Metric],
    split: Split[Part],
) -> Verdict:
    """Try what the caller has brought; all ranks raise the same `UserError` over what one of them finds."""
    exact = config.reduction == "exact"
    trial = Trial(
        model,
        brought.loss,
        metrics,
        exact=exact,
        micro_batches=config.micro_batches if exact else world.ranks.world_size,
        batch_size=config.batch_size,
        ranks=world.ranks.world_size,
        device=world.device,
    )
    run = partial(trial.run, split)
    verdict = world.together(partial(_without_data, run) if brought.data is None else run)
    for part in verdict.parts if brought.workers else ():
        if isinstance(part, Reader):
            world.together(part.check_handing_over)
    if trial.conversion:
        world.say(trial.conversion)
    world.check_alike(trial.digests)
    _compare_tries(world, trial.sums, verdict)
    return verdict


def _without_data(check: Callable[[], T]) -> T:
    """Call `check`, whose refusals are about points that the caller may not know of."""
    try:
        return check()
    except UserError as error:
        raise UserError(f"{error} (data= was not given: the points of dataset= were taken)") from None


def _compare_tries(world: World, tried: dict[str, float], verdict: Verdict) -> None:
    """Raise the same `UserError` on all ranks if one computes something else from the same samples."""
    shown = f"buffers that change: {', '.join(verdict.buffers) or 'none'}; random numbers: {verdict.draws}"
    everyone, verdicts = zip(*world.gather((tried, f"{shown}; accuracy: {verdict.has_accuracy}")), strict=True)
    if odd := [rank for rank, other in enumerate(verdicts) if other != verdicts[0]]:
        raise UserError(
            f"rank 0 and {spell_ranks(odd)} do not do the same with the same samples ({verdicts[0]}, and "
            f"{verdicts[odd[0]]}): give every rank the same model=, loss= and metrics="
        )
    for what in tried:
        values = [other[what] for other in everyone]
        odd = [rank for rank, value in enumerate(values) if abs(value - values[0]) > TOLERANCE * abs(values[0])]
        if odd:
            raise UserError(
                f"{what} is {values[0]:g} on rank 0 and {values[odd[0]]:g} on {spell_ranks(odd)}, from the same "
                "samples: give every rank the same model=, loss= and metrics="
            )


def share_points(config: Config, world: World) -> Split:
    """The configuration's points on every rank."""
    if config.n_samples < CACHED_FROM:
        # Rank 0 hands a small set round: the others need not import scikit-learn, which takes longer than the points.
        parts = world.on_rank_0(lambda: [part for share in make_points(**config.points) for part in share])
        return Split(Dataset(*parts[:2]), Dataset(*parts[2:]))
    split, made = world.together(partial(cached_points, **config.points))
    everyone = world.gather((world.ranks.name, made))
    if odd := [name for name, other in everyone if other != everyone[0][1]]:
        raise UserError(
            f"{odd[0]} has made other points than {everyone[0][0]} from the same settings: the nodes need the same "
            "versions of scikit-learn, numpy and safetensors"
        )
    return split


def _make_model(config: Config, world: World, brought: Brought) -> tuple[nn.Module, Optimization]:
    """The model on its device, and the optimizer of its parameters."""
    model = brought.model
    if model is None:
        make = partial(Classifier, 2, config.hidden, config.activation, class_count(config.dataset))
        with torch.device("meta"):
            _check_memory(config, world, make())
        # The caller's random numbers, and choice of a default device, stay as they are.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(config.seed)  # directly before the model is built, as in the tutorial
            model = make()
    check_model(model, exact=config.reduction == "exact")
    model = model.to(world.device)
    make_optimizer = brought.optimizer or default_optimizer(config.optimizer, config.lr)
    return model, Optimization(model, make_optimizer, brought.scheduler, brought.max_grad_norm)


def _check_memory(config: Config, world: World, model: nn.Module) -> None:
    """Refuse a configuration that surely needs more memory than there is, for its weights and its activations."""
    exact, ranks = config.reduction == "exact", world.ranks
    of_a_weight = 4 + 4 + (8 if config.optimizer == "adam" else 0) + (16 if exact else 0)  # with all that follows it
    samples = config.n_samples * (1 - config.test_fraction)
    rows = min(config.batch_size or samples, samples) / (config.micro_batches if exact else ranks.world_size)
    weights = sum(parameter.numel() for parameter in model.parameters())
    needed = weights * of_a_weight + rows * sum(config.hidden) * 4
    try:
        if world.device.type == "cuda":
            require_memory(needed, torch.cuda.mem_get_info(world.device)[1])
        else:
            require_memory(needed * ranks.local_world_size)
    except MemoryError as error:
        raise UserError(
            f"--hidden needs more memory than there is ({error}): use narrower layers, a smaller --batch-size or "
            "fewer ranks on this machine"
        ) from None
