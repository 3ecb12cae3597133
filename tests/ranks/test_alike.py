"""Ranks that were not given the same, or belong to two jobs, never train together: one message says what differs."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddp_circles import Config, Dataset, Split, fit
from ddp_circles.errors import UserError
from ddp_circles.job.ranks import read_ranks
from ddp_circles.job.world import open_world
from ddp_circles.models import Classifier
from tests.harness.ranks import Job, forget_launcher, free_port, run_ranks
from tests.harness.runs import PLAIN, QUIET, bits, finish, status, train_hastily

OTHER: dict[str, Any] = {
    "dataset": "moons",
    "n_samples": 999,
    "noise": 0.04,
    "factor": 0.7,
    "test_fraction": 0.3,
    "data_seed": 43,
    "hidden": (10, 11),
    "activation": "none",
    "optimizer": "sgd",
    "lr": 0.02,
    "epochs": 61,
    "batch_size": 65,
    "seed": 43,
    "reduction": "fast",
    "micro_batches": 4,
    "audit_steps": 5,
    "device": "cpu",
    "backend": "gloo",
    "run_dir": Path("elsewhere"),
    "resume": "never",
    "checkpoint_seconds": 31.0,
    "checkpoint_steps": 1,
    "log_every": 11,
    "wandb": "offline",
    "wandb_project": "another",
    "plots": False,
    "fault": "kill@0:1",
    "threads": 2,
    "timeout": 301.0,
}
"""A value for each setting that is not its default."""
SMALL = ("--n-samples=125", "--batch-size=16", "--epochs=2")


def refusal(config: Config, **own: Any) -> str:
    with pytest.raises(UserError) as refused:
        fit(config, **own)
    return str(refused.value)


def differ_in_each(odd: int) -> list[str]:
    """The refusals if rank `odd` alone has another value for one setting, for each setting in turn."""
    mine = int(os.environ["RANK"]) == odd
    return [refusal(Config(**({name: value} if mine else {}))) for name, value in OTHER.items()]


@pytest.mark.parametrize("size", [2, 3])
def test_every_setting_must_be_the_same_on_all_ranks(size: int) -> None:
    assert set(OTHER) == {field.name for field in dataclasses.fields(Config)}
    odd = size - 1
    refusals = run_ranks(differ_in_each, size, odd)
    assert refusals == [refusals[0]] * size
    others = "rank 0" if size == 2 else "ranks 0-1"
    for (name, value), said in zip(OTHER.items(), refusals[0], strict=True):
        default = getattr(Config(), name)
        differs = f"{name}= is {default} on {others} and {value} on rank {odd}"
        assert said == f"the ranks were started with different settings: {differs}; give all of them the same"


def train_with_own_rate(*flags: object) -> None:
    train_hastily(*flags, f"--lr=0.0{int(os.environ['RANK']) + 1}")


def test_a_command_line_of_its_own_on_each_rank_is_refused_once(tmp_path: Path) -> None:
    with Job(train_with_own_rate, 3, *QUIET, "--run-dir", tmp_path / "run") as job:
        speaker, *others = job.wait(60)
    assert [outcome.code for outcome in (speaker, *others)] == [2, 2, 2]
    assert [outcome.output for outcome in others] == ["", ""]
    assert speaker.output.startswith(
        "error: the ranks were started with different settings: --lr is 0.01 on rank 0 and "
    )
    assert "0.03 on rank 2" in speaker.output
    assert not (tmp_path / "run").exists()


class Counting(nn.Module):
    """A model with a buffer."""

    def __init__(self, seed: int = 0, count: float = 0.0, activation: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(2, 1)
        self.activation = activation or nn.Identity()
        self.register_buffer("count", torch.tensor(count), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.activation(self.layer(inputs)).squeeze(1)
        return logits


def default_network(config: Config) -> nn.Module:
    """The network that `fit` makes by itself."""
    torch.manual_seed(config.seed)
    return Classifier(2, config.hidden, config.activation, 2)


def bring_own(folder: Path) -> list[str]:
    """The refusals where the last rank brings another model, another loss, other metrics, or what is refused."""
    ranks = read_ranks()
    odd = ranks.rank == ranks.world_size - 1
    points = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    samples = Dataset(points, (points.sum(1) > 1).float())
    spoiled = Dataset(points / 0 if odd else points, samples.targets)
    config = Config(run_dir=folder, wandb="disabled", plots=False)

    def squares(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return ((logits - targets) ** 2).sum() * (2 if odd else 1)

    brought: list[dict[str, Any]] = [
        {"model": Counting(seed=int(odd))},
        {"model": Counting(count=float(odd))},
        {"model": Counting(activation=nn.Tanh() if odd else nn.ReLU())},
        {"model": default_network(config) if odd else None},  # equal in all but who made it
        {"loss": squares if odd else None},
        {"loss": squares},
        {"metrics": {"error" if odd else "mistake": squares}},
        {"metrics": {"error": squares}},
        {"model": Counting(activation=nn.Dropout(0.5 if odd else 0.0))},
        {"model": Counting(activation=nn.BatchNorm1d(1, momentum=None if odd else 0.1))},
        {"data": Split(spoiled, samples)},
        {"data": Split(samples, samples) if odd else None},
    ]
    given = {"data": Split(samples, samples)}
    return [refusal(config, **({"model": Counting()} | given | own)) for own in brought]


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_must_bring_the_same(size: int, tmp_path: Path) -> None:
    refusals = run_ranks(bring_own, size, tmp_path / "run")
    assert refusals == [refusals[0]] * size
    last = size - 1
    expected = [
        f"rank {last} was given other initial parameters and buffers than rank 0: make them alike",
        f"rank {last} was given other initial parameters and buffers than rank 0: make them alike",
        f"rank {last} was given other layers than rank 0: make them alike",
        f"rank {last} was given other model= or none than rank 0: make them alike",
        f"rank {last} was given other loss= or none than rank 0: make them alike",
        "loss= of data.train is ",
        f"rank {last} was given other metrics than rank 0: make them alike",
        "metrics= 'error' of data.train is ",
        "loss= of data.train is ",
        f"rank {last} (host ",
        f"rank {last} (host ",
        f"rank {last} was given other data than rank 0: make them alike",
    ]
    for said, beginning in zip(refusals[0], expected, strict=True):
        assert said.startswith(beginning), said
    for said in (refusals[0][5], refusals[0][8]):
        assert " on rank 0 and " in said
        assert said.endswith(
            f"on rank {last}, from the same samples: give every rank the same model=, loss= and metrics="
        )
    assert "cannot train activation (BatchNorm1d)" in refusals[0][9]
    assert "data.train.inputs: sample 0 holds inf" in refusals[0][10]
    assert not (tmp_path / "run").exists()


# ---- two jobs at one address


def train_in_slurm(rank: int, size: int, job: int, port: int | None, *flags: object) -> None:
    """Train as a task of a Slurm step on one node."""
    forget_launcher()
    os.environ |= {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_TASKS_PER_NODE": str(size),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    } | ({"MASTER_PORT": str(port)} if port else {})
    train_hastily(*flags)


def start_in_slurm(rank: int, size: int, job: int, port: int | None, run_dir: Path) -> Job:
    flags = ("--run-dir", run_dir, *QUIET, *SMALL, "--timeout=60")
    return Job(train_in_slurm, 1, rank, size, job, port, *flags)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("distance", [1250, 20000])
def test_two_slurm_jobs_whose_ids_lead_to_one_port_do_not_mix(size: int, distance: int, tmp_path: Path) -> None:
    ours = 4000 + 10 * size + distance % 7  # tests that run at the same time have ports of their own
    theirs = ours + distance
    with start_in_slurm(0, size, ours, None, tmp_path / "ours") as first:
        strangers = [start_in_slurm(rank, size, theirs, None, tmp_path / "theirs") for rank in range(1, size)]
        for stranger in strangers:
            with stranger:
                (outcome,) = stranger.wait(60)
            assert outcome.code == 2, outcome.output
        with start_in_slurm(0, size, theirs, None, tmp_path / "theirs") as stranger:
            (outcome,) = stranger.wait(60)
        assert outcome.code == 2
        assert "is in use, perhaps by another job: set MASTER_PORT to a free one" in outcome.output
        assert first.processes[0].is_alive(), first.output(0)
        others = [start_in_slurm(rank, size, ours, None, tmp_path / "ours") for rank in range(1, size)]
        for other in others:
            with other:
                (outcome,) = other.wait(60)
            assert outcome.code == 0, outcome.output
        (outcome,) = first.wait(60)
        assert outcome.code == 0, outcome.output
    assert bits(tmp_path / "ours") == finish(PLAIN, tmp_path / "alone", *SMALL)
    assert not (tmp_path / "theirs").exists()


def test_two_jobs_without_names_do_not_mix_either(tmp_path: Path) -> None:
    """By hand, RANK and the others are all there is: a rank that is there twice belongs to another job."""
    variables = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    flags = ("--run-dir", tmp_path / "run", *QUIET, *SMALL, "--epochs=1000000")

    def start(rank: int) -> Job:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        return Job(train_hastily, 1, *flags, environment=variables | own)

    with start(0) as head, start(1) as other, start(1) as another:
        head.wait_until(lambda: not (other.processes[0].is_alive() and another.processes[0].is_alive()))
        head.wait_until((tmp_path / "run/metrics.jsonl").exists)
        head.signal(signal.SIGTERM)
        outcomes = [job.wait(60)[0] for job in (head, other, another)]
    assert outcomes[0].code == 0, outcomes[0].output
    assert sorted(outcome.code or 0 for outcome in outcomes[1:]) == [0, 2], outcomes
    assert status(tmp_path / "run") == "stopped"


# ---- data, not objects


class Trap:
    """It would make a folder if it were unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return os.mkdir, (self.folder,)


def send_objects(folder: Path) -> bool:
    """Try to hand an object round, in both ways there are."""
    with open_world(read_ranks(), "cpu", "gloo", 30, {}) as world:
        with pytest.raises(TypeError):
            world.gather(Trap(folder))
        with pytest.raises(ValueError, match="other than tensors and plain values"):
            world.on_rank_0(lambda: Trap(folder))
    return folder.exists()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_exchange_data_and_no_objects(size: int, tmp_path: Path) -> None:
    assert run_ranks(send_objects, size, tmp_path / "trap") == [False] * size
