"""The tables of a result of peers_speed.py: ratios only, since milliseconds say nothing here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .paths import ROOT
from .report import provenance

OURS, AGAIN, SEVEN = "ours", "ours again", "ours, seven products"
BOTH = "both"
MODES = ("equal-rate", "native")
TARGETS = {False: 1.2, True: 2.5}
"""Times of ours that every peer's forward (False) and whole backward (True) should take at least,
at equal rate."""
README, PAGE = ROOT / "README.md", ROOT / "docs" / "performance.md"
APPENDIX = ROOT / "docs" / "performance-tables.md"
BEGIN, END = "<!-- benchmarks.nvidia.peers -->", "<!-- end -->"
_DIRECTIONS = {False: "forward", True: "backward"}


@dataclass(frozen=True)
class Cell:
    """A peer's time by ours, round by round, in one mode: the fastest of its variants."""

    problem: str
    backward: bool
    peer: str
    variant: str
    median: float
    p20: float
    p80: float
    offered: bool

    @property
    def misses(self) -> bool:
        return self.median < TARGETS[self.backward]

    def __str__(self) -> str:
        return f"{self.median:.3f}" + "*" * (not self.offered)


def json_lines(result: dict) -> str:
    """JSON with a line for each record and each mode's kernels."""
    records = ",\n".join(json.dumps(record) for record in result["records"])
    kernels = ",\n".join(f"{json.dumps(m)}: {json.dumps(k)}" for m, k in result["kernels"].items())
    runs = ",\n".join(json.dumps(environment) for environment in result["runs"])
    return f'{{"runs": [\n{runs}\n],\n"records": [\n{records}\n],\n"kernels": {{\n{kernels}\n}}}}\n'


def _entries(record: dict, backward: bool, mode: str) -> dict[str, dict]:
    """who -> what has times in that mode"""
    return {
        e["who"]: e
        for e in record["entries"]
        if e["backward"] == backward and e["mode"] in (mode, BOTH) and e["milliseconds"]
    }


def _by(entry: dict, ours: dict) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of an entry's times by ours."""
    ratios = [a / b for a, b in zip(entry["milliseconds"], ours["milliseconds"], strict=True)]
    p20, median, p80 = np.percentile(ratios, (20, 50, 80))
    return float(median), float(p20), float(p80)


def _peer(who: str) -> tuple[str, str]:
    """A peer and its variant. Releases of PyTorch are peers of their own."""
    peer, _, variant = who.partition(" ")
    return (who, "") if peer == "PyTorch" else (peer, variant)


def cells(record: dict, backward: bool, mode: str) -> dict[str, Cell]:
    """peer -> its fastest variant beside ours"""
    entries = _entries(record, backward, mode)
    ours = entries.get(OURS)
    found: dict[str, Cell] = {}
    for who, entry in entries.items():
        if ours is None or who in (OURS, AGAIN, SEVEN):
            continue
        peer, variant = _peer(who)
        where = (record["problem"], backward, peer, variant)
        cell = Cell(*where, *_by(entry, ours), entry["offered"])
        if peer not in found or cell.median < found[peer].median:
            found[peer] = cell
    return found


def all_cells(records: list[dict], backward: bool, mode: str) -> list[Cell]:
    return [c for r in records for c in cells(r, backward, mode).values()]


def _mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _table(records: list[dict], backward: bool, mode: str) -> Iterator[str]:
    rows = [(r, cells(r, backward, mode)) for r in records]
    if mode == "native":  # elsewhere ours has one code for both modes
        own = {r["problem"]: _entries(r, backward, mode).get(OURS) for r in records}
        rows = [(r, c) for r, c in rows if (own[r["problem"]] or {}).get("mode") == mode]
    peers = list(dict.fromkeys(peer for _, of_row in rows for peer in of_row))
    head = ["problem", *(["ours, seven products"] if backward else []), *peers]
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'---|' * (len(head) - 1)}"
    for record, of_row in rows:
        if not of_row:
            continue
        line = [record["problem"]]
        if backward:
            entries = _entries(record, True, mode)
            seven = entries.get(SEVEN)
            line.append(f"{_by(seven, entries[OURS])[0]:.3f}" if seven else "-")
        for peer in peers:
            cell = of_row.get(peer)
            if cell is None:
                line.append("-")
                continue
            text = str(cell) + (f" ({cell.variant})" if cell.variant else "")
            bold = "**" * (mode == "equal-rate" and cell.misses)
            line.append(f"{bold}{text}{bold}")
        yield f"| {' | '.join(line)} |"
    means = [_mean([c.median for _, of_row in rows for p, c in of_row.items() if p == peer])
             for peer in peers]  # fmt: skip
    blank = ["geometric mean"] + [""] * backward
    yield f"| {' | '.join([*blank, *(f'{m:.3f}' for m in means)])} |"


