"""Forwards of few queries on the decode kernel: which calls these are, and their results."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from attention_cases import Case
from torch import Tensor

from orchard_ops.ops.schema import public_lse
from orchard_ops.scoring import Scoring
from orchard_ops.testing import assert_no_worse_than_math

from ..harness import BOOL, DECODE, DECODE_MERGE, DTYPE_NUMBERS, Guarded, MaskPlace, Sources, launch
from .attention import BF16, F16, F32, dense
from .cache_plans import padded_width
from .caches import BLOCK, LEAST_PART, parts_of
from .compiled import compile_kernel
from .properties import Property
from .score_problems import Sight

FEW, MANY = 16, 256
FAR = 2**31 - 1


def _guarded(x: Tensor, stride: int = 1) -> Guarded:
    """x with `stride` from one element of the last dimension to the next."""
    strides = tuple(stride * n for n in dense(tuple(x.shape)))
    guarded = Guarded(tuple(x.shape), strides, x.dtype)
    guarded.tensor.copy_(x)
    return guarded


@dataclass(frozen=True)
class Few:
    """A forward from the decode kernels, against float64 and the number of its products.

    What a mask of keys, or the ranges of one query, hide is NaN.
    """

    name: str
    case: Case
    family: str = DECODE
    layouts: tuple[str, str] = ("blhd", "blhd")
    """Of the query, and of keys and values."""
    holes: bool = False
    """Whether the mask also hides whole blocks of keys, the first one and all of one part."""
    stride: int = 1
    """Of the mask's elements."""
    folded: int = 0
    """The inner batch dimension of the mask, where it has two and is the same for the outer."""
    ranges: tuple[tuple[int, int, int, int], ...] = ()
    """Of each sequence, in place of the case's."""
    check: bool = False
    beside: tuple[str, ...] = (DECODE, DECODE_MERGE)

    def scoring(self) -> Scoring:
        scoring = self.case.scoring()
        mask = scoring.attn_mask
        if mask is not None and self.holes:
            keys = torch.arange(self.case.kv_len)
            hidden = (keys < 20) | (keys // BLOCK % 3 == 1) | (keys // LEAST_PART == 2)
            hidden = hidden.expand(mask.shape)
            mask = (
                mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, -math.inf)
            )
        if mask is not None and self.folded:
            mask = mask[: self.folded].unsqueeze(0)
        ranges = scoring.key_ranges
        if self.ranges:
            ranges = torch.tensor(self.ranges, dtype=torch.int32).view(-1, 1, 1, 4)
        return scoring._replace(attn_mask=mask, key_ranges=ranges)

    def by_batch(self, mask: Tensor) -> Tensor:
        """(B or 1, 1, 1, S or 1)"""
        if mask.dim() == 4:
            return mask
        outer = self.case.batch // mask.shape[1]
        return mask.expand(outer, *mask.shape[1:]).flatten(0, 1)

    def shared(self, scoring: Scoring) -> Tensor:
        """(B, S): the keys that no mask and no ranges hide from all rows."""
        case = self.case
        seen = torch.ones(case.batch, case.kv_len, dtype=torch.bool)
        if scoring.attn_mask is not None:
            mask = self.by_batch(scoring.attn_mask)
            passes = mask if mask.dtype == torch.bool else mask != -math.inf
            seen = seen & passes[:, 0, 0]
        if scoring.key_ranges is not None:
            seen = seen & Sight.of(case, scoring.key_ranges).sees(case.kv_len)[:, 0, 0]
        return seen

    def work(self, scoring: Scoring) -> tuple[int, Tensor]:
        """Products of fragments of keys, for every 8 of a head dim; and which threadgroups see any
        key, as the grid has them.
        """
        case = self.case
        group = case.num_heads // case.num_kv_heads
        widest = max(-(-n // 64) * 64 for n in (case.head_dim, case.value_dim or case.head_dim))
        block_rows = 16 if group * case.q_len > 8 and widest <= 128 else 8
        blocks = -(-group * case.q_len // block_rows)
        parts = 4 * min(max(-(-case.kv_len // (4 * LEAST_PART)), 1), max(32 // blocks, 1))
        left, right = (w if w >= 0 else 1 << 30 for w in (case.window_left, case.window_right))
        shared, total, used = self.shared(scoring), 0, []
        for b, _ in itertools.product(range(case.batch), range(case.num_kv_heads)):
            for row0 in range(0, group * case.q_len, block_rows):
                rows = range(row0, min(row0 + block_rows, group * case.q_len))
                places = [row // group + case.diagonal for row in rows]
                spans = [(max(0, p - left), min(case.kv_len, p + right + 1)) for p in places]
                if scoring.key_ranges is not None:
                    begin, end, prefix = Sight.of(case, scoring.key_ranges).hull(b, 0, slice(0, 1))
                    spans = [(0 if prefix > 0 else begin, max(end, prefix))]
                spans = [(x, y) for x, y in spans if x < y]
                of_parts = [False] * parts
                used.append(of_parts)
                if not spans:
                    continue
                first, last = min(x for x, _ in spans), max(y for _, y in spans)
                for part, (begin, end) in enumerate(parts_of(first, last, parts)):
                    of_parts[part] = begin < end and bool(shared[b, begin:end].any())
                    for key0 in range(begin // BLOCK * BLOCK, end, BLOCK):
                        total += bool(shared[b, max(key0, begin) : min(key0 + BLOCK, end)].any())
        return total * block_rows // 8 * 2, torch.tensor(used).unflatten(1, (-1, 4)).any(-1)

    def fields(self, scoring: Scoring) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "scale": scoring.scale, "window_left": scoring.window_left,
            "window_right": scoring.window_right, "diagonal": scoring.diagonal,
            "softcap": scoring.softcap, "has_sinks": scoring.sinks is not None,
        }  # fmt: skip
        slopes, ranges = scoring.alibi_slopes, scoring.key_ranges
        if slopes is not None:
            batch = slopes.shape[1] if slopes.dim() == 2 else 0
            fields |= {"has_alibi": True, "alibi_batch": batch, "alibi_head": 1}
        if ranges is not None:
            fields |= {"has_key_ranges": True, "ranges_batch": 4 if ranges.shape[0] > 1 else 0}
        return fields

    def run(self, sources: Sources, note: Callable[[str], None] = lambda _: None) -> None:
        case, scoring = self.case, self.scoring()
        q, k, v, dout = case.operands()
        arguments = scoring._asdict() | {"dropout_seed": 0}
        right, unfused = (
            case_math(q, k, v, dout, arguments, dtype) for dtype in (torch.float64, case.dtype)
        )
        hidden = ~self.shared(scoring)[:, None, :, None]
        of_query, of_cache = self.layouts
        x = {
            "query": Guarded.like(q, of_query),
            "key": Guarded.like(k.masked_fill(hidden, math.nan), of_cache),
            "value": Guarded.like(v.masked_fill(hidden, math.nan), of_cache),
            "out": Guarded.like(torch.zeros_like(dout), "dense"),
        }
        x["out"].bits.fill_(-1)
        layouts = {
            short: (x[name].tensor.shape, x[name].tensor.stride(), x[name].offset)
            for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out"))
        }
        fields = self.fields(scoring)
        inputs = {name: x[name] for name in ("query", "key", "value")}
        if scoring.attn_mask is not None:
            mask = scoring.attn_mask
            number = BOOL if mask.dtype == torch.bool else DTYPE_NUMBERS[mask.dtype]
            memory = _guarded(mask.view(torch.uint8) if number == BOOL else mask, self.stride)
            inputs["mask"] = memory
            sizes, strides = tuple(mask.shape), memory.tensor.stride()
            if mask.dim() == 4:
                sizes, strides = (sizes[0], 1, *sizes[1:]), (strides[0], 7, *strides[1:])
            inner = self.folded or 1
            fields["mask"] = MaskPlace(sizes, strides, memory.offset, inner, number)
        if scoring.alibi_slopes is not None:
            inputs["alibi_slopes"] = _guarded(scoring.alibi_slopes)
        if scoring.key_ranges is not None:
            inputs["key_ranges"] = _guarded(scoring.key_ranges)
        nothing = _guarded(torch.tensor([FAR], dtype=torch.int32))
        inputs |= dict.fromkeys(("cache_lengths", "cache_starts", "cache_entries"), nothing)
        plan = sources.forward_as_decode(layouts, DTYPE_NUMBERS[case.dtype], **fields)
        assert plan is not None and not plan.refusal
        first, second = (vars(kernel) for kernel in plan.kernels)
        libraries = [
            compile_kernel(sources, kernel["family"], kernel, self.check)
            for kernel in (first, second)
        ]
        note("compiled")
        rows, stride = plan.part_rows, plan.params.part_stride
        parts = {
            "parts": Guarded((rows, stride), (stride, 1), F32),
            "part_sums": Guarded((rows, 2), (2, 1), F32),
        }
        params = bytes(plan.params)
        counters = launch(
            libraries[0], first, sources.buffers, params, inputs, parts, workers=1, seed=1
        )
        shape = (*q.shape[:3], 2)
        joined = {"out": x["out"], "row_stats": Guarded(shape, dense(shape), F32)}
        sinks = torch.full((1,), math.nan) if scoring.sinks is None else scoring.sinks
        known = {**parts, "sinks": _guarded(sinks)}
        launch(libraries[1], second, sources.buffers, params, known, joined, workers=1, seed=1)
        stats = joined["row_stats"].tensor.clone()
        blind = right.lse == -math.inf
        lowest = torch.finfo(torch.float32).min
        assert bool((stats[..., 0][blind] == lowest).all())
        for name, found in (("out", x["out"].tensor), ("lse", public_lse(stats, scoring.unit))):
            assert_no_worse_than_math(
                name, found.clone(), getattr(right, name), getattr(unfused, name), 2.0,
                right.rounding(name, case.dtype), right.rounded_weights(name, case.dtype),
            )  # fmt: skip
        padded = sum(padded_width(sources, x.shape[3]) // 8 for x in (q, v))
        count, used = self.work(scoring)
        expected = count * padded
        assert counters.mma == expected, f"{counters.mma} products, not {expected}"
        found = parts["part_sums"].tensor[:, 1].reshape(*used.shape, -1)
        assert torch.equal((found != 0).any(-1), used), "the keys are divided in another way"


def case_math(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, arguments: dict[str, Any],
              dtype: torch.dtype) -> Any:  # fmt: skip
    from orchard_ops.testing import math_attention

    return math_attention(q, k, v, dout, dtype=dtype, **arguments)


# ---- the plan -----------------------------------------------------------------------------------


def _layout(*shape: int) -> tuple:
    return shape, dense(shape), 0


def _plan(sources: Sources, q_len: int = 1, keys: int = 300, heads: tuple[int, int] = (4, 2),
          widths: tuple[int, int] = (64, 64), batch: int = 2, mask: MaskPlace | None = None,
          tiles: str = "", dtype: int = 0, **fields: float) -> Any:  # fmt: skip
    layouts = {
        "q": _layout(batch, heads[0], q_len, widths[0]),
        "k": _layout(batch, heads[1], keys, widths[0]),
        "v": _layout(batch, heads[1], keys, widths[1]),
        "out": _layout(batch, heads[0], q_len, widths[1]),
    }
    return sources.forward_as_decode(layouts, dtype, mask=mask, tiles=tiles, **fields)


def _mask(sizes: tuple[int, ...], strides: tuple[int, ...] | None = None,
          dtype: int = BOOL) -> MaskPlace:  # fmt: skip
    return MaskPlace(sizes, strides or dense(sizes), 0, sizes[1], dtype)


def few_choice(sources: Sources) -> None:
    """Which forwards run on the decode kernel."""
    ranges = {"has_key_ranges": True, "ranges_batch": 4}
    for taken, fields in (
        (True, {}), (True, {"q_len": FEW}), (False, {"q_len": FEW + 1}), (False, {"q_len": 0}),
        (False, {"q_len": (1 << 32) + 1}), (False, {"heads": (0, 2)}),
        (True, {"keys": MANY}), (False, {"keys": MANY - 1}), (False, {"batch": 0}),
        (False, {"heads": (0, 0)}),
        (False, {"dropout_p": 0.1}), (True, {"dropout_p": 1e-6}),
        (False, {"dropout_p": 2**-16}),
        (True, {"tiles": "attention_backward_dq=r1_k8"}),
        (False, {"tiles": "attention_forward=r1_k8_b1"}),
        (True, {"mask": _mask((2, 1, 1, 1, 300))}), (True, {"mask": _mask((1, 1, 1, 1, 300))}),
        (True, {"mask": _mask((2, 1, 4, 1, 300), (300, 0, 0, 0, 1))}),
        (False, {"mask": _mask((2, 1, 4, 1, 300))}),
        (True, {"mask": _mask((2, 1, 1, 3, 300), (300, 0, 0, 0, 1)), "q_len": 3}),
        (True, {"mask": _mask((2, 1, 1, 3, 300), (300, 0, 300, 0, 1)), "q_len": 3}),
        (False, {"mask": _mask((2, 1, 1, 3, 300)), "q_len": 3}),
        (False, {"mask": _mask((2, 1, 4, 3, 300), (1200, 0, 300, 0, 1)), "q_len": 3}),
        (True, ranges), (False, ranges | {"q_len": 2}), (False, ranges | {"ranges_head": 4}),
        # Blocks of rows, against heads.
        (True, {"q_len": 8, "heads": (1, 1), "widths": (256, 256)}),
        (False, {"q_len": 9, "heads": (1, 1), "widths": (256, 256)}),
        (False, {"q_len": 9, "heads": (1, 1), "widths": (64, 129)}),
        (True, {"q_len": 9, "heads": (1, 1), "widths": (64, 128)}),
        (True, {"q_len": 16, "heads": (8, 1)}),
        (False, {"q_len": 9, "heads": (16, 2), "widths": (256, 256)}),
        (True, {"q_len": 8, "heads": (16, 2), "widths": (256, 256)}),
        # So many heads are refused, by whichever plan is asked.
        (True, {"heads": (1 << 31, 1)}),
        (False, {"q_len": 9, "heads": (((1 << 32) + 5) // 9, 1), "widths": (256, 256)}),
    ):  # fmt: skip
        assert (_plan(sources, **fields) is not None) == taken, fields


def few_params(sources: Sources) -> None:
    plan = _plan(
        sources, q_len=3, window_left=5, window_right=2, diagonal=290, scale=0.7, softcap=2.0,
        batch=3,
    )  # fmt: skip
    x, cache = plan.params.attention, plan.params.cache
    assert x.diagonal == 290 - 297
    assert (x.window_left, x.window_right, x.softcap) == (5, 2, 2.0)
    assert (cache.capacity, cache.added, cache.page_size, cache.entries) == (300, 300, 300, 3)
    assert not (cache.has_lengths or cache.has_starts or cache.has_entries or cache.paged)
    assert (plan.params.row_stats, plan.params.powers_of_2) == (1, 0)
    for fields in ({"softcap": 1.0}, {"has_sinks": True}, {"has_alibi": True},
                   {"mask": _mask((1, 1, 1, 1, 300))}):  # fmt: skip
        assert _plan(sources, **fields).params.powers_of_2 == 0, fields
    assert _plan(sources).params.powers_of_2 == 1
    ranged = _plan(
        sources, has_key_ranges=True, ranges_batch=4, window_left=5, window_right=2
    ).params.attention
    assert (ranged.diagonal, ranged.ranges.batch, ranged.ranges.head) == (0, 4, 0)
    assert (ranged.ranges.left, ranged.ranges.right) == (5, 2)


def few_variants(sources: Sources) -> None:
    float32 = DTYPE_NUMBERS[F32]
    for dtype, number, names in (
        (BOOL, 0, ("Mask<uchar, false>", "_mask_bool")),
        (0, 0, ("Mask<half, false>", "_mask_float16")),
        (float32, 0, ("Mask<float, false>", "_mask_float32")),
        (1, 1, ("Mask<bfloat, false>", "_mask_bfloat16")),
    ):
        for ranges in (False, True):
            plan = _plan(
                sources, mask=_mask((2, 1, 1, 1, 300), dtype=dtype), dtype=number,
                has_key_ranges=ranges, softcap=1.0,
            )  # fmt: skip
            kernel = plan.kernels[0]
            assert kernel.name.endswith("_softcap" + names[1] + "_ranges" * ranges), kernel.name
            word = str(ranges).lower()
            assert f", true, false, {names[0]}, {word}>" in kernel.instantiation
    sloped = _plan(sources, mask=_mask((2, 1, 1, 1, 300)), has_alibi=True, alibi_head=1)
    assert sloped.kernels[0].name.endswith("_alibi_mask_bool"), sloped.kernels[0].name
    assert _plan(sources, mask=_mask((1, 1, 1, 1, 300), dtype=1)).refusal.startswith("attn_mask")


# ---- all of them --------------------------------------------------------------------------------

_KEYS = {"mask_full": (True, False, False, True)}
_RANGED = ((200, 310, 299, 37), (5, 90, 80, 0), (-9, FAR, 400, -3))
_IN_PARTS = ((600, 1100, 1099, 0), (9, 9, 50, 1), (700, 900, 1000, 70))
_FULL = Case(
    1, 600, 72, value_dim=40, batch=2, num_heads=6, num_kv_heads=2, softcap=3.0, alibi="batch",
    sinks=True, mask="float32", ranges="padding", window_left=400, window_right=0, **_KEYS,
)  # fmt: skip


@functools.cache
def killers() -> tuple[Property | Few, ...]:
    masked = Case(2, 300, batch=3, num_heads=4, num_kv_heads=2, mask="bool", dtype=F16, **_KEYS)
    ranged = Case(1, 300, batch=3, num_heads=2, num_kv_heads=1, dtype=F16, ranges="padding")
    attended = [
        Few("few: a token", Case(1, 300, dtype=F16)),
        Few("few: rows", Case(16, 256, num_heads=4, num_kv_heads=2)),
        Few("few: bottom right", Case(3, 300, window_right=0, diagonal=297, dtype=BF16)),
        Few("few: top left", Case(7, 300, window_right=0, diagonal=0)),
        Few("few: rows that are not there", Case(3, 300, window_right=0, diagonal=10, dtype=F16)),
        Few("few: behind the keys", Case(4, 280, window_left=40, window_right=0, diagonal=300)),
        Few("few: slopes", Case(3, 300, alibi="head", diagonal=11, dtype=F16)),
        Few("few: sinks", Case(2, 300, sinks=True)),
        Few("few: a large scale", Case(2, 300, scale=60.0)),
        Few("few: rows that see nothing", Case(5, 300, window_right=0, diagonal=-3)),
        Few("few: a mask", masked),
        Few("few: a mask with holes", masked, holes=True),
        Few("few: a mask of a key more than whole blocks", masked.but(kv_len=257), holes=True),
        Few("few: a mask of every other byte", masked, stride=2, holes=True),
        Few("few: a mask of sequences", masked.but(mask_full=(True, False, False, False))),
        Few("few: a mask for all", masked.but(mask_full=(False, False, False, True))),
        Few("few: a folded mask", masked.but(batch=6, q_len=1), folded=3),
        Few("few: a mask of its dtype", masked.but(mask="same"), holes=True),
        Few("few: a mask of float32", masked.but(mask="float32", window_left=90), holes=True),
        Few("few: bfloat16 masked", masked.but(mask="same", dtype=BF16), holes=True),
        Few("few: wide, masked", masked.but(head_dim=192, value_dim=128), holes=True),
        Few("few: odd, masked", masked.but(head_dim=67, value_dim=5, dtype=F32), holes=True),
        Few("few: ranges", ranged),
        Few("few: ranges with prefixes", ranged, ranges=_RANGED),
        Few("few: ranges in windows", ranged.but(window_left=50, window_right=3), ranges=_RANGED),
        Few("few: ranges for all", ranged, ranges=_RANGED[:1]),
        Few("few: ranges of nothing", ranged, ranges=((9, 9, 0, 0), (3, 2, 0, -1), (0, 1, 0, 0))),
        Few("few: ranges in some parts", ranged.but(kv_len=1200), ranges=_IN_PARTS),
        Few("few: ranges, slopes", ranged.but(alibi="head"), ranges=_RANGED),
        Few("few: ranges, a mask", ranged.but(mask="bool", **_KEYS), ranges=_RANGED),
        Few("few: everything", _FULL, holes=True),
        Few("few: everything, float16", _FULL.but(dtype=F16), holes=True),
    ]
    attended += [
        replace(x, name=f"{x.name}, checked", check=True)
        for x in attended
        if x.case is _FULL or "mask" in x.name or "ranges" in x.name
    ]
    attended += [
        replace(x, name=x.name.replace("few:", "few, merged:"), family=DECODE_MERGE)
        for x in attended
        if any(word in x.name for word in ("token", "large", "nothing", "sinks", "everything"))
    ]
    plans = (few_choice, few_params, few_variants)
    return (
        *(Property(f"plan: {test.__name__.replace('_', ' ')}", None, test) for test in plans),
        *(x for x in attended if not x.check),
        *(x for x in attended if x.check),
    )
