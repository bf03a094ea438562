"""Extra memory of a training step on an NVIDIA GPU: ``python -m benchmarks.nvidia.memory``.

Ours are the Metal kernels through PTX as attention.py runs them, the unfused path is
F.scaled_dot_product_attention on PyTorch's math backend. Bytes are those that were requested from
torch's allocator; "allocated_peak" is torch.cuda.max_memory_allocated, which rounds to blocks.
Needs what build.py made. Writes benchmarks/results/nvidia/memory.json, a table of it, and
docs/images/memory-nvidia.png; ``--plot`` makes only table and picture, from the file.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .. import memory
from ..memory import Allocated, Problem
from .paths import KERNELS, PLANNER, RESULTS, ROOT, SOURCES

sys.path.insert(0, str(ROOT / "src"))

from .attention import Attention, Guarded
from .driver import Kernels
from .environment import describe
from .plans import Params, Planner, Scoring

_RESULT = RESULTS / "memory.json"
_PICTURE = ROOT / "docs" / "images" / "memory-nvidia.png"


class Unguarded(Guarded):
    """Allocates what native/attention.cpp does, without margins."""

    def empty(self, sizes: list[int], strides: list[int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(sizes, strides, dtype=dtype, device=self.device)


def _scoring(q: Tensor, budget_mb: int) -> Scoring:
    return Scoring(q.shape[3] ** -0.5, window_right=0, scratch_bytes=budget_mb << 20)


def our_step(attention: Attention, budget_mb: int) -> memory.Step:
    def step(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> object:
        scoring = _scoring(q, budget_mb)
        out, row_stats = attention.forward(q, k, v, scoring)
        return out, attention.backward(dout, None, q, k, v, out, row_stats, scoring)

    return step


def planned_bytes(
    planner: Planner, problem: Problem, length: int, budget_mb: int
) -> tuple[int, int]:
    """The bytes of the scratch, and of the parameters of all launches.

    The parameters are tensors here, which they are not on a Mac.
    """
    q, k, v, dout = problem.operands(length, "meta")
    scoring = _scoring(q, budget_mb)
    forward = planner.forward(q, k, v, q, scoring)
    backward = planner.backward(q, k, v, q, dout, scoring)
    launches = len(forward.kernels) + len(backward.kernels)
    scratch = backward.ds_elements + backward.dkv_part_elements
    return scratch * torch.float32.itemsize, launches * ctypes.sizeof(Params)


def _stat(name: str) -> int:
    return torch.cuda.memory_stats()[name]


def measure_step(
    step: memory.Step, problem: Problem, length: int, check: Callable[[Any], None] | None = None
) -> tuple[Allocated, int]:
    """Requested bytes, and the allocator's own peak. ``check`` sees the step's results."""
    operands = problem.operands(length, "cuda")
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    names = ("requested_bytes.all.current", "requested_bytes.all.allocated")
    current, total = map(_stat, names)
    allocated = torch.cuda.memory_allocated()
    results = step(*operands)
    torch.cuda.synchronize()
    peak = _stat("requested_bytes.all.peak") - current
    found = Allocated(peak, _stat(names[1]) - total)
    allocated = torch.cuda.max_memory_allocated() - allocated
    if check is not None:
        check(results)
    return found, allocated


def _check_values(results: Any) -> None:
    """All operands are ones: every output is one."""
    out, (_, _, dv) = results
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0.02, atol=0.0)
    if not torch.isfinite(dv).all():
        raise AssertionError("dv: NaN or infinity")


def measure(
    attention: Attention, planner: Planner, problem: Problem, length: int
) -> dict[str, Any]:
    """A record of the result file."""
    terms = memory.formula(problem, length)
    ours = []
    for budget_mb in memory.SCRATCH_BUDGETS_MB:
        step = our_step(attention, budget_mb)
        found, allocated = measure_step(step, problem, length, _check_values)
        scratch_bytes, parameters = planned_bytes(planner, problem, length, budget_mb)
        memory.check_ours(found, sum(terms.values()), scratch_bytes, budget_mb, parameters)
        scratch = {"scratch_budget_mb": budget_mb, "scratch_bytes": scratch_bytes}
        ours.append(scratch | asdict(found) | {"allocated_peak": allocated})
    unfused: dict[str, Any] = {"peak": None, "total": None, "allocated_peak": None}
    try:
        found, allocated = measure_step(memory.unfused_step, problem, length)
        unfused = asdict(found) | {"allocated_peak": allocated}
    except torch.OutOfMemoryError as error:
        unfused["out of memory"] = str(error).split(". ")[0]
    return {
        "problem": str(problem),
        "length": length,
        "formula": terms,
        "ours": ours,
        "unfused": unfused,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", action="store_true", help="only table and picture, from the file")
    parser.add_argument("--lengths", nargs="+", type=int, default=memory.LENGTHS)
    options = parser.parse_args()
    if not options.plot:
        planner = Planner(PLANNER)
        attention = Attention(Kernels(KERNELS), planner)
        attention.outputs = Unguarded
        for problem in memory.PROBLEMS:  # loads kernels and the workspaces of cuBLAS
            for budget_mb in memory.SCRATCH_BUDGETS_MB:
                measure_step(our_step(attention, budget_mb), problem, 256)
            measure_step(memory.unfused_step, problem, 256)
        records = []
        for problem in memory.PROBLEMS:
            for length in options.lengths:
                records.append(measure(attention, planner, problem, length))
                print(json.dumps(records[-1]), flush=True)
        RESULTS.mkdir(parents=True, exist_ok=True)
        environment = describe(SOURCES)
        environment["measured"] = f"{environment['gpu']}, torch's allocator"
        memory.write(environment, records, _RESULT)
    memory.show(_RESULT, _PICTURE)


if __name__ == "__main__":
    main()
