"""64-bit fixed-point numbers: their sum does not depend on the order of addition."""

import torch
from torch import Tensor

GRADIENT_BITS = 44
"""Gradients are multiples of 2^-44 (5.7e-14)."""
LOSS_BITS = 24
"""Loss sums are multiples of 2^-24 (6e-8), so that a sum may reach 5e11."""
BUFFER_BITS = 34
"""Changes of buffers are multiples of 2^-34 (6e-11), each below 3e7 for eight micro-batches."""
_TWO_TO_THE = {power: torch.tensor(2.0**power) for bits in (GRADIENT_BITS, LOSS_BITS) for power in (bits, -bits)}
"""Scalar tensors, since a Python number would become one anew in every operation. Any device accepts them."""


def largest_term(terms: int, bits: int) -> float:
    """The magnitude that each of `terms` summands must stay below for their int64 sum never to wrap round."""
    return float(2**62 // terms) / 2.0**bits


def quantize(values: Tensor, bits: int) -> Tensor:
    """Round floating-point `values` to the nearest multiple of 2^-bits; int64 of the same shape.

    Scaling by a power of two is exact, so this is the only rounding. The result is meaningless where a value is not
    finite or reaches `largest_term`: the caller checks that.
    """
    return (values * _TWO_TO_THE[bits]).round_().long()


def dequantize(integers: Tensor, bits: int, out: Tensor) -> Tensor:
    """The int64 `integers` as float32, rounded once, into `out` of the same shape."""
    return torch.mul(integers, _TWO_TO_THE[-bits], out=out)
