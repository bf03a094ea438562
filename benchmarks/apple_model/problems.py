"""How much a kernel does on a problem: threadgroups and blocks, as its loops count them."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

from .structures import BackwardDkv


@dataclass(frozen=True)
class Problem:
    """Self-attention, top-left causal where said."""

    length: int
    heads: int = 16  #: batch times heads
    causal: bool = True

    def __str__(self) -> str:
        return f"B*H {self.heads}, L {self.length}, {'causal' if self.causal else 'dense'}"


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def blocks(kernel: Any, problem: Problem) -> list[int]:
    """Blocks of each threadgroup of one head, in launch order (heaviest first where causal)."""
    n = problem.length
    if isinstance(kernel, BackwardDkv):
        every = _ceil(n, kernel.bq)
        begins = range(0, n, kernel.keys)
        return [every - (key // kernel.bq if problem.causal else 0) for key in begins]
    ends = [min(row + kernel.bq, n) for row in range(0, n, kernel.bq)]
    return [_ceil(end if problem.causal else n, kernel.bk) for end in reversed(ends)]


def products(kernel: Any, products_of_block: float, problem: Problem) -> float:
    """8x8x8 products of the whole problem; products_of_block are those of one simdgroup."""
    return sum(blocks(kernel, problem)) * products_of_block * kernel.simdgroups * problem.heads


def tail(kernel: Any, problem: Problem, slots: int) -> float:
    """Time of `slots` resident threadgroups, filled in launch order (heads run fastest), over that
    of evenly spread work. An upper bound: the last threadgroups of a core run faster alone."""
    work = [n for n in blocks(kernel, problem) for _ in range(problem.heads)]
    free = [0.0] * slots
    for n in work:
        heapq.heappush(free, heapq.heappop(free) + n)
    return max(free) / (sum(work) / slots)
