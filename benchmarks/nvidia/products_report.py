"""The table of a result of products.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from statistics import median

from .features_report import DOCS
from .report import provenance

FIVE, NONE = ", five", "none"
LOSS = 1.03
"""What the plan's choice may take at most, by the other one under its budget."""
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


def choices(record: dict) -> list[str]:
    """The budgets under which the plan was free to choose."""
    return [b for b in record["budgets"] if b != NONE and not b.endswith(FIVE)]


def loss(record: dict, budget: str) -> float | None:
    """What the choice took under a budget, by the faster of five products under it and seven."""
    of_budget = times(record)
    if budget not in of_budget:
        return None
    return of_budget[budget] / min(of_budget[b] for b in (budget, *_others(record, budget)))


def _others(record: dict, budget: str) -> list[str]:
    """What a choice is compared with, as far as it was timed."""
    return [b for b in (budget + FIVE, NONE) if b in times(record)]


def _full_heads(record: dict, records: list[dict]) -> float | None:
    """The best time of the same problem with as many key/value heads as query heads."""
    same = ("head_dim", "length", "mask", "num_heads")
    wanted = {name: record[name] for name in same} | {"num_kv_heads": record["num_heads"]}
    for other in records:
        if wanted.items() <= other.items() and times(other):
            return min(times(other).values())
    return None


def losses(records: list[dict]) -> list[tuple[float, str]]:
    """Where the choice takes more than LOSS times the other one, and how much, the worst first."""
    found = []
    for record in records:
        for budget in choices(record):
            ratio = loss(record, budget)
            if ratio is not None and ratio > LOSS:
                outcome = record["budgets"][budget]
                how = f"{outcome['products']} products, {outcome['launches']} launches, {budget}"
                found.append((ratio, f"{record['problem']}: {ratio:.2f} ({how})"))
    return sorted(found, reverse=True)


def compared(records: list[dict]) -> int:
    """Choices that were timed beside another one."""
    return sum(_has_rival(record, b) for record in records for b in choices(record))


def _has_rival(record: dict, budget: str) -> bool:
    """Whether the choice was timed, and one of the others that is not the same plan."""
    same_as = {name: outcome["same_as"] for name, outcome in record["budgets"].items()}
    others = _others(record, budget)
    return budget in times(record) and any(same_as[b] != same_as[budget] for b in others)


def grouped(records: list[dict]) -> list[tuple[float, str]]:
    """What grouped heads take by full ones, best budget beside best, the worst first."""
    found = []
    for record in records:
        full, own = _full_heads(record, records), times(record)
        in_groups = record["num_kv_heads"] < record["num_heads"]
        if full and own and in_groups and record["length"] >= FROM_LENGTH:
            ratio = min(own.values()) / full
            found.append((ratio, f"{record['problem']}: {ratio:.2f}"))
    return sorted(found, reverse=True)


def starved(records: list[dict]) -> list[tuple[float, str]]:
    """Where grouped heads take more than GROUPED times full ones."""
    return [(ratio, text) for ratio, text in grouped(records) if ratio > GROUPED]


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
            lost = budget in choices(record) and (loss(record, budget) or 0) > LOSS
            cells.append(f"**{cell}**" if lost else cell)
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
    lost, slow = losses(records), starved(records)
    lines = [
        "# Five products or seven, on an NVIDIA GPU",
        "",
        f"{provenance(result['environment'])}. Made by `python -m benchmarks.nvidia.products`.",
        "",
        "Whole backwards of ours at equal rate, under budgets of scratch: the median time by that "
        "of the fastest of them, and in brackets the plan's matrix products and launches. *Five*: "
        "with five products wherever they fit, whatever the plan chooses. **Bold**: the choice "
        f"takes more than {(LOSS - 1) * 100:.0f} % longer than five products under the same "
        "budget, or than seven. Columns with one plan have one time. The last column is the "
        "fastest by that of full heads, which do the same products.",
        "",
        f"| problem | {' | '.join(budgets)} | fastest, ms | by full heads |",
        f"|---|{'---|' * (len(budgets) + 2)}",
        *_rows(records),
        "",
        f"## Where the choice loses more than {(LOSS - 1) * 100:.0f} % to the other one",
        "",
        f"{len(lost)} of {compared(records)} choices.",
        "",
        *_listed(lost),
        "",
        f"## Where grouped heads take more than {GROUPED} times full ones, from L {FROM_LENGTH}",
        "",
        *_listed(slow),
    ]
    if result["not_run"]:
        lines += ["", "## Not run", "", "For want of time:", "", *_listed_names(result["not_run"])]
    return "\n".join(lines) + "\n"


def summary(result: dict) -> list[str]:
    """Under the least budget the choice by the fastest way of all, in brackets its products:
    shapes by length."""
    records = result["records"]
    (least, *_) = choices(records[0])
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
            if own is None or least not in of_budget:
                cells.append("-")
                continue
            ratio = of_budget[least] / min(of_budget.values())
            cell = f"{ratio:.2f} ({own['budgets'][least]['products']})"
            cells.append(f"**{cell}**" if (loss(own, least) or 0) > LOSS else cell)
        lines.append(
            f"| {mask}, D {head_dim}, H {num_heads}/{num_kv_heads} | {' | '.join(cells)} |"
        )
    return lines


def section(result: dict) -> str:
    """What stands between the marks in docs/performance-tables.md."""
    records = result["records"]
    note = (
        f"{provenance(result['environment'])}, float16, half fragments multiplied as float ones: "
        f"the time of a backward under a budget of {choices(records[0])[0]} by that of the fastest "
        "under any budget, in brackets its matrix products. **Bold**: more than "
        f"{(LOSS - 1) * 100:.0f} % slower than the other choice under that budget; under all "
        f"budgets {len(losses(records))} of {compared(records)} choices are. [All times]"
        "(../benchmarks/results/nvidia/products.md)."
    )
    return "\n".join(["", note, "", *summary(result), "", _of_groups(result), ""])


def _of_groups(result: dict) -> str:
    found, slow = grouped(result["records"]), starved(result["records"])
    if not found:
        return ""
    said = (
        f"From L {FROM_LENGTH} on the fastest backward of key/value heads in groups takes "
        f"{found[-1][0]:.2f} to {found[0][0]:.2f} times that of full heads, which do the same "
        f"products. Above {GROUPED}: {'; '.join(text for _, text in slow) or 'none'}."
    )
    not_run = result["not_run"]
    return said + (f" For want of time not run: {'; '.join(not_run)}." if not_run else "")


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