def floor(records: list[dict], backward: bool, mode: str) -> tuple[float, float, int]:
    """The least and the largest ratio of ours, prepared again, to ours, and of how many."""
    found = []
    for record in records:
        entries = _entries(record, backward, mode)
        if OURS in entries and AGAIN in entries:
            found.append(_by(entries[AGAIN], entries[OURS])[0])
    return (min(found), max(found), len(found)) if found else (math.nan, math.nan, 0)


def misses(records: list[dict]) -> list[str]:
    """Every cell at equal rate that is below its target, and the targets."""
    return [
        f"{c.peer} {c.variant}".strip()
        + f", {_DIRECTIONS[c.backward]}, {c.problem}: {c.median:.3f}"
        for backward in TARGETS
        for c in all_cells(records, backward, "equal-rate")
        if c.misses
    ]


def _parts(records: list[dict]) -> Iterator[str]:
    """dQ and dK/dV of mlx-mfa and mlx-train-perf by ours with seven products, the same work."""
    yield "| problem | whose | dQ | dK/dV |"
    yield "|---|---|---|---|"
    for record in records:
        entries = _entries(record, True, "equal-rate")
        seven = entries.get(SEVEN)
        for who, entry in entries.items():
            if seven and not who.startswith("ours"):
                ratios = [f"{entry['parts'][p] / seven['parts'][p]:.3f}" for p in ("dq", "dkv")]
                yield f"| {record['problem']} | {who} | {' | '.join(ratios)} |"


def _said(records: list[dict]) -> Iterator[str]:
    """Failures, and peers that the rule of orchard_ops.testing would not pass."""
    for record in records:
        if record["failure"]:
            yield f"* {record['problem']}: {record['failure']}"
        for e in record["entries"]:
            where = f"{e['who']}, {_DIRECTIONS[e['backward']]}, {record['problem']}"
            if e["failure"]:
                yield f"* {where}: failed: {e['failure']}"
            elif e["strict"]:
                yield f"* {where}: not by our rule: {e['strict']}"


_READING = (
    "A peer's median time by that of our kernels on the same operands, in turns of the same run: "
    "above 1, ours is faster. Of several variants of a peer its fastest is shown. All launches of "
    "a call count. *Equal-rate*: half fragments are multiplied as float ones, since M1 and M2 have "
    "one rate for both. *: a dtype that the peer's interface does not take, though its text does. "
)
_TARGET = (
    f"Targets at equal rate: a forward at least {TARGETS[False]} times ours, a whole backward "
    f"{TARGETS[True]} times."
)


def _target_lines(records: list[dict]) -> list[str]:
    missed = misses(records)
    count = sum(len(all_cells(records, backward, "equal-rate")) for backward in TARGETS)
    if not missed:
        return [f"{_TARGET} All {count} cells meet theirs."]
    return [
        f"{_TARGET} {len(missed)} of {count} cells miss theirs:",
        "",
        *(f"* {m}" for m in missed),
    ]


def _where(result: dict) -> str:
    """The runs whose problems a result still has, and on how many."""
    said: dict[str, int] = {}
    for record in result["records"]:
        run = provenance(result["runs"][record["run"]])
        said[run] = said.get(run, 0) + 1
    return "; ".join(f"{run} ({count} problems)" for run, count in said.items())


