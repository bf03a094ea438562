"""What the bench shows: the table of cases."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .contenders import OURS, SDPA
from .results import FAILED, MEASURED, WRONG, CaseResult, Figures, Results
from .variants import TILE


def print_table(console: Console, results: Results) -> None:
    """A table for each series, a row for each contender in each case; "/ ours" compares times."""
    for series in dict.fromkeys(case.series for case in results.cases):
        table = Table(title=series, title_justify="left", title_style="bold")
        table.add_column("L", justify="right")
        table.add_column("mode")
        table.add_column("contender", no_wrap=True)
        for name in ("median ms", "p20", "p80", "peak MiB", "/ ours"):
            table.add_column(name, justify="right")
        for case in (c for c in results.cases if c.series == series):
            for index, figures in enumerate(case.figures):
                what = (f"{case.length}", case.mode) if index == 0 else ("", "")
                table.add_row(*what, figures.contender, *_cells(case, figures))
            table.add_section()
        of_series = [case for case in results.cases if case.series == series]
        table.caption = "\n".join(filter(None, map(fastest_tile, of_series))) or None
        table.caption_justify = "left"
        console.print(table)
    _print_paths(console, results)
    for case in results.cases:
        for figures in case.figures:
            if figures.status in (WRONG, FAILED):
                failed = f"{figures.contender}: {figures.status} ({case.series} L{case.length}"
                line = f"FAILED {failed} {case.mode}): {figures.message}"
                console.print(Text(line, style="bold red"))


def fastest_tile(case: CaseResult) -> str:
    """A sentence about the fastest tile, or nothing for a case without tiles.

    Tiles are compared by the median over the turns of a tile's time divided by the default's. A
    tile that is slower in a fifth of the turns is not called faster.
    """
    ratios = {
        figures.contender: ratio
        for figures in case.figures
        if figures.contender.startswith(TILE)
        and (ratio := case.ratio(figures.contender, OURS)) is not None
    }
    if not ratios:
        return ""
    best = min(ratios, key=lambda name: ratios[name])
    low, high = (case.ratio_percentile(best, OURS, p) or 0.0 for p in (20, 80))
    time = f"{best}, {ratios[best]:.2f} of the default's time (p20 {low:.2f}, p80 {high:.2f})"
    if high < 1:
        return f"L {case.length}, {case.mode}: the fastest is {time}"
    return f"L {case.length}, {case.mode}: none is clearly faster than the default; best {time}"


def _cells(case: CaseResult, figures: Figures) -> list[str]:
    """The cells for times, memory and ratio, or the reason why there are none."""
    if figures.status != MEASURED:
        return [figures.status]
    times = [figures.time_ms(p) or 0.0 for p in (50, 20, 80)]
    ratio = case.ratio(figures.contender, OURS)
    return [
        *(f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}" for ms in times),
        f"{(figures.peak_bytes or 0) / 2**20:.1f}",
        "" if ratio is None or figures.contender == OURS else f"{ratio:.2f}",
    ]


HELPS = 1.05
"""SDPA must take so many times as long, or the op is not called faster."""


def does_not_help(case: CaseResult) -> str:
    """Why the op is not worth having for the time of this case; nothing if it is.

    It is not where SDPA does not take 5 % longer, or where a fifth of the turns says so.
    """
    ratio, low = (case.ratio_percentile(SDPA, OURS, p) for p in (50, 20))
    if ratio is None or low is None or low >= HELPS:
        return ""
    if ratio < 1 / HELPS:
        return f"SDPA is faster: {ratio:.2f} of our time"
    if ratio < HELPS:
        return f"as fast as SDPA ({ratio:.2f})"
    return f"SDPA takes {ratio:.2f} of our time, but {low:.2f} in a fifth of the turns"


def print_where_it_does_not_help(console: Console, results: Results) -> None:
    """The cases in which the op is no faster than SDPA, with what it saves of memory there."""
    compared = [c for c in results.cases if c.ratio(SDPA, OURS) is not None]
    if not compared:
        return
    rows = [(case, why) for case in compared if (why := does_not_help(case))]
    if not rows:
        line = f"Where it does not help: nowhere, of {len(compared)} cases that were compared"
        console.print(line, highlight=False, markup=False)
        return
    title = f"Where it does not help: {len(rows)} of {len(compared)} cases that were compared"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("case", "mode", "time", "memory"):
        table.add_column(name)
    for case, why in rows:
        table.add_row(f"{case.series} L{case.length}", case.mode, why, _memory(case))
    console.print(table)


def _memory(case: CaseResult) -> str:
    ours, sdpa = case.of(OURS), case.of(SDPA)
    if ours is None or sdpa is None or not ours.peak_bytes or not sdpa.peak_bytes:
        return ""
    return f"SDPA takes {sdpa.peak_bytes / ours.peak_bytes:.1f} times ours"


def _print_paths(console: Console, results: Results) -> None:
    """Lines that say which kernels ran, without repetitions for a contender and mode."""
    told = dict.fromkeys(
        (f.contender, case.mode, f.path) for case in results.cases for f in case.figures if f.path
    )
    for contender, mode, path in told:
        console.print(f"{contender}, {mode}: {path}", highlight=False, markup=False)
