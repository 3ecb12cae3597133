"""The README's commands, word for word, in the order in which they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TESTS = "bash launch/test.sh"
"""The command that this very test is a part of."""


def blocks(language: str) -> list[str]:
    """The README's code blocks of `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_every_command_does_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    own_model = next(block for block in blocks("python") if "fit(" in block)
    (tmp_path / "own_model.py").write_text(own_model)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    commands = [block for block in blocks("bash") if not block.startswith(TESTS)]
    assert len(commands) >= 5
    for command in commands:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        hashes = re.findall(r"^([0-9a-f]{64})  ", done.stdout, re.MULTILINE)
        assert len(set(hashes)) == ("sha256sum" in command), done.stdout
