"""Findings of the checks: how bad they are, which ranks are at fault, and what to do next."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Severity = Literal["missing", "wrong", "warning"]
ORDER: tuple[Severity, ...] = ("missing", "wrong", "warning")
"""Worst first."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or odd."""

    severity: Severity
    """`missing`: a rank is gone; `wrong`: bits are wrong; `warning`: worth a look, and no failure."""
    check: str
    """The check that found it."""
    ranks: tuple[int, ...]
    """The ranks at fault; empty where none can be named."""
    what: str
    advice: str
    """The next thing to do."""
    times: int = 1
    """The number of rounds in which it was found."""


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sorted by severity, then by how often and in which order they were found."""
    return sorted(findings, key=lambda finding: (ORDER.index(finding.severity), -finding.times))


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """One finding for each severity, check and set of ranks, with the first one's words and a count."""
    by_subject: dict[tuple[str, str, tuple[int, ...]], Finding] = {}
    for finding in findings:
        subject = (finding.severity, finding.check, finding.ranks)
        before = by_subject.get(subject)
        by_subject[subject] = finding if before is None else replace(before, times=before.times + finding.times)
    return list(by_subject.values())


def failed(findings: Iterable[Finding]) -> bool:
    """Tell whether there is anything but warnings among `findings`."""
    return any(finding.severity != "warning" for finding in findings)
