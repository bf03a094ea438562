"""`flash_attn_with_kvcache`: FlashAttention-2's function for generation, by its name.

What differs from the CUDA package on purpose is a table in docs/flash-attention.md.

Reference: T. Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691, and the arguments of
https://github.com/Dao-AILab/flash-attention, version 2.7.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sized
from typing import NamedTuple

import torch
from torch import Tensor

from . import calls, checks
from .cache import CacheCall, check_entries
from .cache_attention import attend
from .flash_attention import Options, by_our_names, check_options
from .ops.schema import APPEND
from .rotary import rotate

_OP = "orchard_ops.flash_attn_with_kvcache"
_DENSE = "(batch, seqlen, heads, head_dim)"
_INTEGERS = (int, torch.SymInt, numbers.Integral)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few queries to a cache of keys and values, which new ones may join first.

    Args:
        q: (B, Sq, Hq, D) float16, bfloat16, float32 (or float64, on the reference); any strides.
        k_cache: (entries, Sk, Hk, D): the room of a sequence an entry, or a page of `block_table`.
            Query head h uses key head h // (Hq / Hk).
        v_cache: (entries, Sk, Hk, Dv).
        k, v: (B, new, Hk, D) and (B, new, Hk, Dv): written to the caches behind the keys that
            cache_seqlens counts, before the attention. There may be fewer of them than queries.
        rotary_cos, rotary_sin: (positions, rotated columns / 2) in q's dtype or float32: q and k
            are rotated first, k by its slots and q by the slots from the first new one on, or
            all of it by that one where nothing hides keys (not causal, no window). Only with k.
            There are rows for all slots. More queries than new keys may stand behind the slots:
            they need rows, too, and one without a row is rotated by the last.
        cache_seqlens: (B) int32 or int64, or an int for all: the keys of each sequence, without the
            new ones. All slots by default. It is not changed: the caller counts on.
        cache_batch_idx: (B) int32 or int64: the entry that each sequence has; its own number by
            default, where entries behind those of the batch are left alone.
        cache_leftpad: (B) int32 or int64: where each sequence's keys begin; 0 by default.
        block_table: (B, pages) int32 or int64: the entries that each sequence's keys are in, one
            after another.
        softmax_scale: factor on the scores; 1 / sqrt(D) by default.
        causal: query i of n keys sees those up to i + n - Sq: aligned at the bottom right.
        window_size: (left, right): keys before and behind that place. A negative side is open, and
            so is one of at least the slots of a sequence. Causal: right is 0.
        softcap: c > 0 replaces a score s by c * tanh(s / c); anything else is none.
        rotary_interleaved: whether columns 2 i and 2 i + 1 turn together (GPT-J), or i and i + half
            of them (GPT-NeoX).
        alibi_slopes: (Hq) or (B, Hq) float32; -slope * the distance from a query's place to a key
            is added to the scores.
        num_splits: any number; how the keys are divided never depends on it.
        return_softmax_lse: also return lse.

    Returns:
        out (B, Sq, Hq, Dv); a row that sees no key is 0. With return_softmax_lse (out, lse): lse
        (B, Hq, Sq) float32, natural logarithm, -inf for a row that sees no key.

    The numbers in cache_seqlens, cache_leftpad, cache_batch_idx and block_table are not waited for:
    the kernels read and write nothing outside of the caches whatever they are. ORCHARD_DEBUG=1
    waits for them and raises for wrong ones. Slots that no sequence uses may hold anything.

    Raises:
        ValueError, TypeError: a malformed call; the message says what was wrong and what came.
        NotImplementedError: operands that require grad.
    """
    _check_operands(q, k_cache, v_cache, k, v)
    options = Options(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)
    check_options(_OP, options, return_softmax_lse, q, q.shape[0], "return_softmax_lse")
    _check_count("num_splits", num_splits)
    if cache_batch_idx is None and block_table is None and k_cache.shape[0] > q.shape[0]:
        # The first entries, each of the sequence with its number; views, which are written to.
        k_cache, v_cache = k_cache[: q.shape[0]], v_cache[: q.shape[0]]
    places = _places(q, k_cache, k, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    new = 0 if k is None else k.shape[1]
    named = by_our_names(options, places.capacity)
    left, right = named["window_left"], 0 if causal else named["window_right"]
    rotary = _rotary(q, k, rotary_cos, rotary_sin, rotary_interleaved, places.capacity)
    one_place = left < 0 and right < 0  # FlashAttention-2 rotates all queries alike then
    if rotary is not None and not one_place:
        rotary.check_rows(places.known + q.shape[1])
    if calls.looks_at_numbers(places.lengths, places.entries, places.starts, places.table):
        places.check_numbers(k_cache.shape[0], new)
        if rotary is not None and not one_place and q.numel():
            rotary.check_rows(int(places.begins(q).max()) + q.shape[1])
    if rotary is not None and k is not None:
        q, k = rotary.turn_both(q, k, places.begins(q), one_place)
    caches = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    if k is not None and v is not None:
        added = k.transpose(1, 2), v.transpose(1, 2)
        APPEND(*caches, *added, places.lengths, places.entries, places.table, places.known, "auto")
    call = CacheCall(
        q.transpose(1, 2),
        *caches,
        cache_seqlens=places.lengths,
        cache_batch_idx=places.entries,
        cache_leftpad=places.starts,
        block_table=places.table,
        added=places.known + new,
        alibi_slopes=alibi_slopes,
        scale=1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale,
        window_left=left,
        window_right=right,
        softcap=max(softcap, 0.0),
    )
    out, lse = attend(call)
    return (out.transpose(1, 2), lse) if return_softmax_lse else out.transpose(1, 2)


class _Places(NamedTuple):
    """Where the sequences of a call lie, as the ops take it."""

    lengths: Tensor | None
    known: int
    """Keys of each sequence besides those that `lengths` counts, without the new ones."""
    entries: Tensor | None
    starts: Tensor | None
    table: Tensor | None
    capacity: int

    def begins(self, q: Tensor) -> Tensor:
        """(B, 1): the slot of the first new key, which is its position."""
        if self.lengths is None:
            return torch.full((q.shape[0], 1), self.known, device=q.device)
        return self.lengths.clamp(0, self.capacity).unsqueeze(1) + self.known

    def check_numbers(self, num_entries: int, new: int) -> None:
        """Waits for the device, and raises for numbers that no right program passes."""
        checks.check_range(_OP, "cache_seqlens", self.lengths, 0, self.capacity - new)
        checks.check_range(_OP, "cache_batch_idx", self.entries, 0, num_entries - 1)
        checks.check_range(_OP, "cache_leftpad", self.starts, 0, self.capacity)
        keys = (self.known if self.lengths is None else self.lengths) + new
        checks.check_leftpad(_OP, "cache_leftpad", self.starts, keys)
        if self.table is not None:
            page_size = self.capacity // max(self.table.shape[1], 1)
            checks.check_pages(_OP, self.table, page_size, num_entries, keys)


class _Rotary(NamedTuple):
    cos: Tensor
    sin: Tensor
    interleaved: bool

    def check_rows(self, positions: int) -> None:
        """Raises where the last query surely stands behind the last row."""
        if positions > self.cos.shape[0]:
            raise ValueError(
                f"{_OP}: rotary_cos and rotary_sin must have a row for each position of the "
                f"queries, which are {positions} from the first key to the last query; got "
                f"{self.cos.shape[0]}: compute the table for more positions"
            )

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, self.cos, self.sin, positions, self.interleaved)

    def turn_both(
        self, q: Tensor, k: Tensor, begins: Tensor, one_place: bool
    ) -> tuple[Tensor, Tensor]:
        """q and the new k, whose first token stands at `begins` (B, 1); q's all do in one place."""
        q_len, new, heads = q.shape[1], k.shape[1], q.shape[2]
        positions = begins
        if max(q_len, new) > 1:
            positions = begins + torch.arange(max(q_len, new), device=q.device)
        if q_len == new and (new == 1 or not one_place):  # as one: half of the launches
            both = self.turn(torch.cat((q, k), 2), positions)
            return both[:, :, :heads], both[:, :, heads:]
        return (
            self.turn(q, begins if one_place else positions[:, :q_len]),
            self.turn(k, positions[:, :new]),
        )


