"""The contract between `fit` and the data, metrics and model that its caller brings: what can be seen of them at rest.

Every rank looks by itself: given the same, all ranks come to the same verdict. See `trial` for all of it at work.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils.data import IterableDataset, TensorDataset

from ddp_circles.data import Dataset, Split, digest
from ddp_circles.errors import UserError
from ddp_circles.explain import explained, kind_of
from ddp_circles.loading import Reader
from ddp_circles.metrics import Metric
from ddp_circles.models import load_state, state_of
from ddp_circles.plain import from_bytes, to_bytes
from ddp_circles.records.run_dir import model_bytes

Part = Dataset | Reader
"""Samples to train on or to test on."""
CHUNK_ELEMENTS = 2**22
"""Elements that are looked at together, which bounds the memory."""


# ---- the data and the names


def check_data(data: Any, seed: int) -> Split[Part]:
    """`data` as a `Split` of dense tensors without a gradient, or of readers of map-style data sets.

    Pairs of any kind will do, a dictionary with `train` and `test`, a `TensorDataset`; and arrays instead of tensors.
    Raises `UserError` for anything else, and for tensors that hold nan.
    """
    parts = zip(Split._fields, _pair("data=", data, Split._fields), strict=True)
    return Split(*(_check_part(f"data.{name}", samples, seed) for name, samples in parts))


def _check_part(name: str, samples: Any, seed: int) -> Part:
    if _is_map_style(samples):
        with explained(f"{name} cannot tell its length and fingerprint"):
            reader, fingerprint = Reader(samples, name, seed), getattr(samples, "fingerprint", "")
        if reader.length == 0:
            raise UserError(f"{name} holds no samples: give one at least")
        if not isinstance(fingerprint, str):
            raise UserError(f"{name}.fingerprint must be a text, got {kind_of(fingerprint)}")
        return reader
    given = zip(Dataset._fields, _pair(name, samples, Dataset._fields), strict=True)
    inputs, targets = (_as_tensor(f"{name}.{part}", values) for part, values in given)
    if len(inputs) != len(targets):
        raise UserError(f"{name} must have one target for each sample, got {len(inputs)} and {len(targets)}")
    return Dataset(inputs, targets)


def _is_map_style(samples: Any) -> bool:
    """True for a data set whose samples are to be read one by one."""
    if isinstance(samples, (tuple, list, Mapping, str, Tensor, np.ndarray, TensorDataset, IterableDataset)):
        return False
    return hasattr(samples, "__getitem__") and hasattr(samples, "__len__")


def identify(data: Split[Part]) -> str:
    """A text that tells these samples from others: the digest of tensors, length and fingerprint of a data set."""
    return ", ".join(digest(part) if isinstance(part, Dataset) else part.describe() for part in data)


def _pair(name: str, given: Any, keys: tuple[str, ...]) -> tuple[Any, Any]:
    """Take apart `given`, which has two parts."""
    if isinstance(given, Mapping) and set(given) == set(keys):
        given = [given[key] for key in keys]
    elif isinstance(given, TensorDataset):
        given = given.tensors
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise UserError(
            "data= must be Split(train=Dataset(inputs, targets), test=Dataset(inputs, targets)), all samples in "
            "tensors, or Split(train=..., test=...) of map-style data sets, with a length and items (inputs, target): "
            f"fit() makes the batches; {name} is {kind_of(given)}"
        )
    return given[0], given[1]


def _as_tensor(name: str, given: Any) -> Tensor:
    values, why = given, ""
    if not isinstance(given, Tensor):
        try:
            values = torch.from_numpy(np.require(given, requirements=("C", "W")))
        except (TypeError, ValueError) as error:
            why = f": {error}"
    if not isinstance(values, Tensor) or values.layout != torch.strided or values.is_meta or values.ndim == 0:
        raise UserError(
            f"{name} must be a dense tensor or array of numbers, its first dimension the samples, "
            f"got {kind_of(given)}{why}"
        )
    if len(values) == 0:
        raise UserError(f"{name} holds no samples: give one at least")
    if values.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which torch does not compute with
        values = values.long()
    if values.is_floating_point() or values.is_complex():
        check_values(
            name, values, lambda chunk: chunk.isfinite().logical_not_(), "a finite number: leave such samples out"
        )
    return values.detach()


def check_values(name: str, values: Tensor, wrong: Callable[[Tensor], Tensor], expected: str) -> None:
    """Raise `UserError`, naming the first sample with an element that is `wrong`."""
    if (found := first_wrong(values, wrong)) is not None:
        number, value = found
        raise UserError(f"{name}: sample {number} holds {value}, not {expected}")


def first_wrong(values: Tensor, wrong: Callable[[Tensor], Tensor]) -> tuple[int, Any] | None:
    """The first element that is `wrong`, behind the number of its sample; None if there is none."""
    rows = max(1, CHUNK_ELEMENTS // max(1, values[0].numel()))
    for start in range(0, len(values), rows):
        chunk = values[start : start + rows]
        found = wrong(chunk)
        if found.any():
            row = int(found.reshape(len(found), -1).any(dim=1).nonzero()[0])
            return start + row, chunk[row][found[row]][0].item()
    return None


def check_metrics(metrics: Mapping[str, Metric] | None) -> dict[str, Metric]:
    """The metrics by name; raises `UserError` for a name that cannot be a key, or that is taken."""
    if not isinstance(metrics or {}, Mapping):
        raise UserError(f"metrics= must be a mapping from names to functions, got {kind_of(metrics)}")
    for name in metrics or {}:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
            raise UserError(f"metrics= must have names that are one plain word, such as mae, got {name!r}")
        if name in ("loss", "accuracy", "grad_norm", "samples_per_second"):
            raise UserError(f"metrics= has the name {name!r}, which is taken: choose another")
    return dict(metrics or {})


# ---- the model by itself


def check_model(model: nn.Module, *, exact: bool = True) -> None:
    """Refuse, with a `UserError`, a model that has nothing to train, and those that `exact` sums are not for.

    They are those whose result depends on the rank or on how its batches are cut.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model= must be a torch.nn.Module, got {kind_of(model)}")
    if exact:
        _check_for_exact_sums(model)
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise UserError(f"model= has a lazy parameter, {name}: run the model on a sample before it is trained")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model= has no parameter that requires a gradient: there is nothing to train")
    _check_state(model)


