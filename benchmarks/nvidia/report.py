"""The Markdown table of a result of prove.py."""

from __future__ import annotations

from collections.abc import Sequence

_RESULTS = ("out", "lse", "dq", "dk", "dv")
LISTED = (
    "exact",
    "long sequences",
    "far addresses",
    "compute-sanitizer",
    "planted fault",
)  # problem by problem


def provenance(environment: dict) -> str:
    """Says where a run took place and from what its kernels were made (environment.describe)."""
    sources = environment["sources"]
    edited = " with uncommitted changes" if sources["edited"] else ""
    return (
        f"{environment['gpu']}, driver {environment['driver']}, torch {environment['torch']}, "
        f"{environment['date']}; commit {sources['commit']}{edited}, kernels {sources['digest']}"
    )


def table(
    result: dict,
    title: str = "The Metal kernels on an NVIDIA GPU",
    module: str = "prove",
    listed: Sequence[str] = LISTED,
) -> str:
    """
    Args:
        listed: the groups of which every problem is in the table.
    """
    environment, records = result["environment"], result["records"]
    failures = [record for record in records if record["failure"]]
    lines = [
        f"# {title}",
        "",
        f"{provenance(environment)}. Made by `python -m benchmarks.nvidia.{module}`.",
        "",
        f"{len(result['kernels'])} kernels ran in {len(records)} problems; {len(failures)} failed.",
        "",
        "Largest error against float64 of the kernels / of same-dtype mathematics, over all "
        "problems of a row. Each problem is judged by itself (`orchard_ops.testing`).",
        "",
        "| problems | dtype | number | " + " | ".join(_RESULTS) + " | same bits again | failed |",
        "|---|---|---|" + "---|" * (len(_RESULTS) + 2),
    ]
    compared = [record for record in records if record["errors"]]
    for group, dtype in dict.fromkeys((r["group"], r["dtype"]) for r in compared):
        rows = [r for r in compared if (r["group"], r["dtype"]) == (group, dtype)]
        cells = []
        for name in _RESULTS:
            errors = [row["errors"][name] for row in rows if name in row["errors"]]
            largest = (f"{max(e[i] for e in errors):.1e}" for i in (0, 1)) if errors else ()
            cells.append(" / ".join(largest))
        repeated = [r["repeats_bitwise"] for r in rows if r["repeats_bitwise"] is not None]
        again = f"{sum(repeated)} of {len(repeated)}" if repeated else "not tried"
        failed = sum(bool(row["failure"]) for row in rows)
        lines.append(
            f"| {group} | {dtype} | {len(rows)} | {' | '.join(cells)} | {again} | {failed} |"
        )
    lines += ["", "| problem | |", "|---|---|"]
    for record in records:
        if record["failure"] or record["group"] in listed:
            failure = record["failure"].split("\n")[0][:200].replace("|", "/")
            noticed = f"noticed: {record['noticed'][:200]}" if record["noticed"] else ""
            verdict = failure or record["not_run"] or noticed or "passed"
            lines.append(f"| {record['group']}: {record['case']} | {verdict} |")
    return "\n".join(lines) + "\n"
