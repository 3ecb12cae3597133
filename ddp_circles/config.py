"""The configuration of a run: one frozen dataclass, recipes, TOML, validation. Imports no torch."""

import dataclasses
import math
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w

from ddp_circles.errors import UserError
from ddp_circles.job.faults import Fault
from ddp_circles.job.refusal import refuse_uncaught
from ddp_circles.reading import read_text

# Limits here and below are far beyond any use; what exceeds them would end in some library's traceback.
MOST_THREADS = 1024
LONGEST_TIMEOUT = 10**8
MOST_LAYERS = 1000
LARGEST_FILE = 2**16


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a run, the same on all ranks.

    Attributes:
        dataset: Data set of points to classify.
        n_samples: Points in all, training and test together.
        noise: Standard deviation of the noise; for blobs, of each blob.
        factor: Radius of the inner circle over that of the outer one.
        test_fraction: Share of the points kept for testing.
        data_seed: Seed of the points and of their split.
        hidden: Widths of the hidden layers.
        activation: Activation after each hidden layer.
        optimizer: Optimizer that takes the steps.
        lr: Learning rate, the same at any number of ranks.
        epochs: Passes over the training points.
        batch_size: GLOBAL batch: samples per step over all ranks; 0 = full batch.
        seed: Seed of the weights and of the order.
        reduction: exact: the same bits on any number of ranks; fast: plain DDP.
        micro_batches: Pieces each global batch is cut into in exact mode; equal in runs to be compared.
        audit_steps: Every N steps, let each rank recompute what another one owns, to find broken hardware; 0 = never.
        device: Device to compute on; auto: cuda if available.
        backend: Communication library; auto: nccl on cuda, else gloo.
        run_dir: Folder of the results; default: runs/<id of the launch, of the Slurm job, or time stamp>.
        resume: auto: continue what is in the run directory; never: discard it, once; must: fail without a checkpoint.
        checkpoint_seconds: Save when this much time has passed since the last checkpoint.
        checkpoint_steps: Also save every N global steps; 0 = by time alone.
        log_every: Epochs between console lines.
        wandb: Weights & Biases; auto: online where credentials are configured, else offline.
        wandb_project: Project of the tracked run.
        plots: Draw the decision boundary and the learning curves at the end of the run.
        fault: Rehearse a fault: kill, raise, stall, nan, flip or warp, as KIND@RANK:STEP, once per run directory; flip
            and warp also :STEP+, from there on.
        threads: CPU threads per rank.
        timeout: Seconds that a collective may take.

    """

    dataset: Literal["circles", "moons", "blobs"] = "circles"
    n_samples: int = 1000
    noise: float = 0.03
    factor: float = 0.8
    test_fraction: float = 0.2
    data_seed: int = 42
    hidden: tuple[int, ...] = (10, 10)
    activation: Literal["relu", "none"] = "relu"
    optimizer: Literal["sgd", "adam"] = "adam"
    lr: float = 0.01
    epochs: int = 60
    batch_size: int = 64
    seed: int = 42
    reduction: Literal["exact", "fast"] = "exact"
    micro_batches: int = 8
    audit_steps: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    run_dir: Path | None = None
    resume: Literal["auto", "never", "must"] = "auto"
    checkpoint_seconds: float = 30.0
    checkpoint_steps: int = 0
    log_every: int = 10
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    wandb_project: str = "ddp_circles"
    plots: bool = True
    fault: str | None = None
    threads: int = 1
    timeout: float = 300.0

    def __post_init__(self) -> None:
        """Accept text for a path and a list for a tuple, and check all values."""
        if isinstance(self.hidden, list):
            object.__setattr__(self, "hidden", tuple(self.hidden))
        with naming_arguments():
            if isinstance(self.run_dir, (str, Path)):
                object.__setattr__(self, "run_dir", _folder(self.run_dir))
            _check(self)

    @property
    def points(self) -> dict[str, Any]:
        """The settings that the points follow from, by name."""
        names = ("dataset", "n_samples", "noise", "factor", "test_fraction", "data_seed")
        return {name: getattr(self, name) for name in names}

    @property
    def lasting(self) -> dict[str, Any]:
        """The settings that a run cannot change when it is continued, by name."""
        names = (
            "hidden", "activation", "optimizer", "lr", "batch_size", "seed", "reduction", "micro_batches", "threads"
        )  # fmt: skip
        return self.points | {name: getattr(self, name) for name in names}

    def to_toml(self) -> str:
        """The settings as TOML, without those that belong to one start of a run and not to the run."""
        values = dataclasses.asdict(self)
        for name in ("run_dir", "resume", "fault"):
            del values[name]
        return tomli_w.dumps(values)


_TUTORIAL = {"optimizer": "sgd", "lr": 0.1, "batch_size": 0}
_BLOBS = {"dataset": "blobs", "noise": 1.5, "hidden": (8, 8), "activation": "none"}
RECIPES: dict[str, dict[str, Any]] = {
    "circles": {},
    "model_0": _TUTORIAL | {"hidden": (5,), "activation": "none", "epochs": 100, "log_every": 10},
    "model_1": _TUTORIAL | {"hidden": (10, 10), "activation": "none", "epochs": 1000, "log_every": 100},
    "model_3": _TUTORIAL | {"hidden": (10, 10), "activation": "relu", "epochs": 1000, "log_every": 100},
    "model_4": _TUTORIAL | _BLOBS | {"epochs": 100, "log_every": 10},
}

_TYPES: dict[Any, tuple[Any, str]] = {
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    bool: (bool, "true or false"),
}
_WHOLE_RANGES = {
    "n_samples": (2, 2**31 - 1),
    "data_seed": (0, 2**32 - 1),
    "epochs": (1, math.inf),
    "batch_size": (0, math.inf),
    "seed": (0, 2**32 - 1),
    "micro_batches": (1, 2**16),
    "audit_steps": (0, math.inf),
    "checkpoint_steps": (0, math.inf),
    "log_every": (1, math.inf),
    "threads": (1, MOST_THREADS),
}


def _check(config: Config) -> None:
    """Check types, then ranges; raises `UserError` naming the flag."""

    def require(holds: bool, field: str, expected: str) -> None:
        if not holds:
            raise UserError(f"--{field.replace('_', '-')} must be {expected}, got {getattr(config, field)!r}")

    for known in dataclasses.fields(config):
        value, kind = getattr(config, known.name), known.type
        if get_origin(kind) is Literal:
            holds, expected = value in get_args(kind), f"one of {', '.join(get_args(kind))}"
        elif kind == tuple[int, ...]:
            holds, expected = isinstance(value, tuple) and all(type(item) is int for item in value), "whole numbers"
        else:
            types, expected = _TYPES.get(kind, (kind, "text"))
            holds = isinstance(value, types) and (kind is bool or not isinstance(value, bool))
        require(holds, known.name, expected)
    for field, (least, most) in _WHOLE_RANGES.items():
        expected = f"{least} or more" if most == math.inf else f"between {least} and {most}"
        require(least <= getattr(config, field) <= most, field, expected)
    for field in ("lr", "checkpoint_seconds"):
        require(0 < getattr(config, field) < math.inf, field, "a finite number above 0")
    require(0 < config.timeout <= LONGEST_TIMEOUT, "timeout", f"above 0 and at most {LONGEST_TIMEOUT}")
    require(0 <= config.noise < math.inf, "noise", "a finite number, 0 or more")
    require(0 <= config.factor < 1, "factor", "at least 0 and below 1")
    require(0 < config.test_fraction < 1, "test_fraction", "between 0 and 1, both excluded")
    tested = math.ceil(config.n_samples * config.test_fraction)
    require(1 <= tested < config.n_samples, "test_fraction", "such that both parts have a sample")
    require(all(1 <= width <= 65536 for width in config.hidden), "hidden", "between 1 and 65536 in each layer")
    if len(config.hidden) > MOST_LAYERS:
        raise UserError(f"--hidden must have at most {MOST_LAYERS} widths, got {len(config.hidden)}")
    require(config.wandb_project.strip() != "", "wandb_project", "a name")
    if config.audit_steps and config.reduction == "fast":
        raise UserError(f"--audit-steps {config.audit_steps} needs --reduction exact: other sums have no right answer")
    if config.fault is not None:
        Fault.parse(config.fault)


def _folder(given: str | Path) -> Path:
    """The folder that `given` means, with its ~ expanded; raises `UserError` for one that no run can be kept in."""
    if re.match(r"[A-Za-z][\w+.-]+:/", str(given)):
        raise UserError(f"--run-dir must be a folder of a mounted file system, got {str(given)!r}")
    if given == "":
        raise UserError("--run-dir must name a folder, got nothing")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:  # no such user, or nobody knows this one's home
        raise UserError(f"--run-dir {given}: {error}") from None


FLAGS_SPOKEN = ContextVar("FLAGS_SPOKEN", default=False)
"""True in the command line whose flags are the fields; everywhere else messages name arguments."""
_VALUES: dict[Any, str] = {int: r"\d+", float: r"\d[\d.e+-]*\b", Path | None: r"\S*/\S*"}


def in_arguments(text: str) -> str:
    """Spell flags as arguments of `Config`, `batch_size=64` for `--batch-size 64`, where no flags are spoken."""
    for field in () if FLAGS_SPOKEN.get() else dataclasses.fields(Config):
        value, quote = _VALUES.get(field.type, "(?!)"), ""
        if get_origin(field.type) is Literal:
            value, quote = rf"(?:{'|'.join(get_args(field.type))})\b(?! be\b)", '"'
        flag = rf"--{field.name.replace('_', '-')}(?![\w-])"
        text = re.sub(f"{flag} ({value})", rf"{field.name}={quote}\1{quote}", text)
        text = re.sub(flag, f"{field.name}=", text)
    return text


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Spell a `UserError` for callers from Python, whose program ends without a traceback if it is not caught."""
    try:
        yield
    except UserError as error:
        if FLAGS_SPOKEN.get():
            raise
        refuse_uncaught()
        raise type(error)(in_arguments(str(error))) from None


def flags_of(settings: Any) -> dict[str, object]:
    """All `settings` of a program, a dataclass, by flag."""
    names = [field.name for field in dataclasses.fields(settings)]
    return {f"--{name.replace('_', '-')}": getattr(settings, name) for name in names}


def recipe(name: str, **changes: Any) -> Config:
    """The recipe's full set of defaults with `changes` on top; raises `UserError` for an unknown name."""
    if name not in RECIPES:
        raise UserError(f"--recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return Config(**(RECIPES[name] | changes))


def read_toml(path: Path) -> dict[str, Any]:
    """The fields named in a TOML file; raises `UserError` for a file or a key that cannot be used."""
    try:
        values = tomllib.loads(read_text(path, LARGEST_FILE))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--config {path} cannot be read: {reason}") from None
    known = {field.name for field in dataclasses.fields(Config)}
    for key in values:
        if key not in known:
            raise UserError(f"--config {path}: unknown key {key!r}; known are {', '.join(sorted(known))}")
    try:
        Config(**values)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
    return values
