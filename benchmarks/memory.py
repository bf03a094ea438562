"""Extra memory of a training step over the length: ``python -m benchmarks.memory``.

A step is out = attention(q, k, v) and the gradients dq, dk, dv for a given dout. Extra is what the
allocator of the simulated device gives out beyond q, k, v and dout, which is what the native code
asks for on a Mac, byte for byte. Kernels are recorded and not executed: a result's values decide no
allocation.

The unfused path is F.scaled_dot_product_attention where PyTorch trains on mps: its math path, as
the dispatcher runs it on the simulated device. Up to a length it is executed there; for every
length its tensors are counted on the meta device, and both counts must be equal where there are
two.

Writes benchmarks/results/memory.json, a table of it, and docs/images/memory.png; ``--plot`` makes
only table and picture, from the file. On a GPU: benchmarks/nvidia/memory.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
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

_PATIENCE = 10  # seconds

SCRATCH_VARIABLE = "ORCHARD_BACKWARD_SCRATCH_MB"
SCRATCH_BUDGETS_MB = (0, 260)
"""What the backward may store dS in: nothing, the low-memory mode, or the default."""


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
        """The shapes of q and of k."""
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
    """Bytes of each tensor that a step of ours allocates beside the backward's scratch for dS."""
    from orchard_ops.training_memory import AttentionLayer

    layer = AttentionLayer(
        problem.num_heads, problem.num_kv_heads, problem.head_dim, problem.dtype, problem.batch
    )
    return layer.kept(length) | layer.backward(length)


@dataclass(frozen=True)
class Allocated:
    """The memory that one training step takes, in bytes."""

    peak: int
    """The most bytes held at once."""
    total: int
    """The bytes of all allocations."""


Step = Callable[[Tensor, Tensor, Tensor, Tensor], object]


