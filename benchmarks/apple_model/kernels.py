"""From the plan's kernels to their structures, and the check that both say the same."""

from __future__ import annotations

from typing import Any

from .core_model import Parameters
from .counts import DKV, DQ, FORWARD, PREFILL, Counts, Variant, variant
from .peers import prefill
from .structures import METAL, BackwardDkv, BackwardDq, Forward, Structure

FAMILIES = (PREFILL, FORWARD, DQ, DKV)

#: What a trace and the engine's counts must agree on exactly.
CHECKED = (
    "mma_half", "mma_bfloat", "mma_float", "exp2", "shuffle", "barrier", "fcvt",
    "threadgroup_bytes_read", "threadgroup_bytes_written",
    "device_bytes_read", "device_bytes_written",
)  # fmt: skip


def structure_of(v: Variant) -> Structure:
    """The structure of a kernel of the plan, from its template arguments (shaders/*.h)."""
    arguments = v.arguments
    dtype, operand, head_dim = arguments[0], arguments[1], int(arguments[2])
    common = dict(
        dtype=dtype,
        head_dim=head_dim,
        score_operand=operand,
        value_operand=operand,
        simdgroups=v.simdgroups,
        chains=4 if dtype == "float" else 1,
    )
    if v.family == FORWARD:
        return Forward(**common, rows=int(arguments[3]), bk=v.bk, keep_q=head_dim <= 128)
    if v.family == DQ:
        return BackwardDq(**common, rows=int(arguments[3]), bk=v.bk, keep=head_dim <= 64)
    return BackwardDkv(**common, bq=v.bq, keep=head_dim <= 64)


def structure(family: str, dtype: str, head_dim: int) -> Any:
    """A Structure of ours, or PyTorch's Prefill."""
    if family == PREFILL:
        return prefill(METAL[dtype], head_dim)
    return structure_of(variant(family, dtype, head_dim))


def disagreements(kernel: Any, counts: Counts) -> dict[str, tuple[float, float]]:
    """What the trace says and what the engine counted, where they differ."""
    trace = kernel.trace(Parameters())
    said = {name: float(trace.counts.get(name, 0)) for name in CHECKED}
    found = {name: counts.steady.get(name, 0.0) for name in CHECKED}
    said["threadgroup_memory"] = float(kernel.threadgroup_bytes())
    found["threadgroup_memory"] = float(counts.threadgroup_bytes)
    return {x: (said[x], found[x]) for x in said if abs(said[x] - found[x]) > 1e-3}
