"""Makes the device fail on purpose."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from . import library

# The numbers of enum Fault in device/faults.h.
_KINDS = {"compile": 0, "function": 1, "dispatch": 2, "allocate": 3, "corrupt_dispatch": 4}


@contextlib.contextmanager
def faults(
    *,
    compile: int | str | None = None,
    function: int | str | None = None,
    dispatch: int | str | None = None,
    allocate: int | str | None = None,
    corrupt_dispatch: int | str | None = None,
) -> Iterator[None]:
    """Inside the block, fails the n-th event of a kind (1 is the first), or ``"all"`` of them.

    compile: creating a shader library. function: making a pipeline from one of its kernels (a
    library keeps its pipelines, so that is once per kernel). dispatch: running a kernel.
    allocate: allocating device memory, or making the result of a borrowed CPU kernel. These
    raise the error that PyTorch raises on a Mac. corrupt_dispatch: the kernel runs and reports
    success, but every 4-byte word that it changed is then overwritten with 0xFF (NaN).

    Blocks nest; each counts from its own beginning. All threads are affected.
    """
    wanted = {
        "compile": compile,
        "function": function,
        "dispatch": dispatch,
        "allocate": allocate,
        "corrupt_dispatch": corrupt_dispatch,
    }
    counts = {kind: _count(kind, when) for kind, when in wanted.items() if when is not None}
    device = library.get()
    rules = [device.simulator_arm_fault(_KINDS[kind], count) for kind, count in counts.items()]
    try:
        yield
    finally:
        for rule in rules:
            device.simulator_disarm_fault(rule)


def _count(kind: str, when: int | str) -> int:
    if when == "all":
        return 0
    if isinstance(when, int) and not isinstance(when, bool) and when >= 1:
        return when
    raise ValueError(f'faults({kind}=...): expected a number from 1 or "all", got {when!r}')
