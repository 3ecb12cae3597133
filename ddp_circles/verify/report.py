"""The report of rank 0: `verify.json`, and tables on the terminal."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ddp_circles.records.files import write_atomically
from ddp_circles.terminal import spell_numbers, visible, visible_lines
from ddp_circles.verify.findings import Finding, failed, merged, worst_first
from ddp_circles.verify.inventory import Inventory

ROWS = 32
"""The longest table; verify.json has everything."""


class Report:
    """Everything found so far."""

    def __init__(self, path: Path, title: str, settings: dict[str, Any]) -> None:
        self._path = path
        self._title = title
        self._begun = time.monotonic()
        self._told = 0.0
        self._rounds = 0
        self._failed_rounds = 0
        self._wrong = 0
        self.findings: list[Finding] = []
        self.sections: dict[str, Any] = {"settings": settings}
        """The entries of verify.json beside the findings: `inventory`, `kinds`, `workload`, `against`, `probes`,
        `collectives`, `speed`, `oracle`."""

    def close(self, *, complete: bool) -> int:
        """Write verify.json, print the report, and return the exit code."""
        findings = worst_first(merged(self.findings))
        passed = complete and not failed(findings)
        seconds = time.monotonic() - self._begun
        content = {
            "passed": passed,
            "complete": complete,
            "job": self._title,
            "seconds": round(seconds, 3),
            "findings": [asdict(finding) for finding in findings],
        }
        write_atomically(self._path, json.dumps(content | self.sections, indent=1).encode() + b"\n")
        if not complete:
            verdict, style = "NOT COMPLETE: see the findings", "bold red"
        elif not passed:
            verdict, style = "FAILED: bits are wrong", "bold red"
        else:
            count = len(self.findings)  # warnings, all of them
            verdict, style = f"PASSED with {count} warning{'s' * (count > 1)}" if count else "PASSED", "bold green"
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        self._print(console, findings)
        line = visible(f"{verdict}; {seconds:.1f} s; all figures in {self._path}")
        console.print(f"\n{line}", style=style, markup=False)
        return 0 if passed else 1

    def end_round(self, minutes: float, *, last: bool) -> None:
        """Count a round; in a soak, say so: a line that is rewritten on a terminal, else one every thirty seconds."""
        wrong = sum(finding.severity != "warning" for finding in self.findings)
        self._rounds += 1
        self._failed_rounds += wrong > self._wrong
        self._wrong = wrong
        passed = time.monotonic() - self._begun
        clean = self._rounds - self._failed_rounds
        line = (
            f"round {self._rounds}: {clean} clean, {self._failed_rounds} not, {passed / 60:.1f} of {minutes:g} minutes"
        )
        if minutes and sys.stdout.isatty():
            print(f"\r{line} ", end="\n" if last else "", flush=True)
        elif minutes and (last or passed - self._told > 30):
            self._told = passed
            print(line, flush=True)

    def _print(self, console: Console, findings: Sequence[Finding]) -> None:
        console.print(f"\nddp_circles.verify: {visible(self._title)}", style="bold", markup=False)
        for name, draw in DRAWINGS.items():
            if self.sections.get(name):
                draw(console, self.sections[name])
        if findings:
            console.print("\nFindings, worst first", style="bold")
        for number, finding in enumerate(findings, 1):
            style = {"missing": "bold red", "wrong": "red", "warning": "yellow"}[finding.severity]
            times = f" ({finding.times} times)" if finding.times > 1 else ""
            what = visible_lines(f"{number}. {finding.severity}, {finding.check}{times}: {finding.what}")
            console.print(what, style=style, markup=False)
            for rank in finding.ranks[:ROWS]:
                console.print(f"   {visible(self._place(rank))}", markup=False)
            console.print(f"   next: {visible_lines(finding.advice)}", markup=False)

    def _place(self, rank: int) -> str:
        inventory: list[Inventory] = self.sections.get("inventory", [])
        if rank >= len(inventory):
            return f"rank {rank}"
        one = inventory[rank]
        return f"rank {rank} is on host {one['host']}, {one['device']}, {one['name']} {one['uuid']}".rstrip()


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=box.ASCII_DOUBLE_HEAD, pad_edge=False
    )
    for column in columns:
        numeric = column in NUMERIC
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    return table


def _add_row(table: Table, *cells: str) -> None:
    """Add `cells` as they are: names from other hosts are no markup, and control no terminal."""
    table.add_row(*(Text(visible(cell)) for cell in cells))


NUMERIC = ("up to bytes", "buffers", "elements", "wrong", "bytes", "µs", "± µs", "algbw GB/s", "busbw GB/s")


def _draw_inventory(console: Console, inventory: Sequence[Inventory]) -> None:
    alike: dict[tuple[str, ...], list[int]] = {}
    for rank, one in enumerate(inventory):
        device = one["uuid"] or one["device"]
        versions = f"torch {one['torch']}, {one['backend']}" + (f", driver {one['driver']}" if one["driver"] else "")
        alike.setdefault(
            (one["host"], one["name"], device, one["instruction_set"], one["threads"], versions), []
        ).append(rank)
    table = _table("Inventory", "ranks", "host", "device", "", "instructions", "threads", "versions")
    for row, ranks in list(alike.items())[:ROWS]:
        _add_row(table, spell_numbers(ranks), *row)
    console.print(table)
    if len(alike) > ROWS:
        console.print(f"and {len(alike) - ROWS} more rows in verify.json")


def _draw_probes(console: Console, probes: dict[str, dict[str, Any]]) -> None:
    table = _table("Probes, every byte compared", "probe", "what was done", "wrong")
    for name, probe in probes.items():
        _add_row(table, name, probe["summary"], f"{probe['wrong']:,}" if "wrong" in probe else "")
    console.print(table)


def _draw_collectives(console: Console, collectives: dict[str, Any]) -> None:
    table = _table(
        "Collectives, every element checked", "operation", "types", "up to bytes", "buffers", "elements", "wrong"
    )
    for row in collectives["operations"]:
        table.add_row(
            row["operation"],
            " ".join(row["types"]),
            *(f"{row[name]:,}" for name in ("largest_bytes", "buffers", "elements", "wrong")),
        )
    console.print(table)


def _draw_speed(console: Console, speed: dict[str, Any]) -> None:
    table = _table("Speed, by nccl-tests' definitions", "operation", "bytes", "µs", "± µs", "algbw GB/s", "busbw GB/s")
    for row in speed["collectives"]:
        table.add_row(
            row["operation"],
            f"{row['bytes']:,}",
            f"{row['seconds'] * 1e6:.1f}",
            f"{row['spread'] * 1e6:.1f}",
            f"{row['algorithm_bandwidth'] / 1e9:.3g}",
            f"{row['bus_bandwidth'] / 1e9:.3g}",
        )
    console.print(table)
    compute = speed["compute"]
    low, middle, high = (f"{compute[name] * 1e3:.3f}" for name in ("fastest", "median", "slowest"))
    console.print(f"Computing by itself, a rank takes {low} to {high} ms, in the median {middle} ms. {compute['rule']}")


def _draw_oracle(console: Console, oracle: dict[str, Any]) -> None:
    table = _table("Training oracle", "kind of device", "ranks", "alone", "together", "digest")
    for row in oracle["kinds"]:
        _add_row(table, row["kind"], spell_numbers(row["ranks"]), row["alone"], row["together"], row["digest"][:16])
    console.print(table)
    console.print(oracle["method"])


def _draw_against(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(visible(line), markup=False)


DRAWINGS: dict[str, Any] = {
    "inventory": _draw_inventory,
    "probes": _draw_probes,
    "collectives": _draw_collectives,
    "speed": _draw_speed,
    "oracle": _draw_oracle,
    "against": _draw_against,
}
