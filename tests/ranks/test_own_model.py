"""The user's own model and data, trained from a script: again and again, with mistakes, and to be continued."""

import dataclasses
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ddp_circles import Config, Dataset, Split, UserError, fit
from ddp_circles.job import refusal
from ddp_circles.job.process import CUDNN
from ddp_circles.job.stop import STOP_SIGNALS
from tests.harness.ranks import Job, free_port, run_ranks
from tests.harness.runs import bits, metrics, status

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
    defaults: dict[str, Any] = {"epochs": 2, "batch_size": 16, "log_every": 100, "wandb": "disabled", "plots": False}
    return Config(**defaults | settings)


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
        f"UserError: {tmp_path} holds a run with other data. Choose another run_dir=, or start over" in outcome.output
    )
    run_ranks(train_on_data_of, 2, {0: 7, 1: 7}, tmp_path)
    assert len(metrics(tmp_path)) == 2


def train_on_targets(run_dir: Path, dtype: torch.dtype, classes: int) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(FEATURES, classes), *([nn.Flatten(0)] if classes == 1 else [])]
    parts = (Dataset(part.inputs, part.targets.to(dtype)) for part in samples(1))
    fit(quietly(run_dir=run_dir), model=nn.Sequential(*layers), data=Split(*parts))


def test_targets_that_do_not_go_with_the_logits_are_explained(tmp_path: Path) -> None:
    with Job(train_on_targets, 1, tmp_path / "a", torch.float32, 2) as job:
        (outcome,) = job.wait(60)
    assert "UserError: logits [n" in outcome.output
    assert "do not go with data.train.targets [n], float32: for two classes give logits [n] and" in outcome.output
    run_ranks(train_on_targets, 1, tmp_path / "b", torch.int64, 2)


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


# ---- the process afterwards


def observed() -> dict[str, Any]:
    """Everything about this process that a training has a hand in."""
    return {
        "environment": dict(os.environ),
        "threads": torch.get_num_threads(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "filled": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "precision": torch.get_float32_matmul_precision(),
        "tf32": (CUDNN.allow_tf32, CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision),
        "benchmark": torch.backends.cudnn.benchmark,
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
        "signals": [signal.getsignal(number) for number in STOP_SIGNALS],
        "gradients": torch.is_grad_enabled(),
        "group": torch.distributed.is_initialized(),
        "folder": Path.cwd(),
        "hook": sys.excepthook,
    }


def stopping(logits: Tensor, targets: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGTERM)
    return own_loss(logits, targets)


ENDS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "finished": (lambda: {"model": model(), "data": samples(1)}, ""),
    "the package's own model, fast": (lambda: {"settings": {"reduction": "fast"}}, ""),
    "refused at once": (lambda: {"settings": {"resume": "must"}}, "UserError"),
    "refused": (lambda: {"data": Split(samples(1).train, samples(1).train), "loss": nn.L1Loss()}, "UserError"),
    "stopped": (lambda: {"model": model(), "data": samples(1), "loss": stopping}, "SystemExit"),
    "failed": (lambda: {"settings": {"fault": "raise@0:1"}}, "InjectedFaultError"),
}


def leave_traces(folder: Path, name: str) -> tuple[list[str], str]:
    """Train until one of the ends; returns what is not as it was, and the exception."""
    torch.set_num_threads(2)
    torch.backends.cudnn.benchmark = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ["OMP_NUM_THREADS"] = "2"
    torch.manual_seed(5)
    arguments = ENDS[name][0]()
    before, ended = observed(), ""
    try:
        fit(quietly(run_dir=folder / "run", **arguments.pop("settings", {})), **arguments)
    except BaseException as error:
        ended = type(error).__name__
    after = observed()
    return [key for key in before if before[key] != after[key]], ended


