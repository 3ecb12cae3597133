"""The words by which a stopped run says how to continue it."""

import shlex
import sys
from pathlib import Path

import pytest

from ddp_circles.job.ranks import COMMAND_VARIABLE, Ranks, how_to_continue

TRAINER = ["-m", "ddp_circles.train", "--epochs", "9"]
NEW_FOLDER = {"run_dir": "runs/a b"}
RUN_DIR = ["--run-dir", "runs/a b"]


def two_ranks(launcher: str, nodes: int = 1) -> Ranks:
    return Ranks(world_size=2, local_world_size=2, launcher=launcher, nodes=nodes)


@pytest.mark.parametrize(
    ("ranks", "words", "changes", "expected"),
    [
        (Ranks(), ["python", *TRAINER], {}, ["python", *TRAINER]),
        (Ranks(), ["python", "-P", *TRAINER], NEW_FOLDER, ["python", "-P", *TRAINER, *RUN_DIR]),
        (Ranks(), ["python", *TRAINER, "--resume=never"], {"resume": "auto"},
         ["python", *TRAINER, "--resume=never", "--resume", "auto"]),
        (two_ranks("torchrun"), ["python", "-u", *TRAINER], NEW_FOLDER,
         [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node=2", *TRAINER, *RUN_DIR]),
    ],
)  # fmt: skip
def test_the_command_is_whole(
    ranks: Ranks,
    words: list[str],
    changes: dict[str, str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shlex.split(how_to_continue(ranks, words, changes)) == expected


def test_a_launch_script_is_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMAND_VARIABLE, "RANKS=3 bash launch/train.sh")
    again = how_to_continue(two_ranks("torchrun"), ["python", "-u", *TRAINER], NEW_FOLDER)
    assert again == "RANKS=3 bash launch/train.sh --epochs 9 --run-dir 'runs/a b'"


def test_several_nodes_are_told_the_flags() -> None:
    again = how_to_continue(two_ranks("srun", nodes=2), ["python", *TRAINER], NEW_FOLDER)
    assert again == "start the same again, with the trainer's flags --epochs 9 --run-dir 'runs/a b'"


@pytest.mark.parametrize("words", [["python", "own.py", "--resume=never"], ["python", "-m", "ipykernel_launcher"]])
def test_a_program_of_ones_own_is_told_the_arguments(words: list[str]) -> None:
    both = NEW_FOLDER | {"resume": "auto"}
    assert how_to_continue(Ranks(), words, {}) == "run the same program again"
    assert (
        how_to_continue(Ranks(), words, both)
        == "run the same program again, with Config(run_dir='runs/a b', resume='auto')"
    )
