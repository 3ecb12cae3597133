"""Devices: the choice for one rank, and the check that those of all ranks make one job."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist

from ddp_circles.errors import UserError
from ddp_circles.job.ranks import spell_ranks


def choose_device(device: str, backend: str, local_rank: int) -> tuple[torch.device, str]:
    """Choose the torch device of a rank and the backend for it.

    `device`: `auto`, `cpu` or `cuda`. `backend`: `auto`, `gloo` or `nccl`. `local_rank`: the rank within its node.
    Raises `UserError` for a device or backend that this machine lacks.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_cuda = device == "cuda" or (device == "auto" and gpus > 0)
    if backend == "auto":
        backend = "nccl" if on_cuda else "gloo"
    if on_cuda and not gpus:
        raise UserError("--device cuda was asked for and torch sees no CUDA device here: use --device cpu")
    if backend == "nccl" and not dist.is_nccl_available():
        raise UserError("--backend nccl: this torch has no nccl; use --backend gloo")
    if backend == "nccl" and not on_cuda:
        raise UserError("--backend nccl needs --device cuda and a CUDA device: use --backend gloo")
    return torch.device("cuda", local_rank % gpus) if on_cuda else torch.device("cpu"), backend


def start_driver(device: str, local_rank: int | None) -> None:
    """Start CUDA for a rank that may use it, on its own device where `local_rank` tells which.

    If that fails, the choice of the device fails too, and says why.
    """
    if device != "cpu" and torch.cuda.is_available():
        with suppress(Exception):
            torch.cuda.init()
            if local_rank is not None:
                torch.cuda.set_device(local_rank % torch.cuda.device_count())


def device_uuid(device: torch.device) -> str:
    """The GPU's unique id, whatever its number in this process; empty for the CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


class Place(NamedTuple):
    """The settings and the device of one rank, or the reason why it has none; compared before the ranks join."""

    rank: str
    """The rank's name."""
    kind: str = ""
    """Device type and backend."""
    uuid: str = ""
    refusal: str = ""
    settings: dict[str, str] = {}  # noqa: RUF012 - never changed
    """Flags and their values."""


def why_not_together(places: Sequence[Place]) -> str:
    """The reason why ranks at these places cannot be one job; empty if they can."""
    if differences := _differences([place.settings for place in places]):
        return f"the ranks were started with different settings: {differences}; give all of them the same"
    if refusal := first_refusal([(place.rank, place.refusal) for place in places]):
        return refusal
    kinds, users = defaultdict(list), defaultdict(list)
    for number, place in enumerate(places):
        kinds[place.kind].append(place.rank)
        users[place.uuid or str(number)].append(number)
    if len(kinds) > 1:
        listed = "; ".join(f"{kind} on {len(ranks)}, first on {ranks[0]}" for kind, ranks in kinds.items())
        return f"the ranks would not meet ({listed}): give --device and --backend, or mend the node that is different"
    first, *others = max(users.values(), key=len)
    if others and "nccl" in places[0].kind:
        return (
            f"{places[first].rank} and rank {others[0]} have one CUDA device: start one rank per device, "
            "or let the ranks share with --backend gloo"
        )
    return ""


def _differences(settings: Sequence[dict[str, str]]) -> str:
    """The flags that differ, each with its values and the ranks that have them; empty if there is none."""
    differences = []
    for flag in dict.fromkeys(chain(*settings)):
        users = defaultdict(list)
        for rank, values in enumerate(settings):
            users[values.get(flag, "unknown")].append(rank)
        if len(users) > 1:
            spelled = " and ".join(f"{value} on {spell_ranks(ranks)}" for value, ranks in users.items())
            differences.append(f"{flag} is {spelled}")
    return "; ".join(differences)


def first_refusal(found: Sequence[tuple[str, str]]) -> str:
    """The first refusal among all ranks' (name, refusal), with its rank unless all agree; empty if there is none."""
    refusals = {refusal for _, refusal in found}
    if len(refusals) == 1:
        return refusals.pop()
    return next(f"{rank}: {refusal}" for rank, refusal in found if refusal)
