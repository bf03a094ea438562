"""What features.py times: the features, alone, and how much of the pairs each of them leaves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import listed
from .plans import MULTIPROCESSORS, Kernel, Planner, Scoring

HEAD_DIMS = (64, 128)
HEADS = {4096: 16, 8192: 8}
"""The heads of each of two batch entries, by length: as many threadgroups at both."""
BATCH = 2
LONGEST = 4096
"""The longest of the eight documents that are packed, or padded to its length."""
PACKED_HEADS = 8
"""As many as have room for dS at once. With fewer heads packed documents are few threadgroups for a
large GPU, which waits for the last ones."""
DTYPE = torch.float16

#: dS of all heads at once: a large GPU is filled even where most blocks are skipped.
ROOM = 8 << 30

PLAIN, PADDED = "plain", "padded batch"
PACKED, PACKED_SEVEN = "packed, dS stored", "packed, no scratch"
PRODUCTS = {  # of a pair of fragments, for every 8 of the head dim
    "attention_forward": 2,
    "attention_backward_dkv": 4,
    "attention_backward_dkv_pairs": 4,
    "attention_backward_dq": 3,
    "attention_backward_dq_from_ds": 1,
}
_WINDOW = 512
_MASK_BLOCK, _MASK_SHARE = 64, 0.25


@dataclass(frozen=True)
class Work:
    """One call, its operands (B, H, L, head_dim) in float16 on `device`."""

    feature: str
    head_dim: int
    length: int
    batch: int
    num_heads: int
    scratch_bytes: int = ROOM

    def __str__(self) -> str:
        sizes = f"B{self.batch} H{self.num_heads} L{self.length} D{self.head_dim}"
        return f"{self.feature}, {sizes}"

    @property
    def packed(self) -> bool:
        return self.feature in (PACKED, PACKED_SEVEN)

    def scoring(self, device: str) -> Scoring:
        return replace(
            Scoring(
                self.head_dim**-0.5,
                scratch_bytes=self.scratch_bytes,
                gpu_cores=MULTIPROCESSORS,
            ),
            **FEATURES[self.feature](self, device),
        )

    def operands(self, device: str) -> tuple[Tensor, ...]:
        """q, k, v, dout: dense, or as flash_attn_varlen has them."""
        generator = None if device == "meta" else torch.Generator(device).manual_seed(1)
        sizes = (self.batch, self.num_heads, self.length, self.head_dim)
        if self.packed:
            sizes = (self.batch, self.length, self.num_heads, self.head_dim)
        drawn = [
            torch.randn(sizes, generator=generator, dtype=DTYPE, device=device) for _ in range(4)
        ]
        return tuple(x.transpose(1, 2) for x in drawn) if self.packed else tuple(drawn)

    def plan(self, planner: Planner, backward: bool) -> list[Kernel]:
        q, k, v, dout = self.operands("meta")
        scoring = self.scoring("meta")
        if backward:
            return planner.backward(q, k, v, q, dout, scoring).kernels
        return planner.forward(q, k, v, q, scoring).kernels


def _mask(work: Work, device: str) -> dict[str, Any]:
    """Random blocks of 64 queries and keys, a quarter of them seen, and those of the diagonal."""
    count = -(-work.length // _MASK_BLOCK)
    generator = torch.Generator().manual_seed(3)
    blocks = torch.rand(count, count, generator=generator) < _MASK_SHARE
    blocks |= torch.eye(count, dtype=torch.bool)
    blocks = blocks.to(device)
    for axis in (0, 1):
        blocks = blocks.repeat_interleave(_MASK_BLOCK, axis, output_size=count * _MASK_BLOCK)
    return {"mask": blocks[None, None, : work.length, : work.length].contiguous()}


def _bias(work: Work, device: str) -> dict[str, Any]:
    """Of (1, H, L, L), float16, shared by the batch."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(4)
    sizes = (1, work.num_heads, work.length, work.length)
    return {"mask": torch.randn(sizes, generator=generator, dtype=DTYPE, device=device)}


def _padding(work: Work, device: str) -> dict[str, Any]:
    """A quarter of the keys in the first entry of the batch, three quarters in the second; neither
    ends with a block."""
    first = work.length // 4 + 5
    lengths = torch.tensor([first, work.length - first])
    return {"key_ranges": listed.KeyRanges.from_lengths(lengths, work.length).tensor.to(device)}


def _documents(work: Work, device: str) -> dict[str, Any]:
    return {"key_ranges": listed.documents(work.length, work.length).to(device)}


def _slopes(work: Work, device: str) -> dict[str, Any]:
    slopes = 2.0 ** -torch.arange(1, work.num_heads + 1, device=device).float()
    return {"alibi_slopes": slopes.expand(work.batch, -1)}


