"""Tensors and plain values as bytes; nothing in the bytes is ever executed."""

import io
from typing import Any

import torch

Plain = Any
"""Tensors, numbers, texts, None, and lists and dictionaries of these."""


def to_bytes(value: Plain) -> bytes:
    """Encode `value`, with `torch.save`."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def from_bytes(content: bytes) -> Plain:
    """The value in `content`, with its tensors on the CPU; raises `ValueError` for anything but plain values."""
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # a stranger's bytes may raise anything
        raise ValueError("it holds something other than tensors and plain values") from None