def _check_state(model: nn.Module) -> None:
    """Refuse a model whose state cannot be saved, or not be loaded again: better than at the end of the training."""
    with explained("model= has a state_dict() that fails"):
        state = state_of(model)
    for name, value in state.items():
        with explained(f"model= cannot be saved: {name} in its state_dict() is {kind_of(value)}"):
            if isinstance(value, Tensor):
                model_bytes({name: value.new_empty(0)})
            else:
                from_bytes(to_bytes(value))
    with explained("model= cannot be continued from its own state_dict()"):
        load_state(model, state)


def _check_for_exact_sums(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            why = "it normalises over all ranks' samples: use BatchNorm, which normalises each micro-batch by itself"
        elif isinstance(module, _NormBase) and module.track_running_stats and module.momentum is None:
            why = "it averages over all batches so far, and not over steps: give it a momentum, such as 0.1"
        else:
            continue
        raise UserError(
            f"--reduction exact cannot train {name or 'the model'} ({type(module).__name__}): {why}, "
            "or use --reduction fast"
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise UserError(
                f"--reduction exact trains float32 parameters; {name} is {parameter.dtype}: convert the model with "
                ".float(), or use --reduction fast"
            )
        if not is_lazy(parameter) and not parameter.is_contiguous():
            raise UserError(
                f"--reduction exact trains parameters that lie in memory row by row; {name} has strides "
                f"{parameter.stride()}: make it contiguous(), or use --reduction fast"
            )
