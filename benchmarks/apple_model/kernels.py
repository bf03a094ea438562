"""From the plan's kernels to their structures, and the check that both say the same."""

from __future__ import annotations

from functools import cache
from typing import Any

from .core_model import Parameters
from .counts import (
    DKV,
    DKV_PAIRS,
    DKV_PAIRS_STORING,
    DKV_STORING,
    DQ,
    DQ_FROM_DS,
    FORWARD,
    PREFILL,
    Counts,
    Variant,
    count,
    variant,
)
from .issue_model import issue
from .peers import prefill
from .structures import (
    METAL,
    BackwardDkv,
    BackwardDkvPairs,
    BackwardDq,
    BackwardDqStored,
    Forward,
    Structure,
    keeps,
)

BACKWARD = (DKV, DKV_PAIRS, DKV_STORING, DKV_PAIRS_STORING, DQ, DQ_FROM_DS)  #: that have a loop
FAMILIES = (PREFILL, FORWARD, *BACKWARD)

#: What a trace and the engine's counts must agree on exactly.
CHECKED = (
    "mma_half",
    "mma_bfloat",
    "mma_float",
    "exp2",
    "shuffle",
    "barrier",
    "fcvt",
    "threadgroup_bytes_read",
    "threadgroup_bytes_written",
    "device_bytes_read",
    "device_bytes_written",
)


def structure_of(v: Variant, address_cycles: float = 20.0) -> Structure:
    """The structure of a kernel of the plan, from its template arguments (shaders/*.h)."""
    a = v.arguments
    dtype, operand, head_dim = a[0], a[1], int(a[2])
    common = dict(
        dtype=dtype,
        head_dim=head_dim,
        score_operand=operand,
        value_operand=operand,
        simdgroups=v.simdgroups,
        chains=4 if dtype == "float" else 1,
        address_cycles=address_cycles,
    )
    if v.family == FORWARD:
        rows = int(a[3])
        keep = keeps(1, 1, rows, head_dim, operand)
        return Forward(**common, rows=rows, bk=v.bk, keep_q=keep, buffers=int(a[5]))
    if v.family == DQ:
        rows = int(a[3])
        return BackwardDq(**common, rows=rows, bk=v.bk, keep=keeps(1, 2, rows, head_dim, operand))
    if v.family == DQ_FROM_DS:
        return BackwardDqStored(**common, rows=int(a[3]), bk=v.bk)
    key_side = dict(bq=v.bq, store=a[4] == "true")
    if v.family == DKV_PAIRS:
        common["value_operand"] = "float"
        return BackwardDkvPairs(**common, **key_side, keep=keeps(1, 1, 1, head_dim, operand))
    return BackwardDkv(**common, **key_side)


#: A block of PyTorch's kernel takes so many of Parameters.address (peers.py).
PREFILL_ADDRESS = 30.0


def _address(family: str, dtype: str, head_dim: int) -> float:
    parts = issue(family, count(family, dtype, head_dim)).parts
    return parts["address"] + parts["branch"]


@cache
def address_cycles(family: str, dtype: str, head_dim: int) -> float:
    """The cycles for addresses and branches, in the unit that the fit knows from PyTorch's
    kernel."""
    counted = _address(family, dtype, head_dim)
    return PREFILL_ADDRESS * counted / _address(PREFILL, "float16", 128)


def structure(family: str, dtype: str, head_dim: int) -> Any:
    """A Structure of ours, or PyTorch's Prefill."""
    if family == PREFILL:
        return prefill(METAL[dtype], head_dim)
    v = variant(family, dtype, head_dim)
    return structure_of(v, address_cycles(family, dtype, head_dim))


def disagreements(kernel: Any, counts: Counts) -> dict[str, tuple[float, float]]:
    """The numbers of the trace and of the engine's counts that differ."""
    counted = kernel.trace(Parameters()).mean_counts
    said = {name: float(counted.get(name, 0)) for name in CHECKED}
    found = {name: counts.steady.get(name, 0.0) for name in CHECKED}
    said["threadgroup_memory"] = float(kernel.threadgroup_bytes())
    found["threadgroup_memory"] = float(counts.threadgroup_bytes)
    return {x: (said[x], found[x]) for x in said if abs(said[x] - found[x]) > 1e-3}
