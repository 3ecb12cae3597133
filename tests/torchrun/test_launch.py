"""The real torchrun: the same files as a plain start, and a job that ends soon and says why, once."""

import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import psutil
import pytest

FLAGS = ("--epochs", "6", "--wandb", "disabled", "--no-plots", "--log-every", "2")
TORCHRUN = ("-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
CONSOLE_LINE = re.compile(
    r"Epoch: (\d+) \| Loss: \d\.\d{5}, Acc: \d+\.\d\d% \| Test loss: \d\.\d{5}, Test acc: \d+\.\d\d%"
)


@dataclass(frozen=True)
class Ended:
    """How a start ended."""

    code: int
    output: str
    """Standard output and error together."""
    at: float
    """When, by the clock of the file system."""


@contextmanager
def reaped(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Leave nothing of `process` behind: torchrun's workers are in process groups of their own."""
    try:
        yield
    finally:
        if process.poll() is None:
            agent = psutil.Process(process.pid)
            for member in [*agent.children(recursive=True), agent]:
                member.kill()
        process.wait()


def start(folder: Path, *arguments: str, timeout: float = 150.0) -> Ended:
    """Run `python *arguments` in `folder` to its end."""
    log = folder / "console"
    with log.open("wb") as console:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, stdout=console, stderr=console, start_new_session=True
        )
        with reaped(process):
            code = process.wait(timeout)
    return Ended(code, log.read_text(), time.time())


def torchrun(folder: Path, ranks: int, *flags: str, run_id: str = "launch") -> Ended:
    agent = (*TORCHRUN, f"--rdzv-id={run_id}", f"--nproc_per_node={ranks}")
    return start(folder, *agent, "-m", "ddp_circles.train", *FLAGS, *flags)


def epochs_printed(output: str) -> list[int]:
    lines = [line for line in output.splitlines() if line.startswith("Epoch:")]
    return [int(found[1]) for line in lines if (found := CONSOLE_LINE.fullmatch(line))]


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(800)
def test_four_ranks_leave_what_one_process_leaves(tmp_path: Path) -> None:
    (tmp_path / "four").mkdir()
    (tmp_path / "one").mkdir()
    four = torchrun(tmp_path / "four", 4)
    assert four.code == 0, four.output
    one = start(tmp_path / "one", "-m", "ddp_circles.train", *FLAGS, "--run-dir", "runs/launch")
    assert one.code == 0, one.output
    assert epochs_printed(four.output) == epochs_printed(one.output) == [0, 2, 4]

    dirs = [tmp_path / name / "runs" / "launch" for name in ("four", "one")]  # torchrun's run id names the folder
    for run_dir in dirs:
        names = {path.name for path in run_dir.iterdir() if not path.name.startswith(".")}
        assert names == {"config.toml", "metrics.jsonl", "summary.json", "model.safetensors", "checkpoints", "status"}
        assert (run_dir / "status").read_text().strip() == "finished"
        assert list((run_dir / "checkpoints").iterdir())
        weights = sha256((run_dir / "model.safetensors").read_bytes()).hexdigest()
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["weights_sha256"] == weights
        assert (summary["epochs"], summary["steps"], summary["resumed_from_step"]) == (6, 6 * 13, None)
        last = rows(run_dir)[-1]
        assert {name: summary[name] for name in last} == last
        assert tomllib.loads((run_dir / "config.toml").read_text())["epochs"] == 6
    of_four, of_one = (json.loads((run_dir / "summary.json").read_text()) for run_dir in dirs)
    assert (of_four["world_size"], of_one["world_size"]) == (4, 1)
    assert of_four["weights_sha256"] == of_one["weights_sha256"]
    assert (dirs[0] / "config.toml").read_bytes() == (dirs[1] / "config.toml").read_bytes()

    timed = ("train/samples_per_second", "seconds")
    figures = [[{name: row[name] for name in row if name not in timed} for row in rows(run_dir)] for run_dir in dirs]
    assert figures[0] == figures[1]
    assert [row["epoch"] for row in figures[0]] == list(range(6))
    assert [row["step"] for row in figures[0]] == [13 * epochs for epochs in range(1, 7)]

    again = start(tmp_path / "four", "-m", "ddp_circles.train", "--config", "runs/launch/config.toml", "--run-dir", "b")
    assert again.code == 0, again.output
    assert sha256((tmp_path / "four" / "b" / "model.safetensors").read_bytes()).hexdigest() == of_one["weights_sha256"]


@pytest.mark.timeout(400)
def test_one_rank_that_raises_ends_the_job_and_is_named_once(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, 4, "--fault", "raise@1:20")
    assert ended.code not in (0, 2)
    run_dir = tmp_path / "runs" / "launch"
    assert ended.at - (run_dir / "fault").stat().st_mtime < 15
    assert len(re.findall(r"InjectedFaultError: --fault asked for this in step 20", ended.output)) == 1
    assert len(re.findall(r'File ".*ddp_circles/job/faults\.py"', ended.output)) <= 2  # the frames of one traceback
    labelled = re.search(r"rank +: (\d+) \(local_rank: \d+\)\n(?:.*\n){2} *traceback : Traceback ", ended.output)
    assert labelled is not None, ended.output
    assert labelled[1] == "1"
    assert (run_dir / "status").read_text().strip() == "failed"
    assert not (run_dir / "model.safetensors").exists()
    for rank in (0, 2, 3):
        blamed = rf"^rank {rank}: lost a peer: rank 1 \(host \S+\) raised InjectedFaultError, last seen in train"
        assert len(re.findall(blamed, ended.output, re.MULTILINE)) == 1, ended.output
    assert ended.output.count("lost a peer") == 3


@pytest.mark.timeout(400)
def test_a_bad_flag_is_said_once(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, 4, "--lr", "-1")
    assert ended.code not in (0, 75)
    assert len(re.findall(r"--lr must be .*, got -1\.0", ended.output)) == 1
    assert "ddp_circles/" not in ended.output  # the agent's own traceback may show, none of ours
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(400)
def test_a_run_directory_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, 2, "--run-dir", "/dev/null/run")
    assert ended.code not in (0, 75)
    assert ended.output.count("error: --run-dir /dev/null/run cannot be written") == 1
    assert "ddp_circles/" not in ended.output
