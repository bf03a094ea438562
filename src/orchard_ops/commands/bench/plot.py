"""Time and memory over the length, from a result file. Needs matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from .. import machine
from .contenders import OURS
from .results import OUT_OF_MEMORY, PLOT_FORMATS, CaseResult, Results

_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple")
_LINES: tuple[tuple[str, Any], ...] = (("o", "-"), ("s", "--"), ("^", ":"), ("v", "-."))
"""Marker and line of each contender, in the order of `_COLORS`."""
_MAX_IN_PANEL = 8
"""The most contenders for which the legend fits into a panel. With more it stands beside the
panels."""


def save(results: Results, stem: Path) -> list[Path]:
    """Writes `stem`.png and `stem`.svg: a row for each series, time and memory of each mode."""
    series = list(dict.fromkeys(case.series for case in results.cases))
    modes = list(dict.fromkeys(case.mode for case in results.cases))
    columns = [(mode, what) for what in ("time", "memory") for mode in modes]
    figure = Figure(figsize=(1 + 3.2 * len(columns), 1.1 + 2.9 * len(series)), layout="constrained")
    figure.suptitle(f"measured on {machine.where(results.machine)}", fontsize=10)
    grid = figure.subplots(len(series), len(columns), squeeze=False)
    for row, name in zip(grid, series):
        for axes, (mode, what) in zip(row, columns):
            cases = [c for c in results.cases if c.series == name and c.mode == mode]
            cases.sort(key=lambda case: case.length)
            draw = _draw_time if what == "time" else _draw_memory
            draw(axes, cases, results.contenders())
            _label(axes, f"{name}\n{mode}", [case.length for case in cases])
            if what == "memory" and axes.has_data():
                axes.set_yscale("log", base=2)
                axes.yaxis.set_major_formatter(FuncFormatter(lambda nbytes, _: _size(nbytes)))
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle=line, markersize=4, label=name)
        for name, color, (marker, line) in _styles(results.contenders())
    ]
    if len(handles) <= _MAX_IN_PANEL:
        grid[0][0].legend(handles=handles, fontsize=8)
    else:
        figure.legend(handles=handles, fontsize=7, loc="outside right upper")
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in PLOT_FORMATS]
    for path in paths:
        # The file holds no date, so that the same results give the same file.
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=110, metadata=metadata)
    return paths


def _styles(contenders: Sequence[str]) -> Iterator[tuple[str, str, tuple[str, Any]]]:
    """Each contender's name, color, and marker with line. The first contenders have those listed
    above, and further ones have other combinations of them."""
    fixed = list(zip(_COLORS, _LINES))
    more = [
        (color, style)
        for style in _LINES
        for color in TABLEAU_COLORS
        if (color, style) not in fixed
    ]
    for name, (color, style) in zip(contenders, itertools.cycle(fixed + more)):
        yield name, color, style


def _label(axes: Any, title: str, lengths: list[int]) -> None:
    axes.set_title(title, fontsize=8)
    axes.set_xscale("log", base=2)
    if axes.has_data():
        axes.set_yscale("log")
    else:
        axes.text(0.5, 0.5, "no figures", ha="center", transform=axes.transAxes)
    axes.set_xticks(lengths, [f"{length}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("L", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _draw_time(axes: Any, cases: list[CaseResult], contenders: list[str]) -> None:
    """Draws medians in a band from p20 to p80."""
    for contender, color, (marker, line) in _styles(contenders):
        measured = [(c.length, f) for c in cases if (f := c.of(contender)) and f.samples_ms]
        lengths = [length for length, _ in measured]
        median, low, high = ([f.time_ms(p) for _, f in measured] for p in (50, 20, 80))
        if measured:
            axes.plot(lengths, median, marker + line, color=color, markersize=4)
            axes.fill_between(lengths, low, high, color=color, alpha=0.2, linewidth=0)
    _mark_out_of_memory(axes, cases, contenders)
    axes.set_ylabel("time (ms)", fontsize=8)


def _draw_memory(axes: Any, cases: list[CaseResult], contenders: list[str]) -> None:
    for contender, color, (marker, line) in _styles(contenders):
        measured = [(c.length, f) for c in cases if (f := c.of(contender)) and f.peak_bytes]
        lengths = [length for length, _ in measured]
        peaks = [f.peak_bytes for _, f in measured]
        if measured:
            axes.plot(lengths, peaks, marker + line, color=color, markersize=4)
    _mark_out_of_memory(axes, cases, contenders)
    axes.set_ylabel("peak memory beyond the inputs", fontsize=8)


def _mark_out_of_memory(axes: Any, cases: list[CaseResult], contenders: list[str]) -> None:
    for contender, color, _ in _styles(contenders):
        for case in cases:
            figures = case.of(contender)
            if figures is not None and figures.status == OUT_OF_MEMORY:
                height = 0.97 if contender == OURS else 0.9
                axes.text(
                    case.length,
                    height,
                    "out of\nmemory",
                    color=color,
                    fontsize=7,
                    ha="center",
                    va="top",
                    transform=axes.get_xaxis_transform(),
                )


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:g} {unit}"
        nbytes /= 1024
    return f"{nbytes:g} GiB"
