"""The optimizer with its schedule and clipping: continued from any step, and told from any other one."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules
from torch.optim.lr_scheduler import LRScheduler

from ddp_circles.errors import UserError
from ddp_circles.fixed_point import LOSS_BITS
from ddp_circles.optimization import MakeScheduler, Optimization, default_optimizer
from ddp_circles.plain import from_bytes, to_bytes


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))


def momentum(network: nn.Module) -> Optimizer:
    return SGD(network.parameters(), lr=0.1, momentum=0.9)


def two_groups(network: nn.Module) -> Optimizer:
    first, *others = network.parameters()
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": others, "lr": 0.3}]
    return AdamW(groups, lr=0.1)


def step(network: nn.Module, optimization: Optimization, number: int) -> None:
    """One step of `optimization`, along gradients that depend on its number alone."""
    generator = torch.Generator().manual_seed(number)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimization.step()


def sequence(optimizer: Optimizer) -> LRScheduler:
    parts = [schedules.LinearLR(optimizer, 0.1, total_iters=3), schedules.CosineAnnealingLR(optimizer, 7)]
    return schedules.SequentialLR(optimizer, parts, milestones=[3])


def chain(optimizer: Optimizer) -> Any:
    return schedules.ChainedScheduler(
        [schedules.ConstantLR(optimizer, 0.1, total_iters=3), schedules.ExponentialLR(optimizer, 0.9)], optimizer
    )


SCHEDULES: dict[str, MakeScheduler] = {
    "step": lambda optimizer: schedules.StepLR(optimizer, 3),
    "milestones": lambda optimizer: schedules.MultiStepLR(optimizer, [2, 5]),
    "lambda": lambda optimizer: schedules.LambdaLR(optimizer, lambda number: 0.9**number),
    "multiplied": lambda optimizer: schedules.MultiplicativeLR(optimizer, lambda number: 0.9),
    "exponential": lambda optimizer: schedules.ExponentialLR(optimizer, 0.9),
    "linear": lambda optimizer: schedules.LinearLR(optimizer, 0.1, total_iters=7),
    "polynomial": lambda optimizer: schedules.PolynomialLR(optimizer, 9, 2.0),
    "cosine": lambda optimizer: schedules.CosineAnnealingLR(optimizer, 9),
    "warm restarts": lambda optimizer: schedules.CosineAnnealingWarmRestarts(optimizer, 3),
    "cycles": lambda optimizer: schedules.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3),
    "one cycle": lambda optimizer: schedules.OneCycleLR(optimizer, 0.2, total_steps=10),
    "sequence": sequence,
    "chain": chain,
}
SAID_BY_TORCH = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")


@SAID_BY_TORCH
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("make", [momentum, two_groups])
def test_a_schedule_goes_on_from_any_step(name: str, make: Callable[[nn.Module], Optimizer]) -> None:
    network = model()
    straight = Optimization(network, make, SCHEDULES[name], 0.5)
    rates, states, weights = [], [], []
    for number in range(9):
        step(network, straight, number)
        rates.append(straight.learning_rates())
        states.append((to_bytes(straight.state()), to_bytes(network.state_dict())))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    assert len({str(rate) for rate in rates}) > 1
    for stop in (0, 3, 7):
        network = model()
        network.load_state_dict(from_bytes(states[stop][1]))
        resumed = Optimization(network, make, SCHEDULES[name], 0.5)
        resumed.load(from_bytes(states[stop][0]))
        assert resumed.learning_rates() == rates[stop]
        for number in range(stop + 1, 9):
            step(network, resumed, number)
            assert resumed.learning_rates() == rates[number]
            now = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
            assert torch.equal(now, weights[number])


@SAID_BY_TORCH
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_is_that_of_the_step_that_was_taken(name: str) -> None:
    network, plain_network = model(), model()
    optimization, plain = Optimization(network, momentum, SCHEDULES[name]), momentum(plain_network)
    scheduler = SCHEDULES[name](plain)
    for number in range(9):
        taken = plain.param_groups[0]["lr"]
        plain.step()
        scheduler.step()
        step(network, optimization, number)
        assert optimization.learning_rates() == {"lr": taken}


def test_learning_rates_are_known_before_the_first_step() -> None:
    assert Optimization(model(), momentum).learning_rates() == {"lr": 0.1}
    assert Optimization(model(), two_groups).learning_rates() == {"lr/0": 0.1, "lr/1": 0.3}


# ---- clipping


@pytest.mark.parametrize("most", [0.5, 1, 100.0, math.inf])
def test_gradients_are_clipped_as_torch_does(most: float) -> None:
    """And their norm is that before it."""
    network, plain = model(), model()
    optimization = Optimization(network, momentum, None, most)
    norms = []
    for number in range(3):
        step(network, optimization, number)
        generator = torch.Generator().manual_seed(number)
        for parameter in plain.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        norms.append(nn.utils.clip_grad_norm_(plain.parameters(), most).item())
        for parameter, other in zip(plain.parameters(), network.parameters(), strict=True):
            assert parameter.grad is not None
            assert other.grad is not None
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-6, atol=0)
    assert optimization.measures_norm
    (mean,) = optimization.mean_norm().tolist()
    assert mean / 2**LOSS_BITS == pytest.approx(sum(norms) / 3, rel=1e-6)


# ---- steps within steps


class Bold(SGD):
    """Steps of its base, twice as large."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        before = [parameter.detach().clone() for group in self.param_groups for parameter in group["params"]]
        super().step()
        with torch.no_grad():
            for parameter, old in zip(self.param_groups[0]["params"], before, strict=True):
                parameter.add_(parameter - old)


