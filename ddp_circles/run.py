"""The composition root: `fit` builds what a training needs, wires it together, and takes it down again."""

import dataclasses
import platform
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ddp_circles import loop
from ddp_circles.config import Config, flags_of
from ddp_circles.contract import TOLERANCE, check_data, check_metrics, check_model, check_training
from ddp_circles.data import CACHED_FROM, Dataset, Split, cached_points, digest, make_points
from ddp_circles.errors import EXIT_STOPPED, StopRequestedError, UserError
from ddp_circles.exact import ExactReducer, be_deterministic
from ddp_circles.fast import FastReducer
from ddp_circles.job.faults import Fault, Rehearsal
from ddp_circles.job.ranks import continuing_command, read_ranks, spell_ranks
from ddp_circles.job.stop import stop_requested
from ddp_circles.job.world import World, open_world, pin_threads, telling_others
from ddp_circles.metrics import LocalTally, Metric, Progress
from ddp_circles.models import Classifier, class_count, loss_sum
from ddp_circles.records.console import Console
from ddp_circles.records.metrics_file import MetricsFile
from ddp_circles.records.recorder import Recorder, Writer
from ddp_circles.records.resume import Found, open_run
from ddp_circles.records.wandb_follower import WandbFollower, choose_mode, new_run_id
from ddp_circles.terminal import warn


@dataclass(frozen=True)
class Result:
    """The outcome of `fit`, on every rank."""

    model: nn.Module
    """The trained module, without any wrapper."""
    metrics: dict[str, float]
    """The last line of metrics.jsonl."""
    run_dir: Path
    is_main: bool
    """True on rank 0, the one that should speak."""


