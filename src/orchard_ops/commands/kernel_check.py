"""One kernel variant on this machine against float64: what `selftest` and `doctor` run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import plan
from ..ops.schema import public_lse
from ..testing import DTYPES, Case, assert_attention_close, with_strides
from .environment import environment_variables

_STORING_HEAD_DIM = 64  # from here on a backward stores dS
_REFERENCE_HEAD_DIMS = (16, 64, 256)  # of any width it runs the same code

# Whole, ragged and skipped tiles, two query heads for a key/value head, first rows without a key.
_RAGGED = Case(77, 101, batch=2, window_right=0, diagonal=-7)
# Two parts of the keys in the forward, and of a group's heads in dk and dv, on a GPU of many cores.
_DIVIDED = _RAGGED.but(q_len=131, kv_len=517, batch=1, num_heads=8, num_kv_heads=2, diagonal=386)
# In 1 MiB dS of one head fits, but not of two; of one, half of the keys.
_IN_TURNS = {
    "heads in turn": _RAGGED.but(q_len=704, kv_len=512, batch=1, num_kv_heads=2),
    # Rows see nearly all keys: fewer pairs, and dS would not be worth storing in turns.
    "keys in turn": _RAGGED.but(
        kv_len=3400, batch=1, num_heads=1, window_left=40, window_right=-1, diagonal=50
    ),
}


@dataclass(frozen=True)
class Variant:
    """What is compiled or launched in its own way."""

    case: Case
    chunks: bool = True
    """Whether rows begin at multiples of 16 bytes."""
    scratch_mb: int = 64
    """MiB that the backward may store dS in."""
    gpu_cores: str = "1"
    """The cores that it is planned for: one, which any launch fills, so that dS is stored."""
    way: str = ""
    """What it does with less memory, or more cores."""

    def __str__(self) -> str:
        loads = "chunks" if self.chunks else "elements"
        name = str(self.case.dtype).removeprefix("torch.")
        dropout = " dropout" if self.case.dropout_p else ""
        return f"{name} D{self.case.head_dim} {loads}{dropout} {self.way}".rstrip()


@dataclass
class Outcome:
    """One variant's verdict."""

    variant: str
    passed: bool
    message: str
    seconds: float


def variants(quick: bool) -> Iterator[Variant]:
    """All of them, or a few per dtype. Every width of the kernels, where there are kernels."""
    head_dims = (64,) if quick else plan.head_dims() or _REFERENCE_HEAD_DIMS
    for dtype in DTYPES:
        if dtype == torch.float32 or not quick:
            for way, case in _IN_TURNS.items():
                yield Variant(case.but(dtype=dtype, dropout_p=0.1), scratch_mb=1, way=way)
        for head_dim in head_dims:
            for chunks in (True,) if quick else (True, False):
                for dropout_p in (0.1,) if quick else (0.0, 0.1):
                    kind = {"dtype": dtype, "head_dim": head_dim, "dropout_p": dropout_p}
                    case = _RAGGED.but(**kind)
                    yield Variant(case, chunks)
                    if head_dim >= _STORING_HEAD_DIM:
                        yield Variant(case, chunks, scratch_mb=0, way="low memory")
                    if dropout_p and (dtype == torch.float32 or not quick):
                        yield Variant(_DIVIDED.but(**kind), chunks, gpu_cores="64", way="divided")


def check(variant: Variant, device: torch.device, impl: str) -> Outcome:
    """Runs one variant twice (results must be bitwise equal) and applies the tolerance rule."""
    started = time.perf_counter()
    case = variant.case
    operands = case.operands()
    ref, eager = (case.math(dtype, *operands) for dtype in (torch.float64, case.dtype))
    q, k, v, do = (
        x.to(device) if variant.chunks else with_strides(x, "odd_offset", device) for x in operands
    )
    scoring = case.scoring(device)

    def run() -> list[Tensor]:
        ops = torch.ops.orchard
        out, row_stats = ops.flash_attn_fwd(q, k, v, *scoring, impl)
        grads = ops.flash_attn_bwd(do, None, q, k, v, out, row_stats, *scoring, False, impl)
        lse = public_lse(row_stats, scoring.unit)
        return [x.cpu() for x in (out, lse, *grads[:3])]

    try:
        planned = {
            "ORCHARD_BACKWARD_SCRATCH_MB": str(variant.scratch_mb),
            "ORCHARD_GPU_CORES": variant.gpu_cores,
        }
        with environment_variables(**planned):
            first, second = run(), run()
        assert_attention_close(first, ref, eager)
        if not all(torch.equal(a, b) for a, b in zip(first, second)):
            raise AssertionError("two runs differ")
    except (AssertionError, RuntimeError) as error:
        return Outcome(str(variant), False, str(error), time.perf_counter() - started)
    return Outcome(str(variant), True, "", time.perf_counter() - started)
