"""Models, data, losses and metrics of the caller: figures that mean something, or one message before the first step."""

import json
import math
import os
import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ddp_circles import Config, Dataset, Split, fit
from ddp_circles.errors import UserError
from ddp_circles.trial import Trial, Verdict
from tests.harness import wandb_log
from tests.harness.ranks import Job, run_ranks
from tests.harness.runs import bits, metrics

FEATURES = 3
TRAINED_ON, TESTED_ON = 35, 21
"""Steps of 16, 16 and 3 samples, the last fewer than micro-batches."""
CLOCK = ("train/samples_per_second", "seconds")


class Layers(nn.Module):
    """A few layers; `last` is what becomes of their output, [n, width]."""

    def __init__(self, width: int = 1, last: Callable[[Tensor], Any] = lambda logits: logits.squeeze(1)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU(), nn.Linear(4, width))
        self.last = last

    def forward(self, inputs: Tensor) -> Any:
        return self.last(self.layers(inputs))


class Before(nn.Module):
    """`change` is done to the inputs before all else; `buffer` is there to be changed."""

    buffer: Tensor

    def __init__(self, change: "Callable[[Before, Tensor], Any]", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers, self.change = Layers(), change
        self.register_buffer("buffer", torch.zeros(FEATURES, dtype=dtype))

    def forward(self, inputs: Tensor) -> Any:
        return self.layers(self.change(self, inputs))


def moving_average(module: Before, inputs: Tensor) -> Tensor:
    if module.training and len(inputs):
        module.buffer = 0.9 * module.buffer + 0.1 * inputs.mean(0)
    return inputs - module.buffer


def changing(change: Callable[[Tensor], Tensor], training: bool = True) -> Callable[[Before, Tensor], Tensor]:
    """Put what `change` makes of the buffer in its place, in training or else in evaluation."""

    def forward(module: Before, inputs: Tensor) -> Tensor:
        if module.training is training:
            module.buffer = change(module.buffer)
        return inputs

    return forward


def decaying(module: Before, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        next(module.parameters()).mul_(0.9)
    return inputs


def batch_norm(**arguments: Any) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(FEATURES, **arguments), Layers())


def unused() -> nn.Module:
    model = Layers()
    model.extra = nn.Linear(3, 3)
    return model


def normalized(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = Layers()
    model.layers[0] = wrap(model.layers[0])
    return model


def sparse() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.EmbeddingBag(10, 4, sparse=True), nn.Linear(4, 1), nn.Flatten(0))


INPUTS = torch.rand(TRAINED_ON + TESTED_ON, FEATURES, generator=torch.Generator().manual_seed(1))
BINARY = (INPUTS.sum(1) > FEATURES / 2).float()
CLASSES = (INPUTS[:, 0] * 3).long()
TOKENS = (INPUTS * 10).long()


def data(inputs: Any = INPUTS, targets: Any = BINARY) -> Split:
    at = slice(TRAINED_ON), slice(TRAINED_ON, None)
    return Split(*(Dataset(inputs[part], targets[part]) for part in at))


def spoiled(row: int, value: float) -> Tensor:
    inputs = INPUTS.clone()
    inputs[row, 1] = value
    return inputs


def squares(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits - targets).square().sum()


def absolute_errors(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits - targets).abs().sum()


def root(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits - targets).square().mean().sqrt()


def noisy(logits: Tensor, targets: Tensor) -> Tensor:
    """Squares with some noise, near enough to a sum over samples."""
    return squares(logits, targets) * (1 + 1e-4 * torch.rand(()))


def doubling(logits: Tensor, targets: Tensor) -> Tensor:
    return squares(logits, targets.mul_(2))


class Stateful(Layers):
    """Layers with a state of any kind, which they may not take back."""

    def __init__(self, state: Any, takes: bool = True) -> None:
        super().__init__()
        self.state, self.takes = state, takes

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        assert self.takes, f"{state} is not known"


GENERATOR = torch.Generator()
FAST = {"reduction": "fast"}
CANNOT = 'reduction="exact" cannot train a model'
OR_FAST = 'or use reduction="fast"$'
TOO_FEW = (
    r"model= failed on data\.train\.inputs\[:1\], as few as a step may leave a rank,.*more than 1 value.*\. A step of "
)
NEEDS_2 = ", and the model needs 2: the smallest change that will do is"
SUM = r"must return the SUM over the samples.*reduction='sum'"
GO_WITH = r"do not go with data\.train\.targets"

REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    # data
    "no split": (lambda: {"data": INPUTS}, r"data= must be Split\(train=Dataset"),
    "words": (
        lambda: {"data": data(np.array(["a"] * len(INPUTS)))},
        r"data\.train\.inputs must be a dense tensor or array of numbers.*numpy\.ndarray",
    ),
    "loaders": (
        lambda: {"data": [DataLoader(TensorDataset(*part)) for part in data()]},
        r"data= must be Split.*data\.train is torch\.utils\.data\.dataloader\.DataLoader",
    ),
    "one part": (lambda: {"data": data()[:1]}, r"data= must be Split.*data= is tuple"),
    "other keys": (lambda: {"data": {"train": 1, "valid": 2}}, r"data= must be Split.*data= is dict"),
    "complex targets": (lambda: {"data": data(targets=BINARY.to(torch.complex64))}, GO_WITH),
    "one target more": (
        lambda: {"data": Split(data().train, Dataset(INPUTS[:4], BINARY[:5]))},
        r"data\.test must have one target for each sample, got 4 and 5",
    ),
    "nothing to test on": (
        lambda: {"data": Split(data().train, Dataset(INPUTS[:0], BINARY[:0]))},
        r"data\.test\.inputs holds no samples",
    ),
    "nan": (lambda: {"data": data(spoiled(7, math.nan))}, r"data\.train\.inputs: sample 7 holds nan"),
    "inf": (lambda: {"data": data(spoiled(TRAINED_ON + 5, math.inf))}, r"data\.test\.inputs: sample 5 holds inf"),
    "float64 to bfloat16": (
        lambda: {"data": data(INPUTS.double()), "model": Layers().bfloat16(), "settings": FAST},
        r"data\.train\.inputs.*float64.*bfloat16.*\.to\(torch\.bfloat16\)",
    ),
    "whole numbers": (lambda: {"data": data(TOKENS)}, r"data\.train\.inputs.*int64.*\.float\(\)"),
    # the model
    "function": (lambda: {"model": absolute_errors}, r"model= must be a torch\.nn\.Module"),
    "tuple": (lambda: {"model": Layers(last=lambda z: (z, None))}, "model= must return one tensor.*got tuple"),
    "dictionary": (lambda: {"model": Layers(last=lambda z: {"z": z})}, "model= must return one tensor.*got dict"),
    "squeeze": (
        lambda: {"model": Layers(last=torch.squeeze)},
        r"first dimension is the samples.*shape \[\].*squeeze\(1",
    ),
    "mean": (lambda: {"model": Layers(last=torch.mean)}, "first dimension is the samples"),
    "bug": (lambda: {"model": Layers(last=lambda z: z @ z)}, r"model= failed.*RuntimeError.*test_contract\.py, line"),
    "empty batch": (
        lambda: {"model": Layers(last=lambda z: z.view(len(z), -1).squeeze(1))},
        r"model= failed on data\.train\.inputs\[:0\], as few as a step may leave a rank, of shape \[0, 3\]",
    ),
    "in place": (lambda: {"model": Before(lambda _, x: x.sub_(0.5))}, "model= changes its inputs in place"),
    "unused": (lambda: {"model": unused()}, r"take no part in the loss: extra\.weight, extra\.bias: .*requires_grad_"),
    "unused, fast": (lambda: {"model": unused(), "settings": FAST}, r"take no part in the loss: extra\.weight"),
    "frozen, fast": (lambda: {"model": Layers().requires_grad_(False), "settings": FAST}, "nothing to train"),
    "detached": (lambda: {"model": Layers(last=lambda z: z.squeeze(1).detach())}, "loss= does not depend on"),
    "batch norm of one sample": (
        lambda: {"model": batch_norm()},
        rf"{TOO_FEW}3 samples leaves 1 to one of 8 micro-batches{NEEDS_2} batch_size=18 or micro_batches=1$",
    ),
    "batch norm of one sample, all samples in a step": (
        lambda: {"model": batch_norm(), "settings": {"batch_size": 0, "micro_batches": 18}},
        rf"{TOO_FEW}35 samples leaves 1 to one of 18 micro-batches{NEEDS_2} micro_batches=17$",
    ),
    "batch norm of one sample, fast": (
        lambda: {"model": batch_norm(), "settings": FAST | {"batch_size": TRAINED_ON // 2}},
        rf"{TOO_FEW}1 sample leaves 1 to one of [123] ranks{NEEDS_2} batch_size=18$",
    ),
    "changes a parameter": (lambda: {"model": Before(decaying)}, "changes its parameters in its forward pass: leave"),
    "changes a parameter, fast": (
        lambda: {"model": Before(decaying), "settings": FAST},
        "changes its parameters in its forward pass: leave",
    ),
    "unsaveable": (
        lambda: {"model": Stateful(GENERATOR)},
        r"model= cannot be saved: _extra_state in its state_dict\(\) is torch.*Generator.*plain values",
    ),
    "state of a type that safetensors lack": (
        lambda: {"model": Stateful(torch.zeros(1, dtype=torch.complex128))},
        "model= cannot be saved: _extra_state .* is shape .1., complex128: KeyError",
    ),
    "state that is not taken back": (
        lambda: {"model": Stateful(3, takes=False)},
        r"model= cannot be continued from its own state_dict\(\): AssertionError: 3 is not known",
    ),
    "lazy": (lambda: {"model": nn.Sequential(nn.LazyLinear(1), nn.Flatten(0))}, "lazy parameter, 0.weight"),
    "sparse": (lambda: {"model": sparse(), "data": data(TOKENS)}, "sparse gradients for 0.weight.*sparse=False"),
    # targets of the default loss
    "logits [n, 1]": (lambda: {"model": Layers(last=lambda z: z)}, rf"logits \[n, 1\].*{GO_WITH} \[n\].*squeeze\(1\)"),
    "targets [n, 1]": (lambda: {"data": data(targets=BINARY[:, None])}, rf"logits \[n\].*{GO_WITH} \[n, 1\]"),
    "both": (
        lambda: {"model": Layers(last=lambda z: z), "data": data(targets=BINARY[:, None])},
        rf"logits \[n, 1\].*{GO_WITH} \[n, 1\]",
    ),
    "-1 and 1": (lambda: {"data": data(targets=BINARY * 2 - 1)}, r"data\.train\.targets: sample \d+ holds -1\.0, not"),
    "whole numbers 1 and 2": (
        lambda: {"data": data(targets=(BINARY + 1).int())},
        r"data\.train\.targets: sample \d+ holds 2, not a number between 0 and 1",
    ),
    "1 and 2": (lambda: {"data": data(targets=BINARY + 1)}, r"data\.train\.targets: sample \d+ holds 2\.0, not"),
    "1 to 3": (
        lambda: {"model": Layers(3, lambda z: z), "data": data(targets=CLASSES + 1)},
        r"data\.train\.targets: sample \d+ holds 3, not a class number from 0 to 2",
    ),
    "many labels": (
        lambda: {"model": Layers(3, lambda z: z), "data": data(targets=(INPUTS > 0.5).float())},
        r"data\.train\.targets: the probabilities of sample \d+ add up to \d, not 1.*pass loss=",
    ),
    # losses
    "mean loss": (lambda: {"loss": nn.BCEWithLogitsLoss()}, f"loss= {SUM}"),
    "no reduction": (lambda: {"loss": nn.MSELoss(reduction="none")}, r"loss= must return the SUM.*shape \[16\]"),
    "number": (lambda: {"loss": lambda a, b: squares(a, b).item()}, "loss= must return the SUM.*got float"),
    "broadcast": (
        lambda: {"model": Layers(last=lambda z: z), "loss": squares},
        r"loss= must return the SUM.*logits \[16, 1\] and targets \[16\] are combined each with each.*squeeze\(1\)",
    ),
    "broken loss": (lambda: {"loss": lambda a, b: (a - b[:, 1]).sum()}, "loss= failed on logits of shape.*IndexError"),
    "infinite": (lambda: {"loss": lambda a, b: (a - b).sum() / 0}, "loss= returned"),
    "nan logits": (lambda: {"model": Layers(last=lambda z: z.squeeze(1) * math.nan)}, "loss= returned nan"),
    "steep": (lambda: {"loss": lambda a, b: (a - a).sqrt().sum() + b.sum()}, r"gradient of layers\.0\.weight is not"),
    "prices": (
        lambda: {"data": data(targets=1e5 + INPUTS.sum(1) * 1e5), "loss": squares},
        "loss= comes to about .* hold less than 3.4e.10: scale targets .*reduction=.fast",
    ),
    "large inputs": (
        lambda: {"data": data(INPUTS * 1e7), "loss": absolute_errors},
        r"the gradient of layers\.\d\.weight comes to about .* hold less than 3.3e.04",
    ),
    "changes targets": (lambda: {"loss": doubling}, "loss= changes logits or targets in place"),
    # metrics
    "two words": (lambda: {"metrics": {"mean error": absolute_errors}}, "metrics= must have names.*'mean error'"),
    "loss as a name": (lambda: {"metrics": {"loss": absolute_errors}}, "metrics= has the name 'loss', which is taken"),
    "accuracy": (lambda: {"metrics": {"accuracy": absolute_errors}}, "metrics= has the name 'accuracy'"),
    "grad_norm": (lambda: {"metrics": {"grad_norm": absolute_errors}}, "the name 'grad_norm', which is taken"),
    "samples_per_second": (
        lambda: {"metrics": {"samples_per_second": absolute_errors}},
        "the name 'samples_per_second', which is taken",
    ),
    "root": (lambda: {"metrics": {"rmse": root}}, f"metrics= 'rmse' {SUM}"),
    "vector": (lambda: {"metrics": {"mae": lambda a, b: (a - b).abs()}}, "metrics= 'mae' must return the SUM"),
    "wide metric": (
        lambda: {"metrics": {"big": lambda a, _: (0 * a + 1e12).sum()}},
        "metrics= 'big' comes to about .* hold less than",
    ),
    # random numbers and buffers
    "own generator": (
        lambda: {"model": Before(lambda _, x: x * torch.rand((), generator=GENERATOR))},
        f"{CANNOT} that gives two results for the same samples and random numbers: .*{OR_FAST}",
    ),
    "sync batch norm": (
        lambda: {"model": nn.Sequential(nn.SyncBatchNorm(FEATURES), Layers())},
        rf'reduction="exact" cannot train 0 \(SyncBatchNorm\): it normalises over all .*: use BatchNorm.*{OR_FAST}',
    ),
    "batch norm without momentum": (
        lambda: {"model": batch_norm(momentum=None), "settings": {"batch_size": 19}},
        rf'reduction="exact" cannot train 0 \(BatchNorm1d\): it averages over all .*: give it a momentum.*{OR_FAST}',
    ),
    "change in evaluation": (
        lambda: {"model": Before(changing(lambda buffer: buffer + 1, training=False))},
        f"{CANNOT} with the buffer buffer: it changes in evaluation, .*: change it in training alone, {OR_FAST}",
    ),
    "changing bool": (
        lambda: {"model": Before(changing(torch.logical_not), torch.bool)},
        f"{CANNOT} with the buffer buffer: it is bool, and changes are added up: use numbers, {OR_FAST}",
    ),
    "changing complex": (
        lambda: {"model": Before(changing(lambda buffer: buffer + 1j), torch.complex64)},
        f"{CANNOT} with the buffer buffer: it is complex64, and changes are added up: use numbers, {OR_FAST}",
    ),
    "growing buffer": (
        lambda: {"model": Before(changing(lambda buffer: buffer.repeat(2)))},
        rf"{CANNOT} with the buffer buffer: it was shape \[3\], float32 and becomes shape \[6\], float32: .*{OR_FAST}",
    ),
    "buffer of another type": (
        lambda: {"model": Before(changing(lambda buffer: buffer.double() + 1))},
        rf"{CANNOT} with the buffer buffer: it was shape \[3\], float32 and becomes shape \[3\], float64: .*{OR_FAST}",
    ),
}


def quietly(**settings: Any) -> Config:
    defaults: dict[str, Any] = {"epochs": 2, "batch_size": 16, "log_every": 1, "wandb": "disabled", "plots": False}
    return Config(**defaults | settings)


def refusals(folder: Path) -> dict[str, str]:
    """The message to each of the cases."""
    said = {}
    for name, (make, _) in REFUSED.items():
        arguments: dict[str, Any] = {"model": Layers(), "data": data()} | make()
        try:
            fit(quietly(run_dir=folder / name, **arguments.pop("settings", {})), **arguments)
            said[name] = "trained"
        except UserError as error:
            said[name] = str(error)
    return said


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.thorough), 3])
def test_what_cannot_be_trained_is_refused_with_one_message(tmp_path: Path, size: int) -> None:
    with Job(refusals, size, tmp_path) as job:
        outcomes = job.wait(150)
    for outcome in outcomes:
        assert (outcome.code, outcome.output) == (0, ""), outcome.output
    said = outcomes[0].value
    wrong = {name: text for name, text in said.items() if not re.search(REFUSED[name][1], text, re.DOTALL)}
    assert wrong == {}
    assert [outcome.value for outcome in outcomes] == [said] * size
    assert not any("\n" in text for text in said.values())
    assert list(tmp_path.iterdir()) == []