def fit(
    config: Config,
    *,
    model: nn.Module | None = None,
    data: Split | None = None,
    loss: loop.LossFunction | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> Result:
    """Train as `config` says, on all ranks of the job this process belongs to; every rank must pass the same.

    `model`: a float32 module from inputs [n, ...] to logits [n, ...]; default: the configuration's classifier. `data`:
    samples to train on and to test on; default: the configuration's points. `loss`: the SUM over samples of the loss of
    logits and targets, a scalar; default: binary cross-entropy for [n], cross-entropy for [n, classes]. `metrics`:
    other such sums by name, whose means per sample are reported. All of it is tried before the first step. Raises
    `UserError` for what the user can put right, and `SystemExit` after a stop request, with the exit code of the
    contract, and when another rank is lost.
    """
    with stop_requested.listening():
        ranks = read_ranks()
        pin_threads(config.threads)
        try:
            with (
                open_world(ranks, config.device, config.backend, config.timeout, flags_of(config)) as world,
                ExitStack() as at_end,  # closes what was opened, after the other ranks were told how it ended
                telling_others(world.ranks, world.watch),
            ):
                return _fit_in_world(config, world, at_end, model, data, loss, metrics)
        except StopRequestedError:
            # These two kill the other ranks over any other code, rank 0 while it still writes among them.
            raise SystemExit(0 if ranks.launcher in ("torchrun", "mpirun") else EXIT_STOPPED) from None


def _fit_in_world(
    config: Config,
    world: World,
    at_end: ExitStack,
    model: nn.Module | None,
    data: Split | None,
    loss: loop.LossFunction | None,
    metrics: Mapping[str, Metric] | None,
) -> Result:
    """Train in an open world; `at_end` is told what to close."""
    exact = config.reduction == "exact"
    if exact:
        be_deterministic()  # before anything is computed, the fingerprint too
    bare, split, metrics, own_data, accuracy = _take_in(config, world, model, data, loss, metrics)
    fault = Fault.parse(config.fault) if config.fault else None
    found = open_run(
        world,
        at_end,
        run_dir=config.run_dir,
        resume=config.resume,
        settings=config.lasting | {"data": own_data or None, "metrics": tuple(metrics)},
        epochs=config.epochs,
        fault_rank=fault.rank if fault else None,
    )
    path = found.run_dir.path
    if found.is_done:
        found.restore_model(bare)
        world.say(f"{path} is finished after {found.state['epoch']} epochs: ask for more --epochs to go on")
        return Result(bare, found.state["metrics"], path, world.ranks.is_main)
    split = split or _make_points(config, world).to(world.device)

    kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam
    optimizer = kind(bare.parameters(), lr=config.lr, fused=True)
    tally = LocalTally(world.device, metrics=metrics, accuracy=accuracy, exact=exact)
    samples = len(split.train.inputs)
    recorder = Recorder(
        watch=world.watch,
        rehearsal=Rehearsal(fault, path / "fault", bare) if fault and fault.rank == world.ranks.rank else None,
        writer=_make_writer(config, world, found, bare, optimizer) if world.ranks.is_main else None,
        steps_per_epoch=-(-samples // (config.batch_size or samples)),
        train_seconds=found.state.get("train_seconds", 0.0),
        metrics=found.state.get("metrics", {}),
    )
    at_end.callback(recorder.close)
    training = loop.Training(
        model=bare,
        optimizer=optimizer,
        loss=loss or loss_sum,
        reducer=_make_reducer(config, world, bare, tally),
        tally=tally,
        world=world,
        train_set=split.train,
        test_set=split.test,
        batch_size=config.batch_size,
        seed=config.seed,
        events=recorder,
    )
    progress = found.restore(bare, optimizer)
    begun = f"continue after step {recorder.global_step(progress)}" if found.state else "start"
    world.say(f"{begun}: {world.describe()}, run directory {path}")
    try:
        with recorder.running(progress, config.to_toml()):
            loop.train(training, epochs=config.epochs, progress=progress)
            recorder.finish(
                progress,
                summary=_summary(config, world, found, recorder, progress, samples),
                draw=partial(_draw, config, bare, split, path),
            )
    except StopRequestedError:
        recorder.close()
        command = continuing_command(world.ranks, sys.orig_argv, path)
        world.say(f"stopped after step {recorder.global_step(progress)}; to continue: {command}")
        raise
    figures = recorder.metrics
    tested = ", ".join(f"{name} {figures[f'test/{name}']:.5f}" for name in ("loss", *metrics))
    if accuracy:
        tested = f"accuracy {figures['test/accuracy']:.2%}"
    world.say(f"finished: test {tested}, files in {path}")
    return Result(bare, recorder.metrics, path, world.ranks.is_main)


def _take_in(
    config: Config,
    world: World,
    model: nn.Module | None,
    data: Split | None,
    loss: loop.LossFunction | None,
    metrics: Mapping[str, Metric] | None,
) -> tuple[nn.Module, Split | None, dict[str, Metric], str, bool]:
    """Check what the caller of `fit` has brought, alike on all ranks, before anything is written.

    Returns the model; the samples, None if they are still to be made; the metrics; the digest of the caller's data,
    empty without; and True if accuracy means something. Raises the same `UserError` on all ranks.
    """
    # Each rank checks what it was given, and all raise what one finds.
    split = world.together(lambda: check_data(data) if data is not None else None)
    named = world.together(partial(check_metrics, metrics))
    bare = world.together(partial(_make_model, config, model)).to(world.device)
    own_data = split.digest() if split is not None else ""
    world.check_alike(
        {
            "data": own_data,
            "loss= or none": str(loss is not None),
            "metrics": " ".join(named),
            "layers": str([(name, type(layer).__qualname__) for name, layer in bare.named_modules()]),
            "initial parameters and buffers": digest([*bare.parameters(), *bare.buffers()]),
        }
    )
    accuracy, exact = True, config.reduction == "exact"
    if any(part is not None for part in (model, data, loss, metrics)):
        split = (split or _make_points(config, world)).to(world.device)
        check = partial(
            check_training,
            exact=exact,
            micro_batches=config.micro_batches if exact else world.ranks.world_size,
            batch_size=config.batch_size,
            ranks=world.ranks.world_size,
        )
        accuracy, tried = world.together(partial(check, bare, split, loss, named))
        _compare_tries(world, tried)
    return bare, split, named, own_data, accuracy


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


def _make_points(config: Config, world: World) -> Split:
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


def _make_model(config: Config, model: nn.Module | None) -> nn.Module:
    if model is None:
        torch.manual_seed(config.seed)  # directly before the model is built, as in the tutorial
        model = Classifier(2, config.hidden, config.activation, class_count(config.dataset))
    check_model(model, exact=config.reduction == "exact")
    return model


def _make_reducer(config: Config, world: World, bare: nn.Module, tally: LocalTally) -> ExactReducer | FastReducer:
    """The gradient reducer for `bare`, wrapped in DDP unless the world has one rank."""
    replica = DistributedDataParallel(bare, gradient_as_bucket_view=True) if world.ranks.world_size > 1 else bare
    if config.reduction == "fast":
        return FastReducer(replica, world=world, tally=tally, stop_requested=stop_requested)
    idle = world.ranks.world_size - config.micro_batches
    if idle > 0 and world.ranks.is_main:
        warn(f"{idle} ranks have nothing to compute: --micro-batches {config.micro_batches} feeds no more")
    return ExactReducer(
        bare,
        replica,
        micro_batches=config.micro_batches,
        owned=-(-config.micro_batches // world.ranks.world_size),
        tally=tally,
        stop_requested=stop_requested,
        device=world.device,
    )


def _make_writer(config: Config, world: World, found: Found, bare: nn.Module, optimizer: Optimizer) -> Writer:
    """The outputs of the run, on rank 0."""
    tracking_id = found.state.get("tracking_id") or new_run_id(first=world.number == 0)
    return Writer(
        run_dir=found.run_dir,
        metrics_file=MetricsFile(
            found.run_dir.metrics,
            keep_below_epoch=found.state.get("epoch", 0),
            seal=found.state.get("metrics_seal"),
            last=found.state.get("metrics"),
            check=found.run_dir.check,
        ),
        console=Console(config.log_every, config.epochs),
        follower=WandbFollower(
            found.run_dir.path,
            mode=choose_mode(config.wandb),
            project=config.wandb_project,
            run_id=tracking_id,
            config=dataclasses.asdict(config) | {"world_size": world.ranks.world_size},
        ),
        checkpoint_seconds=config.checkpoint_seconds,
        checkpoint_steps=config.checkpoint_steps,
        snapshot=lambda: {
            "model": bare.state_dict(),
            "optimizer": optimizer.state_dict(),
            "settings": found.settings,
            "fingerprint": found.fingerprint,
            "tracking_id": tracking_id,
            "starts": found.launches,
        },
    )


def _summary(
    config: Config, world: World, found: Found, recorder: Recorder, progress: Progress, samples: int
) -> dict[str, Any]:
    """The part of summary.json beside the last epoch's figures."""
    return {
        "world_size": world.ranks.world_size,
        "reduction": config.reduction,
        "micro_batches": config.micro_batches,
        "epochs": progress.epoch,
        "steps": recorder.global_step(progress),
        "resumed_from_step": found.state.get("global_step"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "backend": world.backend,
        "device": found.fingerprint["device"],
        "fingerprint": found.fingerprint,
        "train_seconds": recorder.train_seconds,
        "samples_per_second": samples * progress.epoch / max(recorder.train_seconds, 1e-9),
    }


def _draw(config: Config, bare: nn.Module, split: Split, run_dir: Path) -> None:
    """Draw the pictures of a finished run; rank 0 alone calls this."""
    if config.plots:
        from ddp_circles.records.plots import draw_run  # noqa: PLC0415 - matplotlib is slow to import

        draw_run(bare, split, run_dir)
