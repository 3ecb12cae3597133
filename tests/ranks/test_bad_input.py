"""A user's mistake is reported once, by rank 0, with the flag to change; every rank leaves with exit code 2."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.harness.ranks import Job, Outcome, train

SIZE = 3
QUIET = ("--wandb", "disabled", "--no-plots", "--epochs", "1")
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def refused(*flags: object, environment: dict[str, str] | None = None) -> list[Outcome]:
    """Start with bad input; once rank 0 has left, the others are told to, as torchrun tells them."""
    with Job(train, SIZE, *flags, environment=environment) as job:
        job.processes[0].join(60)
        job.signal(signal.SIGTERM, *range(1, SIZE))
        return job.wait(30)


def check(outcomes: list[Outcome], flag: str) -> None:
    """Exit code 2 everywhere (a rank that was still starting up may be terminated), and one message."""
    speaker, *others = outcomes
    assert speaker.code == 2, speaker.output
    assert {other.code for other in others} <= {2, -signal.SIGTERM}
    assert [other.output for other in others] == [""] * len(others)
    assert re.search(rf"{re.escape(flag)}\b", speaker.output), speaker.output
    assert "Traceback" not in speaker.output
    assert speaker.output.count("error: ") + speaker.output.count("For full helptext") == 1, speaker.output


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--dataset", "squares"),
        ("--n-samples", "1"),
        ("--noise", "-0.1"),
        ("--factor", "1.5"),
        ("--test-fraction", "1"),
        ("--data-seed", "-1"),
        ("--hidden", "0"),
        ("--activation", "tanh"),
        ("--optimizer", "lion"),
        ("--lr", "0"),
        ("--epochs", "-1"),
        ("--epochs", "many"),
        ("--batch-size", "-1"),
        ("--seed", "4294967296"),
        ("--reduction", "quick"),
        ("--micro-batches", "0"),
        ("--device", "tpu"),
        ("--backend", "mpi"),
        ("--resume", "perhaps"),
        ("--checkpoint-seconds", "0"),
        ("--checkpoint-steps", "-1"),
        ("--log-every", "0"),
        ("--wandb", "sometimes"),
        ("--wandb-project", ""),
        ("--fault", "kill@1"),
        ("--threads", "0"),
        ("--timeout", "nan"),
        ("--recipe", "model_2"),
        ("--learning-rate", "1"),
        ("--config", "/nowhere/config.toml"),
    ],
)
def test_a_bad_flag_is_named_once(flag: str, value: str) -> None:
    check(refused(flag, value), flag)


@pytest.mark.parametrize(
    "content, named",
    [
        ("epochs = -1", "--epochs"),
        ("epochs = 'many'", "--epochs"),
        ("hidden = [1, 'two']", "--hidden"),
        ("plots = 1", "--plots"),
        ("learning_rate = 1", "--config"),
        ("lr = ", "--config"),
    ],
)
def test_a_bad_file_is_named_once(content: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(content)
    outcomes = refused("--config", file)
    check(outcomes, named)
    assert str(file) in outcomes[0].output


@pytest.mark.parametrize(
    "flags, named",
    [
        (("--device", "cuda"), "--device"),
        (("--backend", "nccl"), "--backend"),
        (("--device", "cpu", "--backend", "nccl"), "--backend"),
    ],
)
def test_absent_hardware_is_named_once(flags: tuple[str, ...], named: str, tmp_path: Path) -> None:
    check(refused(*QUIET, "--run-dir", tmp_path, *flags, environment=NO_GPU), named)


@pytest.mark.parametrize(
    "run_dir",
    ["/dev/null/run", "/proc/run", "/sys/run"],  # a file; two file systems in which even root makes no folder
)
def test_a_run_directory_that_cannot_be_written_is_named_once(run_dir: str) -> None:
    check(refused(*QUIET, "--run-dir", run_dir), f"--run-dir {run_dir}")


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    check(refused(*QUIET, "--run-dir", file), f"--run-dir {file}")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", ["metrics.jsonl", "plots"])
def test_something_else_in_the_place_of_a_file_is_named_once(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    check(refused(*QUIET, "--run-dir", tmp_path), str(tmp_path / name))


def test_a_fault_outside_the_world_is_named_once(tmp_path: Path) -> None:
    check(refused(*QUIET, "--run-dir", tmp_path, "--fault", "raise@3:0"), "--fault")


def test_nothing_to_resume_is_named_once(tmp_path: Path) -> None:
    check(refused(*QUIET, "--run-dir", tmp_path, "--resume", "must"), "--resume")


def test_a_folder_that_holds_another_run_is_named_once(tmp_path: Path) -> None:
    with Job(train, 1, *QUIET, "--run-dir", tmp_path) as job:
        assert [outcome.code for outcome in job.wait(60)] == [0]
    before = (tmp_path / "model.safetensors").read_bytes()
    outcomes = refused(*QUIET, "--run-dir", tmp_path, "--lr", "0.5", "--hidden", "3")
    check(outcomes, "--lr")
    assert "--hidden" in outcomes[0].output
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_others_leave_by_themselves() -> None:
    """Without a launcher that ends them, they wait for rank 0's message, but not for ever."""
    started = time.monotonic()
    with Job(train, SIZE, "--epochs", "-1") as job:
        outcomes = job.wait(60)
    assert [outcome.code for outcome in outcomes] == [2] * SIZE
    assert time.monotonic() - started < 30


def test_a_launch_that_would_meet_at_stale_addresses_is_refused_once(tmp_path: Path) -> None:
    restarted = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "1"}
    check(refused(*QUIET, "--run-dir", tmp_path, environment=restarted), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")


def test_ranks_that_the_launcher_misled_say_so_each_for_itself(tmp_path: Path) -> None:
    """None of them knows whether there is a rank 0 that sees it too."""
    with Job(train, SIZE, *QUIET, "--run-dir", tmp_path, environment={"LOCAL_WORLD_SIZE": "9"}) as job:
        outcomes = job.wait(60)
    for rank, outcome in enumerate(outcomes):
        said = rf"error: torchrun's variables contradict each other: rank {rank} of 3, local rank {rank} of 9\n"
        assert outcome.code == 2
        assert re.fullmatch(said, outcome.output)


@pytest.mark.parametrize(
    "flags",
    [
        ("--epochs", "-1"),
        ("--config", "/nowhere"),
        pytest.param(("--run-dir", "/dev/null/run"), marks=pytest.mark.thorough),  # found out after torch's import
    ],
)
def test_a_plain_process_leaves_with_2_as_well(flags: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ddp_circles.train", *QUIET[:3], *flags],
        env=os.environ | NO_GPU,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert flags[0] in done.stderr
    assert "Traceback" not in done.stderr