TOO_SMALL: dict[str, dict[str, Any]] = {
    "few samples in the last step": {"batch_size": 16, "micro_batches": 8},
    "many micro-batches": {"batch_size": 0, "micro_batches": 18},
    "small steps": {"batch_size": 4, "micro_batches": 2},
    "fast": FAST | {"batch_size": TRAINED_ON // 2},
}


def take_advice(folder: Path) -> dict[str, dict[str, int]]:
    """Train as the refusals of steps too small for batch norm advise, and with one less; returns the advice."""
    advice = {}
    for case, settings in TOO_SMALL.items():

        def attempt(change: dict[str, int], case: str = case, settings: dict[str, Any] = settings) -> str:
            config = quietly(run_dir=folder / f"{case} {change}", **settings | change)
            try:
                fit(config, model=batch_norm(), data=data())
            except UserError as error:
                return str(error)
            return "trained"

        advice[case] = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", attempt({}))}
        for name, value in advice[case].items():
            less = value - 1 if name == "batch_size" else value + 1
            assert attempt({name: value}) == "trained"
            assert "Expected more than 1 value per channel" in attempt({name: less})
    return advice


@pytest.mark.parametrize("size", [1, 3])
def test_the_smallest_change_that_batch_norm_needs_is_advised(tmp_path: Path, size: int) -> None:
    assert run_ranks(take_advice, size, tmp_path, timeout=150)[0] == {
        "few samples in the last step": {"batch_size": 18, "micro_batches": 1},
        "many micro-batches": {"micro_batches": 17},
        "small steps": {"batch_size": 5, "micro_batches": 1},
        "fast": {"batch_size": 18},
    }


# ---- what is trained, and its figures

OWN = {"mae": absolute_errors, "hits": lambda logits, targets: ((logits > 0) == (targets == 1)).sum()}
TRAINED: dict[str, Callable[[], dict[str, Any]]] = {
    "binary": dict,
    "plain tuples": lambda: {"data": tuple((part.inputs, part.targets) for part in data())},
    "a dictionary of data sets": lambda: {
        "data": {name: TensorDataset(*part) for name, part in data()._asdict().items()},
    },
    "numpy": lambda: {"data": data(INPUTS.numpy()[:, ::-1][:, ::-1], BINARY.numpy())},
    "lists": lambda: {"data": data(INPUTS.tolist(), BINARY.bool().tolist())},
    "inputs of float64": lambda: {"data": data(INPUTS.double())},
    "targets of int64": lambda: {"data": data(targets=BINARY.long())},
    "targets of bool": lambda: {"data": data(targets=BINARY.bool())},
    "targets of float64": lambda: {"data": data(targets=BINARY.double())},
    "inputs with a gradient": lambda: {"data": data(INPUTS.clone().requires_grad_())},
    "soft": lambda: {"data": data(targets=BINARY * 0.8 + 0.1)},
    "classes": lambda: {"model": Layers(3, lambda z: z), "data": data(targets=CLASSES)},
    "classes of uint16": lambda: {"model": Layers(3, lambda z: z), "data": data(targets=CLASSES.to(torch.uint16))},
    "one hot": lambda: {
        "model": Layers(3, lambda z: z),
        "data": data(targets=F.one_hot(CLASSES, 3).float()),
    },
    "one hot of int64": lambda: {"model": Layers(3, lambda z: z), "data": data(targets=F.one_hot(CLASSES, 3))},
    "state of any kind": lambda: {"model": Stateful({"version": 3})},
    "multilabel": lambda: {
        "model": Layers(3, lambda z: z),
        "data": data(targets=(INPUTS > 0.5).float()),
        "loss": lambda a, b: F.binary_cross_entropy_with_logits(a, b, reduction="sum"),
    },
    "regression": lambda: {
        "model": Layers(last=lambda z: z),
        "data": data(targets=INPUTS[:, :1] * 2),
        "loss": squares,
        "metrics": {"mae": absolute_errors},
    },
    "sequence": lambda: {
        "model": nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10)),
        "data": data(TOKENS, (TOKENS + 1) % 10),
        "loss": lambda a, b: F.cross_entropy(a.flatten(0, 1), b.flatten(), reduction="sum"),
    },
    "partly frozen": lambda: {"model": partly_frozen()},
    "dropout": lambda: {"model": Before(lambda _, x: F.dropout(x, 0.1))},
    "torch.rand": lambda: {"model": Before(lambda _, x: x + torch.rand(()))},
    "random": lambda: {"model": Before(lambda _, x: x * random.random())},
    "numpy.random": lambda: {"model": Before(lambda _, x: x * np.random.rand())},  # noqa: NPY002
    "random loss": lambda: {"loss": noisy},
    "random metric": lambda: {"metrics": {"noise": noisy}},
    "average": lambda: {"model": Before(moving_average)},
    "changing whole numbers": lambda: {"model": Before(changing(lambda buffer: buffer + 1), torch.int32)},
    "spectral norm": lambda: {"model": normalized(nn.utils.parametrizations.spectral_norm)},
    "batch norm": lambda: {"model": batch_norm(), "settings": {"batch_size": 19}},
    "batch norm of many samples": lambda: {"model": batch_norm(), "settings": {"micro_batches": 1}},
    "own metrics": lambda: {"metrics": OWN},
    "metrics of the package's own points": lambda: {"model": None, "data": None, "metrics": OWN},
    "prices, fast": lambda: {"data": data(targets=1e5 + INPUTS.sum(1) * 1e5), "loss": squares, "settings": FAST},
    "bfloat16, fast": lambda: {
        "model": Layers().bfloat16(),
        "data": data(INPUTS.bfloat16(), BINARY.bfloat16()),
        "settings": FAST,
    },
    "batch norm and random numbers, fast": lambda: {
        "model": nn.Sequential(nn.BatchNorm1d(FEATURES), Before(lambda _, x: F.dropout(x, 0.1))),
        "settings": FAST | {"batch_size": 0},
    },
}
AS_BINARY = (
    "plain tuples",
    "a dictionary of data sets",
    "numpy",
    "lists",
    "inputs of float64",
    "targets of int64",
    "targets of bool",
)
DRAWING = ("dropout", "torch.rand", "random", "numpy.random", "random loss")
CHANGING = (
    *DRAWING,
    "random metric",
    "average",
    "changing whole numbers",
    "spectral norm",
    "batch norm",
    "batch norm of many samples",
)
WITH_ACCURACY = {
    "binary",
    *AS_BINARY,
    "targets of float64",
    "inputs with a gradient",
    "classes",
    "classes of uint16",
    "state of any kind",
    "partly frozen",
    *CHANGING,
    "own metrics",
    "metrics of the package's own points",
    "bfloat16, fast",
    "batch norm and random numbers, fast",
}