def _check_operands(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None
) -> None:
    cached = ("q", q), ("k_cache", k_cache), ("v_cache", v_cache)
    checks.check_length_first(
        _OP, _DENSE, cached, (q, k_cache, v_cache), ("q", "k_cache", "v_cache")
    )
    if k_cache.shape[0] != v_cache.shape[0]:
        raise ValueError(
            f"{_OP}: k_cache and v_cache must have the same entries; got {k_cache.shape[0]} and "
            f"{v_cache.shape[0]}"
        )
    if k_cache.shape[2] == 0:
        raise ValueError(f"{_OP}: k_cache must have a head; got shape {tuple(k_cache.shape)}")
    if (k is None) != (v is None):
        raise ValueError(f"{_OP}: k and v must be given together; got {'v' if k is None else 'k'}")
    given: tuple[tuple[str, Tensor], ...] = cached
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x is None:
            continue
        checks.check_tensor(_OP, name, x)
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(
                f"{_OP}: {name} must be {q.dtype} on {q.device}, as q is; got {x.dtype} on "
                f"{x.device}"
            )
        length = x.shape[1] if x.dim() == 4 else -1
        if tuple(x.shape) != (q.shape[0], length, *cache.shape[2:]):
            raise ValueError(
                f"{_OP}: {name} must be (batch, new, heads, head_dim) with q's batch size "
                f"{q.shape[0]} and the cache's {tuple(cache.shape[2:])}; got {tuple(x.shape)}"
            )
        if not torch.compiler.is_compiling() and cache.is_neg():
            raise ValueError(
                f"{_OP}: {name}_cache must be plain memory, since it is written to; got a view "
                f"that negates it: pass {name}_cache.resolve_neg(), and keep that as the cache"
            )
        given = (*given, (name, x))
    if k is not None and v is not None and k.shape[1] != v.shape[1]:
        raise ValueError(
            f"{_OP}: k and v must have the same length; got {k.shape[1]} and {v.shape[1]}"
        )
    for name, x in given:
        if x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{_OP}: attention to a cache has no gradient; got a {name} that requires grad: "
                "call it under torch.no_grad(), or use flash_attn_func"
            )


