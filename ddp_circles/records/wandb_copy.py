"""Where a run's figures go: a JSON Lines file, which is the truth, the console, and Weights & Biases, which is a copy.

Rank 0 alone has trackers. Weights & Biases lives in a process of its own, so that neither its import nor a server that
does not answer costs the training a moment, and so that ending it is as simple as ending a process.
"""

import contextlib
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    pass

Row = dict[str, float | int]
"""One epoch's line; its keys are those of metrics.jsonl."""
Mode = Literal["online", "offline", "disabled"]

START_SECONDS = 60.0
"""How long the process of Weights & Biases may take until it is ready; nothing waits for it meanwhile."""
SERVER_SECONDS = 15.0
"""How long the server may take to answer the first call."""
FINISH_SECONDS = 60.0
"""How long the end of a finished run waits for uploads."""
CLOSE_SECONDS = 3.0
"""How long a run that was stopped, or failed, waits for them."""
ORPHAN_SECONDS = 5.0
"""How long the process of Weights & Biases outlives a training that went down without a word."""
LEAVE_SECONDS = 2.0
BAR_SECONDS = 0.1
"""Time between two pictures of the progress bar, at the least."""


class WandbRun:
    """The run at Weights & Biases, or its offline copy in `folder`/wandb, held by a process of its own.

    `earlier` are the epochs that the metrics file holds already: those which an earlier start of the run `run_id` got
    across are not logged again, the others are. Whatever goes wrong is one warning, and there is no second try.
    """

    def __init__(
        self,
        *,
        mode: Literal["online", "offline"],
        project: str,
        run_id: str,
        config: dict[str, Any],
        folder: Path,
        earlier: Sequence[Row],
    ) -> None:
        self._ready = False
        self._to_send = bytearray()
        self._heard = b""
        self._start_by = time.monotonic() + START_SECONDS
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = _start_wandb_process()
        except OSError as error:
            self._give_up(f"its process cannot be started: {error}")
        plain_config = json.loads(json.dumps(config, default=str))
        opening = {"mode": mode, "project": project, "run_id": run_id, "config": plain_config}
        self._send(("open", opening | {"folder": str(folder.resolve())}), *(("log", row) for row in earlier))

    def log(self, row: Row) -> None:
        """Hand the line over; what does not fit into the pipe waits for the next call."""
        self._send(("log", row))

    def flush(self) -> None:
        """Do nothing: a copy need not be durable, the next start completes it."""

    def finish(self, summary: dict[str, Any], files: list[Path]) -> None:
        """Hand over the rest, and wait for the uploads, though not for ever."""
        self._end("finish", {"summary": summary, "files": [str(path.resolve()) for path in files]}, FINISH_SECONDS)

    def close(self) -> None:
        """Leave the run unfinished, to be continued; does nothing after `finish`."""
        self._end("close", {}, CLOSE_SECONDS)

    def _send(self, *messages: tuple[str, dict[str, Any]]) -> None:
        if self._process is None:
            return
        for message in messages:
            self._to_send += _as_line(message)
        self._exchange(self._process)
        if not self._ready and time.monotonic() > self._start_by:
            self._give_up(f"not ready after {START_SECONDS:.0f} s")

    def _end(self, kind: str, content: dict[str, Any], seconds: float) -> None:
        self._send((kind, content))
        deadline = time.monotonic() + seconds
        while self._process is not None and (left := deadline - time.monotonic()) > 0:
            _wait_for_pipes(self._process, left, sending=bool(self._to_send))
            self._exchange(self._process)
        if self._process is not None:
            self._give_up(f"no end after {seconds:.0f} s")

    def _exchange(self, process: "subprocess.Popen[bytes]") -> None:
        """Send and hear what can be sent and heard without waiting."""
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._to_send:
                del self._to_send[: os.write(process.stdin.fileno(), self._to_send[:65536])]
        with contextlib.suppress(BlockingIOError):
            while heard := os.read(process.stdout.fileno(), 65536):
                self._heard += heard
            self._heard += _as_line(["failed", "its process ended unexpectedly"])
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            self._take(*json.loads(line))

    def _take(self, kind: str, text: str) -> None:
        if self._process is None:
            return
        if kind == "failed":
            self._give_up(text)
        elif kind == "done":
            self._leave()
        else:
            self._ready = True
            with contextlib.suppress(OSError):
                print(f"wandb: {text}", file=sys.stderr, flush=True)

    def _give_up(self, cause: str) -> None:
        warn(f"Weights & Biases is left out from here on ({cause}); metrics.jsonl has everything")
        self._leave(0.0)

    def _leave(self, seconds: float = LEAVE_SECONDS) -> None:
        process, self._process = self._process, None
        self._to_send.clear()
        if process is None:
            return
        with process:  # closes the pipes and takes the exit code in
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()


def _start_wandb_process() -> "subprocess.Popen[bytes]":
    """Start this module's `serve` with the import paths of this process, out of reach of the terminal's signals."""
    environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_SERVICE")}
    environment |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    code = "import sys; sys.path[:] = sys.argv[1:]; from ddp_circles.tracking import serve; serve()"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env=environment,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    os.set_blocking(process.stdin.fileno(), False)
    os.set_blocking(process.stdout.fileno(), False)
    return process


def _wait_for_pipes(process: "subprocess.Popen[bytes]", seconds: float, *, sending: bool) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    pipes = select.poll()  # unlike select, it takes any number of open files
    pipes.register(process.stdout, select.POLLIN)
    if sending:
        pipes.register(process.stdin, select.POLLOUT)
    pipes.poll(seconds * 1000)


