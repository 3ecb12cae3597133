"""The composition root: `fit` builds what a training needs, wires it together, and takes it down again."""

import dataclasses
import os
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

from ddp_circles import loop
from ddp_circles.audit import Audit
from ddp_circles.buffers import Buffers
from ddp_circles.config import Config, flags_of, in_arguments, naming_arguments
from ddp_circles.constancy import Constancy
from ddp_circles.contract import Part
from ddp_circles.data import Dataset, Split
from ddp_circles.errors import EXIT_STOPPED, StopRequestedError, UserError
from ddp_circles.exact import ExactReducer, SideBySideReducer, Surroundings
from ddp_circles.fast import FastReducer
from ddp_circles.intake import Brought, Intake, on_device, share_points, take_in
from ddp_circles.job.faults import Fault
from ddp_circles.job.fingerprint import COMPUTATION
from ddp_circles.job.process import be_deterministic, fix_workspace, pin_threads, process_as_found
from ddp_circles.job.ranks import how_to_continue, read_ranks
from ddp_circles.job.rehearsal import Rehearsal
from ddp_circles.job.stop import stop_requested
from ddp_circles.job.world import World, open_world, telling_others
from ddp_circles.loading import Loaded
from ddp_circles.metrics import LocalTally, Metric, Progress
from ddp_circles.micro_batches import Source
from ddp_circles.models import state_of
from ddp_circles.optimization import MakeOptimizer, MakeScheduler, Optimization
from ddp_circles.passes import choose_passes
from ddp_circles.random_numbers import random_states_as_found, seed_generators, seed_torch
from ddp_circles.records.console import Console
from ddp_circles.records.metrics_file import MetricsFile
from ddp_circles.records.recorder import Recorder, Writer
from ddp_circles.records.resume import Found, open_run
from ddp_circles.records.wandb_follower import WandbFollower, choose_mode, choose_project, new_run_id
from ddp_circles.side_by_side import SideBySide
from ddp_circles.terminal import open_streams, warn
from ddp_circles.trial import Verdict


@dataclass(frozen=True)
class Result:
    """The outcome of `fit`, on every rank.

    Attributes:
        model: The trained module, without any wrapper.
        metrics: The last line of metrics.jsonl.
        run_dir: Folder of the results.
        is_main: True on rank 0, the one that should speak.

    """

    model: nn.Module
    metrics: dict[str, float]
    run_dir: Path
    is_main: bool


def fit(
    config: Config,
    *,
    model: nn.Module | None = None,
    data: Split[Any] | None = None,
    loss: loop.LossFunction | None = None,
    metrics: Mapping[str, Metric] | None = None,
    optimizer: MakeOptimizer | None = None,
    scheduler: MakeScheduler | None = None,
    max_grad_norm: float | None = None,
    workers: int = 0,
) -> Result:
    """Train as `config` says, on all ranks of the job this process belongs to; every rank must pass the same.

    `model`: a float32 module from inputs [n, ...] to logits [n, ...]; default: the configuration's classifier. `data`:
    samples to train on and to test on, tensors or arrays, or map-style data sets of (inputs, target), which `workers`
    processes of each rank read, 0 for the rank itself; default: the configuration's points. `loss`: the SUM over
    samples of the loss of logits and targets, a scalar; default: binary cross-entropy for [n], cross-entropy for
    [n, classes]. `metrics`: other such sums by name, whose means per sample are reported. `optimizer`: from the model
    to any torch optimizer; default: the configuration's. `scheduler`: from that to any torch scheduler, stepped after
    each of its steps. `max_grad_norm`: the gradient is scaled down to this norm, and its norm reported; inf: reported
    alone.

    All of it is tried before the first step. Raises `UserError` for what the user can put right, and `SystemExit` after
    a stop request, with the exit code of the contract, and when another rank is lost. The process is left as it was
    found.
    """
    open_streams()
    with stop_requested.listening(), naming_arguments(), process_as_found():
        if not isinstance(config, Config):
            raise UserError(f"fit() takes a Config first, got {type(config).__name__}")
        ranks = read_ranks()
        pin_threads(config.threads)
        fix_workspace()
        try:
            with (
                open_world(ranks, config.device, config.backend, config.timeout, flags_of(config)) as world,
                ExitStack() as at_end,  # closes what was opened, after the other ranks were told how it ended
                telling_others(world.ranks, world.watch, in_arguments),
                random_states_as_found(),
            ):
                if config.reduction == "exact":
                    be_deterministic()  # before anything is computed, the fingerprint too
                brought = Brought(model, data, loss, metrics, optimizer, scheduler, max_grad_norm, workers)
                return _fit_in_world(config, world, at_end, take_in(config, world, brought))
        except StopRequestedError:
            # These two kill the other ranks over any other code, rank 0 while it still writes among them.
            raise SystemExit(0 if ranks.launcher in ("torchrun", "mpirun") else EXIT_STOPPED) from None


