"""The optimizer of a run, with its schedule and clipping: what happens between the summed gradient and the weights.

All of it follows from the summed gradient, which has the same bits on every rank, so the weights have them too.
"""

import hashlib
import inspect
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiplicativeLR, ReduceLROnPlateau

from ddp_circles.data import mapped
from ddp_circles.errors import UserError
from ddp_circles.explain import explain, explained, kind_of
from ddp_circles.fixed_point import LOSS_BITS, quantize
from ddp_circles.plain import from_bytes, to_bytes

T = TypeVar("T")
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
LARGEST_NORM = 2.0**38
"""Larger ones, which only a training that diverges has, are reported as this."""
MakeOptimizer = Callable[[nn.Module], Optimizer]
"""From the bare module to an optimizer of its parameters."""
MakeScheduler = Callable[[Optimizer], LRScheduler]
"""From the optimizer to a schedule of its learning rates, stepped once after each of its steps."""


def default_optimizer(name: str, lr: float) -> MakeOptimizer:
    """The optimizer of a configuration."""
    return lambda model: OPTIMIZERS[name](model.parameters(), lr=lr, fused=True)


class Optimization:
    """An optimizer, with clipping before each of its steps and a schedule after it. Raises `UserError` for mistakes."""

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        make_scheduler: MakeScheduler | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self.optimizer = _make_optimizer(model, make_optimizer)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._scheduler = _make_scheduler(self.optimizer, make_scheduler) if make_scheduler is not None else None
        self._max_grad_norm = max_grad_norm
        self.measures_norm = max_grad_norm is not None
        """True if there is a `mean_norm`."""
        self._norms: list[Tensor] = []
        if max_grad_norm is not None:
            _check_max_grad_norm(max_grad_norm)
        self._rates = self._rates_now()
        self._is_own = not type(self.optimizer).__module__.startswith("torch.optim.")
        self.may_draw = self._is_own or isinstance(self._scheduler, (LambdaLR, MultiplicativeLR))
        """True if code of the caller's own runs in a step, which may draw random numbers."""

    def zero_grad(self) -> None:
        """Zero the gradients."""
        self.optimizer.zero_grad()

    def step(self) -> None:
        """Scale the summed gradient down, step the optimizer, and go on to the schedule's next learning rate."""
        if self._max_grad_norm is not None:
            self._clip(self._max_grad_norm)
        if self._is_own:
            # Torch's optimizers go element by element. In one's own, the last bits of a product may depend on where a
            # gradient lies, and in DDP's buckets that is another place at another number of ranks.
            for parameter in self._parameters:
                parameter.grad = parameter.grad.clone() if parameter.grad is not None else None
        self.optimizer.step()
        if self._scheduler is not None:
            self._rates = self._rates_now()
            with explained("scheduler= cannot go on"):
                self._scheduler.step()

    def identity(self) -> str:
        """A digest of all settings, before the first step; functions are left out, of which no state is saved."""
        names = [type(part).__name__ for part in (self.optimizer, self._scheduler)]
        state = mapped(Tensor.tolist, self.state())  # a tensor's own text is rounded
        return hashlib.sha256(f"{names} {state} {self._max_grad_norm}".encode()).hexdigest()

    def state(self) -> dict[str, Any]:
        """The state to be saved, of `optimizer` and `scheduler`."""
        scheduler = self._scheduler.state_dict() if self._scheduler is not None else {}
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"state": scheduler, "rates": list(map(float, self._rates))},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a saved `state`; raises what torch raises if it does not fit."""
        self.optimizer.load_state_dict(state["optimizer"])
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for number, saved in state["optimizer"]["state"].items():
            own = self.optimizer.state[parameters[number]]
            for name, value in saved.items() if isinstance(own, dict) else ():
                if isinstance(value, Tensor) and own[name].dtype != value.dtype:  # torch gives it the parameter's
                    own[name] = value.to(own[name].device)
        self._rates = state["scheduler"]["rates"]
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"]["state"])

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of the last step; one for each group of parameters if there are several."""
        rates = [float(rate) for rate in self._rates]
        return {"lr": rates[0]} if len(rates) == 1 else {f"lr/{number}": rate for number, rate in enumerate(rates)}

    def check_length(self, steps: int) -> None:
        """Refuse a schedule that ends before the run, of so many `steps`."""
        planned = getattr(self._scheduler, "total_steps", None)
        if isinstance(planned, int) and planned < steps:
            raise UserError(
                f"scheduler= {type(self._scheduler).__name__} has total_steps={planned}, and this run takes {steps}: "
                "epochs times the steps of each, ceil(samples / batch size)"
            )

    def _rates_now(self) -> list[float | Tensor]:
        """Learning rates; those in tensors are copied, and read when they are needed: that may wait for the device."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]

    def mean_norm(self) -> Tensor:
        """The mean norm of the gradient over the steps since the last call, in units of 2^-24; int64 of shape [1]."""
        norms, self._norms = self._norms, []
        return quantize(torch.stack(norms).mean(0, keepdim=True).clamp_(max=LARGEST_NORM), LOSS_BITS)

    @torch.no_grad()
    def _clip(self, max_norm: float) -> None:
        # One row in the order of the parameters: the last bits of a norm may depend on where its elements lie, and in
        # DDP's buckets that is another place at another number of ranks.
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.linalg.vector_norm(_flatten_dense_tensors(gradients))
        self._norms.append(norm)
        clip_grads_with_norm_(self._parameters, max_norm, norm)


def _build(name: str, kind: type[T], make: Callable[[Any], T], argument: Any, expected: str) -> T:
    """Call the caller's `make`, which must be a function, as `expected`, that returns one of `kind`."""
    if not callable(make) or isinstance(make, kind):
        raise UserError(f"{name}= must be a function from {expected}, got {kind_of(make)}")
    with explained(f"{name}= failed"):
        built = make(argument)
    if not isinstance(built, kind):
        raise UserError(f"{name}= must return a torch {name}, got {kind_of(built)}")
    return built


