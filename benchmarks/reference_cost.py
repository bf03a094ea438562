"""The reference on the CPU against the mathematics of F.scaled_dot_product_attention.

    python -m benchmarks.reference_cost

Both run in turns, every second one the other way round, so that other work of the machine affects
both alike. On one thread times are those that the process had the CPU, to which others' work adds
only what it does to caches and clock. The ratio is that of the fastest runs; beside it stands the
median of the ratios of neighbouring runs. Memory is the most
that a process of its own held during one forward and backward, above what it held before. Threads
sleep at barriers: spinning ones, on a machine with other work, would measure its scheduler. Writes
benchmarks/results/reference_cost.json and prints the tables of docs/performance-tables.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import orchard_ops
from orchard_ops import reference as kernels
from orchard_ops.commands import machine
from orchard_ops.scoring import Scoring

RESULT = Path(__file__).resolve().parent / "results" / "reference_cost.json"
BATCH, HEADS = 1, 8
LENGTHS = (512, 1024, 2048, 4096)
HALF_LENGTHS = (512, 1024)  # matmul is slow in half precision on many CPUs, for both sides
HEAD_DIMS = (64, 128)
MEMORY_LENGTHS = (512, 1024, 2048, 4096, 8192)
LONG = 4096  # runs of many seconds: once, without warm-up
LIMIT = 1.3
IDENTITY = ("length", "head_dim", "dtype", "causal", "passes", "threads", "mask", "heads")

MASKS: dict[str, Callable[[int], Tensor]] = {
    "bool": lambda n: torch.ones(1, 1, n, n, dtype=torch.bool).tril(),
    "padding": lambda n: (torch.arange(n) < n - n // 8).view(1, 1, 1, n),
    "additive": lambda n: torch.randn(1, 1, n, n),
}
MASKED_LENGTHS = (256, 512, 1024, 2048)
COUNTED = (16, 1024)
"""Heads and length of the step whose operators are counted, and timed too."""


def math_path(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, mask: Tensor | None = None
) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)


def reference(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, mask: Tensor | None = None
) -> Tensor:
    return orchard_ops.flash_attn(q, k, v, mask, is_causal=is_causal)


class Operators(TorchDispatchMode):
    """How many operators ran, but for views of an argument."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def count_operators(name: str) -> dict:
    """The operators of a forward and a backward of the reference, on the CPU and for a device on
    which each is a launch, for which meta tensors stand in."""
    heads, length = COUNTED
    found: dict = {"mask": name, "heads": heads, "length": length}
    for device in ("cpu", "meta"):
        q, k, v, dout = (torch.zeros(1, heads, length, 4, device=device) for _ in range(4))
        scoring = Scoring(attn_mask=MASKS[name](length).to(device), scale=0.5)
        with Operators() as operators:
            out, stats = kernels.forward(q, k, v, scoring)
            given = (dout, None, q, k, v, out, stats)
            kernels.backward(*given, scoring=scoring, mask_grad=False)
        found[device] = operators.count
    return found


def operands(
    length: int, head_dim: int, dtype: torch.dtype, heads: int = HEADS
) -> tuple[list[Tensor], Tensor]:
    """q, k, v that require grad, and dout, all (1, heads, length, head_dim)."""
    shape = (BATCH, heads, length, head_dim)
    q, k, v, dout = (torch.randn(shape).to(dtype) for _ in range(4))
    return [x.requires_grad_() for x in (q, k, v)], dout


