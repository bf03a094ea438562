"""Every variant of every kernel that the plan can ask for."""

from __future__ import annotations

import functools
import itertools

import torch
from mutation.harness import DTYPE_NUMBERS, FAMILIES, Sources, request


@functools.cache
def variants() -> dict[str, list[dict]]:
    """By family: the plan's kernels for each dtype and head dim, each way of loading, dropout."""
    sources = Sources()
    head_dims = sources.head_dims()
    found: dict[str, dict[str, dict]] = {family: {} for family in FAMILIES}
    for dtype in DTYPE_NUMBERS.values():
        for head_dim in (*head_dims, *(d - 1 for d in head_dims)):
            shape = (1, 2, 64, head_dim)
            layout = (shape, torch.empty(shape, device="meta").stride(), 0)
            layouts = dict.fromkeys(("q", "k", "v", "out", "dout"), layout)
            for backward, dropout_p, scratch_bytes in itertools.product(
                (False, True), (0.0, 0.5), (0, 1 << 20)
            ):
                plan, _ = sources.plan(
                    request(
                        layouts, dtype, backward, dropout_p=dropout_p, scratch_bytes=scratch_bytes
                    )
                )
                for kernel in plan["kernels"]:
                    found[kernel["family"]][kernel["name"]] = kernel
    return {family: list(kernels.values()) for family, kernels in found.items()}
