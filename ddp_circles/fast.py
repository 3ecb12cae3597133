"""Plain DistributedDataParallel: the fastest sums, and no promise about their last bits."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ddp_circles.exact import Pass
from ddp_circles.job.sums import copy_from_rank_0
from ddp_circles.job.world import World
from ddp_circles.metrics import LocalTally

AGREES_EVERY = 32
"""Steps between two agreements of the ranks."""


class FastReducer:
    """Plain DDP: one micro-batch per rank, the backend's own all-reduce, no promise about the last bits.

    The ranks agree on metrics and stop requests every `AGREES_EVERY` steps and after an epoch's last. `replica`:
    the DDP wrapper of `bare`; in a world of one that module. Rank 0's buffers are taken over before each evaluation, as
    DDP does before each forward pass.
    """

    def __init__(
        self,
        bare: nn.Module,
        replica: nn.Module,
        *,
        world: World,
        tally: LocalTally,
        stop_requested: Callable[[], bool],
    ) -> None:
        self.micro_batches = world.ranks.world_size
        self._bare = bare
        self._parameters = [parameter for parameter in bare.parameters() if parameter.requires_grad]
        self._pass: Pass = (replica, nullcontext())
        self._world = world
        self._tally = tally
        self._stop_requested = stop_requested
        self._flag = torch.tensor([[0], [1]], device=world.device)

    def passes(self, count: int) -> list[Pass]:
        """The one pass of this rank's micro-batch in one step, through DDP; of an empty one if `count` is 0."""
        return [self._pass] * max(1, count)

    def weight(self, samples: int) -> Tensor:
        """The factor of a micro-batch's summed loss that makes DDP's mean over ranks the mean over samples."""
        return torch.full((), self.micro_batches / samples, device=self._flag.device)

    def agreed(self, step: int, *, last: bool) -> Tensor | None:
        """Units by name, values out of range and stop requests of all ranks since the last agreement.

        Returns None after a step at which the ranks do not agree. `last`: the epoch's last step.
        """
        if not last and (step + 1) % AGREES_EVERY:
            return None
        if last and self._world.ranks.world_size > 1:
            copy_from_rank_0(self._bare.buffers())
        sums = self._tally.take(self.micro_batches * AGREES_EVERY)
        # An earlier step's NaN shows in the losses by now; this step's update may be about to be saved.
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        sums[-1] += torch.stack([gradient.isfinite().all() for gradient in gradients]).logical_not().sum()
        return self._world.sum(torch.cat([sums, self._flag[int(self._stop_requested())]]))
