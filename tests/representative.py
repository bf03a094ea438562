"""Parameters of which a few run by default, and all with `-m slow`: always the same ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pytest
from covering import covering_array, digest


def product(*factors: tuple[Any, ...]) -> list[Any]:
    """Every combination. As many as the longest factor has values run by default, so that each
    value of each factor is in one of them; the others are slow."""
    longest = max(map(len, factors))
    by_default = {tuple(x[n % len(x)] for x in factors) for n in range(longest)}
    return _marked(factors, by_default)


def pairs(*factors: Collection[Any]) -> list[Any]:
    """Every combination. By default so many run that every two values stand in one of them
    together; the others are slow."""
    numbers = {f"{n}": range(len(x)) for n, x in enumerate(factors)}
    values = [list(x) for x in factors]
    by_default = [
        tuple(x[row[f"{n}"]] for n, x in enumerate(values))
        for row in covering_array(numbers, lambda _: True)
    ]
    return _marked(values, by_default)


def share(params: Iterable[Any], of: int, name: Callable[[Any], str]) -> list[Any]:
    """One of so many, drawn by name, runs by default; the others are slow."""
    return [pytest.param(x, marks=_slow(digest(name(x)) % of != 0), id=name(x)) for x in params]


def _marked(factors: Sequence[Collection[Any]], by_default: Collection[Any]) -> list[Any]:
    return [
        pytest.param(*row, marks=_slow(row not in by_default))
        for row in itertools.product(*factors)
    ]


def _slow(is_slow: bool) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * is_slow
