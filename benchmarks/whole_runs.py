"""Timings of whole commands: python -m benchmarks.whole_runs MEASUREMENT.

commands: the default run from command to prompt, against the tutorial's script.
ranks: wide layers and large batches, two ranks against one.
parameters: time per step from narrow to wide layers.
batches: the batch size from which a second rank speeds up the default network.
micro_batches: the default run by the number of micro-batches, on one rank and on two.
audits: the default run by the steps from one audit to the next, on one rank and on two.
samples: memory and time per epoch for 10^4 to 10^8 points on two ranks.
records: the cost of tracking, checkpoints and progress lines with the default settings.
start: start-up, up to the end of the first optimizer step, against the tutorial's script.

Variants take turns in each round; ratios are taken within a round.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil, floor, log
from pathlib import Path
from typing import Any

import psutil
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.throughput import RESULTS, SPAWN, Spread, circumstances, quiet
from ddp_circles import Config, fit
from ddp_circles.records.plots import COLOURS, STYLE
from ddp_circles.records.recorder import Recorder

QUIET = ("--device", "cpu", "--wandb", "disabled", "--no-plots", "--log-every", "1000000")


@dataclass(frozen=True)
class Run:
    """One finished command."""

    seconds: float
    """Wall time."""
    mebibytes: float
    """Peak memory of all its processes together, shared pages counted once."""


def command(ranks: int, *words: str) -> list[str]:
    """A command line for `ranks` ranks: plain Python for one, torchrun for more."""
    if ranks == 1:
        return [sys.executable, *words]
    launcher = [
        "-m",
        "torch.distributed.run",
        "--rdzv-backend=loopback",
        "--rdzv-endpoint=localhost",
        f"--nproc-per-node={ranks}",
    ]
    return [sys.executable, *launcher, *words]


def run(words: Sequence[str]) -> Run:
    """Run a command to its end; raises `CalledProcessError` if it fails."""
    started = time.perf_counter()
    with subprocess.Popen(
        words,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        memory = Memory(process.pid)
        output, _ = process.communicate()
        seconds = time.perf_counter() - started
    if process.returncode != 0:
        print(output, file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, words, output)
    return Run(seconds, memory.stop())


class Memory:
    """Samples the memory of a process and its children, in a thread."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._peak = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Stop sampling; returns the peak in MiB."""
        self._ended.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._ended.wait(0.25):
            with suppress(psutil.Error):
                family = [self._process, *self._process.children(recursive=True)]
                held = sum(process.memory_full_info().pss for process in family)
                self._peak = max(self._peak, held / 2**20)


