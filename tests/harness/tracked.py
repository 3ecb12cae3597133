"""Runs that log and are copied to Weights & Biases, without a training, and the processes that this starts."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest.mock import MagicMock

import psutil

from ddp_circles.records.files import write_atomically
from ddp_circles.records.metrics_file import MetricsFile, Row
from ddp_circles.records.wandb_follower import WandbFollower

RUN_ID = "abcd1234"
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63f80f0001010100"
    "5c3f0b090000000049454e44ae426082"
)


def row(epoch: int) -> Row:
    """The metrics line of an epoch."""
    return {
        "epoch": epoch,
        "step": 13 * (epoch + 1),
        "train/loss": 1 / (epoch + 3),
        "train/accuracy": 427 / 800,
        "test/loss": 0.1 + 0.2,
        "test/accuracy": 0.485,
        "train/samples_per_second": 123456.789,
        "seconds": 0.01,
    }


def stand_in_for_wandb() -> Any:
    """Takes what a copy is made of, and reads the files in it to their end."""
    fake = MagicMock()
    fake.init.return_value.starting_step, fake.init.return_value.dir = 0, "/copy/files"
    fake.Image.side_effect = lambda path: Path(path).read_bytes()
    fake.Artifact.return_value.add_file.side_effect = lambda path, **_: Path(path).read_bytes()
    return fake


class Tracked:
    """A start of a run in `folder`, which drops the lines of `keep` and later epochs."""

    def __init__(
        self, folder: Path, mode: Literal["online", "offline", "disabled"] = "offline", keep: int = 0, **config: Any
    ) -> None:
        self.folder = folder
        self.metrics = MetricsFile(folder / "metrics.jsonl", keep)
        self.follower = WandbFollower(
            folder,
            mode=mode,
            project="circles",
            run_id=RUN_ID,
            config={"lr": 0.01, "hidden": (10, 10), "run_dir": folder, "world_size": 1} | config,
        )
        self._set_status("running")
        self.follower.start()

    def _set_status(self, word: str) -> None:
        write_atomically(self.folder / "status", f"{word}\n".encode())

    @property
    def program(self) -> psutil.Process:
        """The program that copies the run."""
        assert self.follower._process is not None
        return psutil.Process(self.follower._process.pid)

    def log(self, *epochs: int) -> None:
        """Log these epochs."""
        for epoch in epochs:
            self.metrics.log(row(epoch))
            self.follower.look()

    def wait_until_copying(self) -> None:
        """Wait until the program has said where the copy is."""
        wait_until(self._is_copying)

    def _is_copying(self) -> bool:
        self.follower.look()
        return self.follower._said_where

    def finish(self, **summary: Any) -> None:
        """End with all that a finished run leaves."""
        (self.folder / "plots").mkdir(exist_ok=True)
        (self.folder / "plots" / "curves.png").write_bytes(PNG)
        (self.folder / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")  # without a tensor
        (self.folder / "summary.json").write_text(json.dumps(summary))
        self._end("finished", 60)

    def stop(self, seconds: float = 60) -> None:
        """End as a run that was stopped; its copy has `seconds`, more than from a trainer, to end on a busy machine."""
        self._end("stopped", seconds)

    def _end(self, word: str, seconds: float) -> None:
        self._set_status(word)
        self.follower.wait(seconds)
        self.metrics.close()
        self.follower.wait(3)


def track_until_killed(folder: Path, epochs: int, everything: bool) -> None:
    """Log epochs and go down by SIGKILL, together with all that copies the run if `everything`."""
    run = Tracked(folder)
    run.wait_until_copying()
    run.log(*range(epochs))
    if everything:
        for process in (run.program, *run.program.children(recursive=True)):
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def processes_at(home: Path) -> list[str]:
    """The command lines of all processes, orphans included, that have `home` for a home."""
    found = psutil.process_iter(["environ", "status", "cmdline"])
    return [
        " ".join(process.info["cmdline"] or ())
        for process in found
        if process.info["status"] != psutil.STATUS_ZOMBIE and (process.info["environ"] or {}).get("HOME") == str(home)
    ]


def wait_until_none_at(home: Path, seconds: float = 60) -> None:
    """Wait until no process is left that has `home` for a home."""
    wait_until(lambda: not processes_at(home), seconds)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something to come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still waiting after {seconds} s"
        time.sleep(0.05)
