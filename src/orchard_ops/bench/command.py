"""``python -m orchard_ops bench``: time and memory of the op beside PyTorch's SDPA.

The contenders of a case take turns, and nothing is timed whose result is not right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console

from ..calls import reset_stats
from ..place import Place, find_place
from . import cases, gate, machine, memory, report, timing, variants
from .contenders import CONTENDERS, OURS, Contender, path
from .results import (
    FAILED,
    MEASURED,
    OUT_OF_MEMORY,
    WRONG,
    CaseResult,
    Figures,
    Results,
    read_json,
    write_csv,
    write_json,
)

Calls = dict[Contender, Callable[[], object]]


def run(args: argparse.Namespace) -> int:
    """The command, with arguments as ``__main__`` parses them.

    Returns:
        The exit status: 0 measured, 1 a result is wrong or failed, 2 it cannot run here.
    """
    console = Console()
    if args.plot is not None:
        return _plot_again(console, Path(args.plot), args.output)
    try:
        place = find_place(args.device)
        chosen = cases.chosen(args, place.kind)
        further = variants.of_cases(chosen, args.tiles, args.scratch, place)
    except ValueError as error:
        console.print(f"bench: {error}", highlight=False, markup=False)
        return 2
    results = Results(
        machine.describe(place),
        datetime.now(UTC).strftime("%Y-%m-%d"),
        memory.method(place.device),
    )
    console.print(f"bench on {machine.where(results.machine)}", highlight=False, markup=False)
    schedule = timing.Schedule(
        seconds=args.seconds or (0.5 if args.quick else 3.0), min_rounds=3 if args.quick else 7
    )
    contenders = [CONTENDERS[name] for name in dict.fromkeys((OURS, *args.against))]
    reset_stats()
    with report.progress(console, len(chosen)) as on_case:
        for case in chosen:
            on_case(case)
            results.cases.append(measure(case, contenders + further[case], place, schedule))
    report.print_table(console, results)
    stem = Path(args.output or "bench-output") / machine.slug(results.machine)
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_json(results, stem.with_name(f"{stem.name}.json"))
    write_csv(results, stem.with_name(f"{stem.name}.csv"))
    console.print(f"written: {stem}.json, {stem}.csv", highlight=False, markup=False)
    _plot(console, results, stem)
    return 0 if results.all_right() else 1


def measure(
    case: cases.Case, contenders: list[Contender], place: Place, schedule: timing.Schedule
) -> CaseResult:
    """Gate, memory, then time; a contender that fails one of them has no part in the next.

    If the result of our op is wrong, nobody is measured.
    """
    problem = case.problem
    result = CaseResult(problem.series, problem.length, case.mode, [])
    operands = [x.to(place.device) for x in cases.operands(problem)]
    calls: Calls = {}
    for contender in contenders:
        figures = Figures(contender.name, MEASURED)
        result.figures.append(figures)
        call = partial(contender.call, operands, case)
        try:
            with contender.environment():
                if contender.is_ours:
                    gate.check(call(), case)
                figures.path = path(contender, operands, case)
                figures.peak_bytes = memory.peak_bytes(call, place.device)
            calls[contender] = call
        except AssertionError as error:
            figures.status, figures.message = WRONG, str(error)
            if contender.name == OURS:
                return result
        except (RuntimeError, MemoryError) as error:
            _record(figures, error)
            memory.release(place.device)
    for name, samples in _times(result, calls, place, schedule).items():
        figures = next(f for f in result.figures if f.contender == name)
        figures.samples_ms = [float(f"{ms:.5g}") for ms in samples]
    return result


def _times(
    result: CaseResult, calls: Calls, place: Place, schedule: timing.Schedule
) -> dict[str, list[float]]:
    """Interleaved; if memory runs out only now, with ours only, and then with our op only."""
    contenders = {contender.name: contender for contender in calls}
    try:
        return timing.interleaved(
            {contender.name: call for contender, call in calls.items()}, place.device, schedule,
            lambda name: contenders[name].environment(),
        )  # fmt: skip
    except (RuntimeError, MemoryError) as error:
        memory.release(place.device)
        fewer = [c for c in calls if c.is_ours]
        if len(fewer) == len(calls):
            fewer = [c for c in calls if c.name == OURS and len(calls) > 1]
        for figures in result.figures:
            contender = contenders.get(figures.contender)
            if contender is not None and contender not in fewer:
                figures.peak_bytes = None
                _record(figures, error)
        left = {contender: calls[contender] for contender in fewer}
        return _times(result, left, place, schedule) if left else {}


def _record(figures: Figures, error: Exception) -> None:
    figures.status = OUT_OF_MEMORY if memory.is_out_of_memory(error) else FAILED
    figures.message = str(error).split("\n")[0]


def _plot(console: Console, results: Results, stem: Path) -> bool:
    try:
        from . import plot
    except ModuleNotFoundError as error:
        console.print(
            f'no plots: they need {error.name}, pip install "orchard_ops[bench]"; then '
            f"python -m orchard_ops bench --plot {stem}.json",
            highlight=False, markup=False,
        )  # fmt: skip
        return False
    written = plot.save(results, stem)
    console.print(f"plots: {', '.join(map(str, written))}", highlight=False, markup=False)
    return True


def _plot_again(console: Console, file: Path, output: str | None) -> int:
    try:
        results = read_json(file)
    except (OSError, ValueError) as error:
        console.print(f"bench: {error}", highlight=False, markup=False)
        return 2
    folder = file.parent if output is None else Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    return 0 if _plot(console, results, folder / file.stem) else 2
