"""The ops for caches: kernels on sequences of any lengths, and what is written."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from cached_cases import Cached
from torch import Tensor

from orchard_ops.cache import AppendCall, CacheCall

from ..harness import (
    APPEND,
    DECODE,
    DECODE_MERGE,
    DTYPE_NUMBERS,
    Guarded,
    Sources,
    launch,
)
from .attention import BF16, F16, F32, dense
from .cache_plans import PLANS, padded_width
from .compiled import compile_kernel
from .properties import Property

BLOCK, LEAST_PART, MOST_GROUPS = 16, 64, 32
FAR = 2**31 - 1


def _numbers(x: Tensor | None) -> Guarded:
    """int32 numbers as they are bound; where there are none, some that would be noticed."""
    if x is None:
        x = torch.tensor([FAR], dtype=torch.int32)
    shape = tuple(x.shape)
    guarded = Guarded(shape, dense(shape), torch.int32)
    guarded.tensor.copy_(x)
    return guarded


def _floats(x: Tensor | None) -> Guarded:
    x = torch.full((1,), float("nan")) if x is None else x
    guarded = Guarded(tuple(x.shape), dense(tuple(x.shape)), F32)
    guarded.tensor.copy_(x)
    return guarded


def _place(x: Guarded) -> tuple:
    return x.tensor.shape, x.tensor.stride(), x.offset


def decode_plan(call: CacheCall, x: dict[str, Guarded], sources: Sources) -> Any:
    table = call.block_table
    cache = {
        "paged": table is not None,
        "pages": 0 if table is None else table.shape[1],
        "table_row": 0 if table is None else table.shape[1],
        "page_size": call.key.shape[2],
        "entries": call.key.shape[0],
        "added": call.added,
        "has_lengths": call.cache_seqlens is not None,
        "has_starts": call.cache_leftpad is not None,
        "has_entries": call.cache_batch_idx is not None,
    }
    slopes = call.alibi_slopes
    fields: dict[str, Any] = {
        "scale": call.scale,
        "window_left": call.window_left,
        "window_right": call.window_right,
        "softcap": call.softcap,
        "has_sinks": call.sinks is not None,
    }
    if slopes is not None:
        batch = slopes.shape[1] if slopes.dim() == 2 else 0
        fields |= {"has_alibi": True, "alibi_batch": batch, "alibi_head": 1}
    names = {"q": "query", "k": "key", "v": "value", "out": "out"}
    layouts = {short: _place(x[name]) for short, name in names.items()}
    return sources.decode(layouts, DTYPE_NUMBERS[call.query.dtype], cache, **fields)


def parts_of(first: int, last: int, parts: int) -> Iterator[tuple[int, int]]:
    """Keys [begin, end) of each of `parts` of keys [first, last): whole blocks, up to one more for
    the first parts, but into no smaller ones than LEAST_PART.
    """
    blocks = -(-last // BLOCK) - first // BLOCK
    taken = min(max(blocks // (LEAST_PART // BLOCK), 1), parts)
    begin = first // BLOCK * BLOCK
    for part in range(parts):
        count = (blocks // taken + (part < blocks % taken)) * (part < taken)
        yield max(begin, first), min(begin + count * BLOCK, last)
        begin += count * BLOCK


def work_of(call: CacheCall, groups: int = 0) -> tuple[int, Tensor]:
    """Products of fragments of keys, for every 8 of a head dim; and which threadgroups have any, as
    the grid has them: `groups` for the keys of a sequence, or as many as the plan has.
    """
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    rows = heads // kv_heads * call.query.shape[2]
    widest = max(call.query.shape[3], call.value.shape[3])
    block_rows = 16 if rows > 8 and widest <= 128 else 8
    most = max(MOST_GROUPS // max(-(-rows // block_rows), 1), 1)
    parts = 4 * (groups or min(max(-(-call.capacity // (4 * LEAST_PART)), 1), most))
    total, used = 0, []
    begins, ends = (x.tolist() for x in call.bounds())
    for b, _, row0 in itertools.product(
        range(len(ends)), range(kv_heads), range(0, rows, block_rows)
    ):
        seen, of_parts = [], [False] * parts
        for row in range(row0, min(row0 + block_rows, rows)):
            place = ends[b] - call.query.shape[2] + row // (heads // kv_heads)
            left = begins[b] if call.window_left < 0 else place - call.window_left
            right = ends[b] if call.window_right < 0 else place + call.window_right + 1
            begin, end = max(begins[b], left), min(ends[b], right)
            seen += [(begin, end)] if begin < end else []
        used.append(of_parts)
        if not seen:
            continue
        first, last = min(x for x, _ in seen), max(y for _, y in seen)
        for part, (begin, end) in enumerate(parts_of(first, last, parts)):
            of_parts[part] = begin < end
            total += len(range(begin // BLOCK * BLOCK, end, BLOCK)) if begin < end else 0
    return total * block_rows // 8 * 2, torch.tensor(used).unflatten(1, (-1, 4)).any(-1)


@dataclass(frozen=True)
class Filled:
    """Attention to a cache, from its kernels, against float64 and the number of its products."""

    name: str
    problem: Cached
    family: str = DECODE
    layouts: tuple[str, str] = ("blhd", "blhd")
    """Of the query, and of keys and values."""
    out_layout: str = "dense"
    check: bool = False
    changed: dict[str, Any] = field(default_factory=dict)
    """Arguments that the kernel gets in place of the problem's, with the same result."""
    beside: tuple[str, ...] = (DECODE, DECODE_MERGE)
    groups: int = 0
    """Threadgroups for the keys of a sequence, in place of the plan's number."""

    def call(self) -> CacheCall:
        return self.problem.call()._replace(**self.changed)

    def run(self, sources: Sources, note: Callable[[str], None] = lambda _: None) -> None:
        call = self.call()
        out, lse, products, weights = self.results(call, sources, note)
        self.problem.check(out, lse)
        padded = sum(padded_width(sources, x.shape[3]) for x in (call.query, call.value))
        count, used = work_of(call, self.groups)
        expected = count * padded // 8
        assert products == expected, f"{products} products, not {expected}"
        found = weights.view(*used.shape, -1)
        assert torch.equal((found != 0).any(-1), used), "the keys are divided in another way"

    def results(
        self, call: CacheCall, sources: Sources, note: Callable[[str], None]
    ) -> tuple[Tensor, Tensor, int, Tensor]:
        """out, lse, the number of products, and what each row's weights of a threadgroup sum to."""
        of_query, of_cache = self.layouts
        x = {
            "query": Guarded.like(call.query, of_query),
            "key": Guarded.like(call.key, of_cache),
            "value": Guarded.like(call.value, of_cache),
        }
        shape = (*call.query.shape[:3], call.value.shape[3])
        x["out"] = Guarded.like(torch.zeros(shape, dtype=call.query.dtype), self.out_layout)
        x["out"].bits.fill_(-1)
        plan = decode_plan(call, x, sources)
        assert not plan.refusal, plan.refusal
        first, second = (vars(kernel) for kernel in plan.kernels)
        libraries = [
            compile_kernel(sources, kernel["family"], kernel, self.check)
            for kernel in (first, second)
        ]
        note("compiled")
        rows, stride = plan.part_rows, plan.params.part_stride
        if self.groups:
            rows = rows // plan.params.parts * self.groups
            plan.params.parts = self.groups
            first["groups"] = (first["groups"][0], self.groups)
        params = bytes(plan.params)
        sums = Guarded((rows, stride), (stride, 1), F32)
        part_sums = Guarded((rows, 2), (2, 1), F32)
        inputs = {
            **{name: x[name] for name in ("query", "key", "value")},
            "cache_lengths": _numbers(call.cache_seqlens),
            "cache_starts": _numbers(call.cache_leftpad),
            "cache_entries": _numbers(call.cache_batch_idx),
        }
        if call.block_table is not None:
            inputs["block_table"] = _numbers(call.block_table)
        if call.alibi_slopes is not None:
            inputs["alibi_slopes"] = _floats(call.alibi_slopes)
        parts = {"parts": sums, "part_sums": part_sums}
        counters = launch(
            libraries[0], first, sources.buffers, params, inputs, parts, workers=1, seed=1
        )
        if not self.check:  # which leaves gaps in threadgroup memory
            fragments = plan.params.block_rows // 8
            query = fragments * padded_width(sources, call.query.shape[3]) * 8
            query *= 2 if call.query.dtype == F16 else 4
            expected = query + 4 * fragments * 8 * 8 + 4 * 8 * 32 * 8
            assert counters.threadgroup_memory == expected, "threadgroup memory"
        lse = Guarded(shape[:3], dense(shape[:3]), F32)
        joined = {"out": x["out"], "row_stats": lse}
        known = {**parts, "sinks": _floats(call.sinks)}
        joining = launch(
            libraries[1], second, sources.buffers, params, known, joined, workers=1, seed=1
        )
        if not self.check:
            expected = second["threads"] // 32 * (1 + 32) * 8
            assert joining.threadgroup_memory == expected, "threadgroup memory of the merge"
        weights = part_sums.tensor[:, 1].clone()
        return x["out"].tensor.clone(), lse.tensor.clone(), counters.mma, weights


