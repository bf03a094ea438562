"""What a call of flex_attention costs the host, beside one of flash_attn.

    python -m simulator -m benchmarks.host.flex

As in measure.py, kernels are recorded and not run, every repeat runs all the calls once, and
figures are medians with the 20th and 80th percentile, in microseconds; of several batches the one
is reported in which flash_attn, forward and backward, had the lowest median. A call makes its mods
anew, as a model does in every layer, and finds their trace again. Writes
benchmarks/results/flex_host_cost.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import simulator
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import orchard_ops
from orchard_ops.commands import machine

from .measure import percentiles

RESULT = Path(__file__).resolve().parents[1] / "results" / "flex_host_cost.json"
SHAPE = (1, 2, 256, 64)
REPEATS, BATCHES = 100, 20
WAYS = ("forward, no grad", "forward", "backward")
PEER = "flash_attn"


def attentions() -> dict[str, Callable[..., Tensor]]:
    slopes = torch.tensor([0.5, 0.25]).to("mps")
    document = (torch.arange(SHAPE[2]) // 100).to("mps")
    mask = create_block_mask(
        lambda b, h, i, j: (i >= j) & (document[i] == document[j]),
        None, None, SHAPE[2], SHAPE[2], device="mps",
    )  # fmt: skip

    def flex(q: Tensor, k: Tensor, v: Tensor, score_mod: Any, block_mask: Any = None) -> Tensor:
        return orchard_ops.flex_attention(q, k, v, score_mod, block_mask)  # type: ignore[return-value]

    return {
        PEER: lambda *x: orchard_ops.flash_attn(*x, is_causal=True),
        "flex_attention, a number": lambda *x: flex(*x, lambda score, *_: score * 0.75),
        "flex_attention, a captured tensor": lambda *x: flex(
            *x, lambda score, b, h, i, j: score + slopes[h] * i * j
        ),
        "flex_attention, a block mask": lambda *x: flex(
            *x, lambda score, b, h, i, j: score + slopes[h] * i * j, mask
        ),
    }


def time_calls(todo: dict[str, Callable[..., Tensor]], leaves: list[Tensor], repeats: int) -> Any:
    times: dict[str, dict[str, list[float]]] = {n: {w: [] for w in WAYS} for n in todo}
    dout = torch.ones(SHAPE, device="mps", dtype=torch.float16)
    for repeat in range(-repeats // 10, repeats):  # the first ones warm up
        for name, attention in todo.items():
            begin = time.perf_counter_ns()
            with torch.no_grad():
                attention(*leaves)
            no_grad = time.perf_counter_ns()
            out = attention(*leaves)
            forward = time.perf_counter_ns()
            torch.autograd.grad(out, leaves, dout)
            backward = time.perf_counter_ns()
            if repeat >= 0:
                parts = (no_grad - begin, forward - no_grad, backward - forward)
                for way, nanoseconds in zip(WAYS, parts):
                    times[name][way].append(nanoseconds)
    return {n: {w: percentiles(x) for w, x in ways.items()} for n, ways in times.items()}


def table(result: dict[str, Any]) -> str:
    """As docs/flex-attention.md shows it."""
    lines = [f"| | {' | '.join(WAYS)} |", f"|---|{'---|' * len(WAYS)}"]
    for name, ways in result["microseconds"].items():
        cells = [f"{x['median']:.0f} ({x['p20']:.0f} to {x['p80']:.0f})" for x in ways.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of a batch")
    parser.add_argument("--batches", type=int, default=BATCHES)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    leaves = [
        torch.randn(SHAPE, device="mps", dtype=torch.float16, requires_grad=True) for _ in range(3)
    ]
    todo = attentions()
    with simulator.recording(execute=False):
        batches = [time_calls(todo, leaves, options.repeats) for _ in range(options.batches)]
    best = min(batches, key=lambda b: sum(b[PEER][w]["median"] for w in ("forward", "backward")))
    result = {
        **machine.host(),
        "shape": SHAPE,
        "repeats": options.repeats,
        "batches": options.batches,
        "microseconds": best,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
