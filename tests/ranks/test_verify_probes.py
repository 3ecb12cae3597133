"""Memory, copies, files and links over several ranks: one word that changes on the way is found, and its rank named."""

import errno
import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from ddp_circles.job.faults import strike
from ddp_circles.verify import copies, links, memory, session
from ddp_circles.verify.__main__ import main
from tests.harness.ranks import Job

FLAGS = ("--device=cpu", "--max-bytes=16384", "--memory=0.1")
FREE = 2**26
ROUNDS = 3


def is_victim(victim: int) -> bool:
    return os.environ["RANK"] == str(victim)


@contextmanager
def probes_alone() -> Iterator[None]:
    """Of each round, only the probes; little memory is free."""
    with ExitStack() as stack:
        for name in ("_check_collectives", "_measure_speed", "_train"):
            stack.enter_context(patch.object(session.Session, name))
        for name, value in (("BLOCK", 2**20), ("HOLD_SECONDS", 0.0), ("available_memory", lambda: FREE)):
            stack.enter_context(patch.object(memory, name, value))
        yield


@contextmanager
def spoiled(module: Any, name: str, spoil: Callable[..., Any], victim: int) -> Iterator[None]:
    """On one rank, `spoil` gets the arguments and the result of a function; what it returns counts."""
    original = getattr(module, name)

    def spoiling(*arguments: Any) -> Any:
        return spoil(arguments, original(*arguments))

    with patch.object(module, name, spoiling) if is_victim(victim) else nullcontext():
        yield


def lose_a_bit(_: Any, blocks: list[torch.Tensor]) -> list[torch.Tensor]:
    blocks[1][17] ^= 1 << 40
    return blocks


def change_what_is_received(arguments: tuple[torch.Tensor, ...], result: Any) -> Any:
    """The last tensor of the first three is the one that is received into."""
    [argument for argument in arguments if isinstance(argument, torch.Tensor)][-1][9] ^= 1 << 3
    return result


def change_what_is_read(_: Any, content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


def fill_the_disk(*_: Any) -> bytes:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def soak() -> Iterator[None]:
    """Three rounds, in each of which a copy goes wrong."""
    original = session.Session._judge_time

    def judge_time(self: session.Session, _: float, found: object) -> bool:
        return original(self, math.inf if self._round < ROUNDS - 1 else 0.0, found)

    with patch.object(session.Session, "_judge_time", judge_time), FAULTS["copies"](1):
        yield


FAULTS: dict[str, Callable[[int], AbstractContextManager[None]]] = {
    "clean": lambda _: nullcontext(),
    "memory": functools.partial(spoiled, memory, "_fill", lose_a_bit),
    "copies": functools.partial(spoiled, copies, "_copy", change_what_is_received),
    "file": functools.partial(spoiled, copies, "_through_file", change_what_is_read),
    "full disk": functools.partial(spoiled, copies, "_through_file", fill_the_disk),
    "links": functools.partial(spoiled, links, "_exchange", change_what_is_received),
    "soak": lambda _: soak(),
}
SIZES = (1, 2, 3)


def victim_of(name: str, size: int) -> int:
    """The last rank; of files, the only one on this host that writes one."""
    return 0 if name in ("file", "full disk") else size - 1


def verify(out: Path, *flags: str) -> int:
    sys.argv = ["verify", "--out", str(out), *FLAGS, *flags]
    with pytest.raises(SystemExit) as leaving:
        main()
    return int(leaving.value.code or 0)


def verify_each(folder: Path, size: int) -> list[int]:
    """Verify once with each fault; returns the exit codes."""
    codes = []
    with probes_alone():
        for name, fault in FAULTS.items():
            with fault(victim_of(name, size)):
                codes.append(verify(folder / name / "verify.json", "--minutes", str(int(name == "soak"))))
    return codes


class Ended(NamedTuple):
    """One verification's end: the exit codes of all ranks, and the content of verify.json."""

    codes: list[int]
    content: dict[str, Any]

    @property
    def findings(self) -> list[tuple[str, str, list[int]]]:
        return [(one["severity"], one["check"], one["ranks"]) for one in self.content["findings"]]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Ended]:
    """The end of a verification; the first call for a number of ranks runs all of theirs."""

    @functools.cache
    def run(size: int) -> dict[str, Ended]:
        folder = tmp_path_factory.mktemp(f"{size}")
        for name in FAULTS:
            (folder / name).mkdir()
        with Job(verify_each, size, folder, size) as job:
            outcomes = job.wait(120)
        assert [outcome.code for outcome in outcomes] == [0] * size, outcomes[0].output
        assert all([file.name for file in (folder / name).iterdir()] == ["verify.json"] for name in FAULTS)
        return {
            name: Ended(
                [outcome.value[number] for outcome in outcomes],
                json.loads((folder / name / "verify.json").read_text()),
            )
            for number, name in enumerate(FAULTS)
        }

    return lambda size, name: run(size)[name]