def partly_frozen() -> nn.Module:
    model = Layers()
    model.layers[0].requires_grad_(False)
    return model


def trained(folder: Path) -> dict[str, dict[str, float]]:
    """The last figures of each of the cases."""
    found = {}
    for name, make in TRAINED.items():
        torch.manual_seed(0)
        arguments: dict[str, Any] = {"model": Layers(), "data": data()} | make()
        config = quietly(run_dir=folder / name, n_samples=56, **arguments.pop("settings", {}))
        found[name] = fit(config, **arguments).metrics
    return found


def test_figures_mean_something_and_are_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    results = {size: run_ranks(trained, size, tmp_path / str(size), timeout=150) for size in (1, 2, 3)}
    for size, found in results.items():
        for name, figures in found[0].items():
            own = TRAINED[name]().get("metrics") or {}
            names = {"loss", *own, *(["accuracy"] if name in WITH_ACCURACY else [])}
            keys = {"epoch", "step", *(f"{part}/{one}" for part in ("train", "test") for one in names), *CLOCK}
            assert set(figures) == keys, name
            assert all(math.isfinite(value) for value in figures.values())
            assert all(0 <= figures.get(f"{part}/accuracy", 0) <= 1 for part in ("train", "test"))
            summary = json.loads((tmp_path / str(size) / name / "summary.json").read_text())
            assert {key: summary[key] for key in keys} == metrics(tmp_path / str(size) / name)[-1] == figures
            if "fast" in name:
                continue
            alone = results[1][0][name]
            for rank in found:
                assert [(key, rank[name][key]) for key in alone if key not in CLOCK] == [
                    (key, alone[key]) for key in alone if key not in CLOCK
                ]
            model = (tmp_path / str(size) / name / "model.safetensors").read_bytes()
            assert model == (tmp_path / "1" / name / "model.safetensors").read_bytes()
    alike = {name: {key: row[key] for key in row if key not in CLOCK} for name, row in results[1][0].items()}
    assert [alike[name] for name in AS_BINARY] == [alike["binary"]] * len(AS_BINARY)
    assert alike["classes of uint16"] == alike["classes"]
    assert alike["one hot of int64"] == alike["one hot"]
    assert all(alike[name] != alike["binary"] for name in DRAWING)
    for name in ("own metrics", "metrics of the package's own points"):
        for part in ("train", "test"):
            assert alike[name][f"{part}/hits"] == alike[name][f"{part}/accuracy"]