def _fit_in_world(config: Config, world: World, at_end: ExitStack, given: Intake) -> Result:
    """Train in an open world; `at_end` is told what to close."""
    bare, optimization = given.model, given.optimization
    fault = Fault.parse(config.fault) if config.fault else None
    found = open_run(
        world,
        at_end,
        run_dir=config.run_dir,
        resume=config.resume,
        settings=config.lasting | given.identities,
        epochs=config.epochs,
        fault_rank=fault.rank if fault else None,
    )
    path = found.run_dir.path
    if found.is_done:
        found.restore_model(bare)
        line = f"{path} is finished after {found.state['epoch']} epochs: ask for more --epochs to go on"
        world.say(in_arguments(line))
        return Result(bare, found.state["metrics"], path, world.ranks.is_main)
    verdict = given.verdict or Verdict(on_device(share_points(config, world), world.device))
    passes = choose_passes(config, world, given, verdict.parts)
    found.note_way(passes.way, world.ranks)
    progress = found.restore(bare, optimization)

    exact = config.reduction == "exact"
    tally = LocalTally(world.device, metrics=given.metrics, accuracy=verdict.has_accuracy, exact=exact)
    buffers = Buffers(bare, verdict.buffers) if exact and verdict.buffers else None
    reducer = _make_reducer(config, world, passes.network, tally, buffers)
    audit = _make_audit(config, world, found, bare, reducer, passes.train_set)
    if audit is not None and isinstance(passes.train_set, Loaded):
        passes.train_set.watched = audit.watched
    seeded = verdict.draws or passes.read_in_rank or optimization.may_draw
    watched = exact and given.verdict is not None
    samples = len(passes.train_set)
    steps_per_epoch = -(-samples // (config.batch_size or samples))
    optimization.check_length(config.epochs * steps_per_epoch)
    recorder = Recorder(
        watch=world.watch,
        rehearsal=Rehearsal(fault, path / "fault", passes.weights, lambda: audit is not None and audit.recomputing)
        if fault and fault.rank == world.ranks.rank
        else None,
        writer=world.together(
            lambda: _make_writer(config, world, found, bare, optimization, audit) if world.ranks.is_main else None
        ),
        steps_per_epoch=steps_per_epoch,
        train_seconds=found.state.get("train_seconds", 0.0),
        metrics=found.state.get("metrics", {}),
        checkpoint_step=found.state.get("global_step"),
        learning_rates=optimization.learning_rates if given.identities["optimization"] else dict,
        constancy=Constancy(bare, seeded=seeded, buffers=buffers) if watched else None,
        refuse=world.refuse,
    )
    at_end.callback(recorder.close)
    training = loop.Training(
        model=passes.network,
        optimizer=optimization,
        loss=passes.loss,
        reducer=reducer,
        tally=tally,
        world=world,
        train_set=passes.train_set,
        test_set=passes.test_set,
        batch_size=config.batch_size,
        seed=config.seed,
        events=recorder,
        evaluation_batch=passes.evaluation_batch,
        seed_generators=seed_generators if seeded else seed_torch if given.verdict else None,
        gradient_norm=optimization.mean_norm if optimization.measures_norm else None,
        audit=audit,
    )
    begun = f"continue after step {recorder.global_step(progress)}" if found.state else "start"
    world.say(f"{begun}: {world.describe()}, run directory {path}")
    try:
        with recorder.running(progress, config.to_toml()), passes.reading():
            loop.train(training, epochs=config.epochs, progress=progress)
            if audit is not None:
                audit.finish(recorder.global_step(progress))
            recorder.finish(
                progress,
                summary=_summary(config, world, found, recorder, progress, samples, passes.way)
                | {"audits": _count_audits(found, audit)},
                draw=partial(_draw, config, bare, verdict.parts, path),
            )
    except StopRequestedError:
        recorder.close()
        changes = {"run_dir": str(path)} if config.run_dir is None else {}
        changes |= {"resume": "auto"} if config.resume == "never" else {}
        again = how_to_continue(world.ranks, sys.orig_argv, changes)
        world.say(f"stopped after step {recorder.describe_stop(progress)}; to continue: {again}")
        raise
    figures = recorder.metrics
    tested = ", ".join(f"{name} {figures[f'test/{name}']:.5f}" for name in ("loss", *given.metrics))
    if verdict.has_accuracy:
        tested = f"accuracy {figures['test/accuracy']:.2%}"
    world.say(f"finished: test {tested}, files in {path}")
    return Result(bare, recorder.metrics, path, world.ranks.is_main)


def _make_reducer(
    config: Config, world: World, network: nn.Module, tally: LocalTally, buffers: Buffers | None
) -> ExactReducer | SideBySideReducer | FastReducer:
    """The gradient reducer for `network`, wrapped in DDP unless the world has one rank."""
    replica = DistributedDataParallel(network, gradient_as_bucket_view=True) if world.ranks.world_size > 1 else network
    if config.reduction == "fast":
        return FastReducer(network, replica, world=world, tally=tally, stop_requested=stop_requested)
    if isinstance(replica, DistributedDataParallel):
        replica.broadcast_buffers = False  # they are summed; as an argument it has another name in each torch release
    idle = world.ranks.world_size - config.micro_batches
    if idle > 0 and world.ranks.is_main:
        feeds = f"--micro-batches {config.micro_batches} feeds no more"
        warn(in_arguments(f"{idle} ranks have nothing to compute: {feeds}"))
    given: Surroundings = {
        "micro_batches": config.micro_batches,
        "tally": tally,
        "stop_requested": stop_requested,
        "device": world.device,
    }
    if isinstance(network, SideBySide):
        return SideBySideReducer(network, replica, **given)
    return ExactReducer(network, replica, buffers=buffers, **given)


def _make_audit(
    config: Config,
    world: World,
    found: Found,
    bare: nn.Module,
    reducer: ExactReducer | SideBySideReducer | FastReducer,
    train_set: Source,
) -> Audit | None:
    """The audit of every so many steps, if there is one; raises `UserError` if the ranks are not of one kind."""
    if not config.audit_steps or isinstance(reducer, FastReducer):
        return None
    if odd := [name for name in found.mixed if name != COMPUTATION]:  # by that alone, a device is broken
        raise UserError(
            f"--audit-steps compares ranks of one kind, and these differ in {', '.join(odd)}: train on machines that "
            "are alike, or leave it out"
        )
    weights = [parameter for parameter in bare.parameters() if parameter.requires_grad]
    return Audit(config.audit_steps, world, reducer, train_set.nothing, weights, _count_audits(found, None))


def _count_audits(found: Found, audit: Audit | None) -> int:
    """Steps of the run that were audited, in earlier starts too."""
    return audit.count if audit is not None else int(found.state.get("audits", 0))


def _make_writer(
    config: Config, world: World, found: Found, bare: nn.Module, optimization: Optimization, audit: Audit | None
) -> Writer:
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
            project=choose_project(config.wandb_project, default=Config.wandb_project),
            run_id=tracking_id,
            config=dataclasses.asdict(config) | {"world_size": world.ranks.world_size},
        ),
        checkpoint_seconds=config.checkpoint_seconds,
        checkpoint_steps=config.checkpoint_steps,
        snapshot=lambda: {
            "model": state_of(bare),
            **optimization.state(),
            "settings": found.settings,
            "fingerprint": found.fingerprint,
            "tracking_id": tracking_id,
            "starts": found.launches,
            "audits": _count_audits(found, audit),
        },
    )


def _summary(
    config: Config, world: World, found: Found, recorder: Recorder, progress: Progress, samples: int, way: str
) -> dict[str, Any]:
    """The part of summary.json beside the last epoch's figures."""
    return {
        "world_size": world.ranks.world_size,
        "reduction": config.reduction,
        "micro_batches": config.micro_batches,
        "micro_batches_run": way,
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


def _draw(config: Config, bare: nn.Module, parts: Split[Part], run_dir: Path) -> None:
    """Draw the pictures of a finished run, on rank 0 alone; a failure is a warning, for the run has all else."""
    if not config.plots:
        return
    backend = os.environ.pop("MPLBACKEND", None)  # perhaps a notebook's, missing here; the pictures need none
    try:
        from ddp_circles.records.plots import draw_run  # noqa: PLC0415 - matplotlib is slow to import

        train, test = parts
        points = Split(train, test) if isinstance(train, Dataset) and isinstance(test, Dataset) else None
        draw_run(bare, points, run_dir)
    except Exception as error:
        warn(f"no pictures in {run_dir / 'plots'}: {type(error).__name__}: {error}")
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