@pytest.mark.parametrize("size", SIZES)
def test_what_holds_and_carries_its_bits_passes(size: int, ended: Callable[[int, str], Ended]) -> None:
    codes, content = ended(size, "clean")
    assert (codes, content["findings"]) == ([0] * size, [])
    probes = content["probes"]
    assert [probe["wrong"] for probe in probes.values()] == [0] * 4
    assert probes["memory"]["bytes"] == [int(0.1 * FREE / size) // 8 * 8] * size
    assert list(probes["file"]["folders"]) == ["0"]
    assert sorted(pair["ranks"] for pair in probes["links"]["pairs"]) == [
        [one, other] for other in range(size) for one in range(other)
    ]
    assert "counters" not in probes  # a CPU has none


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("check", ["memory", "copies", "file"])
def test_a_word_that_changes_is_found_and_its_rank_named(
    check: str, size: int, ended: Callable[[int, str], Ended]
) -> None:
    result = ended(size, check)
    assert result.codes == [1] * size
    assert result.findings == [("wrong", check, [victim_of(check, size)])]
    assert "1 wrong byte" in result.content["findings"][0]["what"]
    assert {name: probe["wrong"] for name, probe in result.content["probes"].items() if probe["wrong"]} == {check: 1}


@pytest.mark.parametrize(("size", "named"), [(2, [0, 1]), (3, [2])])
def test_a_link_that_changes_a_word_is_named_and_a_rank_that_all_wrong_links_share(
    size: int, named: list[int], ended: Callable[[int, str], Ended]
) -> None:
    result = ended(size, "links")
    assert result.codes == [1] * size
    assert result.findings == [("wrong", "links", named)]
    assert re.search(rf"1 wrong byte from rank \d to rank {size - 1};", result.content["findings"][0]["what"])


@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk_is_a_warning(size: int, ended: Callable[[int, str], Ended]) -> None:
    result = ended(size, "full disk")
    assert result.codes == [0] * size
    assert result.findings == [("warning", "file", [0])]
    assert "No space left on device" in result.content["findings"][0]["what"]


def test_a_soak_copies_in_each_round_and_does_the_rest_once(ended: Callable[[int, str], Ended]) -> None:
    result = ended(2, "soak")
    assert result.findings == [("wrong", "copies", [1])]
    assert result.content["findings"][0]["times"] == result.content["probes"]["copies"]["wrong"] == ROUNDS


def verify_with_a_hanging_link(folder: Path, victim: int) -> None:
    """One rank does not begin to exchange; it speaks last, so that any other that accuses itself is first."""
    session.LAST_WORDS_SECONDS = 15 if is_victim(victim) else 17
    hanging = patch.object(links, "write", lambda *_: strike("stall"))
    with probes_alone(), hanging if is_victim(victim) else nullcontext():
        verify(folder / "verify.json", "--timeout=20")


def test_ranks_that_wait_at_a_link_name_the_one_that_hangs(tmp_path: Path) -> None:
    victim = 1
    with Job(verify_with_a_hanging_link, 3, tmp_path, victim) as job:
        outcomes = job.wait(60)
    assert [outcome.code for outcome in outcomes] == [1, 1, 1], outcomes[0].output
    (finding,) = json.loads((tmp_path / "verify.json").read_text())["findings"]
    assert (finding["severity"], finding["ranks"]) == ("missing", [victim])
    assert "hangs in strike (faults.py, line " in finding["what"]
    assert "last seen in links" in finding["what"]
