"""The tests that mutants must not survive; test_mutation_tool.py runs every one of them too.

A killer is one fast test: a kernel on one problem, or a property of the plan. It has a name, the
kernel `family` that it needs (None: only the plan), and `run(sources)`, which raises.
"""

from __future__ import annotations

import functools
import itertools

from ..harness import FAMILIES
from . import backward, forward, plan, plan_scores, positions
from .attention import Attention, forward_results, reference
from .compiled import compiled_together, forget_libraries, library_paths, machine_code
from .problems import problems
from .properties import Property

__all__ = ["forget_libraries", "killers", "library_paths", "machine_code", "prepare"]


@functools.cache
def killers() -> tuple[Attention | Property, ...]:
    """All of them; for a kernel, in order of cost."""
    return (
        *plan.properties(),
        *plan_scores.properties(),
        *(k for k in problems() if not k.check),
        *forward.properties(),
        *backward.properties(),
        *positions.properties(),
        *(k for k in problems() if k.check),
        *forward.checked(),
        *backward.checked(),
    )


def prepare() -> None:
    """Computes all references, so that processes forked later share them."""
    for killer in killers():
        if isinstance(killer, Attention):
            reference(killer.case, killer.dlse, killer.shifts)
            forward_results(killer.case, killer.shifts)
    for family, check in itertools.product(FAMILIES, (False, True)):
        compiled_together(family, check)
