"""Shapes at which products.py times five products beside seven."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .peers.problems import Problem
from .plans import Kernel, Planner

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
KV_HEADS = (16, 4, 2, 1)
"""Beside 16 query heads: groups of 1, 4, 8 and 16."""
WINDOW = 1024
BUDGETS = {"256 MiB": 256 << 20, "1 GiB": 1 << 30, "none": 0}
"""Scratch for dS: the default, a larger one, and the low-memory mode, which is seven products."""


@dataclass(frozen=True)
class Case:
    problem: Problem
    #: budget -> kernels of the plan in order, one for each launch
    launches: dict[str, list[Kernel]]

    @property
    def distinct(self) -> dict[str, list[Kernel]]:
        """Without the budgets under which the plan is that of another one before."""
        found: dict[str, list[Kernel]] = {}
        for budget, launches in self.launches.items():
            if launches not in found.values():
                found[budget] = launches
        return found

    def same_as(self, budget: str) -> str:
        """The first budget that has the same plan: itself, or one before."""
        return next(b for b, x in self.launches.items() if x == self.launches[budget])


def problems() -> Iterator[Problem]:
    """Short ones first: where a run is cut off, the longest are missing."""
    for length in LENGTHS:
        for window, causal in ((0, True), (WINDOW, True), (0, False)):
            if window >= length:
                continue
            for head_dim in (64, 128):
                for num_kv_heads in KV_HEADS:
                    yield Problem(
                        "float16", head_dim, length, causal,
                        num_kv_heads=num_kv_heads, window=window,
                    )  # fmt: skip


def case(problem: Problem, planner: Planner) -> Case:
    return Case(
        problem,
        {name: problem.backward_kernels(planner, scratch) for name, scratch in BUDGETS.items()},
    )


def kernels(planner: Planner) -> dict[str, Kernel]:
    """What all of it runs, by name."""
    found: dict[str, Kernel] = {}
    for problem in problems():
        launches = [problem.forward_kernels(planner), *case(problem, planner).launches.values()]
        found |= {kernel.name: kernel for of_call in launches for kernel in of_call}
    return found
