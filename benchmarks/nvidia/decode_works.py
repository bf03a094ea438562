"""What decode_speed.py times, and therefore which kernels build.py compiles for it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import decode_peer
from .caches import Decode, Places
from .plans import MULTIPROCESSORS, Scoring

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LENGTHS = (131072, 32768, 4096)
HEAD_DIMS = (128, 64)
BATCHES = (1, 8)
GROUPS = (1, 4, 8)
PARTS = (8, 16, 32, 48, 64, 128)
"""Threadgroups for the keys of a sequence that are tried beside the plan's number."""
TOTAL = 256 << 20
"""Bytes of keys and values that runs go through in turn, so that no cache of the GPU has them."""


@dataclass(frozen=True)
class DecodeWork:
    """Attention of q_len queries to batch sequences of `length` keys, for num_kv_heads groups."""

    dtype: str
    head_dim: int
    length: int
    batch: int
    group: int
    q_len: int = 1
    num_kv_heads: int = 8
    page_size: int = 0

    def __str__(self) -> str:
        pages = f" pages of {self.page_size}" * bool(self.page_size)
        queries = f" L{self.q_len}" * (self.q_len > 1)
        heads = f"Hkv{self.num_kv_heads} GQA{self.group}"
        return f"{self.dtype} D{self.head_dim} S{self.length} B{self.batch} {heads}{queries}{pages}"

    @property
    def kv_bytes(self) -> int:
        """Of all keys and values, each counted once."""
        keys = self.batch * self.num_kv_heads * self.length
        return 2 * keys * self.head_dim * DTYPES[self.dtype].itemsize

    @property
    def copies(self) -> int:
        """Sets of operands that take turns."""
        return max(1, -(-TOTAL // self.kv_bytes))

    @property
    def modes(self) -> tuple[str, ...]:
        """Of kernels; the last one is the one whose parts are varied.

        Half operands are on the tensor cores in "native" already.
        """
        return ("native",) if self.dtype == "float16" else ("native", "tensor-cores")

    @property
    def has_peer(self) -> bool:
        return not self.page_size and self.head_dim in decode_peer.HEAD_DIMS

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.head_dim**-0.5, gpu_cores=MULTIPROCESSORS)

    def operands(self, device: str, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, Hq, L, D), k and v (B, Hkv, S, D), dense; by pages where it has such."""
        generator = None
        if device != "meta":
            generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            on = {"dtype": DTYPES[self.dtype], "device": device}
            return torch.randn(shape, generator=generator, **on)

        heads = self.num_kv_heads
        q = draw(self.batch, heads * self.group, self.q_len, self.head_dim)
        rooms = (self.batch, heads, self.length)
        if self.page_size:
            rooms = (self.batch * self.length // self.page_size, heads, self.page_size)
        return q, draw(*rooms, self.head_dim), draw(*rooms, self.head_dim)

    def call(self, q: Tensor, k: Tensor, v: Tensor) -> Decode:
        """With a length for each sequence, and pages in any order."""
        device = q.device
        lengths = torch.full((self.batch,), self.length, dtype=torch.int32, device=device)
        table = None
        if self.page_size:
            order = torch.randperm(k.shape[0], generator=torch.Generator().manual_seed(2))
            table = order.view(self.batch, -1).int().to(device)
        return Decode(q, k, v, Places(lengths, table=table), self.scoring)

    def in_parts(self, call: Decode, parts: int) -> Decode:
        return dataclasses.replace(call, parts=parts)

    def shaped(self) -> Decode:
        """The call without operands, for the plan."""
        return self.call(*self.operands("meta"))


def works() -> Iterator[DecodeWork]:
    """The grid; then more rows, other widths and dtypes, and pages."""
    for length, batch, dtype in itertools.product(LENGTHS, BATCHES, ("float16", "bfloat16")):
        for head_dim, group in itertools.product(HEAD_DIMS, GROUPS):
            yield DecodeWork(dtype, head_dim, length, batch, group)
    long = DecodeWork("float16", 128, LENGTHS[0], 1, 4)
    yield dataclasses.replace(long, group=2)
    yield dataclasses.replace(long, q_len=4)  # 16 rows
    yield dataclasses.replace(long, q_len=2, group=8)
    yield dataclasses.replace(long, head_dim=64, q_len=4)
    yield dataclasses.replace(long, head_dim=96)
    yield dataclasses.replace(long, head_dim=256)
    yield dataclasses.replace(long, page_size=16)
    yield dataclasses.replace(long, page_size=256)
    yield dataclasses.replace(long, dtype="float32", head_dim=64)
