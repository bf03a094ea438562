"""The problems with caches that prove_caches.py puts to the kernels, and what is right for them."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .paths import ROOT

sys.path.insert(0, str(ROOT / "src"))

from orchard_ops.testing import assert_attention_close

from . import reference
from .caches import Decode, Places
from .cases import DTYPES
from .plans import Scoring

_MARGIN = 1024
_NOWHERE = (1 << 30, -5)
"""Entries of tables that nobody may look at."""
_LONGEST = 1 << 17

WIDTHS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
HEADS = ((4, 4), (8, 2), (16, 2))
"""Query and key/value heads: groups of 1, 4 and 8."""
PAGE_SIZES = (16, 64, 256, 48)


def room(sizes: Sequence[int], layout: str, dtype: torch.dtype, device: str) -> Tensor:
    """A cache (entries, Hkv, keys, width) full of NaN, with margins of NaN around it.

    "tokens": dense (entries, keys, Hkv, width), as flash_attn_with_kvcache has it. "heads": dense.
    "every second column". "odd rows": rows that do not begin at whole chunks of 16 bytes.
    """
    entries, heads, keys, width = sizes
    row = {"every second column": 2 * width, "odd rows": width + 1}.get(layout, width)
    buffer = torch.full(
        (entries * heads * keys * row + 2 * _MARGIN,), torch.nan, dtype=dtype, device=device
    )
    inner = buffer[_MARGIN:-_MARGIN]
    if layout == "heads":
        return inner.view(entries, heads, keys, width)
    x = inner.view(entries, keys, heads, row).transpose(1, 2)
    return x[..., 1::2] if layout == "every second column" else x[..., :width]


@dataclass(frozen=True)
class CacheCase:
    """Attention of few queries to a cache. Sequence b has the keys [starts[b], lengths[b])."""

    dtype: torch.dtype
    widths: tuple[int, int] = (64, 64)
    heads: tuple[int, int] = (8, 2)
    q_len: int = 1
    lengths: tuple[int, ...] = (0, 4096, 1000, 1, 2049)
    starts: tuple[int, ...] = ()
    capacity: int = 4096
    layout: str = "tokens"
    page_size: int = 0  # 0: each sequence has an entry of its own
    picks: bool = False  # whether the entries are those of a cache_batch_idx
    added: int = 0  # of the lengths, what cache_seqlens does not count
    counted: bool = True  # whether there is a cache_seqlens
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    alibi: str = ""  # "head", "batch": what the slopes differ by
    sinks: bool = False
    parts: int = 0  # in place of the plan's number

    device = "cuda"

    def __str__(self) -> str:
        (heads, kv_heads), (width, value_width) = self.heads, self.widths
        values = f"/{value_width}" if value_width != width else ""
        parts = [
            str(self.dtype).removeprefix("torch."),
            f"B{len(self.lengths)} H{heads}/{kv_heads} L{self.q_len} D{width}{values}",
            f"keys {', '.join(map(str, self.lengths))} of {self.capacity}",
        ]
        parts += [f"from {', '.join(map(str, self.starts))} on"] * bool(self.starts)
        parts += [f"pages of {self.page_size}"] * bool(self.page_size)
        parts += [self.layout] * (self.layout != "tokens")
        parts += ["cache_batch_idx"] * self.picks + [f"{self.added} added"] * bool(self.added)
        parts += ["no lengths"] * (not self.counted)
        if (self.window_left, self.window_right) == (-1, 0):
            parts.append("causal")
        elif (self.window_left, self.window_right) != (-1, -1):
            parts.append(f"window {self.window_left}, {self.window_right}")
        parts += [f"softcap {self.softcap}"] * (self.softcap > 0)
        parts += [f"alibi by {self.alibi}"] * bool(self.alibi) + ["sinks"] * self.sinks
        parts += [f"{self.parts} parts"] * bool(self.parts)
        return " ".join(parts)

    def but(self, **changes: object) -> CacheCase:
        return replace(self, **changes)

    def keys(self, b: int) -> range:
        """What the cache holds of a sequence; no more than it has room for."""
        length = min(self.lengths[b], self.capacity)
        start = min(self.starts[b], length) if self.starts else 0
        return range(start, length)

    # ---- operands

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, Hq, L, D), k and v (B, Hkv, capacity, D or Dv), all of them numbers."""
        generator = torch.Generator(self.device).manual_seed(1)

        def draw(heads: int, length: int, width: int) -> Tensor:
            shape = (len(self.lengths), heads, length, width)
            on = {"dtype": self.dtype, "device": self.device}
            return torch.randn(shape, generator=generator, **on)

        (heads, kv_heads), (width, value_width) = self.heads, self.widths
        return (
            draw(heads, self.q_len, width),
            draw(kv_heads, self.capacity, width),
            draw(kv_heads, self.capacity, value_width),
        )

    @property
    def scoring(self) -> Scoring:
        return Scoring(
            self.widths[0] ** -0.5,
            window_left=self.window_left,
            window_right=self.window_right,
            softcap=self.softcap,
            alibi_slopes=self._slopes(),
            sinks=self._sinks(),
        )

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(2)

    def _slopes(self) -> Tensor | None:
        if not self.alibi:
            return None
        batch, heads = len(self.lengths), self.heads[0]
        by_batch = torch.rand(batch, heads, generator=self._generator()).to(self.device) / 64
        return by_batch if self.alibi == "batch" else by_batch[0].expand(batch, heads)

    def _sinks(self) -> Tensor | None:
        if not self.sinks:
            return None
        return torch.randn(self.heads[0], generator=self._generator()).to(self.device)

    def _integers(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)

    def _table(self) -> Tensor:
        """Pages in any order; where a sequence has no keys, what nobody may look at."""
        pages = self.capacity // self.page_size
        batch = len(self.lengths)
        order = torch.randperm(batch * pages + 3, generator=self._generator())
        table = order[: batch * pages].view(batch, pages).int()
        for b in range(batch):
            keys = self.keys(b)
            first = keys.start // 16 * 16 // self.page_size
            behind = -(-keys.stop // self.page_size) if len(keys) else first
            table[b, :first], table[b, behind:] = _NOWHERE[0], _NOWHERE[1]
        return table.to(self.device)

    def places(self) -> Places:
        batch = len(self.lengths)
        counts = [max(n - self.added, 0) for n in self.lengths]
        order = torch.randperm(batch + 2, generator=self._generator())
        return Places(
            self._integers(counts) if self.counted else None,
            self._integers(self.starts) if self.starts else None,
            self._integers(order[:batch].tolist()) if self.picks else None,
            self._table() if self.page_size else None,
        )

    def call(self, rows: tuple[Tensor, Tensor, Tensor]) -> Decode:
        """The call, with NaN in every slot that no sequence uses, and in queries without a key."""
        q, k, v = rows
        places = self.places()
        hidden = q.clone()
        for b in range(len(self.lengths)):
            for i in range(self.q_len):
                if not len(self._seen(b, i)):
                    hidden[b, :, i] = torch.nan
        filled = (self._filled(x, places) for x in (k, v))
        return Decode(hidden, *filled, places, self.scoring, self.added, self.parts)

    def _seen(self, b: int, i: int) -> range:
        """The keys that query i of a sequence sees."""
        keys = self.keys(b)
        position = keys.stop - self.q_len + i
        left, right = (w if w >= 0 else 1 << 30 for w in (self.window_left, self.window_right))
        return range(max(keys.start, position - left), min(keys.stop, position + right + 1))

    def _room(self, width: int, device: str) -> Tensor:
        batch = len(self.lengths)
        if self.page_size:
            entries, keys = batch * (self.capacity // self.page_size) + 3, self.page_size
        else:
            entries, keys = batch + 2 * self.picks, self.capacity
        return room((entries, self.heads[1], keys, width), self.layout, self.dtype, device)

    def _filled(self, x: Tensor, places: Places) -> Tensor:
        cache = self._room(x.shape[3], self.device)
        for b in range(len(self.lengths)):
            slots = torch.tensor(self.keys(b), dtype=torch.long, device=self.device)
            found = entries_of(slots, b, places, cache.shape[2])
            cache[found[0], :, found[1]] = x[b, :, slots].transpose(0, 1)
        return cache

    def shaped(self) -> Decode:
        """The call without operands, for the plan."""
        (width, value_width), batch = self.widths, len(self.lengths)
        q = torch.empty(batch, self.heads[0], self.q_len, width, dtype=self.dtype, device="meta")
        k, v = (self._room(x, "meta") for x in (width, value_width))
        on_cpu = _OnCpu(**vars(self))
        return Decode(q, k, v, on_cpu.places(), on_cpu.scoring, self.added, self.parts)

    # ---- what is right

    def check(
        self, rows: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor
    ) -> dict[str, tuple[float, float]]:
        """result -> largest error against float64, and that of same-dtype mathematics

        Raises:
            AssertionError: by the rule of orchard_ops.testing, sequence by sequence.
        """
        errors = {"out": (0.0, 0.0), "lse": (0.0, 0.0)}
        for b in range(len(self.lengths)):
            results = {"out": out[b : b + 1], "lse": lse[b : b + 1]}
            if not len(self.keys(b)):
                _check_empty(self, results)
                continue
            for name, pair in check_sequence(*self._sequence(b, rows), results).items():
                errors[name] = tuple(max(x, y) for x, y in zip(errors[name], pair))
        return errors

    def _sequence(
        self, b: int, rows: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Scoring]:
        q, k, v = rows
        keys = self.keys(b)
        one = slice(b, b + 1)
        operands = (q[one], k[one, :, keys.start : keys.stop], v[one, :, keys.start : keys.stop])
        scoring = self.scoring
        slopes = scoring.alibi_slopes
        return operands, replace(
            scoring,
            diagonal=len(keys) - self.q_len,
            alibi_slopes=None if slopes is None else slopes[one],
        )


class _OnCpu(CacheCase):
    device = "cpu"


def check_sequence(
    operands: tuple[Tensor, Tensor, Tensor], scoring: Scoring, results: dict[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """Largest errors of results of one problem, and those of same-dtype mathematics.

    Raises:
        AssertionError: by the rule of orchard_ops.testing.
    """
    q, k, v = operands
    dout = torch.zeros_like(results["out"])
    ref, eager = (
        reference.attention(q, k, v, dout, None, scoring, dtype)
        for dtype in (torch.float64, q.dtype)
    )
    errors = {}
    for name, x in results.items():
        exact = getattr(ref, name).double()
        finite = torch.isfinite(exact)
        both = (x, getattr(eager, name))
        pair = [(y.double() - exact)[finite].abs() for y in both]
        errors[name] = tuple(y.max().item() if y.numel() else 0.0 for y in pair)
    assert_attention_close((results["out"], results.get("lse")), ref, eager)
    return errors


def _check_empty(case: CacheCase, results: dict[str, Tensor]) -> None:
    """A sequence without a key: out is 0, and lse what its sinks alone are."""
    sinks = case.scoring.sinks
    lse = torch.full_like(results["lse"], -math.inf)
    if sinks is not None:
        lse = sinks.view(1, -1, 1).expand_as(lse)
    if results["out"].any() or not torch.equal(results["lse"], lse):
        raise AssertionError("a sequence without a key has other results than zero and its sinks")


def entries_of(slots: Tensor, b: int, places: Places, keys: int) -> tuple[Tensor, Tensor]:
    """The entries of the cache in which slots of sequence b lie, and their rows there."""
    if places.table is not None:
        return places.table[b].long()[slots // keys], slots % keys
    entry = b if places.entries is None else int(places.entries[b])
    return torch.full_like(slots, entry), slots


def decodes() -> Iterator[CacheCase]:
    """Every width with every dtype, rooms and pages; then options, alone and together."""
    for n, (widths, dtype) in enumerate(itertools.product(WIDTHS, DTYPES)):
        heads = n % 3 + n // 3
        base = CacheCase(dtype, widths, HEADS[heads % 3], q_len=1 + n % 4, window_right=0)
        yield base.but(layout=("tokens", "heads")[n % 2])
        yield base.but(
            heads=HEADS[(heads + 1) % 3],
            q_len=1 + (n + 2) % 4,
            page_size=PAGE_SIZES[n % 4],
            capacity=4096 // PAGE_SIZES[n % 4] * PAGE_SIZES[n % 4],
        )
    for n, dtype in enumerate(DTYPES):
        yield from _options(CacheCase(dtype, WIDTHS[3 * (n % 2)]))


def _options(base: CacheCase) -> Iterator[CacheCase]:
    """The plan divides the keys of rooms like these between 64 simdgroups."""
    wide = base.but(widths=(128, 128))
    paged = base.but(page_size=64)
    starts = (0, 100, 1000, 0, 2000)
    yield base.but(window_left=700, window_right=0, q_len=3)
    yield base.but(window_left=100, window_right=1, q_len=4, heads=(16, 2))
    yield paged.but(window_left=700, window_right=0, q_len=2)
    yield base.but(softcap=2.0)
    yield base.but(alibi="head", window_right=0, q_len=2)
    yield wide.but(alibi="batch", q_len=4)
    yield base.but(sinks=True, window_right=0, q_len=2)
    yield base.but(starts=starts, window_right=0, q_len=2)
    yield paged.but(starts=starts, page_size=48, capacity=4080)
    yield base.but(picks=True, layout="heads")
    yield base.but(picks=True, starts=starts, window_left=40, window_right=0, sinks=True)
    yield base.but(widths=(61, 67), layout="every second column", q_len=2)
    yield paged.but(widths=(120, 128), layout="odd rows")
    yield base.but(added=3, q_len=4, window_right=0, lengths=(3, 4096, 1000, 4, 2049))
    yield base.but(lengths=(5000, 1 << 30, 4095, 17, 16), added=1)  # more than there is room for
    yield base.but(counted=False, lengths=(4096, 4096), added=4096)
    yield base.but(heads=(32, 2), q_len=4, window_right=0)  # several blocks of rows
    yield base.but(heads=(16, 1), page_size=16)
    for parts in (1, 2, 128, 512):
        yield base.but(parts=parts, window_right=0, q_len=2)
    yield wide.but(
        page_size=48, capacity=4080, starts=starts, softcap=2.0, alibi="batch", sinks=True,
        window_left=900, window_right=0, q_len=2, heads=(12, 2), added=2,
        lengths=(2, 4080, 1002, 3, 2049),
    )  # fmt: skip


def longs() -> Iterator[CacheCase]:
    """128k keys."""
    base = CacheCase(torch.float16, (128, 128), (8, 1), lengths=(_LONGEST,), capacity=_LONGEST)
    two = {"lengths": (_LONGEST - 77, 3), "heads": (8, 2)}
    yield base
    yield base.but(dtype=torch.bfloat16, widths=(64, 64), heads=(8, 2), q_len=4, window_right=0)
    yield base.but(dtype=torch.float32, heads=(2, 2), window_right=0, q_len=3)
    yield base.but(page_size=256, **two)
    yield base.but(page_size=16, widths=(64, 64), dtype=torch.bfloat16, **two)
    yield base.but(window_left=4095, window_right=0, q_len=2)
    yield base.but(widths=(192, 128), dtype=torch.bfloat16)
    yield base.but(widths=(256, 256), sinks=True, alibi="head")
    yield base.but(parts=256)


def small() -> Iterator[CacheCase]:
    """A few for compute-sanitizer."""
    for dtype in (torch.float16, torch.float32):
        base = CacheCase(dtype, lengths=(0, 320, 77), capacity=320, window_right=0, q_len=2)
        yield base
        yield base.but(page_size=16, starts=(0, 20, 70), sinks=True)
        yield base.but(widths=(61, 67), layout="every second column", parts=4)


GROUPS = {"rooms and pages": decodes, "128k keys": longs}