def train(ranks: int, *flags: str) -> tuple[Run, list[dict[str, Any]]]:
    """Train in a temporary folder; returns the run and its metrics lines."""
    folder = Path(tempfile.mkdtemp())
    try:
        done = run(command(ranks, "-m", "ddp_circles.train", "--run-dir", str(folder / "run"), *flags))
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return done, [json.loads(line) for line in lines]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def alternate(rounds: int, variants: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Run the variants in rotating order in each round; returns the seconds of each by round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(variants[name]())
        shown = "  ".join(f"{name} {values[-1]:.2f}" for name, values in seconds.items())
        print(f"round {number + 1} of {rounds}: {shown}", file=sys.stderr, flush=True)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> Spread:
    """Seconds of `name` divided by those of `reference`, within each round."""
    return Spread.of([own / other for own, other in zip(seconds[name], seconds[reference], strict=True)])


# ---- whole commands


def measure_commands(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the default run as a whole: as it comes, without tracking and pictures, and the tutorial's script."""
    package = {"package": ("--device", "cpu", "--wandb", "offline"), "package, quiet": QUIET}
    results = {}
    for ranks in (1, 2):
        variants = {name: partial(_command_seconds, ranks, *flags) for name, flags in package.items()}
        variants["tutorial"] = partial(_tutorial_seconds, ranks)
        seconds = alternate(arguments.rounds, variants)
        over_tutorial = {name: asdict(ratio(seconds, name, "tutorial")) for name in package}
        results[str(ranks)] = {"seconds": seconds, "seconds_over_those_of_tutorial": over_tutorial}
    return {"results": results}


def _command_seconds(ranks: int, *flags: str) -> float:
    done, _ = train(ranks, *flags)
    return done.seconds


def _tutorial_seconds(ranks: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return run(command(ranks, "-m", "benchmarks.tutorial", folder + "/weights.pt")).seconds


# ---- more ranks


def measure_ranks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time wide layers and large batches on one rank and on two: whole commands, and the training alone."""
    wide = ("--hidden", "512", "512", "--batch-size", "8192", "--n-samples", "102400")
    training: dict[str, list[float]] = {}

    def train_once(name: str, ranks: int, reduction: str) -> float:
        done, rows = train(ranks, *QUIET, *wide, "--epochs", str(arguments.epochs), "--reduction", reduction)
        training.setdefault(name, []).append(sum(float(row["seconds"]) for row in rows))
        return done.seconds

    jobs = {f"{reduction} on {ranks}": (ranks, reduction) for reduction in ("fast", "exact") for ranks in (1, 2)}
    seconds = alternate(arguments.rounds, {name: partial(train_once, name, *job) for name, job in jobs.items()})
    return {
        "seconds": seconds,
        "training_seconds": training,
        "speedup": {name: asdict(ratio(seconds, f"{name} on 1", f"{name} on 2")) for name in ("fast", "exact")},
        "training_speedup": {
            name: asdict(ratio(training, f"{name} on 1", f"{name} on 2")) for name in ("fast", "exact")
        },
    }


def measure_batches(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time an epoch of the default network on one rank and on two, by batch size, without start-up."""
    sizes = (64, 256, 1024, 4096, 16384)
    return {"speedup": {str(batch): asdict(_epoch_speedup(batch, arguments.rounds)) for batch in sizes}}


def _epoch_speedup(batch: int, rounds: int) -> Spread:
    size = ("--batch-size", str(batch), "--n-samples", str(max(10000, 40 * batch)))
    variants = {str(ranks): partial(_epoch_seconds, ranks, *size) for ranks in (1, 2)}
    return ratio(alternate(rounds, variants), "1", "2")


def _epoch_seconds(ranks: int, *flags: str) -> float:
    """The least time of an epoch, after the first."""
    _, rows = train(ranks, *QUIET, *flags, "--epochs", "4")
    return min(float(row["seconds"]) for row in rows[1:])


# ---- more parameters


def measure_parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time a step of 1024 samples by the width of both hidden layers, exact and fast, on one rank and on two."""
    points = []
    for width in (10, 64, 256, 1024):
        variants = {
            f"{reduction} on {ranks}": partial(_step_seconds, ranks, width, reduction)
            for ranks in (1, 2)
            for reduction in ("exact", "fast")
        }
        seconds = alternate(arguments.rounds, variants)
        points.append(
            {
                "parameters": 3 * width + (width + 1) * width + width + 1,
                "seconds_per_step": {name: asdict(Spread.of(values)) for name, values in seconds.items()},
                "exact_over_fast": asdict(ratio(seconds, "exact on 1", "fast on 1")),
                "exact_over_fast_on_2": asdict(ratio(seconds, "exact on 2", "fast on 2")),
                "speedup_exact": asdict(ratio(seconds, "exact on 1", "exact on 2")),
                "speedup_fast": asdict(ratio(seconds, "fast on 1", "fast on 2")),
            }
        )
    return {"points": points}


def _step_seconds(ranks: int, width: int, reduction: str) -> float:
    steps = 24
    size = ("--hidden", str(width), str(width), "--batch-size", "1024", "--n-samples", str(steps * 1280))
    return _epoch_seconds(ranks, *size, "--reduction", reduction) / steps


# ---- the number of micro-batches


def measure_micro_batches(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the training of the default run by V, without start-up."""
    results = {}
    for ranks in (1, 2):
        variants = {str(v): partial(_training_seconds, ranks, *QUIET, f"--micro-batches={v}") for v in (4, 8, 16, 32)}
        seconds = alternate(arguments.rounds, variants)
        against_8 = {v: asdict(ratio(seconds, v, "8")) for v in variants}
        results[str(ranks)] = {"seconds": seconds, "seconds_over_those_of_8": against_8}
    return {"results": results}


# ---- audits


def measure_audits(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the training of the default run without audits and with them, without start-up."""
    results = {}
    for ranks in (1, 2):
        flags = (*QUIET, "--epochs=300")
        variants = {
            every: partial(_training_seconds, ranks, *flags, f"--audit-steps={every}") for every in ("0", "100", "1")
        }
        seconds = alternate(arguments.rounds, variants)
        over_none = {every: asdict(ratio(seconds, every, "0")) for every in variants}
        results[str(ranks)] = {"seconds": seconds, "seconds_over_those_without": over_none}
    return {"results": results}


# ---- more samples


def measure_samples(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train on two ranks with a global batch of 65536; returns the second epoch's seconds and peak memory by size."""
    points = []
    for exponent in range(4, arguments.largest + 1):
        done, rows = train(2, *QUIET, "--batch-size", "65536", "--n-samples", str(10**exponent), "--epochs", "2")
        points.append({"samples": 10**exponent, "epoch_seconds": rows[-1]["seconds"]} | asdict(done))
        print(points[-1], file=sys.stderr, flush=True)
    return {"points": points}


@style.context(STYLE, after_reset=True)
def draw_samples(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw time per epoch and memory against the number of samples."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    samples = [point["samples"] for point in points]
    seconds = [point["epoch_seconds"] for point in points]
    gibibytes = [point["mebibytes"] / 1024 for point in points]
    for axis, values, base, title, label in (
        (axes[0], seconds, 10, "Time per epoch, training and evaluation", "Seconds"),
        (axes[1], gibibytes, 2, "Peak memory of two ranks and launcher", "GiB"),
    ):
        axis.plot(samples, values, "o-", color=COLOURS[0])
        axis.set_xscale("log")
        axis.set_yscale("log", base=base)
        axis.set_ylim(base ** floor(log(min(values), base)), base ** ceil(log(max(values), base)))
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set(title=title, xlabel="Samples", ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(visible=True)
    figure.savefig(path)


# ---- records


def measure_records(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the share of training time spent in recording calls, for the default run tracked offline.

    Also compares whole runs with runs that record as little as possible; this includes the work of tracking in other
    processes, and the noise of the machine.
    """
    tracked = ("--device", "cpu", "--no-plots", "--wandb", "offline")
    bare = (
        "--device",
        "cpu",
        "--no-plots",
        "--wandb",
        "disabled",
        "--log-every",
        "1000000",
        "--checkpoint-seconds",
        "1000000",
    )
    variants = {"recorded": partial(_training_seconds, 1, *tracked), "bare": partial(_training_seconds, 1, *bare)}
    seconds = alternate(arguments.rounds, variants)
    with SPAWN.Pool(1, maxtasksperchild=1) as pool:
        shares = [pool.apply(recording_share) for _ in range(arguments.rounds)]
    return {
        "share": asdict(Spread.of(shares)),
        "seconds": seconds,
        "recorded_over_bare": asdict(ratio(seconds, "recorded", "bare")),
    }


def _training_seconds(ranks: int, *flags: str) -> float:
    _, rows = train(ranks, *flags)
    return sum(float(row["seconds"]) for row in rows)


def recording_share() -> float:
    """Train with the default settings in this process; returns the share of training time spent on recording."""
    spent = 0.0

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal spent
            started = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                spent += time.perf_counter() - started

        return call

    for name in ("phase", "save_due", "save", "epoch_done"):
        setattr(Recorder, name, timed(getattr(Recorder, name)))
    with tempfile.TemporaryDirectory() as folder, quiet():
        run_dir = fit(Config(run_dir=Path(folder) / "run", device="cpu", wandb="offline", plots=False)).run_dir
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return spent / sum(float(json.loads(line)["seconds"]) for line in lines)


# ---- start-up


def measure_start(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time start-up, up to the end of the first optimizer step."""
    results = {}
    for ranks in (1, 2):
        variants = {
            "package": partial(_first_step, ranks, "ddp_circles.train", *QUIET),
            "tutorial": partial(_first_step, ranks, "benchmarks.tutorial"),
        }
        seconds = alternate(arguments.rounds, variants)
        results[str(ranks)] = {"seconds": seconds, "ratio": asdict(ratio(seconds, "package", "tutorial"))}
    return results


def _first_step(ranks: int, module: str, *flags: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        time_file = Path(folder) / "time"
        run_dir = ("--run-dir", folder + "/run") if flags else ()
        started = time.time()
        run(command(ranks, "-m", "benchmarks.first_step", str(time_file), module, *flags, *run_dir))
        return float(time_file.read_text(encoding="utf-8")) - started


MEASUREMENTS = {
    "commands": measure_commands,
    "ranks": measure_ranks,
    "parameters": measure_parameters,
    "batches": measure_batches,
    "micro_batches": measure_micro_batches,
    "audits": measure_audits,
    "samples": measure_samples,
    "records": measure_records,
    "start": measure_start,
}


def main() -> None:
    """Run one measurement and write JSON, and a plot of `samples`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_runs", description=__doc__.split("\n", 1)[0])
    parser.add_argument("measurement", choices=list(MEASUREMENTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30, help="ranks: epochs of the wide network")
    parser.add_argument("--largest", type=int, default=8, help="samples: largest size, as a power of ten")
    arguments = parser.parse_args()
    document = circumstances(arguments, "cpu") | MEASUREMENTS[arguments.measurement](arguments)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.measurement}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if arguments.measurement == "samples":
        draw_samples(document["points"], RESULTS / "samples.png")
    print(json.dumps({name: value for name, value in document.items() if name not in ("packages", "arguments")}))


if __name__ == "__main__":
    main()