def _check_count(name: str, x: object) -> None:
    if isinstance(x, Sized) and not isinstance(x, str):
        raise TypeError(
            f"{_OP}: {name} must be an int for all sequences, or an int32 or int64 tensor with one "
            f"for each; got {x!r}: pass torch.tensor(..., dtype=torch.int32) on q's device"
        )
    if isinstance(x, bool) or not isinstance(x, _INTEGERS):
        raise TypeError(f"{_OP}: {name} must be an integer; got {x!r}")
    if x < 0:
        raise ValueError(f"{_OP}: {name} must be at least 0; got {x}")


def _places(
    q: Tensor,
    k_cache: Tensor,
    k: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> _Places:
    batch = q.shape[0]
    table = checks.sequence_integers(_OP, "block_table", block_table, batch, q, " pages")
    entries = checks.sequence_integers(_OP, "cache_batch_idx", cache_batch_idx, batch, q)
    starts = checks.sequence_integers(_OP, "cache_leftpad", cache_leftpad, batch, q)
    check_entries(_OP, entries, table, ("q", q), ("k_cache", k_cache))
    capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
    new = 0 if k is None else k.shape[1]
    lengths, count = None, capacity
    if isinstance(cache_seqlens, Tensor):
        lengths = checks.sequence_integers(_OP, "cache_seqlens", cache_seqlens, batch, q)
        count = 0
    elif cache_seqlens is not None:
        _check_count("cache_seqlens", cache_seqlens)
        count = cache_seqlens
        if count + new > capacity:
            raise ValueError(
                f"{_OP}: cache_seqlens and the keys of k must fit into the {capacity} slots of a "
                f"sequence; got {count} and {new}"
            )
    elif k is not None:
        raise ValueError(
            f"{_OP}: k and v need cache_seqlens, which says where they go; got None: pass how many "
            "keys each sequence has"
        )
    return _Places(lengths, count, entries, starts, table, capacity)


def _rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    capacity: int,
) -> _Rotary | None:
    if not isinstance(interleaved, bool):
        raise TypeError(f"{_OP}: rotary_interleaved must be True or False; got {interleaved!r}")
    if cos is None and sin is None:
        return None
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ValueError(
            f"{_OP}: rotary_cos and rotary_sin must be given together; {missing} is None"
        )
    if k is None:
        raise ValueError(
            f"{_OP}: rotary_cos and rotary_sin rotate q and the new k; got no k: rotate q before "
            "the call, or pass k and v"
        )
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        checks.check_tensor(_OP, name, x)
        if x.dtype not in (q.dtype, torch.float32):
            raise TypeError(f"{_OP}: {name} must be {q.dtype} or float32; got {x.dtype}")
        if x.device != q.device:
            raise ValueError(
                f"{_OP}: {name} must be on the device of q, {q.device}; got {x.device}"
            )
        if x.dim() != 2 or x.shape != cos.shape or not 0 < 2 * x.shape[1] <= q.shape[-1]:
            raise ValueError(
                f"{_OP}: {name} must be (positions, rotated columns / 2) with at most "
                f"{q.shape[-1] // 2} columns; got shape {tuple(x.shape)}"
            )
        if x.shape[0] < capacity:
            raise ValueError(
                f"{_OP}: {name} must have a row for each of the {capacity} slots of a sequence; "
                f"got {x.shape[0]}"
            )
    return _Rotary(cos, sin, interleaved)
