"""python -m benchmarks.apple_model.sweep KERNEL [--dtype float16] [--head-dim 64]

KERNEL: forward, dq, dkv, pairs (dkv by pairs), dqs (dq from dS), backward.

Model B on structures that need not exist as kernels: every combination of the parameters given
(several values each), the fastest first. Without a value the options' defaults are swept.
`backward` takes the fastest of each kernel that does not spill and compares seven products
(dq, dkv or pairs) with five (dkv or pairs that store dS, dqs), in milliseconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .core_model import CEILING, MAX_REGISTERS
from .ensemble import Prediction, Spread, predict, prefill_cycles
from .predictions import MEMORY_BANDWIDTH, Result, simulate, unfused_backward
from .problems import Problem
from .structures import (
    METAL,
    SIZES,
    BackwardDkv,
    BackwardDkvPairs,
    BackwardDq,
    BackwardDqStored,
    Forward,
    Structure,
)

KEY_SIDE = BackwardDkv | BackwardDkvPairs

KERNELS: dict[str, tuple[type[Structure], dict[str, list[Any]]]] = {
    "forward": (
        Forward,
        dict(rows=[1, 2], bk=[8, 16, 32], buffers=[0, 1, 2], keep_q=[True, False]),
    ),
    "dq": (
        BackwardDq,
        dict(rows=[1, 2], bk=[8, 16, 32], keep=[True, False]),
    ),
    "dkv": (
        BackwardDkv,
        dict(bq=[8, 16, 32], keep=[True, False], store=[False, True]),
    ),
    "pairs": (
        BackwardDkvPairs,
        dict(bq=[8, 16, 32], keep=[True, False], store=[False, True]),
    ),
    "dqs": (BackwardDqStored, dict(rows=[1, 2, 4], bk=[8, 16, 32])),
}
SHARED_LIMIT = 32 * 1024  #: threadgroup memory that Metal allows a threadgroup


def structures(kernel: str, args: argparse.Namespace) -> list[Structure]:
    kind, swept = KERNELS[kernel]
    dtype = METAL[args.dtype]
    native = "half" if dtype == "half" else "float"
    axes = dict(
        score_operand=args.score_operand or [native],
        value_operand=["float"] if kernel == "pairs" else args.value_operand or [native],
        simdgroups=args.simdgroups or [4],
        **{name: getattr(args, name, None) or values for name, values in swept.items()},
    )
    axes["chains"] = args.chains or [4 if dtype == "float" else 1]
    result = []
    for values in itertools.product(*axes.values()):
        x = kind(dtype=dtype, head_dim=args.head_dim, **dict(zip(axes, values, strict=True)))
        columns = args.head_dim // 8
        if columns < x.chains or (kernel == "pairs" and x.simdgroups % 2):
            continue
        if x.threadgroup_bytes() > SHARED_LIMIT or x.register_estimate > args.most_registers:
            continue
        result.append(x)
    return result


def fastest(names: Sequence[str], args: argparse.Namespace, problem: Problem) -> Result:
    candidates = [x for name in names for x in structures(name, args) if not x.spilled]
    results = [simulate(x, args.step) for x in candidates]
    return min(results, key=lambda r: statistics.median(r.times(problem)))


def backward(args: argparse.Namespace) -> Table:
    title = f"backward {args.dtype} head_dim {args.head_dim}"
    t = Table(title=title, caption=BACKWARD_CAPTION)
    for name in ("problem", "products", "structures", "ms [p10..p90]", "+ dS traffic", "unfused"):
        t.add_column(name, no_wrap=True)
    for causal in (True, False):
        problem = Problem(4096, causal=causal)
        unfused = unfused_backward(args.dtype, args.head_dim, problem)
        pairs = problem.length**2 * problem.heads / (2 if causal else 1)
        for number in (7, 5):
            args.store = [number == 5]
            dkv = fastest(("dkv", "pairs"), args, problem)
            dq = fastest(("dq",) if number == 7 else ("dqs",), args, problem)
            ms = Spread.of(
                [a + b for a, b in zip(dkv.times(problem), dq.times(problem), strict=True)]
            )
            moved = 2 * pairs * SIZES["float"] if number == 5 else 0
            t.add_row(
                str(problem),
                str(number),
                f"{describe(dkv.kernel)} | {describe(dq.kernel)}",
                ms.text(2),
                f"{ms.median + 1e3 * moved / MEMORY_BANDWIDTH:.2f}",
                f"{unfused:.2f}",
            )
    return t


BACKWARD_CAPTION = (
    "dk/dv | dq, on the M1 Max of the published timings; + dS traffic: if none of its way through "
    "memory at 400 GB/s is hidden; unfused: 4 GEMMs at the ceiling and 8 passes over the pairs."
)


def describe(x: Structure) -> str:
    words = [f"S {x.score_operand}", f"PV {x.value_operand}"]
    if isinstance(x, BackwardDqStored):
        words = [f"K {x.staged}"]
    words.append(f"R{getattr(x, 'rows', 1)}")
    words.append(f"BQ{x.bq}" if isinstance(x, KEY_SIDE) else f"BK{getattr(x, 'bk', 0)}")
    if x.simdgroups != 4:
        words.append(f"{x.simdgroups}sg")
    if isinstance(x, BackwardDkvPairs):
        words.append("pairs")
    if isinstance(x, Forward):
        words.append(("direct", "one buffer", "two buffers")[x.buffers])
    if not getattr(x, "keep_q", True) or not getattr(x, "keep", True):
        words.append("streamed")
    if isinstance(x, KEY_SIDE) and x.store:
        words.append("stores dS")
    return " ".join(words)


def row(x: Structure, p: Prediction) -> dict[str, Any]:
    return dict(
        structure=describe(x),
        registers=x.register_estimate,
        threadgroup_bytes=x.threadgroup_bytes(),
        simdgroups_per_core=p.resident,
        cycles=[p.cycles.median, p.cycles.low, p.cycles.high],
        pessimistic_cycles=p.pessimistic,
        of_ceiling=CEILING / p.cycles.median,
        ratio=[p.ratio.median, p.ratio.low, p.ratio.high],
        pessimistic_ratio=p.pessimistic_ratio.median,
        matrix_busy=p.run.matrix_busy,
        shared_busy=p.run.shared_busy,
        device_busy=p.run.device_busy,
    )


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    t = Table(title=title, caption=CAPTION)
    t.add_column("structure", no_wrap=True)
    for name in (
        "regs",
        "tg B",
        "sg/core",
        "cycles/MMA [p10..p90]",
        "pess.",
        "of ceiling",
        "x PyTorch fwd",
        "pess. x",
        "mma/tg/dev busy",
    ):
        t.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        spill = r["registers"] > MAX_REGISTERS
        c, x = r["cycles"], r["ratio"]
        t.add_row(
            r["structure"],
            f"{r['registers']:.0f}{' SPILL' if spill else ''}",
            str(r["threadgroup_bytes"]),
            f"{r['simdgroups_per_core']:.0f}",
            f"{c[0]:.1f} [{c[1]:.1f}..{c[2]:.1f}]",
            f"{r['pessimistic_cycles']:.1f}",
            f"{r['of_ceiling']:.0%}",
            f"{x[0]:.2f} [{x[1]:.2f}..{x[2]:.2f}]",
            f"{r['pessimistic_ratio']:.2f}",
            f"{r['matrix_busy']:.2f}/{r['shared_busy']:.2f}/{r['device_busy']:.2f}",
        )
    return t


CAPTION = (
    "MMA: an 8x8x8 product, in cycles of one of the core's four schedulers. x PyTorch fwd: to its "
    "prefill kernel at this dtype and head_dim, for each MMA, under the same parameters. pess.: if "
    "the unexplained cost of its kernel's larger tiles met ours as well. Register numbers are "
    "estimates; model B, see docs/apple-model.md."
)


def yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"yes or no; got {text!r}")
    return text == "yes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=[*KERNELS, "backward"])
    parser.add_argument("--dtype", choices=METAL, default="float16")
    parser.add_argument("--head-dim", type=int, default=64)
    operand = dict(nargs="+", choices=["half", "float"])
    parser.add_argument("--score-operand", **operand, help="of Q K^T and dO V^T")
    parser.add_argument("--value-operand", **operand, help="of the products with P and dS")
    flag = dict(nargs="+", type=yes_or_no, metavar="yes|no")
    parser.add_argument("--rows", "-R", nargs="+", type=int)
    parser.add_argument("--bk", nargs="+", type=int)
    parser.add_argument("--bq", nargs="+", type=int)
    parser.add_argument("--simdgroups", nargs="+", type=int)
    parser.add_argument("--chains", nargs="+", type=int, help="of a float32 sum over head_dim")
    parser.add_argument("--buffers", nargs="+", type=int, help="forward: K and V staged in so many")
    parser.add_argument("--keep-q", **flag, help="forward: Q in registers")
    parser.add_argument("--keep", **flag, help="backward: both left operands in registers")
    parser.add_argument("--store", **flag, help="dkv, pairs: dS to memory")
    parser.add_argument("--most-registers", type=int, default=160)
    parser.add_argument(
        "--more-registers", type=float, default=0, help="than estimated, for the residency"
    )
    parser.add_argument("--top", type=int, default=25)
    parser.add_argument("--step", type=int, default=4, help="use every n-th parameter set")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.kernel == "backward":
        Console(width=220).print(backward(args))
        return
    found = structures(args.kernel, args)
    baseline = prefill_cycles(METAL[args.dtype], args.head_dim, args.step)
    rows = [row(x, predict(x, baseline, args.step, args.more_registers)) for x in found]
    rows.sort(key=lambda r: (math.floor(r["registers"] / (MAX_REGISTERS + 1)), r["cycles"][0]))
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    title = f"{args.kernel} {args.dtype} head_dim {args.head_dim}: {len(rows)} structures"
    Console(width=190).print(table(title, rows[: args.top]))


if __name__ == "__main__":
    main()
