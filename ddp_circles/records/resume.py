"""The start-up of a run: ranks are compared, the run directory locked, the newest good checkpoint read."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ddp_circles.errors import UserError
from ddp_circles.job.world import World, fingerprint
from ddp_circles.metrics import Progress, Tally
from ddp_circles.records.checkpoint import Checkpoints, decode
from ddp_circles.records.run_dir import RunDir
from ddp_circles.terminal import warn


@dataclass(frozen=True)
class Found:
    """State found at start-up: identical on all ranks, except `run_dir`, which only rank 0 holds."""

    path: Path
    state: dict[str, Any]
    """The newest good checkpoint; empty for a new run."""
    finished: bool
    """True if the run directory says that the run is finished."""
    fingerprint: dict[str, str]
    """Everything besides the configuration that this rank's bits depend on."""
    launches: list[str]
    """The launchers' names of this launch, over all ranks."""
    settings: dict[str, Any]
    """Settings that cannot change when the run is continued."""
    run_dir: RunDir | None

    def is_done(self, epochs: int) -> bool:
        """True if nothing is left to train; raises `UserError` if the checkpoint is past the end of `epochs`."""
        if not self.state:
            return False
        if self.finished and self.state["epoch"] >= epochs:
            return True
        if (self.state["epoch"], self.state["step"]) > (epochs, 0):  # the model of the middle of another epoch
            begun = self.state["epoch"] + (self.state["step"] > 0)
            raise UserError(
                f"--epochs {epochs}: {self.path} has come to epoch {begun} already; ask for as many, or more"
            )
        return False

    def restore_model(self, model: nn.Module) -> None:
        """Load the checkpoint's weights into `model`; raises `UserError` if they are those of another model."""
        if not self.state:
            return
        try:
            model.load_state_dict(self.state["model"])
        except RuntimeError as error:
            raise UserError(f"{self.path} holds a run of another model: {error}. Choose another --run-dir") from None

    def restore(self, model: nn.Module, optimizer: Optimizer) -> Progress:
        """Load the checkpoint's state; returns how far the run has come."""
        state = self.state
        if not state:
            return Progress()
        self.restore_model(model)
        optimizer.load_state_dict(state["optimizer"])
        if self.run_dir is not None and state["fingerprint"] != self.fingerprint:
            warn(f"this run began on {state['fingerprint']}, not {self.fingerprint}: the same bits are not promised")
        return Progress(state["epoch"], state["step"], Tally(*state["train"]))

    def close(self) -> None:
        """Release the run directory."""
        if self.run_dir is not None:
            self.run_dir.close()


def open_run(
    world: World,
    *,
    run_dir: Path | None,
    resume: str,
    settings: dict[str, Any],
    data: str | None,
    threads: int,
    fault_rank: int | None,
) -> Found:
    """Lock and read the run directory on rank 0; returns the result on all ranks, or raises the same `UserError`.

    `settings`: what cannot change when the run is continued, by name. `data`: the digest of samples that do not follow
    from the settings; must be the same on all ranks, and when the run is continued. `fault_rank`: must be a rank of
    this world when the run is new.
    """
    marks, launches = _compare_ranks(world, threads, data)
    settings = settings | {"data": data}
    opened: RunDir | None = None

    def read() -> tuple[Path, bytes, bool]:
        nonlocal opened
        opened = RunDir(run_dir or Path("runs") / _run_name(world))
        opened.open()
        return opened.path, *_read(world, opened, resume, launches, settings, fault_rank)

    try:
        path, content, finished = world.on_rank_0(read)
    except UserError:
        if opened is not None:
            opened.close()
        raise
    return Found(path, decode(content) if content else {}, finished, marks, launches, settings, opened)


def _read(
    world: World, run_dir: RunDir, resume: str, launches: list[str], settings: dict[str, Any], fault_rank: int | None
) -> tuple[bytes, bool]:
    """The newest good checkpoint's bytes, and True if the run is finished."""
    checkpoints = Checkpoints(run_dir.checkpoints)
    checkpoints.sweep()
    if resume == "never" and not world.ranks.restarts and not _was_begun_by(launches, checkpoints):
        run_dir.clear()
    content, warnings = checkpoints.load_newest()
    for warning in warnings:
        warn(warning)
    if content:
        _check_same_run(settings, decode(content)["settings"], run_dir.path)
    elif resume == "must":
        raise UserError(f"--resume must: there is no checkpoint in {run_dir.checkpoints}")
    elif run_dir.model.exists():
        raise UserError(
            f"{run_dir.path} holds a trained model and no checkpoint to go on from: choose another --run-dir, "
            "or start over in this one with --resume never"
        )
    elif fault_rank is not None and fault_rank >= world.ranks.world_size:
        raise UserError(
            f"--fault names rank {fault_rank}, and the last rank of this world is {world.ranks.world_size - 1}"
        )
    return content, run_dir.status == "finished"


def _was_begun_by(launches: list[str], checkpoints: Checkpoints) -> bool:
    """True if this very launch made the checkpoints: it returns after a requeue, a retry or a lost node."""
    try:
        content, _ = checkpoints.load_newest()
    except UserError:
        return False
    return bool(content) and not set(launches).isdisjoint(decode(content).get("starts", ()))


def _run_name(world: World) -> str:
    """The launcher's name for the run; else the time of its first start, which survives restarts.

    From the second training of a process on, the launcher's name is numbered.
    """
    ranks = world.ranks
    if ranks.job_id is not None:
        return f"{ranks.job_id}-{world.number + 1}" if world.number else ranks.job_id
    if ranks.restarts and not ranks.store_is_the_agents:
        raise UserError("a restarted run needs a name that lasts: give --run-dir, or --rdzv-id to torchrun")
    return world.agree_on_first(datetime.now().astimezone().strftime("%Y%m%d-%H%M%S-%f"))


def _check_same_run(now: dict[str, Any], before: dict[str, Any], path: Path) -> None:
    """Refuse to continue a run with other settings than it began with."""
    advice = "Choose another --run-dir, or start over in this one with --resume never"
    if before["data"] != now["data"]:
        raise UserError(f"{path} holds a run with other data. {advice}")
    changed = [
        f"--{name.replace('_', '-')} ({_spell(before[name])} there, {_spell(value)} here)"
        for name, value in now.items()
        if before[name] != value
    ]
    if changed:
        raise UserError(f"{path} holds a run with other settings: {', '.join(changed)}. {advice}")


def _spell(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _compare_ranks(world: World, threads: int, data: str | None) -> tuple[dict[str, str], list[str]]:
    """This rank's fingerprint, and the names of this launch on all ranks.

    A mix of fingerprints is warned about, since then the same bits cannot be promised. Raises `UserError` on all ranks
    if one was given other data.
    """
    marks = fingerprint(world.device, threads)
    everyone, launches, digests = zip(*world.gather((marks, world.ranks.launch, data)), strict=True)
    if odd := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
        raise UserError(
            f"rank {odd[0]} was given other data than rank 0: make them alike on every rank, from the same seed or "
            "file; which rank trains on which samples is decided here"
        )
    for name in marks if world.ranks.is_main else ():
        if len(kinds := sorted({other[name] for other in everyone})) > 1:
            warn(f"the ranks differ in {name} ({', '.join(kinds)}): the same bits are not promised")
    return marks, sorted({launch for launch in launches if launch is not None})
