"""The table of a result of flex_speed.py, whose records are those of features.py."""

from __future__ import annotations

import re

from .features_report import LIMIT, above_limit
from .paths import ROOT
from .report import provenance

DOCS = ROOT / "docs" / "flex-attention.md"
BEGIN, END = "<!-- benchmarks.nvidia.flex_speed -->", "<!-- end -->"
_READING = (
    "Median time by that of the kernels beside, in turns on the same operands, float16, half "
    "fragments multiplied as float ones, all kernels of a call together. Where blocks are hidden: "
    "x the ideal, which is the plain time times the share of pairs in blocks that are seen, by the "
    "tiles of each kernel."
)


def table(result: dict, spreads: bool = False) -> list[str]:
    records = result["records"]
    columns = sorted(
        dict.fromkeys((r["work"], r["head_dim"]) for r in records),
        key=lambda column: (column[0] != "forward", column[1]),
    )
    titles = " | ".join(f"{work}, D {head_dim}" for work, head_dim in columns)
    lines = [f"| | beside | {titles} |", "|---|---|" + "---|" * len(columns)]
    for feature in dict.fromkeys(r["feature"] for r in records if r["feature"] != r["yardstick"]):
        own = {(r["work"], r["head_dim"]): r for r in records if r["feature"] == feature}
        beside = next(iter(own.values()))["yardstick"]
        cells = [_cell(own.get(column), spreads) for column in columns]
        lines.append(f"| {feature} | {beside} | {' | '.join(cells)} |")
    above = above_limit(records)
    lines += [
        "",
        f"More than {LIMIT} times the ideal: {'; '.join(above)}."
        if above
        else f"No list of blocks takes more than {LIMIT} times its ideal.",
    ]
    failures = [f"{r['feature']}: {r['failure']}".split("\n")[0] for r in records if r["failure"]]
    return lines + ([f"Failed: {'; '.join(failures)[:1000]}."] if failures else [])


def _cell(record: dict | None, spreads: bool) -> str:
    if record is None or record["ratio"] is None:
        return "failed" if record and record["failure"] else "not timed"
    ratio = record["ratio"]
    text = f"{ratio['median']:.3f}"
    if spreads:
        text += f" ({ratio['p20']:.3f} to {ratio['p80']:.3f})"
    if record["share"]:
        text += f", x{ratio['median'] / record['share']:.2f}"
    return text


def _sizes(result: dict) -> str:
    return "; ".join(
        dict.fromkeys(
            f"B {r['batch']}, H {r['num_heads']}, L {r['length']}" for r in result["records"]
        )
    )


def page(result: dict) -> str:
    """Markdown of what flex_speed.py writes as JSON."""
    lines = [
        "# What functions as scores cost in the Metal kernels, on an NVIDIA GPU",
        "",
        f"{provenance(result['environment'])}. Made by `python -m benchmarks.nvidia.flex_speed`.",
        "",
        f"{_READING} {_sizes(result)}.",
        "",
        *table(result, spreads=True),
        "",
        "| kernel | registers | shared bytes | spilled bytes |",
        "|---|---|---|---|",
    ]
    for name, x in result["kernels"].items():
        lines.append(f"| `{name}` | {x['registers']} | {x['shared_bytes']} | {x['local_bytes']} |")
    return "\n".join(lines) + "\n"


def section(result: dict) -> str:
    """What stands between the marks in docs/flex-attention.md."""
    link = "[flex_speed.md](../benchmarks/results/nvidia/flex_speed.md)"
    where = f"{provenance(result['environment'])}; with spreads in {link}."
    note = f"The same text on an NVIDIA GPU, which is no Mac ({where}) {_READING} {_sizes(result)}."
    return "\n".join(["", note, "", *table(result), ""])


def in_docs(text: str) -> str:
    """What stands between the marks now."""
    return text.partition(BEGIN)[2].partition(END)[0]


def write_docs(result: dict) -> None:
    text = DOCS.read_text()
    whole = re.escape(BEGIN) + ".*?" + re.escape(END)
    DOCS.write_text(re.sub(whole, lambda _: f"{BEGIN}{section(result)}{END}", text, flags=re.S))
