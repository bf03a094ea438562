"""What a call costs the host, on the simulated device's recording engine.

    python -m simulator -m benchmarks.host.measure

Kernels are recorded and not run, so the tensors' sizes do not matter. Every repeat runs all the
calls once, one after the other, so that other work of the machine affects all of them alike; a
repeat starts with the code of the others in the processor's caches, as in a training step. Repeats
come in batches; the one in which F.sdpa's forward and backward on the CPU, which this project
cannot influence, had the lowest median is reported, since the others say what else the machine did.
Figures are medians with the 20th and 80th percentile, in microseconds. Writes
benchmarks/results/host_cost.json and prints the table of docs/performance-tables.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import simulator
import torch
import torch.nn.functional as F
from simulator import engine
from simulator.engine import cache
from torch import Tensor

import orchard_ops
from orchard_ops.commands import machine

from . import probe

RESULT = Path(__file__).resolve().parents[1] / "results" / "host_cost.json"
SHAPE = (1, 2, 16, 64)
REPEATS, BATCHES = 300, 80
WAYS = ("forward, no grad", "forward", "backward", "forward + backward")
PEERS = ("F.sdpa, cpu", "F.sdpa's fused op, empty kernels")


def percentiles(nanoseconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(nanoseconds, n=10)
    names = {"median": cuts[4], "p20": cuts[1], "p80": cuts[7]}
    return {name: round(value / 1e3, 2) for name, value in names.items()}


def attentions() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Name -> a causal attention of (q, k, v), and its operands."""
    on_device = [torch.randn(SHAPE, device="mps", dtype=torch.float16) for _ in range(3)]
    # One query and one key: the CPU kernel's own time is as small as it gets.
    on_cpu = [torch.randn(1, 1, 1, 8) for _ in range(3)]
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return {
        "F.sdpa, cpu": (lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), on_cpu),
        "F.sdpa's fused op, empty kernels": (lambda *x: fused(*x, 0.0, True)[0], on_device),
        "orchard_ops.flash_attn": (
            lambda *x: orchard_ops.flash_attn(*x, is_causal=True),
            on_device,
        ),
        "torch.ops.orchard.flash_attn": (
            lambda *x: torch.ops.orchard.flash_attn(*x, is_causal=True),
            on_device,
        ),
    }


Times = dict[tuple[str, str], dict[str, list[float]]]


