"""The trial of model, data, loss and metrics at work, on a few samples, once, before the first step.

Every rank tries by itself: given the same, all ranks come to the same verdict. Parameters, buffers and random states,
and so every bit that follows, stay as they were.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddp_circles.contract import Part, check_values, first_wrong
from ddp_circles.data import Dataset, Split, digest, leaves, mapped, same
from ddp_circles.errors import SampleError, UserError
from ddp_circles.explain import dtype_of, explained, kind_of
from ddp_circles.fixed_point import BUFFER_BITS, GRADIENT_BITS, LOSS_BITS, largest_term
from ddp_circles.loading import Needs
from ddp_circles.loop import EVALUATION_BATCH, LossFunction
from ddp_circles.metrics import Metric
from ddp_circles.models import loss_sum
from ddp_circles.random_numbers import RandomStates, random_states_as_found, seed_generators

TRIED = 16
"""Samples of each part of the data that are tried, at most."""
TOLERANCE = 1e-3
"""Relative difference between a sum and the sum of its parts that rounding may explain."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a trial."""

    parts: Split[Part]
    """The samples, in the types that model and loss need."""
    has_accuracy: bool = True
    """True if accuracy means something for these logits and targets."""
    draws: bool = False
    """True if random numbers are drawn from other generators than torch's."""
    buffers: tuple[str, ...] = ()
    """The buffers that the forward pass changes in training, by name."""


