"""Buffers that the forward pass changes, such as the running statistics of batch norm, with the same bits on all ranks.

Each micro-batch starts from the step's buffers. What it has changed is taken out again, rounded to a multiple of 2^-34,
and summed over all micro-batches as their gradients are. At the step's end a floating-point buffer changes by the mean
over the micro-batches, and a buffer of whole numbers by the sum. So batch norm keeps the average of its micro-batches'
statistics, and `num_batches_tracked` counts micro-batches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddp_circles.data import same
from ddp_circles.fixed_point import BUFFER_BITS


class Buffers:
    """The buffers of `model` that its forward pass changes, by their `names`."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.names = sorted(names, key=lambda name: not model.get_buffer(name).is_floating_point())
        """Floating-point numbers first, as in the sums."""
        paths = [name.rpartition(".") for name in self.names]
        self._places = [(model.get_submodule(module), name) for module, _, name in paths]
        self._tensors = self._now()
        """The tensors that are the model's before each micro-batch."""
        self._before = [tensor.clone() for tensor in self._tensors]
        """The step's buffers."""
        self._sizes = [tensor.numel() for tensor in self._tensors]
        self._floating = sum(tensor.is_floating_point() for tensor in self._tensors)
        self.values = sum(self._sizes[: self._floating])
        """The number of floating-point values."""
        self.width = sum(self._sizes) + 1
        """The number of integers in the sum of a step."""
        self._one = torch.ones(1, dtype=torch.int64, device=self._tensors[0].device)
        self._changes: list[Tensor] = []
        self._counts: list[Tensor] = []

    def _now(self) -> list[Tensor]:
        return [module.get_buffer(name) for module, name in self._places]

    @torch.no_grad()
    def take_changes(self) -> None:
        """Remember what one micro-batch has changed, and put the step's buffers back."""
        changes = [(new - old).flatten() for new, old in zip(self._now(), self._before, strict=True)]
        self._changes += [change.float() for change in changes[: self._floating]]
        self._counts.append(torch.cat([*(change.long() for change in changes[self._floating :]), self._one]))
        self.put_back()

    @torch.no_grad()
    def put_back(self) -> None:
        """Put the step's buffers back."""
        for (module, name), tensor, old, new in zip(
            self._places, self._tensors, self._before, self._now(), strict=True
        ):
            if new is not tensor:  # the forward pass has put another in its place
                setattr(module, name, tensor)
            tensor.copy_(old)

    def disturbed(self) -> list[str]:
        """The buffers that are not as the last step has left them, by name."""
        states = zip(self.names, self._now(), self._tensors, self._before, strict=True)
        return [name for name, now, tensor, old in states if now is not tensor or not same(tensor, old)]

    def latest(self) -> tuple[list[Tensor], list[Tensor]]:
        """The last micro-batch's changes, of floating-point numbers and of whole ones, which are not taken."""
        return self._changes[len(self._changes) - self._floating :], self._counts[-1:]

    def changes(self) -> list[Tensor]:
        """The floating-point changes since the last call, to be rounded: float32, `values` for each micro-batch."""
        changes, self._changes = self._changes, []
        return changes

    def added_up(self, units: Tensor) -> Tensor:
        """The rounded changes of any number of micro-batches, added up by value."""
        return units.view(len(units) // max(1, self.values), self.values).sum(0)

    def counts(self) -> Tensor:
        """The changes of whole numbers since the last call, and the number of micro-batches, added up; int64."""
        counts, self._counts = self._counts, []
        return torch.stack(counts).sum(0) if counts else self._one.new_zeros(self.width - self.values)

    @torch.no_grad()
    def apply(self, sums: Tensor) -> None:
        """Change the buffers at the end of a step.

        `sums`: over all micro-batches, int64 of shape [width]: the changes in units of 2^-34, whole numbers, the count.
        """
        means = sums[: self.values].double().mul_(2.0**-BUFFER_BITS).div_(sums[-1])
        changes = [
            *means.split(self._sizes[: self._floating]),
            *sums[self.values : -1].split(self._sizes[self._floating :]),
        ]
        for tensor, old, change in zip(self._tensors, self._before, changes, strict=True):
            old.copy_(old + change.view_as(old))  # of floating-point numbers a float64, rounded once
            tensor.copy_(old)
