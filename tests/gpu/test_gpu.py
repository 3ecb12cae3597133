"""Questions that only a GPU can answer, most important first: bash launch/test.sh --gpu.

Without `--gpu` all of it is a dry run on the CPU. Each test prints what it has found.
"""

import json
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR
from torch.profiler import ProfilerActivity, profile

from benchmarks.throughput import processor
from ddp_circles import Config, fit, loop
from examples import digits
from tests.gpu.conftest import Machine, Way
from tests.harness.ranks import Job, Outcome, run_ranks
from tests.harness.runs import (
    PLAIN,
    PROJECT,
    Bits,
    agent,
    bits,
    checkpoint_steps,
    plain,
    start,
    status,
    torchrun,
)
from tests.harness.verifying import Plan, check, end_each, report, verify
from tests.ranks.test_tables import TABLES, published

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(400)]

Say = Callable[[str], None]
SHORT = ("--n-samples=1000", "--epochs=10", "--checkpoint-steps=25")
"""130 steps."""
WIDE = ("--hidden", "1024", "1024", "--n-samples=1000", "--batch-size=200", "--epochs=2")
"""8 steps; micro-batches one by one, gradients in two of DDP's buckets."""


def train(way: Way, run_dir: Path, *flags: str) -> list[Outcome]:
    """Train until all ranks have ended."""
    with start(way.size, run_dir, *way.flags, *flags, variables=way.variables) as job:
        return job.wait(200)


def trained(way: Way, run_dir: Path, *flags: str) -> Bits:
    """The bits of a training that must succeed."""
    for outcome in train(way, run_dir, *flags):
        assert outcome.code == 0, f"rank {outcome.rank} of {way.size} ended with {outcome.code}:\n{outcome.output}"
    return bits(run_dir)


def summary(run_dir: Path) -> dict[str, Any]:
    """The content of summary.json."""
    content: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return content


# ---- training, and the same bits


@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_it_trains(machine: Machine, say: Say, tmp_path: Path, launcher: str) -> None:
    name = torch.cuda.get_device_name() if machine.device == "cuda" else processor()
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}"
    say(f"{machine.count} x {name}; {versions}")
    run_dir, flags = tmp_path / "run", machine.apart(1).flags
    begun = time.monotonic()
    if launcher == "python":
        command = plain(tmp_path / "log", run_dir, *flags)
    else:
        command = torchrun(tmp_path / "log", 1, run_dir, *flags)
    with command:
        assert command.wait(200) == 0, command.output
    found = summary(run_dir)
    say(
        f"{launcher}: test accuracy {found['test/accuracy']:.2%} after {time.monotonic() - begun:.1f} s, micro-batches "
        f"{found['micro_batches_run']}, {found['weights_sha256']}"
    )
    assert found["test/accuracy"] >= 0.97


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (("--epochs=10",), (1, 2, 4)),
        (("--epochs=5", "--n-samples=613", "--batch-size=37", "--optimizer=sgd"), (3,)),
        (("--epochs=5", "--recipe=model_4"), (4,)),
        (WIDE, (2, 4)),
    ],
    ids=["default", "uneven", "model_4", "wide"],
)
def test_any_number_of_ranks_gives_the_same_bits(
    machine: Machine, say: Say, tmp_path: Path, flags: tuple[str, ...], sizes: tuple[int, ...]
) -> None:
    ways = {"plain": machine.apart(PLAIN), "one rank": machine.apart(1)}
    ways |= {f"{size} on one device": machine.shared(size) for size in sizes}
    found = {name: trained(way, tmp_path / name, *flags) for name, way in ways.items()}
    digests = {name: of_way.model[:8] for name, of_way in found.items()}
    say(f"{digests}, micro-batches {summary(tmp_path / 'plain')['micro_batches_run']}")
    assert len(set(found.values())) == 1


