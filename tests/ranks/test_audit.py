"""A training that audits its hardware: who is named when a gradient is corrupted, and who is left in peace.

The long form, with 50 tries for each kind of fault and 200 clean runs: `bash launch/test.sh -m long tests/ranks -s`
"""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Adam

from ddp_circles import Config, Dataset, Split, fit
from ddp_circles import run as run_module
from ddp_circles.job.faults import Fault
from ddp_circles.job.rehearsal import Rehearsal
from ddp_circles.job.sums import sum_over_ranks
from ddp_circles.loading import Loaded
from tests.harness.ranks import Job, Outcome
from tests.harness.runs import QUIET, Bits, bits, checkpoint_steps, finish, run, status, train_hastily

SETTINGS: dict[str, Any] = {
    "n_samples": 125,
    "batch_size": 16,
    "epochs": 3,
    "checkpoint_steps": 1,
    "wandb": "disabled",
    "plots": False,
    "log_every": 100,
}
"""21 steps, with a checkpoint after each."""
STEPS = 21
FLAGS = ("--n-samples=125", "--batch-size=16", "--epochs=3", "--checkpoint-steps=1")
TRIES, CLEAN_RUNS = 50, 200

INPUTS = torch.rand(125, 12, generator=torch.Generator().manual_seed(1))
TARGETS = (INPUTS.sum(1) > 6).float()


