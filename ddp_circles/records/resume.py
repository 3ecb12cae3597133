"""The start-up of a run: ranks are compared, the run directory locked, the newest good checkpoint read."""

from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import nn

from ddp_circles.errors import UserError, naming
from ddp_circles.job.fingerprint import fingerprint
from ddp_circles.job.ranks import Ranks
from ddp_circles.job.world import World
from ddp_circles.metrics import Progress, Tally
from ddp_circles.models import load_state
from ddp_circles.optimization import Optimization
from ddp_circles.records.checkpoint import State
from ddp_circles.records.run_dir import RunDir
from ddp_circles.terminal import visible, warn

ADVICE = "Choose another --run-dir, or start over in this one with --resume never"
OF_FIT = {
    "data": "other data",
    "metrics": "other metrics",
    "optimization": "another optimizer=, scheduler= or max_grad_norm=",
}
"""Settings that are arguments of `fit`, and a difference in words; the other ones are flags."""


@dataclass(frozen=True)
class Found:
    """State found at start-up: identical on all ranks, except `fingerprint`."""

    run_dir: RunDir
    """Locked by rank 0, the only one that may write there."""
    state: State
    """The newest good checkpoint; empty for a new run."""
    is_done: bool
    """True if nothing is left to train."""
    settings: dict[str, Any]
    """Settings that cannot change when the run is continued."""
    fingerprint: dict[str, str]
    """Everything besides the configuration that this rank's bits depend on."""
    launches: list[str]
    """The launchers' names of this launch, over all ranks."""
    mixed: list[str]
    """The entries of the fingerprint in which the ranks differ."""

    def note_way(self, way: str, ranks: Ranks) -> None:
        """Add to the fingerprint the way that micro-batches run; rank 0 warns if the run began in another one."""
        now = {"micro_batches_run": way.partition(":")[0]}
        self.fingerprint.update(now)
        if self.state and ranks.is_main:
            _warn_of_changes(self.state["fingerprint"], now)

    def restore_model(self, model: nn.Module) -> None:
        """Load the checkpoint's weights into `model`; raises `UserError` if they are those of another model."""
        try:
            load_state(model, self.state["model"])
        except RuntimeError as error:
            what = visible(" ".join(str(error).split())).rstrip(".")
            raise UserError(f"{self.run_dir.path} holds a run of another model: {what}. {ADVICE}") from None

    def restore(self, model: nn.Module, optimization: Optimization) -> Progress:
        """Load the checkpoint's state; returns how far the run has come.

        Raises `UserError` if model or optimizer are others than the run began with.
        """
        if not self.state:
            return Progress()
        self.restore_model(model)
        try:
            optimization.load(self.state)
        except (ValueError, KeyError, TypeError, AttributeError):  # as the optimizer's code meets it
            raise UserError(
                f"{self.run_dir.path} holds a run with another optimizer: the state does not fit. {ADVICE}"
            ) from None
        return Progress(self.state["epoch"], self.state["step"], Tally(*self.state["train"]))


def open_run(
    world: World,
    at_end: ExitStack,
    *,
    run_dir: Path | None,
    resume: str,
    settings: dict[str, Any],
    epochs: int,
    fault_rank: int | None,
) -> Found:
    """Lock and read the run directory on rank 0; returns the result on all ranks, or raises the same `UserError`.

    `at_end` releases the lock. `settings`: what cannot change when the run is continued, by name; `data` among them is
    the digest of samples that do not follow from the other settings, or None.
    `fault_rank`: must be a rank of this world when the run is new.
    """
    marks, launches, mixed = _compare_ranks(world, settings)
    opened = RunDir(run_dir or Path("runs") / _run_name(world))

    @naming(opened.path)
    def read() -> tuple[State, bool]:
        opened.open(at_end)
        state, warnings = opened.checkpoints.load_newest()
        # This very launch may have begun the run: it returns after a restart, a requeue or a retry.
        begun_here = not set(launches).isdisjoint(state.get("starts", ()))
        if resume == "never" and not begun_here:
            opened.clear()
            state, warnings = {}, []
        if warnings and not state:
            raise UserError(
                f"{'; '.join(warnings)}; no good checkpoint is left. Mend what can be mended, or start over with "
                "another --run-dir, or in this one with --resume never, which deletes them"
            )
        for warning in warnings:
            warn(warning)
        if not state:
            _check_new_run(world, opened, resume, fault_rank)
            return state, False
        _check_same_run(settings, state["settings"], opened.path)
        is_done = _is_done(opened, state, epochs)
        if not is_done:
            _warn_of_changes(state["fingerprint"], marks)
        return state, is_done

    state, is_done = world.on_rank_0(read)
    return Found(opened, state, is_done, settings, marks, launches, mixed)


