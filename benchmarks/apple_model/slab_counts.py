"""The engine's counts of mlx-train-perf's kernels, from the text in its wheel.

``python -m benchmarks.nvidia.peers`` fetches it. A causal problem of one head: of a forward and dq
the last 32 queries, of dk/dv the first 32 keys, so that a threadgroup goes over all blocks.
"""

from __future__ import annotations

import numpy as np
from simulator import engine
from simulator.engine import arrays

from benchmarks.nvidia.peers import mlx_train_perf
from benchmarks.nvidia.peers.problems import Problem

from .counts import LONG, SHORT, Counts, _counts
from .slabs import ROWS, Slab


def count(kernel: Slab) -> Counts:
    """Of a block of a pass; `once` is of all passes."""
    short, long = (_launch(kernel, blocks) for blocks in (SHORT, LONG))
    blocks = SHORT * kernel.passes, LONG * kernel.passes
    return _counts(short, long, kernel.simdgroups, blocks)


def _launch(kernel: Slab, blocks: int) -> tuple:
    length, width = ROWS * blocks, kernel.head_dim
    step = mlx_train_perf.step(
        Problem("bfloat16", width, length, causal=True, num_heads=1, num_kv_heads=1),
        kernel.part,
        kernel.slab,
    )
    text = step.text()
    library = engine.compile(text.source, check=True, **text.options)
    generator = np.random.default_rng(0)

    def drawn() -> np.ndarray:
        values = generator.standard_normal((length, width)).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    first = 0 if kernel.part == "dkv" else length - ROWS
    sizes = np.array([1, 1, length, width], np.int32)
    operands = {name: drawn() for name in ("q", "k", "v", "dout", "out", "dq")}
    operands |= {name: np.zeros(length, np.float32) for name in ("lse", "delta")}
    operands |= {
        name: np.zeros((length, width), np.float32) for name in ("dk", "dv", "dk_zeros", "dv_zeros")
    }
    operands |= {"rows": np.array([first, length], np.uint32), "q_sizes": sizes, "k_sizes": sizes}
    arguments = {index: operands[name] for index, name in step.buffers.items()}
    place, params = step.params
    arguments[place] = bytes(params)
    writable = [index for index, name in step.buffers.items() if name in step.writes]
    group = (kernel.simdgroups * 32, 1, 1)
    return arrays.launch(library, step.kernel, group, group, arguments, writable=writable, mix=True)