class Trial:
    """A trial of `model`, `loss` and `metrics`, for steps of `batch_size` samples, 0 for all.

    `loss`: None for the default, whose targets are all looked at, where they are in tensors. `micro_batches`: pieces of
    each step, which run on so many `ranks`. The methods raise `UserError`, which names the argument and what was
    expected of it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction | None,
        metrics: Mapping[str, Metric],
        *,
        exact: bool,
        micro_batches: int,
        batch_size: int,
        ranks: int,
        device: torch.device,
    ) -> None:
        self._model, self._exact, self._ranks, self._device = model, exact, ranks, device
        self._micro_batches, self._batch_size = micro_batches, batch_size
        self._is_default = loss is None
        self._functions = {"loss=": loss or loss_sum}
        self._functions |= {f"metrics= {name!r}": metric for name, metric in metrics.items()}
        self._state = _State(model)
        self._draws = False
        self._buffers: tuple[str, ...] = ()
        self.sums: dict[str, float] = {}
        """The sums that were tried, by argument and part of the data."""
        self.digests: dict[str, str] = {}
        """Of the samples that were read from data sets, by name."""
        self.conversion = ""
        """What becomes of inputs of another type than the model's, in words."""

    def run(self, split: Split[Part]) -> Verdict:
        """Try all on samples of both parts, in training mode on those to train on, as the loop will."""
        most = EVALUATION_BATCH if isinstance(split.test, Dataset) else self._batch_size or EVALUATION_BATCH
        with random_states_as_found():
            try:
                train, has_accuracy = self._try_part("data.train", split.train, self._batch_size, training=True)
                test, tested_too = self._try_part("data.test", split.test, most, training=False)
            finally:
                self._state.restore_buffers()
        return Verdict(Split(train, test), has_accuracy and tested_too, self._draws, self._buffers)

    def _try_part(self, name: str, samples: Part, most: int, *, training: bool) -> tuple[Part, bool]:
        """Try `samples`; returns them in the types that are needed, and True if accuracy means something for them."""
        count = len(samples.inputs) if isinstance(samples, Dataset) else samples.length
        terms = _Terms(self._micro_batches, min(most or count, count), exact=self._exact)
        self._model.train(training)
        self._state.restore_buffers()
        with torch.inference_mode(mode=not training):
            inputs, targets = self._first(samples)
            before = self._seed()
            logits = self._run_twice(name, inputs, terms) if self._exact else self._run(name, inputs)
            targets_type = None
            if self._is_default:
                everything = samples.targets if isinstance(samples, Dataset) else targets
                targets_type = _check_targets(f"{name}.targets", everything, logits)
                targets = targets.to(targets_type)
            for what, function in self._functions.items():
                total = _check_sum(what, function, logits, targets)
                terms.check(what, total / len(logits) * terms.largest, LOSS_BITS)
                self.sums[f"{what} of {name}"] = total.item()
                if training and what == "loss=":
                    _check_gradients(self._model, total, len(logits), terms)
            self._draws = self._draws or bool(before.moved())
            self._try_fewer(name, inputs, targets, count, terms.batch)
        if isinstance(samples, Dataset):
            taken = Dataset(self._converted(samples.inputs), samples.targets.to(targets_type or samples.targets.dtype))
            return taken, _has_accuracy(logits, taken.targets)
        # Of a data set only a few targets are seen, so the others are checked as they are read.
        has_accuracy = self._is_default and _has_accuracy(logits, targets)
        classes = logits.shape[1] if targets_type == torch.int64 else 2
        samples.needs = Needs(
            torch.float32 if _dtype_of(self._model) == torch.float32 else None,
            targets_type,
            classes - 1 if self._is_default else None,
            has_accuracy,
        )
        samples.empty = mapped(lambda tensor: tensor[:0].clone(), (inputs, targets))
        return samples, has_accuracy

    def _run(self, name: str, inputs: Any) -> Tensor:
        """The logits of `inputs`; notes the buffers that are changed in training."""
        logits = _logits_of(self._model, inputs, f"{name}.inputs")
        self._state.check_names()
        if self._model.training:
            self._buffers = self._state.written(self._exact)
        return logits

    def _run_twice(self, name: str, inputs: Any, terms: "_Terms") -> Tensor:
        """The logits of `inputs`, which must be the same from the same random numbers and buffers."""
        first = self._run(name, inputs)
        self._state.check_changes(terms, training=self._model.training)
        self._state.restore_buffers()
        self._seed()
        logits = self._run(name, inputs)
        if not same(first, logits):
            raise UserError(
                "--reduction exact cannot train a model that gives two results for the same samples and random "
                "numbers: its result would depend on the rank. Leave out what changes from call to call, or "
                "use --reduction fast"
            )
        return logits

    def _first(self, samples: Part) -> tuple[Any, Any]:
        """Inputs and targets of the first few samples, on the device, in the type of the model."""
        given, targets = self._read(samples)
        inputs = mapped(self._converted, given)
        if any(one.dtype != other.dtype for one, other in zip(leaves(given), leaves(inputs), strict=True)):
            to = _dtype_of(self._model)
            self.conversion = f"the inputs of data= are converted from torch.float64 to {to}, as the parameters are"
        return inputs, targets

    def _read(self, samples: Part) -> tuple[Any, Any]:
        if isinstance(samples, Dataset):
            return samples.inputs[:TRIED], samples.targets[:TRIED]
        numbers = range(min(TRIED, samples.length))
        try:
            first = samples.read(0, numbers)
            again = samples.read(0, numbers) if self._exact else first
        except SampleError as error:
            raise UserError(str(error)) from None
        if not same(first, again):
            raise UserError(
                f"{samples.name} gives other samples when it is read again with the same random numbers: draw from "
                "torch's global generator, Python's random or numpy.random, which are seeded for each sample, and not "
                "from a generator of its own; or use --reduction fast"
            )
        if any(tensor.is_cuda for tensor in leaves(first)):
            raise UserError(f"{samples.name} gives samples on a GPU: leave them on the CPU, fit() moves them")
        self.digests[samples.name] = digest(leaves(first))
        on_device: tuple[Any, Any] = mapped(lambda tensor: tensor.to(self._device), first)
        return on_device

    def _converted(self, values: Tensor) -> Tensor:
        """Inputs in the type of the model."""
        return values.float() if values.dtype == torch.float64 and _dtype_of(self._model) == torch.float32 else values

    @staticmethod
    def _seed() -> RandomStates:
        """Seed all generators, alike for each pass; returns their states."""
        seed_generators("trial")
        return RandomStates(but_torch=True)

    def _try_fewer(self, name: str, inputs: Any, targets: Any, count: int, batch: int) -> None:
        """Try as few samples as a step of `batch` out of `count` may leave a micro-batch, or a rank."""
        last = count % batch or batch
        least = max(1, last // self._micro_batches)
        for size in [least, 0] if last < self._micro_batches or self._ranks > self._micro_batches else [least]:
            try:
                self._try_so_few(name, inputs, targets, size)
            except UserError as error:
                # Batch norm needs more than one value of each channel, for instance.
                enough = next((more for more in range(size + 1, TRIED) if self._works(inputs, targets, more)), None)
                if not size or enough is None or not self._model.training:
                    raise
                raise UserError(f"{error}. {self._larger(count, batch, size, enough)}") from None

    def _try_so_few(self, name: str, inputs: Any, targets: Any, size: int) -> None:
        fewer, fewer_targets = mapped(lambda tensor: tensor[:size], (inputs, targets))
        logits = _logits_of(self._model, fewer, f"{name}.inputs[:{size}], as few as a step may leave a rank,")
        for what, function in self._functions.items():
            _call(what, function, logits, fewer_targets)

    def _works(self, inputs: Any, targets: Any, size: int) -> bool:
        try:
            self._try_so_few("", inputs, targets, size)
        except UserError:
            return False
        return True

    def _larger(self, count: int, batch: int, size: int, enough: int) -> str:
        """Advice for a model that needs `enough` samples at once, and not `size`."""
        pieces = self._micro_batches

        def smallest(batch_size: int) -> int:
            return min(batch_size, count % batch_size or batch_size) // pieces

        sizes = (f"--batch-size {more}" for more in range(batch, count + 1) if smallest(more) >= enough)
        advice = [text for text in (next(sizes, None), self._fewer_pieces(count % batch or batch, enough)) if text]
        kind = "micro-batches" if self._exact else "ranks"
        return (
            f"A step of {_spell(count % batch or batch)} leaves {size} to one of {pieces} {kind}, and the model needs "
            f"{enough}"
            + (f": the smallest change that will do is {' or '.join(advice)}" if advice else ": give more samples")
        )

    def _fewer_pieces(self, samples: int, enough: int) -> str | None:
        """The most micro-batches that leave each enough of a step's samples; of ranks, no flag tells the number."""
        return f"--micro-batches {samples // enough}" if self._exact and samples >= enough else None


def _spell(samples: int) -> str:
    return f"{samples} sample{'s' * (samples != 1)}"


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    """The floating-point type of the first parameter that has one."""
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)


