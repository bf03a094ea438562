"""What is drawn: one call of flash_attn with its operands' memory, and how it is judged."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict, dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import orchard_ops
from orchard_ops import KeyRanges
from orchard_ops.testing import Case, Memory, assert_attention_close, math_attention

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Example:
    """One call. Serialisable, so that a failing one can be kept."""

    device: str
    dtype: str
    batch: tuple[int, ...]  # 0, 1 or 2 batch dimensions
    num_kv_heads: int
    group: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    memory: tuple[Memory, ...]  # of q, k, v, dout; used with one batch dimension
    seed: int
    dropout_p: float
    is_causal: bool
    scale: float | None
    window_left: int
    window_right: int
    softcap: float
    mask: str  # "", "bool", "same", "float32"
    mask_full: tuple[bool, ...]  # which of (B, H, L, S) the mask does not broadcast over
    alibi: str  # "", "head", "batch"
    sinks: bool
    use_lse: bool  # lse takes part in the loss
    ranges: str = ""  # "", or a kind of Case.ranges
    ranges_full: tuple[bool, ...] = (True, True)  # which of (B, H) they do not broadcast over
    reach: int | None = None  # of KeyRanges, true or not: with the windows it gives key_span

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Example:
        fields = json.loads(text)
        fields["memory"] = tuple(
            Memory(tuple(m["order"]), m["offset"], m["gap"]) for m in fields["memory"]
        )
        for name in ("batch", "mask_full", "ranges_full"):
            fields[name] = tuple(fields.get(name, (True, True)))
        return Example(**fields)


LENGTHS = st.one_of(
    st.integers(1, 80), st.sampled_from((0, 1, 31, 32, 33, 63, 64, 65, 127, 130, 200))
)
HEAD_DIMS = st.sampled_from((1, 5, 8, 16, 24, 32, 40, 64, 65, 72, 96, 128, 200, 256, 264))
WINDOWS = st.one_of(
    st.just(-1), st.integers(0, 100), st.sampled_from((2**30, 2**31 - 1, 2**62, 2**63 - 1))
)
RANGES = st.sampled_from(("", "", "any", "documents", "padding", "prefix"))
REACHES = st.one_of(st.none(), st.integers(0, 24), st.sampled_from((25, 56, 90, 2**31, 2**63)))
MEMORY = st.builds(
    Memory,
    st.permutations(range(4)).map(tuple),
    st.sampled_from((0, 1, 8)),
    st.sampled_from((0, 3, 8)),
)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    head_dim = draw(HEAD_DIMS)
    plain = draw(st.booleans())  # half of the calls have nothing beside the scaled dot product
    return Example(
        device=draw(st.sampled_from(("mps", "mps", "mps", "cpu"))),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        batch=draw(st.sampled_from(((1,), (2,), (3,), (), (2, 2), (0,)))),
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        q_len=draw(LENGTHS),
        kv_len=draw(LENGTHS),
        head_dim=head_dim,
        value_dim=head_dim if plain else draw(HEAD_DIMS),
        memory=tuple(draw(MEMORY) for _ in range(4)),
        seed=draw(st.integers(0, 2**31)),
        dropout_p=draw(st.one_of(st.just(0.0), st.floats(0.0, 0.99))),
        is_causal=draw(st.booleans()),
        scale=draw(st.one_of(st.none(), st.sampled_from((0.0, -0.3, 0.05, 1.0)))),
        window_left=draw(WINDOWS),
        window_right=draw(WINDOWS),
        softcap=0.0 if plain else draw(st.sampled_from((0.0, 1.0, 30.0))),
        mask="" if plain else draw(st.sampled_from(("", "bool", "same", "float32"))),
        mask_full=tuple(draw(st.booleans()) for _ in range(4)),
        alibi="" if plain else draw(st.sampled_from(("", "head", "batch"))),
        sinks=False if plain else draw(st.booleans()),
        use_lse=draw(st.booleans()),
        ranges="" if plain else draw(RANGES),
        ranges_full=tuple(draw(st.booleans()) for _ in range(2)),
        reach=None if plain else draw(REACHES),
    )


def runs_on_metal(example: Example) -> bool:
    """Whether Metal takes the call, whatever the plan says."""
    return example.device == "mps" and max(example.head_dim, example.value_dim) <= 256


def check(example: Example) -> str:
    """Runs the call and its gradients, applies the tolerance rule; which path it took.

    A call that Metal takes must run there, forward and backward.
    """
    e, dtype = example, DTYPES[example.dtype]
    generator = torch.Generator().manual_seed(e.seed)
    batch, heads = math.prod(e.batch), e.num_kv_heads * e.group

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = draw(batch, heads, e.q_len, e.head_dim).to(dtype)
    k = draw(batch, e.num_kv_heads, e.kv_len, e.head_dim).to(dtype)
    v = draw(batch, e.num_kv_heads, e.kv_len, e.value_dim).to(dtype)
    do = draw(batch, heads, e.q_len, e.value_dim).to(dtype)
    dlse = draw(batch, heads, e.q_len) if e.use_lse else None
    mask = None
    if e.mask:
        full = (batch, heads, e.q_len, e.kv_len)
        mask = draw(*(n if keep else 1 for n, keep in zip(full, e.mask_full)))
        mask = (
            mask > -0.5 if e.mask == "bool" else mask.to(dtype if e.mask == "same" else mask.dtype)
        )
    slopes = {"": None, "head": draw(heads).abs(), "batch": draw(batch, heads).abs()}[e.alibi]
    sinks = draw(heads).to(dtype) if e.sinks else None
    ranges = None
    if e.ranges and batch:
        case = Case(
            e.q_len,
            e.kv_len,
            batch=batch,
            num_heads=heads,
            num_kv_heads=heads,
            ranges=e.ranges,
            ranges_full=e.ranges_full,
            seed=e.seed,
        )
        ranges = case.scoring().key_ranges

    torch.manual_seed(e.seed)
    seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64)) if e.dropout_p else 0
    ref, eager = (
        math_attention(
            q, k, v, do, dlse, dtype=compute, scale=e.scale,
            dropout_p=e.dropout_p, dropout_seed=seed,
            window_left=e.window_left, window_right=0 if e.is_causal else e.window_right,
            attn_mask=mask, softcap=e.softcap, alibi_slopes=slopes, sinks=sinks,
            key_ranges=ranges,
        )
        for compute in (torch.float64, dtype)
    )  # fmt: skip

    def batched(x: Tensor) -> Tensor:
        return x if len(e.batch) == 1 else x.reshape(*e.batch, *x.shape[1:])

    def mask_batched(x: Tensor) -> Tensor:
        return batched(x) if x.shape[0] == batch else x.reshape(*(1 for _ in e.batch), *x.shape[1:])

    def leaf(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(e.device).requires_grad_(x.is_floating_point())

    if len(e.batch) == 1 and batch and e.q_len and e.kv_len:
        q, k, v, do = (m.place(x, e.device) for m, x in zip(e.memory, (q, k, v, do)))
    q, k, v = (batched(x.to(e.device)).requires_grad_() for x in (q, k, v))
    mask, sinks = leaf(None if mask is None else mask_batched(mask)), leaf(sinks)
    key_ranges = None if ranges is None else ranges.to(e.device)
    if key_ranges is not None and e.reach is not None:
        key_ranges = KeyRanges(key_ranges, diagonal=0, has_prefix=False, reach=e.reach)
    torch.manual_seed(e.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", orchard_ops.OrchardFallbackWarning)
        arguments = dict(
            attn_mask=mask, dropout_p=e.dropout_p, is_causal=e.is_causal, scale=e.scale,
            enable_gqa=True,
            window_left=e.window_left, window_right=e.window_right, softcap=e.softcap,
            alibi_slopes=None if slopes is None else slopes.to(e.device), sinks=sinks,
            key_ranges=key_ranges,
        )  # fmt: skip
        path = orchard_ops.explain(q, k, v, **arguments).path
        before = orchard_ops.stats().metal
        out, lse = orchard_ops.flash_attn(q, k, v, **arguments, return_lse=True)
        outputs, grads = [out], [batched(do.to(e.device))]
        if dlse is not None:
            outputs, grads = [out, lse], [*grads, batched(dlse.to(e.device))]
        inputs = [x for x in (q, k, v, mask, sinks) if x is not None and x.requires_grad]
        results = iter(torch.autograd.grad(outputs, inputs, grads, allow_unused=True))
    dq, dk, dv = (next(results).reshape(s.shape) for s in (ref.dq, ref.dk, ref.dv))
    dmask = next(results).reshape(ref.dmask.shape) if ref.dmask is not None else None
    dsinks = next(results) if ref.dsinks is not None else None
    after = orchard_ops.stats().metal
    ran = {op: after[op] - before[op] for op in ("flash_attn_fwd", "flash_attn_bwd")}
    assert set(ran.values()) == {int(runs_on_metal(e))}, f"calls on Metal: {ran}"
    assert path == ("metal" if runs_on_metal(e) else "reference")
    out, lse = out.reshape(ref.out.shape), lse.reshape(ref.lse.shape)
    assert_attention_close((out, lse, dq, dk, dv, dmask, dsinks), ref, eager)
    return path
