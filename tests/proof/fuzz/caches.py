"""Calls of flash_attn_with_kvcache, drawn and judged: results, what is written, and to whom.

A cache holds NaN or infinities wherever no sequence has a key, also between its rows in memory.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import orchard_ops
from orchard_ops import flash_attn_with_kvcache
from orchard_ops.rotary import rotate
from orchard_ops.testing import Memory, assert_no_worse_than_math, math_attention

from .examples import DTYPES, MEMORY

HEAD_DIMS = st.sampled_from((1, 2, 5, 8, 16, 24, 33, 40, 64, 80, 128, 192, 256, 264))
SIDES = st.one_of(
    st.just(-1), st.integers(0, 50), st.sampled_from((-7, 2**30, 2**31 - 1, 2**31, 2**62))
)
PAGE_SIZES = st.sampled_from((0, 0, 0, 1, 3, 7, 16, 16, 24, 32, 48))


@dataclass(frozen=True)
class CacheExample:
    """One call. Serialisable, so that a failing one can be kept."""

    device: str
    dtype: str
    num_kv_heads: int
    group: int
    q_len: int
    head_dim: int
    value_dim: int
    page_size: int  # 0: rooms of `slots`
    slots: int
    lengths: tuple[int, ...]  # of the sequences, before the call
    lengths_as: str  # "none", "int", "int32", "int64"
    starts: tuple[int, ...] | None
    new: int | None
    entries: bool  # cache_batch_idx is given
    numbers: str  # the dtype of the other numbers of sequences
    rotated: int
    interleaved: bool
    rotary_float32: bool
    rotary_rows: int  # behind the slots
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    scale: float | None
    alibi: str  # "", "head", "batch"
    num_splits: int
    garbage: str
    memory: tuple[Memory, ...]  # of q, k_cache, v_cache, k, v
    seed: int

    def to_json(self) -> str:
        return json.dumps({"problem": "cache", **asdict(self)})

    @staticmethod
    def from_fields(fields: dict[str, Any]) -> CacheExample:
        fields["memory"] = memories(fields["memory"])
        for name in ("lengths", "window_size"):
            fields[name] = tuple(fields[name])
        if fields["starts"] is not None:
            fields["starts"] = tuple(fields["starts"])
        return CacheExample(**fields)


def memories(fields: list[dict[str, Any]]) -> tuple[Memory, ...]:
    return tuple(Memory(tuple(m["order"]), m["offset"], m["gap"]) for m in fields)


@st.composite
def cache_examples(draw: st.DrawFn) -> CacheExample:
    plain = draw(st.booleans())
    page_size = draw(PAGE_SIZES)
    slots = page_size * draw(st.integers(1, 6)) if page_size else draw(st.integers(1, 100))
    batch = draw(st.integers(1, 4))
    lengths_as = draw(st.sampled_from(("int32", "int32", "int64", "int", "none")))
    q_len = draw(st.one_of(st.integers(1, 4), st.integers(1, 40)))
    new = None if lengths_as == "none" else draw(st.one_of(st.none(), st.integers(0, 40)))
    if new is not None:
        new = min(draw(st.sampled_from((new, q_len))), slots)
    room = slots - (new or 0)
    if lengths_as == "none":
        lengths = [slots] * batch
    elif lengths_as == "int":
        lengths = [draw(st.integers(0, room))] * batch
    else:
        lengths = [draw(st.integers(0, room)) for _ in range(batch)]
    head_dim = draw(HEAD_DIMS)
    starts = None
    if draw(st.booleans()):
        starts = tuple(draw(st.integers(0, n + (new or 0))) for n in lengths)
    return CacheExample(
        device=draw(st.sampled_from(("mps", "mps", "mps", "cpu"))),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 6)),
        q_len=q_len,
        head_dim=head_dim,
        value_dim=head_dim if plain else draw(HEAD_DIMS),
        page_size=page_size,
        slots=slots,
        lengths=tuple(lengths),
        lengths_as=lengths_as,
        starts=starts,
        new=new,
        entries=not page_size and draw(st.booleans()),
        numbers=draw(st.sampled_from(("int32", "int64"))),
        rotated=0 if new is None or plain else 2 * draw(st.integers(0, head_dim // 2)),
        interleaved=draw(st.booleans()),
        rotary_float32=draw(st.booleans()),
        rotary_rows=draw(st.sampled_from((0, q_len, q_len + 3))),
        causal=draw(st.booleans()),
        window_size=(draw(SIDES), draw(SIDES)),
        softcap=0.0 if plain else draw(st.sampled_from((0.0, 1.0, 30.0, -1.0))),
        scale=draw(st.one_of(st.none(), st.sampled_from((0.0, -0.3, 0.05, 1.0)))),
        alibi="" if plain else draw(st.sampled_from(("", "head", "batch"))),
        num_splits=draw(st.integers(0, 5)),
        garbage=draw(st.sampled_from(("nan", "inf", "-inf"))),
        memory=tuple(draw(MEMORY) for _ in range(5)),
        seed=draw(st.integers(0, 2**31)),
    )


def placed(memory: Memory, x: Tensor, device: str) -> Tensor:
    return memory.place(x, device) if x.numel() else x.to(device)


def storage_of(x: Tensor) -> Tensor:
    """All that lies in the memory of x, on the CPU."""
    count = x.untyped_storage().nbytes() // x.element_size()
    return x.as_strided((count,), (1,), 0).cpu()


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (B, S, H, D) rotated in float64, with complex numbers."""
    half = cos.shape[1]
    at = positions.clamp(0, cos.shape[0] - 1)
    turn = torch.complex(cos.double()[at], sin.double()[at]).unsqueeze(2)
    i = torch.arange(half)
    first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
    result = x.double().clone()
    z = torch.complex(result[..., first], result[..., second]) * turn
    result[..., first], result[..., second] = z.real, z.imag
    return result