def _logits_of(model: nn.Module, inputs: Any, name: str) -> Tensor:
    """The logits of `inputs`, one row for each sample."""
    own, hint = _dtype_of(model), ""
    if own is not None and isinstance(inputs, Tensor) and inputs.dtype != own:
        convert = ".float()" if own == torch.float32 else f".to({own})"
        hint = f"; the model's parameters are {own}: convert the inputs with {convert} if they should be too"
    versions = [parameter._version for parameter in model.parameters()]  # noqa: SLF001 - counts changes in place
    with explained(f"model= failed on {name} of {_form(inputs)}", hint):
        logits = model(given := mapped(Tensor.clone, inputs))
    if versions != [parameter._version for parameter in model.parameters()]:  # noqa: SLF001
        raise UserError("model= changes its parameters in its forward pass: leave that to the optimizer")
    if not same(given, inputs):
        raise UserError("model= changes its inputs in place, which are needed again: let it work on a copy")
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise UserError(f"model= must return one tensor of floating-point logits, got {kind_of(logits)}")
    if logits.ndim == 0 or len(logits) != len(leaves(inputs)[0]):
        raise UserError(
            f"model= must return logits whose first dimension is the samples: for inputs of {_form(inputs)} "
            f"it returned shape {list(logits.shape)} (squeeze() needs a dimension: squeeze(1))"
        )
    return logits


def _form(values: Any) -> str:
    """The kind of a tensor, or of the tensors that are put together in `values`."""
    return kind_of(values) if isinstance(values, Tensor) else f"({'; '.join(map(kind_of, leaves(values)))})"