def page(result: dict) -> str:
    """Markdown of what peers_speed.py writes as JSON."""
    records, sources = result["records"], result["runs"][-1]["sources"]
    lines = [
        "# Our Metal kernels beside everybody else's, on an NVIDIA GPU",
        "",
        f"{_where(result)}. Texts: {sources['peer']}; {sources['peers']}. Made "
        "by `python -m benchmarks.nvidia.peers_speed`.",
        "",
        _READING + "What ran, what differs, and what the ratios say of Apple GPUs: "
        "../../nvidia/peers/README.md. **Bold**: below the target.",
        "",
        *_target_lines(records),
        "",
    ]
    for backward, direction in _DIRECTIONS.items():
        for mode in MODES:
            least, most, count = floor(records, backward, mode)
            lines += [
                f"## {direction.capitalize()}, {mode}",
                "",
                f"The same launches of ours, prepared twice, differ by {least:.3f} to {most:.3f} "
                f"over {count} problems.",
                "",
                *_table(records, backward, mode),
                "",
            ]
    lines += [
        "## Parts of the backward, equal-rate",
        "",
        "By our kernels of seven products, the same work; each timed within a whole backward.",
        "",
        *_parts(records),
        "",
        "## Not as expected",
        "",
        *(list(_said(records)) or ["Nothing failed, and everybody passes our own rule."]),
        "",
        "## Kernels",
        "",
        "| mode | kernel | registers | shared bytes | spilled bytes |",
        "|---|---|---|---|---|",
    ]
    for mode, kernels in result["kernels"].items():
        for name, x in kernels.items():
            numbers = f"{x['registers']} | {x['shared_bytes']} | {x['local_bytes']}"
            lines.append(f"| {mode} | `{name}` | {numbers} |")
    return "\n".join(lines) + "\n"


def summary(result: dict, named: bool = True) -> list[str]:
    """What the documents show: each peer's mean and range, and the cells below the target."""
    head = ["kernel", "", "mean", "least", "most", "cells", "of them below the target"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for backward, direction in _DIRECTIONS.items():
        found = all_cells(result["records"], backward, "equal-rate")
        for peer in dict.fromkeys(c.peer for c in found):
            of_peer = [c for c in found if c.peer == peer]
            values = sorted(c.median for c in of_peer)
            missed = [f"{c.problem}: {c.median:.3f}" for c in of_peer if c.misses]
            numbers = [f"{x:.2f}" for x in (_mean(values), values[0], values[-1])]
            said = str(len(missed)) if missed else "none"
            if missed and named:
                said += ": " + "; ".join(missed)
            line = [peer, direction, *numbers, str(len(values)), said]
            lines.append(f"| {' | '.join(line)} |")
    return lines


def brief(result: dict) -> str:
    """What stands between the marks in docs/performance.md."""
    gpus = ", ".join(dict.fromkeys(run["gpu"] for run in result["runs"]))
    notes = (
        f"Times at equal rate on an {gpus}, which is no Mac. {_TARGET}",
        "[Which cells are below it](performance-tables.md#beside-the-kernels-of-others).",
    )
    return "\n".join(["", notes[0], "", *summary(result, named=False), "", notes[1], ""])


def in_readme(result: dict) -> str:
    """What stands between the marks in README.md: the table, in which each miss has its name."""
    gpus = ", ".join(dict.fromkeys(run["gpu"] for run in result["runs"]))
    notes = (
        f"Each one's time by that of our kernels, on an {gpus}, which is no Mac; by the same "
        f"compiler, on the same operands, in turns. Above 1, ours is faster. {_TARGET}",
        "[How, and every cell](benchmarks/results/nvidia/peers.md).",
    )
    return "\n".join(["", notes[0], "", *summary(result), "", notes[1], ""])


def section(result: dict) -> str:
    """What stands between the marks in docs/performance-tables.md: every cell below the target."""
    notes = (
        f"At equal rate on an {_where(result)}. {_READING.rstrip()}",
        f"{_TARGET} [Every cell, and what differs](../benchmarks/results/nvidia/peers.md).",
    )
    return "\n".join(["", notes[0], "", *summary(result), "", notes[1], ""])


def in_docs(text: str) -> str:
    """What stands between the marks now."""
    return text.partition(BEGIN)[2].partition(END)[0]


def write_docs(result: dict) -> None:
    whole = re.escape(BEGIN) + ".*?" + re.escape(END)
    texts = ((README, in_readme(result)), (PAGE, brief(result)), (APPENDIX, section(result)))
    for path, written in texts:
        new = f"{BEGIN}{written}{END}"
        text = re.sub(whole, lambda _, new=new: new, path.read_text(), flags=re.S)
        path.write_text(text)


def progress(record: dict) -> str:
    if record["failure"]:
        return f"{record['problem']}: FAILED ({record['seconds']} s)"
    said = [
        f"{_DIRECTIONS[backward]} {peer} {cell}"
        for backward in _DIRECTIONS
        for peer, cell in cells(record, backward, "equal-rate").items()
    ]
    return f"{record['problem']} ({record['seconds']} s): {', '.join(said)}"
