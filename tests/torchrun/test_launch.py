"""Under a launcher: the same files as a plain start, and a job that ends soon and says why, once."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from tests.harness.runs import LAUNCHERS, PLAIN, PROJECT, Launcher, agent, bits, metrics, run, status, torchrun

EPOCHS = 6
STEPS_PER_EPOCH = 13
FLAGS = (f"--epochs={EPOCHS}", "--log-every=2")
CONSOLE_LINE = re.compile(
    r"Epoch: (\d+) \| Loss: \d\.\d{5}, Acc: \d+\.\d\d% \| Test loss: \d\.\d{5}, Test acc: \d+\.\d\d%"
)
NAMED = ["--rdzv-id=launch"]


def epochs_printed(output: str) -> list[int]:
    lines = [line for line in output.splitlines() if line.startswith("Epoch:")]
    return [int(found[1]) for line in lines if (found := CONSOLE_LINE.fullmatch(line))]


@pytest.mark.parametrize("launch", LAUNCHERS)
def test_four_ranks_leave_what_one_process_leaves(launch: Launcher, tmp_path: Path) -> None:
    with launch(tmp_path / "log", 4, None, *FLAGS, options=NAMED, cwd=tmp_path) as job:
        assert job.wait(150) == 0, job.output
    (plain,) = run(PLAIN, tmp_path / "one", *FLAGS)
    assert plain.code == 0, plain.output
    assert epochs_printed(job.output) == epochs_printed(plain.output) == [0, 2, 4, EPOCHS - 1]

    four, one = tmp_path / "runs" / "launch", tmp_path / "one"  # torchrun's run id names the folder
    for run_dir in (four, one):
        names = {path.name for path in run_dir.iterdir() if not path.name.startswith(".")}
        assert names == {"config.toml", "metrics.jsonl", "summary.json", "model.safetensors", "checkpoints", "status"}
        assert list((run_dir / "checkpoints").iterdir())
        summary = json.loads((run_dir / "summary.json").read_text())
        assert (summary["epochs"], summary["steps"]) == (EPOCHS, EPOCHS * STEPS_PER_EPOCH)
        assert summary["resumed_from_step"] is None
        assert summary["world_size"] == (4 if run_dir == four else 1)
        last = metrics(run_dir)[-1]
        assert {name: summary[name] for name in last} == last
        assert tomllib.loads((run_dir / "config.toml").read_text())["epochs"] == EPOCHS
    assert bits(four) == bits(one)
    assert [row["step"] for row in metrics(four)] == [STEPS_PER_EPOCH * epochs for epochs in range(1, EPOCHS + 1)]
    assert (four / "config.toml").read_bytes() == (one / "config.toml").read_bytes()

    (again,) = run(PLAIN, tmp_path / "again", "--config", four / "config.toml")
    assert again.code == 0, again.output
    assert bits(tmp_path / "again") == bits(one)


def test_one_rank_that_raises_ends_the_job_and_is_named_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with torchrun(tmp_path / "log", 3, run_dir, "--fault=raise@1:20") as job:
        job.wait_until((run_dir / "fault").exists)
        assert job.wait(30) not in (0, 2)  # a collective would wait for 300
    assert len(re.findall(r"InjectedFaultError: --fault asked for this in step 20", job.output)) == 1
    assert len(re.findall(r'File ".*ddp_circles/job/faults\.py"', job.output)) <= 2  # the frames of one traceback
    labelled = re.search(r"rank +: (\d+) \(local_rank: \d+\)\n(?:.*\n){2} *traceback : Traceback ", job.output)
    assert labelled is not None, job.output
    assert labelled[1] == "1"
    assert status(run_dir) == "failed"
    assert not (run_dir / "model.safetensors").exists()
    for rank in (0, 2):
        blamed = rf"^rank {rank}: lost a peer: rank 1 \(host \S+\) raised InjectedFaultError, last seen in train"
        assert len(re.findall(blamed, job.output, re.MULTILINE)) == 1, job.output
    assert job.output.count("lost a peer") == 2


@pytest.mark.parametrize("launch", LAUNCHERS)
@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--lr=-1",), r"--lr must be .*, got -1\.0"),
        (("--run-dir", "/dev/null/run"), "error: --run-dir /dev/null/run cannot be written"),
    ],
    ids=["flag", "folder"],
)
def test_a_mistake_is_said_once(launch: Launcher, flags: tuple[str, ...], complaint: str, tmp_path: Path) -> None:
    with launch(tmp_path / "log", 4, None, *flags, options=NAMED, cwd=tmp_path) as job:
        assert job.wait(150) not in (0, 75)
    assert len(re.findall(complaint, job.output)) == 1, job.output
    assert f"{PROJECT / 'ddp_circles'}/" not in job.output  # the agent's own traceback may show, none of ours
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [("--lr=-1",), pytest.param(("--run-dir=/dev/null/x",), marks=pytest.mark.thorough)])
def test_a_mistake_is_not_worth_a_restart(flags: tuple[str, ...], tmp_path: Path) -> None:
    with torchrun(tmp_path / "log", 3, None, *flags, options=["--max-restarts=3"], cwd=tmp_path) as job:
        assert job.wait(100) not in (0, 75)
        assert job.workers() == []
    assert len(re.findall(rf"{flags[0].partition('=')[0]} (must|/dev/null/x cannot)", job.output)) == 1, job.output
    assert f"{PROJECT / 'ddp_circles'}/" not in job.output


def test_a_rank_that_raises_and_is_restarted_says_why(tmp_path: Path) -> None:
    """torchrun prints what the last start has recorded, and nothing of those before."""
    with agent(
        tmp_path / "log", 2, tmp_path / "run", *FLAGS, "--fault=raise@1:20", options=["--max-restarts=1"]
    ) as job:
        assert job.wait(100) == 0, job.output
    assert len(re.findall(r"^\[rank 1\] .*InjectedFaultError: ", job.output, re.MULTILINE)) == 1, job.output
    assert status(tmp_path / "run") == "finished"