def our_step(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> object:
    out = torch.ops.orchard.flash_attn(q, k, v, is_causal=True, enable_gqa=True)
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
        idle = simulator.memory().allocated
        operands = problem.operands(length, "mps")
        before = simulator.memory()
        simulator.reset_peak()
        results = step(*operands)
        after = simulator.memory()
        del results, operands
    until = time.monotonic() + _PATIENCE  # autograd's thread releases the gradients a little later
    while simulator.memory().allocated != idle:
        if time.monotonic() > until:
            raise AssertionError("the step leaves memory behind")
        time.sleep(0.01)
    return Allocated(after.peak - before.allocated, after.total - before.total)


class _Storages(TorchDispatchMode):
    """The most bytes of storages that operators return, inputs apart, alive at once.

    It is not their sum over time: under a mode PyTorch's math path adds the mask in a new tensor,
    which replaces the old one.
    """

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._given = {StorageWeakRef(x.untyped_storage()).cdata for x in inputs}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._safe_softmax.default:
            with self:  # this mode sees one operator, which runs others
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


def _safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """The operators that torch 2.13 runs inside; `measure` compares with the device."""
    out = torch.softmax(x, dim, dtype=dtype)
    zero = torch.scalar_tensor(0.0, dtype=out.dtype, device=out.device)
    empty = torch.all(x.eq(-torch.inf), dim, keepdim=True)
    return out.masked_fill_(empty, zero)


def peak_on_meta_device(step: Step, problem: Problem, length: int) -> int:
    """Counts the bytes of the tensors that the operators of the step return."""
    operands = problem.operands(length, "meta")
    with _Storages(operands) as storages:
        results = step(*operands)
    del results
    return storages.peak


def scratch_budget(megabytes: int) -> contextlib.AbstractContextManager[None]:
    """The backward's scratch budget for the block."""
    from orchard_ops.commands.environment import environment_variables

    return environment_variables(**{SCRATCH_VARIABLE: str(megabytes)})


def planned_scratch(problem: Problem, length: int) -> int:
    """Bytes of the plan's scratch, on the simulated device with the budget of this moment."""
    import orchard_ops

    q, k, v, _ = problem.operands(length, "mps")
    return orchard_ops.explain(q, k, v, is_causal=True, enable_gqa=True).scratch_bytes


def check_ours(
    measured: Allocated, expected: int, scratch_bytes: int, budget_mb: int, others: int = 0
) -> None:
    """Checks that exactly the formula's bytes and the plan's scratch were allocated, each once.

    `others` is the most bytes that may be allocated besides, by something that is known.

    Raises:
        AssertionError: something else was allocated, or the scratch is above its budget.
    """
    if not 0 <= scratch_bytes <= budget_mb << 20:
        raise AssertionError(f"a scratch of {scratch_bytes} bytes, the budget is {budget_mb} MiB")
    for name, nbytes in asdict(measured).items():
        if not 0 <= nbytes - expected - scratch_bytes <= others:
            raise AssertionError(
                f"{name}: {nbytes} bytes, the formula has {expected} and the plan's scratch "
                f"{scratch_bytes}"
            )


def measure(problem: Problem, length: int) -> dict[str, Any]:
    """A record of the result file."""
    terms = formula(problem, length)
    ours = []
    for budget_mb in SCRATCH_BUDGETS_MB:
        with scratch_budget(budget_mb):
            scratch_bytes = planned_scratch(problem, length)
            measured = on_simulated_device(our_step, problem, length, execute=False)
        check_ours(measured, sum(terms.values()), scratch_bytes, budget_mb)
        scratch = {"scratch_budget_mb": budget_mb, "scratch_bytes": scratch_bytes}
        ours.append(scratch | asdict(measured))
    peak = peak_on_meta_device(unfused_step, problem, length)
    executed = peak <= _EXECUTED_BYTES
    if executed:
        found = on_simulated_device(unfused_step, problem, length, execute=True).peak
        if found != peak:
            raise AssertionError(f"unfused, L {length}: {found} bytes executed, {peak} counted")
    return {
        "problem": str(problem),
        "length": length,
        "formula": terms,
        "ours": ours,
        "unfused": {"executed": executed, "peak": peak},
    }


def enable_simulator() -> None:
    """The simulated device with this repository's native library, before orchard_ops is loaded."""
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
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


def write(environment: dict[str, Any], records: list[dict[str, Any]], path: Path) -> None:
    """A line for each record. `environment` says under "measured" where that was."""
    lines = ",\n".join(json.dumps(record) for record in records)
    path.write_text(f'{{"environment": {json.dumps(environment)},\n"records": [\n{lines}\n]}}\n')


def _mode(ours: dict[str, Any]) -> str:
    budget = ours["scratch_budget_mb"]
    return f"scratch up to {budget} MiB" if budget else "no scratch"


def plot(result: dict[str, Any], path: Path) -> None:
    """Both paths over the length, a panel for each problem; no point where memory ran out."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    problems = list(dict.fromkeys(record["problem"] for record in result["records"]))
    figure = Figure(figsize=(4.4 * len(problems), 3.9), layout="constrained")
    panels = figure.subplots(1, len(problems), sharey=True, squeeze=False)[0]
    for axes, problem in zip(panels, problems):
        records = [r for r in result["records"] if r["problem"] == problem]
        lengths = [r["length"] for r in records]
        fitted = [r for r in records if r["unfused"]["peak"] is not None]
        counted = [r for r in fitted if not r["unfused"].get("executed", True)]
        for some, marker, color, size, label in (
            (fitted, "s--", "tab:orange", 6, "PyTorch, math path"),
            (counted, "s", "white", 3, "(white inside: counted, not executed)"),
        ):
            if some:
                peaks = [r["unfused"]["peak"] / 2**20 for r in some]
                lengths_of = [r["length"] for r in some]
                axes.plot(lengths_of, peaks, marker, color=color, markersize=size, label=label)
        for record in records:
            if record not in fitted:
                axes.text(
                    record["length"],
                    0.98,
                    "out of\nmemory",
                    color="tab:orange",
                    fontsize=7,
                    ha="center",
                    va="top",
                    transform=axes.get_xaxis_transform(),
                )
        for index, mode in enumerate(records[0]["ours"]):
            peaks = [r["ours"][index]["peak"] / 2**20 for r in records]
            color, line = (("tab:blue", "o-"), ("tab:cyan", "d:"))[index % 2]
            label = f"orchard_ops, {_mode(mode)}"
            axes.plot(lengths, peaks, line, color=color, markersize=6 - 2 * index, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("L")
        axes.set_title(problem, fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("MiB beyond q, k, v, dout, at the peak")
    panels[0].legend(fontsize=8)
    where = result["environment"]["measured"]
    figure.suptitle(f"extra memory of a training step ({where})", size=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def table(result: dict[str, Any], command: str) -> str:
    """As Markdown."""
    environment, records = result["environment"], result["records"]
    modes = [_mode(mode) for mode in records[0]["ours"]]
    columns = ["problem", "L", "formula without scratch", *(f"ours, {mode}" for mode in modes)]
    columns += ["PyTorch's math path", *(f"that / ours, {mode}" for mode in modes)]
    lines = [
        "# Extra memory of a training step",
        "",
        f"{environment['measured']}, torch {environment['torch']}; made by `{command}`. MiB at the "
        "peak of forward and backward, beyond q, k, v and dout.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for record in records:
        ours = [mode["peak"] for mode in record["ours"]]
        unfused = record["unfused"]["peak"]
        cells = [f"{sum(record['formula'].values()) / 2**20:.1f}"]
        cells += [f"{peak / 2**20:.1f}" for peak in ours]
        if unfused is None:
            cells += ["out of memory", *[""] * len(ours)]
        else:
            how = "" if record["unfused"].get("executed", True) else " (counted)"
            cells += [f"{unfused / 2**20:.1f}{how}", *(f"{unfused / peak:.0f}" for peak in ours)]
        lines.append(f"| {record['problem']} | {record['length']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def show(file: Path, picture: Path) -> None:
    """The table beside the result file, and the picture."""
    result = json.loads(file.read_text())
    parts = file.parent.relative_to(ROOT / "benchmarks" / "results").parts
    command = f"python -m {'.'.join(('benchmarks', *parts, 'memory'))}"
    file.with_suffix(".md").write_text(table(result, command))
    plot(result, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", action="store_true", help="only table and picture, from the file")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    options = parser.parse_args()
    if not options.plot:
        enable_simulator()
        records = []
        for problem in PROBLEMS:
            for length in options.lengths:
                record = measure(problem, length)
                ours = ", ".join(
                    f"{mode['peak'] / 2**20:.1f} MiB ({_mode(mode)})" for mode in record["ours"]
                )
                unfused = record["unfused"]["peak"] / 2**20
                how = "executed and counted" if record["unfused"]["executed"] else "counted"
                print(
                    f"{problem} L{length}: ours {ours}, unfused {unfused:.1f} MiB ({how})",
                    flush=True,
                )
                records.append(record)
        environment = {"measured": "simulated mps device's allocator", "torch": torch.__version__}
        write(environment, records, RESULTS)
    show(RESULTS, PICTURE)


if __name__ == "__main__":
    main()
