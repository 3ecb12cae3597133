"""Throughput of training against the peers: python -m benchmarks.throughput --ranks 1 2 --starts 3 --rounds 4.

Each contender has its own processes, one per core, so that settings, patches and warm caches do not leak between
contenders. The processes are restarted after some rounds, since two processes doing the same work can differ by a tenth
for as long as they live. In each round the contenders take turns in rotating order, so that a busy minute hits all of
them; while one runs, the others sleep. A figure is the time of a run of 2E epochs minus that of a run of E epochs,
divided by the steps of E epochs: start-up and shutdown cancel out. Ratios are taken within a round. On a noisy machine
the quietest moments tell more: the least time of 2E epochs over all rounds, minus the least of E.
"""

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.peers import CONTENDERS, EXACT, FAST, FLOOR, TUTORIAL, Figures, Job, leave_group
from ddp_circles.records.plots import COLOURS, INK, STYLE

SPAWN = multiprocessing.get_context("spawn")
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """One round of one contender."""

    once: float
    """Seconds for E epochs."""
    twice: float
    """Seconds for 2E epochs."""
    microseconds: float
    """Time per step: the difference, divided by the steps of E epochs."""
    loss: float
    accuracy: float
    load: float
    """The machine's load average just before."""


class Team:
    """One contender's processes, one per rank."""

    def __init__(self, name: str, job: Job) -> None:
        self.name = name
        self._job = job
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(job.ranks):
            here, there = SPAWN.Pipe()
            process = SPAWN.Process(target=work, args=(there, name, job, rank), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, epochs: int) -> tuple[float, Figures]:
        """Train for `epochs`; returns the slowest rank's seconds, and the loss and accuracy reached."""
        port = free_port()
        for pipe in self._pipes:
            pipe.send((port, epochs))
        answers: list[tuple[float, Figures]] = [pipe.recv() for pipe in self._pipes]
        return max(seconds for seconds, _ in answers), answers[0][1]

    def measure(self, epochs: int) -> Timing:
        """Time E epochs, then 2E epochs."""
        load = os.getloadavg()[0]
        once, _ = self.run(epochs)
        twice, (loss, accuracy) = self.run(2 * epochs)
        return Timing(once, twice, (twice - once) / (epochs * self._job.steps) * 1e6, loss, accuracy, load)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(30)
            process.kill()


def free_port() -> int:
    """An unused port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def work(pipe: Connection, name: str, job: Job, rank: int) -> None:
    """Run one rank of one contender: train on request until the pipe is closed."""
    if job.device == "cpu":  # elsewhere autograd and NCCL have threads of their own
        bind(rank)
    set_environment(job, rank)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    samples, train = job.samples(), CONTENDERS[name].train
    while True:
        try:
            port, epochs = pipe.recv()
        except EOFError:
            return
        os.environ["MASTER_PORT"] = str(port)
        with quiet():
            started = time.perf_counter()
            figures = train(job, samples, epochs)
            leave_group()
            seconds = time.perf_counter() - started
        pipe.send((seconds, figures))


def bind(rank: int) -> None:
    """Pin this rank to one core: the scheduler's placement of two ranks' threads changes a step by a third."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


def set_environment(job: Job, rank: int) -> None:
    """Set torchrun's variables for this rank, and one thread per rank."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.ranks),
        "LOCAL_WORLD_SIZE": str(job.ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "benchmark",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": str(job.device == "cpu").lower(),
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress all output; an exception is still printed, since it ends the process."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


Timings = dict[str, list[Timing]]


def measure(job: Job, names: Sequence[str], *, starts: int, rounds: int, epochs: int) -> Timings:
    """Time `rounds` rounds with each of `starts` sets of processes."""
    timings: Timings = {name: [] for name in names}
    for _ in range(starts):
        measure_once(job, timings, rounds=rounds, epochs=epochs)
    return timings


def measure_once(job: Job, timings: Timings, *, rounds: int, epochs: int) -> None:
    """Time `rounds` rounds with new processes, after one warm-up run each; adds to `timings`."""
    with ExitStack() as stack:
        teams = [Team(name, job) for name in timings]
        for team in teams:
            stack.callback(team.close)
        for team in teams:
            team.run(1)
        for number in range(rounds):
            first = number % len(teams)
            for team in teams[first:] + teams[:first]:
                timings[team.name].append(team.measure(epochs))
            shown = "  ".join(f"{name} {values[-1].microseconds:.0f}" for name, values in timings.items())
            print(f"{job.ranks} ranks, round {number + 1} of {rounds}: {shown}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Spread:
    """Median and spread over rounds."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    least: float
    most: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise at least one value."""
        low, median, high = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
        )
        return cls(median, low, high, min(values), max(values), len(values))

    def text(self, digits: int) -> str:
        """Median and quartiles."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def speed_against(timings: Timings, name: str, reference: str) -> Spread:
    """Throughput of `name` relative to `reference`, within each round."""
    pairs = zip(timings[name], timings[reference], strict=True)
    return Spread.of([theirs.microseconds / own.microseconds for own, theirs in pairs])


