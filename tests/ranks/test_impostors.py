"""Something else where a file of a run should be: one message or none, in bounded time, for every reader of the run."""

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddp_circles import predict
from ddp_circles import train as trainer
from ddp_circles.records import wandb_copy, wandb_run
from tests.harness.ranks import forget_launcher, run_ranks
from tests.harness.runs import PLAIN, QUIET, finish
from tests.harness.tracked import PNG, stand_in_for_wandb

SMALL = ("--n-samples=50", "--batch-size=16", "--epochs=1", "--micro-batches=2", "--checkpoint-steps=2")
FILES = (
    "status", "config.toml", "metrics.jsonl", "summary.json", "model.safetensors", "checkpoints", "newest", "fault",
    "plots", "plots/curves.png", "wandb", ".lock", ".lock.holder", ".wandb.json",
    ".wandb.lock",
)  # fmt: skip
"""`newest` stands for the newest checkpoint."""
PARSED = ("config.toml", "metrics.jsonl", "summary.json", "model.safetensors", "newest", ".wandb.json")
"""Those with JSON or TOML in them: what a number in them is matters there alone."""
SECONDS = 20
"""Time for one start of one program, on a busy machine; it takes tenths."""

LONGEST_OUTPUT = 3000


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 60 * 2**30)


def content(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


KINDS: dict[str, Callable[[Path], Any]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "zeros without end": link("/dev/zero"),
    "full device": link("/dev/full"),
    "link to nowhere": link("/nowhere"),
    "huge": huge,
    "empty": content(b""),
    "no UTF-8": content(b"\xff\xfe{}\n"),
    "infinite": content(b'{"epoch": 1e999, "step": 1e999, "run_id": 1e999, "config": 1e999}\n'),
    "not a number": content(b'{"epoch": NaN, "step": NaN}\n'),
    "infinite setting": content(b"lr = inf\nepochs = 1e999\n"),
    "deep": content(b"[" * 10**6),
    "deep value": content(b"lr = " + b"[" * 10**6),
}
OTHER_CONTENT = list(KINDS)[-5:]
NUMBERS = ("infinite", "not a number", "infinite setting")


def tamper(run_dir: Path, name: str, put: Callable[[Path], Any]) -> Path:
    """Put something else in the place of the file `name`; returns its path."""
    path = max((run_dir / "checkpoints").iterdir()) if name == "newest" else run_dir / name
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    put(path)
    return path


def start(program: str, run_dir: Path) -> int | None:
    """Run the command line of `program`; returns its exit code."""
    if program == "predict":
        return predict.run([str(run_dir), "--show", "2"])
    words = ["--run-dir", str(run_dir), *QUIET, *SMALL, "--epochs=2"] if program == "train" else [str(run_dir)]
    sys.argv = [program, *words]
    try:
        trainer.main() if program == "train" else wandb_copy.main()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    return 0


def try_all(program: str, template: Path, folder: Path, kind: str) -> list[str]:
    """Start `program` on copies of a run with an impostor of the `kind` in each place; returns what went wrong."""
    forget_launcher()
    os.environ["WANDB_MODE"] = "offline"
    setattr(wandb_run, "wandb", stand_in_for_wandb())  # noqa: B010 - a plain assignment has another type
    wrong, log = [], Path("/proc/self/fd/1").resolve()
    for name in PARSED if kind in NUMBERS else FILES:
        run_dir = folder / name.replace("/", " ")
        shutil.copytree(template, run_dir)
        path = tamper(run_dir, name, KINDS[kind])
        before = log.stat().st_size
        signal.signal(signal.SIGALRM, give_up)
        signal.alarm(SECONDS)
        try:
            code = start(program, run_dir)
        except BaseException:
            code = None
            traceback.print_exc()
        signal.alarm(0)
        said = log.read_bytes()[before:].decode(errors="replace")
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        good = (code, len(errors)) == (0, 0) or ((code, len(errors)) == (2, 1) and path.name in errors[0])
        if not good or "Traceback" in said or len(said) > LONGEST_OUTPUT:
            wrong.append(f"{program}, {kind} as {name}: code {code}\n{said[-2000:]}")
    return wrong


def give_up(*_: Any) -> None:
    raise TimeoutError


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which is to be continued, read, and copied."""
    run_dir = tmp_path_factory.mktemp("template") / "run"
    finish(PLAIN, run_dir, *SMALL)
    (run_dir / "plots").mkdir()
    (run_dir / "plots" / "curves.png").write_bytes(PNG)
    return run_dir


@pytest.mark.parametrize(
    "program, kind",
    [
        pytest.param(program, kind, marks=pytest.mark.thorough if program == "train" and kind in OTHER_CONTENT else ())
        for program in ("train", "predict", "wandb_copy")
        for kind in KINDS
    ],
)
def test_an_impostor_is_one_message_or_none(template: Path, tmp_path: Path, program: str, kind: str) -> None:
    (wrong,) = run_ranks(try_all, 1, program, template, tmp_path, kind)
    assert not wrong, "\n".join(wrong)
