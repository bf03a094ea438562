"""Extra memory of a training step over the length: ``python -m benchmarks.memory``.

A step is out = attention(q, k, v) and the gradients dq, dk, dv for a given dout. Extra is what the
allocator of the simulated device gives out beyond q, k, v and dout, which is what the native code
asks for on a Mac, byte for byte. Kernels are recorded and not executed: a result's values decide no
allocation.

The unfused path is F.scaled_dot_product_attention where PyTorch trains on mps: its math path, as
the dispatcher runs it on the simulated device. Up to a length it is executed there; for every
length its tensors are counted on the meta device, and both counts must be equal where there are
two.

Writes benchmarks/results/memory.json and docs/images/memory.png; ``--plot`` makes only the picture,
from the file. On the GPU: benchmarks/nvidia/memory.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .nvidia.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
PICTURE = ROOT / "docs" / "images" / "memory.png"
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
_EXECUTED_BYTES = 4 << 30
"""The unfused path is executed where it needs no more than this."""

SCRATCH_VARIABLE = "ORCHARD_BACKWARD_SCRATCH_MB"
SCRATCH_BUDGETS_MB = (0,)
"""What the backward may use beside; 0 is the low-memory mode."""


@dataclass(frozen=True)
class Problem:
    """Causal self-attention: q is (B, H, L, D), k and v are (B, Hkv, L, D)."""

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    def __str__(self) -> str:
        heads = f"H{self.num_heads}/{self.num_kv_heads}"
        return f"B{self.batch} {heads} D{self.head_dim} causal {self.dtype}"

    def shapes(self, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of q and of k."""
        return tuple(
            (self.batch, heads, length, self.head_dim)
            for heads in (self.num_heads, self.num_kv_heads)
        )

    def operands(self, length: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and dout, all ones."""
        q_shape, kv_shape = self.shapes(length)
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "device": device}
        q, k, v = (
            torch.ones(shape, **options, requires_grad=True)
            for shape in (q_shape, kv_shape, kv_shape)
        )
        return q, k, v, torch.ones(q_shape, **options)


PROBLEMS = (Problem(1, 8, 8, 64, "float16"), Problem(1, 32, 8, 128, "bfloat16"))


def formula(problem: Problem, length: int) -> dict[str, int]:
    """Bytes of each tensor that a step of ours may allocate in low-memory mode, and no other."""
    q, kv = (torch.Size(shape).numel() for shape in problem.shapes(length))
    size = getattr(torch, problem.dtype).itemsize
    rows = problem.batch * problem.num_heads * length * 4  # float32
    return {
        "out": size * q,
        "lse": rows,
        "delta": rows,
        "dq": size * q,
        "dk": size * kv,
        "dv": size * kv,
    }


@dataclass(frozen=True)
class Allocated:
    """By one training step, in bytes."""

    peak: int
    """At once."""
    total: int
    """Of all allocations."""


Step = Callable[[Tensor, Tensor, Tensor, Tensor], object]


def our_step(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> object:
    out = torch.ops.orchard.flash_attn(q, k, v, is_causal=True)
    return out, torch.autograd.grad(out, (q, k, v), dout)


def unfused_step(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> object:
    with sdpa_kernel(SDPBackend.MATH):
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out, torch.autograd.grad(out, (q, k, v), dout)


def on_simulated_device(step: Step, problem: Problem, length: int, execute: bool) -> Allocated:
    """What the simulated device's allocator reports; without `execute` no kernel of ours runs."""
    import simulator

    with contextlib.nullcontext() if execute else simulator.recording(execute=False):
        operands = problem.operands(length, "mps")
        before = simulator.memory()
        simulator.reset_peak()
        results = step(*operands)
        after = simulator.memory()
        del results
    return Allocated(after.peak - before.allocated, after.total - before.total)


class _Storages(TorchDispatchMode):
    """Counts the storages that operators return, for as long as they live."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._given = {StorageWeakRef(x.untyped_storage()).cdata for x in inputs}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._safe_softmax.default:
            with self:  # one operator to this mode, but it runs others
                return _safe_softmax(*args, **(kwargs or {}))
        results = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for x in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(x, Tensor):
                self._add(x)
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return results

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in self._given and reference.cdata not in self._alive:
            self._alive[reference.cdata] = reference, storage.nbytes()
            self.total += storage.nbytes()


def _safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """As ATen/native/transformers/attention.cpp."""
    out = torch.softmax(x, dim, dtype=dtype)
    minus_infinity = torch.scalar_tensor(-torch.inf, dtype=out.dtype, device=out.device)
    empty = torch.all(x.eq(minus_infinity), dim, keepdim=True)
    zero = torch.scalar_tensor(0.0, dtype=out.dtype, device=out.device)
    return torch.where(empty, zero, out)


def on_meta_device(step: Step, problem: Problem, length: int) -> Allocated:
    """The tensors that the operators of the step return, without any memory."""
    operands = problem.operands(length, "meta")
    with _Storages(operands) as storages:
        results = step(*operands)
    del results
    return Allocated(storages.peak, storages.total)


@contextlib.contextmanager
def scratch_budget(megabytes: int) -> Iterator[None]:
    """The backward's scratch budget for the block."""
    before = os.environ.get(SCRATCH_VARIABLE)
    os.environ[SCRATCH_VARIABLE] = str(megabytes)
    try:
        yield
    finally:
        if before is None:
            del os.environ[SCRATCH_VARIABLE]
        else:
            os.environ[SCRATCH_VARIABLE] = before


def check_ours(measured: Allocated, expected: int, budget_mb: int) -> None:
    """Exactly the formula's bytes, each allocated once, plus at most the scratch budget.

    Raises:
        AssertionError: something else was allocated.
    """
    for name, nbytes in asdict(measured).items():
        scratch = nbytes - expected
        if not 0 <= scratch <= budget_mb << 20:
            raise AssertionError(
                f"{name}: {nbytes} bytes, the formula has {expected} and a scratch of at most "
                f"{budget_mb << 20}"
            )


def measure(problem: Problem, length: int) -> dict[str, Any]:
    """A record of the result file."""
    terms = formula(problem, length)
    ours = []
    for budget_mb in SCRATCH_BUDGETS_MB:
        with scratch_budget(budget_mb):
            measured = on_simulated_device(our_step, problem, length, execute=False)
        check_ours(measured, sum(terms.values()), budget_mb)
        ours.append({"scratch_budget_mb": budget_mb} | asdict(measured))
    counted = on_meta_device(unfused_step, problem, length)
    executed = counted.peak <= _EXECUTED_BYTES
    if executed:
        found = on_simulated_device(unfused_step, problem, length, execute=True)
        if found != counted:
            raise AssertionError(f"unfused, L {length}: {found} executed, {counted} counted")
    return {
        "problem": str(problem),
        "length": length,
        "formula": terms,
        "ours": ours,
        "unfused": {"executed": executed} | asdict(counted),
    }


def enable_simulator() -> None:
    """The simulated device with this repository's native library, before orchard_ops is loaded."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]
    os.environ.setdefault(
        "ORCHARD_NATIVE_LIBRARY", str(ROOT / "build" / "native" / "liborchard_ops.so")
    )
    import simulator

    simulator.enable()
    import orchard_ops

    q, k, v, _ = PROBLEMS[0].operands(64, "mps")
    explanation = orchard_ops.explain(q, k, v, is_causal=True)
    if explanation.path != "metal":
        raise RuntimeError(f"ours would not run as Metal kernels: {explanation.reason}")


def write(records: list[dict[str, Any]], path: Path) -> None:
    """A line for each record."""
    head = {"torch": torch.__version__, "ours": "simulated mps device's allocator, recorded"}
    lines = ",\n".join(json.dumps(record) for record in records)
    path.write_text(f'{{"environment": {json.dumps(head)},\n"records": [\n{lines}\n]}}\n')


def plot(result: dict[str, Any], path: Path) -> None:
    """Both paths over the length, a panel for each problem."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    problems = list(dict.fromkeys(record["problem"] for record in result["records"]))
    figure = Figure(figsize=(4.4 * len(problems), 3.9), layout="constrained")
    panels = figure.subplots(1, len(problems), sharey=True, squeeze=False)[0]
    for axes, problem in zip(panels, problems):
        records = [r for r in result["records"] if r["problem"] == problem]
        lengths = [r["length"] for r in records]
        unfused = [r["unfused"]["peak"] / 2**20 for r in records]
        axes.plot(lengths, unfused, "s--", color="tab:orange", label="PyTorch, math path")
        for index, mode in enumerate(records[0]["ours"]):
            budget = mode["scratch_budget_mb"]
            label = "orchard_ops" + (f", scratch up to {budget} MiB" if budget else ", no scratch")
            peaks = [r["ours"][index]["peak"] / 2**20 for r in records]
            axes.plot(lengths, peaks, "o-", color=("tab:blue", "tab:cyan")[index % 2], label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("L")
        axes.set_title(problem, fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("MiB beyond q, k, v, dout, at the peak")
    panels[0].legend(fontsize=8)
    figure.suptitle("extra memory of a training step (simulated mps device's allocator)", size=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", action="store_true", help="only the picture, from the file")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    options = parser.parse_args()
    if not options.plot:
        enable_simulator()
        records = []
        for problem in PROBLEMS:
            for length in options.lengths:
                record = measure(problem, length)
                ours, unfused = record["ours"][0]["peak"], record["unfused"]["peak"]
                how = "executed and counted" if record["unfused"]["executed"] else "counted"
                print(
                    f"{problem} L{length}: ours {ours / 2**20:.1f} MiB, "
                    f"unfused {unfused / 2**20:.1f} MiB ({how}), {unfused / ours:.1f} times",
                    flush=True,
                )
                records.append(record)
        write(records, RESULTS)
    plot(json.loads(RESULTS.read_text()), PICTURE)


if __name__ == "__main__":
    main()