def seconds(call: Callable[[], object]) -> float:
    """Of the CPU where there is one thread, else by the clock on the wall."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    call()
    return clock() - started


def turn(
    ours: Callable[[], object], theirs: Callable[[], object], odd: bool
) -> tuple[float, float]:
    """Seconds of both; in odd turns theirs goes first."""
    if odd:
        second = seconds(theirs)
        return seconds(ours), second
    return seconds(ours), seconds(theirs)


def compare(
    length: int,
    head_dim: int,
    dtype: torch.dtype,
    is_causal: bool,
    budget_s: float,
    mask: str | None = None,
    heads: int = HEADS,
) -> list[dict]:
    """A record for the forward and one for the forward and backward."""
    leaves, dout = operands(length, head_dim, dtype, heads)
    inputs = [x.detach() for x in leaves]
    given = (is_causal, MASKS[mask](length) if mask else None)

    def calls(attention: Callable[..., Tensor]) -> tuple[Callable[[], object], ...]:
        return (
            lambda: attention(*inputs, *given),
            lambda: torch.autograd.grad(attention(*leaves, *given), leaves, dout),
        )

    records = []
    for passes, ours, theirs in zip(
        ("forward", "forward + backward"), calls(reference), calls(math_path)
    ):
        if length < LONG:
            ours(), theirs()  # warm-up
        times: list[tuple[float, float]] = []
        started = time.perf_counter()
        while len(times) < (5 if length < LONG else 1) or (
            time.perf_counter() - started < budget_s and len(times) < 200
        ):
            times.append(turn(ours, theirs, len(times) % 2 == 1))
        fastest = [min(column) for column in zip(*times)]
        records.append(
            {
                "length": length,
                "head_dim": head_dim,
                "dtype": str(dtype).removeprefix("torch."),
                "causal": is_causal,
                "mask": mask,
                "heads": heads,
                "passes": passes,
                "repeats": len(times),
                "reference_ms": round(fastest[0] * 1e3, 2),
                "math_ms": round(fastest[1] * 1e3, 2),
                "ratio": round(fastest[0] / fastest[1], 3),
                "median_ratio": round(statistics.median(a / b for a, b in times), 3),
            }
        )
    return records


def peak_extra_bytes(attention: Callable[..., Tensor], length: int, is_causal: bool) -> int:
    """The peak of one forward and backward in this process, which must be new."""
    warm, warm_dout = operands(16, 64, torch.float32)
    torch.autograd.grad(attention(*warm, is_causal), warm, warm_dout)
    leaves, dout = operands(length, 64, torch.float32)

    def status(field: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split(f"{field}:")[1].split()[0]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
    before = status("VmRSS")
    torch.autograd.grad(attention(*leaves, is_causal), leaves, dout)
    return status("VmHWM") - before


def measure_memory() -> list[dict]:
    records = []
    for name in ("reference", "math_path"):
        # The math path holds L x S matrices: 8192 would take many GB.
        for length in MEMORY_LENGTHS if name == "reference" else MEMORY_LENGTHS[:-1]:
            for is_causal in (False, True):
                command = [
                    *(sys.executable, "-m", "benchmarks.reference_cost"),
                    *("--memory-of", name, str(length), str(int(is_causal))),
                ]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                records.append(
                    {
                        "attention": name,
                        "length": length,
                        "causal": is_causal,
                        "peak_extra_mib": round(int(done.stdout) / 2**20, 1),
                    }
                )
    return records


def speed_table(records: list[dict], threads: int, dtype: str) -> str:
    lines = [
        f"{dtype}, {threads} thread(s):",
        "",
        "| L | D | forward | forward, causal | forward + backward | forward + backward, causal |",
        "|---|---|---|---|---|---|",
    ]
    columns = [(p, c) for p in ("forward", "forward + backward") for c in (False, True)]
    for length in LENGTHS:
        for head_dim in HEAD_DIMS:
            row = {
                (r["passes"], r["causal"]): f"{r['ratio']:.2f} ({r['median_ratio']:.2f})"
                for r in records
                if (r["length"], r["head_dim"], r["threads"], r["dtype"])
                == (length, head_dim, threads, dtype)
                and r.get("mask") is None
            }
            if row:
                cells = " | ".join(row.get(column, "not run") for column in columns)
                lines.append(f"| {length} | {head_dim} | {cells} |")
    return "\n".join(lines)


def masked_table(result: dict) -> str:
    """Steps with a mask: times by math path's, and operators."""
    lines = [
        "| H | L | mask | forward | forward + backward | operators, CPU | on a GPU |",
        "|---|---|---|---|---|---|---|",
    ]
    masked = [r for r in result["speed"] if r.get("mask") is not None]
    operators = {(r["heads"], r["length"], r["mask"]): r for r in result["operators"]}
    steps = dict.fromkeys((r["heads"], r["length"], r["mask"]) for r in masked)
    for heads, length, mask in sorted(steps):
        ratios = {
            r["passes"]: f"{r['ratio']:.2f} ({r['median_ratio']:.2f})"
            for r in masked
            if (r["heads"], r["length"], r["mask"]) == (heads, length, mask)
        }
        counted = operators.get((heads, length, mask), {})
        cells = [ratios.get(passes, "") for passes in ("forward", "forward + backward")]
        cells += [str(counted.get(device, "")) for device in ("cpu", "meta")]
        lines.append(f"| {heads} | {length} | {mask} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table(records: list[dict]) -> str:
    lines = [
        "| MiB | " + " | ".join(f"L {length}" for length in MEMORY_LENGTHS) + " |",
        "|---|" + "---|" * len(MEMORY_LENGTHS),
    ]
    names = {"reference": "reference", "math_path": "SDPA's math path"}
    for name, words in names.items():
        for is_causal in (False, True):
            found = {
                r["length"]: f"{r['peak_extra_mib']:.0f}"
                for r in records
                if (r["attention"], r["causal"]) == (name, is_causal)
            }
            cells = " | ".join(found.get(length, "not run") for length in MEMORY_LENGTHS)
            lines.append(f"| {words}, {'causal' if is_causal else 'dense'} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--budget", type=float, default=2.0, help="seconds per comparison")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--again", action="store_true", help="only replace these in the result")
    parser.add_argument("--masked", action="store_true", help="only steps with a mask")
    parser.add_argument("--masked-lengths", type=int, nargs="+", default=list(MASKED_LENGTHS))
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        name, length, is_causal = arguments.memory_of
        print(peak_extra_bytes(globals()[name], int(length), bool(int(is_causal))))
        return
    result: dict = {
        "environment": {
            **machine.host(),
            "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
            "batch": BATCH,
            "heads": HEADS,
        },
        "limit": LIMIT,
        "memory": [],
        "speed": [],
    }
    if arguments.again:
        kept = json.loads(arguments.output.read_text())
        result = kept | {name: kept.get(name) or [] for name in ("memory", "speed")}
        for record in result["speed"]:
            record.setdefault("mask", None)
            record.setdefault("heads", HEADS)
            record.setdefault("cpu", kept["environment"]["cpu"])
    else:
        result["memory"] = measure_memory()
    result["operators"] = [count_operators(name) for name in MASKS]
    speed: list[dict] = result["speed"]

    def keep(records: list[dict], threads: int) -> None:
        for record in records:
            record |= {"threads": threads, "cpu": machine.chip()}
            record["load"] = round(os.getloadavg()[0], 1)
            speed[:] = [r for r in speed if any(r[k] != record[k] for k in IDENTITY)]
            speed.append(record)
            print(record, file=sys.stderr, flush=True)
        result["worst_ratio"] = max(record["ratio"] for record in speed)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")

    torch.set_num_threads(1)
    for heads, length in (COUNTED, *((HEADS, length) for length in arguments.masked_lengths)):
        for mask in MASKS:
            keep(compare(length, 64, torch.float32, False, arguments.budget, mask, heads), 1)
    todo = [
        (length, threads, dtype)
        for length in arguments.lengths
        for threads in arguments.threads
        for dtype in arguments.dtypes
        if not arguments.masked and (dtype == "float32" or length in HALF_LENGTHS)
    ]
    for length, threads, dtype in todo:
        torch.set_num_threads(threads)
        for head_dim in HEAD_DIMS:
            for is_causal in (False, True):
                dtype_ = getattr(torch, dtype)
                keep(compare(length, head_dim, dtype_, is_causal, arguments.budget), threads)
    print(tables(result))


def tables(result: dict) -> str:
    """Markdown: memory, steps with a mask, then speed by dtype and threads."""
    parts = [memory_table(result["memory"])]
    parts.append(masked_table(result))
    measured = dict.fromkeys(
        (r["dtype"], r["threads"]) for r in result["speed"] if r.get("mask") is None
    )
    parts += [speed_table(result["speed"], threads, dtype) for dtype, threads in sorted(measured)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
