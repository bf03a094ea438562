"""The ops for caches: kernels on sequences of any lengths, what the plan says, what is written."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
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


def work_of(call: CacheCall, groups: int = 0) -> tuple[int, Tensor]:
    """Products of fragments of keys, for every 8 of a head dim; and which threadgroups have any, as
    the grid has them: `groups` for the keys of a sequence, or as many as the plan has.
    """
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    rows = heads // kv_heads * call.query.shape[2]
    widest = max(-(-call.query.shape[3] // 64), -(-call.value.shape[3] // 64)) * 64
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
        start = first // BLOCK * BLOCK
        even = -((start - last) // parts)
        size = max(-(-even // BLOCK) * BLOCK, LEAST_PART)
        for part in range(parts):
            begin, end = max(start + part * size, first), min(start + (part + 1) * size, last)
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
        lse = Guarded(shape[:3], dense(shape[:3]), F32)
        joined = {"out": x["out"], "row_stats": lse}
        known = {**parts, "sinks": _floats(call.sinks)}
        launch(libraries[1], second, sources.buffers, params, known, joined, workers=1, seed=1)
        self.problem.check(x["out"].tensor.clone(), lse.tensor.clone())
        padded = sum(-(-n // 64) * 8 for n in (call.query.shape[3], call.value.shape[3]))
        products, used = work_of(call, self.groups)
        expected = products * padded
        assert counters.mma == expected, f"{counters.mma} products, not {expected}"
        found = part_sums.tensor.view(*used.shape, -1, 2)[..., 1]
        assert torch.equal((found != 0).any(-1), used), "the keys are divided in another way"


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


# ---- the plan -----------------------------------------------------------------------------------

_TYPES = {
    F16: ("float16", "half", "half"),
    BF16: ("bfloat16", "bfloat", "float"),
    F32: ("float32", "float", "float"),
}


def _layout(*shape: int, offset: int = 0, strides: tuple[int, ...] | None = None) -> tuple:
    return shape, strides or dense(shape), offset


def _plan(sources: Sources, dtype: torch.dtype = F16, batch: int = 2,
          heads: tuple[int, int] = (8, 2), q_len: int = 1, widths: tuple[int, int] = (64, 64),
          keys: int = 300, entries: int = 0,
          cache: dict[str, int] | None = None, changed: dict[str, tuple] | None = None,
          **fields: float) -> Any:  # fmt: skip
    entries = entries or batch
    layouts = {
        "q": _layout(batch, heads[0], q_len, widths[0]),
        "k": _layout(entries, heads[1], keys, widths[0]),
        "v": _layout(entries, heads[1], keys, widths[1]),
        "out": _layout(batch, heads[0], q_len, widths[1]),
        **(changed or {}),
    }
    numbers = {"page_size": keys, "entries": entries, **(cache or {})}
    return sources.decode(layouts, DTYPE_NUMBERS[dtype], numbers, **{"scale": 1.0, **fields})


def _expect(plan: Any, name: str, arguments: str, groups: tuple[int, int], rows: int) -> None:
    assert not plan.refusal, plan.refusal
    kernel = plan.kernels[0]
    call = f"attention_decode<{arguments}>"
    assert kernel.name == f"attention_decode_{name}", kernel.name
    assert kernel.instantiation == (
        f'template [[host_name("attention_decode_{name}")]] [[kernel]] decltype({call}) {call};\n'
    ), kernel.instantiation
    assert (kernel.groups, kernel.threads) == (groups, 128), kernel
    assert kernel.tile == f"{groups[0]} x {groups[1]} threadgroups of 128 threads", kernel.tile
    assert plan.part_rows == rows, plan.part_rows


def decode_variants(sources: Sources) -> None:
    for (dtype, names), (width, value) in itertools.product(
        _TYPES.items(), ((64, 64), (1, 128), (65, 129), (128, 128), (129, 64), (192, 256), (256, 8))
    ):
        torch_name, metal, operand = names
        bd, vd = (-(-n // 64) * 64 for n in (width, value))
        chunk = 16 // dtype.itemsize
        chunks = width % chunk == 0 and value % chunk == 0
        for paged, softcap, alibi in itertools.product((0, 1), repeat=3):
            plan = _plan(
                sources, dtype, widths=(width, value), keys=16 if paged else 300, entries=9,
                cache={"paged": paged, "pages": 5, "table_row": 5, "has_entries": 1},
                softcap=2.0 * softcap, has_alibi=alibi,
            )  # fmt: skip
            words = [torch_name, f"d{bd}", f"v{vd}", "r1", "chunks" if chunks else "elements"]
            words += ["paged"] * paged + ["softcap"] * softcap + ["alibi"] * alibi
            flags = [str(bool(n)).lower() for n in (chunks, paged, softcap, alibi)]
            arguments = [metal, operand, str(bd), str(vd), "1", "4", *flags, "NoMask", "false"]
            groups = (4, 1 if paged else 2)
            rows = 4 * groups[1] * 8
            _expect(plan, "_".join(words), ", ".join(arguments), groups, rows)
            assert plan.params.part_stride == vd
            merge = plan.kernels[1]
            assert merge.name == f"attention_decode_merge_{torch_name}_v{vd}"
            assert f"decltype(attention_decode_merge<{metal}, {vd}, 4>)" in merge.instantiation
            assert merge.groups == (16, 1) and merge.threads == 128


def decode_rows(sources: Sources) -> None:
    """Rows of a threadgroup: 8, or 16 where there are more and the head dims allow it."""
    for heads, q_len, widths, block_rows, blocks in (
        ((8, 1), 1, (128, 128), 8, 1), ((9, 1), 1, (128, 128), 16, 1),
        ((8, 2), 4, (128, 128), 16, 1), ((8, 2), 5, (128, 128), 16, 2),
        ((9, 1), 1, (129, 64), 8, 2), ((9, 1), 1, (64, 129), 8, 2), ((24, 1), 1, (256, 256), 8, 3),
        ((1, 1), 1, (64, 64), 8, 1), ((2, 2), 16, (64, 64), 16, 1), ((2, 2), 17, (64, 64), 16, 2),
    ):  # fmt: skip
        plan = _plan(sources, heads=heads, q_len=q_len, widths=widths, keys=200)
        x = plan.params
        assert (x.block_rows, x.blocks, x.parts) == (block_rows, blocks, 1), (heads, q_len)
        assert plan.kernels[0].groups == (2 * heads[1] * blocks, 1)
        assert f"_r{block_rows // 8}_" in plan.kernels[0].name
        assert plan.part_rows == 2 * heads[1] * blocks * block_rows
        out_rows = 2 * heads[0] * q_len
        assert plan.kernels[1].groups == (out_rows, 1)


def decode_parts(sources: Sources) -> None:
    """By the capacity, at most 32 threadgroups for all rows of a head, but 1 for each block."""
    for keys, groups in (
        (0, 1), (1, 1), (255, 1), (256, 1), (257, 2), (512, 2), (513, 3), (7936, 31), (7937, 32),
        (8192, 32), (8193, 32), (1 << 28, 32),
    ):  # fmt: skip
        for batch, heads in ((1, (1, 1)), (5, (8, 4))):
            plan = _plan(sources, keys=keys, batch=batch, heads=heads)
            assert plan.kernels[0].groups == (batch * heads[1], groups), keys
            assert plan.params.parts == groups
            assert plan.params.cache.capacity == plan.params.attention.kv_len == keys
    for rows, groups in ((17, 16), (33, 10), (48, 10), (49, 8), (257, 1), (512, 1), (513, 1)):
        for batch, kv_heads in ((1, 1), (3, 2)):
            heads = (rows * kv_heads, kv_heads)
            plan = _plan(sources, keys=8192, batch=batch, heads=heads)
            blocks = -(-rows // 16)
            assert plan.kernels[0].groups == (batch * kv_heads * blocks, groups), rows
            assert plan.part_rows == batch * kv_heads * blocks * groups * 16
            short = _plan(sources, keys=300, batch=batch, heads=heads)
            assert short.kernels[0].groups[1] == min(groups, 2)
    many = _plan(sources, keys=8192, batch=3 << 12, heads=(1 << 10, 1 << 10))
    assert many.part_rows == (3 << 22) * 32 * 8
    plan = _plan(sources, keys=48, entries=3, cache={"paged": 1, "pages": 6, "table_row": 6})
    assert plan.params.cache.capacity == 288 and plan.kernels[0].groups == (4, 2)


def decode_params(sources: Sources) -> None:
    numbers = {
        "page_size": 300, "entries": 7, "added": 4, "table_row": 11, "has_lengths": 1,
        "has_starts": 1, "has_entries": 1,
    }  # fmt: skip
    plan = _plan(
        sources, cache=numbers, entries=7, window_left=5, window_right=3, softcap=2.5, scale=0.7,
        has_alibi=1, alibi_batch=8, alibi_head=1, has_sinks=1, q_len=3,
    )  # fmt: skip
    x, cache = plan.params.attention, plan.params.cache
    assert (x.batch, x.num_heads, x.num_kv_heads, x.q_len) == (2, 8, 2, 3)
    assert (x.head_dim, x.v_head_dim, x.window_left, x.window_right) == (64, 64, 5, 3)
    assert (x.alibi_batch, x.alibi_head, x.has_sinks) == (8, 1, 1)
    assert abs(x.scale - 0.7) < 1e-7 and x.softcap == 2.5
    assert list(x.out) == [8 * 3 * 64, 3 * 64, 64, 1]
    for name, value in numbers.items():
        assert getattr(cache, name) == value, name
    assert (cache.capacity, cache.paged) == (300, 0)
    assert not (plan.params.row_stats or plan.params.powers_of_2 or x.diagonal)
    none = _plan(sources).params.cache
    assert not (none.has_lengths or none.has_starts or none.has_entries or none.added)
    paged = _plan(sources, keys=16, entries=5, cache={"paged": 1, "pages": 4, "table_row": 4})
    assert (paged.params.cache.paged, paged.params.cache.page_size) == (1, 16)


def decode_loads(sources: Sources) -> None:
    """Chunks where keys and values allow them, whatever the query's layout is."""
    shape = (2, 2, 300, 64)
    strides = dense(shape)
    for name, place, chunks in (
        ("k", _layout(*shape, offset=4), False), ("v", _layout(*shape, offset=4), False),
        ("k", _layout(*shape, offset=8), True), ("q", _layout(2, 8, 1, 64, offset=1), True),
        ("k", (shape, (*strides[:2], 68, 1), 0), False),
        ("v", (shape, (*strides[:3], 2), 0), False),
    ):  # fmt: skip
        plan = _plan(sources, changed={name: place})
        assert plan.kernels[0].name.endswith("_chunks" if chunks else "_elements"), name
        assert bool(plan.advice) != chunks


