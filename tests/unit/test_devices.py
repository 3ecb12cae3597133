"""Choice of device and backend, and the check that all ranks can form one job."""

import pytest
import torch
import torch.distributed as dist

from ddp_circles.errors import UserError
from ddp_circles.job.devices import Place, choose_device, why_not_together


def fake_gpus(monkeypatch: pytest.MonkeyPatch, count: int, *, nccl: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)


@pytest.mark.parametrize("nccl", [True, False])
@pytest.mark.parametrize(
    "device, backend, flag",
    [("cuda", "auto", "--device cuda"), ("cuda", "gloo", "--device cuda"), ("auto", "nccl", "--backend nccl"),
     ("cpu", "nccl", "--backend nccl")],
)  # fmt: skip
def test_missing_hardware_is_refused_by_flag(
    device: str, backend: str, flag: str, nccl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, 0, nccl=nccl)
    with pytest.raises(UserError, match=flag):
        choose_device(device, backend, 0)


def test_nccl_on_the_cpu_is_refused_even_beside_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, 2)
    with pytest.raises(UserError, match="--backend nccl"):
        choose_device("cpu", "nccl", 0)


@pytest.mark.parametrize(
    "gpus, device, backend, chosen",
    [
        (0, "auto", "auto", ("cpu", "gloo")),
        (0, "cpu", "gloo", ("cpu", "gloo")),
        (2, "auto", "auto", ("cuda:1", "nccl")),
        (2, "cuda", "gloo", ("cuda:1", "gloo")),
        (2, "cpu", "auto", ("cpu", "gloo")),
    ],
)
def test_device_and_backend(
    gpus: int, device: str, backend: str, chosen: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, gpus)
    torch_device, name = choose_device(device, backend, 1)
    assert (str(torch_device), name) == chosen


def test_ranks_that_see_one_gpu_each_take_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `srun --gpus-per-task=1` every GPU is number 0: only its UUID shows if ranks share one."""
    fake_gpus(monkeypatch, 1)
    assert choose_device("cuda", "auto", 2) == (torch.device("cuda:0"), "nccl")
    assert choose_device("cuda", "gloo", 2) == (torch.device("cuda:0"), "gloo")


A, B = "rank 0 (host a)", "rank 1 (host b)"
ON_A = Place(A, "cuda with nccl", "GPU-1")


@pytest.mark.parametrize(
    ("places", "why"),
    [
        ([ON_A], ""),
        ([ON_A, Place(A, "cuda with nccl", "GPU-2")], ""),
        ([ON_A, ON_A], "rank 0 (host a) and rank 1 have one CUDA device: start one rank per device, or let"),
        ([ON_A._replace(kind="cuda with gloo")] * 3, ""),
        ([Place(A, "cpu with gloo")] * 3, ""),
        (
            [ON_A, Place(B, "cpu with gloo"), Place(B, "cpu with gloo")],
            "the ranks would not meet (cuda with nccl on 1, first on rank 0 (host a); cpu with gloo on 2, first on",
        ),
        ([ON_A, Place(B, refusal="--device cuda: none")], "rank 1 (host b): --device cuda: none"),
        (
            [
                Place(A, refusal="--device cuda: none"),
                Place(B, refusal="--device cuda: none"),
            ],
            "--device cuda: none",
        ),
        ([Place(A, refusal="busy"), Place(B, refusal="none")], "rank 0 (host a): busy"),
    ],
)
def test_ranks_that_cannot_form_one_job_are_refused(places: list[Place], why: str) -> None:
    assert why_not_together(places).startswith(why)
    assert bool(why_not_together(places)) == bool(why)
