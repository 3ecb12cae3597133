"""The devices of these tests: CUDA's with `--gpu`; without it the CPU in place of two, as a dry run."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch


@dataclass(frozen=True)
class Way:
    """A number of ranks, and how they are started."""

    size: int
    """`PLAIN` for a process that no launcher started."""
    flags: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """This machine. `device`: `cuda` or `cpu`. `count`: devices, each of which one rank can have for itself."""

    device: str
    count: int

    @property
    def crowd(self) -> int:
        """Most ranks that share a device here."""
        return 4 if self.device == "cuda" else 2

    def apart(self, size: int) -> Way:
        """Each rank on a device of its own, with the backend for that."""
        return Way(size, (f"--device={self.device}", "--backend=auto"))

    def shared(self, size: int) -> Way:
        """All ranks on one device: gloo, for nccl refuses that."""
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return Way(size, (f"--device={self.device}", "--backend=gloo"), {"CUDA_VISIBLE_DEVICES": first})

    def ways(self) -> dict[str, Way]:
        """Two ranks that share a device; and as many as have one each, up to four."""
        return {"shared": self.shared(2), "apart": self.apart(min(self.count, 4))}

    def require(self, count: int) -> None:
        """Skip the test where there are fewer than `count` devices."""
        if self.count < count:
            pytest.skip(f"needs {count} CUDA devices; this machine has {self.count}")


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Machine:
    """This machine."""
    return Machine("cuda", torch.cuda.device_count()) if request.config.getoption("gpu") else Machine("cpu", 2)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints what a test has found, at once and whether it passes or not."""

    def speak(found: str) -> None:
        with capsys.disabled():
            print(f"\n  {found}", flush=True)

    return speak
