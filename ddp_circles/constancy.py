"""What a trial on a few samples has not shown must not happen later: it would have no part in the exact sums."""

from torch import Tensor, nn

from ddp_circles.buffers import Buffers
from ddp_circles.data import same
from ddp_circles.random_numbers import RandomStates


class Constancy:
    """Finds random numbers that are drawn, and changes of buffers, in a training that should have none.

    `seeded`: True if all generators are seeded, and not torch's alone. `buffers`: those whose changes are summed.
    """

    def __init__(self, model: nn.Module, *, seeded: bool, buffers: Buffers | None) -> None:
        self._model, self._buffers = model, buffers
        self._states = None if seeded else RandomStates(but_torch=True)
        self._others = {name: (buffer, buffer.clone()) for name, buffer in self._unsummed().items()}

    def _unsummed(self) -> dict[str, Tensor]:
        known = self._buffers.names if self._buffers is not None else ()
        return {name: buffer for name, buffer in self._model.named_buffers() if name not in known}

    def breach(self) -> str:
        """What was found so far, as a message; empty for nothing. Other ranks may have found nothing."""
        if moved := self._states.moved() if self._states is not None else []:
            return (
                f"random numbers were drawn ({', '.join(moved)}) in a training that drew none for the samples that "
                "were tried, so they were not seeded: draw them from the first pass on, or use --reduction fast"
            )
        if disturbed := self._buffers.disturbed() if self._buffers is not None else []:
            return (
                f"buffers were changed out of training ({', '.join(disturbed)}), so their value depends on the rank: "
                "change them in training alone, or use --reduction fast"
            )
        now = self._unsummed()
        states = [(name, now.get(name) is buffer, buffer, value) for name, (buffer, value) in self._others.items()]
        if changed := [name for name, is_there, buffer, value in states if not (is_there and same(buffer, value))]:
            return (
                f"the forward pass has changed buffers ({', '.join(changed)}) that it left alone for the samples that "
                "were tried, so they were not summed: change them from the first pass on, or use --reduction fast"
            )
        return ""