class Outputs(nn.Module):
    """A model without a nonlinearity, which a plain loop can follow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(FEATURES, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layer(inputs)
        return logits.squeeze(1)


def train_full_batch(run_dir: Path, wandb: str, reduction: str) -> None:
    config = quietly(run_dir=run_dir, batch_size=0, epochs=1, wandb=wandb, plots=True, reduction=reduction)
    fit(config, model=Outputs(), data=divisible(), loss=squares, metrics={"mae": absolute_errors})


def trained_model(run_dir: Path) -> nn.Module:
    model = Outputs()
    model.load_state_dict(load_file(run_dir / "model.safetensors"))
    return model


def divisible() -> Split:
    """Targets for a regression, and as many samples as `DistributedSampler` hands out without padding."""
    whole, last = data(targets=INPUTS.sum(1)).train, TRAINED_ON // 8 * 8
    return Split(Dataset(whole.inputs[:last], whole.targets[:last]), data(targets=INPUTS.sum(1)).test)


def mean_by_hand(model: nn.Module, samples: Dataset, micro_batches: Iterator[Tensor]) -> float:
    """The mean of `absolute_errors`: each micro-batch's sum rounded to 2^-24, and rational numbers added."""
    with torch.no_grad():
        sums = [absolute_errors(model(samples.inputs[one]), samples.targets[one]).item() for one in micro_batches]
    return float(sum(round(Fraction(value) * 2**24) for value in sums) / 2**24 / len(samples.inputs))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_metric_is_what_a_plain_loop_computes(tmp_path: Path, size: int) -> None:
    with Job(train_full_batch, size, tmp_path, "disabled", "exact") as job:
        outcomes = job.wait(60)
    assert [outcome.code for outcome in outcomes] == [0] * size, outcomes[0].output
    train, test = divisible()
    numbers = TensorDataset(torch.arange(len(train.inputs)))
    order = (torch.tensor(list(DistributedSampler(numbers, 8, part, seed=42))) for part in range(8))
    expected = {
        "train/mae": mean_by_hand(Outputs(), train, order),
        "test/mae": mean_by_hand(
            trained_model(tmp_path), test, (torch.arange(part, TESTED_ON, 8) for part in range(8))
        ),
    }
    (row,) = metrics(tmp_path)
    assert {name: row[name] for name in expected} == expected
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: summary[name] for name in expected} == expected
    assert not any("accuracy" in name for name in [*row, *summary])
    losses = row["train/loss"], row["test/loss"]
    assert outcomes[0].output.splitlines()[1:] == [
        (
            f"Epoch: 0 | Loss: {losses[0]:.5f}, mae: {expected['train/mae']:.5f} | "
            f"Test loss: {losses[1]:.5f}, Test mae: {expected['test/mae']:.5f}"
        ),
        f"finished: test loss {losses[1]:.5f}, mae {expected['test/mae']:.5f}, files in {tmp_path}",
    ]
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["curves.png"]


