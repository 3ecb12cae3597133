"""The trainer's side of Weights & Biases: starts the program that copies the run. Imports neither wandb nor torch."""

import configparser
import contextlib
import json
import netrc
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import SystemRandom
from string import ascii_lowercase, digits
from typing import IO, Any, Literal
from urllib.parse import urlsplit

from ddp_circles.job.stop import STOP_SIGNALS
from ddp_circles.reading import LONGEST, opened, read_text
from ddp_circles.records.files import write_atomically
from ddp_circles.terminal import beside_python, remark, warn

Mode = Literal["online", "offline", "disabled"]
READY_SECONDS = 60.0
"""Longest time from a start of the program until it has begun its copy."""
FINISHED_SECONDS = 60.0
"""Longest wait for the uploads of a finished run."""
UNFINISHED_SECONDS = 3.0
"""Longest wait at the end of a run that was stopped, or failed."""
RUN_FILE = ".wandb.json"
"""The run's id, project and configuration, for `wandb_copy`, now or later."""
KEPT_VARIABLES = (
    "WANDB_ENTITY", "WANDB_JOB_TYPE", "WANDB_NAME", "WANDB_NOTES", "WANDB_RUN_GROUP", "WANDB_SWEEP_ID", "WANDB_TAGS"
)  # fmt: skip
"""Variables that say what the run is: a later copy, on another machine perhaps, has them from `RUN_FILE`."""


class WandbFollower:
    """The program that follows a run's metrics file and copies it to Weights & Biases.

    Nothing but `wait` takes time. Whatever goes wrong is one warning, and there is no second try.
    """

    def __init__(self, run_dir: Path, *, mode: Mode, project: str, run_id: str, config: dict[str, Any]) -> None:
        self._run_dir = run_dir
        self._mode = mode
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        self._run = {"run_id": run_id, "project": project, "config": config, "variables": kept}
        self._process: subprocess.Popen[bytes] | None = None
        """The program while it is followed."""
        self._output: IO[bytes] | None = None
        self._said_where = False
        self._ready_by = time.monotonic() + READY_SECONDS

    def start(self) -> None:
        """Note what a copy needs besides the metrics, and start the program unless the mode is `disabled`."""
        try:
            content = json.dumps(self._run, indent=2, default=_spell_path).encode()
            write_atomically(self._run_dir / RUN_FILE, content)
        except OSError as error:
            warn(f"{self._run_dir / RUN_FILE} cannot be written ({error}): no copy at Weights & Biases from here on")
            return
        if self._mode == "disabled":
            return
        own = self._run["run_id"]
        for name, value in (("WANDB_RUN_ID", own), ("WANDB_RESUME", "allow")):
            if (given := os.environ.get(name) or value) != value:
                warn(f"{name}={given} is ignored: Weights & Biases gets this run as {own}, also when it is continued")
        try:
            self._output = tempfile.TemporaryFile()  # noqa: SIM115
            self._process = _start_program(self._run_dir, self._mode, self._output)
        except OSError as error:
            self._give_up(f"its program cannot be started: {error}")

    def look(self) -> None:
        """Pass on where the copy is, once, and warn if the program has failed or is not ready in time."""
        if self._process is None or self._output is None:
            return
        code = self._process.poll()
        if code is None and self._said_where:
            return
        lines = os.pread(self._output.fileno(), 2**20, 0).decode(errors="replace").splitlines()
        where = next((line for line in lines if line.startswith("wandb: ")), None)
        if where and not self._said_where:
            self._said_where = True
            remark(where)
        if code == 0:
            self._let_go()
        elif code is not None:
            ended = f"its program ended with {code}" if code > 0 else f"its program was killed by signal {-code}"
            self._give_up(lines[-1].removeprefix("error: ") if code > 0 and lines else ended)
        elif not self._said_where and time.monotonic() > self._ready_by:
            self._kill(self._process, f"not ready after {READY_SECONDS:.0f} s")

    def wait(self, seconds: float) -> None:
        """Wait for the program's end; kill it after `seconds`. Does nothing the second time."""
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self.look()
        if self._process is not None:
            self._kill(self._process, f"its copy was not complete after {seconds:.0f} s")

    def _kill(self, process: "subprocess.Popen[bytes]", cause: str) -> None:
        os.killpg(process.pid, signal.SIGKILL)  # wandb's own service ends itself after that
        process.wait()
        self._give_up(cause)

    def _give_up(self, cause: str) -> None:
        python, folder = beside_python(Path(sys.executable).name), shlex.quote(str(self._run_dir))
        later = f"`{python} -m ddp_circles.records.wandb_copy {folder}` copies it later"
        warn(f"Weights & Biases is left out from here on ({cause}); metrics.jsonl has everything, and {later}")
        self._let_go()

    def _let_go(self) -> None:
        self._process = None
        if self._output is not None:
            self._output.close()


