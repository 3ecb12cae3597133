"""The contract between `fit` and the model, data, loss and metrics of its caller, checked once, before the first step.

A few samples are tried, and all inputs and targets are looked at. Every rank does it by itself: given the same, all
ranks come to the same verdict. Parameters, buffers and random states, and so every bit that follows, stay as they were.
"""

import random
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.utils.data import TensorDataset

from ddp_circles.data import Dataset, Split
from ddp_circles.errors import UserError
from ddp_circles.fixed_point import GRADIENT_BITS, LOSS_BITS, largest_term
from ddp_circles.loop import EVALUATION_BATCH, LossFunction
from ddp_circles.metrics import Metric
from ddp_circles.models import load_state, loss_sum, state_of
from ddp_circles.plain import from_bytes, to_bytes
from ddp_circles.records.run_dir import model_bytes

TRIED = 16
"""Samples of each part of the data that are tried, at most."""
CHUNK_ELEMENTS = 2**22
"""Elements that are looked at together, which bounds the memory."""
TOLERANCE = 1e-3
"""Relative difference between a sum and the sum of its parts that rounding may explain."""


# ---- the data and the names, before anything else


def check_data(data: Any) -> Split:
    """`data` as a `Split` of dense tensors without a gradient; raises `UserError` if it is none, or holds nan.

    Pairs of any kind will do, a dictionary with `train` and `test`, a `TensorDataset`; and arrays instead of tensors.
    """
    parts = []
    for part, samples in zip(Split._fields, _pair("data=", data, Split._fields), strict=True):
        given = zip(Dataset._fields, _pair(f"data.{part}", samples, Dataset._fields), strict=True)
        inputs, targets = (_as_tensor(f"data.{part}.{name}", values) for name, values in given)
        if len(inputs) != len(targets):
            raise UserError(f"data.{part} must have one target for each sample, got {len(inputs)} and {len(targets)}")
        parts.append(Dataset(inputs, targets))
    return Split(*parts)


def _pair(name: str, given: Any, keys: tuple[str, ...]) -> tuple[Any, Any]:
    """Take apart `given`, which has two parts."""
    if isinstance(given, Mapping) and set(given) == set(keys):
        given = [given[key] for key in keys]
    elif isinstance(given, TensorDataset):
        given = given.tensors
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise UserError(
            "data= must be Split(train=Dataset(inputs, targets), test=Dataset(inputs, targets)), all samples in "
            f"tensors, which fit() cuts into batches; {name} is {_kind(given)}"
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
            f"got {_kind(given)}{why}"
        )
    if len(values) == 0:
        raise UserError(f"{name} holds no samples: give one at least")
    if values.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which torch does not compute with
        values = values.long()
    if values.is_floating_point() or values.is_complex():
        _check_values(
            name, values, lambda chunk: chunk.isfinite().logical_not_(), "a finite number: leave such samples out"
        )
    return values.detach()


def _check_values(name: str, values: Tensor, wrong: Callable[[Tensor], Tensor], expected: str) -> None:
    """Raise `UserError`, naming the first sample with an element that is `wrong`."""
    if (found := _first(values, wrong)) is not None:
        number, value = found
        raise UserError(f"{name}: sample {number} holds {value}, not {expected}")


def _first(values: Tensor, wrong: Callable[[Tensor], Tensor]) -> tuple[int, Any] | None:
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
        raise UserError(f"metrics= must be a mapping from names to functions, got {_kind(metrics)}")
    for name in metrics or {}:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
            raise UserError(f"metrics= must have names that are one plain word, such as mae, got {name!r}")
        if name in ("loss", "accuracy", "samples_per_second"):
            raise UserError(f"metrics= has the name {name!r}, which is taken: choose another")
    return dict(metrics or {})


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return _form(value)
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _form(values: Tensor) -> str:
    return f"shape {list(values.shape)}, {_dtype(values)}"


