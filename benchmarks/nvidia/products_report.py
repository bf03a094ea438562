"""The table of a result of products.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from statistics import median

from .features_report import DOCS
from .report import provenance

DEFAULT, NONE = "256 MiB", "none"
LOSS = 1.03
"""What the plan's choice may take at most, by the best budget."""
GROUPED = 1.15
"""What a backward of grouped heads may take at most, by one of full heads."""
FROM_LENGTH = 2048
"""GROUPED is asked for from this length on."""
BEGIN, END = "<!-- benchmarks.nvidia.products -->", "<!-- end -->"


def json_lines(result: dict) -> str:
    """JSON with a line for each record."""
    records = ",\n".join(json.dumps(record) for record in result["records"])
    environment, not_run = (json.dumps(result[name]) for name in ("environment", "not_run"))
    return f'{{"environment": {environment},\n"not_run": {not_run},\n"records": [\n{records}\n]}}\n'


def times(record: dict) -> dict[str, float]:
    """budget -> milliseconds, where it was timed, or where its plan was"""
    found = {}
    for budget, outcome in record["budgets"].items():
        samples = record["budgets"][outcome["same_as"]]["milliseconds"]
        if samples:
            found[budget] = median(samples)
    return found


def _full_heads(record: dict, records: list[dict]) -> float | None:
    """The best time of the same problem with as many key/value heads as query heads."""
    same = ("head_dim", "length", "mask", "num_heads")
    wanted = {name: record[name] for name in same} | {"num_kv_heads": record["num_heads"]}
    for other in records:
        if wanted.items() <= other.items() and times(other):
            return min(times(other).values())
    return None


def losses(records: list[dict]) -> list[tuple[float, str]]:
    """Where the default takes more than LOSS times the best, and how much, the worst first."""
    found = []
    for record in records:
        of_budget = times(record)
        if DEFAULT in of_budget:
            ratio = of_budget[DEFAULT] / min(of_budget.values())
            if ratio > LOSS:
                best = min(of_budget, key=lambda budget: of_budget[budget])
                outcome = record["budgets"][best]
                how = f"{outcome['products']} products, budget {best}"
                found.append((ratio, f"{record['problem']}: {ratio:.2f} ({how})"))
    return sorted(found, reverse=True)


def overtaken(records: list[dict]) -> list[tuple[float, str]]:
    """Where five products under a budget take more than LOSS times seven, the worst first."""
    found = []
    for record in records:
        of_budget = times(record)
        for budget, time in of_budget.items():
            if record["budgets"][budget]["products"] == 5 and NONE in of_budget:
                ratio = time / of_budget[NONE]
                if ratio > LOSS:
                    launches = record["budgets"][budget]["launches"]
                    how = f"budget {budget}, {launches} launches"
                    found.append((ratio, f"{record['problem']}: {ratio:.2f} ({how})"))
    return sorted(found, reverse=True)


def starved(records: list[dict]) -> list[tuple[float, str]]:
    """Where grouped heads take more than GROUPED times full ones, best budget beside best."""
    found = []
    for record in records:
        full, own = _full_heads(record, records), times(record)
        if full and own and record["length"] >= FROM_LENGTH:
            ratio = min(own.values()) / full
            if ratio > GROUPED:
                found.append((ratio, f"{record['problem']}: {ratio:.2f}"))
    return sorted(found, reverse=True)


def _rows(records: list[dict]) -> Iterator[str]:
    for record in records:
        own = times(record)
        if not own:
            yield f"| {record['problem']} | failed: {record['failure']} | | | | |"
            continue
        best = min(own.values())
        cells = []
        for budget, outcome in record["budgets"].items():
            if budget not in own:
                cells.append(f"failed: {outcome['failure']}")
                continue
            ratio = own[budget] / best
            cell = f"{ratio:.2f} ({outcome['products']}, {outcome['launches']})"
            cells.append(f"**{cell}**" if budget == DEFAULT and ratio > LOSS else cell)
        full = _full_heads(record, records)
        grouped = f"{best / full:.2f}" if full else "-"
        yield f"| {record['problem']} | {' | '.join(cells)} | {best:.3f} | {grouped} |"


def _listed(found: list[tuple[float, str]]) -> list[str]:
    return [f"* {text}" for _, text in found] or ["Nowhere."]


