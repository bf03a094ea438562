"""The fitted parameter sets of model B, and predictions over them."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .core_model import Parameters, Run, Trace, resident_threadgroups, simulate
from .peers import prefill
from .structures import Structure

ENSEMBLE = Path(__file__).with_name("ensemble.json")


@cache
def ensemble(step: int = 1) -> tuple[Parameters, ...]:
    """Every step-th of the fitted sets."""
    sets = json.loads(ENSEMBLE.read_text())["sets"]
    return tuple(Parameters(**x["parameters"]) for x in sets)[::step]


@dataclass(frozen=True)
class Spread:
    """Median with the 10 and 90 % quantiles over the ensemble."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        ordered = sorted(values)
        cut = len(ordered) // 10
        return cls(statistics.median(ordered), ordered[cut], ordered[-1 - cut])

    def text(self, digits: int = 1) -> str:
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}..{self.high:.{digits}f}]"


def registers_of(kernel: Any, p: Parameters) -> float:
    return kernel.register_estimate if isinstance(kernel, Structure) else kernel.registers(p)


def evaluate(kernel: Any, p: Parameters, more: float = 0) -> tuple[Run, int, Trace]:
    """The core model's result, resident simdgroups, and the trace; with `more` registers than
    estimated."""
    trace = kernel.trace(p)
    groups = resident_threadgroups(
        p, kernel.threadgroup_bytes(), kernel.simdgroups, registers_of(kernel, p) + more
    )
    played = getattr(kernel, "played", {})
    run = simulate(trace, groups, kernel.simdgroups, **played)
    return run, groups * kernel.simdgroups, trace


def pessimism(p: Parameters, products: float) -> float:
    """The unexplained cost of PyTorch's kernel beyond 64 products, if it applied to ours too."""
    return 1 + p.unexplained * max(0.0, products / 64 - 1) ** 0.5


@dataclass(frozen=True)
class Prediction:
    cycles: Spread  #: of a scheduler for a product
    pessimistic: float  #: median with the unexplained cost
    ratio: Spread  #: to PyTorch's prefill kernel, for each product
    pessimistic_ratio: Spread
    resident: float  #: simdgroups of a core
    run: Run


@cache
def prefill_cycles(dtype: str, head_dim: int, step: int) -> tuple[float, ...]:
    kernel = prefill(dtype, head_dim)
    return tuple(evaluate(kernel, p)[0].cycles for p in ensemble(step))


def predict(kernel: Any, baseline: tuple[float, ...], step: int, more: float = 0) -> Prediction:
    cycles, pessimistic, resident = [], [], []
    for p in ensemble(step):
        run, simdgroups, trace = evaluate(kernel, p, more)
        cycles.append(run.cycles)
        pessimistic.append(run.cycles * pessimism(p, trace.products))
        resident.append(simdgroups)
    ratios = [a / b for a, b in zip(cycles, baseline, strict=True)]
    pessimistic_ratios = [a / b for a, b in zip(pessimistic, baseline, strict=True)]
    return Prediction(
        Spread.of(cycles),
        statistics.median(pessimistic),
        Spread.of(ratios),
        Spread.of(pessimistic_ratios),
        statistics.median(resident),
        run,
    )
