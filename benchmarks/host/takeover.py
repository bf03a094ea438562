"""What F.sdpa taken over costs the host beyond a call of the op.

    python -m simulator -m benchmarks.host.takeover

Kernels are recorded and not run, so the tensors' sizes do not matter. Every repeat runs all the
calls once, one after the other and in a new order, so that other work of the machine affects all of
them alike; the difference between two of them is taken within a repeat. Figures are medians with
the 20th and 80th percentile over all repeats, in microseconds. Writes
benchmarks/results/takeover_cost.json and prints the tables of docs/sdpa.md.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import simulator
import torch
import torch.nn.functional as F
from torch import Tensor

import orchard_ops
from orchard_ops.commands import machine

from .measure import percentiles

RESULT = Path(__file__).resolve().parents[1] / "results" / "takeover_cost.json"
SHAPE = (1, 2, 16, 64)
REPEATS = 5000
OP, FUNCTION, TAKEN_OVER = (
    "torch.ops.orchard.flash_attn",
    "orchard_ops.flash_attn",
    "F.scaled_dot_product_attention, taken over",
)
ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    OP: torch.ops.orchard.flash_attn,
    FUNCTION: orchard_ops.flash_attn,
    TAKEN_OVER: F.scaled_dot_product_attention,
}
CALLS = ("causal", "bool mask", "dropout")
WAYS = ("no grad", "forward + backward")


def arguments_of(call: str) -> dict[str, object]:
    if call == "causal":
        return {"is_causal": True}
    if call == "dropout":
        return {"is_causal": True, "dropout_p": 0.1}
    length = SHAPE[2]
    return {"attn_mask": torch.ones(1, 1, length, length, dtype=torch.bool, device="mps")}


def time_calls(repeats: int) -> dict[tuple[str, str, str], list[int]]:
    """(attention, call, way) -> nanoseconds of each repeat."""
    operands = [torch.randn(SHAPE, device="mps", dtype=torch.float16) for _ in range(3)]
    leaves = [x.clone().requires_grad_() for x in operands]
    dout = torch.ones_like(operands[0])
    options = {call: arguments_of(call) for call in CALLS}
    todo = [(name, call) for name in ATTENTIONS for call in CALLS]
    times: dict[tuple[str, str, str], list[int]] = {
        (*case, way): [] for case in todo for way in WAYS
    }
    order = random.Random(0)
    for repeat in range(-repeats // 10, repeats):  # the first ones warm up
        order.shuffle(todo)
        for name, call in todo:
            attention, arguments = ATTENTIONS[name], options[call]
            begin = time.perf_counter_ns()
            with torch.no_grad():
                attention(*operands, **arguments)
            middle = time.perf_counter_ns()
            torch.autograd.grad(attention(*leaves, **arguments), leaves, dout)
            end = time.perf_counter_ns()
            if repeat >= 0:
                times[name, call, WAYS[0]].append(middle - begin)
                times[name, call, WAYS[1]].append(end - middle)
    return times


def above(times: dict[tuple[str, str, str], list[int]], peer: str) -> dict[str, dict[str, float]]:
    """The time of F.sdpa taken over minus that of another attention in the same repeat."""
    return {
        f"{call}, {way}": percentiles(
            [a - b for a, b in zip(times[TAKEN_OVER, call, way], times[peer, call, way])]
        )
        for call in CALLS
        for way in WAYS
    }


def switch_cost(repeats: int) -> dict[str, float]:
    """What it costs to enter and leave an empty `with orchard_ops.sdpa()`."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter_ns()
        with orchard_ops.sdpa():
            pass
        times.append(time.perf_counter_ns() - begin)
    return percentiles(times)


def left_to_pytorch(repeats: int) -> dict[str, float]:
    """What a call that PyTorch's own path takes costs in a block, beyond the same one outside."""
    operands = [torch.randn(1, 1, 1, 8, device="mps") for _ in range(3)]
    inside, outside = [], []
    for _ in range(repeats):
        for block, times in ((True, inside), (False, outside)):
            if block:
                orchard_ops.enable()
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                begin = time.perf_counter_ns()
                F.scaled_dot_product_attention(*operands)
                times.append(time.perf_counter_ns() - begin)
            if block:
                orchard_ops.disable()
    return percentiles([a - b for a, b in zip(inside, outside)])


def table(result: dict) -> str:
    def cell(figures: dict[str, float]) -> str:
        return f"{figures['median']:.1f} ({figures['p20']:.1f} to {figures['p80']:.1f})"

    rows = result["microseconds_above"]
    lines = [f"| microseconds above | {' | '.join(rows)} |", f"|---|{'---|' * len(rows)}"]
    lines += [
        f"| {case} | {' | '.join(cell(rows[peer][case]) for peer in rows)} |" for case in rows[OP]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with simulator.recording(execute=False):
        with orchard_ops.sdpa():
            times = time_calls(arguments.repeats)
        result = {
            "environment": {
                **machine.host(),
                "device": "simulated mps, recording engine",
                "repeats": arguments.repeats,
            },
            "microseconds_above": {peer: above(times, peer) for peer in (OP, FUNCTION)},
            "switch": switch_cost(arguments.repeats // 5),
            "left_to_pytorch": left_to_pytorch(arguments.repeats // 5),
        }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"entering and leaving: {result['switch']}")
    print(f"a call left to PyTorch: {result['left_to_pytorch']}")


if __name__ == "__main__":
    main()
