"""The model, data, loss and metrics of a run: made or taken in, checked, and compared over the ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from ddp_circles.config import Config
from ddp_circles.contract import TOLERANCE, check_data, check_metrics, check_model, check_training
from ddp_circles.data import CACHED_FROM, Dataset, Split, cached_points, digest, make_points
from ddp_circles.errors import UserError
from ddp_circles.job.ranks import spell_ranks
from ddp_circles.job.world import World
from ddp_circles.loop import LossFunction
from ddp_circles.memory import require_memory
from ddp_circles.metrics import Metric
from ddp_circles.models import Classifier, class_count, loss_sum

T = TypeVar("T")


@dataclass(frozen=True)
class Intake:
    """The model, samples, loss and metrics of a run."""

    model: nn.Module
    split: Split | None
    """None while the configuration's points are still to be made: a finished run needs none."""
    loss: LossFunction
    metrics: dict[str, Metric]
    data_digest: str | None
    """Of the caller's own data."""
    is_default: bool
    """True if model, loss and metrics are the configuration's."""
    has_accuracy: bool
    """True if accuracy means something for these logits and targets."""


def take_in(
    config: Config,
    world: World,
    model: nn.Module | None,
    data: Split | None,
    loss: LossFunction | None,
    metrics: Mapping[str, Metric] | None,
) -> Intake:
    """Check what the caller of `fit` has brought, before anything is written; raises the same `UserError` on all ranks.

    What was not brought is the configuration's.
    """
    # Each rank checks what it was given, and all raise what one finds.
    split = world.together(lambda: check_data(data) if data is not None else None)
    named = world.together(partial(check_metrics, metrics))
    bare = world.together(partial(_make_model, config, world, model)).to(world.device)
    own_data = split.digest() if split is not None else ""
    world.check_alike(
        {
            "data": own_data,
            "model= or none": str(model is not None),
            "loss= or none": str(loss is not None),
            "metrics": " ".join(named),
            "layers": str([(name, type(layer).__qualname__) for name, layer in bare.named_modules()]),
            "initial parameters and buffers": digest([*bare.parameters(), *bare.buffers()]),
        }
    )
    accuracy, exact = True, config.reduction == "exact"
    if any(part is not None for part in (model, data, loss, metrics)):
        split = (split or share_points(config, world)).to(world.device)
        check = partial(
            check_training,
            bare,
            split,
            loss,
            named,
            exact=exact,
            micro_batches=config.micro_batches if exact else world.ranks.world_size,
            batch_size=config.batch_size,
            ranks=world.ranks.world_size,
        )
        given = split.train.inputs.dtype
        split, accuracy, tried = world.together(check if data is not None else partial(_without_data, check))
        if (taken := split.train.inputs.dtype) != given:
            world.say(f"the inputs of data= are converted from {given} to {taken}, as the parameters are")
        _compare_tries(world, tried)
    is_default = model is None and loss is None and not named
    return Intake(bare, split, loss or loss_sum, named, own_data or None, is_default, accuracy)


def _without_data(check: Callable[[], T]) -> T:
    """Call `check`, whose refusals are about points that the caller may not know of."""
    try:
        return check()
    except UserError as error:
        raise UserError(f"{error} (data= was not given: the points of dataset= were taken)") from None


def _compare_tries(world: World, tried: dict[str, float]) -> None:
    """Raise the same `UserError` on all ranks if one computes something else from the same samples."""
    everyone = world.gather(tried)
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


def _make_model(config: Config, world: World, model: nn.Module | None) -> nn.Module:
    if model is None:
        make = partial(Classifier, 2, config.hidden, config.activation, class_count(config.dataset))
        with torch.device("meta"):
            _check_memory(config, world, make())
        # The caller's random numbers, and choice of a default device, stay as they are.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(config.seed)  # directly before the model is built, as in the tutorial
            model = make()
    check_model(model, exact=config.reduction == "exact")
    return model


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
