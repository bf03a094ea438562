"""How a peer's kernels are described: the CPU engine and the GPU launch them from the same."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..workloads import DTYPES
from .problems import Problem

RESULTS = {False: ("out", "lse"), True: ("dq", "dk", "dv")}
"""What a forward (False) and a backward (True) may write."""


@dataclass(frozen=True)
class Text:
    """A Metal source, and the options of engine.compile and ptx.compile that it needs."""

    source: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One launch. ``buffers`` maps indices to names of operands; those in ``writes`` are results.

    ``text`` reads the peer's package, which the GPU's machine need not have.
    """

    part: str  # forward, delta, dq or dkv
    kernel: str
    groups: tuple[int, int, int]
    threads: tuple[int, ...]
    buffers: dict[int, str]
    writes: tuple[str, ...]
    params: tuple[int, ctypes.Structure]
    text: Callable[[], Text]


@dataclass(frozen=True)
class Entrant:
    """A peer in one configuration, forward or backward."""

    peer: str
    variant: str
    backward: bool
    steps: tuple[Step, ...]
    #: whether the peer's own interface takes this dtype and mask; its text does in any case
    offered: bool = True
    #: it rounds the scaled query to the operands' dtype, and is judged from that
    rounded_query: bool = False
    #: our kernel stands in for the operations by which the peer computes delta
    borrows_delta: bool = False
    #: results that it sums up in float32 from zeros, and casts at the end
    wide: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.peer} {self.variant}".strip()


def blocks(length: int, size: int) -> int:
    return -(-length // size)


def small_operands(problem: Problem, device: str) -> dict[str, Tensor]:
    """The arrays of a few numbers that some kernels read."""

    def whole(numbers: tuple[int, ...]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    return {
        "q_sizes": whole(problem.sizes()),
        "k_sizes": whole(problem.sizes(of_keys=True)),
        "rows": whole((0, problem.length)),
    }


def result(problem: Problem, name: str, device: str, wide: bool = False) -> Tensor:
    """Full of NaN, for a kernel to write."""
    sizes = problem.sizes(of_keys=name in ("dk", "dv"))
    if name in ("lse", "delta"):
        return torch.full(sizes[:3], torch.nan, device=device)
    dtype = torch.float32 if wide else DTYPES[problem.dtype]
    return torch.full(sizes, torch.nan, dtype=dtype, device=device)