class Read(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Samples with some noise, drawn anew each time they are read."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError
        noise = torch.randn(12) * 0.01 + random.random() * 0.01
        return INPUTS[self.start + index] + noise, TARGETS[self.start + index]


def own_model() -> nn.Module:
    """Dropout and batch norm, with a momentum that makes the order of changes count."""
    torch.manual_seed(3)
    between = nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU()
    return nn.Sequential(nn.Linear(12, 8), *between, nn.Linear(8, 1), nn.Flatten(0))


def train_default(config: Config) -> None:
    fit(config)


def data(targets: Tensor = TARGETS) -> Split:
    return Split(*(Dataset(INPUTS[part], targets[part]) for part in (slice(100), slice(100, None))))


def train_own(config: Config) -> None:
    fit(config, model=own_model(), data=data(), max_grad_norm=1.0)


def train_read(config: Config) -> None:
    read_here, here = Loaded._read_here, 0

    def counted(*arguments: Any) -> Any:
        nonlocal here
        here += 1
        return read_here(*arguments)

    with patch.object(Loaded, "_read_here", counted):
        fit(config, model=own_model(), data=Split(Read(0, 100), Read(100, 125)), workers=1)
    assert not here  # workers read ahead for audits too; only what is in dispute the rank reads by itself


LARGER: dict[str, Any] = {"micro_batches": 4, "batch_size": 17, "epochs": 4}
"""Micro-batches of three samples and more, as batch norm needs; 24 steps."""
WAYS: dict[str, tuple[Callable[[Config], None], dict[str, Any]]] = {
    "side by side": (train_default, {}),
    "one by one": (train_default, {"hidden": (600, 600), "optimizer": "sgd", "lr": 0.1}),  # two buckets of DDP
    "own model": (train_own, LARGER),
    "read": (train_read, LARGER),
}
"""The ways of micro-batches through a network, each with its settings."""


class Attempt(NamedTuple):
    """One training and what goes wrong in it."""

    way: str
    audit_steps: int
    fault: str | None = None
    seed: int = 42


def attempt_each(folder: Path, attempts: list[Attempt]) -> list[int]:
    """Train once for each attempt; returns the exit codes."""
    codes = []
    for number, (way, audit_steps, fault, seed) in enumerate(attempts):
        print(f"== {number}", flush=True)
        train, settings = WAYS[way]
        given = SETTINGS | settings | {"audit_steps": audit_steps, "fault": fault, "seed": seed}
        try:
            train(Config(run_dir=folder / str(number), **given))
            codes.append(0)
        except SystemExit as leaving:
            codes.append(int(leaving.code or 0))
    return codes


def ends(size: int, folder: Path, attempts: list[Attempt], timeout: float = 200) -> list[tuple[list[int], list[str]]]:
    """For each attempt, the exit codes and the outputs of all ranks."""
    with Job(attempt_each, size, folder, attempts) as job:
        outcomes = job.wait(timeout)
    assert [outcome.code for outcome in outcomes] == [0] * size, outcomes[0].output
    spoken = [re.split(r"^== .*\n", outcome.output, flags=re.MULTILINE)[1:] for outcome in outcomes]
    return [
        ([outcome.value[number] for outcome in outcomes], [of_rank[number] for of_rank in spoken])
        for number in range(len(attempts))
    ]


def accused(output: str, rank: int, step: int) -> list[int]:
    """The ranks that this rank names as broken after an audit of `step`."""
    found = re.search(rf"^rank {rank}: audit of step {step}: (.*)\. This is a fault of hardware", output, re.MULTILINE)
    assert found, output
    named = [] if "nobody can say" in found[1] else re.findall(r"rank (\d+) \(host", found[1])
    return [int(number) for number in named]


def check_caught(size: int, folder: Path, attempts: list[Attempt]) -> None:
    """Each attempt's fault was found in its step, all ranks name the right one, and the step was not applied."""
    for number, (codes, outputs) in enumerate(ends(size, folder, attempts, 60 + 10 * len(attempts))):
        assert codes == [1] * size, outputs[0]
        fault = attempts[number].fault or ""
        victim, step = map(int, re.findall(r"\d+", fault))
        for rank, output in enumerate(outputs):
            assert accused(output, rank, step) == [victim], (attempts[number], output)
            assert "Traceback" not in output
        assert (status(folder / str(number)), checkpoint_steps(folder / str(number))[0]) == ("failed", step)


def random_attempts(kind: str, size: int, way: str, count: int) -> list[Attempt]:
    """Faults at random steps and ranks, each in a step that is audited."""
    choices = random.Random(f"{kind} {size} {way}")
    attempts = []
    for _ in range(count):
        audit_steps = choices.randint(1, 4)
        step = choices.randrange(0, STEPS, audit_steps)
        attempts.append(Attempt(way, audit_steps, f"{kind}@{choices.randrange(size)}:{step}", choices.randrange(2**32)))
    return attempts


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_corrupted_gradient_is_caught_in_its_step_and_the_rank_named(size: int, tmp_path: Path) -> None:
    check_caught(size, tmp_path, [random_attempts(kind, size, way, 1)[0] for kind in ("flip", "warp") for way in WAYS])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["flip", "warp"])
@pytest.mark.parametrize("size", [3, 4])
def test_each_fault_is_caught_every_time(kind: str, size: int, tmp_path: Path) -> None:
    ways = random.Random(size).choices(list(WAYS), k=TRIES)
    attempts = [random_attempts(kind, size, way, number + 1)[-1] for number, way in enumerate(ways)]
    check_caught(size, tmp_path, attempts)
    print(f"{kind}: caught in its step, and the right one of {size} ranks named, in {TRIES} of {TRIES} tries")