def _make_optimizer(model: nn.Module, make: MakeOptimizer) -> Optimizer:
    example = "the model to a torch optimizer, such as lambda model: torch.optim.AdamW(model.parameters(), lr=0.01)"
    optimizer = _build("optimizer", Optimizer, make, model, example)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(
            f"optimizer= {type(optimizer).__name__} computes the loss several times in a step, which fit() does not "
            "do: use one that steps by the gradient alone, such as AdamW"
        )
    if isinstance(optimizer, SparseAdam):
        raise UserError("optimizer= SparseAdam needs sparse gradients, which fit() does not sum: use Adam")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: id(parameter) for name, parameter in model.named_parameters()}
    if held - set(named.values()):
        raise UserError("optimizer= has parameters that are not the model's: build it from the model that it is given")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if left_out := [name for name in named if name in trained and named[name] not in held]:
        raise UserError(
            f"optimizer= leaves out {', '.join(left_out)}, which would stay as they are: give it all parameters, or "
            "freeze these with requires_grad_(False)"
        )
    _check_plain("optimizer=", optimizer)
    return optimizer


def _make_scheduler(optimizer: Optimizer, make: MakeScheduler) -> LRScheduler:
    example = (
        "the optimizer to a torch scheduler, such as lambda optimizer: "
        "torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)"
    )
    scheduler = _build("scheduler", LRScheduler, make, optimizer, example)
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise UserError("scheduler= is that of another optimizer: build it from the optimizer that it is given")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UserError(
            "scheduler= ReduceLROnPlateau waits for a figure of each epoch, and fit() steps a scheduler after each "
            "step of the optimizer: use one that follows from their number, such as CosineAnnealingLR"
        )
    _check_plain("scheduler=", scheduler)
    return scheduler


def _check_plain(name: str, part: Optimizer | LRScheduler) -> None:
    """Refuse what a checkpoint could not hold: better than at the first one."""
    try:
        from_bytes(to_bytes(part.state_dict()))
    except Exception as error:
        raise UserError(
            f"{name} {type(part).__name__} cannot be saved: its state_dict() holds more than tensors and plain values "
            f"({explain(error)})"
        ) from None


def _check_max_grad_norm(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) > 0:
        raise UserError(f"max_grad_norm= must be a number above 0, or inf to report the norm alone, got {value!r}")
