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
from .scoring import Scoring, SymInt

MOST_QUERIES = 16
"""Queries of a sequence that the decode kernel takes: with more of them, kernels that share blocks
of keys between queries read less."""
PAGE_MULTIPLE = 16
"""Keys of a block that the decode kernel reads: one page has to hold it. The plan has it, too."""

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
    added: SymInt = 0
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
            return gathered(cache.transpose(1, 2), self.block_table).transpose(1, 2)
        if self.cache_batch_idx is not None:
            return cache[self.cache_batch_idx.clamp(0, last)]
        return cache

    def in_rooms(self) -> CacheCall:
        """The same problem with an entry for each sequence, in order."""
        key, value = (self.rooms(x) for x in (self.key, self.value))
        return self._replace(key=key, value=value, cache_batch_idx=None, block_table=None)

    def without_unused_pages(self) -> CacheCall:
        """The same problem with fewer columns of the table, where it is known without a wait that
        they hold no keys."""
        table, page_size = self.block_table, self.key.shape[2]
        if table is None or self.cache_seqlens is not None or page_size == 0:
            return self
        pages = (self.added + page_size - 1) // page_size
        return self._replace(block_table=table[:, :pages])

    def of(self, first: int, end: int) -> CacheCall:
        """The sequences from `first` to before `end`, of pages or entries that a tensor names."""
        slopes = self.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[first:end]
        lengths, entries, starts, table = (
            None if x is None else x[first:end]
            for x in (
                self.cache_seqlens,
                self.cache_batch_idx,
                self.cache_leftpad,
                self.block_table,
            )
        )
        return self._replace(
            query=self.query[first:end],
            cache_seqlens=lengths,
            cache_batch_idx=entries,
            cache_leftpad=starts,
            block_table=table,
            alibi_slopes=slopes,
        )

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
        _check_places(op, self, ("query", query), ("key", key))
        one = query[:0], key[:0], value[:0]
        if value.shape[0] != key.shape[0]:
            raise ValueError(
                f"{op}: value must have key's {key.shape[0]} entries; got {value.shape[0]}"
            )
        checks.check_problem(op, *one)
        if key.shape[1] == 0:
            raise ValueError(f"{op}: key must have a head; got shape {tuple(key.shape)}")
        self.scoring.check(op, query, key)


def gathered(cache: Tensor, table: Tensor) -> Tensor:
    """Pages (entries, keys, heads, D) of a table (B, pages) as (B, pages x keys, heads, D): a copy.

    Numbers without a page have the first or the last one.
    """
    return cache[table.clamp(0, cache.shape[0] - 1)].flatten(1, 2)