class CacheProblem:
    """An example with its numbers."""

    def __init__(self, example: CacheExample):
        self.example = e = example
        self.dtype = dtype = DTYPES[e.dtype]
        generator = torch.Generator().manual_seed(e.seed)
        self.batch, self.heads = len(e.lengths), e.num_kv_heads * e.group

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        batch, widths = self.batch, (e.head_dim, e.value_dim)
        self.q = draw(batch, e.q_len, self.heads, e.head_dim)
        self.added = None
        if e.new is not None:
            self.added = [draw(batch, e.new, e.num_kv_heads, w) for w in widths]
        numbers = getattr(torch, e.numbers)
        pages = e.slots // e.page_size if e.page_size else 1
        count = batch * pages + 2 if e.page_size or e.entries else batch
        order = torch.randperm(count, generator=generator)[: batch * pages]
        if not (e.page_size or e.entries):
            order = torch.arange(batch)
        self.order = order
        self.table = order.view(batch, pages).to(numbers) if e.page_size else None
        self.entries = order.to(numbers) if e.entries else None
        self.starts = e.starts or (0,) * batch
        self.caches = []
        for width in widths:
            rooms = draw(batch, e.slots, e.num_kv_heads, width)
            for b, length in enumerate(e.lengths):
                rooms[b, length:] = rooms[b, : self.starts[b]] = float(e.garbage)
            page = e.page_size or e.slots
            cache = torch.full((count, page, *rooms.shape[2:]), float(e.garbage), dtype=dtype)
            cache[order] = rooms.reshape(-1, *cache.shape[1:])
            self.caches.append(cache)
        self.cos = self.sin = None
        if e.rotated:
            angles = torch.randn(e.slots + e.rotary_rows, e.rotated // 2, generator=generator)
            of = torch.float32 if e.rotary_float32 else dtype
            self.cos, self.sin = angles.cos().to(of), angles.sin().to(of)
        self.slopes = None
        if e.alibi:
            shape = (batch, self.heads) if e.alibi == "batch" else (self.heads,)
            self.slopes = torch.rand(shape, generator=generator)
        sides = [-1 if side < 0 or side >= e.slots else side for side in e.window_size]
        self.by_row = e.causal or max(sides) >= 0
        self.left, self.right = sides[0], 0 if e.causal else sides[1]
        self.begins = torch.tensor(e.lengths)

    def too_few_rows(self) -> bool:
        """Whether the call is refused: a position is known that the rotary table does not have."""
        e = self.example
        known = e.lengths[0] if e.lengths_as == "int" else 0
        return bool(e.rotated and self.by_row and known + e.q_len > e.slots + e.rotary_rows)

    def arguments(self, only: int | None = None) -> dict[str, Any]:
        """Of all sequences, or of one, whose number then is 0."""
        e = self.example
        own = slice(None) if only is None else slice(only, only + 1)
        lengths: Any = torch.tensor(e.lengths)[own]
        if e.lengths_as in ("int", "none"):
            lengths = e.lengths[0] if e.lengths_as == "int" else None
        else:
            lengths = lengths.to(getattr(torch, e.lengths_as)).to(e.device)
        caches = self.caches
        if only is not None and not (e.page_size or e.entries):
            caches = [x[own] for x in caches]
        tensors = [self.q[own], *caches, *(x[own] for x in self.added or ())]
        q, k_cache, v_cache, *new = (placed(m, x, e.device) for m, x in zip(e.memory, tensors))
        k, v = new or (None, None)
        starts = None
        if e.starts is not None:
            starts = torch.tensor(e.starts).to(getattr(torch, e.numbers))[own].to(e.device)
        slopes = self.slopes
        if slopes is not None:
            slopes = (slopes[own] if slopes.dim() == 2 else slopes).to(e.device)
        moved = {
            name: None if x is None else x.to(e.device)
            for name, x in (("rotary_cos", self.cos), ("rotary_sin", self.sin))
        }
        return {
            "q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, **moved,
            "cache_seqlens": lengths,
            "cache_batch_idx": None if self.entries is None else self.entries[own].to(e.device),
            "cache_leftpad": starts,
            "block_table": None if self.table is None else self.table[own].to(e.device),
            "softmax_scale": e.scale, "causal": e.causal, "window_size": e.window_size,
            "softcap": e.softcap, "rotary_interleaved": e.interleaved, "alibi_slopes": slopes,
            "num_splits": e.num_splits, "return_softmax_lse": True,
        }  # fmt: skip

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """As the package rotates, which is held to float64 here."""
        if self.cos is None or self.sin is None:
            return x
        cos, sin = self.cos, self.sin
        found = rotate(x, cos, sin, positions, self.example.interleaved)
        right = turned(x, cos, sin, positions, self.example.interleaved)
        room = torch.finfo(x.dtype).eps * right.abs() + 1e-6 * x.double().abs().amax(-1, True)
        assert bool(((found.double() - right).abs() <= room).all()), "rotation"
        return found

    def rooms(self, cache: Tensor) -> Tensor:
        """(B, slots, heads, D)"""
        return cache[self.order].reshape(self.batch, self.example.slots, *cache.shape[2:])

    def filled(self) -> list[Tensor]:
        """The caches after the call."""
        caches = [x.clone() for x in self.caches]
        if self.added is None:
            return caches
        new = self.added[0].shape[1]
        tokens = self.begins.unsqueeze(1) + torch.arange(new)
        for cache, x in zip(caches, (self.rotated(self.added[0], tokens), self.added[1])):
            rooms = self.rooms(cache)
            for b in range(self.batch):
                rooms[b, tokens[b]] = x[b]
            cache[self.order] = rooms.reshape(-1, *cache.shape[1:])
        return caches

    def check(self, out: Tensor, lse: Tensor) -> None:
        """The rule, for each sequence from its keys alone."""
        e = self.example
        q_positions = self.begins.unsqueeze(1) + torch.arange(e.q_len) * self.by_row
        q = self.rotated(self.q, q_positions).transpose(1, 2)
        k, v = (self.rooms(x).transpose(1, 2) for x in self.filled())
        for b in range(self.batch):
            end, start = e.lengths[b] + (e.new or 0), self.starts[b]
            slopes = self.slopes
            check_sequence(
                (q[b], k[b, :, start:end], v[b, :, start:end]),
                (out[b].transpose(0, 1), lse[b]),
                scale=e.scale,
                window_left=self.left,
                window_right=self.right,
                softcap=max(e.softcap, 0.0),
                alibi_slopes=slopes[b] if slopes is not None and slopes.dim() == 2 else slopes,
            )


def check_sequence(
    operands: tuple[Tensor, ...], results: tuple[Tensor, Tensor], **options: Any
) -> None:
    """The rule of the kernels for the heads (H, length, D) of one sequence, bottom-right."""
    q, k, v = (x.unsqueeze(0) for x in operands)
    dout = torch.zeros(*q.shape[:3], v.shape[3])
    exact, eager = (
        math_attention(q, k, v, dout, dtype=dtype, diagonal=k.shape[2] - q.shape[2], **options)
        for dtype in (torch.float64, q.dtype)
    )
    for name, x in zip(("out", "lse"), results):
        assert_no_worse_than_math(
            name, x.unsqueeze(0), getattr(exact, name), getattr(eager, name), 2.0,
            exact.rounding(name, q.dtype), exact.rounded_weights(name, q.dtype),
        )  # fmt: skip


def run(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", orchard_ops.OrchardFallbackWarning)
        out, lse = flash_attn_with_kvcache(**arguments)
    return out.cpu(), lse.cpu()


def check_cache(example: CacheExample) -> str:
    """Runs the call; which path it took."""
    problem, e = CacheProblem(example), example
    arguments = problem.arguments()
    if problem.too_few_rows():
        try:
            run(arguments)
        except ValueError as error:
            assert "must have a row for each position" in str(error), error
            return "refused"
        raise AssertionError("too few rows of the rotary table are not refused")
    kept = {n: storage_of(x) for n, x in arguments.items() if isinstance(x, Tensor)}
    before = orchard_ops.stats().fallbacks
    out, lse = run(arguments)
    fell_back = orchard_ops.stats().fallbacks > before
    on_metal = e.device == "mps" and max(e.head_dim, e.value_dim) <= 256
    assert fell_back == (e.device == "mps" and not on_metal), "the path"

    filled = dict(zip(("k_cache", "v_cache"), problem.filled()))
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            continue
        expected = kept[name]
        if name in filled:
            memory = e.memory[1 if name == "k_cache" else 2]
            expected = storage_of(placed(memory, filled[name], "cpu"))
        found = storage_of(x)
        if name == "k_cache" and e.rotated:  # they may be rounded to either side
            eps = torch.finfo(found.dtype).eps
            torch.testing.assert_close(found, expected, equal_nan=True, rtol=eps, atol=1e-6)
            same = (found == expected) | (found.isnan() & expected.isnan())
            changed = bits(found) != bits(kept[name])
            assert bool((same | changed).all()), "unused slots of k_cache"
        else:
            assert torch.equal(bits_or_numbers(found), bits_or_numbers(expected)), name
    problem.check(out, lse)

    if e.device == "mps":
        again = run(problem.arguments() | {"num_splits": 1})
        assert torch.equal(bits(again[0]), bits(out)), "the bits of another run"
        b = e.seed % problem.batch
        alone = run(problem.arguments(b))
        for x, y in zip(alone, (out, lse)):
            assert torch.equal(bits(x[0]), bits(y[b])), f"the bits of sequence {b} alone"
    return "metal" if on_metal else "reference"


def bits_or_numbers(x: Tensor) -> Tensor:
    return bits(x) if x.is_floating_point() else x
