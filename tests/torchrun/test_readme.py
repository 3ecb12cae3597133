"""A newcomer's hour: the README's commands, word for word, one after the other in one shell, and what they print."""

import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.harness.runs import Command, status

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TESTS = "bash launch/test.sh"
"""The command that this very test is a part of."""


def blocks(language: str) -> list[str]:
    """The README's code blocks of `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the project's launch scripts, its environment and its examples."""
    for part in ("launch", "examples"):
        (tmp_path / part).symlink_to(ROOT / part)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def newcomers_environment() -> dict[str, str]:
    """This one, but for the virtual environment."""
    own = str(Path(sys.prefix) / "bin")
    path = ":".join(entry for entry in os.environ["PATH"].split(":") if entry != own)
    return {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | {"PATH": path}


@pytest.mark.thorough
@pytest.mark.timeout(1300)
def test_every_command_does_what_it_says(folder: Path) -> None:
    commands = [block for block in blocks("bash") if not block.startswith(TESTS)]
    assert len(commands) >= 6
    script = "".join(f"echo '### {number}'\n{command}" for number, command in enumerate(commands))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder, env=newcomers_environment(), capture_output=True, text=True, timeout=1200, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for command, printed in zip(commands, re.split(r"^### \d+\n", done.stdout, flags=re.MULTILINE)[1:], strict=True):
        hashes = re.findall(r"^([0-9a-f]{64})  ", printed, re.MULTILINE)
        assert len(set(hashes)) == ("sha256sum" in command), printed


def _has_trained(log: Path) -> bool:
    return "Epoch: " in log.read_text()


@pytest.mark.thorough
def test_a_stopped_training_is_continued_by_what_it_prints(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the environment, as after the README's first command."""
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    words = "bash launch/train.sh --epochs=100000 --wandb=disabled --no-plots"
    for number in range(2):
        log = folder / f"log{number}"
        with Command(log, "bash", "-c", f"exec {words}", cwd=folder, variables=newcomers_environment()) as command:
            command.wait_until(partial(_has_trained, log))
            command.signal(signal.SIGTERM)
            command.wait(60)
        (said,) = [line for line in log.read_text().splitlines() if "; to continue: " in line]
        words = said.partition("; to continue: ")[2]
        assert words.startswith("bash launch/train.sh --epochs=100000")
    (run_dir,) = (folder / "runs").iterdir()
    assert status(run_dir) == "stopped"
    assert "continue after step" in log.read_text()