def _dtype(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


# ---- the model by itself


def check_model(model: nn.Module, *, exact: bool = True) -> None:
    """Refuse, with a `UserError`, a model that has nothing to train, and those that `exact` sums are not for.

    They are those whose result depends on the rank or on how its batches are cut.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model= must be a torch.nn.Module, got {_kind(model)}")
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
    with _explained("model= has a state_dict() that fails"):
        state = state_of(model)
    for name, value in state.items():
        with _explained(f"model= cannot be saved: {name} in its state_dict() is {_kind(value)}"):
            if isinstance(value, Tensor):
                model_bytes({name: value.new_empty(0)})
            else:
                from_bytes(to_bytes(value))
    with _explained("model= cannot be continued from its own state_dict()"):
        load_state(model, state)


def _check_for_exact_sums(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) or (isinstance(module, _NormBase) and module.track_running_stats):
            why = "its result depends on the composition of each micro-batch: use GroupNorm or LayerNorm"
        elif isinstance(module, nn.RReLU) or _dropout_of(module) > 0:
            why = "its random numbers depend on the rank: leave it out"
        else:
            continue
        raise UserError(
            f"--reduction exact cannot train {name or 'the model'} ({type(module).__name__}): {why}, "
            "or use --reduction fast"
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise UserError(
                f"--reduction exact trains float32 parameters; {name} is {parameter.dtype}: use --reduction fast"
            )
        if not is_lazy(parameter) and not parameter.is_contiguous():
            raise UserError(
                f"--reduction exact trains parameters that lie in memory row by row; {name} has strides "
                f"{parameter.stride()}: make it contiguous(), or use --reduction fast"
            )


def _dropout_of(module: nn.Module) -> float:
    """The dropout probability of `module` itself: a dropout layer's, or that inside attention or recurrent layers."""
    share = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
    return share if isinstance(share, (int, float)) else 0.0


# ---- all of it at work on a few samples


def check_training(
    model: nn.Module,
    split: Split,
    loss: LossFunction | None,
    metrics: Mapping[str, Metric],
    *,
    exact: bool,
    micro_batches: int,
    batch_size: int,
    ranks: int,
) -> tuple[Split, bool, dict[str, float]]:
    """Try model, loss and metrics on a few samples, in training mode on those to train on, as the loop will.

    `loss`: None for the default, whose targets are all looked at. `micro_batches`: pieces of each step, of `batch_size`
    samples, 0 for all, over so many `ranks`. Returns the samples in the types that model and loss need; True if
    accuracy means something for these logits and targets; and the sums that were tried, by argument. Raises
    `UserError`, naming the argument and what was expected of it.
    """
    accuracy, tried, taken = True, {}, list[Dataset]()
    sums = {"loss=": loss or loss_sum} | {f"metrics= {name!r}": metric for name, metric in metrics.items()}
    before = _Snapshot(model)
    try:
        for part, samples, most in (("train", split.train, batch_size), ("test", split.test, EVALUATION_BATCH)):
            training, count = part == "train", len(samples.inputs)
            types = [values.dtype for values in samples]
            if types[0] == torch.float64 and _dtype_of(model) == torch.float32:
                types[0] = torch.float32
            batch = min(most or count, count)
            terms = _Terms(micro_batches, batch, exact=exact)
            model.train(training)
            with torch.inference_mode(mode=not training):
                inputs, targets = samples.inputs[:TRIED].to(types[0]), samples.targets[:TRIED]
                logits = _run(model, inputs, f"data.{part}.inputs")
                if exact:
                    _check_repeatable(model, before, inputs, logits)
                if loss is None:
                    types[1] = _check_targets(f"data.{part}.targets", samples.targets, logits)
                    targets = targets.to(types[1])
                for what, function in sums.items():
                    total = _check_sum(what, function, logits, targets)
                    terms.check(what, total / len(inputs) * terms.largest, LOSS_BITS)
                    tried[f"{what} of data.{part}"] = total.item()
                    if training and what == "loss=":
                        _check_gradients(model, total, len(inputs), terms)
                last = count % batch or batch
                least = max(1, last // micro_batches)
                for size in [least, 0] if last < micro_batches or ranks > micro_batches else [least]:
                    name = f"data.{part}.inputs[:{size}], as few as a step may leave a rank,"
                    fewer_logits = _run(model, inputs[:size], name)
                    for what, function in sums.items():
                        _call(what, function, fewer_logits, targets[:size])
            if exact and (moved := before.moved()):
                raise UserError(f"--reduction exact cannot use a loss= or metrics= {_drawing(moved)}")
            taken.append(Dataset(*(values.to(dtype) for values, dtype in zip(samples, types, strict=True))))
            accuracy = accuracy and _has_accuracy(logits, taken[-1].targets)
    finally:
        before.restore()
    return Split(*taken), accuracy, tried


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    """The floating-point type of the first parameter that has one."""
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)


def _run(model: nn.Module, inputs: Tensor, name: str) -> Tensor:
    """The logits of `inputs`, one row for each sample."""
    own = _dtype_of(model) or inputs.dtype
    convert = ".float()" if own == torch.float32 else f".to({own})"
    hint = f"; the model's parameters are {own}: convert the inputs with {convert} if they should be too"
    with _explained(f"model= failed on {name} of {_form(inputs)}", hint if own != inputs.dtype else ""):
        logits = model(given := inputs.clone())
    if not _same(given, inputs):
        raise UserError("model= changes its inputs in place, which are needed again: let it work on a copy")
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise UserError(f"model= must return one tensor of floating-point logits, got {_kind(logits)}")
    if logits.ndim == 0 or len(logits) != len(inputs):
        raise UserError(
            f"model= must return logits whose first dimension is the samples: for inputs of shape {list(inputs.shape)} "
            f"it returned shape {list(logits.shape)} (squeeze() needs a dimension: squeeze(1))"
        )
    return logits


def _check_targets(name: str, targets: Tensor, logits: Tensor) -> torch.dtype:
    """Check that the default loss means something for `targets`, all of them; returns the type that it needs."""
    shape, binary, floating = targets.shape[1:], logits.ndim == 1, targets.is_floating_point()
    numbers = shape == logits.shape[2:] and (binary or not floating)
    probabilities = logits.ndim == 2 and shape == logits.shape[1:]
    if targets.is_complex() or not (numbers or probabilities) or (not binary and logits.shape[1] < 2):
        given = [f"[{', '.join(['n', *map(str, values.shape[1:])])}], {_dtype(values)}" for values in (logits, targets)]
        raise UserError(
            f"logits {given[0]}, do not go with {name} {given[1]}: for two classes give logits [n] and targets [n] "
            "of 0 and 1; for more, logits [n, classes] and whole class numbers [n]; squeeze(1) removes a dimension of "
            "1; for any other task pass loss=, the SUM over the samples"
        )
    if probabilities or binary:
        expected = "a number between 0 and 1: scale them, or pass a loss= for what they mean"
        _check_values(name, targets, _outside(1), expected)
    else:
        last = logits.shape[1] - 1
        _check_values(name, targets, _outside(last), f"a class number from 0 to {last}, as the {last + 1} logits need")
    if probabilities:
        unsure = _first(targets.sum(dim=1, dtype=torch.float32), lambda chunk: (chunk - 1).abs() > 0.01)
        if unsure is not None:
            raise UserError(
                f"{name}: the probabilities of sample {unsure[0]} add up to {unsure[1]:g}, not 1: for classes that do "
                "not exclude each other pass loss=, such as binary_cross_entropy_with_logits with reduction='sum'"
            )
    return logits.dtype if binary or probabilities else torch.int64


def _outside(last: int) -> Callable[[Tensor], Tensor]:
    return lambda chunk: ((chunk >= 0) & (chunk <= last)).logical_not_()


def _has_accuracy(logits: Tensor, targets: Tensor) -> bool:
    """True for logits [n] and targets of 0 and 1, and for logits [n, classes] and class numbers."""
    if targets.ndim != 1 or logits.ndim > 2:
        return False
    if logits.ndim == 1:
        return _first(targets, lambda chunk: (chunk != 0) & (chunk != 1)) is None
    classes = logits.shape[1]
    return classes > 1 and targets.dtype == torch.int64 and _first(targets, _outside(classes - 1)) is None


def _call(what: str, function: Metric, logits: Tensor, targets: Tensor) -> Tensor:
    """The function's sum, a finite scalar; of no samples it must be 0."""
    with _explained(f"{what} failed on logits of {_form(logits)}, and targets of {_form(targets)}"):
        value = function(*(given := (logits.clone(), targets.clone())))
    if not (_same(given[0], logits) and _same(given[1], targets)):
        raise UserError(f"{what} changes logits or targets in place, which are needed again: let it work on copies")
    if not isinstance(value, Tensor) or value.ndim or value.is_complex() or value.device != logits.device:
        kind = f"{_kind(value)}{f' on {value.device}' if isinstance(value, Tensor) else ''}"
        raise UserError(f"{what} must return the SUM over the samples, a scalar tensor beside the logits, got {kind}")
    if not value.isfinite() or (len(logits) == 0 and value != 0):
        raise UserError(
            f"{what} returned {value.item():g} for {len(logits)} samples before the first step: it must return their "
            "SUM, a finite number, and 0 for none"
        )
    return value


def _check_sum(what: str, function: Metric, logits: Tensor, targets: Tensor) -> Tensor:
    """The function's sum, which must be that of its parts."""
    count, cut = len(logits), max(1, len(logits) // 3)
    whole = _call(what, function, logits, targets)
    if count > 1:
        first, rest = (_call(what, function, logits[at], targets[at]) for at in (slice(cut), slice(cut, None)))
        a, b, c = whole.item(), first.item(), rest.item()
        rounding = torch.finfo(whole.dtype).eps if whole.is_floating_point() else 0.0
        if abs(a - (b + c)) > max(TOLERANCE, 4 * rounding) * (abs(a) + abs(b) + abs(c)):
            advice = "use reduction='sum', or .sum() in place of .mean()"
            if logits.shape != targets.shape and logits.numel() == targets.numel():
                advice = (
                    f"logits {list(logits.shape)} and targets {list(targets.shape)} are combined each with each: give "
                    "them one shape, with squeeze(1) or unsqueeze(1)"
                )
            raise UserError(
                f"{what} must return the SUM over the samples: of {count} samples it gave {a:g}, but of the first "
                f"{cut} {b:g} and of the rest {c:g}, which do not add up to it: {advice}"
            )
    return whole


def _check_gradients(model: nn.Module, total: Tensor, count: int, terms: "_Terms") -> None:
    """Check that every parameter takes part in `total`, the loss of `count` samples."""
    if not total.requires_grad:
        raise UserError("loss= does not depend on the parameters: detach(), item() or no_grad() has cut it off")
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with _explained("the backward pass of loss= failed"):
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    if idle := [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]:
        raise UserError(
            f"model= has parameters that take no part in the loss: {', '.join(idle)}: remove them, or freeze them with "
            "requires_grad_(False)"
        )
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient.layout != torch.strided:
            raise UserError(f"model= has sparse gradients for {name}: build the layer with sparse=False")
        if not gradient.numel():
            continue
        peak = torch.linalg.vector_norm(gradient.float(), torch.inf)
        if not peak.isfinite():
            raise UserError(f"the gradient of {name} is not finite before the first step: look at model= and loss=")
        terms.check(f"the gradient of {name}", peak / count * terms.largest / terms.batch, GRADIENT_BITS)


class _Terms:
    """The terms of the sums over a step of `batch` samples: at most `largest` samples each."""

    def __init__(self, micro_batches: int, batch: int, *, exact: bool) -> None:
        self._micro_batches = micro_batches
        self._exact = exact
        self.batch = batch
        self.largest = -(-batch // micro_batches)

    def check(self, what: str, value: Tensor, bits: int) -> None:
        """Refuse a `value` that the exact sums cannot hold as one of their terms."""
        limit = largest_term(self._micro_batches, bits)
        if self._exact and not abs(value.item()) < limit:
            raise UserError(
                f"{what} comes to about {value.item():.1e} in a micro-batch of {self.largest} samples, and the exact "
                f"sums hold less than {limit:.1e}: scale targets and inputs to about 1, or use --reduction fast"
            )


@contextmanager
def _explained(what: str, hint: str = "") -> Iterator[None]:
    """Turn an error of the caller's code into a `UserError` that says where it was raised."""
    try:
        yield
    except Exception as error:
        ours = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
        place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{what}: {type(error).__name__}: {reason}{place}{hint}") from None


# ---- random numbers and buffers, which exact sums cannot have yet


def _check_repeatable(model: nn.Module, before: "_Snapshot", inputs: Tensor, logits: Tensor) -> None:
    """Refuse a model with random numbers or changing buffers: both would depend on the rank."""
    if moved := before.moved():
        raise UserError(f"--reduction exact cannot train a model {_drawing(moved)}")
    if changed := before.changed():
        raise UserError(
            f"--reduction exact cannot train a model whose forward pass changes a buffer ({', '.join(changed)}): its "
            "value would depend on the rank. Leave it out, or use --reduction fast"
        )
    if not _same(_run(model, inputs, "the same inputs"), logits):
        raise UserError(
            "--reduction exact cannot train a model that gives two results for the same samples: its result would "
            "depend on the rank. Leave out what changes from call to call, or use --reduction fast"
        )


def _drawing(moved: list[str]) -> str:
    return (
        f"that draws random numbers ({', '.join(moved)}): they would depend on the rank. Leave them out, or use "
        "--reduction fast"
    )


class _Snapshot:
    """The random states of this process and the buffers of `model`, to be compared and restored."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._generators: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
            "torch's generator": (torch.get_rng_state, torch.set_rng_state),
            "Python's random": (random.getstate, random.setstate),
            "numpy.random": (np.random.get_state, np.random.set_state),
        }
        if next(model.parameters()).is_cuda:
            self._generators["torch's generator on cuda"] = (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
        self._states = {name: get() for name, (get, _) in self._generators.items()}
        self._buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}

    def moved(self) -> list[str]:
        """The generators that were drawn from."""
        return [name for name, (get, _) in self._generators.items() if not _same(get(), self._states[name])]

    def changed(self) -> list[str]:
        """The buffers that hold something else."""
        now = dict(self._model.named_buffers())
        return [name for name, (_, value) in self._buffers.items() if not _same(now.get(name), value)]

    def restore(self) -> None:
        """Put everything back."""
        for name, (_, put) in self._generators.items():
            put(self._states[name])
        for name, (buffer, value) in self._buffers.items():
            module, _, own_name = name.rpartition(".")
            setattr(self._model.get_submodule(module), own_name, buffer)
            if not _same(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def _same(one: Any, other: Any) -> bool:
    """True for equal states; NaN equals NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())  # noqa: PLR0124
    return str(one) == str(other)