def test_a_step_that_takes_its_base_s_is_one_step() -> None:
    """Also where an optimizer of the base has been made before, whose steps torch then watches too."""
    SGD(model().parameters(), lr=0.1)
    network = model()
    optimization = Optimization(
        network, lambda network: Bold(network.parameters(), lr=1.0), lambda o: schedules.ExponentialLR(o, 0.5), 0.01
    )
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = math.sqrt(sum(parameter.numel() for parameter in network.parameters()))
    optimization.step()
    assert optimization.optimizer.param_groups[0]["lr"] == 0.5
    assert optimization.learning_rates() == {"lr": 1.0}
    assert optimization.mean_norm().item() / 2**LOSS_BITS == pytest.approx(norm, rel=1e-6)


# ---- identity

ADAMW: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def identity(
    make: Callable[..., Optimizer] = AdamW,
    scheduler: MakeScheduler | None = None,
    norm: float | None = None,
    **changes: Any,
) -> str:
    return Optimization(
        model(), lambda network: make(network.parameters(), **ADAMW | changes), scheduler, norm
    ).identity()


def test_each_setting_makes_another_optimization() -> None:
    different = [
        identity(),
        identity(make=Adam),
        identity(lr=0.02),
        identity(lr=0.01 + 1e-15),
        identity(betas=(0.9, 0.999)),
        identity(eps=1e-7),
        identity(weight_decay=0.0),
        identity(amsgrad=True),
        identity(norm=1.0),
        identity(norm=2.0),
        identity(norm=math.inf),
        *(identity(scheduler=SCHEDULES[name]) for name in SCHEDULES if name not in ("sequence", "chain")),
        identity(scheduler=lambda o: schedules.StepLR(o, 4)),
        identity(scheduler=lambda o: schedules.StepLR(o, 3, gamma=0.2)),
        identity(scheduler=lambda o: schedules.OneCycleLR(o, 0.2, total_steps=11)),
        identity(scheduler=lambda o: schedules.OneCycleLR(o, 0.3, total_steps=10)),
    ]
    assert len(set(different)) == len(different)
    assert identity() == identity()
    assert identity(scheduler=SCHEDULES["one cycle"]) == identity(scheduler=SCHEDULES["one cycle"])


def warmed_up(optimizer: Optimizer, rounds: int) -> LRScheduler:
    parts = [schedules.LinearLR(optimizer, 0.2, total_iters=3), schedules.CosineAnnealingLR(optimizer, rounds)]
    return schedules.SequentialLR(optimizer, parts, milestones=[3])


@SAID_BY_TORCH
def test_schedules_of_several_parts_are_told_apart_too() -> None:
    different = [identity(scheduler=SCHEDULES[name]) for name in ("sequence", "chain")]
    different += [identity(scheduler=partial(warmed_up, rounds=rounds)) for rounds in (6, 7)]
    assert len(set(different)) == 4
    assert identity(scheduler=SCHEDULES["sequence"]) == identity(scheduler=SCHEDULES["sequence"])


def test_a_learning_rate_that_is_a_tensor_counts_to_its_last_digit() -> None:
    one, other = (
        Optimization(model(), lambda network: SGD(network.parameters(), lr=torch.tensor(rate))).identity()  # noqa: B023
        for rate in (0.1234561, 0.1234562)
    )
    assert one != other


def test_the_identity_is_that_before_the_first_step() -> None:
    """Of equal optimizations, made from other weights."""
    network = model()
    nn.init.zeros_(next(network.parameters()))
    assert (
        Optimization(network, two_groups, SCHEDULES["step"], 1.0).identity()
        == Optimization(model(), two_groups, SCHEDULES["step"], 1.0).identity()
    )


# ---- what is refused


def test_frozen_parameters_may_be_held_or_left_out() -> None:
    network = model()
    first = next(network.parameters())
    first.requires_grad_(False)
    Optimization(network, momentum)
    rest = [parameter for parameter in network.parameters() if parameter is not first]
    Optimization(network, lambda _: SGD(rest, lr=0.1))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_configuration_s_optimizer(kind: str) -> None:
    optimization = Optimization(model(), default_optimizer(kind, 0.25))
    assert optimization.learning_rates() == {"lr": 0.25}
    assert not optimization.measures_norm
    assert type(optimization.optimizer).__name__.lower() == kind


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"make_scheduler": lambda _: schedules.StepLR(momentum(model()), 1)}, r"scheduler= .*optimizer"),
        ({"make_scheduler": partial(schedules.ReduceLROnPlateau)}, "ReduceLROnPlateau waits"),
        ({"make_optimizer": lambda network: torch.optim.LBFGS(network.parameters())}, "LBFGS computes the loss"),
        ({"make_optimizer": lambda network: momentum(nn.Linear(1, 1))}, "not the model's"),
        ({"make_optimizer": lambda network: momentum(network[0])}, r"leaves out 2\.weight, 2\.bias"),
        ({"max_grad_norm": 0}, "above 0"),
        ({"max_grad_norm": torch.tensor(1.0)}, "above 0"),
    ],
)
def test_what_cannot_be_used_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Optimization(model(), **{"make_optimizer": momentum} | arguments)
