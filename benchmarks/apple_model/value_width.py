"""python -m benchmarks.apple_model.value_width: values of 128 beside queries of 192, by model A.

Cycles for 8 x 8 scores in the loop, of the kernels with tiles of the values' own width, and of
those that take values of 192: what values padded to the queries' width would cost at least. Counted
anew at each run.
"""

from __future__ import annotations

from . import counts
from .issue_model import issue

HEAD_DIM, VALUE_DIM = 192, 128
FAMILIES = {
    "forward": counts.FORWARD,
    "dk/dv by pairs": counts.DKV_PAIRS,
    "dk/dv storing dS": counts.DKV_PAIRS_STORING,
    "dq": counts.DQ,
    "dq from dS": counts.DQ_FROM_DS,
}
PASSES = {  #: kernels that run one after the other
    "backward of five products": ("dk/dv storing dS", "dq from dS"),
    "backward of seven products": ("dk/dv by pairs", "dq"),
}


def cycles(family: str, dtype: str, value_dim: int) -> float:
    """Of all simdgroups of a threadgroup, for 8 x 8 scores."""
    v = counts.variant(family, dtype, HEAD_DIM, value_dim=value_dim)
    counted = counts.count(family, dtype, HEAD_DIM, value_dim=value_dim)
    return issue(family, counted).cycles * v.simdgroups / (v.bq // 8 * v.bk // 8)


def table() -> list[list[str]]:
    header = [
        "kernel",
        *(f"{dtype}: {x}" for dtype in counts.DTYPES for x in ("own", "padded", "")),
    ]
    rows: dict[str, list[tuple[float, float]]] = {
        name: [tuple(cycles(family, d, x) for x in (VALUE_DIM, HEAD_DIM)) for d in counts.DTYPES]  # type: ignore[misc]
        for name, family in FAMILIES.items()
    }
    for name, parts in PASSES.items():
        rows[name] = [
            (sum(x[0] for x in both), sum(x[1] for x in both))
            for both in zip(*(rows[part] for part in parts))
        ]
    lines = [header, ["---"] * len(header)]
    for name, pairs in rows.items():
        cells = [(f"{own:.0f}", f"{wide:.0f}", f"{own / wide - 1:+.0%}") for own, wide in pairs]
        lines.append([name, *(x for cell in cells for x in cell)])
    return lines


def main() -> None:
    for line in table():
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