@dataclass(frozen=True)
class Appended:
    """Keys and values on their way into a cache, bit for bit."""

    name: str
    problem: Cached
    new: int = 3
    offset: int = 0
    layouts: tuple[str, str] = ("blhd", "blhd")
    check: bool = False
    changed: dict[str, Any] = field(default_factory=dict)
    family: str = APPEND

    def run(self, sources: Sources, note: Callable[[str], None] = lambda _: None) -> None:
        given = self.problem.call(garbage=-3.0)
        generator = torch.Generator().manual_seed(4)

        def draw(cache: Tensor) -> Tensor:
            shape = (given.query.shape[0], cache.shape[1], self.new, cache.shape[3])
            return torch.randn(shape, generator=generator).to(cache.dtype)

        call = AppendCall(
            given.key.clone(),
            given.value.clone(),
            draw(given.key),
            draw(given.value),
            given.cache_seqlens,
            given.cache_batch_idx,
            given.block_table,
            self.offset,
        )._replace(**self.changed)
        table = call.block_table
        numbers = {
            "paged": table is not None,
            "pages": 0 if table is None else table.shape[1],
            "table_row": 0 if table is None else table.shape[1],
            "offset": self.offset,
            "has_lengths": call.cache_seqlens is not None,
            "has_entries": call.cache_batch_idx is not None,
        }
        expected = call._replace(
            key_cache=call.key_cache.clone(), value_cache=call.value_cache.clone()
        )
        expected.fill()
        for new, cache, right in (
            (call.key, call.key_cache, expected.key_cache),
            (call.value, call.value_cache, expected.value_cache),
        ):
            added, filled = (Guarded.like(x, y) for x, y in zip((new, cache), self.layouts))
            places = _place(added), _place(filled)
            plan = sources.append(*places, DTYPE_NUMBERS[cache.dtype], numbers)
            assert not plan.refusal, plan.refusal
            kernel = vars(plan.kernels[0])
            library = compile_kernel(sources, APPEND, kernel, self.check)
            note("compiled")
            inputs = {
                "key": added,
                "cache_lengths": _numbers(call.cache_seqlens),
                "cache_entries": _numbers(call.cache_batch_idx),
                "block_table": _numbers(table),
            }
            launch(
                library, kernel, sources.buffers, bytes(plan.params), inputs, {"out": filled},
                workers=1,
            )  # fmt: skip
            assert torch.equal(filled.tensor, right)


