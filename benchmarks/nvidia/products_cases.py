"""Shapes at which products.py times five products beside seven."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .peers.problems import Problem
from .plans import Kernel, Plan, Planner, Scoring

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
KV_HEADS = (16, 4, 2, 1)
"""Beside 16 query heads: groups of 1, 4, 8 and 16."""
WINDOW = 1024
BUDGETS = {"325 MiB": 325 << 20, "1170 MiB": 1170 << 20}
"""Scratch for dS: the defaults of a Mac of 16 GB, and of one of 48 GB."""
FIVE = ", five"
"""Behind a budget: dS is stored, where a buffer for it fits, whatever the plan would choose."""
NONE = "none"
"""Without a budget: the low-memory mode, which is seven products."""


@dataclass(frozen=True)
class Case:
    problem: Problem
    #: of a budget, with five products or as the plan chooses
    plans: dict[str, Plan]

    @property
    def distinct(self) -> dict[str, Plan]:
        """Without the budgets under which the launches are those of another one before."""
        return {
            budget: plan for budget, plan in self.plans.items() if self.same_as(budget) == budget
        }

    def same_as(self, budget: str) -> str:
        """The first budget that has the same launches: itself, or one before."""
        launches = self.plans[budget].kernels
        return next(b for b, plan in self.plans.items() if plan.kernels == launches)


def problems() -> Iterator[Problem]:
    """Short ones first: where a run is cut off, the longest are missing."""
    for length in LENGTHS:
        for window, causal in ((WINDOW, True), (0, True), (0, False)):
            if window >= length:
                continue
            for head_dim in (64, 128):
                for num_kv_heads in KV_HEADS:
                    yield Problem(
                        "float16", head_dim, length, causal,
                        num_kv_heads=num_kv_heads, window=window,
                    )  # fmt: skip


def scorings(problem: Problem) -> dict[str, Scoring]:
    """The choice of the plan under each budget, and each way that it could have chosen."""
    found = {}
    for budget, scratch_bytes in BUDGETS.items():
        found[budget] = problem.scoring(scratch_bytes)
        found[budget + FIVE] = problem.scoring(scratch_bytes, stores_ds=True)
    return found | {NONE: problem.scoring(0)}


def case(problem: Problem, planner: Planner) -> Case:
    plans = {
        name: problem.backward_plan(planner, scoring) for name, scoring in scorings(problem).items()
    }
    return Case(problem, plans)


def at_once(plan: Plan) -> tuple[int, int]:
    """Query heads and keys of the first launches, which are all where dS is not stored."""
    (launch, *_) = (k for k in plan.kernels if k.family.startswith("attention_backward_dq"))
    return launch.groups[0], launch.launch.key_end - launch.launch.key_begin


def kernels(planner: Planner) -> dict[str, Kernel]:
    """What all of it runs, by name."""
    found: dict[str, Kernel] = {}
    for problem in problems():
        found |= {kernel.name: kernel for kernel in problem.forward_kernels(planner)}
        for plan in case(problem, planner).plans.values():
            found |= {kernel.name: kernel for kernel in plan.kernels}
    return found