def _spell_path(path: Path) -> str:
    """The `path` in UTF-8, which wandb insists on, whatever this process takes names for."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _start_program(run_dir: Path, mode: Mode, output: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Start `wandb_copy` with the import paths of this process, out of reach of the job's signals."""
    command = [sys.executable, "-P", "-W", "ignore", "-m", "ddp_circles.records.wandb_copy", str(run_dir)]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # inherited by all that the program starts
    try:
        return subprocess.Popen(
            [*command, "--wandb", mode, "--follow", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"},
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def new_run_id(*, first: bool) -> str:
    """A short id that no other run has; for the `first` run of a process, WANDB_RUN_ID, which a sweep's agent sets."""
    given = os.environ.get("WANDB_RUN_ID") if first else None
    return given or "".join(SystemRandom().choices(ascii_lowercase + digits, k=8))


def choose_project(flag: str, *, default: str) -> str:
    """The `flag` unless it says the `default`, then WANDB_PROJECT, then wandb's settings file."""
    named = os.environ.get("WANDB_PROJECT") or _wandb_settings().get("project")
    return named if named and flag == default else flag


def choose_mode(mode: str) -> Mode:
    """Resolve `--wandb` for this machine; `auto` asks the environment and files, never a person or a server.

    `auto` is what WANDB_DISABLED, WANDB_MODE or the mode in wandb's settings file say, else online where there are
    credentials for the server, else offline.
    """
    if mode == "auto":
        settings = _wandb_settings()
        disabled = "disabled" if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "on", "true", "yes") else ""
        mode = disabled or os.environ.get("WANDB_MODE") or settings.get("mode") or ""
        mode = mode or ("online" if _has_wandb_credentials(settings) else "offline")
    if mode in ("online", "run", "shared"):
        return "online"
    return "disabled" if mode == "disabled" else "offline"


def _wandb_settings() -> dict[str, str]:
    folder = expanded(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
    parser = configparser.ConfigParser(interpolation=None)
    for file in (folder / "settings", wandb_folder(Path()) / "settings"):
        with contextlib.suppress(OSError, configparser.Error):
            parser.read_string(read_text(file, LONGEST))
    return dict(parser["default"]) if parser.has_section("default") else {}


def _has_wandb_credentials(settings: dict[str, str]) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.get("api_key"):
        return True
    server = os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or "https://api.wandb.ai"
    for name in [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]:
        file = expanded(name)
        with contextlib.suppress(OSError, netrc.NetrcParseError, ValueError):
            with opened(file, LONGEST):
                pass  # it is a file, and not a pipe that would be waited for
            login = netrc.netrc(file).authenticators(urlsplit(server).netloc)
            return login is not None and bool(login[2])
    return False


def wandb_folder(run_dir: Path) -> Path:
    """The folder that wandb keeps its files in: that of the run, unless WANDB_DIR names another."""
    return expanded(os.environ.get("WANDB_DIR") or str(run_dir)) / "wandb"


def expanded(name: str) -> Path:
    """The path `name` with the home for `~`, which stays where there is none: no such file will be found."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises there
