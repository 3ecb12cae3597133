"""Which device a rank computes on, and whether those of all ranks make one job."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from ddp_circles.errors import UserError


def choose_device(device: str, backend: str, local_rank: int) -> tuple[torch.device, str]:
    """The torch device of a rank and the backend for it.

    `device`: `auto`, `cpu` or `cuda`. `backend`: `auto`, `gloo` or `nccl`. `local_rank`: which rank of its node it is.
    Raises `UserError` for what is not there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise UserError("--device cuda was asked for and torch sees no CUDA device here: use --device cpu")
    if backend == "nccl" and not dist.is_nccl_available():
        raise UserError("--backend nccl was asked for and this torch has none: use --backend gloo")
    on_cuda = device == "cuda" or (device == "auto" and gpus > 0)
    if backend == "nccl" and not on_cuda:
        raise UserError("--backend nccl needs --device cuda and a CUDA device: use --backend gloo")
    chosen = backend if backend != "auto" else ("nccl" if on_cuda else "gloo")
    if not on_cuda:
        return torch.device("cpu"), chosen
    return torch.device("cuda", local_rank % gpus), chosen


def device_uuid(device: torch.device) -> str:
    """The GPU's own name, by which it is known whatever number it has in a process; empty for the CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


class Place(NamedTuple):
    """Where one rank computes, or why it cannot; what the ranks compare before they meet."""

    host: str
    kind: str = ""
    """Device type and backend."""
    uuid: str = ""
    refusal: str = ""


def why_not_together(places: Sequence[Place]) -> str:
    """What keeps ranks at these places from being one job; empty if nothing does."""
    if refusal := first_refusal([(place.host, place.refusal) for place in places]):
        return refusal
    kinds, users = defaultdict(list), defaultdict(list)
    for rank, place in enumerate(places):
        kinds[place.kind].append(rank)
        users[place.uuid or str(rank)].append(rank)
    if len(kinds) > 1:
        listed = "; ".join(f"{kind} on {len(of)}, first on {_name(of[0], places)}" for kind, of in kinds.items())
        return f"the ranks would not meet ({listed}): give --device and --backend, or mend the node that is different"
    first, *others = max(users.values(), key=len)
    if others and "nccl" in places[0].kind:
        return (
            f"{_name(first, places)} and rank {others[0]} have one CUDA device: start one rank per device, "
            "or let the ranks share with --backend gloo"
        )
    return ""


def first_refusal(found: Sequence[tuple[str, str]]) -> str:
    """The first refusal in every rank's host and refusal, with the rank if not all say it; empty if there is none."""
    refusals = {refusal for _, refusal in found}
    if len(refusals) == 1:
        return refusals.pop()
    rank = next(rank for rank, (_, refusal) in enumerate(found) if refusal)
    host, refusal = found[rank]
    return f"rank {rank} (host {host}): {refusal}"


def _name(rank: int, places: Sequence[Place]) -> str:
    return f"rank {rank} (host {places[rank].host})"