def _listed_names(names: list[str]) -> list[str]:
    return [f"* {name}" for name in names]


def page(result: dict) -> str:
    """Markdown of what products.py writes as JSON."""
    records = result["records"]
    budgets = list(records[0]["budgets"]) if records else []
    lost, grouped = losses(records), starved(records)
    lines = [
        "# Five products or seven, on an NVIDIA GPU",
        "",
        f"{provenance(result['environment'])}. Made by `python -m benchmarks.nvidia.products`.",
        "",
        "Whole backwards of ours at equal rate, for three budgets of scratch: the median time by "
        "that of the fastest of them, and in brackets the plan's matrix products and launches. "
        f"**Bold**: the default, {DEFAULT}, loses more than {(LOSS - 1) * 100:.0f} %. Budgets "
        "with one plan have one time. The last column is the fastest by that of full heads, "
        "which do the same products.",
        "",
        f"| problem | {' | '.join(budgets)} | fastest, ms | by full heads |",
        f"|---|{'---|' * (len(budgets) + 2)}",
        *_rows(records),
        "",
        f"## Where the default loses more than {(LOSS - 1) * 100:.0f} %",
        "",
        f"{len(lost)} of {len(records)} problems.",
        "",
        *_listed(lost),
        "",
        f"## Where five products lose more than {(LOSS - 1) * 100:.0f} % to seven",
        "",
        *_listed(overtaken(records)),
        "",
        f"## Where grouped heads take more than {GROUPED} times full ones, from L {FROM_LENGTH}",
        "",
        *_listed(grouped),
    ]
    if result["not_run"]:
        lines += ["", "## Not run", "", "For want of time:", "", *_listed_names(result["not_run"])]
    return "\n".join(lines) + "\n"


def summary(result: dict) -> list[str]:
    """The default by the fastest, in brackets its products: shapes by length."""
    records = result["records"]
    lengths = list(dict.fromkeys(r["length"] for r in records))
    shapes = ("mask", "head_dim", "num_heads", "num_kv_heads")
    lines = [
        f"| shape | {' | '.join(f'L {x}' for x in lengths)} |",
        f"|{'---|' * (len(lengths) + 1)}",
    ]
    for shape in dict.fromkeys(tuple(r[name] for name in shapes) for r in records):
        mask, head_dim, num_heads, num_kv_heads = shape
        cells = []
        for length in lengths:
            (own,) = [
                r
                for r in records
                if r["length"] == length and tuple(r[name] for name in shapes) == shape
            ] or [None]
            of_budget = times(own) if own else {}
            if own is None or DEFAULT not in of_budget:
                cells.append("-")
                continue
            ratio = of_budget[DEFAULT] / min(of_budget.values())
            cell = f"{ratio:.2f} ({own['budgets'][DEFAULT]['products']})"
            cells.append(f"**{cell}**" if ratio > LOSS else cell)
        lines.append(
            f"| {mask}, D {head_dim}, H {num_heads}/{num_kv_heads} | {' | '.join(cells)} |"
        )
    return lines


def section(result: dict) -> str:
    """What stands between the marks in docs/performance-tables.md."""
    records = result["records"]
    note = (
        f"{provenance(result['environment'])}, float16, half fragments multiplied as float ones: "
        f"the time of a backward under the default budget of {DEFAULT} by that of the fastest of "
        "three budgets (the default, 1 GiB and none), in brackets its matrix products. **Bold**: "
        f"more than {(LOSS - 1) * 100:.0f} % slower, {len(losses(records))} of {len(records)} "
        "shapes. [All times](../benchmarks/results/nvidia/products.md)."
    )
    return "\n".join(["", note, "", *summary(result), ""])


def in_docs(text: str) -> str:
    """What stands between the marks now."""
    return text.partition(BEGIN)[2].partition(END)[0]


def write_docs(result: dict) -> None:
    text = DOCS.read_text()
    whole = re.escape(BEGIN) + ".*?" + re.escape(END)
    DOCS.write_text(re.sub(whole, lambda _: f"{BEGIN}{section(result)}{END}", text, flags=re.S))


def progress(record: dict) -> str:
    if record["failure"]:
        return f"{record['problem']}: FAILED ({record['seconds']} s)"
    said = ", ".join(f"{budget} {time:.3f}" for budget, time in times(record).items())
    return f"{record['problem']} ({record['seconds']} s): {said} ms"
