"""Starts the program that copies a run to Weights & Biases, and waits for it in bounded time. Imports no wandb."""

import configparser
import contextlib
import netrc
import os
import secrets
import string
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

Mode = Literal["online", "offline", "disabled"]


class WandbFollower:
    """The program that follows the metrics file of `run_dir` and copies it to Weights & Biases."""

    def start(self) -> None:
        """Start the program."""

    def wait(self, seconds: float) -> None:
        """Wait for its end, and end it after `seconds`; does nothing the second time."""


def follow(run_dir: Path, *, mode: Mode, project: str, run_id: str, config: dict[str, Any]) -> WandbFollower | None:
    """The follower of a run; None if `mode` is `disabled`."""
    return None


def new_run_id() -> str:
    """A short id that no other run has."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def choose_mode(mode: str) -> Mode:
    """What `--wandb` comes to on this machine; `auto` asks the environment and files, never a person or a server.

    `auto` is WANDB_MODE or the mode in wandb's settings file where one is set, else online where there are credentials
    for the server, else offline.
    """
    settings = _wandb_settings() if mode == "auto" else {}
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or settings.get("mode") or ""
    if mode in ("online", "run", "shared"):
        return "online"
    if mode == "disabled":
        return "disabled"
    return "online" if mode == "" and _has_wandb_credentials(settings) else "offline"


def _wandb_settings() -> dict[str, str]:
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read([folder / "settings", Path("wandb", "settings")])
    except (OSError, configparser.Error, UnicodeDecodeError):
        return {}
    return dict(parser["default"]) if parser.has_section("default") else {}


def _has_wandb_credentials(settings: dict[str, str]) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.get("api_key"):
        return True
    server = os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or "https://api.wandb.ai"
    candidates = [Path("~/.netrc"), Path("~/_netrc")]
    if os.environ.get("NETRC"):
        candidates = [Path(os.environ["NETRC"])]
    for path in candidates:
        with contextlib.suppress(OSError, netrc.NetrcParseError, RuntimeError, UnicodeDecodeError):
            return bool((netrc.netrc(path.expanduser()).authenticators(urlsplit(server).netloc) or ("", "", ""))[2])
    return False