def serve() -> None:
    """Hold a run of Weights & Biases for the process at the other end of standard input and output.

    Each line that comes in is a JSON array of a word (`open`, `log`, `finish`, `close`) and what belongs to it; each
    one that goes out, of a word (`ready`, `done`, `failed`) and a text.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # a job that is told to stop says so itself
    inbox, outbox, nowhere = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)  # what wandb prints, and what it would ask
    os.dup2(nowhere, 1)
    messages: SimpleQueue[tuple[str, dict[str, Any]]] = SimpleQueue()
    threading.Thread(target=_receive, args=(inbox, messages), daemon=True).start()

    def say(kind: str, text: str = "") -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(outbox, _as_line([kind, text]))

    try:
        _, opening = messages.get()
        with _only_one(Path(opening["folder"])):
            copy = _WandbCopy(**opening)
            say("ready", copy.whereabouts)
            copy.follow(messages)
        say("done")
    except Exception as error:
        say("failed", _without_secrets(" ".join([f"{type(error).__name__}:", *str(error).split()]).rstrip(":"))[:300])


def _receive(pipe: int, messages: "SimpleQueue[tuple[str, dict[str, Any]]]") -> None:
    """Take messages in as they come, so that the sender never waits; if it dies, end this process soon."""
    heard = b""
    while chunk := os.read(pipe, 65536):
        *lines, heard = (heard + chunk).split(b"\n")
        for line in lines:
            messages.put(json.loads(line))
    messages.put(("close", {}))
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Let the process of an earlier start, whose training was killed, write its last lines first."""
    from filelock import FileLock, Timeout

    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "wandb" / ".lock")
    with contextlib.suppress(Timeout, OSError):  # then at worst an epoch is logged twice
        lock.acquire(timeout=ORPHAN_SECONDS)
    try:
        yield
    finally:
        lock.release()


class _WandbCopy:
    """The run inside the process that holds it."""

    def __init__(self, *, mode: Mode, project: str, run_id: str, config: dict[str, Any], folder: str) -> None:
        import wandb

        offline_step = _next_step(Path(folder), run_id) if mode == "offline" else 0
        settings = {name: value for name, value in _SETTINGS.items() if name in wandb.Settings.model_fields}
        self._run = wandb.init(
            mode=mode,
            project=project,
            id=run_id,
            resume="allow",
            dir=folder,
            config=config,
            settings=wandb.Settings(**settings),
        )
        self._next_step = self._run.starting_step if mode == "online" else offline_step
        """Where the run goes on; the lines before it got across in an earlier start."""
        self._last_step: int | None = None
        where = Path(self._run.dir).parent
        self.whereabouts = self._run.url or f"offline run in {where}, for `wandb sync`"
        for name in ("train/*", "test/*", "plots/*", "seconds", "step"):
            self._run.define_metric(name, step_metric="epoch")

    def follow(self, messages: "SimpleQueue[tuple[str, dict[str, Any]]]") -> None:
        """Do what the messages say until one ends the run."""
        while True:
            kind, content = messages.get()
            if kind == "log":
                self._log(content)
            elif kind == "finish":
                self._finish(content["summary"], [Path(file) for file in content["files"]])
                return
            else:
                self._run.finish(exit_code=1)
                return

    def _log(self, row: Row) -> None:
        step = int(row["step"])
        if step >= self._next_step:
            self._run.log(row, step=step)
            self._last_step = step

    def _finish(self, summary: dict[str, Any], files: list[Path]) -> None:
        import wandb

        pictures = {f"plots/{path.stem}": wandb.Image(str(path)) for path in files if path.suffix == ".png"}
        if pictures:
            self._run.log(pictures, step=self._last_step)  # beside the last epoch's figures, which are still open
        self._run.summary.update(summary)
        others = [path for path in files if path.suffix != ".png"]
        if others:
            model = wandb.Artifact(f"model-{self._run.id}", type="model")
            for path in others:
                model.add_file(str(path), policy="immutable", skip_cache=True)
            self._run.log_artifact(model)
        self._run.finish()


_SETTINGS: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "init_timeout": SERVER_SECONDS,
    "finish_timeout": FINISH_SECONDS,
    "allow_val_change": True,  # a continued run may have more epochs
    "symlink": False,
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "label_disable": True,
    "sagemaker_disable": True,
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}
"""Nothing printed, asked or collected but what is logged; names that the installed version lacks are left out."""


def _next_step(folder: Path, run_id: str) -> int:
    """The step after the last one in the run's files; what an unclean end kept out of them is not in them."""
    logs = sorted(folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb"))
    return 1 + max((step for log in logs for step in _logged_steps(log.read_bytes())), default=-1)


def _logged_steps(log: bytes) -> Iterator[int]:
    from wandb.proto import wandb_internal_pb2

    for content in _log_records(log):
        record = wandb_internal_pb2.Record.FromString(content)  # type: ignore[attr-defined]
        if record.WhichOneof("record_type") == "history":
            yield record.history.step.num


def _log_records(log: bytes) -> Iterator[bytes]:
    """The whole records of a file of wandb's: LevelDB's log format behind a header of seven bytes.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    block, head, position, record = 32768, struct.Struct("<IHB"), 7, b""
    while position + head.size <= len(log):
        left_in_block = block - position % block
        if left_in_block < head.size:
            position += left_in_block
            continue
        _, length, kind = head.unpack_from(log, position)
        position += head.size
        if kind not in (1, 2, 3, 4) or position + length > len(log):
            return
        record += log[position : position + length]
        position += length
        if kind in (1, 4):
            yield record
            record = b""


def _without_secrets(text: str) -> str:
    for name, value in os.environ.items():
        if re.search("KEY|TOKEN|SECRET|PASSWORD", name) and len(value) >= 8:
            text = text.replace(value, "***")
    return re.sub(r"//[^/\s@]+@", "//***@", text)
