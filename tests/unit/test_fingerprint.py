"""The fingerprint differs where the bits can differ, and the kinds of devices leave a broken one where it belongs."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddp_circles.job import fingerprint as fingerprint_module
from ddp_circles.job.fingerprint import COMPUTATION, fingerprint
from ddp_circles.verify import inventory as inventory_module
from ddp_circles.verify import verdict
from ddp_circles.verify.inventory import take_inventory
from tests.harness.ranks import run_ranks

CPU = torch.device("cpu")


def own(threads: int = 1) -> dict[str, str]:
    """This process's fingerprint, with a sign of the random state before and after."""
    torch.set_num_threads(threads)
    before = torch.get_rng_state()
    made = fingerprint(CPU, threads)
    assert torch.equal(torch.get_rng_state(), before)
    return made


def test_it_holds_what_the_bits_depend_on_and_moves_no_random_numbers() -> None:
    (marks,) = run_ranks(own, 1)
    assert (marks["torch"], marks["device"], marks["threads"]) == (torch.__version__, "cpu", "1")
    assert marks["instruction_set"] == torch.backends.cpu.get_cpu_capability()
    assert len(marks["cpu"].split()) >= 1
    assert len({marks[COMPUTATION], *(one[COMPUTATION] for one in run_ranks(own, 3))}) == 1


ENVIRONMENTS = [
    {"ATEN_CPU_CAPABILITY": "default"},
    {"MKL_CBWR": "COMPATIBLE"},
    {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"},
]


def test_other_instructions_are_another_fingerprint() -> None:
    plain, *others = [run_ranks(own, 1, environment=environment)[0] for environment in [{}, *ENVIRONMENTS]]
    if plain["instruction_set"] == "DEFAULT":
        pytest.skip("there are no instructions to do without")
    everyone = [plain, *others]
    assert len({tuple(marks.items()) for marks in everyone}) == len(everyone)
    assert others[0][COMPUTATION] != plain[COMPUTATION]
    assert [bool(marks["cpu"]) for marks in everyone] == [True, True, True, True, False]  # alike on any CPU


@pytest.mark.parametrize("name", ["exp", "tanh", "sigmoid", "log1p"])
def test_a_bit_of_any_function_changes_the_digest(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = fingerprint(CPU, 1)
    original = getattr(torch, name)

    def wrong(values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = original(values)
        result.view(torch.int32)[17] ^= 1
        return result

    monkeypatch.setattr(torch, name, wrong)
    after = fingerprint(CPU, 1)
    assert {entry for entry in after if after[entry] != before[entry]} == {COMPUTATION}


def test_a_cpu_tells_its_vendor_and_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    texts = {
        "Intel": "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Xeon\n",
        "AMD": "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: EPYC\n",
        "Arm": "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n",
    }
    names = {}
    for vendor, text in texts.items():
        (tmp_path / vendor).write_text(text)
        monkeypatch.setattr(fingerprint_module, "CPU_INFO", tmp_path / vendor)
        names[vendor] = fingerprint_module.cpu_name()
    assert names == {
        "Intel": "Xeon (GenuineIntel 6 85)",
        "AMD": "EPYC (AuthenticAMD 25 1)",
        "Arm": f"{os.uname().machine} (0x41 0xd40)",
    }
    monkeypatch.setattr(fingerprint_module, "CPU_INFO", tmp_path / "none")
    assert fingerprint_module.cpu_name() == os.uname().machine


def inventories(monkeypatch: pytest.MonkeyPatch, **changes: str) -> list[dict[str, str]]:
    """The inventories of three ranks, of which the last has a fingerprint with `changes`."""
    world: Any = SimpleNamespace(device=CPU, backend="gloo")
    found = [take_inventory(world, 1) for _ in range(2)]
    changed = fingerprint(CPU, 1) | changes
    monkeypatch.setattr(inventory_module, "fingerprint", lambda *_: changed)
    return [*found, take_inventory(world, 1)]


def test_a_broken_device_is_no_kind_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = inventories(monkeypatch, **{COMPUTATION: "other"})
    assert len({one["kind"] for one in everyone}) == 1
    (finding,) = verdict.judge_inventory(everyone)
    assert (finding.ranks, finding.what.split(":")[0]) == ((2,), "computation differs")


@pytest.mark.parametrize("name", ["torch", "device", "cpu", "instruction_set", "mkl_cbwr", "threads"])
def test_unlike_devices_are_not_compared(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    first, second, third = inventories(monkeypatch, **{name: "other", COMPUTATION: "other"})
    assert first["kind"] == second["kind"] != third["kind"]
    assert COMPUTATION not in [finding.what.split()[0] for finding in verdict.judge_inventory([first, second, third])]


def test_the_kind_tells_what_products_in_bfloat16_depend_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    world: Any = SimpleNamespace(device=CPU, backend="gloo")
    kinds = []
    for flags in ("fpu avx512f", "fpu avx512f avx512_bf16 amx_tile"):
        (tmp_path / flags).write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t: none\n")
        monkeypatch.setattr(inventory_module, "CPU_INFO", tmp_path / flags)
        kinds.append(take_inventory(world, 1)["kind"])
    assert ["bfloat16" in kind for kind in kinds] == [False, True]
    assert kinds[1].endswith("bfloat16 avx512_bf16 amx_tile")