# ---- all of them --------------------------------------------------------------------------------

_CAUSAL = {"window_right": 0}
_FULL = Cached(
    (180, 77, 208), (3, 70, 0), heads=(6, 2), q_len=4, page_size=48, capacity=240, added=3,
    alibi="batch", sinks=True, options={"window_left": 100, "window_right": 0, "softcap": 3.0},
)  # fmt: skip


def _wild(**changed: Any) -> dict[str, Any]:
    """Numbers that say the same as the problem's, since they lie outside of the cache."""
    return {
        name: torch.tensor(x, dtype=torch.int32) if isinstance(x, list) else x
        for name, x in changed.items()
    }


_OF_MERGE = ("sinks", "padded", "blocks of rows", "wide values", "odd widths", "no keys", "groups")


@functools.cache
def killers() -> tuple[Property | Filled | Appended, ...]:
    attended = [
        Filled("decode: a token", Cached(dtype=F16, options=_CAUSAL)),
        Filled("decode: ragged, causal", Cached((70, 5, 16), q_len=3, options=_CAUSAL)),
        Filled("decode: bfloat16", Cached((70, 5), q_len=2, dtype=BF16)),
        Filled("decode: 16 rows", Cached((90, 33), heads=(8, 2), q_len=3, dtype=F16)),
        Filled(
            "decode: several blocks of rows",
            Cached((90, 33), heads=(10, 2), q_len=5, dtype=F16, options=_CAUSAL),
        ),
        Filled("decode: pages", Cached((130, 40), q_len=2, page_size=16, dtype=F16)),
        Filled("decode: wide pages", Cached((200, 47), page_size=48, capacity=240)),
        Filled("decode: everything", _FULL),
        Filled("decode: everything, float16", replace(_FULL, dtype=F16, widths=(72, 40))),
        Filled("decode: wide, narrow values", Cached((70, 9), widths=(192, 128), dtype=F16)),
        Filled("decode: wide values", Cached((40, 9), widths=(64, 256), heads=(9, 1), dtype=BF16)),
        Filled("decode: odd widths", Cached((40, 9), widths=(37, 5), q_len=2)),
        Filled("decode: odd widths, float16", Cached((40, 9), widths=(67, 69), dtype=F16)),
        Filled("decode: even widths", Cached((40, 9), widths=(38, 6), q_len=2)),
        Filled("decode: even widths, float16", Cached((40, 9), widths=(70, 66), dtype=F16)),
        Filled("decode: chunks and halves", Cached((40, 9), widths=(96, 48))),
        Filled(
            "decode: chunks, halves and quarters, float16",
            Cached((40, 9), widths=(112, 48), dtype=F16),
        ),
        Filled("decode: halves and quarters, float16", Cached((40, 9), widths=(48, 16), dtype=F16)),
        Filled("decode: quarters, float16", Cached((40, 9), widths=(16, 80), dtype=F16)),
        Filled("decode: wide, by quarters, float16", Cached((40, 9), widths=(240, 160), dtype=F16)),
        Filled("decode: wide and no chunks", Cached((40, 9), widths=(112, 208))),
        Filled("decode: columns apart", Cached((40, 9)), layouts=("columns", "columns")),
        Filled(
            "decode: columns apart, several queries", Cached((40, 9), q_len=3),
            layouts=("columns", "columns"),
        ),
        *(
            Filled(
                f"decode: columns apart, {width} of them, {dtype}, to the end of the room"
                .replace("torch.", ""),
                Cached((64,), capacity=64, heads=(1, 1), widths=(width, width), dtype=dtype),
                layouts=("columns", "columns"), check=True,
            )
            for width, dtype in ((16, F16), (48, F16), (112, F16), (16, F32), (48, F32), (64, F32))
        ),
        Filled(
            "decode: padded values to the end of the room",
            Cached((64,), capacity=64, heads=(1, 1), widths=(64, 40), dtype=F16), check=True,
        ),
        Filled(
            "decode: padded values that are asked for ahead, to the end of the room",
            Cached((64,), capacity=64, heads=(1, 1), widths=(192, 185), dtype=F16), check=True,
        ),
        Filled(
            "decode: padded keys to the end of the room",
            Cached((64,), capacity=64, heads=(1, 1), widths=(40, 64), dtype=F16), check=True,
        ),
        Filled(
            "decode: part of a block to the end of the room",
            Cached((9,), capacity=9, heads=(1, 1), dtype=F16), check=True,
        ),
        *(
            Filled(
                f"decode: queries whose windows begin in one block, {left}",
                Cached((160,), heads=(2, 1), q_len=5, dtype=F16,
                       options={"window_left": left, "window_right": right}),
            )
            for left, right in ((75, 0), (59, 0), (75, 2), (90, 0))
        ),
        Filled("decode: odd places", Cached((40, 9), dtype=F16), layouts=("rows_odd", "odd")),
        Filled(
            "decode: padded rows", Cached((40, 9), dtype=F16, q_len=2),
            layouts=("padded", "padded"), out_layout="padded",
        ),
        Filled("decode: many parts", Cached((1000, 300), capacity=1024, heads=(2, 1), dtype=F16)),
        Filled(
            "decode: a part of more keys than the least",
            Cached((9000,), capacity=9008, heads=(1, 1), dtype=F16),
        ),
        Filled(
            "decode: as many keys as parts of the least size hold",
            Cached((8192,), capacity=8192, heads=(1, 1), dtype=F16),
        ),
        Filled(
            "decode: parts behind a long padding",
            Cached((16392,), (8192,), capacity=16400, heads=(1, 1), dtype=F16),
        ),
        Filled(
            "decode: a key more than parts of the least size hold",
            Cached((8193,), capacity=8208, heads=(1, 1), dtype=F16),
        ),
        Filled(
            "decode: more groups than the lanes of a merging simdgroup have parts",
            Cached((9000,), capacity=9008, heads=(3, 1), widths=(8, 136), q_len=4),
            groups=160,
        ),
        Filled(
            "decode: more groups than the lanes of a merging simdgroup have parts, checked",
            Cached((9000,), capacity=9008, heads=(1, 1), widths=(8, 72)),
            groups=160, check=True,
        ),
        Filled(
            "decode: more groups than a lane reads parts of at once, checked",
            Cached((9000,), capacity=9008, heads=(1, 1), widths=(8, 72)),
            groups=76, check=True,
        ),
        Filled(
            "decode: one group more than a lane reads parts of at once, checked",
            Cached((9000,), capacity=9008, heads=(8, 1), widths=(8, 72)),
            groups=68, check=True,
        ),
        Filled(
            "decode: a window in a long room",
            Cached((9000,), capacity=9008, heads=(1, 1), dtype=F16, options={"window_left": 129}),
        ),
        Filled(
            "decode: a wide window in a long room",
            Cached((9000,), capacity=9008, heads=(1, 1), dtype=F16, options={"window_left": 600}),
        ),
        Filled(
            "decode: parts of one size, none of them empty",
            Cached((2560,), capacity=2560, heads=(1, 1), dtype=F16), groups=8,
        ),
        Filled("decode: a full odd room", Cached((63, 63), capacity=63, q_len=2)),
        Filled("decode: a full odd room, 16 bits", Cached((63, 63), capacity=63, dtype=F16)),
        Filled(
            "decode: a full odd room of wide heads",
            Cached((63, 63), capacity=63, widths=(256, 256)),
        ),
        Filled(
            "decode: a full odd room of wide heads, 16 bits",
            Cached((63, 63), capacity=63, dtype=F16, widths=(256, 256)),
        ),
        Filled(
            "decode: a window far behind",
            Cached((500, 90), capacity=512, heads=(2, 1), options={"window_left": 70}),
        ),
        Filled(
            "decode: window to the right",
            Cached(q_len=6, options={"window_left": 9, "window_right": 2}),
        ),
        Filled("decode: entries", Cached((70, 33), entries=(3, 0), starts=(31, 0))),
        Filled("decode: the second entry", Cached((70, 33), entries=(1, 2))),
        Filled(
            "decode: entries far outside", Cached((64, 9), entries=(3, 0)),
            changed=_wild(cache_batch_idx=[FAR, -FAR]),
        ),
        Filled(
            "decode: pages far outside",
            Cached((16, 9), page_size=16, capacity=16, table=((4,), (0,))),
            changed=_wild(block_table=[[FAR], [-FAR]]),
        ),
        Filled(
            "decode: pages that a part fills",
            Cached((64,), page_size=16, capacity=64, heads=(1, 1)),
        ),
        Filled(
            "decode: added alone", Cached((70, 70)), changed={"cache_seqlens": None, "added": 70}
        ),
        Filled("decode: no keys", Cached((0, 3), q_len=5, options=_CAUSAL)),
        Filled("decode: no keys but sinks", Cached((0, 3), q_len=5, sinks=True, options=_CAUSAL)),
        Filled("decode: a large softcap", Cached(options={"softcap": 1e4})),
        Filled("decode: slopes by head", Cached(q_len=2, alibi="head", heads=(6, 2))),
        Filled("decode: a full room", Cached((64, 63), capacity=64, q_len=2, options=_CAUSAL)),
        Filled(
            "decode: lengths far outside", Cached((64, 0), capacity=64, q_len=2, options=_CAUSAL),
            changed=_wild(cache_seqlens=[FAR, -FAR]),
        ),
        Filled(
            "decode: starts far outside", Cached((64, 9), (0, 9), capacity=64, q_len=2),
            changed=_wild(cache_leftpad=[-FAR, FAR]),
        ),
        Filled(
            "decode: more added than there is room", Cached((64, 64), capacity=64),
            changed=_wild(cache_seqlens=[60, FAR], added=1 << 28),
        ),
    ]  # fmt: skip
    attended += [
        replace(x, name=f"{x.name}, checked", check=True)
        for x in attended
        if x.problem is _FULL or "pages" in x.name or "odd" in x.name or "far" in x.name
    ]
    attended += [
        replace(x, name=x.name.replace("decode:", "merge:"), family=DECODE_MERGE)
        for x in attended
        if x.problem is _FULL or any(word in x.name for word in _OF_MERGE)
    ]
    filled = [
        Appended("append: rooms", Cached((130, 77), dtype=F16)),
        Appended("append: offset", Cached((130, 77)), offset=5),
        Appended("append: pages", Cached((130, 15), page_size=16, dtype=BF16), new=20),
        Appended("append: entries", Cached((130, 77), entries=(3, 0), widths=(64, 24)), new=2),
        Appended("append: odd widths", Cached((30, 7), widths=(37, 5), dtype=F16)),
        Appended("append: odd places", Cached((30, 7)), layouts=("rows_odd", "columns")),
        Appended("append: columns apart", Cached((30, 7)), layouts=("columns", "columns")),
        Appended("append: beyond the room", Cached((62, 7), capacity=64), new=4),
        Appended("append: beyond the pages", Cached((62, 7), capacity=64, page_size=16), new=4),
        Appended("append: no lengths", Cached((0, 0)), offset=7, changed={"cache_seqlens": None}),
        Appended(
            "append: wild lengths", Cached((0, 0)),
            changed=_wild(cache_seqlens=[FAR, -FAR]),
        ),
        Appended(
            "append: wild entries", Cached((30, 7), entries=(3, 0)),
            changed=_wild(cache_batch_idx=[4, -1]),
        ),
        Appended(
            "append: the last entry", Cached((30, 7), entries=(3, 0)),
            changed=_wild(cache_batch_idx=[3, 0]),
        ),
    ]  # fmt: skip
    filled += [replace(x, name=f"{x.name}, checked", check=True) for x in filled]
    return (
        *(Property(f"plan: {test.__name__.replace('_', ' ')}", None, test) for test in PLANS),
        *(x for x in attended if not x.check),
        *filled,
        *(x for x in attended if x.check),
    )