@pytest.mark.parametrize("flags", [("--epochs=10",), WIDE], ids=["default", "wide"])
def test_several_devices_give_the_bits_of_one(
    machine: Machine, say: Say, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    machine.require(2)
    sizes = [size for size in (1, 2, 3, 4, 8) if size <= machine.count]
    found = {size: trained(machine.apart(size), tmp_path / str(size), *flags) for size in sizes}
    say(f"{ {size: of_size.model[:8] for size, of_size in found.items()} }")
    assert len(set(found.values())) == 1


@pytest.mark.parametrize("name", ["model_4", "model_3", "model_1"])
def test_the_published_tables_are_printed(machine: Machine, say: Say, tmp_path: Path, name: str) -> None:
    through_last_row = (f"--recipe={name}", f"--epochs={TABLES[name][-1][0] + 1}", "--log-every=10")
    (outcome,) = train(machine.apart(PLAIN), tmp_path, *through_last_row)
    printed = [line for line in outcome.output.splitlines() if line.startswith("Epoch:")]
    rows = published(name)
    same = sum(row in printed for row in rows)
    say(f"{name}: {same} of {len(rows)} rows to the digit")
    assert same == len(rows), outcome.output


def train_digits(run_dir: Path, device: str, workers: int, epochs: int) -> None:
    """Train the example: convolutions, batch norm, dropout, AdamW, a schedule, clipping, samples from pinned memory."""
    changed = {"epochs": epochs, "device": device, "backend": "gloo", "wandb": "disabled", "plots": False}
    setattr(digits, "Config", lambda **settings: Config(**settings | changed))  # noqa: B010 - not a type any more
    setattr(digits, "OneCycleLR", lambda optimizer, **given: OneCycleLR(optimizer, **given | {"total_steps": 24}))  # noqa: B010
    sys.argv = ["digits.py", f"--run-dir={run_dir}", f"--workers={workers}"]
    digits.main()


def test_a_real_model_gives_the_same_bits(machine: Machine, say: Say, tmp_path: Path) -> None:
    def digits_on(size: int, workers: int, epochs: int, name: str) -> None:
        arguments = (tmp_path / name, machine.device, workers, epochs)
        run_ranks(train_digits, size, *arguments, timeout=200, environment=machine.shared(size).variables)

    digits_on(1, 0, 2, "alone")
    alone = bits(tmp_path / "alone")
    say(f"digits, two epochs: test accuracy {alone.rows[-1][-1]:.1%}, {alone.model}")
    digits_on(3, 2, 2, "with workers")
    assert bits(tmp_path / "with workers") == alone
    digits_on(2, 0, 1, "resumed")
    digits_on(1, 2, 2, "resumed")
    assert bits(tmp_path / "resumed") == alone


# ---- faults


@pytest.fixture(scope="module")
def undisturbed(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Bits:
    """The bits of a training of `SHORT`."""
    return trained(machine.apart(PLAIN), tmp_path_factory.mktemp("undisturbed"), *SHORT)


@pytest.mark.parametrize("name", ["apart", "shared"])
def test_a_killed_rank_is_restarted_to_the_same_bits(
    machine: Machine, tmp_path: Path, undisturbed: Bits, name: str
) -> None:
    way, run_dir = machine.ways()[name], tmp_path / "run"
    flags = (*way.flags, *SHORT, f"--fault=kill@{way.size - 1}:60")
    options = ["--max-restarts=2"]
    with agent(tmp_path / "log", way.size, run_dir, *flags, options=options, variables=way.variables) as job:
        assert job.wait(200) == 0, job.output
    assert way.size == 1 or f"lost a peer: rank {way.size - 1} (host" in job.output
    assert "continue after step 50" in job.output
    assert bits(run_dir) == undisturbed


@pytest.mark.parametrize("name", ["apart", "shared"])
def test_a_stopped_training_goes_on_to_the_same_bits(machine: Machine, tmp_path: Path, name: str) -> None:
    way, run_dir = machine.ways()[name], tmp_path / "run"
    endless = (*SHORT, "--epochs=100000")
    with start(way.size, run_dir, *way.flags, *endless, variables=way.variables) as job:
        job.wait_until(lambda: run_dir.exists() and bool(checkpoint_steps(run_dir)))
        job.signal(signal.SIGTERM)
        outcomes = job.wait(60)
    # 75 without torchrun's variables
    assert [one.code for one in outcomes] == [0] * way.size, outcomes[0].output
    assert status(run_dir) == "stopped"
    through = (*SHORT, f"--epochs={checkpoint_steps(run_dir)[0] // 13 + 2}")
    alone = machine.apart(PLAIN)
    assert trained(alone, run_dir, *through) == trained(alone, tmp_path / "undisturbed", *through)


@pytest.mark.parametrize("name", ["apart", "shared"])
def test_not_a_number_ends_all_ranks_at_its_step(machine: Machine, tmp_path: Path, name: str) -> None:
    way = machine.ways()[name]
    for outcome in train(way, tmp_path, *SHORT, f"--fault=nan@{way.size - 1}:30"):
        assert outcome.code == 1
        assert f"rank {outcome.rank}: in step 30, gradients, losses, metrics or" in outcome.output
    assert checkpoint_steps(tmp_path)[0] == 25


@pytest.mark.parametrize("kind", ["kill", "stall"])
@pytest.mark.parametrize("name", ["apart", "shared"])
def test_a_lost_rank_is_named(machine: Machine, say: Say, tmp_path: Path, name: str, kind: str) -> None:
    if name == "apart":
        machine.require(2)
    way, timeout = machine.ways()[name], 20 if machine.device == "cuda" else 5  # starting CUDA takes its time
    flags = (*way.flags, *SHORT, f"--fault={kind}@1:60", f"--timeout={timeout}")
    with start(way.size, tmp_path, *flags, variables=way.variables) as job:
        job.wait_until((tmp_path / "fault").exists)
        begun = time.monotonic()
        outcomes = job.wait(timeout + 60)
        say(f"{kind}, {name}: all ranks had ended {time.monotonic() - begun:.1f} s after it (--timeout {timeout})")
    for outcome in outcomes:
        if outcome.rank != 1:
            assert outcome.code == 1
            assert f"rank {outcome.rank}: lost a peer: rank 1 (host" in outcome.output


@pytest.mark.parametrize("flags", [("--epochs=5",), WIDE], ids=["side by side", "one by one"])
def test_an_audit_changes_no_bit_and_names_the_rank(machine: Machine, tmp_path: Path, flags: tuple[str, ...]) -> None:
    shared = machine.shared(3)
    clean = trained(machine.apart(PLAIN), tmp_path / "clean", *flags)
    assert trained(shared, tmp_path / "audited", *flags, "--audit-steps=1") == clean
    for kind in ("flip", "warp"):
        for outcome in train(shared, tmp_path / kind, *flags, "--audit-steps=5", f"--fault={kind}@1:5"):
            assert outcome.code == 1
            assert f"rank {outcome.rank}: audit of step 5: rank 1 (host" in outcome.output


# ---- verify


def test_verify_passes_with_one_rank_and_with_several(machine: Machine, say: Say, tmp_path: Path) -> None:
    out = tmp_path / "verify.json"
    ways = {"apart": machine.apart(machine.count), "shared": machine.shared(machine.crowd)}
    for name, way in ways.items():
        with Job(verify, way.size, *way.flags, "--out", out, environment=way.variables) as job:
            outcomes = job.wait(180)
        assert [outcome.code for outcome in outcomes] == [0] * way.size, outcomes[0].output
        say(f"verify, {way.size} ranks, {name}: {outcomes[0].output.splitlines()[-1]}")
        assert report(tmp_path)["passed"]


def test_verify_names_the_rank_with_a_fault(machine: Machine, tmp_path: Path) -> None:
    shared, victim = machine.shared(machine.crowd), machine.crowd - 1
    small = (*shared.flags, "--memory=0.01", "--seed=3")
    plans = {kind: Plan((*small, f"--inject={kind}@{victim}")) for kind in ("flip", "warp", "wrong")}
    for kind, ended in end_each(tmp_path, shared.size, plans, environment=shared.variables).items():
        check(kind, victim, ended.codes, ended.outputs[0], ended.folder)
    (tmp_path / "kill").mkdir()
    out = tmp_path / "kill" / "verify.json"
    with Job(verify, shared.size, *small, f"--inject=kill@{victim}", "--out", out, environment=shared.variables) as job:
        survivors = job.wait(180)[:victim]
    check("kill", victim, [outcome.code or 0 for outcome in survivors], survivors[0].output, tmp_path / "kill")


def test_verify_names_the_rank_that_is_slow(machine: Machine, tmp_path: Path) -> None:
    machine.require(2)  # ranks that share a device are slow in turn
    way = machine.apart(machine.count)
    plans = {"slow": Plan((*way.flags, "--memory=0.01", "--inject=slow@1"))}
    (ended,) = end_each(tmp_path, way.size, plans, environment=way.variables).values()
    check("slow", 1, ended.codes, ended.outputs[0], ended.folder)


# ---- speed


@contextmanager
def counting(device: str, counts: Counter[str]) -> Iterator[None]:
    """Count what a step asks of the device, and the lines of code that wait for it, in the training alone."""
    train_epoch = loop.train_epoch

    def watched(*arguments: Any) -> None:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            train_epoch(*arguments)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    setattr(loop, "train_epoch", watched)  # noqa: B010 - a plain assignment has another type
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA][: device == "cuda"]]
    with warnings.catch_warnings(record=True) as caught, profile(activities=activities) as profiled:
        warnings.simplefilter("always")
        yield
    for row in profiled.key_averages():
        if row.device_type.name == "CPU":  # a device repeats what the host has marked, in rows of its own
            counts[row.key] += row.count
    for warning in caught:
        if "synchroniz" in str(warning.message):
            counts[f"waits at {warning.filename}:{warning.lineno}"] += 1


