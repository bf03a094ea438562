"""How many matrix products a backward has, in words."""

from __future__ import annotations

import re

from .plan import Kernel, Plan
from .training_memory import scratch_budget_mb

_STORED, _AGAIN = "attention_backward_dq_from_ds", "attention_backward_dq_"
_NARROW = 64
"""Below this width of its kernels a backward computes dS twice, whatever memory there is."""


def of_plan(plan: Plan) -> str:
    """Five or seven, why, and how much of dS is stored at a time; empty for a forward alone."""
    for number, kernel in enumerate(plan.kernels):
        if kernel.name.startswith(_STORED):
            launches = [row for row in plan.launches if row[0] == number]
            return f"five products: dS of {_at_a_time(launches)}"
    for kernel in plan.kernels:
        if kernel.name.startswith(_AGAIN):
            return f"seven products: dS is computed twice, {_why_twice(kernel)}"
    return ""


def _at_a_time(launches: list[tuple[int, ...]]) -> str:
    """Of launches of the query's side."""
    _, heads, _, _, begin, end = launches[0]
    all_heads = sum(row[1] for row in launches if row[4] == 0)
    all_keys = max(row[5] for row in launches)
    of_heads = "all heads" if heads == all_heads else f"{heads} of {all_heads} heads"
    if end - begin == all_keys:
        return f"{of_heads} at {'once' if heads == all_heads else 'a time'}"
    return f"{of_heads} and {end - begin} of {all_keys} keys at a time"


def _why_twice(kernel: Kernel) -> str:
    width = re.search(r"_d(\d+)_", kernel.name)
    if width and int(width[1]) < _NARROW:
        return "which takes less time at this head_dim than to store it"
    budget = scratch_budget_mb()
    if not budget:
        return "since it may take no memory (ORCHARD_BACKWARD_SCRATCH_MB is 0)"
    if "_ranges" in kernel.name:
        return f"since not one query head fits into {budget} MiB"
    return f"since no part of it that fits into {budget} MiB at a time would save time"
