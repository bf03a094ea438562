"""What speed.py times, and therefore which kernels build.py compiles for it."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import peer
from .plans import MULTIPROCESSORS, Kernel, Planner, Scoring

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HEAD_DIMS = (64, 128, 32, 80, 96, 256)
LENGTHS = (1024, 4096, 8192)
#: The backward is timed at these, as it takes several times as long.
BACKWARD_LENGTHS = (1024, 4096)
#: Only this length for the head dims behind the first two.
_ONE_LENGTH = 4096
_ALL_LENGTHS = (64, 128)


@dataclass(frozen=True)
class Workload:
    """Attention of a square (length, length) problem with BATCH * NUM_HEADS heads."""

    dtype: str
    head_dim: int
    length: int
    causal: bool
    batch: int = 2
    num_heads: int = 16

    def __str__(self) -> str:
        mask = "causal" if self.causal else "dense"
        return f"{self.dtype} D{self.head_dim} L{self.length} {mask}"

    @property
    def scoring(self) -> Scoring:
        right = 0 if self.causal else -1
        return Scoring(self.head_dim**-0.5, window_right=right, gpu_cores=MULTIPROCESSORS)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.num_heads, self.length, self.head_dim)

    def operands(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout, dense"""
        generator = torch.Generator(device).manual_seed(1)
        draw = {"generator": generator, "dtype": DTYPES[self.dtype], "device": device}
        return tuple(torch.randn(self.shape, **draw) for _ in range(4))

    def plan(self, planner: Planner, backward: bool) -> list[Kernel]:
        """The kernels of ours that it runs."""
        x = torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")
        forward = planner.forward(x, x, x, x, self.scoring).kernels
        if not backward:
            return forward
        return forward + planner.backward(x, x, x, x, x, self.scoring).kernels

    def prefill(self) -> peer.Prefill:
        """PyTorch's launch."""
        x = torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")
        return peer.prefill(x, x, x, x, self.scoring.scale, self.causal)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS)


def workloads(
    dtypes: list[str], head_dims: list[int], lengths: list[int] | None = None
) -> Iterator[Workload]:
    """All that are asked for; by default, head dims beside 64 and 128 at one length only."""
    for head_dim, dtype, causal in itertools.product(head_dims, dtypes, (False, True)):
        some = LENGTHS if head_dim in _ALL_LENGTHS else (_ONE_LENGTH,)
        for length in lengths or some:
            yield Workload(dtype, head_dim, length, causal)
