"""Products of parameters of which a few combinations run by default, and all with `-m slow`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest


def product(*factors: tuple[Any, ...]) -> list[Any]:
    """Every combination. As many as the longest factor has values run by default, so that each
    value of each factor is in one of them; the others are slow."""
    longest = max(map(len, factors))
    by_default = {tuple(x[n % len(x)] for x in factors) for n in range(longest)}
    return [
        pytest.param(*row, marks=[pytest.mark.slow] * (row not in by_default))
        for row in itertools.product(*factors)
    ]