def decode_refusals(sources: Sources) -> None:
    for reason, detail, advice, plan in (
        ("the page size is not a multiple of 16", "got 24", "allocate pages",
         _plan(sources, keys=24, entries=4, cache={"paged": 1, "pages": 2})),
        ("head_dim is above 256", "got 257", "F.scaled", _plan(sources, widths=(257, 64))),
        ("head_dim is above 256", "got 257", "F.scaled",
         _plan(sources, widths=(257, 64), keys=24, entries=4, cache={"paged": 1, "pages": 2})),
        ("head_dim is above 256", "got 257", "F.scaled", _plan(sources, widths=(64, 257))),
        ("a length or the diagonal is above 2^28", f"got {(1 << 28) + 1}", "split",
         _plan(sources, keys=(1 << 28) + 1)),
        ("a length or the diagonal is above 2^28", f"got {1 << 29}", "split",
         _plan(sources, keys=1 << 28, entries=4, cache={"paged": 1, "pages": 2})),
        ("batch times heads times queries is above 16777215", f"got {1 << 24}", "split",
         _plan(sources, batch=1 << 10, heads=(16, 2), q_len=1 << 10)),
        ("the cache has too many entries, or the call adds too many keys",
         f"got {1 << 31} entries and 0 keys", "split",
         _plan(sources, keys=16, entries=1 << 31, cache={"paged": 1, "pages": 2})),
        ("the cache has too many entries, or the call adds too many keys",
         f"got 2 entries and {(1 << 28) + 1} keys", "split",
         _plan(sources, cache={"added": (1 << 28) + 1})),
    ):  # fmt: skip
        assert (plan.refusal, plan.detail) == (reason, detail), (plan.refusal, plan.detail)
        assert plan.advice.startswith(advice), plan.advice
        assert not plan.kernels
    for plan in (
        _plan(sources, keys=24),
        _plan(sources, keys=16, entries=(1 << 31) - 1, cache={"paged": 1, "pages": 2}),
        _plan(sources, cache={"added": 1 << 28}),
        _plan(sources, batch=1, heads=(255, 255), q_len=65793),
    ):
        assert not plan.refusal, plan.refusal


