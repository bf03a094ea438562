"""``python -m orchard_ops bench``: time and memory of the op beside PyTorch's SDPA.

The contenders of a case take turns, and nothing is timed whose result is not right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from ...calls import reset_stats
from .. import endings, machine
from ..console import Console
from ..endings import CannotRun, writable, write
from ..place import Place, find_place
from ..progress import each
from . import cases, community, gate, memory, report, timing, variants
from .contenders import CONTENDERS, OURS, Contender, path
from .models import LEAVES_OUT
from .results import (
    FAILED,
    MEASURED,
    OUT_OF_MEMORY,
    PLOT_FORMATS,
    WRONG,
    CaseResult,
    Figures,
    Results,
    read_json,
    to_csv,
    to_json,
)

Calls = dict[Contender, Callable[[], object]]


def run(args: argparse.Namespace) -> int:
    """The command, with arguments as ``__main__`` parses them.

    The results are written after every case, to a file of another name until the run is complete.

    Returns:
        The exit status: `endings.RIGHT`, or `endings.WRONG` if a result is wrong or failed.

    Raises:
        CannotRun: no such device, no such kernels, or nothing can be written.
    """
    console = Console()
    if args.plot is not None:
        return _plot_again(console, Path(args.plot), args.output)
    try:
        place = find_place(args.device)
        chosen = cases.chosen(args, place.kind)
        further = variants.of_cases(chosen, args.tiles, args.scratch, place)
    except ValueError as error:
        raise CannotRun(str(error)) from error
    results = Results(
        machine.describe(place),
        datetime.now(UTC).strftime("%Y-%m-%d"),
        memory.method(place.device),
    )
    stem = Path(args.output or "bench-output") / machine.slug(results.machine)
    whole, table = (writable(stem.with_name(f"{stem.name}.{kind}")) for kind in ("json", "csv"))
    unfinished = writable(stem.with_name(f"{stem.name}.unfinished.json"))
    saved = writable(Path(args.save)) if args.save is not None else None
    console.say(f"bench on {machine.where(results.machine)}")
    for name in dict.fromkeys(case.problem.name for case in chosen):
        if name in LEAVES_OUT:
            console.say(f"{name} is measured without {LEAVES_OUT[name]}")
    schedule = timing.Schedule(
        seconds=args.seconds or (0.5 if args.quick else 3.0), min_rounds=3 if args.quick else 7
    )
    contenders = [CONTENDERS[name] for name in dict.fromkeys((OURS, *args.against))]
    reset_stats()
    try:
        with each(console, chosen) as under_way:
            for case in under_way:
                results.cases.append(measure(case, contenders + further[case], place, schedule))
                write(unfinished, to_json(results))
                if saved is not None:
                    complete = len(results.cases) == len(chosen)
                    write(saved, community.to_json(results, chosen, complete))
        report.print_table(console, results)
        report.print_where_it_does_not_help(console, results)
    except BaseException as error:
        if results.cases:
            done = f"{len(results.cases)} of {len(chosen)} cases are in {unfinished}"
            error.add_note(f"{done}, for python -m orchard_ops bench --plot")
            if saved is not None:
                error.add_note(f"and in {saved}")
        raise
    write(whole, to_json(results))
    write(table, to_csv(results))
    unfinished.unlink(missing_ok=True)
    console.say(f"written: {', '.join(map(str, filter(None, (whole, table, saved))))}")
    _plot(console, results, stem)
    return endings.RIGHT if results.all_right() else endings.WRONG


def measure(
    case: cases.Case, contenders: list[Contender], place: Place, schedule: timing.Schedule
) -> CaseResult:
    """Measures a case: first the gate, then memory, then time. A contender that fails one of them
    has no part in the next.

    If our op's result is wrong, no contender is measured.
    """
    problem = case.problem
    result = CaseResult(problem.series, problem.length, case.mode, [])
    calls: Calls = {}
    try:
        operands = [x.to(place.device) for x in cases.operands(problem)]
    except (RuntimeError, MemoryError) as error:
        result.figures = [Figures(contender.name, MEASURED) for contender in contenders]
        for figures in result.figures:
            _record(figures, error)
        return result
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
    """Times the contenders in turns. If memory runs out here, it tries again with ours alone, and
    then with our op alone."""
    contenders = {contender.name: contender for contender in calls}
    try:
        return timing.interleaved(
            {contender.name: call for contender, call in calls.items()},
            place.device,
            schedule,
            lambda name: contenders[name].environment(),
        )
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
        console.say(
            f'no plots: they need {error.name}, pip install "orchard_ops[bench]"; then '
            f"python -m orchard_ops bench --plot {stem}.json"
        )
        return False
    written = plot.save(results, stem)
    console.say(f"plots: {', '.join(map(str, written))}")
    return True


def _plot_again(console: Console, file: Path, output: str | None) -> int:
    try:
        results = read_json(file)
    except (OSError, ValueError) as error:
        raise CannotRun(str(error)) from error
    folder = file.parent if output is None else Path(output)
    for ending in PLOT_FORMATS:
        writable(folder / f"{file.stem}.{ending}")
    drawn = _plot(console, results, folder / file.stem)
    return endings.RIGHT if drawn else endings.CANNOT_RUN
