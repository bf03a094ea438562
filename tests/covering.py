"""Covering arrays: few problems in which every two choices meet, made the same way every time.

Enumerating every combination of what a kernel may be asked for is out of reach. Kernels go wrong
where two of their parts meet, so every pair of choices stands in some problem together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Choices = dict[str, Any]


def covering_array(
    factors: Mapping[str, Sequence[Any]], possible: Callable[[Choices], bool]
) -> list[Choices]:
    """Choices, one of each factor, such that every two that may meet do.

    Args:
        factors: what is chosen, and among what.
        possible: whether choices of some of the factors may stand together.
    """
    missing = {
        frozenset(((a, x), (b, y))): None  # a dict keeps their order
        for a, b in combinations(factors, 2)
        for x, y in product(factors[a], factors[b])
        if possible({a: x, b: y})
    }
    rows = []
    while missing:
        row = _completed(dict(sorted(next(iter(missing)))), factors, possible, missing)
        for pair in combinations(row.items(), 2):
            missing.pop(frozenset(pair), None)
        rows.append({name: row[name] for name in factors})
    return rows


def _completed(
    row: Choices,
    factors: Mapping[str, Sequence[Any]],
    possible: Callable[[Choices], bool],
    missing: Mapping[frozenset, None],
) -> Choices:
    """The row with a choice of every factor, each the one that brings most of the missing pairs."""
    for name in sorted(factors, key=lambda name: -len(factors[name])):
        if name in row:
            continue
        best, most = None, -1
        for choice in spread(factors[name], row):
            if not possible(row | {name: choice}):
                continue
            brought = sum(frozenset(((name, choice), other)) in missing for other in row.items())
            if brought > most:
                best, most = choice, brought
        if most < 0:
            raise ValueError(f"no choice of {name} goes with {row}")
        row[name] = best
    return row


def spread(choices: Sequence[Any], of: Any) -> list[Any]:
    """The choices in an order that depends on `of`, so that ties have no favourite."""
    return sorted(choices, key=lambda choice: digest((of, choice)))


def digest(of: Any) -> int:
    """A number that is the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:8], "big")