def test_a_metric_in_fast_mode_is_what_a_plain_loop_computes(tmp_path: Path) -> None:
    run_ranks(train_full_batch, 2, tmp_path, "disabled", "fast")
    (row,) = metrics(tmp_path)
    train, test = divisible()
    for name, by, samples in (("train/mae", Outputs(), train), ("test/mae", trained_model(tmp_path), test)):
        one_batch = iter([torch.arange(len(samples.inputs))])
        assert row[name] == pytest.approx(mean_by_hand(by, samples, one_batch), rel=1e-6)


@pytest.mark.thorough
def test_a_metric_is_copied_to_wandb(tmp_path: Path) -> None:
    run_ranks(train_full_batch, 1, tmp_path, "offline", "exact")
    (row,) = metrics(tmp_path)
    (copied,) = wandb_log.history(tmp_path)
    assert {name: copied[name] for name in row} == row
    assert not any("accuracy" in name for name in copied)


def train_with_metrics(run_dir: Path, names: tuple[str, ...], fault: str | None) -> None:
    config = quietly(run_dir=run_dir, epochs=3, checkpoint_steps=1, fault=fault)
    fit(config, model=Layers(), data=data(), metrics={name: OWN[name] for name in names})


def train_with_metrics_of(names: dict[int, tuple[str, ...]], run_dir: Path) -> None:
    train_with_metrics(run_dir, names[int(os.environ["RANK"])], None)


