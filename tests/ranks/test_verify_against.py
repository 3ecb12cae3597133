"""The verifier against an earlier report: a fault that all ranks share is seen, and so is that of a single rank."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from ddp_circles.verify.injection import Trouble
from tests.harness.verifying import Ended, Plan, end_each, report
from tests.ranks.test_verify import lasting_fault


@contextmanager
def another_kind() -> Iterator[None]:
    """This machine rounds otherwise, and says so."""
    with lasting_fault(0), patch.dict(os.environ, {"MKL_CBWR": "COMPATIBLE"}):
        yield


@contextmanager
def slowness() -> Iterator[None]:
    """Ranks compute nine times as long."""
    with patch.object(Trouble, "work", 9):
        yield


def plans(size: int, folder: Path) -> dict[str, Plan]:
    """What ranks do one after the other; each flag that names a report names that of an earlier plan."""

    def against(name: str) -> str:
        return f"--against={folder / name / 'verify.json'}"

    everyone = functools.partial(lasting_fault, *range(size))
    if size == 2:
        return {
            "clean": Plan(),
            "shared": Plan(trouble=everyone),
            "shared, against": Plan((against("clean"),), everyone),
            "one of two, against": Plan((against("clean"),), functools.partial(lasting_fault, 1)),
            "no file": Plan((against("nowhere"),)),
        }
    return {
        "clean": Plan(("--seed=5",)),
        "lasting": Plan(("--seed=5",), everyone),
        "lasting, against": Plan(("--seed=5", against("clean")), everyone),
        "injected": Plan(("--seed=5", "--inject=flip@0:3+")),
        "injected, against": Plan(("--seed=5", "--inject=flip@0:3+", against("clean"))),
        "clean, against": Plan(("--seed=5", against("clean"))),
        "slow, against": Plan(("--seed=5", against("clean")), slowness),
        "another kind": Plan(("--seed=5", against("clean")), another_kind),
        "another seed": Plan((against("clean"),)),
        "against a failure": Plan(("--seed=5", against("lasting, against"))),
        "onto itself": Plan(("--seed=5", against("clean"), f"--out={folder / 'clean' / 'verify.json'}"), everyone),
    }


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Ended]:
    """The end of a planned verification; the first call for a number of ranks runs all its plans."""

    @functools.cache
    def run(size: int) -> dict[str, Ended]:
        folder = tmp_path_factory.mktemp(f"{size}")
        return end_each(folder, size, plans(size, folder))

    return lambda size, name: run(size)[name]


@pytest.mark.parametrize(
    ("size", "name", "blamed", "step"),
    [
        (1, "lasting, against", [0], 0),
        (1, "injected, against", [0], 3),
        (2, "shared, against", [0, 1], 0),
        (2, "one of two, against", [1], 0),
    ],
)
def test_a_fault_that_repeats_to_the_bit_is_seen_against_an_earlier_report(
    size: int, name: str, blamed: list[int], step: int, ended: Callable[[int, str], Ended]
) -> None:
    codes, outputs, folder = ended(size, name)
    assert codes == [1] * size, outputs[0]
    (finding,) = (one for one in report(folder)["findings"] if one["check"] == "against")
    assert (finding["severity"], finding["ranks"]) == ("wrong", blamed)
    assert f"from step {step} on" in finding["what"]
    assert f"rank {blamed[0]} is on host" in outputs[0]


@pytest.mark.parametrize(("size", "name"), [(1, "lasting"), (1, "injected"), (2, "shared")])
def test_without_one_it_is_not_seen(size: int, name: str, ended: Callable[[int, str], Ended]) -> None:
    codes, _, folder = ended(size, name)
    assert codes == [0] * size
    assert report(folder)["findings"] == []


def test_a_machine_that_agrees_with_the_earlier_report_passes(ended: Callable[[int, str], Ended]) -> None:
    codes, outputs, folder = ended(1, "clean, against")
    assert codes == [0], outputs[0]
    content = report(folder)
    assert content["findings"] == []
    assert [line.split()[0] for line in content["against"]] == ["Compared"]
    assert "Compared with" in outputs[0]


def test_a_rank_that_has_become_slow_is_warned_about(ended: Callable[[int, str], Ended]) -> None:
    codes, outputs, folder = ended(1, "slow, against")
    assert codes == [0], outputs[0]
    (finding,) = report(folder)["findings"]
    assert (finding["severity"], finding["check"], finding["ranks"]) == ("warning", "against", [0])


def test_another_kind_is_not_compared_and_said_to_be_none(ended: Callable[[int, str], Ended]) -> None:
    codes, outputs, folder = ended(1, "another kind")
    assert codes == [0], outputs[0]
    (line,) = report(folder)["against"]
    assert line.startswith("Not compared with ")
    assert "this is torch" in line
    assert "mkl_cbwr COMPATIBLE" in line
    assert " ".join(line.split()) in " ".join(outputs[0].split())


@pytest.mark.parametrize(
    ("size", "name", "message"),
    [
        (1, "another seed", "has no digest for --seed 42: give --seed 5"),
        (1, "against a failure", "did not pass"),
        (2, "no file", "cannot be read: No such file"),
    ],
)
def test_a_report_that_cannot_be_used_is_refused_before_anything_runs(
    size: int, name: str, message: str, ended: Callable[[int, str], Ended]
) -> None:
    codes, outputs, folder = ended(size, name)
    assert codes == [2] * size
    assert "--against" in outputs[0]
    assert message in " ".join(outputs[0].split())
    assert not (folder / "verify.json").exists()


def test_the_earlier_report_is_read_before_it_is_written_over(ended: Callable[[int, str], Ended]) -> None:
    codes, outputs, _ = ended(1, "onto itself")
    assert codes == [1], outputs[0]
    assert "against" in report(ended(1, "clean").folder)["findings"][0]["check"]