FEATURES: dict[str, Callable[[Work, str], dict[str, Any]]] = {
    PLAIN: lambda work, device: {},
    "causal window of 512": lambda work, device: {"window_left": _WINDOW - 1, "window_right": 0},
    "8 ragged documents": _documents,
    "half of the keys padding": _padding,
    "block-sparse bool mask": _mask,
    "additive bias": _bias,
    "additive bias and its gradient": lambda work, device: {
        **_bias(work, device),
        "mask_grad": True,
    },
    "softcap": lambda work, device: {"softcap": 50.0},
    "ALiBi": _slopes,
    "sinks": lambda work, device: {"sinks": torch.ones(work.num_heads, device=device)},
    PADDED: lambda work, device: {},
    PACKED: _documents,
    PACKED_SEVEN: _documents,
}
BACKWARD_ONLY = ("additive bias and its gradient",)
FORWARD_AND_BACKWARD_ALIKE = (PACKED_SEVEN,)
"""Their forward is that of another work."""


@dataclass(frozen=True)
class Comparison:
    """Works that are timed beside one yardstick."""

    yardstick: Work
    works: tuple[Work, ...]

    def of(self, backward: bool) -> tuple[Work, ...]:
        left_out = FORWARD_AND_BACKWARD_ALIKE if not backward else ()
        left_out += () if backward else BACKWARD_ONLY
        return tuple(work for work in self.works if work.feature not in left_out)


def comparisons(
    head_dims: tuple[int, ...] = HEAD_DIMS,
    heads: dict[int, int] = HEADS,
    longest: int = LONGEST,
    packed_heads: int = PACKED_HEADS,
) -> Iterator[Comparison]:
    alone = [x for x in FEATURES if x not in (PLAIN, PADDED, PACKED, PACKED_SEVEN)]
    for head_dim in head_dims:
        for length, num_heads in heads.items():
            plain = Work(PLAIN, head_dim, length, BATCH, num_heads)
            yield Comparison(plain, tuple(replace(plain, feature=x) for x in alone))
    total = longest * sum(listed.RAGGED) // max(listed.RAGGED)
    for head_dim in head_dims:
        padded = Work(PADDED, head_dim, longest, len(listed.RAGGED), packed_heads)
        packed = replace(padded, feature=PACKED, length=total, batch=1)
        seven = replace(packed, feature=PACKED_SEVEN, scratch_bytes=0)
        yield Comparison(padded, (packed, seven))


def kernels(planner: Planner) -> dict[str, Kernel]:
    """What all comparisons run, by name."""
    found: dict[str, Kernel] = {}
    for comparison in comparisons():
        for work in (comparison.yardstick, *comparison.works):
            for backward in (False, True):
                found |= {kernel.name: kernel for kernel in work.plan(planner, backward)}
    return found


# ---- what is seen -------------------------------------------------------------------------------


def tile(kernel: Kernel) -> tuple[int, int]:
    """Queries and keys of a block that a threadgroup takes or skips."""
    by_rows = re.search(r"_r(\d+)_k(\d+)", kernel.name)
    if by_rows:
        return 32 * int(by_rows[1]), int(by_rows[2])
    by_keys = re.search(r"_q(\d+)", kernel.name)
    if by_keys is None:
        raise ValueError(f"{kernel.name} has no tile in its name")
    return int(by_keys[1]), 16 if kernel.family.endswith("_pairs") else 32


def seen_pairs(work: Work, device: str) -> Tensor | None:
    """(1 or B, 1, L, L) bool, or None where all pairs are seen."""
    s, length = work.scoring(device), work.length
    if s.key_ranges is not None:
        return listed.KeyRanges(s.key_ranges).dense(length)
    if s.mask is not None and s.mask.dtype == torch.bool:
        return s.mask
    if s.window_left < 0:
        return None
    place = torch.arange(length, device=device)
    ahead = place - place[:, None]
    return ((ahead >= -s.window_left) & (ahead <= s.window_right))[None, None]


def share_of_blocks(seen: Tensor, rows: int, keys: int) -> float:
    """Of all blocks of so many queries and keys, those with a pair that is seen.

    A block that the ends of the sequences cut counts whole.
    """
    q_len, kv_len = seen.shape[-2:]
    seen = torch.nn.functional.pad(seen, (0, -kv_len % keys, 0, -q_len % rows))
    blocks = seen.unflatten(3, (-1, keys)).unflatten(2, (-1, rows))
    return blocks.any(5).any(3).double().mean().item()


def share_of_work(kernels: list[Kernel], seen: Tensor | None) -> float:
    """Of all pairs, those in blocks that are seen, by each kernel's own tile; kernels weigh as they
    multiply.
    """
    if seen is None:
        return 1.0
    share = weight = 0.0
    for kernel in kernels:
        products = PRODUCTS.get(kernel.family, 0)
        if products:
            share += products * share_of_blocks(seen, *tile(kernel))
            weight += products
    return share / weight
