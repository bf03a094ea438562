"""What the plan asks about this machine's GPU: its cores, and how much memory a backward may borrow
for speed."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

_GIB = 1 << 30
SHARE_OF_MEMORY = 32
"""A backward borrows about this part of the memory at most, for a moment, of one layer at a time:
a small one beside the model, its gradients and its optimizer."""
STEP_MB, BORROWED_MB = 64, 65
"""For each so many MiB of its share a backward borrows the second: the half of dS under a causal
mask has a row of tiles more (native/plan/dscore_scratch.cpp), and so that of lengths which are
powers of two fits."""
LEAST_STEPS, MOST_STEPS = 4, 64
"""The most holds dS of 2^30 scores, which is a launch that fills any GPU."""
LEAST_CORES = 8
"""Of a GPU that says nothing about its cores: a base M1 has 7 or 8 of them."""


class Gpu(NamedTuple):
    """A GPU as torch describes it."""

    cores: int
    memory: int
    """What Metal recommends as the most that a program takes, in bytes; 0: not known."""

    @property
    def scratch_mb(self) -> int:
        """The default of ORCHARD_BACKWARD_SCRATCH_MB."""
        share_mb = (self.memory // SHARE_OF_MEMORY) >> 20
        return min(max(share_mb // STEP_MB, LEAST_STEPS), MOST_STEPS) * BORROWED_MB


def of_machine(ram: int) -> Gpu:
    """The GPU of a Mac of so much memory, of which nothing else is known.

    An estimate: published logs of llama.cpp have Metal recommend two thirds of the memory
    (recommendedMaxWorkingSetSize), or three quarters from 36 GiB on. Newer macOS may say more.
    """
    return Gpu(LEAST_CORES, ram * 3 // 4 if ram >= 36 * _GIB else ram * 2 // 3)


@functools.cache
def here() -> Gpu:
    """The GPU of this machine. It is asked once, when the native library is loaded."""
    if not torch.backends.mps.is_built() or not torch.backends.mps.is_available():
        return Gpu(LEAST_CORES, 0)
    try:
        return Gpu(
            torch.backends.mps.get_core_count() or LEAST_CORES, torch.mps.recommended_max_memory()
        )
    except RuntimeError:  # a virtual machine's GPU may not say
        return Gpu(LEAST_CORES, 0)
