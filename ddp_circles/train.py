"""Command line and composition root: everything is built here, wired together, and taken down again."""

import copy
import dataclasses
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_circles.config import Config, Fault, UserError, parse_command_line
from ddp_circles.health import WAITED, Watch, parent_at_start, stop_requested
from ddp_circles.world import (
    Ranks,
    World,
    is_lost_peer,
    open_world,
    pin_threads,
    read_ranks,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from ddp_circles.data import Split
    from ddp_circles.exact import Reducer
    from ddp_circles.metrics import LocalTally, Progress
    from ddp_circles.recorder import Recorder, Written
    from ddp_circles.start import Start
    from ddp_circles.trainer import LossFunction, Step, Trainer

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75
RANK_0_SPEAKS_SECONDS = 5.0
"""How long ranks other than 0 wait before they leave over a user's mistake, so that rank 0's message is not cut off."""

COMPARED_FIELDS = (
    "dataset", "n_samples", "noise", "factor", "test_fraction", "data_seed", "hidden", "activation", "optimizer", "lr",
    "batch_size", "seed", "reduction", "micro_batches", "threads",
)  # fmt: skip
"""What a run cannot change when it is continued."""


@dataclass(frozen=True)
class Result:
    """What `fit` returns, on every rank."""

    model: "nn.Module"
    """The trained module, without any wrapper."""
    metrics: dict[str, float]
    """The last line of metrics.jsonl."""
    run_dir: Path
    is_main: bool
    """Whether this is rank 0, the one that should speak."""


def main() -> None:
    """`python -m ddp_circles.train`: parse, train, and leave with the exit code of the contract."""
    parent_at_start()  # the launcher may die during the slow imports
    try:
        with stop_requested.listening():
            sys.exit(_run_command_line(sys.argv[1:]))
    finally:
        stop_requested.ignore()


def _run_command_line(arguments: list[str]) -> int:
    ranks = Ranks()
    try:
        ranks = read_ranks()
        config = parse_command_line(arguments, quiet=not ranks.is_main)
        pin_threads(config.threads)
        from torch.distributed.elastic.multiprocessing.errors import record

        return record(_fit_or_refuse)(config, ranks) or 0
    except UserError as error:
        return _refuse(ranks, error)
    except SystemExit as leaving:
        if leaving.code == EXIT_BAD_INPUT and not ranks.is_main:
            _let_rank_0_speak()
        raise
    except Exception:
        if ranks.launcher != "torchrun":  # there the agent prints what `record` noted, labelled with the rank
            label = f"[rank {ranks.rank}] " if ranks.world_size > 1 else ""
            print("".join(label + line for line in traceback.format_exc().splitlines(keepends=True)), file=sys.stderr)
        return 1


def _fit_or_refuse(config: Config, ranks: Ranks) -> int:
    try:
        fit(config)
    except UserError as error:
        return _refuse(ranks, error)
    return 0


def _refuse(ranks: Ranks, error: UserError) -> int:
    """Say once, from rank 0, what the user can put right."""
    if ranks.is_main:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        _let_rank_0_speak()
    return EXIT_BAD_INPUT


def _let_rank_0_speak() -> None:
    deadline = time.monotonic() + RANK_0_SPEAKS_SECONDS
    while time.monotonic() < deadline and not stop_requested():
        time.sleep(0.05)


def fit(
    config: Config,
    *,
    model: "nn.Module | None" = None,
    data: "Split | None" = None,
    loss: "LossFunction | None" = None,
) -> Result:
    """Train as `config` says, on all ranks of the job this process belongs to; every rank must pass the same.

    `model`: a float32 module from inputs [n, ...] to logits [n] or [n, classes]; default: the configuration's
    classifier. `data`: samples to train on and to test on; default: the configuration's points. `loss`: the SUM over
    samples of the loss of logits and targets, a scalar; default: binary cross-entropy for [n], cross-entropy for
    [n, classes]. Raises `UserError` for what the user can put right, and `SystemExit` after a stop request, with the
    exit code of the contract, and when another rank is lost.
    """
    with stop_requested.listening():
        ranks = read_ranks()
        pin_threads(config.threads)
        watch = Watch(ranks.rank, ranks.world_size, launched=ranks.launched)
        watch.start()
        try:
            with open_world(ranks, config.device, config.backend, config.timeout) as world, ExitStack() as at_end:
                watch.connect(world.store)
                try:
                    return _fit_in_world(config, world, watch, at_end, model, data, loss)
                except Exception as error:
                    _leave(error, world, watch)
                    raise
        finally:
            watch.stop()


def _leave(error: Exception, world: World, watch: Watch) -> None:
    """Turn what ended the training into how this rank ends, and tell the other ranks."""
    from ddp_circles.trainer import OutOfRangeError, StopRequestedError

    ranks = world.ranks
    if isinstance(error, UserError):
        return
    if isinstance(error, StopRequestedError):
        raise SystemExit(0 if ranks.launcher == "torchrun" else EXIT_STOPPED) from None
    lost_peer = is_lost_peer(error)
    with watch.patient_with_store():
        watch.report_end(WAITED if lost_peer else f"raised {type(error).__name__}")
        if lost_peer:
            reason = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
            print(f"rank {ranks.rank}: lost a peer: {watch.name_missing()} ({reason})", file=sys.stderr, flush=True)
        elif isinstance(error, OutOfRangeError):
            print(f"rank {ranks.rank}: {error}", file=sys.stderr, flush=True)
        if ranks.serves_store:
            watch.linger()
    if lost_peer or isinstance(error, OutOfRangeError):
        raise SystemExit(1) from None


def _fit_in_world(
    config: Config,
    world: World,
    watch: Watch,
    at_end: ExitStack,
    model: "nn.Module | None",
    data: "Split | None",
    loss: "LossFunction | None",
) -> Result:
    """Train in an open world. `at_end` closes what was opened after the other ranks have been told how it ended."""
    from ddp_circles import trainer as loop
    from ddp_circles.start import open_run

    start = open_run(
        world,
        run_dir=config.run_dir,
        resume=config.resume,
        settings=_settings(config),
        data=data.digest() if data is not None else None,
        threads=config.threads,
        fault_rank=Fault.parse(config.fault).rank if config.fault else None,
    )
    if start.run_dir is not None:
        at_end.callback(start.run_dir.close)
    bare = _make_model(config, model).to(world.device)
    if start.finished and start.state.get("epoch", 0) >= config.epochs:
        _restore_model(start, bare)
        _say(world, f"{start.path} is finished after {start.state['epoch']} epochs: ask for more --epochs to go on")
        return Result(bare, start.state["metrics"], start.path, world.ranks.is_main)
    _check_epochs(start, config.epochs)
    split = _make_data(config, data, world)
    trainer, recorder = _wire(config, world, watch, start, bare, split, loss or _default_loss())
    at_end.callback(recorder.close)
    progress = _restore(start, trainer)
    _announce(world, start, recorder.global_step(progress))
    with _status_kept(world, start, recorder, progress):
        recorder.begin(progress, config.to_toml())
        loop.fit(trainer, epochs=config.epochs, progress=progress)
        recorder.finish(
            progress,
            weights=bare.state_dict(),
            summary=_summary(config, world, start, recorder, progress, len(split.train.inputs)),
            draw=lambda folder: _draw(config, bare, split, start, folder),
        )
    _say(world, f"finished: test accuracy {recorder.metrics['test/accuracy']:.2%}, files in {start.path}")
    return Result(bare, recorder.metrics, start.path, world.ranks.is_main)


def _check_epochs(start: "Start", epochs: int) -> None:
    """Refuse an end that lies behind the checkpoint: the model would be that of the middle of another epoch."""
    if start.state and (start.state["epoch"], start.state["step"]) > (epochs, 0):
        begun = start.state["epoch"] + (start.state["step"] > 0)
        raise UserError(f"--epochs {epochs}: {start.path} has come to epoch {begun} already; ask for as many, or more")


def _settings(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in COMPARED_FIELDS}


def _make_data(config: Config, data: "Split | None", world: World) -> "Split":
    from ddp_circles.data import Split, is_cached, make_points

    if data is None and is_cached(config.n_samples):
        data = world.together(lambda: make_points(config))
    elif data is None:  # the others need not import scikit-learn, which takes far longer than the points
        data = world.broadcast(world.together(lambda: make_points(config) if world.ranks.is_main else None))
    train, test = data
    return Split(train.to(world.device), test.to(world.device))


def _make_model(config: Config, model: "nn.Module | None") -> "nn.Module":
    import torch

    from ddp_circles.data import class_count
    from ddp_circles.exact import be_deterministic, check_model
    from ddp_circles.models import Classifier

    if model is None:
        torch.manual_seed(config.seed)  # directly before the model is built, as in the tutorial
        model = Classifier(2, config.hidden, config.activation, class_count(config.dataset))
    if config.reduction == "exact":
        be_deterministic()
        check_model(model)
    return model


def _default_loss() -> "LossFunction":
    from ddp_circles.models import loss_sum

    return loss_sum


def _wire(
    config: Config,
    world: World,
    watch: Watch,
    start: "Start",
    bare: "nn.Module",
    split: "Split",
    loss: "LossFunction",
) -> "tuple[Trainer, Recorder[Step]]":
    """Put replica, reducer, optimizer and recorder around the bare model."""
    from ddp_circles.metrics import LocalTally
    from ddp_circles.recorder import Recorder
    from ddp_circles.trainer import Trainer

    tally = LocalTally(world.device)
    optimizer = _make_optimizer(config, bare)
    samples = len(split.train.inputs)
    recorder: Recorder[Step] = Recorder(
        watch=watch,
        written=_open_records(config, world, start, bare, optimizer),
        wrap=_fault_wrapper(config, world, start, bare),
        steps_per_epoch=-(-samples // (config.batch_size or samples)),
        train_seconds=start.state.get("train_seconds", 0.0),
        metrics=start.state.get("metrics", {}),
    )
    trainer = Trainer(
        model=bare,
        optimizer=optimizer,
        loss=loss,
        reducer=_make_reducer(config, world, bare, tally),
        tally=tally,
        world=world,
        train_set=split.train,
        test_set=split.test,
        batch_size=config.batch_size,
        seed=config.seed,
        events=recorder,
    )
    return trainer, recorder


def _make_reducer(config: Config, world: World, bare: "nn.Module", tally: "LocalTally") -> "Reducer":
    """Who sums the gradients of `bare`, through a DDP wrapper around it, which a world of one does without."""
    from torch.nn.parallel import DistributedDataParallel

    from ddp_circles.exact import ExactReducer, FastReducer
    from ddp_circles.tracking import warn

    alone = world.ranks.world_size == 1
    replica = bare if alone else DistributedDataParallel(bare, gradient_as_bucket_view=True)
    if config.reduction == "fast":
        return FastReducer(replica, world=world, tally=tally, stop_requested=stop_requested)
    idle = world.ranks.world_size - config.micro_batches
    if idle > 0 and world.ranks.is_main:
        warn(f"{idle} ranks have nothing to compute: --micro-batches {config.micro_batches} feeds no more")
    return ExactReducer(
        bare,
        replica,
        streams=config.micro_batches,
        owned=-(-config.micro_batches // world.ranks.world_size),
        tally=tally,
        stop_requested=stop_requested,
        device=world.device,
    )


def _make_optimizer(config: Config, model: "nn.Module") -> "Optimizer":
    import torch

    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=config.lr, fused=True)
    return torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)


def _open_records(
    config: Config, world: World, start: "Start", bare: "nn.Module", optimizer: "Optimizer"
) -> "Written | None":
    """Open what rank 0 writes to; None on the other ranks."""
    if start.run_dir is None:
        return None
    from ddp_circles import tracking
    from ddp_circles.recorder import Written

    tracking_id = start.state.get("tracking_id") or tracking.new_run_id()
    lines = tracking.JsonLines(start.run_dir.metrics, keep_below_epoch=start.state.get("epoch", 0))
    trackers: list[tracking.Tracker] = [lines, tracking.Console(config.log_every, config.epochs)]
    mode = tracking.choose_wandb_mode(config.wandb)
    if mode != "disabled":
        trackers.append(
            tracking.WandbRun(
                mode=mode,
                project=config.wandb_project,
                run_id=tracking_id,
                config=dataclasses.asdict(config) | {"world_size": world.ranks.world_size},
                folder=start.run_dir.path,
                earlier=tracking.read_rows(start.run_dir.metrics),
            )
        )
    return Written(
        run_dir=start.run_dir,
        trackers=tracking.Trackers(trackers),
        checkpoint_seconds=config.checkpoint_seconds,
        checkpoint_steps=config.checkpoint_steps,
        snapshot=lambda: {
            "model": bare.state_dict(),
            "optimizer": optimizer.state_dict(),
            "settings": start.settings,
            "fingerprint": start.fingerprint,
            "tracking_id": tracking_id,
            "starts": start.names,
        },
    )


def _fault_wrapper(
    config: Config, world: World, start: "Start", bare: "nn.Module"
) -> "Callable[[Iterator[Step]], Iterator[Step]]":
    """What `--fault` puts around the steps of its rank; elsewhere nothing."""
    fault = Fault.parse(config.fault) if config.fault else None
    if fault is None or fault.rank != world.ranks.rank:
        return lambda steps: steps
    from ddp_circles.faults import with_fault

    return lambda steps: with_fault(steps, fault, start.path / "fault", bare)


def _restore(start: "Start", trainer: "Trainer") -> "Progress":
    """Put the checkpoint's state back, and return where it leaves the run."""
    from ddp_circles.metrics import Progress, Tally
    from ddp_circles.tracking import warn

    state = start.state
    if not state:
        return Progress()
    _restore_model(start, trainer.model)
    trainer.optimizer.load_state_dict(state["optimizer"])
    if start.run_dir is not None and state["fingerprint"] != start.fingerprint:
        warn(f"this run began on {state['fingerprint']}, not {start.fingerprint}: the same bits are not promised")
    return Progress(state["epoch"], state["step"], Tally(*state["train"]))


def _restore_model(start: "Start", bare: "nn.Module") -> None:
    try:
        bare.load_state_dict(start.state["model"])
    except RuntimeError as error:
        raise UserError(f"{start.path} holds a run of another model: {error}. Choose another --run-dir") from None


def _announce(world: World, start: "Start", step: int) -> None:
    begun = f"continue after step {step}" if start.state else "start"
    _say(world, f"{begun}: {world.describe()}, run directory {start.path}")


def _say(world: World, message: str) -> None:
    from ddp_circles.tracking import say

    if world.ranks.is_main:
        say(message)


@contextmanager
def _status_kept(world: World, start: "Start", recorder: "Recorder[Step]", progress: "Progress") -> Iterator[None]:
    """Keep the file `status` true while the run is on."""
    from ddp_circles.trainer import StopRequestedError

    try:
        yield
    except StopRequestedError:
        recorder.set_status("stopped")
        recorder.close()
        _say(world, f"stopped after step {recorder.global_step(progress)}; to continue: {_command(world, start.path)}")
        raise
    except BaseException:
        recorder.set_status("failed")
        raise


def _command(world: World, path: Path) -> str:
    """The whole command that continues the run."""
    ranks, words = world.ranks, sys.orig_argv
    if ranks.launcher == "torchrun":
        nodes = f"--nnodes={ranks.nodes} " if ranks.nodes > 1 else ""
        arguments = [word for word in words[1:] if word != "-u"]
        command = f"torchrun {nodes}--nproc_per_node={ranks.local_world_size} {shlex.join(arguments)}"
    else:
        command = shlex.join(words)
    if any(word.removeprefix("--resume=") == "never" for word in words):
        command += " --resume auto"  # the later flag counts
    given = any(word.split("=")[0] in ("--run-dir", "--run_dir") for word in words)
    return command if given else f"{command} --run-dir {shlex.quote(str(path))}"


def _summary(
    config: Config, world: World, start: "Start", recorder: "Recorder[Step]", progress: "Progress", samples: int
) -> dict[str, Any]:
    """What summary.json says beside the last epoch's figures."""
    import torch

    steps = recorder.global_step(progress)
    trained = samples * progress.epoch
    return {
        "world_size": world.ranks.world_size,
        "reduction": config.reduction,
        "micro_batches": config.micro_batches,
        "epochs": progress.epoch,
        "steps": steps,
        "resumed_from_step": start.state.get("global_step"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "backend": world.backend,
        "device": start.fingerprint["device"],
        "train_seconds": recorder.train_seconds,
        "samples_per_second": trained / max(recorder.train_seconds, 1e-9),
    }


def _draw(config: Config, bare: "nn.Module", split: "Split", start: "Start", folder: Path) -> list[Path]:
    """Draw the pictures of a finished run into `folder`; rank 0 alone calls this."""
    assert start.run_dir is not None
    if not config.plots:
        return []
    from ddp_circles import plots
    from ddp_circles.data import Dataset, Split
    from ddp_circles.tracking import read_rows

    folder.mkdir(exist_ok=True)
    pictures = [folder / "curves.png"]
    plots.draw_curves(read_rows(start.run_dir.metrics), pictures[0])
    if split.train.inputs.shape[1:] == (2,):
        pictures.append(folder / "decision_boundary.png")
        on_cpu = Split(*(Dataset(*(part.cpu() for part in samples)) for samples in split))
        plots.draw_decision_boundary(copy.deepcopy(bare).cpu(), on_cpu, pictures[1])
    return pictures


if __name__ == "__main__":
    main()
