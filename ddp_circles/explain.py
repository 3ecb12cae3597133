"""An error in code of the caller's, told in one line."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddp_circles.errors import UserError

OURS = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


def explain(error: Exception) -> str:
    """The error's type, its text and the place in the caller's code where it was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(OURS)]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


@contextmanager
def explained(what: str, hint: str = "") -> Iterator[None]:
    """Turn an error of the caller's code into a `UserError` that says where it was raised."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {explain(error)}{hint}") from None


def kind_of(value: Any) -> str:
    """The type of `value`; of a tensor, its shape and dtype."""
    if isinstance(value, Tensor):
        return f"shape {list(value.shape)}, {dtype_of(value)}"
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def dtype_of(values: Tensor) -> str:
    """The dtype, without the name of the library."""
    return str(values.dtype).removeprefix("torch.")