@pytest.mark.parametrize(
    "name, size", [*((name, 1) for name in ENDS), *((name, 2) for name in ENDS if name != "failed")]
)
def test_the_process_is_left_as_it_was_found(tmp_path: Path, name: str, size: int) -> None:
    """But for the hook that prints what nothing catches."""
    ended = ENDS[name][1]
    changed = [] if ended in ("", "SystemExit") else ["hook"]
    assert run_ranks(leave_traces, size, tmp_path, name) == [(changed, ended)] * size


# ---- a mistake that the script does not catch


def script(waits: float, **settings: Any) -> None:
    """Train as a script does; what it does not catch reaches the interpreter."""
    refusal.RANK_0_SPEAKS_SECONDS = waits
    try:
        fit(quietly(**settings), model=model(), data=samples(1))
    except BaseException:
        sys.excepthook(*sys.exc_info())


def forgetful_script(run_dir: Path) -> None:
    script(waits=0.1, run_dir=run_dir, resume="must")


def careful_script(run_dir: Path) -> str:
    with pytest.raises(UserError) as refused:
        fit(quietly(run_dir=run_dir, resume="must"), model=model(), data=samples(1))
    return str(refused.value)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_mistake_is_said_once_without_a_traceback(tmp_path: Path, size: int) -> None:
    said = f'resume="must": there is no checkpoint in {tmp_path}/checkpoints'
    with Job(forgetful_script, size, tmp_path) as job:
        outcomes = job.wait(60)
    assert [(outcome.code, outcome.output) for outcome in outcomes] == [
        (2, "" if outcome.rank else f"error: {said}\n") for outcome in outcomes
    ]
    assert run_ranks(careful_script, size, tmp_path) == [said] * size


# ---- what is saved


class Versioned(nn.Module):
    """A model with state that is no tensor, as torch lets modules have."""

    def __init__(self, version: Any) -> None:
        super().__init__()
        self.layers, self.version = model(), version

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layers(inputs)
        return logits

    def get_extra_state(self) -> Any:
        return self.version

    def set_extra_state(self, version: Any) -> None:
        self.version = version


def train_versioned(run_dir: Path, epochs: int) -> Any:
    own = Versioned({"version": 3, "names": ["a"]} if epochs == 1 else None)
    fit(
        Config(run_dir=run_dir, epochs=epochs, batch_size=16, wandb="disabled", plots=False), model=own, data=samples(1)
    )
    return own.version


def test_state_that_is_no_tensor_is_kept_in_the_checkpoint(tmp_path: Path) -> None:
    assert run_ranks(train_versioned, 2, tmp_path, 1) == [{"version": 3, "names": ["a"]}] * 2
    assert run_ranks(train_versioned, 2, tmp_path, 2) == [{"version": 3, "names": ["a"]}] * 2
    left = Versioned(None).load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert left.missing_keys == ["_extra_state"]
    assert left.unexpected_keys == []


def compiled(parts: bool) -> nn.Module:
    own = model()
    if parts:
        own.add_module("2", torch.compile(own.get_submodule("2"), backend="eager"))  # type: ignore[arg-type]
        return own
    whole: nn.Module = torch.compile(own, backend="eager")  # type: ignore[assignment]
    return whole


def train_compiled(folder: Path) -> None:
    plain, whole, parts = model, lambda: compiled(parts=False), lambda: compiled(parts=True)
    for name, starts in {"plain": [plain] * 3, "mixed": [whole, parts, plain]}.items():
        for epochs, make in enumerate(starts, 1):
            fit(quietly(run_dir=folder / name, epochs=epochs), model=make(), data=samples(1))


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_compiled_model_is_saved_under_plain_names(tmp_path: Path, size: int) -> None:
    """And its run can be continued without the compiler, or the other way round."""
    run_ranks(train_compiled, size, tmp_path)
    assert bits(tmp_path / "mixed") == bits(tmp_path / "plain")
    model().load_state_dict(load_file(tmp_path / "mixed" / "model.safetensors"))