def device_calls(folder: Path, device: str, epochs: int, reduction: Any) -> Counter[str]:
    """Train quietly; returns counts by name."""
    counts: Counter[str] = Counter()
    settings = {"device": device, "reduction": reduction, "wandb": "disabled", "plots": False, "log_every": 1000}
    with counting(device, counts):
        fit(Config(run_dir=folder, epochs=epochs, **settings))
    return counts


@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_a_step_does_not_wait_for_the_device(machine: Machine, say: Say, tmp_path: Path, reduction: str) -> None:
    short, long = (
        run_ranks(device_calls, 1, tmp_path / str(epochs), machine.device, epochs, reduction)[0] for epochs in (2, 6)
    )
    per_step = {name: round((long[name] - short[name]) / (4 * 13), 2) for name in long}
    said = ("Synchronize", "Memcpy", "LaunchKernel", "EventQuery", "waits at")
    found = {name: count for name, count in per_step.items() if count and any(word in name for word in said)}
    say(f"{reduction}, per step: {found}")
    assert sum(count for name, count in per_step.items() if name.startswith("Optimizer.step#")) == 1
    assert machine.device == "cpu" or any("LaunchKernel" in name for name in found)  # the profiler has seen the device
    signs = ("Synchronize", "waits at")
    waits = {name: count for name, count in found.items() if name == "cudaMemcpy" or any(one in name for one in signs)}
    assert not [name for name, count in waits.items() if count >= 0.5]  # what is less is done once per epoch


def test_throughput(machine: Machine, say: Say, tmp_path: Path) -> None:
    contenders = ["floor", "fast", "exact", "exact-8", "tutorial"] if machine.device == "cuda" else ["floor", "exact-8"]
    size = ["--rounds=2", "--epochs=8"] if machine.device == "cuda" else ["--rounds=1", "--epochs=1", "--n-samples=400"]
    ranks = map(str, sorted({1, min(machine.count, 2)})) if machine.device == "cuda" else ["2"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.throughput", f"--device={machine.device}", "--starts=1", *size),
            *("--ranks", *ranks, "--only", *contenders, "--output", tmp_path / "found"),
        ],
        cwd=PROJECT, capture_output=True, text=True, timeout=380,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    say(done.stdout)
    for of_size in json.loads((tmp_path / "found.json").read_text())["results"].values():
        assert set(of_size) == set(contenders)
        losses = [figures["loss"] for figures in of_size.values()]
        assert losses == pytest.approx([losses[0]] * len(losses), abs=0.02)  # all train the same network
    assert {path.name for path in tmp_path.iterdir()} == {"found.json", "found.md", "found.png"}
