"""python -m benchmarks.apple_model.features: what each feature adds to a product, from counts.json.

Model A's cycles of a scheduler for an 8x8x8 product in float16, above the kernel without features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from . import counts, gate
from .issue_model import issue

KERNELS: tuple[tuple[str, str, int], ...] = (
    ("forward, D 64", counts.FORWARD, 64),
    ("D 128", counts.FORWARD, 128),
    ("dk/dv, D 64", counts.DKV, 64),
    ("by pairs, D 128", counts.DKV_PAIRS, 128),
    ("dq, D 64", counts.DQ, 64),
    ("D 128", counts.DQ, 128),
    ("dq from dS, D 64", counts.DQ_FROM_DS, 64),
    ("D 128", counts.DQ_FROM_DS, 128),
)
NAMES = {
    "softcap": "softcap",
    "alibi": "ALiBi",
    "bias": "bias, read in pairs",
    "bias, element by element": "bias, element by element",
    "bool mask": "bool mask",
    "sinks": "sinks",
    counts.LISTED: "key ranges, blocks seen whole",
    counts.EDGES: "key ranges, blocks seen in part",
}


def costs(kernels: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(the header, the rows) of the table, from the gate's entries."""
    cycles = {gate._case(x): x["a_cycles_per_product"] for x in kernels}

    def row(name: str, score: str) -> list[str]:
        cells = []
        for _, family, head_dim in KERNELS:
            plain = cycles[family, "float16", head_dim, ""]
            own = cycles.get((family, "float16", head_dim, score))
            cells.append("" if own is None else f"{own - plain:+.2f}" if score else f"{own:.2f}")
        return [name, *cells]

    rows = [row("none: cycles", ""), *(row(name, score) for score, name in NAMES.items())]
    return ["feature", *(title for title, _, _ in KERNELS)], rows


def gradient_cycles(kernels: Sequence[dict[str, Any]]) -> list[str]:
    """Of the mask's gradient, at D 64 and D 128."""
    return [f"{x['a_cycles_per_product']:.2f}" for x in kernels if x["family"] == counts.DMASK]


def gradient_tiles(kernels: Sequence[dict[str, Any]]) -> tuple[list[str], str]:
    """Of 8 x 8 elements that one head adds to the mask's gradient: cycles where dS is computed
    again, at D 64 and D 128, and what is read and issued where it is stored."""
    again = [
        f"{x['a_cycles_per_product'] * 2 * x['head_dim'] / 8:.0f}"
        for x in kernels
        if x["family"] == counts.DMASK
    ]
    (stored,) = (x for x in kernels if x["family"] == counts.DMASK_FROM_DS)
    steady = counts.Counts(0, 0, stored["steady"], {})
    tiles = counts.harness.MAP_BLOCK // 8  # of a simdgroup
    cycles = issue(counts.DMASK_FROM_DS, steady).cycles / tiles
    return again, f"{cycles:.0f} and {stored['steady']['device_bytes_read'] / tiles:.0f} bytes"


def share_of_edges(length: int, head_dim: int, documents: int = 8) -> float:
    """Of the forward's blocks in a batch of causal documents of one length, packed without gaps:
    how many are seen in part (RangeHull in shaders/ranges.h)."""
    v = counts.variant(counts.FORWARD, "float16", head_dim, score=counts.LISTED)
    blocks = whole = 0
    for row0 in range(0, length * documents, v.bq):
        rows = range(row0, min(row0 + v.bq, length * documents))
        begins = [row // length * length for row in rows]
        for key0 in range(begins[0] // v.bk * v.bk, rows[-1] + 1, v.bk):
            blocks += 1
            whole += begins[-1] <= key0 and key0 + v.bk <= row0 + 1
    return 1 - whole / blocks


def main() -> None:
    kernels = json.loads(gate.TABLE.read_text())["kernels"]
    header, rows = costs(kernels)
    for line in (header, ["---" for _ in header], *rows):
        print(f"| {' | '.join(line)} |")
    print("mask gradient, D 64 and D 128:", *gradient_cycles(kernels))
    again, stored = gradient_tiles(kernels)
    print("mask gradient of 8 x 8, D 64 and D 128:", *again, "cycles; from dS:", stored)
    for length in (1000, 4000):
        shares = (f"{share_of_edges(length, head_dim):.0%}" for head_dim in (64, 128))
        print(f"blocks seen in part, causal documents of {length}, D 64 and D 128:", *shares)


if __name__ == "__main__":
    main()
