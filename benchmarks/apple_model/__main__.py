"""python -m benchmarks.apple_model: predictions of both models for every kernel of the plan.

Writes predictions.json, predictions.md and the gate's counts.json to
benchmarks/results/apple_model, and the tables against the targets into docs/performance-tables.md.
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from rich.console import Console
from rich.table import Table

from . import gate, held_out, kernels, targets
from .ensemble import ENSEMBLE
from .fit import PUBLISHED
from .predictions import everything
from .targets import spread

PREDICTIONS = gate.RESULTS / "predictions.json"
NAMES = {
    kernels.PREFILL: "PyTorch prefill",
    kernels.FORWARD: "forward",
    kernels.DQ: "dq",
    kernels.DKV: "dk/dv",
    kernels.DKV_PAIRS: "dk/dv by pairs",
    kernels.DKV_STORING: "dk/dv storing dS",
    kernels.DKV_PAIRS_STORING: "dk/dv by pairs, storing dS",
    kernels.DQ_FROM_DS: "dq from dS",
}


def by_column(rows: list[dict[str, str]]) -> tuple[list[str], list[list[str]]]:
    """(the header, the rows) of a table whose rows name their columns."""
    return list(rows[0]), [list(row.values()) for row in rows]


def kernel_rows(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for k in content["kernels"]:
        ratios = ["", "", ""]
        if "ratio" in k:
            pessimistic = spread(k["pessimistic_ratio"], 2)
            ratios = [spread(k["ratio"], 2), pessimistic, f"{k['a_ratio']:.2f}"]
        rows.append(
            {
                "kernel": NAMES[k["family"]],
                "dtype": k["dtype"],
                "D": str(k["head_dim"]),
                "A": f"{k['a_cycles']:.1f}",
                "B [p10..p90]": spread(k["b_cycles"], 1),
                "B pess.": f"{k['b_pessimistic']:.1f}",
                "of ceiling": f"{k['of_ceiling']:.0%}",
                **dict(zip(("x PyTorch", "x pess.", "A x"), ratios)),
                "regs": f"{k['registers']:.0f}{' spills' if k['spills'] else ''}",
                "tg bytes": str(k["threadgroup_bytes"]),
                "sg/core": f"{k['simdgroups_per_core']:.0f}",
            }
        )
    return by_column(rows)


def backward_rows(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        {
            "dtype": b["dtype"],
            "D": str(b["head_dim"]),
            "mask": "causal" if b["causal"] else "dense",
            "L": str(b["length"]),
            "products": str(b["products"]),
            "key parts": str(b["key_parts"]),
            "launches": str(b["launches"]),
            "ms [p10..p90]": spread(b["milliseconds"], 2),
            "pess.": f"{b['pessimistic_milliseconds']:.2f}",
            "not hidden": f"{b['exposed_milliseconds']:.2f}",
            "tails": f"{b['tail_milliseconds']:.2f}",
            "unfused ms": f"{b['unfused_milliseconds']:.2f}",
            "x": spread(b["speedup"], 2),
            "x worst": f"{b['worst_speedup']:.2f}",
        }
        for b in content["backward"]
    ]
    return by_column(rows)


def published_lines(content: dict[str, Any]) -> list[str]:
    p = content["published"]
    published = ", ".join(f"{name} {ms}" for name, ms in p["published"].items())
    own = PUBLISHED["points"][0]  # PyTorch's tile
    lines = [
        "PyTorch's prefill kernel, float16, head_dim 128, causal, B4 Hq16 Hkv8 L4096, on "
        f"{content['device']}: model A {p['a_milliseconds']:.1f} ms, model B "
        f"{spread(p['b_milliseconds'], 1)} ms; published (ms): {published}. Model B is fitted to "
        f"{own['milliseconds']} ms, which is the point {own['name']}: that it meets it is no "
        "prediction."
    ]
    points = content["leave_one_out"]
    errors = sorted(abs(x["median"] - 1) for x in points)
    of_note = {
        "worst median": max(points, key=lambda x: abs(x["median"] - 1)),
        "widest range": max(points, key=lambda x: x["high"] - x["low"]),
        "PyTorch's own tile": next(x for x in points if x["point"] == own["name"]),
    }
    names: dict[str, list[str]] = {}
    for what, x in of_note.items():
        found = spread([x["median"], x["low"], x["high"]], 2)
        names.setdefault(f"{x['point']} {found}", []).append(what)
    listed = "; ".join(f"{x} ({', '.join(what)})" for x, what in names.items())
    lines.append(
        "Leave-one-out error of model B (predicted / measured, median and the range of the middle "
        "80 % of the sets that a search of their own bred and chose without the point): median "
        f"error {errors[len(errors) // 2]:.0%}; {listed}. Each point: at the end."
    )
    return lines


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


KERNEL_NOTE = (
    "A, B: cycles of one scheduler for each 8x8x8 product. pess.: with the unexplained cost of "
    "PyTorch's kernel beyond 64 products a block. Ceiling: 101.7 of 128 FMA, 20.1 cycles. x "
    "PyTorch: time over that of its prefill kernel, B*H 16, L 4096, causal, under the same "
    "parameters; A x the same by model A. regs: estimated."
)
BACKWARD_NOTE = (
    "The launches of the plan together, model B, B*H 16: five products with dS in memory "
    "(256 MiB for it; where one head needs more, its keys are divided between dispatches), and "
    "seven without. not hidden: dS's way through memory (and that of dq's sums where keys are "
    "divided) at 400 GB/s comes on top instead of beside; tails: what launch order leaves idle at "
    "most, each launch waiting for the one before; unfused: 4 GEMMs at the ceiling plus 8 passes "
    "over the pairs at 400 GB/s; x: unfused / ours, worst by the worst of the columns between."
)


HELD_OUT_NOTE = (
    "Published times that no fit knows (sources: benchmarks/apple_model/published.json). Of "
    "mlx-train-perf the fit takes ratios: the first row is by what they are off together if that "
    "M1 Max had 32 cores, the second the same without the least that an access to device memory "
    "takes. Whole passes are several launches, to the same factor. An M3's core is played as an "
    "M1's of another clock. No time of MLX's steel kernel on an M5 is published: there MLX runs "
    "another kernel, on tensor units, which the model does not have."
)


def held_out_rows(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    return ["time", "predicted / measured"], [
        [x["point"], spread([x["median"], x["low"], x["high"]], 2)] for x in content["held_out"]
    ]


def markdown(content: dict[str, Any]) -> str:
    against_targets = [
        line for note, found in targets.tables(content) for line in (note, "", *table(*found), "")
    ]
    leave_one_out = [
        [x["point"], spread([x["median"], x["low"], x["high"]], 2), str(x["sets"])]
        for x in content["leave_one_out"]
    ]
    return "\n".join(
        [
            "# Predictions for Apple GPUs",
            "",
            f"Made by `{content['made_by']}`; {content['ran_on']}. Device of the model: "
            f"{content['device']}. Model B: {content['parameter_sets']} parameter sets, median "
            "and the range of the middle 80 %. What it leaves out: docs/apple-model.md.",
            "",
            *(f"{line}\n" for line in published_lines(content)),
            "## Against the targets",
            "",
            *against_targets,
            "## Kernels",
            "",
            KERNEL_NOTE,
            "",
            *table(*kernel_rows(content)),
            "",
            "## Backward against an unfused one",
            "",
            BACKWARD_NOTE,
            "",
            *table(*backward_rows(content)),
            "",
            "## Each published point, kept from the fit",
            "",
            *table(["point", "predicted / measured", "sets"], leave_one_out),
            "",
            "## Held out",
            "",
            HELD_OUT_NOTE,
            "",
            *table(*held_out_rows(content)),
            "",
        ]
    )


def show(console: Console, title: str, note: str, header: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, caption=note)
    for name in header:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


DOCS = gate.counts.ROOT / "docs" / "performance-tables.md"
BEGIN, END = "<!-- benchmarks.apple_model: {} -->", "<!-- end -->"
IN_DOCS = ("forward", "backward", "backward cycles")  #: the tables against targets


def documented(text: str, content: dict[str, Any]) -> str:
    """docs/performance-tables.md with the tables against the targets anew."""
    for name, (_, found) in zip(IN_DOCS, targets.tables(content), strict=True):
        begin = BEGIN.format(name)
        if text.count(begin) != 1:
            raise ValueError(f"{DOCS.name} has {text.count(begin)} marks {begin}, not one")
        section = "\n".join([begin, *table(*found), END])
        whole = re.escape(begin) + ".*?" + re.escape(END)
        text = re.sub(whole, lambda _, section=section: section, text, flags=re.S)
    return text


def write(content: dict[str, Any]) -> None:
    PREDICTIONS.write_text(json.dumps(content, indent=1) + "\n")
    PREDICTIONS.with_suffix(".md").write_text(markdown(content))
    DOCS.write_text(documented(DOCS.read_text(), content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=int, default=1, help="use every n-th parameter set")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument(
        "--only-error",
        action="store_true",
        help="the committed predictions with the errors of ensemble.json and of what is held out",
    )
    args = parser.parse_args()
    if args.only_error:
        content = json.loads(PREDICTIONS.read_text())
        error = json.loads(ENSEMBLE.read_text())["leave_one_out"]
        write(content | {"leave_one_out": error, "held_out": held_out.rows()})
        return
    console = Console(width=180)
    with console.status("counting and simulating"):
        content = everything(args.step)
    show(console, "Kernels", KERNEL_NOTE, *kernel_rows(content))
    show(console, "Backward against an unfused one", BACKWARD_NOTE, *backward_rows(content))
    for note, found in targets.tables(content):
        show(console, "Against the targets", note, *found)
    for line in published_lines(content):
        console.print(line)
    if args.no_write or args.step != 1:
        return
    gate.write(gate.measure())
    write(content)


if __name__ == "__main__":
    main()
