"""What a trial on a few samples has not shown must not happen later: it would have no part in the exact sums."""

from collections.abc import Collection

from torch import Tensor, nn

from ddp_circles.data import same
from ddp_circles.random_numbers import RandomStates


class Constancy:
    """Finds random numbers that are drawn, and changes of buffers, in a training that should have none.

    `draws`: True if random numbers are seeded. `buffers`: those of `model` whose changes are summed, by name.
    """

    def __init__(self, model: nn.Module, *, draws: bool, buffers: Collection[str]) -> None:
        self._model, self._known = model, frozenset(buffers)
        self._states = None if draws else RandomStates()
        self._values = {name: value.clone() for name, value in self._others().items()}

    def _others(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self._model.named_buffers() if name not in self._known}

    def breach(self) -> str:
        """What was found so far, as a message; empty for nothing. Other ranks may have found nothing."""
        if moved := self._states.moved() if self._states is not None else []:
            return (
                f"random numbers were drawn ({', '.join(moved)}) in a training that drew none for the samples that "
                "were tried, so they were not seeded: draw them from the first pass on, or use --reduction fast"
            )
        now = self._others()
        if changed := [name for name, value in self._values.items() if not same(now.get(name), value)]:
            return (
                f"the forward pass has changed buffers ({', '.join(changed)}) that it left alone for the samples that "
                "were tried, so they were not summed: change them from the first pass on, or use --reduction fast"
            )
        return ""
