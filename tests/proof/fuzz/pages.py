"""Calls of flash_attn_varlen_func with keys in pages, drawn and judged."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import orchard_ops
from orchard_ops import flash_attn_varlen_func
from orchard_ops.testing import Memory

from .caches import HEAD_DIMS, SIDES, bits, check_sequence, memories, placed
from .examples import DTYPES, MEMORY


@dataclass(frozen=True)
class PagesExample:
    """One call. Serialisable, so that a failing one can be kept."""

    device: str
    dtype: str
    num_kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    page_size: int
    pages: int  # of a sequence
    lengths: tuple[tuple[int, int], ...]  # queries and keys
    rest: int  # queries of no sequence
    starts: tuple[int, ...] | None
    used: bool  # seqused_k says the lengths, and cu_seqlens_k something else
    slack: tuple[int, int]  # of max_seqlen_q and max_seqlen_k
    numbers: str
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    scale: float | None
    alibi: str  # "", "head", "sequence"
    garbage: str
    memory: tuple[Memory, ...]  # of k and v
    seed: int

    def to_json(self) -> str:
        return json.dumps({"problem": "pages", **asdict(self)})

    @staticmethod
    def from_fields(fields: dict[str, Any]) -> PagesExample:
        fields["memory"] = memories(fields["memory"])
        fields["lengths"] = tuple(map(tuple, fields["lengths"]))
        for name in ("window_size", "slack"):
            fields[name] = tuple(fields[name])
        if fields["starts"] is not None:
            fields["starts"] = tuple(fields["starts"])
        return PagesExample(**fields)


@st.composite
def pages_examples(draw: st.DrawFn) -> PagesExample:
    plain = draw(st.booleans())
    page_size, pages = draw(st.sampled_from((1, 3, 7, 16, 16, 24, 32))), draw(st.integers(1, 5))
    most = draw(st.sampled_from((1, 3, 16, 17, 40)))
    key_lengths = st.integers(0, page_size * pages)
    lengths = draw(st.lists(st.tuples(st.integers(0, most), key_lengths), min_size=1, max_size=5))
    head_dim = draw(HEAD_DIMS)
    starts = None
    if draw(st.booleans()):
        starts = tuple(draw(st.integers(0, n)) for _, n in lengths)
    return PagesExample(
        device=draw(st.sampled_from(("mps", "mps", "mps", "cpu"))),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 5)),
        head_dim=head_dim,
        value_dim=head_dim if plain else draw(HEAD_DIMS),
        page_size=page_size,
        pages=pages,
        lengths=tuple(lengths),
        rest=draw(st.integers(0, 2)),
        starts=starts,
        used=draw(st.booleans()),
        slack=(draw(st.integers(0, 2)), draw(st.integers(0, 40))),
        numbers=draw(st.sampled_from(("int32", "int64"))),
        causal=draw(st.booleans()),
        window_size=(draw(SIDES), draw(SIDES)),
        softcap=0.0 if plain else draw(st.sampled_from((0.0, 1.0, 30.0, -1.0))),
        scale=draw(st.one_of(st.none(), st.sampled_from((0.0, -0.3, 0.05, 1.0)))),
        alibi="" if plain else draw(st.sampled_from(("", "head", "sequence"))),
        garbage=draw(st.sampled_from(("nan", "inf", "-inf"))),
        memory=tuple(draw(MEMORY) for _ in range(2)),
        seed=draw(st.integers(0, 2**31)),
    )


def check_pages(example: PagesExample) -> str:
    """Runs the call; which path it took."""
    e, dtype = example, DTYPES[example.dtype]
    generator = torch.Generator().manual_seed(e.seed)
    numbers = getattr(torch, e.numbers)
    count, heads = len(e.lengths), e.num_kv_heads * e.group
    starts = e.starts or (0,) * count

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def cumulative(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(numbers)

    q_lens, k_lens = ([pair[n] for pair in e.lengths] for n in (0, 1))
    of_query = cumulative(q_lens)
    q = draw(sum(q_lens) + e.rest, heads, e.head_dim)
    table = torch.randperm(count * e.pages + 2, generator=generator)[: count * e.pages]
    rooms, caches = [], []
    for width in (e.head_dim, e.value_dim):
        x = draw(count, e.pages * e.page_size, e.num_kv_heads, width)
        for b, length in enumerate(k_lens):
            x[b, length:] = x[b, : starts[b]] = float(e.garbage)
        shape = (count * e.pages + 2, e.page_size, *x.shape[2:])
        cache = torch.full(shape, float(e.garbage), dtype=dtype)
        cache[table] = x.reshape(-1, *shape[1:])
        rooms.append(x)
        caches.append(cache)
    slopes = None
    if e.alibi:
        slopes = torch.rand((count, heads) if e.alibi == "sequence" else (heads,),
                            generator=generator)  # fmt: skip
    longest = [max(x) + more for x, more in zip((q_lens, k_lens), e.slack)]
    numbers_of = {
        "cu_seqlens_q": of_query,
        "cu_seqlens_k": cumulative([3] * count if e.used else k_lens),
        "block_table": table.view(count, e.pages).to(numbers),
        "seqused_k": torch.tensor(k_lens).to(numbers) if e.used else None,
        "leftpad_k": None if e.starts is None else torch.tensor(e.starts).to(numbers),
        "alibi_slopes": slopes,
    }

    def run(q: Tensor, caches: list[Tensor]) -> tuple[Tensor, Tensor]:
        k, v = (placed(m, x, e.device) for m, x in zip(e.memory, caches))
        moved = {n: None if x is None else x.to(e.device) for n, x in numbers_of.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", orchard_ops.OrchardFallbackWarning)
            out, lse, _ = flash_attn_varlen_func(
                q.to(e.device), k, v, max_seqlen_q=longest[0], max_seqlen_k=longest[1],
                softmax_scale=e.scale, causal=e.causal, window_size=e.window_size,
                softcap=e.softcap, return_attn_probs=True, **moved,
            )  # fmt: skip
        return out.cpu(), lse.cpu()

    before = orchard_ops.stats().fallbacks
    out, lse = run(q, caches)
    on_metal = e.device == "mps" and max(e.head_dim, e.value_dim) <= 256
    fell_back = orchard_ops.stats().fallbacks > before
    assert fell_back == (e.device == "mps" and not on_metal and q.shape[0] > 0), "the path"

    sides = [-1 if side < 0 or side >= longest[1] else side for side in e.window_size]
    spans = list(itertools.pairwise(of_query.tolist()))
    for b, (first, end) in enumerate(spans):
        if first == end:
            continue
        k, v = (x[b, starts[b] : k_lens[b]].transpose(0, 1) for x in rooms)
        check_sequence(
            (q[first:end].transpose(0, 1), k, v),
            (out[first:end].transpose(0, 1), lse[:, first:end]),
            scale=e.scale,
            window_left=sides[0],
            window_right=0 if e.causal else sides[1],
            softcap=max(e.softcap, 0.0),
            alibi_slopes=slopes[b] if slopes is not None and slopes.dim() == 2 else slopes,
        )
    behind = slice(spans[-1][1], None)
    assert not out[behind].any() and bool((lse[:, behind] == -math.inf).all()), "no sequence"

    if e.device == "mps":
        again = run(q, caches)
        assert torch.equal(bits(again[0]), bits(out)), "the bits of another run"
        b = e.seed % count
        first, end = spans[b]
        others = q * -3
        others[first:end] = q[first:end]
        pages = table.view(count, e.pages)[b]
        changed = [x * -3 for x in caches]
        for x, cache in zip(changed, caches):
            x[pages] = cache[pages]
        found = run(others, changed)
        assert torch.equal(bits(found[0][first:end]), bits(out[first:end])), f"bits of {b}"
        assert torch.equal(bits(found[1][:, first:end]), bits(lse[:, first:end])), f"lse of {b}"
    return "metal" if on_metal else "reference"
