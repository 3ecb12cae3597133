"""The model of the checked training: the operations in which large models spend their time, each of them once."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

SIDE = 4
"""The convolution sees the last hidden layer as an image of so many rows and columns, the attention as its pixels."""


class Model(nn.Module):
    """Linear layers in float32, a convolution, attention and a product in bfloat16, one after the other.

    Maps points, float32 [n, 2], to raw logits, float32 [n]. The last of the widths `hidden` is a multiple of SIDE^2.
    No activation follows the linear layers: it would hide wrong bits that it maps to zero.
    """

    def __init__(self, hidden: Sequence[int]) -> None:
        super().__init__()
        width = hidden[-1]
        channels = width // SIDE**2
        pairs = [(nn.Linear(before, after), nn.ReLU()) for before, after in pairwise((2, *hidden))]
        self.layers = nn.Sequential(*(layer for pair in pairs for layer in pair))
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)
        # Without a bias: softmax cancels that of the keys, whose gradient would be nothing but rounding.
        self.projections = nn.Linear(channels, 3 * channels, bias=False)
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.head = nn.Linear(width, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw logits of `inputs`."""
        image = self.convolution(self.layers(inputs).unflatten(1, (-1, SIDE, SIDE)))
        pixels = image.flatten(2).transpose(1, 2)
        pixels = pixels + attention(*self.projections(pixels).chunk(3, dim=2))
        features = pixels.flatten(1)
        logits: Tensor = self.head(features + product_in_bfloat16(features, self.weight))
        return logits.squeeze(1)


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Scaled dot-product attention of float32 [n, tokens, channels], in plain products: they are deterministic."""
    scores = queries @ keys.transpose(1, 2) / queries.shape[2] ** 0.5
    mixed: Tensor = scores.softmax(dim=2) @ values
    return mixed


def product_in_bfloat16(features: Tensor, weight: Tensor) -> Tensor:
    """The product of float32 [n, width] and [width, width], computed in bfloat16, as float32."""
    return (features.bfloat16() @ weight.bfloat16()).float()
