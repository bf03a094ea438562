"""Attention kernels that others wrote for Apple GPUs, run beside ours: see README.md."""

from __future__ import annotations

from collections.abc import Iterator

from . import mfa_v2, mlx, mlx_mfa, mlx_train_perf, pytorch
from .launches import Entrant, Step
from .problems import Problem

_MODULES = (pytorch, mlx, mlx_mfa, mfa_v2, mlx_train_perf)


def entrants(problem: Problem) -> Iterator[Entrant]:
    """Every way in which a peer's kernels compute this problem."""
    for module in _MODULES:
        yield from module.entrants(problem)


def steps(problem: Problem) -> dict[str, Step]:
    """What the peers launch for it, by kernel."""
    return {step.kernel: step for entrant in entrants(problem) for step in entrant.steps}