def _check_targets(name: str, targets: Any, logits: Tensor) -> torch.dtype:
    """Check that the default loss means something for all `targets`; returns the type that it needs."""
    if not isinstance(targets, Tensor):
        raise UserError(f"{name} must be a tensor or numbers, or pass loss= for what they are, got {kind_of(targets)}")
    shape, binary, floating = targets.shape[1:], logits.ndim == 1, targets.is_floating_point()
    numbers = shape == logits.shape[2:] and (binary or not floating)
    probabilities = logits.ndim == 2 and shape == logits.shape[1:]
    if targets.is_complex() or not (numbers or probabilities) or (not binary and logits.shape[1] < 2):
        given = [
            f"[{', '.join(['n', *map(str, values.shape[1:])])}], {dtype_of(values)}" for values in (logits, targets)
        ]
        raise UserError(
            f"logits {given[0]}, do not go with {name} {given[1]}: for two classes give logits [n] and targets [n] "
            "of 0 and 1; for more, logits [n, classes] and whole class numbers [n]; squeeze(1) removes a dimension of "
            "1; for any other task pass loss=, the SUM over the samples"
        )
    if probabilities or binary:
        expected = "a number between 0 and 1: scale them, or pass a loss= for what they mean"
        check_values(name, targets, _outside(1), expected)
    else:
        last = logits.shape[1] - 1
        check_values(name, targets, _outside(last), f"a class number from 0 to {last}, as the {last + 1} logits need")
    if probabilities:
        unsure = first_wrong(targets.sum(dim=1, dtype=torch.float32), lambda chunk: (chunk - 1).abs() > 0.01)
        if unsure is not None:
            raise UserError(
                f"{name}: the probabilities of sample {unsure[0]} add up to {unsure[1]:g}, not 1: for classes that do "
                "not exclude each other pass loss=, such as binary_cross_entropy_with_logits with reduction='sum'"
            )
    return logits.dtype if binary or probabilities else torch.int64


def _outside(last: int) -> Callable[[Tensor], Tensor]:
    return lambda chunk: ((chunk >= 0) & (chunk <= last)).logical_not_()


def _has_accuracy(logits: Tensor, targets: Any) -> bool:
    """True for logits [n] and targets of 0 and 1, and for logits [n, classes] and class numbers."""
    if not isinstance(targets, Tensor) or targets.ndim != 1 or logits.ndim > 2:
        return False
    if logits.ndim == 1:
        return first_wrong(targets, lambda chunk: (chunk != 0) & (chunk != 1)) is None
    classes = logits.shape[1]
    return classes > 1 and targets.dtype == torch.int64 and first_wrong(targets, _outside(classes - 1)) is None


def _call(what: str, function: Metric, logits: Tensor, targets: Any) -> Tensor:
    """The function's sum, a finite scalar; of no samples it must be 0."""
    with explained(f"{what} failed on logits of {_form(logits)}, and targets of {_form(targets)}"):
        value = function(*(given := mapped(Tensor.clone, (logits, targets))))
    if not same(given, (logits, targets)):
        raise UserError(f"{what} changes logits or targets in place, which are needed again: let it work on copies")
    if not isinstance(value, Tensor) or value.ndim or value.is_complex() or value.device != logits.device:
        kind = f"{kind_of(value)}{f' on {value.device}' if isinstance(value, Tensor) else ''}"
        raise UserError(f"{what} must return the SUM over the samples, a scalar tensor beside the logits, got {kind}")
    if not value.isfinite() or (len(logits) == 0 and value != 0):
        raise UserError(
            f"{what} returned {value.item():g} for {len(logits)} samples before the first step: it must return their "
            "SUM, a finite number, and 0 for none"
        )
    return value


