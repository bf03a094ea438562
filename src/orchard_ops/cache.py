"""Attention to a cache of keys and values: the one list of its arguments, and what they mean.

The op ``orchard::flash_attn_decode`` takes q (B, Hq, L, D), and k and v as the cache has them:
(entries, Hkv, keys of an entry, D or Dv). An entry is the room of one sequence, or a page of a
block table. ``native/cache.h`` has the same list for C++, and a test compares the two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .scoring import Scoring

MOST_QUERIES = 16
"""Queries of a sequence that the decode kernel takes: with more of them, kernels that share blocks
of keys between queries read less."""

_DIMENSIONS = "(entries, heads, keys of an entry, head_dim)"


class CacheCall(NamedTuple):
    """The arguments of ``orchard::flash_attn_decode``, in the order of its schema.

    Sequence b has the keys [cache_leftpad[b], cache_seqlens[b] + added) of its room. The last query
    stands at the last key.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cache_seqlens: Tensor | None = None
    """(B) int32: keys of each sequence, less `added`; None is 0. Numbers outside of the room are
    taken for its ends."""
    cache_batch_idx: Tensor | None = None
    """(B) int32: the entry that a sequence has; None is its own number."""
    cache_leftpad: Tensor | None = None
    """(B) int32: where a sequence's keys begin; None is 0."""
    block_table: Tensor | None = None
    """(B, pages) int32: the pages that a sequence's keys have one after another."""
    added: int = 0
    alibi_slopes: Tensor | None = None
    """(Hq) or (B, Hq) float32"""
    sinks: Tensor | None = None
    """(Hq) float32"""
    scale: float = 1.0
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    impl: str = "auto"

    @property
    def capacity(self) -> int:
        """The keys that a sequence has room for."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return self.key.shape[2] * pages

    @property
    def scoring(self) -> Scoring:
        """As the other ops have it, but for which keys there are."""
        return Scoring(
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            scale=self.scale,
            window_left=self.window_left,
            window_right=self.window_right,
            softcap=self.softcap,
        )

    def bounds(self) -> tuple[Tensor, Tensor]:
        """(B) int32, twice: where each sequence's keys begin and end, within its room."""
        query, capacity = self.query, self.capacity
        if self.cache_seqlens is None:
            ends = query.new_zeros(query.shape[0], dtype=torch.int32)
        else:
            ends = self.cache_seqlens.clamp(0, capacity)
        ends = (ends + self.added).clamp(max=capacity)
        if self.cache_leftpad is None:
            return torch.zeros_like(ends), ends
        return torch.minimum(self.cache_leftpad.clamp(min=0), ends), ends

    def key_ranges(self) -> Tensor:
        """As `Scoring.key_ranges`: the same keys, in the room of each sequence."""
        begins, ends = (x.view(-1, 1, 1) for x in self.bounds())
        q_len = self.query.shape[2]
        places = torch.arange(q_len, dtype=torch.int32, device=self.query.device) + ends - q_len
        shape = places.shape
        rows = (begins.expand(shape), ends.expand(shape), places, torch.zeros_like(places))
        return torch.stack(rows, -1)

    def rooms(self, cache: Tensor) -> Tensor:
        """(B, Hkv, capacity, D): a tensor of the cache with one entry for each sequence.

        It is a copy where sequences have pages or other entries.
        """
        last = cache.shape[0] - 1
        if self.block_table is not None:
            paged = cache[self.block_table.clamp(0, last)]  # (B, pages, Hkv, keys, D)
            return paged.transpose(1, 2).flatten(2, 3)
        if self.cache_batch_idx is not None:
            return cache[self.cache_batch_idx.clamp(0, last)]
        return cache

    def as_forward(self) -> tuple[Tensor, Tensor, Tensor, Scoring]:
        """The same problem for the ops that know no caches."""
        key, value = (self.rooms(x) for x in (self.key, self.value))
        return self.query, key, value, self.scoring._replace(key_ranges=self.key_ranges())

    def check(self, op: str) -> None:
        """Raises for malformed calls, from shapes, dtypes and devices alone."""
        query, key, value = self.query, self.key, self.value
        checks.check_impl(op, self.impl)
        checks.check_kinds(op, query, key, value)
        for name, x, dimensions in (
            ("query", query, "(batch, heads, length, head_dim)"),
            ("key", key, _DIMENSIONS),
            ("value", value, _DIMENSIONS),
        ):
            if x.dim() != 4:
                raise ValueError(f"{op}: {name} must be {dimensions}; got shape {tuple(x.shape)}")
        if self.added < 0:
            raise ValueError(f"{op}: added must be at least 0; got {self.added}")
        batch = query.shape[0]
        for name, numbers, dims in (
            ("cache_seqlens", self.cache_seqlens, 1),
            ("cache_batch_idx", self.cache_batch_idx, 1),
            ("cache_leftpad", self.cache_leftpad, 1),
            ("block_table", self.block_table, 2),
        ):
            if numbers is not None:
                _check_integers(op, name, numbers, dims, query)
        if self.block_table is not None and self.cache_batch_idx is not None:
            raise ValueError(
                f"{op}: cache_batch_idx and block_table both say where a sequence's keys are: pass "
                "one; got both"
            )
        own = self.block_table is None and self.cache_batch_idx is None
        if own and key.shape[0] != batch:
            raise ValueError(
                f"{op}: key must have query's batch size {batch} where neither cache_batch_idx nor "
                f"block_table is given; got {key.shape[0]}"
            )
        if not own and batch > 0 and key.shape[0] == 0:
            raise ValueError(f"{op}: key must have an entry; got shape {tuple(key.shape)}")
        one = query[:0], key[:0], value[:0]
        if value.shape[0] != key.shape[0]:
            raise ValueError(
                f"{op}: value must have key's {key.shape[0]} entries; got {value.shape[0]}"
            )
        checks.check_problem(op, *one)
        if key.shape[1] == 0:
            raise ValueError(f"{op}: key must have a head; got shape {tuple(key.shape)}")
        self.scoring.check(op, query, key)


def _check_integers(op: str, name: str, x: Tensor, dims: int, query: Tensor) -> None:
    batch = query.shape[0]
    checks.check_tensor(op, name, x)
    if x.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32; got {x.dtype}: cast it")
    if x.dim() != dims or x.shape[0] != batch:
        shape = f"({batch},)" if dims == 1 else f"({batch}, pages)"
        raise ValueError(f"{op}: {name} must have shape {shape}; got {tuple(x.shape)}")
    if x.device != query.device:
        raise ValueError(f"{op}: {name} must be on query's device {query.device}; got {x.device}")


_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "float": "float",
    "int": "int",
    "str": "str",
}


def _kind(annotation: Any) -> str:
    written = getattr(annotation, "__forward_arg__", annotation)
    return _SCHEMA_TYPES[written]


SCHEMA = ", ".join(f"{_kind(kind)} {name}" for name, kind in CacheCall.__annotations__.items())
"""The arguments as they stand in the schema of the op."""
