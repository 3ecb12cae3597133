"""A fault in one kind of operation alone: one bit of one number, and the rank that computes it is named."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ddp_circles.verify import model
from tests.harness.verifying import Ended, Plan, end_each, report

OPERATIONS: dict[str, tuple[object, str, int]] = {
    "convolution": (torch.nn.Conv2d, "forward", 0),
    "attention": (model, "attention", 0),
    "product in bfloat16": (model, "product_in_bfloat16", 16),
}
"""Where each operation is found, and which of a result's bits is its last."""
VICTIM = 1


@contextmanager
def off_by_one_bit(operation: str) -> Iterator[None]:
    """The victim gets the last bit of one of the operation's results wrong."""
    owner, name, bit = OPERATIONS[operation]
    right = getattr(owner, name)

    def spoiled(*arguments: Any) -> torch.Tensor:
        result: torch.Tensor = right(*arguments).clone(memory_format=torch.contiguous_format)
        with torch.no_grad():
            result.view(torch.int32).view(-1)[5] ^= 1 << bit
        return result

    with patch.object(owner, name, spoiled if os.environ["RANK"] == str(VICTIM) else right):
        yield


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ended]:
    """The end of a verification with a fault in one operation; the first call runs them all."""

    @functools.cache
    def run() -> dict[str, Ended]:
        plans = {name: Plan(trouble=functools.partial(off_by_one_bit, name)) for name in OPERATIONS}
        return end_each(tmp_path_factory.mktemp("operations"), 3, plans)

    return lambda name: run()[name]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_wrong_bit_is_found_and_its_rank_named(operation: str, ended: Callable[[str], Ended]) -> None:
    codes, outputs, folder = ended(operation)
    assert codes == [1] * 3, outputs[0]
    (finding,) = report(folder)["findings"]
    assert (finding["severity"], finding["check"], finding["ranks"]) == ("wrong", "training alone", [VICTIM])
    assert "a lasting fault" in finding["what"]
