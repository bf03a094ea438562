"""The problems on which peers are timed, and their operands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plans import MULTIPROCESSORS, Kernel, Plan, Planner, Scoring
from ..workloads import DTYPES

DEFAULT_SCRATCH = 256 << 20
"""What a backward of ours may take for dS unless the user says otherwise."""
BOTH_WAYS = (64, 128)
"""The head dims whose backward is timed."""


@dataclass(frozen=True)
class Problem:
    """Self attention of (batch, num_heads, length, head_dim). A window counts the keys that a row
    sees, its own among them."""

    dtype: str
    head_dim: int
    length: int
    causal: bool
    batch: int = 1
    num_heads: int = 16
    num_kv_heads: int = 16
    window: int = 0

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def backward(self) -> bool:
        return self.head_dim in BOTH_WAYS

    @property
    def mask(self) -> str:
        if self.window:
            return f"window {self.window}"
        return "causal" if self.causal else "dense"

    def __str__(self) -> str:
        heads = str(self.num_heads) + (f"/{self.num_kv_heads}" if self.group > 1 else "")
        return f"{self.dtype} D{self.head_dim} L{self.length} B{self.batch} H{heads} {self.mask}"

    def scoring(self, scratch_bytes: int = DEFAULT_SCRATCH, stores_ds: bool = False) -> Scoring:
        return Scoring(
            self.scale,
            window_left=self.window - 1 if self.window else -1,
            window_right=0 if self.causal or self.window else -1,
            scratch_bytes=scratch_bytes,
            gpu_cores=MULTIPROCESSORS,
            stores_ds=stores_ds,
        )

    def sizes(self, of_keys: bool = False) -> tuple[int, int, int, int]:
        heads = self.num_kv_heads if of_keys else self.num_heads
        return (self.batch, heads, self.length, self.head_dim)

    def operands(self, device: str) -> dict[str, Tensor]:
        """q, k, v, dout, dense"""
        generator = None if device == "meta" else torch.Generator(device).manual_seed(1)

        def draw(of_keys: bool) -> Tensor:
            dtype = DTYPES[self.dtype]
            sizes = self.sizes(of_keys)
            return torch.randn(sizes, generator=generator, dtype=dtype, device=device)

        return {name: draw(name in "kv") for name in ("q", "k", "v", "dout")}

    def forward_kernels(self, planner: Planner) -> list[Kernel]:
        q, k, v, _ = self.operands("meta").values()
        return planner.forward(q, k, v, q, self.scoring()).kernels

    def backward_kernels(self, planner: Planner, scratch_bytes: int) -> list[Kernel]:
        return self.backward_plan(planner, self.scoring(scratch_bytes)).kernels

    def backward_plan(self, planner: Planner, scoring: Scoring) -> Plan:
        q, k, v, dout = self.operands("meta").values()
        return planner.backward(q, k, v, q, dout, scoring)


def problems() -> Iterator[Problem]:
    """What matters most comes first: a run that is cut off has that."""
    for length in (4096, 1024):
        for head_dim in BOTH_WAYS:
            for dtype in DTYPES:
                for causal in (True, False):
                    yield Problem(dtype, head_dim, length, causal)
    for dtype in ("float16", "bfloat16"):
        yield Problem(dtype, 128, 4096, True, num_kv_heads=4)
    for head_dim in BOTH_WAYS:  # does a batch of one fill the GPU?
        yield Problem("float16", head_dim, 4096, True, batch=4)
    for head_dim in (80, 96, 256):
        for dtype in ("float16", "bfloat16"):
            for causal in (True, False):
                yield Problem(dtype, head_dim, 4096, causal)
