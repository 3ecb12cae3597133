"""Command line: `python -m ddp_circles.records.wandb_copy RUN_DIR` copies a run to Weights & Biases.

The copy is made from the files in the run directory. A training starts this program beside itself; anyone can run it
again later, for instance on a machine with a network. Imports no torch.
"""

import argparse
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ddp_circles.errors import EXIT_BAD_INPUT, FileError, UserError
from ddp_circles.reading import LONGEST, read_json
from ddp_circles.records.files import check_places, how_to_clear
from ddp_circles.records.wandb_follower import KEPT_VARIABLES, RUN_FILE, choose_mode, expanded, wandb_folder
from ddp_circles.terminal import complain, open_streams

LOCK_SECONDS = 30.0
"""Longest wait for an earlier copy to end; longer than `ORPHAN_SECONDS`."""
ORPHAN_SECONDS = 20.0
"""Longest time that this program outlives the training that started it, to copy what there is."""
DESCRIPTION = """Copy a run to Weights & Biases from the files in its run directory: every epoch once and, if the run is
finished, its summary, pictures and model. Runs trained offline or with --wandb disabled can be uploaded this way later,
under the project and run id they were given when they began."""
MODE_HELP = """online: upload; offline: build the copy in RUN_DIR/wandb anew, in place of the one that is there; auto:
online where credentials are configured, else offline"""


def main() -> None:
    """Parse, copy, and leave with 0, with 2 for bad input, or with 1 if the copy failed."""
    open_streams()
    parser = argparse.ArgumentParser(prog="python -m ddp_circles.records.wandb_copy", description=DESCRIPTION)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run that is not training now")
    parser.add_argument("--wandb", choices=["auto", "online", "offline"], default="auto", help=MODE_HELP)
    parser.add_argument("--follow", type=int, help=argparse.SUPPRESS)  # process id of the training to keep up with
    chosen = parser.parse_args()
    try:
        _copy(chosen.run_dir, chosen.wandb, chosen.follow)
    except (UserError, FileError, FileNotFoundError) as error:
        complain(str(error))
        sys.exit(EXIT_BAD_INPUT)
    except (Exception, KeyboardInterrupt) as error:
        cause = " ".join([f"{type(error).__name__}:", *str(error).split()]).rstrip(":")
        complain(without_secrets(cause)[:300])
        sys.exit(1)


def _copy(run_dir: Path, wanted: str, trainer: int | None) -> None:
    run = _read_run(run_dir)
    check_places(run_dir)
    mode = choose_mode(wanted)
    if mode == "disabled":
        raise UserError("Weights & Biases is disabled here: give --wandb online or --wandb offline")
    if trainer is None:
        _refuse_if_training(run_dir)
    else:
        threading.Thread(target=_end_after, args=(trainer,), daemon=True).start()
    os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    # As variables: a sweep's agent has set these two, and within a sweep wandb would not take them from a caller.
    os.environ |= {"WANDB_RUN_ID": run["run_id"], "WANDB_PROJECT": run["project"]}
    os.environ |= run["variables"] | os.environ
    for name in ("WANDB_MODE", "WANDB_SERVICE"):
        os.environ.pop(name, None)
    if expanded("~") == Path("~"):  # a user without a home, as in a container: wandb needs some place for its caches
        os.environ["HOME"] = str(wandb_folder(run_dir).absolute())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nobody is asked for anything
    from ddp_circles.records.wandb_run import copy_run  # noqa: PLC0415 - the seam: wandb is slow to import

    wandb_folder(run_dir).mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / ".wandb.lock", timeout=LOCK_SECONDS)
    try:
        with lock:
            copy_run(run_dir, mode=mode, run_id=run["run_id"], config=run["config"], trainer=trainer)
    except Timeout:
        raise UserError(f"{run_dir} is being copied by another process: wait for it{how_to_clear(lock)}") from None


def _read_run(run_dir: Path) -> dict[str, Any]:
    """The run's `run_id`, `project`, `config` and `variables`."""
    try:
        run = {"variables": {}} | read_json(run_dir / RUN_FILE, LONGEST)
        kinds = {"run_id": str, "project": str, "config": dict, "variables": dict}
        if not all(isinstance(run.get(name), kind) for name, kind in kinds.items()):
            raise UserError(f"{run_dir / RUN_FILE} cannot be read: a training writes {', '.join(kinds)} there")
        # No others: they could load code, or send the user's key to another server.
        run["variables"] = {name: str(value) for name, value in run["variables"].items() if name in KEPT_VARIABLES}
        return {name: run[name] for name in kinds}
    except FileNotFoundError:
        raise UserError(f"{run_dir} is not a run directory: it has no {RUN_FILE}") from None
    except FileError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None


def _refuse_if_training(run_dir: Path) -> None:
    """Raise `UserError` if a training holds the run directory."""
    lock = FileLock(run_dir / ".lock", timeout=0)
    try:
        with lock:
            pass
    except Timeout:
        raise UserError(
            f"{run_dir} is still training: it copies itself, or wait for its end{how_to_clear(lock)}"
        ) from None


def _end_after(trainer: int) -> None:
    """End this process soon after its parent, also from the middle of a call that waits for a server."""
    while os.getppid() == trainer:
        time.sleep(0.5)
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def without_secrets(text: str) -> str:
    """`text` without passwords in addresses and without what secret environment variables hold."""
    for name, value in os.environ.items():
        if re.search("KEY|TOKEN|SECRET|PASSWORD", name) and len(value) >= 8:
            text = text.replace(value, "***")
    return re.sub(r"//[^/\s@]+@", "//***@", text)


if __name__ == "__main__":
    main()
