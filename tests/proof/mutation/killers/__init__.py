"""The tests that mutants must not survive; test_mutation_tool.py runs every one of them too.

A killer is one fast test: a kernel on one problem, or a property of the plan. It has a name, the
kernel `family` that it needs (None: only the plan), and `run(sources)`, which raises.
"""

from __future__ import annotations

import functools
import itertools

from ..harness import DECODE, FAMILIES, FORWARD
from . import (
    backward,
    cache_parts,
    caches,
    divided_groups,
    far_masks,
    few_queries,
    flex,
    forward,
    forward_parts,
    hidden_runs,
    infinities,
    long_sums,
    mask_sums,
    plan,
    plan_scores,
    positions,
    products,
    scores,
    tanh,
)  # fmt: skip
from .attention import Attention, forward_results, reference
from .compiled import (
    compiled_together,
    forget_libraries,
    library_paths,
    lines_of,
    machine_code,
    used_kernels,
    used_libraries,
)
from .problems import problems
from .properties import Property

__all__ = [
    "forget_libraries",
    "killers",
    "killers_of_caches",
    "killers_of_flex",
    "library_paths",
    "lines_of",
    "machine_code",
    "prepare",
    "use_those_of_caches",
    "use_those_of_flex",
    "used_kernels",
    "used_libraries",
]
_of_caches = False
_of_flex = False


def use_those_of_caches() -> None:
    """From here on `killers` are those of the ops for caches, and of forwards on their kernels."""
    global _of_caches
    _of_caches = True
    killers.cache_clear()


def use_those_of_flex() -> None:
    """From here on `killers` are those of scores that are functions."""
    global _of_flex
    _of_flex = True
    killers.cache_clear()


def killers_of_caches() -> tuple[Property | caches.Filled | caches.Appended | few_queries.Few, ...]:
    """Those of the ops for caches, and of forwards on their kernels."""
    return (
        *caches.killers(),
        *cache_parts.killers(),
        *few_queries.killers(),
        *tanh.killers(DECODE),
    )


def killers_of_flex() -> tuple[flex.Flexed | Property, ...]:
    """Those of scores that are functions."""
    return flex.killers()


@functools.cache
def killers() -> tuple[
    Attention | Property | scores.Scored | caches.Filled | few_queries.Few | flex.Flexed, ...
]:
    """All of them; for a kernel, in order of cost."""
    if _of_flex:
        return killers_of_flex()
    if _of_caches:
        return killers_of_caches()
    return (
        *plan.properties(),
        *plan_scores.properties(),
        *products.properties(),
        *(k for k in problems() if not k.check),
        *forward.properties(),
        *forward_parts.properties(),
        *backward.properties(),
        *divided_groups.properties(),
        *infinities.properties(),
        *positions.properties(),
        *mask_sums.properties(),
        *far_masks.properties(),
        *long_sums.properties(),
        *hidden_runs.killers(),
        *tanh.killers(FORWARD),
        # Of decoding, which alone asks for a group's first query head.
        *(k for k in few_queries.killers() if k.name == "few: a mask"),
        *scores.killers(),
        *(k for k in problems() if k.check),
        *forward.checked(),
        *forward_parts.checked(),
        *backward.checked(),
        *divided_groups.checked(),
        *mask_sums.checked(),
        *hidden_runs.checked(),
        *scores.checked(),
    )


def prepare() -> None:
    """Computes all references, so that processes forked later share them."""
    if _of_caches or _of_flex:
        return
    for killer in killers():
        if isinstance(killer, Attention):
            reference(killer.case, killer.dlse, killer.shifts)
            forward_results(killer.case, killer.shifts)
        elif isinstance(killer, scores.Scored):
            scores.left_by_the_repository(killer.problem)
    for family, check in itertools.product(FAMILIES, (False, True)):
        compiled_together(family, check)
