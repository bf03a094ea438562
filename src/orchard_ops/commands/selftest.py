"""``python -m orchard_ops selftest``: is this machine's attention right?

Runs every kernel variant forward and backward, and compares with float64 on the CPU by the rule of
`orchard_ops.testing`. Writes a report file to attach to an issue.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ..calls import reset_stats, stats
from . import endings, machine
from .console import Console
from .endings import CannotRun, writable, write
from .kernel_check import Outcome, check, variants
from .place import Place, find_place
from .progress import each


@dataclass
class Report:
    """The report file."""

    environment: machine.Description
    metal_calls: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: float = 0.0
    verdict: str = ""
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return sum(not outcome.passed for outcome in self.outcomes)

    def count(self, num_variants: int, seconds: float) -> None:
        """Takes the calls so far and the verdict on what has run."""
        counted = stats()
        self.metal_calls, self.fallbacks = counted.metal, counted.reference
        self.seconds = round(seconds, 1)
        done = len(self.outcomes)
        if self.failed:
            self.verdict = f"{self.failed} of {done} variants are wrong"
        else:
            self.verdict = f"all {done} variants agree with float64, forward and backward"
        if done < num_variants:
            self.verdict += f" (stopped after {done} of {num_variants})"

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def run(args: argparse.Namespace) -> int:
    """The command. The report is written anew after every variant, so that a stop keeps it.

    Returns:
        The exit status: `endings.RIGHT`, or `endings.WRONG` if a variant is wrong.

    Raises:
        CannotRun: no such device, or the report cannot be written.
    """
    console = Console()
    try:
        place = find_place(args.device)
    except ValueError as error:
        raise CannotRun(str(error)) from error
    file = writable(Path(args.report))
    described = machine.describe(place)
    console.say(f"selftest on {machine.where(described)}")
    impl = "auto" if place.kind == "cpu" else "metal"
    todo = list(variants(args.quick))
    report = Report(
        environment=described | {"date": datetime.now(UTC).isoformat(timespec="seconds")},
    )
    reset_stats()
    started = time.perf_counter()
    try:
        with each(console, todo) as under_way:
            for variant in under_way:
                outcome = check(variant, place.device, impl)
                if not outcome.passed:
                    console.print(Text(f"FAILED {variant}: {outcome.message}", style="red"))
                report.outcomes.append(outcome)
                report.count(len(todo), time.perf_counter() - started)
                write(file, report.as_json())
        _print_summary(console, report, place, file)
    except BaseException as error:
        if report.outcomes:
            error.add_note(f"{report.verdict}; report: {file}")
        raise
    return endings.WRONG if report.failed else endings.RIGHT


def _print_summary(console: Console, report: Report, place: Place, file: Path) -> None:
    table = Table(show_header=False)
    for name, value in (
        ("verdict", Text(report.verdict, style="red" if report.failed else "green")),
        ("device", place.description),
        ("native library", str(report.environment["native_library"])),
        ("Metal calls", ", ".join(f"{n} {op}" for op, n in report.metal_calls.items())),
        ("time", f"{report.seconds} s"),
        ("report", f"{file} (attach it to an issue)"),
    ):
        table.add_row(name, value if isinstance(value, Text) else Text(value))
    console.print(table)
