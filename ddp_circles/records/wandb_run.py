"""A run at Weights & Biases, or its offline copy, made from `metrics.jsonl` and the files beside it."""

import errno
import glob
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import wandb
from safetensors import SafetensorError, safe_open

from ddp_circles.errors import FileError
from ddp_circles.reading import LONGEST, opened, read_json, read_text
from ddp_circles.records.metrics_file import LONGEST_METRICS, Row, parse_rows
from ddp_circles.records.wandb_follower import FINISHED_SECONDS, wandb_folder
from ddp_circles.terminal import beside_python, visible

LONGEST_PICTURE = 2**26
"""In bytes."""
SETTINGS: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "init_timeout": 15.0,
    "finish_timeout": FINISHED_SECONDS,
    "allow_val_change": True,  # a continued run may have more epochs
    "symlink": False,
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "label_disable": True,
    "sagemaker_disable": True,
    "save_code": False,
    "use_dot_wandb": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}
"""Nothing printed, asked or collected but what is logged; names that the installed version lacks are left out."""


def copy_run(
    run_dir: Path,
    *,
    mode: Literal["online", "offline"],
    run_id: str,
    config: dict[str, Any],
    trainer: int | None,
) -> None:
    """Log the epochs in `run_dir` until the run is over or `trainer` is no longer this process's parent.

    WANDB_RUN_ID must say `run_id`; project and all else that the variables say is wandb's own matter.
    Online, epochs that the server has are passed over. Offline, the copy is built anew, and then those of earlier
    starts are removed: `wandb sync` would let one folder replace the epochs of another.
    """
    folder = wandb_folder(run_dir)
    earlier = _offline_copies(folder, run_id) if mode == "offline" else []
    while earlier and _offline_copies(folder, run_id, begun=time.strftime("%Y%m%d_%H%M%S")):
        time.sleep(0.1)  # the new folder is named after the second it is begun in
    run = wandb.init(
        mode=mode,
        resume="allow",
        dir=folder.parent,
        config=config,
        settings=wandb.Settings(**{name: SETTINGS[name] for name in SETTINGS if name in wandb.Settings.model_fields}),
    )
    # By a pattern: the folder's name begins with the time, and changes when the run goes on.
    upload = f"{beside_python('wandb')} sync {shlex.quote(str(folder))}/offline-run-*-{shlex.quote(run_id)}"
    print(visible(f"wandb: {run.url or f'offline; to upload: {upload}'}"), flush=True)
    for name in ("train/*", "test/*", "plots/*", "lr", "lr/*", "seconds", "step"):
        run.define_metric(name, step_metric="epoch")
    last_step = None
    for rows in _follow(run_dir, trainer):
        for row in rows:
            step = int(row["step"])
            if step >= run.starting_step and (last_step is None or step > last_step):
                run.log(row, step=step)
                last_step = step
        while earlier:  # the new copy has what they have
            shutil.rmtree(earlier.pop(), ignore_errors=True)
    finished = _read_status(run_dir) == "finished"
    if finished:
        _complete(run, run_dir, last_step, drawn=config.get("plots", True))
    run.finish(exit_code=0 if finished else 1)


def _offline_copies(folder: Path, run_id: str, begun: str = "????????_??????") -> list[Path]:
    """The folders that `wandb sync` would take for this run."""
    found = folder.glob(f"offline-run-{begun}-{glob.escape(run_id)}")
    return [path for path in found if not path.is_symlink()]


def _follow(run_dir: Path, trainer: int | None) -> Iterator[list[Row]]:
    """The rows of the metrics file as they are written, until there will be no more.

    The file stays open: a later start of the run puts another one in its place if it drops lines.
    """
    over, torn_line = False, b""
    with opened(run_dir / "metrics.jsonl", LONGEST_METRICS) as file:
        while not over:
            # Before the read, since all rows are there when the run is over.
            over = _read_status(run_dir) in ("finished", "stopped", "failed") or os.getppid() != trainer
            lines, _, torn_line = (torn_line + file.read()).rpartition(b"\n")
            yield parse_rows(lines)
            if not over:
                time.sleep(0.2)


def _read_status(run_dir: Path) -> str:
    return read_text(run_dir / "status", LONGEST).strip()


def _complete(run: wandb.Run, run_dir: Path, last_step: int | None, *, drawn: bool) -> None:
    """Add what a finished run leaves beside its epochs; `last_step` is None if the server had those."""
    pictures = sorted(run_dir.glob("plots/*.png")) if drawn else []  # else of a time before the run went on
    images = {}
    for path in pictures:
        with opened(path, LONGEST_PICTURE):
            images[f"plots/{path.stem}"] = wandb.Image(str(path))
    on_server = last_step is None and all(run.summary.get(name) for name in images)  # type: ignore[no-untyped-call]
    if images and not on_server:
        run.log(images, step=last_step)  # beside the last epoch's figures, which are still open
    run.summary.update(read_json(run_dir / "summary.json", LONGEST))
    weights = run_dir / "model.safetensors"
    try:
        with opened(weights), safe_open(weights, framework="numpy"):
            pass  # a file of another length than its head says is not read to its end
    except SafetensorError as error:
        raise FileError(errno.EILSEQ, f"it is no model, or damaged: {error}", str(weights)) from None
    model = wandb.Artifact(f"model-{run.id}", type="model")
    model.add_file(str(weights), policy="immutable", skip_cache=True)
    run.log_artifact(model)