def test_the_bits_are_the_same_with_an_audit_and_without(tmp_path: Path) -> None:
    found: dict[str, set[Bits]] = {way: set() for way in WAYS}
    for size, every in ((1, (0, 1)), (2, (1,)), (3, (1, 3)), (4, (2,))):
        attempts = [Attempt(way, audit_steps) for way in WAYS for audit_steps in every]
        for number, (codes, outputs) in enumerate(ends(size, tmp_path / str(size), attempts)):
            assert codes == [0] * size, outputs[0]
            found[attempts[number].way].add(bits(tmp_path / str(size) / str(number)))
    assert {way: len(different) for way, different in found.items()} == dict.fromkeys(WAYS, 1)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_clean_runs_raise_no_alarm(tmp_path: Path) -> None:
    choices = random.Random("clean")
    for size in (1, 2, 3, 4):
        attempts = [
            Attempt(choices.choice(list(WAYS)), choices.randint(1, 3), seed=choices.randrange(2**32))
            for _ in range(CLEAN_RUNS // 4)
        ]
        for codes, outputs in ends(size, tmp_path / str(size), attempts, 1000):
            assert codes == [0] * size, outputs[0]
            assert "audit of step" not in "".join(outputs)
    print(f"no finding in {CLEAN_RUNS} clean runs")


@pytest.mark.parametrize("kind", ["flip", "warp"])
def test_without_an_audit_nobody_notices_and_the_weights_are_wrong(kind: str, tmp_path: Path) -> None:
    attempts = [Attempt("side by side", 0), *(Attempt("side by side", every, f"{kind}@1:8") for every in (0, 3))]
    for codes, outputs in ends(3, tmp_path, attempts):
        assert codes == [0, 0, 0]  # an audit of other steps does not see it either
        assert "audit of step" not in "".join(outputs)
    clean, unaudited, between = (bits(tmp_path / str(number)) for number in range(3))
    assert unaudited == between
    assert clean.model != unaudited.model


# ---- what one and two ranks can say


def test_one_rank_contradicts_itself(tmp_path: Path) -> None:
    check_caught(1, tmp_path, [Attempt(way, 2, "flip@0:4") for way in WAYS])


@pytest.mark.parametrize(("size", "expected"), [(3, [1]), (2, [])])
def test_a_lasting_fault_is_named_by_three_ranks_and_by_nobody_among_two(
    size: int, expected: list[int], tmp_path: Path
) -> None:
    attempts = [Attempt(way, 4, f"{kind}@1:5+") for way in ("side by side", "own model") for kind in ("flip", "warp")]
    for codes, outputs in ends(size, tmp_path, attempts):
        assert codes == [1] * size
        for rank, output in enumerate(outputs):
            assert accused(output, rank, 8) == expected, output
        assert ("the fault lasts" in outputs[0]) == (size == 3)
        assert outputs[0].count("(host ") == (1 if size == 3 else 2)  # both are told where they are
        assert "checkpoints after step 4 are deleted" in outputs[0]


def test_one_rank_does_not_see_a_fault_that_repeats_to_the_bit(tmp_path: Path) -> None:
    ((codes, _),) = ends(1, tmp_path, [Attempt("side by side", 1, "warp@0:5+")])
    assert codes == [0]


@pytest.mark.parametrize("hidden", ["10", "300"])
def test_a_rank_that_owns_nothing_must_add_nothing(hidden: str, tmp_path: Path) -> None:
    flags = (*FLAGS, "--hidden", hidden, hidden, "--micro-batches=2", "--audit-steps=1")
    for outcome in run(3, tmp_path, *flags, "--fault=flip@2:3"):
        assert outcome.code == 1
        assert accused(outcome.output, outcome.rank, 3) == [2]


# ---- beside other ends of a run


def test_a_gradient_that_is_no_number_on_one_rank_is_its_fault(tmp_path: Path) -> None:
    check_caught(3, tmp_path, [Attempt(way, 1, "nan@2:6") for way in WAYS])


@pytest.mark.parametrize("way", [(), ("--hidden", "300", "300")])
def test_a_training_that_diverges_is_no_fault_of_the_hardware(way: tuple[str, ...], tmp_path: Path) -> None:
    for outcome in run(3, tmp_path, *FLAGS, *way, "--audit-steps=1", "--optimizer=sgd", "--lr=1e15"):
        assert outcome.code == 1
        assert "the training diverged" in outcome.output
        assert "audit of step" not in outcome.output


def change_weights(folder: Path, victim: int, after: int) -> None:
    """Train while the weights of one rank change by themselves after so many steps."""
    original, steps = Adam.step, 0

    def step(optimizer: Adam) -> Any:
        nonlocal steps
        steps += 1
        original(optimizer)
        if steps == after and dist.get_rank() == victim:
            optimizer.param_groups[0]["params"][0].data.view(-1)[0] += 2.0**-20

    with patch.object(Adam, "step", step):
        fit(Config(run_dir=folder, audit_steps=6, **SETTINGS))


@pytest.mark.parametrize(
    ("size", "victim", "after", "found_in", "alike_before", "expected"),
    [
        (3, 1, 5, 6, 0, [1]),
        (3, 0, 8, 12, 6, [0]),
        (2, 1, 5, 6, 0, []),
        (3, 1, 20, STEPS, 18, [1]),  # at the end of the run, after its last audit
    ],
)
def test_weights_that_changed_by_themselves_are_found_and_do_not_come_back(
    size: int, victim: int, after: int, found_in: int, alike_before: int, expected: list[int], tmp_path: Path
) -> None:
    with Job(change_weights, size, tmp_path / "run", victim, after) as job:
        outcomes: list[Outcome] = job.wait(60)
    for outcome in outcomes:
        assert outcome.code == 1, outcome.output
        assert accused(outcome.output, outcome.rank, found_in) == expected
        assert f"alike before step {alike_before}" in outcome.output
    assert status(tmp_path / "run") == "failed"
    clean = finish(1, tmp_path / "clean", *FLAGS)
    assert finish(size, tmp_path / "run", *FLAGS, "--audit-steps=6") == clean


def add_wrongly(folder: Path, settings: dict[str, Any], *victims: int) -> None:
    """Train while some ranks receive a sum, the fifth one, in which one bit of one element is wrong."""
    calls = 0

    def add(numbers: Tensor) -> Tensor:
        nonlocal calls
        total, calls = sum_over_ranks(numbers), calls + 1
        if calls == 5 and dist.get_rank() in victims:
            total[7] ^= 1 << 30
        return total

    with patch("ddp_circles.exact.sum_over_ranks", add):
        fit(Config(run_dir=folder, **SETTINGS | settings))


@pytest.mark.parametrize("victims", [(0, 1), (1,)])
def test_a_sum_that_arrives_wrong_is_not_applied(victims: tuple[int, ...], tmp_path: Path) -> None:
    with Job(add_wrongly, 2, tmp_path / "run", {"audit_steps": 4}, *victims) as job:
        outcomes = job.wait(60)
    for outcome in outcomes:
        assert outcome.code == 1, outcome.output
        told = f"rank {outcome.rank}: audit of step 4: rank {outcome.rank} (host "
        if outcome.rank in victims:
            assert told in outcome.output
            assert "received another sum than all ranks have sent" in outcome.output
        else:
            assert "lost a peer: rank 1 (host " in outcome.output
            assert "raised HardwareError" in outcome.output
    assert checkpoint_steps(tmp_path / "run")[0] == (
        4 if 0 in victims else 5
    )  # rank 0 received, and applied, the right one
    assert finish(2, tmp_path / "run", *FLAGS, "--audit-steps=4") == finish(1, tmp_path / "clean", *FLAGS)


def test_the_sum_of_each_bucket_is_held_against_what_was_sent(tmp_path: Path) -> None:
    """Of the two buckets of a step, the fifth one is not the last of its step."""
    with Job(add_wrongly, 2, tmp_path, {"audit_steps": 1} | WAYS["one by one"][1], 1) as job:
        outcomes = job.wait(60)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert "audit of step 2: rank 1 (host " in outcomes[1].output
    assert "received another sum than all ranks have sent" in outcomes[1].output
    assert "rank 1 (host " in outcomes[0].output


def fail_in_recomputation(folder: Path) -> None:
    """Train while rank 1 computes wrong what it recomputes for another rank, and its own right."""

    def rehearsal(fault: Fault, marker: Path, weights: Tensor, recomputing: Callable[[], bool]) -> Rehearsal:
        return Rehearsal(fault, marker, weights, lambda: not recomputing())

    with patch.object(run_module, "Rehearsal", rehearsal):
        fit(Config(run_dir=folder, audit_steps=3, fault="flip@1:6", **SETTINGS))


def test_a_rank_that_is_wrong_about_another_is_named_itself(tmp_path: Path) -> None:
    with Job(fail_in_recomputation, 3, tmp_path) as job:
        outcomes = job.wait(60)
    for outcome in outcomes:
        assert outcome.code == 1
        assert accused(outcome.output, outcome.rank, 6) == [1]


class WithMean(nn.Module):
    """A model whose gradient for no sample is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 1)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.linear(inputs).squeeze(1) + self.weight * inputs.mean()
        return logits


def train_with_an_idle_rank(folder: Path) -> None:
    torch.manual_seed(1)
    fit(Config(run_dir=folder, audit_steps=1, micro_batches=2, **SETTINGS), model=WithMean(), data=data())


def test_after_a_finding_the_run_goes_on_from_its_checkpoint_and_counts_its_audits(tmp_path: Path) -> None:
    audited = (*FLAGS, "--audit-steps=2")
    clean = finish(1, tmp_path / "clean", *audited)
    assert [outcome.code for outcome in run(3, tmp_path / "run", *audited, "--fault=flip@1:10")] == [1, 1, 1]
    assert finish(2, tmp_path / "run", *audited, "--fault=flip@1:10") == clean
    for name in ("clean", "run"):
        assert json.loads((tmp_path / name / "summary.json").read_text())["audits"] == -(-STEPS // 2)


def train_with_a_large_loss(folder: Path) -> None:
    """Train with a loss that, after three steps, one sample puts beyond the range; its gradients stay small."""
    original, steps = Adam.step, 0

    def step(optimizer: Adam) -> Any:
        nonlocal steps
        steps += 1
        original(optimizer)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return ((logits - targets) ** 2).sum() + (targets > 1).sum() * (1e20 if steps > 2 else 0.0)

    targets = TARGETS.clone()
    targets[7] = 1.5
    with patch.object(Adam, "step", step):
        fit(
            Config(run_dir=folder, audit_steps=1, **SETTINGS | LARGER), model=own_model(), data=data(targets), loss=loss
        )


@pytest.mark.parametrize(
    ("train", "message"),
    [(train_with_an_idle_rank, "were not finite"), (train_with_a_large_loss, "beyond the range of the exact sums")],
)
def test_numbers_out_of_range_are_no_fault_of_the_hardware(
    train: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    with Job(train, 3, tmp_path) as job:
        outcomes = job.wait(60)
    for outcome in outcomes:
        assert outcome.code == 1
        assert message in outcome.output, outcome.output
        assert "audit of step" not in outcome.output


def train_on_another_kind(*flags: object) -> None:
    """Rank 1 is of another kind than the others."""
    if os.environ["RANK"] == "1":
        os.environ["MKL_CBWR"] = "COMPATIBLE"
    train_hastily(*flags)


def test_ranks_of_two_kinds_are_not_compared(tmp_path: Path) -> None:
    with Job(train_on_another_kind, 3, "--run-dir", tmp_path, *QUIET, *FLAGS, "--audit-steps=5") as job:
        outcomes = job.wait(60)
    assert [outcome.code for outcome in outcomes] == [2, 2, 2]
    message = "error: --audit-steps compares ranks of one kind, and these differ in mkl_cbwr"
    assert [outcome.output.count(message) for outcome in outcomes] == [1, 0, 0]


def test_sums_that_have_no_right_answer_are_not_audited(tmp_path: Path) -> None:
    (refused,) = run(1, tmp_path, "--reduction=fast", "--audit-steps=5")
    assert refused.code == 2
    assert "--audit-steps 5 needs --reduction exact" in refused.output
