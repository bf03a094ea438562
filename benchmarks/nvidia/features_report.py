"""The tables of a result of features.py: ratios only, since milliseconds say nothing here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from .paths import ROOT
from .report import provenance

LIMIT = 1.15
"""What a feature that hides pairs may take at most, by the ideal of the blocks that are seen."""
DOCS = ROOT / "docs" / "performance-tables.md"
BEGIN, END = "<!-- benchmarks.nvidia.features -->", "<!-- end -->"
_PACKED = "padded batch"  # the yardstick of packed documents


def json_lines(result: dict) -> str:
    """JSON with a line for each record and each kernel."""
    records = ",\n".join(json.dumps(record) for record in result["records"])
    kernels = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in result["kernels"].items())
    environment = json.dumps(result["environment"])
    return (
        f'{{"environment": {environment},\n"records": [\n{records}\n],\n'
        f'"kernels": {{\n{kernels}\n}}}}\n'
    )


def _columns(records: list[dict]) -> list[tuple[str, int, int]]:
    """(direction, head dim, length) in the order of the run, forwards first."""
    found = dict.fromkeys((r["work"], r["head_dim"], r["length"]) for r in records)
    return sorted(found, key=lambda column: (column[0] != "forward", *column[1:]))


def _cell(record: dict | None, spreads: bool) -> str:
    if record is None:
        return ""
    if record["failure"] or record["ratio"] is None:
        return "failed" if record["failure"] else "not timed"
    ratio = record["ratio"]
    text = f"{ratio['median']:.3f}"
    if spreads:
        text += f" ({ratio['p20']:.3f} to {ratio['p80']:.3f})"
    if record["share"]:
        text += f", x{ratio['median'] / record['share']:.2f}"
    return text


def _table(records: list[dict], spreads: bool) -> Iterator[str]:
    columns = _columns(records)
    titles = [f"{work}, D {dim}, L {length}" for work, dim, length in columns]
    yield f"| feature | {' | '.join(titles)} |"
    yield f"|---|{'---|' * len(columns)}"
    by_place = {(r["feature"], (r["work"], r["head_dim"], r["length"])): r for r in records}
    for feature in dict.fromkeys(r["feature"] for r in records if r["feature"] != r["yardstick"]):
        cells = [_cell(by_place.get((feature, column)), spreads) for column in columns]
        yield f"| {feature} | {' | '.join(cells)} |"


def above_limit(records: list[dict]) -> list[str]:
    """Where a feature that hides pairs takes more than LIMIT times the ideal."""
    return [
        f"{r['feature']}, {r['work']}, D {r['head_dim']}, L {r['length']}"
        for r in records
        if r["ratio"] and r["share"] and r["ratio"]["median"] / r["share"] > LIMIT
    ]


def tables(result: dict, spreads: bool = False) -> list[str]:
    """What docs/performance-tables.md shows, too."""
    records = result["records"]
    kinds = {
        "What hides pairs": lambda r: r["share"] and r["yardstick"] != _PACKED,
        "What hides none": lambda r: not r["share"] and r["yardstick"] != _PACKED,
        "Packed documents, beside a batch padded to the longest": lambda r: (
            r["yardstick"] == _PACKED
        ),
    }
    lines = []
    for title, belongs in kinds.items():
        chosen = [r for r in records if belongs(r)]
        if any(r["feature"] != r["yardstick"] for r in chosen):
            lines += [f"{title}:", "", *_table(chosen, spreads), ""]
    above = above_limit(records)
    lines.append(
        f"More than {LIMIT} times the ideal: {'; '.join(above)}."
        if above
        else f"Nothing takes more than {LIMIT} times its ideal."
    )
    failures = [f"{r['feature']}: {r['failure']}".split("\n")[0] for r in records if r["failure"]]
    lines += [f"Failed: {'; '.join(failures)[:1000]}."] if failures else []
    return lines


_READING = (
    "Median time by that of the plain kernels of the same run, before and after it, float16, half "
    "fragments multiplied as float ones, all kernels of a call together. Where pairs are hidden: x "
    "the ideal, which is the plain time times the share of pairs in blocks that are seen, by the "
    "tiles of each kernel."
)
_SEVEN = (
    'Eight documents whose lengths are as 5, 1, 23, 8, 3, 13, 2 and 12. Without scratch ("no '
    'scratch", what the default budget has for so many tokens in a row) the backward has seven '
    "products where the padded batch has five: its ideal is x1.4."
)


def page(result: dict) -> str:
    """Markdown of what features.py writes as JSON."""
    sizes = dict.fromkeys(
        f"B {r['batch']}, H {r['num_heads']} at L {r['length']}" for r in result["records"]
    )
    lines = [
        "# What features cost in the Metal kernels, on an NVIDIA GPU",
        "",
        f"{provenance(result['environment'])}. Made by `python -m benchmarks.nvidia.features`.",
        "",
        f"{_READING} {_SEVEN} {'; '.join(sizes)}. What these ratios say of Apple GPUs, and what "
        "not: README.md.",
        "",
        *tables(result, spreads=True),
        "",
        "| kernel | registers | shared bytes | spilled bytes |",
        "|---|---|---|---|",
    ]
    for name, x in result["kernels"].items():
        lines.append(f"| `{name}` | {x['registers']} | {x['shared_bytes']} | {x['local_bytes']} |")
    return "\n".join(lines) + "\n"


def section(result: dict) -> str:
    """What stands between the marks in docs/performance-tables.md."""
    link = "[features.md](../benchmarks/results/nvidia/features.md)"
    where = f"{provenance(result['environment'])}; with spreads in {link}."
    note = f"The same text on an NVIDIA GPU, which is no Mac ({where}) {_READING} {_SEVEN}"
    return "\n".join(["", note, "", *tables(result), ""])


def in_docs(text: str) -> str:
    """What stands between the marks now."""
    return text.partition(BEGIN)[2].partition(END)[0]


def write_docs(result: dict) -> None:
    text = DOCS.read_text()
    whole = re.escape(BEGIN) + ".*?" + re.escape(END)
    DOCS.write_text(re.sub(whole, lambda _: f"{BEGIN}{section(result)}{END}", text, flags=re.S))
