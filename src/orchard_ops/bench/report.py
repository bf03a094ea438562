"""What the bench shows: where it runs, progress, and the table of cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from .cases import Case
from .contenders import OURS
from .results import MEASURED, WRONG, Figures, Results

OnCase = Callable[[Case], None]


@contextmanager
def progress(console: Console, num_cases: int) -> Iterator[OnCase]:
    """A progress bar; yields the function to call before every case."""
    done = 0

    def print_line(case: Case) -> None:
        nonlocal done
        done += 1
        console.print(f"{done}/{num_cases}: {case}", highlight=False, markup=False)

    if not console.is_terminal:
        yield print_line
        return
    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("...", total=num_cases)

        def advance(case: Case) -> None:
            nonlocal done
            bar.update(task, completed=done, description=str(case))
            done += 1

        yield advance
        bar.update(task, completed=num_cases)


def print_table(console: Console, results: Results) -> None:
    """A row for each case: ours, each other contender, and how their times compare."""
    others = [name for name in results.contenders() if name != OURS]
    for series in dict.fromkeys(case.series for case in results.cases):
        table = Table(title=series, title_justify="left", title_style="bold")
        table.add_column("L", justify="right")
        table.add_column("mode")
        for name in (OURS, *others):
            table.add_column(f"{name}: ms (p20 ... p80), MiB")
        for name in others:
            table.add_column(f"time of {name} / ours", justify="right")
        for case in (c for c in results.cases if c.series == series):
            cells = [_cell(case.of(name)) for name in (OURS, *others)]
            ratios = [case.ratio(name, OURS) for name in others]
            table.add_row(
                str(case.length), case.mode, *cells,
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            )  # fmt: skip
        console.print(table)
    _print_paths(console, results)
    wrong = [c for c in results.cases for f in c.figures if f.status == WRONG]
    if wrong:
        console.print(Text(f"FAILED: wrong results in {len(wrong)} cases", style="bold red"))


def _cell(figures: Figures | None) -> Text:
    if figures is None:
        return Text("")
    if figures.status != MEASURED:
        return Text(figures.status, style="red")
    median, low, high = (f"{figures.time_ms(p):.3g}" for p in (50, 20, 80))
    return Text(f"{median} ({low} ... {high}), {(figures.peak_bytes or 0) / 2**20:.1f}")


def _print_paths(console: Console, results: Results) -> None:
    """Which kernels ran: each distinct answer once a contender and mode."""
    told = dict.fromkeys(
        (f.contender, case.mode, f.path) for case in results.cases for f in case.figures if f.path
    )
    for contender, mode, path in told:
        console.print(f"{contender}, {mode}: {path}", highlight=False, markup=False)
