"""Interleaved timing: A B A B ..., so that a machine that heats up slows both alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

_MAX_ROUNDS = 200


@dataclass(frozen=True)
class Schedule:
    """How long a case is measured."""

    seconds: float
    """The time for a case, over all contenders."""
    min_rounds: int
    """The least number of rounds, even if they take longer than `seconds`."""
    warm_up: int = 2
    """How many calls each contender makes before the first sample."""
    sample_seconds: float = 0.005
    """The least duration of a sample, which makes as many calls as that takes."""


def _synchronize(device: torch.device) -> None:
    if device.type == "mps":
        torch.mps.synchronize()


def _sample(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds per call of `count` calls in a row, until the device is done."""
    _synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        call()
    _synchronize(device)
    return (time.perf_counter() - started) / count


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    schedule: Schedule,
    around: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> dict[str, list[float]]:
    """Milliseconds of a call, one sample of each contender a round; equally many of each.

    `around` gives what a contender's samples run inside of; entering it is not timed.
    """
    counts = {}
    for name, call in calls.items():
        with around(name):
            _sample(call, schedule.warm_up, device)
            counts[name] = max(1, round(schedule.sample_seconds / _sample(call, 1, device)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for round_ in range(_MAX_ROUNDS):
        if round_ >= schedule.min_rounds and time.perf_counter() - started > schedule.seconds:
            break
        for name, call in calls.items():
            with around(name):
                samples[name].append(1e3 * _sample(call, counts[name], device))
    return samples


def percentile(values: list[float], p: float) -> float:
    """With linear interpolation; p from 0 to 100."""
    return torch.quantile(torch.tensor(values, dtype=torch.float64), p / 100).item()
