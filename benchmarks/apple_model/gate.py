"""python -m benchmarks.apple_model.gate [--write]: the counts as a performance regression gate.

Totals of a fixed problem, so that tiles may change: one head, dense. They are exact and have no
noise; a class that grows by more than 2 % is a regression unless the table is refreshed on purpose.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from . import counts, kernels
from .issue_model import issue
from .problems import Problem, blocks

RESULTS = counts.ROOT / "benchmarks" / "results" / "apple_model"
TABLE = RESULTS / "counts.json"
TOLERANCE = 0.02
PROBLEM = Problem(1024, heads=1, causal=False)
Case = tuple[str, str, int, str]  #: family, dtype, head_dim, and what of counts.SCORES


@cache
def cases() -> tuple[Case, ...]:
    """All kernels that the plan takes at these head dims."""
    plain = [
        (family, dtype, head_dim, "")
        for family in (kernels.FORWARD, counts.DELTA, *kernels.BACKWARD)
        for dtype in counts.DTYPES
        for head_dim in (64, 128)
        if counts.has(family, dtype, head_dim)
    ]
    scored = [
        (family, dtype, head_dim, score)
        for score in counts.SCORES
        for family, dtype, head_dim, _ in plain
        if dtype == "float16" and family not in (counts.DELTA, *counts.TEMPLATES)
        if family != counts.DQ_FROM_DS or score in ("bool mask", counts.LISTED, counts.EDGES)
    ]
    gradients = [
        *((counts.DMASK, "float16", head_dim, "bias") for head_dim in (64, 128)),
        (counts.DMASK_FROM_DS, "float16", 64, "bias"),  # the same for every head_dim
    ]
    return (*plain, *scored, *gradients)


#: What is added up. Products of half operands alone are not gated: more of them instead of float
#: ones is no loss, and all products are.
CLASSES: dict[str, tuple[str, ...]] = {
    "products": ("mma_half", "mma_bfloat", "mma_float"),
    "products of float operands": ("mma_float",),
    "threadgroup accesses": ("load_threadgroup", "store_threadgroup"),
    "threadgroup bytes": ("threadgroup_bytes_read", "threadgroup_bytes_written"),
    "device accesses": ("load_device", "store_device"),
    "device bytes": ("device_bytes_read", "device_bytes_written"),
    "conversions": ("fcvt", "icvt"),
    "integer and address operations": ("int", "icmp", "imul", "idiv", "gep"),
    "float operations": ("fadd", "fmul", "fma", "fminmax", "fcmp", "fdiv", "select"),
    "exp2 and log2": ("exp2", "log2"),
    "shuffles": ("shuffle",),
    "barriers": ("barrier", "simdgroup_barrier"),
    "branches": ("branch",),
}


def totals(family: str, dtype: str, head_dim: int, score: str) -> dict[str, float]:
    """Of the problem, over all simdgroups; instructions are counted once for their 32 lanes."""
    counted = counts.count(family, dtype, head_dim, score)
    if family == counts.DELTA:
        kernel = None
        rows = counts.variant(family, dtype, head_dim).bq
        work = [0] * (-(-PROBLEM.length // rows))
    elif family in counts.MASK_GRADIENTS:
        kernel = None
        tile = counts.variant(family, dtype, head_dim, score=score)
        work = [1] * (-(-PROBLEM.length // tile.bq) * -(-PROBLEM.length // tile.bk))
    else:
        kernel = kernels.structure(family, dtype, head_dim)
        work = blocks(kernel, PROBLEM)

    def total(once: float, steady: float) -> float:
        return round(counted.simdgroups * (len(work) * once + sum(work) * steady), 3)

    result = {
        name: total(
            sum(counted.once.get(x, 0) for x in members),
            sum(counted.steady.get(x, 0) for x in members),
        )
        for name, members in CLASSES.items()
    }
    cycles = [issue(family, counted, once).cycles for once in (True, False)]
    result["issue cycles (model A)"] = total(*cycles)
    result["threadgroup memory"] = counted.threadgroup_bytes
    if kernel and not score:
        result["registers (estimate)"] = kernel.register_estimate
    return result


def entry(case: Case) -> dict[str, Any]:
    counted = counts.count(*case)
    steady = issue(case[0], counted)
    return dict(
        family=case[0],
        dtype=case[1],
        head_dim=case[2],
        score=case[3],
        totals=totals(*case),
        a_cycles_per_product=round(steady.per_product, 3) if steady.products else None,
        steady=counted.steady,
        once=counted.once,
    )


def measure() -> list[dict[str, Any]]:
    counts.compile_all(cases())
    return [entry(case) for case in cases()]


def _case(x: dict[str, Any]) -> Case:
    return x["family"], x["dtype"], x["head_dim"], x["score"]


def compare(
    committed: Sequence[dict[str, Any]], current: Sequence[dict[str, Any]]
) -> tuple[list[str], list[str]]:
    """What is more than 2 % worse, and what is more than 2 % better, as sentences."""
    known = {_case(x): x["totals"] for x in committed}
    worse, better = [], []
    for x in current:
        case = _case(x)
        name_of_case = " ".join(map(str, filter(None, case)))
        if case not in known:
            worse.append(f"{name_of_case} is not in {TABLE.name}")
            continue
        for name, now in x["totals"].items():
            before = known[case].get(name, 0)
            text = f"{name_of_case}: {name} {before:g} -> {now:g}"
            if before:
                text += f" ({now / before - 1:+.1%})"
            if now > before * (1 + TOLERANCE):
                worse.append(text)
            elif now < before * (1 - TOLERANCE):
                better.append(text)
    return worse, better


def write(table: Sequence[dict[str, Any]]) -> None:
    content = dict(
        made_by="python -m benchmarks.apple_model.gate --write",
        problem=f"{PROBLEM}; counts of the simulator's engine, none of a GPU",
        kernels=table,
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="refresh the committed table")
    args = parser.parse_args()
    current = measure()
    committed = json.loads(TABLE.read_text())["kernels"] if TABLE.exists() else []
    worse, better = compare(committed, current)
    for title, lines in (("worse", worse), ("better", better)):
        for line in lines:
            print(f"{title}: {line}")
    if args.write:
        write(current)
    elif better:
        print("refresh the table: python -m benchmarks.apple_model.gate --write")
    sys.exit(bool(worse) and not args.write)


if __name__ == "__main__":
    main()
