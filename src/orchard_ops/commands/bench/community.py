"""A report that people send in: the figures of a run, the machine's kind, and nothing personal.

No path, no name of a host or of a user, no text of an error (which may hold a path). Its form is
``benchmarks/results/community/schema.json``, which a test compares with what is written here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..machine import Description
from .cases import Case
from .contenders import OURS, SDPA
from .results import CaseResult, Figures, Results

FORMAT = "orchard_ops bench 1"

_OF_MACHINE = {  # in the report -> in `machine.describe`
    "model": "model",
    "chip": "machine",
    "kind": "kind",
    "system": "system",
    "cpu_cores": "cpus",
    "gpu_cores": "gpu_cores",
    "memory_gib": "memory_gib",
    "torch": "torch",
    "python": "python",
    "orchard_ops": "orchard_ops",
}


def to_json(results: Results, cases: Sequence[Case], complete: bool) -> str:
    """The report of the cases that are measured so far, a line for each.

    Args:
        cases: those of the run, in its order, of which the results may be the first few.
        complete: whether the run has ended.
    """
    head: dict[str, Any] = {
        "format": FORMAT,
        "date": results.date,
        "complete": complete,
        "machine": _machine(results.machine),
        "memory_method": results.memory_method,
    }
    rows = [json.dumps(_row(*pair)) for pair in zip(cases, results.cases)]
    body = ",\n".join(rows)
    return f'{json.dumps(head, indent=1)[:-2]},\n "cases": [\n{body}\n]}}\n'


def _machine(description: Description) -> Description:
    return {name: description[key] for name, key in _OF_MACHINE.items() if key in description}


def _row(case: Case, result: CaseResult) -> dict[str, Any]:
    problem = case.problem
    row: dict[str, Any] = {
        "name": problem.name,
        "batch": problem.batch,
        "heads": problem.num_heads,
        "kv_heads": problem.num_kv_heads,
        "head_dim": problem.head_dim,
        "length": problem.length,
        "mask": problem.mask,
        "dtype": problem.dtype,
        "mode": case.mode,
        "contenders": [_figures(figures) for figures in result.figures],
    }
    ratios = [result.ratio_percentile(SDPA, OURS, p) for p in (50, 20, 80)]
    if None not in ratios:
        row["sdpa_over_ours"] = [float(f"{ratio:.4g}") for ratio in ratios]
    return row


def _figures(figures: Figures) -> dict[str, Any]:
    found: dict[str, Any] = {"name": figures.contender, "status": figures.status}
    if figures.path:
        found["path"] = figures.path.partition(":")[0]
    if figures.peak_bytes is not None:
        found["peak_bytes"] = figures.peak_bytes
    if figures.samples_ms:
        found["rounds"] = len(figures.samples_ms)
        times = [figures.time_ms(p) or 0.0 for p in (50, 20, 80)]
        found["ms"] = [float(f"{ms:.4g}") for ms in times]
    return found
