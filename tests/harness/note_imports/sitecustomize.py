"""Leaves a note, in the folder NOTES, about each process that has this folder on its path and its heavy imports."""

import os
import sys
from pathlib import Path
from typing import Any

HEAVY = {"wandb", "matplotlib", "sklearn"}
ROLE = "tracking" if "ddp_circles.records.wandb_copy" in sys.orig_argv else "training"
PROCESS = f"{os.environ.get('RANK', 'launcher')}-{ROLE}"


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "import" and arguments[0] in HEAVY:
        Path(os.environ["NOTES"], f"{PROCESS}-{arguments[0]}").touch()


sys.addaudithook(note)
Path(os.environ["NOTES"], PROCESS).touch()
