"""``python -m orchard_ops plan``: how long a sequence fits into memory in training.

It computes with the formulas of `orchard_ops.training_memory` and runs nothing.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from .. import gpu
from ..plan import WIDEST_HEAD_DIM
from ..report import size
from ..training_memory import AttentionLayer, TrainingStep, scratch_budget_mb
from . import endings, machine
from .endings import CannotRun

_GIB = 1 << 30
_LENGTHS = tuple(1 << n for n in range(10, 18))
_NOT_COUNTED = (
    "Counted are q, k, v and what attention adds to them; the rest of the model, its optimizer and "
    "the system are what --reserved and --rest-per-token say."
)
OURS, STOCK = "orchard_ops", "sdpa"


def run(args: argparse.Namespace) -> int:
    """The command, with arguments as ``__main__`` parses them.

    Raises:
        CannotRun: nothing is left for attention, or the memory of this machine is not known.
    """
    plan = _plan(args)
    print(json.dumps(plan, indent=1) if args.json else _text(plan))
    return endings.RIGHT


def _memory(args: argparse.Namespace) -> tuple[int, str, gpu.Gpu]:
    """Bytes, where the number is from, and the GPU of a machine that has them."""
    if args.ram is not None:
        ram = int(args.ram * _GIB)
        return ram, "--ram", gpu.of_machine(ram)
    here = gpu.here()
    if here.memory:
        return here.memory, "what Metal recommends as the most on this machine", here
    found = machine.memory_bytes()
    if not found:
        raise CannotRun("the memory of this machine is not known; give it with --ram")
    return found, "of this machine", gpu.of_machine(found)


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    num_heads, num_kv_heads = args.heads
    if args.head_dim > WIDEST_HEAD_DIM:
        raise CannotRun(
            f"no Metal kernel has a head_dim above {WIDEST_HEAD_DIM}; got {args.head_dim}"
        )
    layer = AttentionLayer(
        num_heads, num_kv_heads, args.head_dim, args.dtype, args.batch, not args.full
    )
    step = TrainingStep(layer, args.layers, args.checkpoint)
    memory, source, of_memory = _memory(args)
    try:
        scratch_mb = scratch_budget_mb(of_memory) if args.scratch is None else args.scratch
    except RuntimeError as error:
        raise CannotRun(str(error)) from error
    reserved = int(args.reserved * _GIB)
    if reserved >= memory:
        raise CannotRun(f"--reserved leaves nothing: {size(reserved)} of {size(memory)} ({source})")
    of_token = args.rest_per_token * args.batch * args.layers

    def ours(length: int) -> int:
        return step.ours(length, scratch_mb, of_memory.cores) + of_token * length

    def stock(length: int) -> int:
        return step.stock(length) + of_token * length

    peaks = {OURS: ours, STOCK: stock}
    return {
        "model": {
            "layers": args.layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": args.head_dim,
            "dtype": args.dtype,
            "batch": args.batch,
            "causal": layer.is_causal,
            "checkpoint": args.checkpoint,
        },
        "memory_bytes": memory,
        "memory_source": source,
        "reserved_bytes": reserved,
        "rest_bytes_per_token_and_layer": args.rest_per_token,
        "scratch_mb": scratch_mb,
        "lengths": [
            {"length": length} | {name: peak(length) for name, peak in peaks.items()}
            for length in args.lengths or _LENGTHS
        ],
        "longest": {name: step.longest(memory - reserved, peak) for name, peak in peaks.items()},
    }


def _text(plan: dict[str, Any]) -> str:
    model = plan["model"]
    left = plan["memory_bytes"] - plan["reserved_bytes"]
    words = [
        f"{model['layers']} layers",
        f"{model['num_heads']}/{model['num_kv_heads']} heads",
        f"head_dim {model['head_dim']}",
        f"batch {model['batch']}",
        model["dtype"],
        "causal" if model["causal"] else "not causal",
        *(["checkpointed"] if model["checkpoint"] else []),
    ]
    lines = [
        f"attention in a training step: {', '.join(words)}",
        f"memory: {size(plan['memory_bytes'])} ({plan['memory_source']}), "
        f"{size(plan['reserved_bytes'])} of it reserved",
        "",
        f"{'L':>9} {'orchard_ops':>15} {'PyTorch SDPA':>15}",
    ]
    for row in plan["lengths"]:
        cells = (size(row[name]) + ("" if row[name] <= left else " *") for name in (OURS, STOCK))
        lines.append(f"{row['length']:>9}" + "".join(f" {cell:>15}" for cell in cells))
    longest = plan["longest"]
    lines += [
        "* does not fit",
        "",
        f"the longest that fits (a multiple of 64): {longest[OURS]} with orchard_ops, "
        f"{longest[STOCK]} with F.scaled_dot_product_attention, whose math path trains on mps",
        _NOT_COUNTED,
    ]
    return "\n".join(lines)