def _check_sum(what: str, function: Metric, logits: Tensor, targets: Any) -> Tensor:
    """The function's sum, which must be that of its parts."""
    count, cut = len(logits), max(1, len(logits) // 3)
    before = RandomStates()
    whole = _call(what, function, logits, targets)
    if count > 1 and not before.moved():  # with other random numbers the parts would come to something else
        first, rest = (_call(what, function, *parts) for parts in _cut(cut, (logits, targets)))
        a, b, c = whole.item(), first.item(), rest.item()
        rounding = torch.finfo(whole.dtype).eps if whole.is_floating_point() else 0.0
        if abs(a - (b + c)) > max(TOLERANCE, 4 * rounding) * (abs(a) + abs(b) + abs(c)):
            advice = "use reduction='sum', or .sum() in place of .mean()"
            if isinstance(targets, Tensor) and logits.shape != targets.shape and logits.numel() == targets.numel():
                advice = (
                    f"logits {list(logits.shape)} and targets {list(targets.shape)} are combined each with each: give "
                    "them one shape, with squeeze(1) or unsqueeze(1)"
                )
            raise UserError(
                f"{what} must return the SUM over the samples: of {count} samples it gave {a:g}, but of the first "
                f"{cut} {b:g} and of the rest {c:g}, which do not add up to it: {advice}"
            )
    return whole


def _cut(at: int, values: Any) -> tuple[Any, Any]:
    """The first `at` samples and the rest."""
    return mapped(lambda tensor: tensor[:at], values), mapped(lambda tensor: tensor[at:], values)


def _check_gradients(model: nn.Module, total: Tensor, count: int, terms: "_Terms") -> None:
    """Check that every parameter takes part in `total`, the loss of `count` samples."""
    if not total.requires_grad:
        raise UserError("loss= does not depend on the parameters: detach(), item() or no_grad() has cut it off")
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with explained("the backward pass of loss= failed"):
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


# ---- what must be alike each time


class _State:
    """The buffers of `model`, to be compared and put back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
        self._versions = self._count_writes()

    def _count_writes(self) -> dict[str, int]:
        return {name: buffer._version for name, (buffer, _) in self._buffers.items()}  # noqa: SLF001

    def check_names(self) -> None:
        """Refuse a model that has got other buffers in its forward pass."""
        if other := {name for name, _ in self._model.named_buffers()} ^ self._buffers.keys():
            raise UserError(
                f"model= registers or removes buffers in its forward pass ({', '.join(sorted(other))}): do so before"
            )

    def written(self, exact: bool) -> tuple[str, ...]:
        """The buffers that something was written to since they were put back, be it what they held, by name.

        Without those that `exact` sums could not follow: they must stay as they are.
        """
        now, writes, changed = dict(self._model.named_buffers()), self._count_writes(), self.changed()
        return tuple(
            name
            for name, (buffer, _) in self._buffers.items()
            if (name in changed or writes[name] != self._versions[name] or now.get(name) is not buffer)
            and not (exact and self._why_not(name))
        )

    def changed(self) -> tuple[str, ...]:
        """The buffers that hold something else, by name."""
        now = dict(self._model.named_buffers())
        return tuple(name for name, (_, value) in self._buffers.items() if not same(now.get(name), value))

    def check_changes(self, terms: "_Terms", *, training: bool) -> None:
        """Refuse changes that exact sums cannot follow."""
        for name in self.changed():
            why = self._why_not(name)
            if not training:
                why = "it changes in evaluation, and its value would depend on the rank: change it in training alone"
            if why:
                raise UserError(
                    f"--reduction exact cannot train a model with the buffer {name}: {why}, or use --reduction fast"
                )
            change = (dict(self._model.named_buffers())[name] - self._buffers[name][1]).float()
            if change.numel():
                terms.check(
                    f"the change of the buffer {name}", torch.linalg.vector_norm(change, torch.inf), BUFFER_BITS
                )

    def _why_not(self, name: str) -> str:
        """The reason why exact sums cannot follow the changes of a buffer; empty for none."""
        new, old = dict(self._model.named_buffers()).get(name), self._buffers[name][1]
        if new is None or new.shape != old.shape or new.dtype != old.dtype:
            return f"it was {kind_of(old)} and becomes {kind_of(new)}: keep its shape and type"
        if new.dtype == torch.bool or new.is_complex():
            return f"it is {dtype_of(new)}, and changes are added up: use numbers"
        if not (new.isfinite().all() and old.isfinite().all()):
            return "it is not finite, and changes are added up: let it begin with a finite number"
        if name not in self._model.state_dict():
            return "it changes, and a checkpoint would not hold it: register it with persistent=True"
        return ""

    def restore_buffers(self) -> None:
        """Put the buffers back."""
        for name, (buffer, value) in self._buffers.items():
            module, _, own_name = name.rpartition(".")
            setattr(self._model.get_submodule(module), own_name, buffer)
            if not same(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
        self._versions = self._count_writes()
