"""What the kernels were meant to reach, beside what model B predicts of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import counts, kernels
from .core_model import CEILING

#: Time over that of PyTorch's prefill kernel, at most; and share of the ceiling, at least.
FORWARD_RATIO = {
    ("float16", 64): 0.80,
    ("float16", 128): 0.76,
    **{("bfloat16", head_dim): 0.76 for head_dim in (64, 128)},
    **{("float32", head_dim): 0.70 for head_dim in (64, 128)},
}
OTHER_HEAD_DIMS_RATIO = 0.90
FORWARD_CEILING = {"float16": 0.97, "bfloat16": 0.90}  #: at head_dim 64 and 128
#: Times faster than the unfused backward, at every length, by head_dim and causal or not.
BACKWARD_SPEEDUP = {(64, True): 2.0, (128, True): 2.0, (64, False): 1.15, (128, False): 1.0}
BACKWARD_CYCLES = 21.0  #: for a product, at most

Row = list[str]


def verdict(value: float, target: float, at_least: bool) -> str:
    """Compares a figure before it is rounded. A share says how much of the target is missing."""
    missed = (1 if at_least else -1) * (1 - value / target)
    if missed <= 0:
        return "met"
    return f"missed by {missed:.0%}" if missed >= 0.01 else "missed by less than 1%"


def spread(x: list[float], digits: int) -> str:
    return f"{x[0]:.{digits}f} [{x[1]:.{digits}f}..{x[2]:.{digits}f}]"


def forward_rows(content: dict[str, Any]) -> tuple[Row, list[Row]]:
    header = [
        "dtype",
        "D",
        "cycles, B",
        "of ceiling",
        "target",
        "",
        "x PyTorch [p10..p90]",
        "x pess.",
        "A x",
        "target",
        "",
    ]
    rows = []
    for k in content["kernels"]:
        if k["family"] != kernels.FORWARD:
            continue
        case = k["dtype"], k["head_dim"]
        ratio = FORWARD_RATIO.get(case, OTHER_HEAD_DIMS_RATIO)
        share = FORWARD_CEILING.get(k["dtype"]) if case in FORWARD_RATIO else None
        # of_ceiling is rounded in the file; the cycles are finer.
        reached = CEILING / k["b_cycles"][0]
        rows.append(
            [
                k["dtype"],
                str(k["head_dim"]),
                spread(k["b_cycles"], 1),
                f"{reached:.1%}",
                *([f"{share:.0%}", verdict(reached, share, True)] if share else ["", ""]),
                spread(k["ratio"], 2),
                f"{k['pessimistic_ratio'][0]:.2f}",
                f"{k['a_ratio']:.2f}",
                f"{ratio:.2f}",
                verdict(k["ratio"][0], ratio, False),
            ]
        )
    return header, rows


def _lowest(rows: Iterable[dict[str, Any]], column: str) -> float:
    return min(b["unfused_milliseconds"] / b[column] for b in rows)


def backward_rows(content: dict[str, Any]) -> tuple[Row, list[Row]]:
    """Five products, over the lengths of the predictions."""
    header = [
        "dtype",
        "D",
        "mask",
        "x, L 4096 [p10..p90]",
        "x, lowest L",
        "not hidden",
        "with tails",
        "target",
        "hidden",
        "not hidden",
    ]
    rows = []
    for dtype in counts.DTYPES:
        for (head_dim, causal), target in BACKWARD_SPEEDUP.items():
            of_case = [
                b
                for b in content["backward"]
                if (b["dtype"], b["head_dim"], b["causal"], b["products"])
                == (dtype, head_dim, causal, 5)
            ]
            (middle,) = (b for b in of_case if b["length"] == 4096)
            lowest = min(b["speedup"][0] for b in of_case)
            exposed = _lowest(of_case, "exposed_milliseconds")
            rows.append(
                [
                    dtype,
                    str(head_dim),
                    "causal" if causal else "dense",
                    spread(middle["speedup"], 2),
                    f"{lowest:.2f}",
                    f"{exposed:.2f}",
                    f"{_lowest(of_case, 'tail_milliseconds'):.2f}",
                    f"{target:.2f}",
                    verdict(lowest, target, True),
                    verdict(exposed, target, True),
                ]
            )
    return header, rows


def backward_cycles_rows(content: dict[str, Any]) -> tuple[Row, list[Row]]:
    """dk/dv as it runs before dq from dS, and both forms of dq."""
    header = ["dtype", "D", "dk/dv storing dS", "", "dq from dS", "", "dq of seven products", ""]
    known = {(k["family"], k["dtype"], k["head_dim"]): k for k in content["kernels"]}
    rows = []
    for dtype in counts.DTYPES:
        for head_dim in (64, 128):
            row = [dtype, str(head_dim)]
            storing = kernels.DKV_STORING if head_dim == 64 else kernels.DKV_PAIRS_STORING
            for family in (storing, kernels.DQ_FROM_DS, kernels.DQ):
                cycles = known[family, dtype, head_dim]["b_cycles"]
                row += [spread(cycles, 1), verdict(cycles[0], BACKWARD_CYCLES, False)]
            rows.append(row)
    return header, rows


FORWARD_NOTE = (
    "Forward. Targets: share of the ceiling at least, time over PyTorch's prefill kernel at most; "
    "by the medians, columns as under Kernels."
)
BACKWARD_NOTE = (
    "Backward of five products: how many times faster than the unfused one. x, not hidden, with "
    "tails: lowest of L {lengths}; columns as under Backward. Target: x at least, with dS's way "
    "through memory hidden behind the products, and not."
)
CYCLES_NOTE = f"Backward, cycles of model B for a product; target: at most {BACKWARD_CYCLES:.0f}."


def tables(content: dict[str, Any]) -> list[tuple[str, tuple[Row, list[Row]]]]:
    lengths = sorted({b["length"] for b in content["backward"]})
    return [
        (FORWARD_NOTE, forward_rows(content)),
        (BACKWARD_NOTE.format(lengths=", ".join(map(str, lengths))), backward_rows(content)),
        (CYCLES_NOTE, backward_cycles_rows(content)),
    ]