class AppendCall(NamedTuple):
    """The arguments of ``orchard::flash_attn_append``, in the order of its schema.

    New keys and values of sequence b go to the slots of its room from cache_seqlens[b] + offset on.
    What the room does not hold, and what would go to an entry that there is not, is left out.
    """

    key_cache: Tensor
    value_cache: Tensor
    key: Tensor
    """(B, Hkv, new keys, D)"""
    value: Tensor
    cache_seqlens: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    block_table: Tensor | None = None
    offset: SymInt = 0
    impl: str = "auto"

    def fill(self) -> None:
        """Does it in plain PyTorch."""
        key = self.key
        batch, _, length, _ = key.shape
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        page_size = self.key_cache.shape[2]
        if page_size * pages == 0:  # room for nothing
            return
        begins = key.new_zeros(batch, dtype=torch.int64)
        if self.cache_seqlens is not None:
            begins = self.cache_seqlens.long().clamp(0, page_size * pages)
        tokens = torch.arange(length, device=key.device)
        slots = begins.unsqueeze(1) + self.offset + tokens
        fits = slots < page_size * pages
        if self.block_table is not None:
            places = (slots // page_size).clamp(max=pages - 1)
            entries = self.block_table.gather(1, places).long()
        elif self.cache_batch_idx is not None:
            entries = self.cache_batch_idx.long().unsqueeze(1).expand(batch, length)
        else:
            entries = torch.arange(batch, device=key.device).unsqueeze(1).expand(batch, length)
        fits &= (entries >= 0) & (entries < self.key_cache.shape[0])
        b, token = fits.nonzero().unbind(1)
        entry, slot = entries[b, token], slots[b, token] % page_size
        for cache, added in ((self.key_cache, key), (self.value_cache, self.value)):
            cache[entry, :, slot] = added[b, :, token]

    def check(self, op: str) -> None:
        """Raises for malformed calls, from shapes, dtypes and devices alone."""
        checks.check_impl(op, self.impl)
        filled = (
            ("key_cache", self.key_cache, self.key),
            ("value_cache", self.value_cache, self.value),
        )
        for name, cache, added in filled:
            new = name.removesuffix("_cache")
            checks.check_tensor(op, name, cache)
            checks.check_tensor(op, new, added)
            if cache.dim() != 4 or added.dim() != 4:
                raise ValueError(
                    f"{op}: {name} must be {_DIMENSIONS} and {new} (batch, heads, length, "
                    f"head_dim); got shapes {tuple(cache.shape)} and {tuple(added.shape)}"
                )
            if cache.dtype not in checks.DTYPES or not cache.dtype == added.dtype == self.key.dtype:
                raise TypeError(
                    f"{op}: {name} and {new} must be of one dtype, float16, bfloat16, float32 or "
                    f"float64; got {cache.dtype} and {added.dtype}"
                )
            if any(step == 0 and n > 1 for step, n in zip(cache.stride(), cache.shape)):
                raise ValueError(
                    f"{op}: {name} must have a place of its own for each number, since it is "
                    f"written to; got shape {tuple(cache.shape)} with strides {cache.stride()}: "
                    "pass expanded_cache.clone(), or allocate the cache with torch.empty"
                )
        if self.offset < 0:
            raise ValueError(f"{op}: offset must be at least 0; got {self.offset}")
        _check_places(op, self, ("key", self.key), ("key_cache", self.key_cache))
        for name, x, shape in (
            ("value_cache", self.value_cache, (*self.key_cache.shape[:3], None)),
            ("key", self.key, (None, self.key_cache.shape[1], None, self.key_cache.shape[3])),
            ("value", self.value, (*self.key.shape[:3], self.value_cache.shape[3])),
        ):
            if any(m is not None and n != m for n, m in zip(x.shape, shape)):
                sizes = ", ".join("any" if n is None else str(n) for n in shape)
                raise ValueError(f"{op}: {name} must have shape ({sizes}); got {tuple(x.shape)}")
            if x.device != self.key_cache.device:
                raise ValueError(
                    f"{op}: {name} must be on key_cache's device {self.key_cache.device}; got "
                    f"{x.device}"
                )


def _check_places(
    op: str, call: CacheCall | AppendCall, of: tuple[str, Tensor], cache: tuple[str, Tensor]
) -> None:
    """Checks what says where the sequences lie, of the batch of one tensor in the other."""
    for name, dims in (
        ("cache_seqlens", 1),
        ("cache_batch_idx", 1),
        ("cache_leftpad", 1),
        ("block_table", 2),
    ):
        numbers = getattr(call, name, None)
        if numbers is not None:
            _check_integers(op, name, numbers, dims, of)
    check_entries(op, call.cache_batch_idx, call.block_table, of, cache)


def check_entries(
    op: str,
    batch_idx: Tensor | None,
    block_table: Tensor | None,
    of: tuple[str, Tensor],
    cache: tuple[str, Tensor],
) -> None:
    """Checks that one thing says which entries of a cache the sequences of a batch have."""
    batch, entries = of[1].shape[0], cache[1].shape[0]
    if block_table is not None and batch_idx is not None:
        raise ValueError(
            f"{op}: cache_batch_idx and block_table both say where a sequence's keys are: pass "
            "one; got both"
        )
    own = block_table is None and batch_idx is None
    if own and entries != batch:
        raise ValueError(
            f"{op}: {cache[0]} must have {of[0]}'s batch size {batch} where neither "
            f"cache_batch_idx nor block_table is given; got {entries}"
        )
    if not own and batch > 0 and entries == 0:
        raise ValueError(f"{op}: {cache[0]} must have an entry; got shape {tuple(cache[1].shape)}")


def _check_integers(op: str, name: str, x: Tensor, dims: int, of: tuple[str, Tensor]) -> None:
    batch, device = of[1].shape[0], of[1].device
    checks.check_tensor(op, name, x)
    if x.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32; got {x.dtype}: cast it")
    if x.dim() != dims or x.shape[0] != batch:
        shape = f"({batch},)" if dims == 1 else f"({batch}, pages)"
        raise ValueError(f"{op}: {name} must have shape {shape}; got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on {of[0]}'s device {device}; got {x.device}")


_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "float": "float",
    "int": "int",
    "SymInt": "SymInt",
    "str": "str",
}


def _kind(annotation: Any) -> str:
    written = getattr(annotation, "__forward_arg__", annotation)
    return _SCHEMA_TYPES[written]


def _listed(arguments: type) -> str:
    return ", ".join(f"{_kind(kind)} {name}" for name, kind in arguments.__annotations__.items())


DECODE_SCHEMA = _listed(CacheCall)
"""The arguments as they stand in the schema of flash_attn_decode."""
APPENDED_SCHEMA = _listed(AppendCall)
"""Those of flash_attn_append, as they stand in the schema of a query that writes to none."""
APPEND_SCHEMA = APPENDED_SCHEMA.replace("Tensor key_cache", "Tensor(a!) key_cache").replace(
    "Tensor value_cache", "Tensor(b!) value_cache"
)
"""The same of flash_attn_append, which writes to the caches."""
