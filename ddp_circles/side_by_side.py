"""A rank's micro-batches side by side: one forward and one backward pass for all, and a gradient of its own for each.

Each micro-batch is a slice of the inputs, [slices, rows, features + 1], and each layer one batched product with as many
copies of one matrix, which share its memory. The gradient of the copies has one part per slice, and a micro-batch's
part must have the same bits on any number of ranks: for any number of slices beside it, and at any place among them.
Three rules bring that about with today's libraries; none of these promises it, so `find_difference` tries it.

- At least two slices, if V is not 1 (`slices_of`): a lone one would be multiplied by another routine. A vacant slice
  has no samples.
- Rows in multiples of 32 (`rows_of`): vector instructions treat the rest of a loop differently, and so there is none.
- Columns in multiples of `COLUMNS`: MKL rounds differently where a result does not begin at a multiple of 64 bytes.

Zeros fill rows and columns without a trace: a layer's biases are one more row of its matrix, and are multiplied with a
constant 1 that each layer hands on to the next. Where there is no sample, this constant is 0 as well. So all
activations of such a row are 0, and it adds 0 to the gradients.
"""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddp_circles.data import Dataset
from ddp_circles.micro_batches import filled_up, slices_of
from ddp_circles.models import IGNORED, Classifier, slice_losses

COLUMNS = 16


def can_go_side_by_side(model: nn.Module) -> TypeGuard[Classifier]:
    """True for a classifier of nothing but linear layers and ReLU."""
    return isinstance(model, Classifier) and all(type(layer) in (nn.Linear, nn.ReLU) for layer in model.layers)


class SideBySide(nn.Module):
    """The network `bare` for `slices` micro-batches at once; its parameters are those of `bare`.

    Maps float32 [slices, rows, features + 1], where the last feature is the constant, to the raw logits of all rows:
    [slices * rows] for two classes, [slices * rows, classes] for more.
    """

    def __init__(self, bare: Classifier, slices: int) -> None:
        super().__init__()
        self.bare = bare
        self.slices = slices
        self.elements = 0
        """Elements of all matrices together."""
        self._places: list[Tensor] = []
        """Where in the matrices weights and biases go."""
        self._values: list[Tensor] = []
        """These weights and biases, turned as they lie there."""
        chosen: list[Tensor] = []
        linears = [layer for layer in bare.layers if isinstance(layer, nn.Linear)]
        widths = [filled_up(layer.out_features + 1, COLUMNS) for layer in linears[:-1]] + [linears[-1].out_features]
        heights = [linears[0].in_features + 1, *widths[:-1]]
        self.width = heights[0] + sum(widths)
        """Values of one row, over all layers."""
        self.matrices = [self._add_matrix(*layer, chosen) for layer in zip(linears, heights, widths, strict=True)]
        """For each linear layer [slices, inputs, outputs], one matrix seen `slices` times; collects the gradients."""
        matrices = iter(self.matrices)
        self._layers = [next(matrices) if isinstance(layer, nn.Linear) else None for layer in bare.layers]
        """The layers in their order: a matrix, or None for an activation."""
        self._columns = torch.cat([*chosen, torch.tensor([self.elements], device=chosen[0].device)])
        """Numbers of the parameters' elements, in their order, among those of all matrices; then that of the loss."""

    def _add_matrix(self, layer: nn.Linear, height: int, width: int, chosen: list[Tensor]) -> Tensor:
        """The matrix of one layer, into which `forward` copies its parameters; adds their numbers to `chosen`."""
        inputs, outputs = layer.in_features, layer.out_features
        matrix = torch.zeros(height, width, device=layer.weight.device)
        if width > outputs:
            matrix[inputs, outputs] = 1  # hands on the constant
        numbers = torch.arange(self.elements, self.elements + matrix.numel(), device=matrix.device).view_as(matrix)
        self.elements += matrix.numel()
        self._places += [matrix[:inputs, :outputs], matrix[inputs, :outputs]]
        self._values += [layer.weight.detach().t(), layer.bias.detach()]
        chosen += [numbers[:inputs, :outputs].t().flatten(), numbers[inputs, :outputs]]
        return matrix.expand(self.slices, -1, -1).requires_grad_()

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw logits of all rows."""
        torch._foreach_copy_(self._places, self._values)
        values = inputs
        for matrix in self._layers:
            values = values.relu_() if matrix is None else values.bmm(matrix)
        logits = values.flatten(0, 1)
        return logits.squeeze(1) if self.bare.binary else logits

    def take_gradients(self, losses: Tensor) -> Tensor:
        """Each slice's gradient in the order of the parameters, then its element of `losses`; [slices, elements + 1].

        Clears the gradients.
        """
        columns = []
        for matrix in self.matrices:
            assert matrix.grad is not None
            columns.append(matrix.grad.flatten(1))
            matrix.grad = None
        return torch.cat([*columns, losses.view(-1, 1)], dim=1).index_select(1, self._columns)


def find_difference(bare: Classifier, samples: Dataset, rows: int, micro_batches: int) -> str:
    """Try one micro-batch of `rows` rows in each place among as many slices as any number of ranks may have.

    Returns an empty text if it has the same bits everywhere, else a phrase that says where it has not. Logits that are
    not those of `bare`, but for rounding, count as a difference too.
    """
    chosen = torch.arange(rows, device=samples.inputs.device) % len(samples.inputs)
    inputs, targets = F.pad(samples.inputs[chosen], (0, 1), value=1), samples.targets[chosen]
    inputs[-1], targets[-1] = 0, IGNORED
    with torch.no_grad():
        usual = bare(inputs[:-1, :-1]).flatten()
    rounding = 1e-3 * usual.abs().nan_to_num(0, 0, 0).max().item()
    expected = None
    for slices in sorted({slices_of(micro_batches, ranks) for ranks in range(1, micro_batches + 1)}):
        network = SideBySide(bare, slices)
        logits = network(inputs.repeat(slices, 1, 1))
        losses = slice_losses(logits, targets.repeat(slices), slices=slices)
        losses.backward(torch.ones_like(losses))
        found = torch.cat([logits.detach().view(slices, -1), network.take_gradients(losses.detach())], dim=1)
        bits = found.view(torch.int32)
        if expected is None:
            expected = bits[:1]
            if not torch.allclose(found[0, : len(usual)], usual, rtol=0, atol=rounding, equal_nan=True):
                return f"logits of {rows} rows"
        if not (bits == expected).all():
            return f"{rows} rows among {slices} slices"
    return ""
