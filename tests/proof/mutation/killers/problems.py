"""The problems that every family of kernels runs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from attention_cases import SEED, Case
from torch import Tensor

from orchard_ops import dropout

from ..harness import DKV, DKV_PAIRS, DQ, DQ_FROM_DS, FAMILIES, FORWARD
from .attention import BF16, F16, F32, KEYS_SIDE, Attention

KITCHEN_SINK = Case(
    37, 51, 15, batch=2, num_heads=4, num_kv_heads=2, dropout_p=0.3, window_left=19,
    window_right=6, diagonal=3,
)  # fmt: skip
_causal = Case(
    45, 70, 32, num_heads=3, num_kv_heads=1, dtype=F16, dropout_p=0.1, window_right=0, diagonal=25
)
_open = Case(79, 95, 16, dtype=F32)  # one short of whole blocks
_wide = Case(35, 40, 160, batch=2, dtype=BF16, dropout_p=0.2, window_right=0)
_odd_tiles = Case(40, 49, 80, dtype=F32, dropout_p=0.4, window_left=20)
_keyless = Case(70, 20, 16, dtype=F32, window_right=0, diagonal=-41)
_tall = Case(150, 70, 24, dtype=F32, dropout_p=0.25, window_left=60, window_right=12)
_apart = ("padded", "blhd", "rows_odd", "dense", "odd")  # no two tensors have the same strides
_mixed = ("padded", "columns", "rows_odd", "dense", "odd")
_blhd = ("blhd",) * 5


def _stored() -> Iterator[tuple[str, Case]]:
    """Cases of dS whose last tiles decide."""
    square = Case(256, 256, 64, num_heads=2, num_kv_heads=2, dtype=F32, window_right=0)
    yield "rows of dS, folded", square
    yield "folded beside keys that nobody sees", square.but(q_len=136, kv_len=160)
    yield "rows end within the last tile", square.but(q_len=133, kv_len=160, window_right=3)
    yield "folded behind whole rows", square.but(q_len=136, kv_len=200, window_right=2, diagonal=30)
    yield "one query in the last tile", Case(41, 48, 64, dtype=F32, window_right=0)
    for left in (15, 16):
        yield f"keys end before a window of {left}", Case(60, 41, 64, dtype=F32, window_left=left)


def _attention() -> Iterator[Attention]:
    def each(name: str, case: Case, families: tuple[str, ...] = FAMILIES, **options: Any):
        for family in families:
            # The plan stores dS for wide heads only.
            wide = case.but(head_dim=case.head_dim + 48 * (case.head_dim < 64))
            if family != DQ_FROM_DS:
                yield Attention(f"{family}: {name}", family, case, **options)
            if family in KEYS_SIDE:
                yield Attention(f"{family}, storing: {name}", family, wide, store_ds=True,
                                **options)  # fmt: skip
            elif family == DQ_FROM_DS:
                yield Attention(f"{family}: {name}", family, wide, **options)

    # In order of cost: the first ones find most mutants and need one compilation each.
    first = {"dlse": True, "layouts": _apart}
    yield from each("windows, groups, dropout, elements", KITCHEN_SINK, **first)
    yield from each("causal, chunks", _causal)
    yield from each("causal, chunks, any order of threads", _causal, schedule=1)
    yield from each("no mask", _open)
    yield from each("one row, one key", Case(1, 1, 15, dtype=F32))
    yield from each("one beyond whole blocks", Case(41, 65, 16, num_heads=1, dtype=F32))
    # The keys that the first 64 rows may see end right before the first key.
    yield from each("keys begin later", Case(128, 64, 16, num_heads=1, dtype=F32, window_right=0,
                                             diagonal=-64))  # fmt: skip
    yield from each("rows and keys without a partner", _keyless)
    for diagonal in (200, -200):
        yield from each(f"nothing visible at {diagonal}", _keyless.but(
            window_left=3, window_right=2, diagonal=diagonal))  # fmt: skip
    # Windows that start or end at a block's first or last key or query, or one beside it.
    for left, right, diagonal in (
        (0, 0, 0), (0, 0, 1), (0, 0, -1), (16, 15, 17), (-1, 3, -32), (7, -1, 32), (31, 32, 1),
        (41, 35, 3), (40, 36, 3), (42, 34, 3), (-1, 40, -30), (40, -1, 30), (-1, 0, 16),
    ):  # fmt: skip
        yield from each(
            f"window {left}, {right} at {diagonal}",
            Case(64, 64, 16, num_heads=1, dtype=F32, window_left=left, window_right=right,
                 diagonal=diagonal),
        )  # fmt: skip
    ahead = Case(20, 64, 16, num_heads=1, dtype=F32, window_left=4, window_right=3, diagonal=30)
    yield from each("more keys than queries", ahead)
    behind = Case(64, 20, 16, num_heads=1, dtype=F32, window_left=3, window_right=4, diagonal=-30)
    yield from each("more queries than keys", behind)
    # Sums of 256 products of one sign, which one chain of additions would round too often.
    sums = Case(64, 64, 256, num_heads=1, dtype=F32, scale=1.0)
    yield Attention(f"{FORWARD}: long sums", FORWARD, sums, shifts=(2.0, 2.0))
    # Weights of rows that do not exist, exp2(0 - origin), would be infinite.
    yield from each("very negative scores", Case(15, 32, 16, dtype=F32), shifts=(5.0, -5.0))
    yield from each("large scores", Case(40, 64, 16, dtype=F32, scale=30.0, window_right=4))
    yield from each("large scores, wide blocks", _causal.but(scale=6.0))
    yield from each("negative scale", Case(40, 64, 16, dtype=F32, scale=-0.7))
    yield from each("bfloat16, wide heads, dropout", _wide)
    yield from each("blocks of 8", _odd_tiles, layouts=_blhd)
    storing = {"store_ds": True}
    of_ds = ((DKV, storing), (DKV_PAIRS, storing), (DQ_FROM_DS, {}))
    for family, more in of_ds:
        for label, case in _stored():
            for check in (False, True):
                name = f"{family}: {label}{', checked' * check}"
                yield Attention(name, family, case, check=check, **more)
    for family, tile, more in (
        (FORWARD, (4, 8, 2), {}), (FORWARD, (2, 32, 1), {}), (FORWARD, (1, 16, 0), {}),
        (DQ, (4, 32), {}), (DKV, (32, "false"), {}), (DKV_PAIRS, (16, "false"), {}),
        (DKV, (8, "true"), storing), (DKV_PAIRS, (32, "true"), storing), (DQ_FROM_DS, (1, 8), {}),
    ):  # fmt: skip
        case = _tall.but(head_dim=80 if more or family == DQ_FROM_DS else 24)
        label = f"{family}: tile {'_'.join(map(str, tile))}"
        larger = functools.partial(Attention, family=family, tile=tile, **more)
        yield larger(label, case=case)
        # Scores of one row say nothing about the next.
        yield larger(f"{label}, large scores", case=case.but(scale=40.0))
        yield larger(f"{label}, checked", case=case, check=True)
    for family, more in of_ds:
        grouped = Case(40, 52, 64, batch=2, num_heads=6, num_kv_heads=3, dtype=F32, window_right=7)
        for heads in ((0, 2), (2, 5), (5, 6)):
            yield Attention(f"{family}: heads {heads[0]} to {heads[1]}", family, grouped,
                            kv_heads=heads, **more)  # fmt: skip
    # Behind 1024 queries sums in float32 go on from what is stored, of every simdgroup's keys.
    parts = Case(1040, 32, 15, num_heads=1, dtype=F32, dropout_p=0.2)
    for family in KEYS_SIDE:
        yield Attention(f"{family}: sums in parts", family, parts)
    # Tiles of dS end within the rows of a simdgroup.
    for q_len in (36, 40):
        yield Attention(f"{DQ_FROM_DS}: {q_len} queries, checked", DQ_FROM_DS,
                        Case(q_len, 64, 64, num_heads=1, dtype=F32), check=True)  # fmt: skip
    yield from each("every operand in its own layout", _causal.but(head_dim=30), layouts=_mixed)
    yield from each("kitchen sink, checked", KITCHEN_SINK, check=True, **first)
    yield from each("causal, checked", _causal, check=True)
    yield from each("blocks of 8, checked", _odd_tiles, check=True)
    # The rows that take part, none, begin at a key behind the last one.
    behind = _keyless.but(window_left=3, window_right=2, diagonal=24)
    yield Attention(f"{DKV}: keys end before the window, checked", DKV, behind, check=True)
    yield from each("nothing visible, checked", _keyless.but(diagonal=-200), check=True)


@functools.cache
def _draws() -> Tensor:
    """The 16-bit draw of each weight of _edge_case."""
    words = dropout.philox_4x32(
        (
            torch.arange(16).view(1, 1, 1, 16), torch.arange(32).view(1, 1, 32, 1),
            torch.arange(2).view(1, 2, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.int64),
        ),
        SEED,
    )  # fmt: skip
    draws = torch.stack(words, -1)  # (1, head, row, column, word); each word holds two draws
    return torch.stack((draws & 0xFFFF, draws >> 16), -1).flatten(0, 4)


def _edge_probability() -> float:
    """A p whose threshold is one of the draws, both as a first and as a second element."""
    first, second = (set(_draws()[:, i].tolist()) for i in (0, 1))
    both = sorted(d for d in first & second if 10000 < d < 50000)
    return both[len(both) // 2] / 65536


def _edges() -> Iterator[Attention]:
    p = _edge_probability()
    for name, threshold in (("is a draw", p), ("is one above a draw", p + 2.0**-16)):
        case = Case(64, 64, 16, dtype=F32, dropout_p=threshold)
        for family in (FORWARD, *KEYS_SIDE, DQ):
            yield Attention(f"{family}: the threshold {name}", family, case)


@functools.cache
def problems() -> tuple[Attention, ...]:
    return (*_attention(), *_edges())