def quietest(values: Sequence[Timing], steps: int) -> float:
    """Microseconds per step in the quietest moments: least time of 2E epochs minus least of E, over `steps` steps."""
    return (min(timing.twice for timing in values) - min(timing.once for timing in values)) / steps * 1e6


def summarise(timings: Timings, steps: int) -> dict[str, dict[str, Any]]:
    """For each contender: microseconds per step and throughput ratios."""
    references = [name for name in (FLOOR, TUTORIAL, FAST, EXACT) if name in timings]
    return {
        name: {
            "microseconds": asdict(Spread.of([timing.microseconds for timing in values])),
            "quietest_microseconds": quietest(values, steps),
            "throughput_against": {other: asdict(speed_against(timings, name, other)) for other in references},
            "loss": values[-1].loss,
            "accuracy": values[-1].accuracy,
            "rounds": [asdict(timing) for timing in values],
        }
        for name, values in timings.items()
    }


def table(job: Job, summary: dict[str, dict[str, Any]], names: Sequence[str]) -> str:
    """A Markdown table of the results for one number of ranks."""
    title = f"{job.ranks} rank{'s' * (job.ranks > 1)}, {job.batch_size} samples per rank, {job.device}"
    rows = [
        f"### {title}",
        "",
        "| | microseconds per step | throughput / floor | / tutorial | in quiet moments | / floor | / tutorial |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        label = CONTENDERS[name].label
        if name not in summary:
            rows.append(f"| {label} | not installed (extra `bench`) | | | | | |")
            continue
        ratios = summary[name]["throughput_against"]
        cells = [Spread(**ratios[other]).text(2) if other in ratios else "" for other in (FLOOR, TUTORIAL)]
        quiet = summary[name]["quietest_microseconds"]
        cells += [f"{quiet:.0f}"] + [
            f"{summary[other]['quietest_microseconds'] / quiet:.2f}" if other in summary else ""
            for other in (FLOOR, TUTORIAL)
        ]
        rows.append(f"| {label} | {Spread(**summary[name]['microseconds']).text(0)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def circumstances(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """Everything the figures depend on: date, hardware, versions, arguments."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in ("torch", "accelerate", "lightning")},
        "arguments": {name: value for name, value in vars(arguments).items() if name != "output"},
    }


def processor() -> str:
    """The processor's model name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def package_version(name: str) -> str | None:
    """The installed version of a package; None if there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@style.context(STYLE, after_reset=True)
def draw(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Draw one panel per number of ranks, on one scale: a bar for each median, a point for each round."""
    figure = Figure(figsize=(11, 1.2 + 3.2 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (ranks, summary) in zip(axes, results.items(), strict=True):
        for row, name in enumerate(summary):
            colour = COLOURS[0] if name.startswith((FAST, EXACT)) else "#999999"
            rounds = [timing["microseconds"] for timing in summary[name]["rounds"]]
            axis.barh(row, summary[name]["microseconds"]["median"], color=colour, alpha=0.55)
            axis.plot(rounds, [row] * len(rounds), "o", color=INK, markersize=3.5, alpha=0.7)
        axis.set_yticks(range(len(summary)), [CONTENDERS[name].label for name in summary])
        axis.tick_params(axis="y", length=0)
        axis.invert_yaxis()
        axis.set_title(f"Time per step on {ranks} rank{'s' * (ranks != '1')}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(visible=True, axis="x")
    axes[-1].set(xlabel="Microseconds per step (less is better)", xlim=(0, None))
    axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    handles = [
        Patch(color=COLOURS[0], alpha=0.55, label="this package, median"),
        Patch(color="#999999", alpha=0.55, label="others, median"),
        Line2D([], [], color=INK, marker="o", markersize=3.5, linestyle="none", label="one round"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.savefig(path)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks")
    parser.add_argument("--starts", type=int, default=3, help="sets of processes")
    parser.add_argument("--rounds", type=int, default=4, help="rounds per set")
    parser.add_argument("--epochs", type=int, default=5, help="E: runs over E and 2E epochs are timed")
    parser.add_argument("--n-samples", type=int, default=16000, help="points; four fifths are for training")
    parser.add_argument("--batch-size", type=int, default=32, help="samples per rank and step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), help="contenders")
    parser.add_argument("--fused-peers", action="store_true", help="give the peers Adam's fused kernel too")
    parser.add_argument("--output", type=Path, default=RESULTS / "throughput", help="path without a suffix")
    return parser.parse_args()


def main() -> None:
    """Measure, print the tables, and write JSON, Markdown and a plot."""
    arguments = parse()
    document: dict[str, Any] = circumstances(arguments, arguments.device) | {"results": {}}
    tables = []
    for ranks in arguments.ranks:
        job = Job(arguments.n_samples, arguments.batch_size, ranks, arguments.device, arguments.fused_peers)
        installed = [name for name in arguments.only if CONTENDERS[name].installed]
        summary = summarise(
            measure(job, installed, starts=arguments.starts, rounds=arguments.rounds, epochs=arguments.epochs),
            arguments.epochs * job.steps,
        )
        document["results"][str(ranks)] = summary
        tables.append(table(job, summary, arguments.only))
    text = "\n\n".join(tables) + "\n"
    print(text)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(document["results"], arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
