"""The classifiers; raw logits to prediction probabilities to prediction labels."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

BLOB_CENTRES = 4
IGNORED = -100
"""The target of a row that holds no sample, as in torch's own losses."""


class Classifier(nn.Module):
    """Linear layers of the given widths with an activation after each hidden one.

    Maps float32 [n, features] to raw logits: [n] for two classes, [n, classes] for more. Source: the tutorial's
    CircleModelV0 to V2 and BlobModel, whose initial weights it reproduces under the same seed.
    """

    def __init__(self, features: int, hidden: Sequence[int], activation: str, classes: int) -> None:
        super().__init__()
        self.binary = classes == 2
        widths = [features, *hidden]
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            layers.append(nn.Linear(width, next_width))
            if activation == "relu":
                layers.append(nn.ReLU())
        layers.append(nn.Linear(widths[-1], 1 if self.binary else classes))
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw logits of `inputs`."""
        logits: Tensor = self.layers(inputs)
        return logits.squeeze(1) if self.binary else logits


def class_count(dataset: str) -> int:
    """Number of classes in `dataset`."""
    return BLOB_CENTRES if dataset == "blobs" else 2


def state_of(model: nn.Module) -> dict[str, Any]:
    """The `state_dict` of `model` under plain names: without the prefix that `torch.compile` gives them."""
    state = model.state_dict()
    for name in [name for name in state if name != _plain(name)]:
        state[_plain(name)] = state.pop(name)
    return state


def load_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Load what `state_of` returns, for this model or one built alike; both may be compiled or not."""
    own = {_plain(name): name for name in model.state_dict()}
    if any(name != compiled for name, compiled in own.items()):
        state = {own.get(name, name): value for name, value in state.items()}
    model.load_state_dict(state)


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum the loss of raw logits: binary cross-entropy for [n], cross-entropy for [n, classes]; a float32 scalar."""
    if logits.ndim == 1:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return F.cross_entropy(logits, targets, reduction="sum")


def slice_losses(logits: Tensor, targets: Tensor, *, slices: int) -> Tensor:
    """Sum the loss of each of `slices` equal parts of the rows; float32 of shape [slices].

    Otherwise as `loss_sum`, with class numbers for [n, classes]; targets of `IGNORED` count nothing.
    """
    if logits.ndim == 1:
        losses = F.binary_cross_entropy_with_logits(logits, targets, targets >= 0, reduction="none")
    else:
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    return losses.view(slices, -1).sum(1)


def probabilities_of(logits: Tensor) -> Tensor:
    """Prediction probabilities of raw logits: sigmoid for [n], softmax over classes for [n, classes]."""
    return logits.sigmoid() if logits.ndim == 1 else logits.softmax(dim=1)


def labels_of(probabilities: Tensor) -> Tensor:
    """Prediction labels, shape [n], of prediction probabilities: rounded for [n], the argmax for [n, classes]."""
    return probabilities.round() if probabilities.ndim == 1 else probabilities.argmax(dim=1)


def correct_count(logits: Tensor, targets: Tensor) -> Tensor:
    """Number of labels of `logits` that equal `targets`; an int64 scalar."""
    return (labels_of(probabilities_of(logits)) == targets).sum()