def append_plans(sources: Sources) -> None:
    shape = (3, 2, 5, 64)
    cache = (7, 2, 32, 64)
    for dtype, width, offset, type_ in (
        (F16, 64, 0, "uint4"), (F16, 64, 8, "uint4"), (F16, 64, 4, "ushort"),
        (F16, 60, 0, "ushort"), (F32, 64, 0, "uint4"), (F32, 62, 0, "uint"), (BF16, 8, 0, "uint4"),
    ):  # fmt: skip
        for places in itertools.product((0, offset), repeat=2):
            added, into = (_layout(*x[:3], width, offset=n) for x, n in zip((shape, cache), places))
            element = type_ if offset in places else type_.replace("ushort", "uint4")
            element = type_ if width % (16 // dtype.itemsize) else element
            plan = sources.append(
                added, into, DTYPE_NUMBERS[dtype],
                {"paged": 1, "pages": 4, "table_row": 9, "offset": 6, "has_lengths": 1},
            )  # fmt: skip
            kernel, x, at = plan.kernels[0], plan.params.attention, plan.params.cache
            assert kernel.name == f"attention_append_{element}", (kernel.name, element)
            assert f"decltype(attention_append<{element}, 4>)" in kernel.instantiation
            chunk = 16 // dtype.itemsize if element == "uint4" else 1
            elements = 3 * 2 * 5 * width // chunk
            assert kernel.groups == (-(-elements // 128), 1)
            assert (x.batch, x.num_kv_heads, x.q_len, x.head_dim) == (3, 2, 5, width // chunk)
            for strides, of in ((x.k, dense(added[0])), (x.out, dense(into[0]))):
                assert list(strides) == [*(n // chunk for n in of[:3]), 1]
            assert (at.entries, at.page_size, at.capacity) == (7, 32, 128)
            assert (at.added, at.table_row, at.paged) == (6, 9, 1)
            assert (at.has_lengths, at.has_entries) == (1, 0)
    transposed = (cache, (2 * 32 * 64, 32 * 64, 1, 32), 0)
    plan = sources.append(_layout(*shape), transposed, 0, {"has_entries": 1})
    assert list(plan.params.attention.out) == [4096, 2048, 1, 32]
    assert (plan.params.cache.capacity, plan.params.cache.has_entries) == (32, 1)


def append_refusals(sources: Sources) -> None:
    far = (1 << 28) + 1
    one = _layout(1, 1, 1, 8)
    for added, into, dtype, numbers, reason in (
        (one, one, 4, {}, "the dtype is not"), (one, one, 3, {}, "the dtype is not"),
        (one, _layout(1, 1, far, 8), 0, {}, "a length"),
        (one, _layout(1, 1, 1 << 27, 8), 0, {"paged": 1, "pages": 3}, "a length"),
        (one, one, 0, {"offset": far}, "a length"), (_layout(1, 1, far, 1), one, 0, {}, "a length"),
        (_layout(1 << 11, 1, 1 << 20, 8), one, 0, {}, "a length"),
        (one, _layout((1 << 31) - 128, 1, 1, 8), 0, {}, "a length"),
    ):  # fmt: skip
        plan = sources.append(added, into, dtype, numbers)
        assert plan.refusal.startswith(reason) and not plan.kernels, (plan.refusal, reason)
    wide = sources.append(one, _layout(1, 1, far, 8), 0, {})
    assert wide.detail == f"got {far} and 1", wide.detail
    assert wide.advice == "append the keys in several calls"
    of_dtype = sources.append(one, one, 4, {})
    assert (of_dtype.detail, of_dtype.advice) == ("", "keep the cache in one of these")
    for added, into, numbers in (
        (one, _layout(1, 1, far - 1, 8), {"offset": far - 1}),
        (one, _layout((1 << 31) - 129, 1, 1, 8), {}),
        (_layout((1 << 11) - 1, 1, 1 << 20, 8), one, {}),
    ):
        assert not sources.append(added, into, 0, numbers).refusal


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
    plans = (
        decode_variants, decode_rows, decode_parts, decode_params, decode_loads, decode_refusals,
        append_plans, append_refusals,
    )  # fmt: skip
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
        Filled("decode: columns apart", Cached((40, 9)), layouts=("columns", "columns")),
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
            "decode: a window in a long room",
            Cached((9000,), capacity=9008, heads=(1, 1), dtype=F16, options={"window_left": 129}),
        ),
        Filled("decode: a full odd room", Cached((63, 63), capacity=63, q_len=2)),
        Filled("decode: a full odd room, 16 bits", Cached((63, 63), capacity=63, dtype=F16)),
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
        *(Property(f"plan: {test.__name__.replace('_', ' ')}", None, test) for test in plans),
        *(x for x in attended if not x.check),
        *filled,
        *(x for x in attended if x.check),
    )