def time_calls(repeats: int) -> Times:
    """(attention, way) -> nanoseconds of each call, whole and inside the native code."""
    todo = []
    for name, (attention, operands) in attentions().items():
        leaves = [x.detach().clone().requires_grad_() for x in operands]
        todo.append((name, attention, operands, leaves, torch.ones_like(operands[0])))
    times: Times = {(name, way): {"whole": [], "native": []} for name, *_ in todo for way in WAYS}
    for repeat in range(-repeats // 10, repeats):  # the first ones warm up
        for name, attention, operands, leaves, dout in todo:
            begin = time.perf_counter_ns()
            attention(*operands)
            no_grad = time.perf_counter_ns()
            out = attention(*leaves)
            forward = time.perf_counter_ns()
            torch.autograd.grad(out, leaves, dout)
            backward = time.perf_counter_ns()
            native = probe.take_times()
            if repeat < 0:
                continue
            wholes = (no_grad - begin, forward - no_grad, backward - forward, backward - no_grad)
            for way, whole in zip(WAYS, wholes):
                times[name, way]["whole"].append(whole)
            if native[0]:
                (first, second), (third,) = native
                for way, inside in zip(WAYS, (first, second, third, second + third)):
                    times[name, way]["native"].append(inside)
    return times


def first_call(head_dim: int) -> dict[str, float]:
    """What a first forward and backward of a new variant cost: milliseconds, and bytes of Metal.

    The compiler is clang here; its time is no measure of Apple's. Nothing it compiled before is
    taken from a cache.
    """
    shape = (1, 2, 16, head_dim)
    q, k, v = (torch.randn(shape, device="mps", requires_grad=True) for _ in range(3))
    texts: list[str] = []
    compile_text = engine.compile

    def compile_and_count(text: str, **options: object) -> object:
        texts.append(text)
        return compile_text(text, **options)

    with (
        tempfile.TemporaryDirectory() as empty,
        mock.patch.object(cache, "directory", lambda: Path(empty)),
        mock.patch.object(engine, "compile", compile_and_count),
        simulator.recording(execute=False),
    ):
        started = time.perf_counter()
        out = orchard_ops.flash_attn(q, k, v, is_causal=True)
        middle = time.perf_counter()
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        ended = time.perf_counter()
    return {
        "forward_ms": round((middle - started) * 1e3),
        "backward_ms": round((ended - middle) * 1e3),
        "variants": len(texts),
        "metal_bytes": sum(map(len, texts)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of a batch")
    parser.add_argument("--batches", type=int, default=BATCHES)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    probe.load()
    with simulator.recording(execute=False):
        times = quietest(time_calls(arguments.repeats) for _ in range(arguments.batches))
        like = torch.empty(SHAPE, device="mps", dtype=torch.float16)
        # As recorded: out and lse, one kernel of 6 buffers; dq, dk, dv and delta, two of 9.
        shims = {
            "forward": percentiles(probe.shims_ns(like, 2, 1, 6, arguments.repeats)),
            "backward": percentiles(probe.shims_ns(like, 4, 2, 9, arguments.repeats)),
        }
    result = {
        "environment": {
            **machine.host(),
            "device": "simulated mps, recording engine",
            "repeats": arguments.repeats,
            "batches": arguments.batches,
        },
        "microseconds": {
            f"{name}: {way}": {
                part: percentiles(values) for part, values in parts.items() if values
            }
            for (name, way), parts in times.items()
        },
        "torch_share_of_native": shims,
        "above_sdpa": above_sdpa(times),
        "first_call": first_call(head_dim=80),
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def quietest(batches: Iterable[Times]) -> Times:
    """The batch with the lowest median of the control, F.sdpa's forward and backward on the CPU."""
    return min(batches, key=lambda times: statistics.median(times[PEERS[0], WAYS[3]]["whole"]))


def above_sdpa(times: Times) -> dict[str, dict[str, dict[str, float]]]:
    """The time of our call without its native code, minus that of F.sdpa's whole call in the same
    repeat."""

    def excess(way: str, peer: str) -> dict[str, float]:
        ours, theirs = times["orchard_ops.flash_attn", way], times[peer, way]["whole"]
        return percentiles([a - b - c for a, b, c in zip(ours["whole"], ours["native"], theirs)])

    return {way: {peer: excess(way, peer) for peer in PEERS} for way in WAYS}


def table(result: dict) -> str:
    def cell(figures: dict[str, float]) -> str:
        return f"{figures['median']:.1f} ({figures['p20']:.1f}-{figures['p80']:.1f})"

    microseconds = result["microseconds"]
    names = list(dict.fromkeys(key.rsplit(": ", 1)[0] for key in microseconds))
    lines = ["| microseconds | " + " | ".join(WAYS) + " |", "|---|" + "---|" * len(WAYS)]
    for name in names:
        cells = [cell(microseconds[f"{name}: {way}"]["whole"]) for way in WAYS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    inside = [cell(microseconds[f"orchard_ops.flash_attn: {way}"]["native"]) for way in WAYS]
    lines.append(f"| of which inside the native code | {' | '.join(inside)} |")
    for peer in PEERS:
        cells = [cell(result["above_sdpa"][way][peer]) for way in WAYS]
        lines.append(f"| Python, dispatcher and autograd above {peer} | {' | '.join(cells)} |")
    first = result["first_call"]
    lines += [
        "",
        f"A first forward took {first['forward_ms']} ms and a first backward "
        f"{first['backward_ms']} ms, nearly all of it the simulator's compiler, on "
        f"{first['variants']} variants of together {first['metal_bytes']} bytes of Metal.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
