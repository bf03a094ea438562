"""Times of several works that take turns, so that a GPU's changing clock meets all alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Work = Callable[[], None]
#: A function that runs a work some times in a row and gives the milliseconds of each.
Clock = Callable[[Work, int], float]

_WARM_UP = 2
_SHORTEST = 2.0  # milliseconds of one measurement
_ROUNDS = (7, 51)
_ROUNDS_BETWEEN = (5, 15)


@dataclass(frozen=True)
class Spread:
    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        p20, median, p80 = np.percentile(samples, (20, 50, 80))
        return cls(float(median), float(p20), float(p80), len(samples))


def events(work: Work, repeats: int) -> float:
    """The GPU's own clock; the host waits before and after."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def repeats_of(work: Work, clock: Clock, warm_up: int = _WARM_UP) -> tuple[int, float]:
    """How often a work runs in one measurement, and how many milliseconds that takes."""
    for _ in range(warm_up):
        once = clock(work, 1)
    repeats = max(1, math.ceil(_SHORTEST / once))
    return repeats, once * repeats


def between(
    yardstick: Work, works: Mapping[str, Work], seconds: float, clock: Clock = events
) -> dict[str, list[tuple[float, float]]]:
    """Each work between two runs of the yardstick, in as many rounds as fit into ``seconds``.

    Returns:
        work -> (its milliseconds, its time by the mean of the two runs beside it), round by round
    """
    own, length = repeats_of(yardstick, clock)
    length *= len(works) + 1
    repeats = {}
    for name, work in works.items():
        repeats[name], once = repeats_of(work, clock)
        length += once
    rounds = min(max(int(1e3 * seconds / length), _ROUNDS_BETWEEN[0]), _ROUNDS_BETWEEN[1])
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for i in range(rounds):
        before = clock(yardstick, own)
        for name in list(works)[:: -1 if i % 2 else 1]:
            time = clock(works[name], repeats[name])
            after = clock(yardstick, own)
            samples[name].append((time, 2.0 * time / (before + after)))
            before = after
    return samples


def parts(order: Sequence[tuple[str, Work]], runs: int = 3) -> dict[str, float]:
    """Median milliseconds of each part, with an event between any two launches of a run."""
    import torch

    samples: dict[str, list[float]] = {}
    for _ in range(runs):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(order) + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for mark, (_, work) in zip(marks[1:], order):
            work()
            mark.record()
        torch.cuda.synchronize()
        of_run: dict[str, float] = {}
        for i, (part, _) in enumerate(order):
            of_run[part] = of_run.get(part, 0.0) + marks[i].elapsed_time(marks[i + 1])
        for part, time in of_run.items():
            samples.setdefault(part, []).append(time)
    return {part: float(np.median(times)) for part, times in samples.items()}


def take_turns(
    works: Mapping[str, Work],
    seconds: float,
    clock: Clock = events,
    limits: tuple[int, int] = _ROUNDS,
    warm_up: int = _WARM_UP,
) -> dict[str, list[float]]:
    """Milliseconds of each work in each round; every second round runs them backwards.

    As many rounds as fit into ``seconds``, within ``limits``. Round i of all works belongs
    together.
    """
    repeats, length = {}, 0.0
    for name, work in works.items():
        repeats[name], once = repeats_of(work, clock, warm_up)
        length += once
    rounds = min(max(int(1e3 * seconds / length), limits[0]), limits[1])
    samples: dict[str, list[float]] = {name: [] for name in works}
    for i in range(rounds):
        for name in list(works)[:: -1 if i % 2 else 1]:
            samples[name].append(clock(works[name], repeats[name]))
    return samples
