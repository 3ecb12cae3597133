"""What a training changes in its process, and puts back at its end: threads, kernels, variables."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch

from ddp_circles.errors import UserError
from ddp_circles.job.ranks import set_thread_variables

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
CUDNN: Any = torch.backends.cudnn
"""Torch's module of that name; its type hints do not know all of it."""


def pin_threads(threads: int) -> None:
    """Use `threads` CPU threads in this rank, however it was started."""
    set_thread_variables(threads)
    torch.set_num_threads(threads)


def fix_workspace() -> None:
    """Let cuBLAS have one size of workspace, on which its bits depend; before the first product, which settles it."""
    os.environ.setdefault(WORKSPACE, ":4096:8")


def be_deterministic() -> None:
    """Choose deterministic kernels and full float32 products, for the whole process."""
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    CUDNN.allow_tf32 = False  # what is read under the older name must agree with the newer one
    CUDNN.fp32_precision = "ieee"  # the older one alone would leave the decision to `torch.backends.fp32_precision`
    CUDNN.benchmark = False


def _attribute(owner: object, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return partial(getattr, owner, name), partial(setattr, owner, name)


CHANGED: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    _attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
    _attribute(CUDNN, "fp32_precision"),
    _attribute(CUDNN, "allow_tf32"),  # put back before the newer one, which it would overwrite
    _attribute(CUDNN, "benchmark"),
)
"""How each of torch's settings that a training changes is read and written."""
CHANGED_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", WORKSPACE, "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
)  # fmt: skip


@contextmanager
def process_as_found() -> Iterator[None]:
    """Put back, however the body ends, what a training changes in its process."""
    variables = {name: os.environ.get(name) for name in CHANGED_VARIABLES}
    hook = sys.excepthook
    with ExitStack() as at_end:
        for read, write in CHANGED:
            with suppress(RuntimeError):  # torch has two names for some, and refuses the older after the newer one
                at_end.callback(write, read())
        try:
            yield
        except Exception as error:
            if not isinstance(error, UserError):
                hook = sys.excepthook  # the process group's own: it labels the traceback with the rank
            raise
        finally:
            sys.excepthook = hook
            for name, value in variables.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