def _check_new_run(world: World, run_dir: RunDir, resume: str, fault_rank: int | None) -> None:
    """Refuse to start a new run where one must be continued, or where it would overwrite another's results."""
    if resume == "must":
        raise UserError(f"--resume must: there is no checkpoint in {run_dir.checkpoints.folder}")
    if run_dir.model.exists():
        raise UserError(
            f"{run_dir.path} holds a trained model and no checkpoint to go on from: choose another --run-dir, "
            "or start over in this one with --resume never"
        )
    if fault_rank is not None and fault_rank >= world.ranks.world_size:
        raise UserError(
            f"--fault names rank {fault_rank}, and the last rank of this world is {world.ranks.world_size - 1}"
        )


def _is_done(run_dir: RunDir, state: State, epochs: int) -> bool:
    """True if nothing is left to train; raises `UserError` if the checkpoint is past the end of `epochs`."""
    if run_dir.status == "finished" and state["epoch"] >= epochs:
        return True
    if (state["epoch"], state["step"]) > (epochs, 0):  # the model of the middle of another epoch
        begun = state["epoch"] + (state["step"] > 0)
        raise UserError(
            f"--epochs {epochs}: {run_dir.path} has come to epoch {begun} already; ask for as many, or more"
        )
    return False


def _run_name(world: World) -> str:
    """The launcher's name for the run; else the time of its first start, which survives restarts.

    From the second training of a process on, the launcher's name is numbered.
    """
    ranks = world.ranks
    if ranks.job_id is not None:
        name = f"{ranks.job_id}-{world.number + 1}" if world.number else ranks.job_id
    elif ranks.restarts and not ranks.store_is_the_agents:
        raise UserError("a restarted run needs a name that lasts: give --run-dir, or --rdzv-id to torchrun")
    else:
        name = world.agree_on_first(datetime.now().astimezone().strftime("%Y%m%d-%H%M%S-%f"))
    if not name or name != Path(name).name or name == ".." or not name.isprintable():
        raise UserError(
            f"the launch's id {name!r} cannot name a folder in runs/: give --run-dir, or torchrun another --rdzv-id "
            "(a Slurm job: another SLURM_JOB_ID)"
        )
    return name


def _check_same_run(now: dict[str, Any], before: dict[str, Any], path: Path) -> None:
    """Refuse to continue a run with other settings than it began with."""
    if before.keys() != now.keys():
        raise UserError(f"{path} holds a run of another version of this package. {ADVICE}")
    for name, other in OF_FIT.items():
        if before[name] != now[name]:
            raise UserError(f"{path} holds a run with {other}. {ADVICE}")
    changed = [
        f"--{name.replace('_', '-')} ({_spell(before[name])} there, {_spell(value)} here)"
        for name, value in now.items()
        if before[name] != value
    ]
    if changed:
        raise UserError(f"{path} holds a run with other settings: {', '.join(changed)}. {ADVICE}")


def _spell(value: object) -> str:
    return visible(" ".join(map(str, value)) if isinstance(value, tuple) else str(value))


def _warn_of_changes(before: dict[str, str], now: dict[str, str]) -> None:
    """Warn if entries of a fingerprint differ; an earlier version may have known fewer."""
    changed = [
        visible(f"{name} was {before[name] or 'not set'} and is {value or 'not set'}")
        for name, value in now.items()
        if before.get(name, value) != value
    ]
    if changed:
        warn(f"this run goes on where {'; '.join(changed)}: the same bits are not promised")


def _compare_ranks(world: World, settings: dict[str, Any]) -> tuple[dict[str, str], list[str], list[str]]:
    """This rank's fingerprint, the names of this launch on all ranks, and the entries in which fingerprints differ.

    A mix of fingerprints is warned about, since then the same bits cannot be promised.
    """
    marks = fingerprint(world.device, settings["threads"])
    everyone, launches = zip(*world.gather((marks, world.ranks.launch)), strict=True)
    kinds = {name: sorted({other[name] for other in everyone}) for name in marks}
    mixed = [name for name in marks if len(kinds[name]) > 1]
    for name in mixed if world.ranks.is_main else ():
        warn(f"the ranks differ in {name} ({', '.join(kinds[name])}): the same bits are not promised")
    return marks, sorted({launch for launch in launches if launch is not None}), mixed