def test_metrics_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    with Job(train_with_metrics_of, 2, {0: ("mae", "hits"), 1: ("hits", "mae")}, tmp_path) as job:
        outcomes = job.wait(60)
    for outcome in outcomes:
        assert "UserError: rank 1 was given other metrics than rank 0" in outcome.output
    assert list(tmp_path.iterdir()) == []


def test_metrics_survive_a_fault_in_mid_epoch(tmp_path: Path) -> None:
    run_ranks(train_with_metrics, 1, tmp_path / "alone", ("mae", "hits"), None)
    for size, fault in ((2, "raise@1:2"), (3, "raise@0:4"), (1, "raise@0:7")):
        (tmp_path / "killed" / "fault").unlink(missing_ok=True)
        with Job(train_with_metrics, size, tmp_path / "killed", ("mae", "hits"), fault) as job:
            assert {outcome.code for outcome in job.wait(60)} == {1}
    with Job(train_with_metrics, 1, tmp_path / "killed", ("mae",), None) as job:
        (outcome,) = job.wait(60)
    assert f"UserError: {tmp_path / 'killed'} holds a run with other metrics. Choose another run_dir=" in outcome.output
    run_ranks(train_with_metrics, 2, tmp_path / "killed", ("mae", "hits"), None)
    rows = [
        [{name: value for name, value in row.items() if name not in CLOCK} for row in metrics(tmp_path / run)]
        for run in ("alone", "killed")
    ]
    assert rows[0] == rows[1]
    assert "test/mae" in rows[0][0]
    assert bits(tmp_path / "alone") == bits(tmp_path / "killed")


