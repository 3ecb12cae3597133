"""The user's own model and data, trained from a script: again and again, with mistakes, and to be continued."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddp_circles import Config, Dataset, Split, fit
from tests.harness.ranks import Job, free_port, run_ranks
from tests.harness.runs import metrics, status

FEATURES = 3


def samples(seed: int, count: int = 60) -> Split:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(count, FEATURES, generator=generator)
    split = count * 4 // 5
    targets = (inputs.sum(1) > FEATURES / 2).float()
    return Split(Dataset(inputs[:split], targets[:split]), Dataset(inputs[split:], targets[split:]))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0))


def quietly(**settings: object) -> Config:
    return Config(epochs=2, batch_size=16, log_every=100, wandb="disabled", plots=False, **settings)  # type: ignore[arg-type]


def train_folds(folder: Path, folds: int, name_folders: bool) -> list[tuple[str, str]]:
    """Each fold's run directory and loss; every fold has data of its own."""
    os.chdir(folder)
    found = []
    for fold in range(folds):
        config = quietly(run_dir=str(folder / f"fold {fold}")) if name_folders else quietly()
        result = fit(config, model=model(), data=samples(fold))
        found.append((result.run_dir.name, repr(result.metrics["train/loss"])))
    return found


@pytest.mark.parametrize("agent_serves", [True, False])
@pytest.mark.parametrize("name_folders", [True, False])
def test_many_trainings_in_one_script(tmp_path: Path, name_folders: bool, agent_serves: bool) -> None:
    (tmp_path / "alone").mkdir()
    alone = run_ranks(train_folds, 1, tmp_path / "alone", 4, name_folders)[0]
    environment = {} if agent_serves else {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(free_port())}
    first, second = run_ranks(train_folds, 2, tmp_path, 4, name_folders, environment=environment)
    assert first == second
    assert [loss for _, loss in first] == [loss for _, loss in alone]
    assert len({loss for _, loss in first}) == 4
    expected = [f"fold {fold}" for fold in range(4)] if name_folders else ["test", "test-2", "test-3", "test-4"]
    assert [name for name, _ in first] == expected


def stop_in_second_epoch(run_dir: Path | None) -> None:
    """Train and, as the user's own metric sees it, be asked to stop once training has got so far."""
    calls = 0

    def ask(logits: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 60 and is_first:
            signal.raise_signal(signal.SIGTERM)
        return logits.sum() * 0

    is_first = os.environ["RANK"] == "0"
    sys.orig_argv = ["python", "own.py"]
    fit(dataclasses.replace(quietly(run_dir=run_dir), epochs=20), model=model(), data=samples(0), metrics={"ask": ask})


@pytest.mark.parametrize("size", [1, 2])
def test_a_stopped_program_is_continued_as_it_says(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Job(stop_in_second_epoch, size, None) as job:
        first = job.wait(120)[0]
    assert status(Path("runs/test")) == "stopped", first.output
    assert first.output.splitlines()[-1].endswith("again, with Config(run_dir='runs/test')")
    with Job(stop_in_second_epoch, size, Path("runs/test")) as job:
        second = job.wait(120)[0]
    assert "continue after step" in second.output


def train_on_data_of(seeds: dict[int, int], run_dir: Path) -> None:
    fit(quietly(run_dir=run_dir), model=model(), data=samples(seeds[int(os.environ["RANK"])]))


def test_data_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    with Job(train_on_data_of, 3, {0: 7, 1: 7, 2: 8}, tmp_path) as job:
        outcomes = job.wait(60)
    for outcome in outcomes:
        assert outcome.code == 1
        assert "UserError: rank 2 was given other data than rank 0: make them alike" in outcome.output
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_continued_on_other_data(tmp_path: Path) -> None:
    run_ranks(train_on_data_of, 1, {0: 7}, tmp_path)
    with Job(train_on_data_of, 1, {0: 8}, tmp_path) as job:
        (outcome,) = job.wait(60)
    assert (
        f"UserError: {tmp_path} holds a run with other data. Choose another --run-dir, or start over" in outcome.output
    )
    run_ranks(train_on_data_of, 2, {0: 7, 1: 7}, tmp_path)
    assert len(metrics(tmp_path)) == 2


def train_on_targets(run_dir: Path, dtype: torch.dtype, classes: int) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(FEATURES, classes), *([nn.Flatten(0)] if classes == 1 else [])]
    parts = (Dataset(part.inputs, part.targets.to(dtype)) for part in samples(1))
    fit(quietly(run_dir=run_dir), model=nn.Sequential(*layers), data=Split(*parts))


@pytest.mark.parametrize(("dtype", "classes"), [(torch.int64, 1), (torch.float32, 2)])
def test_targets_that_do_not_go_with_the_logits_are_explained(tmp_path: Path, dtype: torch.dtype, classes: int) -> None:
    with Job(train_on_targets, 1, tmp_path / "a", dtype, classes) as job:
        (outcome,) = job.wait(60)
    assert "UserError: logits [n" in outcome.output
    name = str(dtype).removeprefix("torch.")
    assert f"do not go with data.train.targets [n], {name}: for two classes give logits [n] and" in outcome.output
    right = torch.float32 if classes == 1 else torch.int64
    run_ranks(train_on_targets, 1, tmp_path / "b", right, classes)


def test_text_and_lists_are_taken_for_paths_and_tuples() -> None:
    config = Config(run_dir="a/b", hidden=[3, 4])  # type: ignore[arg-type]
    assert (config.run_dir, config.hidden) == (Path("a/b"), (3, 4))


def own_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.sigmoid() - targets).square().sum()


def train_with_own_loss(run_dir: Path) -> str:
    return repr(fit(quietly(run_dir=run_dir), model=model(), data=samples(1), loss=own_loss).metrics["test/loss"])


def test_a_loss_of_ones_own_is_summed_exactly_too(tmp_path: Path) -> None:
    found = {loss for size in (1, 2, 3) for loss in run_ranks(train_with_own_loss, size, tmp_path / str(size))}
    assert len(found) == 1
