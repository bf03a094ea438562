"""The results of one run: as JSON, from which plots are made, and as CSV, a row a figure."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..machine import Description
from .timing import percentile

FORMAT = 1
PLOT_FORMATS = ("png", "svg")

MEASURED = "measured"
OUT_OF_MEMORY = "out of memory"
WRONG = "wrong result"
FAILED = "failed"


@dataclass
class Figures:
    """One contender in one case."""

    contender: str
    status: str
    """`MEASURED`, or why there are no figures: `OUT_OF_MEMORY`, `WRONG`, `FAILED`."""
    path: str = ""
    """A description of the kernels that ran."""
    message: str = ""
    """The text of the error, if there was one."""
    peak_bytes: int | None = None
    """The most bytes that the call held at once beyond its inputs."""
    samples_ms: list[float] = field(default_factory=list)
    """Milliseconds of a call, one sample a round."""

    def time_ms(self, p: float) -> float | None:
        return percentile(self.samples_ms, p) if self.samples_ms else None


@dataclass
class CaseResult:
    """One case; every contender was sampled once a round, in turn."""

    series: str
    length: int
    mode: str
    """"forward" or "training"."""
    figures: list[Figures]

    def of(self, contender: str) -> Figures | None:
        return next((f for f in self.figures if f.contender == contender), None)

    def ratio(self, of: str, to: str) -> float | None:
        """The median, over the rounds, of one contender's time divided by another's."""
        return self.ratio_percentile(of, to, 50)

    def ratio_percentile(self, of: str, to: str, p: float) -> float | None:
        a, b = self.of(of), self.of(to)
        if a is None or b is None or not a.samples_ms or not b.samples_ms:
            return None
        return percentile([x / y for x, y in zip(a.samples_ms, b.samples_ms)], p)


@dataclass
class Results:
    """One run on one machine."""

    machine: Description
    """`machine.describe`"""
    date: str
    memory_method: str
    cases: list[CaseResult] = field(default_factory=list)

    def contenders(self) -> list[str]:
        return list(dict.fromkeys(f.contender for case in self.cases for f in case.figures))

    def all_right(self) -> bool:
        return all(f.status not in (WRONG, FAILED) for case in self.cases for f in case.figures)


def to_json(results: Results) -> str:
    """A line for each contender in each case."""
    head = {"format": FORMAT} | {k: v for k, v in asdict(results).items() if k != "cases"}
    lines = []
    for case in results.cases:
        values = asdict(case)
        figures = values.pop("figures")
        rows = ",\n  ".join(json.dumps(one) for one in figures)
        lines.append(f'{json.dumps(values)[:-1]}, "figures": [\n  {rows}]}}')
    body = ",\n".join(lines)
    return f'{json.dumps(head)[:-1]},\n"cases": [\n{body}\n]}}\n'


def read_json(path: Path) -> Results:
    """Reads what `to_json` wrote.

    Raises:
        ValueError: the file does not hold results.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        cases = [
            CaseResult(**case | {"figures": [Figures(**f) for f in case["figures"]]})
            for case in values.pop("cases")
        ]
        return Results(cases=cases, **values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a result of `orchard_ops bench`: {error}") from error


def to_csv(results: Results) -> str:
    """Times in milliseconds, memory in bytes; empty where there is no figure."""
    machine = results.machine
    text = io.StringIO()
    columns = (
        *("machine", "device", "system", "torch", "orchard_ops", "date"),
        *("series", "length", "mode", "contender", "status"),
        *("median_ms", "p20_ms", "p80_ms", "rounds", "peak_bytes", "path"),
    )
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    of_machine = {name: machine[name] for name in ("machine", "system", "torch", "orchard_ops")}
    of_machine |= {"device": machine["kind"], "date": results.date}
    for case in results.cases:
        of_case = {"series": case.series, "length": case.length, "mode": case.mode}
        for one in case.figures:
            times = {"median_ms": one.time_ms(50), "p20_ms": one.time_ms(20)}
            times["p80_ms"] = one.time_ms(80)
            row: dict[str, Any] = {
                name: "" if ms is None else f"{ms:.5g}" for name, ms in times.items()
            }
            row |= {"contender": one.contender, "status": one.status, "path": one.path}
            row |= {"rounds": len(one.samples_ms), "peak_bytes": one.peak_bytes}
            writer.writerow(of_machine | of_case | row)  # None is written as nothing
    return text.getvalue()