# ---- the check leaves no trace


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("in_evaluation", [False, True])
def test_the_trial_changes_neither_random_numbers_nor_buffers(exact: bool, in_evaluation: bool) -> None:
    def draw(module: Before, inputs: Tensor) -> Tensor:
        if module.training or in_evaluation:
            module.buffer.add_(1)
        moving_average(module, inputs)
        return inputs * torch.rand(()) * random.random() * np.random.rand()  # noqa: NPY002

    model = Before(draw)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    expected = torch.rand(()), random.random(), np.random.rand()  # noqa: NPY002
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    buffer, device = model.buffer, torch.device("cpu")
    trial = Trial(model, None, {}, exact=exact, micro_batches=3, batch_size=16, ranks=3, device=device)
    if exact and in_evaluation:
        with pytest.raises(UserError, match="buffer: it changes in evaluation"):
            trial.run(data())
    else:
        verdict = trial.run(data())
        assert verdict == Verdict(verdict.parts, has_accuracy=True, draws=True, buffers=("buffer",))
        assert list(trial.sums) == ["loss= of data.train", "loss= of data.test"]
        assert trial.conversion == ""
    assert (torch.rand(()), random.random(), np.random.rand()) == expected  # noqa: NPY002
    assert model.buffer is buffer
    assert buffer.equal(torch.zeros(FEATURES))
    assert all(parameter.grad is None for parameter in model.parameters())
