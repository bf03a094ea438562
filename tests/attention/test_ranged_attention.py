"""Attention by key ranges: against float64 and dense masks; what it reads, what it skips."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import DTYPES, Case, check_case, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from representative import pairs, product
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import orchard_ops
from orchard_ops import KeyRanges
from orchard_ops.reference import scores
from orchard_ops.reference.scores import Problem
from orchard_ops.scoring import Scoring
from orchard_ops.testing import assert_attention_close

DEVICES = ("cpu", "mps")
IMPL = {"cpu": "auto", "mps": "metal"}
KINDS = ("any", "documents", "padding", "prefix")
BOOLS = st.booleans()
CASES = [
    Case(130, 150, 32, batch=2, num_heads=4, num_kv_heads=2, ranges="any"),
    Case(200, 200, 64, num_heads=4, num_kv_heads=4, ranges="documents", window_right=0),
    Case(90, 140, 16, batch=3, ranges="padding", window_left=30, window_right=0, dropout_p=0.2),
    Case(140, 140, 40, ranges="prefix", alibi="head", softcap=2.0, sinks=True),
    Case(1, 70, 24, batch=2, ranges="any", ranges_full=(True, False)),
    Case(70, 1, 24, ranges="documents", sinks=True),
]


@pytest.mark.parametrize("device, dtype, case", pairs(DEVICES, DTYPES, CASES), ids=str)
@pytest.mark.usefixtures("checked")
def test_obeys_the_tolerance_rule(device: str, dtype: torch.dtype, case: Case):
    check_case(case.but(dtype=dtype), device=device, impl=IMPL[device])


LONG = [  # blocks of keys are skipped, others are seen by all of their queries
    Case(300, 700, 64, num_heads=4, num_kv_heads=2, ranges="any", ranges_full=(True, False)),
    Case(450, 450, 128, ranges="documents", window_right=0, alibi="head", value_dim=64),
    Case(320, 600, 64, batch=2, ranges="padding", mask="bool", window_left=90, dropout_p=0.2),
    Case(400, 400, 96, ranges="prefix", window_right=0, mask="float32", sinks=True, softcap=2.0),
    Case(330, 500, 32, batch=2, num_kv_heads=2, ranges="any", sinks=True, window_right=30),
]


@pytest.mark.parametrize(
    "case, dtype, scratch", product(tuple(LONG), tuple(DTYPES), ("0", "256")), ids=str
)
@pytest.mark.usefixtures("checked")
def test_many_blocks(scratch: str, dtype: torch.dtype, case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", scratch)
    check_case(case.but(dtype=dtype))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_kv_heads = draw(st.integers(1, 2))
    window = st.one_of(st.just(-1), st.integers(0, 30), st.just(2**63 - 1))
    return Case(
        q_len=draw(st.integers(0, 70)),
        kv_len=draw(st.integers(0, 70)),
        head_dim=8,
        batch=draw(st.integers(1, 3)),
        num_heads=num_kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=num_kv_heads,
        dtype=torch.float64,
        dropout_p=draw(st.sampled_from((0.0, 0.3))),
        window_left=draw(window),
        window_right=draw(window),
        softcap=draw(st.sampled_from((0.0, 1.5))),
        mask=draw(st.sampled_from(("", "bool", "same"))),
        mask_full=draw(st.tuples(BOOLS, BOOLS, BOOLS, BOOLS)),
        alibi=draw(st.sampled_from(("", "head", "batch"))),
        sinks=draw(BOOLS),
        ranges=draw(st.sampled_from(KINDS)),
        ranges_full=draw(st.tuples(BOOLS, BOOLS)),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(), small=BOOLS)
def test_with_every_other_feature(case: Case, small: bool):
    """In float64, where the reference is exact to its last digits; in blocks of 16 rows too."""
    operands = case.operands()
    ref = case.math(torch.float64, *operands)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(scores, "CPU_LIMITS", scores.Limits(1, 1, 1))
        scoring = case.scoring()
        if scoring.sinks is not None:  # their gradient has their dtype
            scoring = scoring._replace(sinks=scoring.sinks.double())
        found = run(case, *operands, impl="auto", scoring=scoring)
    names = ("out", "lse", "dq", "dk", "dv", "dmask", "dsinks")
    for name, x in zip(names, found):
        if x is not None:
            torch.testing.assert_close(x, getattr(ref, name), rtol=1e-10, atol=1e-10)


# ---- the public function ------------------------------------------------------------------------


def by_mask(ranges: KeyRanges, mask: Tensor | None, kv_len: int, right: int) -> Tensor:
    """The mask that says the same."""
    seen = ranges.dense(kv_len, window_right=right)
    if mask is None:
        return seen
    return mask.masked_fill(~seen, -math.inf) if mask.is_floating_point() else mask & seen


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("kind", ("none", "bool", "float"))
@pytest.mark.parametrize("shape", ((3,), (), (3, 2)), ids=str)
def test_is_the_mask_that_it_describes(shape: tuple[int, ...], kind: str, causal: bool):
    """Output, lse and gradients, with another mask beside it, for any number of batches."""
    batch = math.prod(shape)
    q, k, v = (
        torch.randn(*shape, h, n, 16, dtype=torch.float64, requires_grad=True)
        for h, n in ((4, 20), (2, 30), (2, 30))
    )
    lengths, starts = torch.tensor([[30, 12, 0, 7, 1, 20], [0, 9, 3, 2, 29, 10]])[:, :batch]
    ranges = KeyRanges.from_lengths(lengths, 20, starts=starts, diagonal=10)
    masks = {
        "none": None,
        "bool": torch.rand(20, 30) > 0.3,
        "float": torch.randn(4, 1, 30, dtype=torch.float64, requires_grad=True),
    }
    mask = masks[kind]
    options = {"enable_gqa": True, "return_lse": True}
    found = orchard_ops.flash_attn(q, k, v, mask, is_causal=causal, key_ranges=ranges, **options)
    full = by_mask(ranges, mask, 30, 0 if causal else -1)
    full = full.view(*shape, *full.shape[1:])
    expected = orchard_ops.flash_attn(q, k, v, full, **options)
    leaves = [x for x in (q, k, v, mask) if x is not None and x.requires_grad]
    grads = [torch.randn_like(x) for x in expected]
    for x, y in zip(
        (*found, *torch.autograd.grad(found, leaves, grads)),
        (*expected, *torch.autograd.grad(expected, leaves, grads)),
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_takes_the_tensor_too_in_any_strides():
    q = torch.randn(2, 3, 9, 8)
    ranges = KeyRanges.from_lengths(torch.tensor([3, 9]), 9)
    expected = orchard_ops.flash_attn(q, q, q, key_ranges=ranges)
    for tensor in (
        ranges.tensor,
        ranges.tensor.expand(2, 3, 9, 4),
        ranges.tensor.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert torch.equal(orchard_ops.flash_attn(q, q, q, key_ranges=tensor), expected)
        found = torch.ops.orchard.flash_attn(q, q, q, key_ranges=tensor)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", (False, True))
def test_unseen_keys_and_blind_rows_may_hold_anything(masked: bool, kind: str, device: str):
    """NaN and infinity in keys that no row sees, and in rows that see no key, reach nothing."""
    case = Case(
        6 if kind == "any" else 40,
        90,
        16,
        batch=2,
        num_heads=4,
        num_kv_heads=2,
        ranges=kind,
        window_left=4,
        mask="bool" if masked else "",
        mask_full=(True, False, False, True),
    )
    q, k, v, do = case.operands()
    scoring = case.scoring()
    seen = KeyRanges(scoring.key_ranges).dense(90, window_left=4)
    if masked:
        seen = seen & scoring.attn_mask
    seen = seen.expand(2, 4, case.q_len, 90)
    unseen = ~seen.any(2).unflatten(1, (2, 2)).any(2)
    blind = ~seen.any(3)
    assert unseen.any()
    assert blind.any() or kind != "any"
    clean = run(case, *(x.to(device) for x in (q, k, v, do)), impl=IMPL[device])
    for garbage in (math.nan, math.inf, -math.inf):
        dirty = [
            q.masked_fill(blind.unsqueeze(-1), garbage),
            k.masked_fill(unseen.unsqueeze(-1), garbage),
            v.masked_fill(unseen.unsqueeze(-1), garbage),
            do.masked_fill(blind.unsqueeze(-1), garbage),
        ]
        found = run(case, *(x.to(device) for x in dirty), impl=IMPL[device])
        for x, y in zip(found[:5], clean[:5]):
            assert torch.equal(x.cpu(), y.cpu())
    assert not found[0].cpu()[blind].any()
    assert found[1].cpu()[blind].isneginf().all()
    assert not found[2].cpu()[blind].any()
    for x in found[3:5]:
        assert not x.cpu()[unseen].any()


# ---- what the reference does not compute --------------------------------------------------------


def columns(key_ranges: Tensor, kv_len: int, **windows: int) -> int:
    """Scores per head that the reference's blocks have, with as few rows as blocks may have."""
    q_len = key_ranges.shape[2]
    q, k = torch.zeros(1, 1, q_len, 4), torch.zeros(1, 1, kv_len, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "CPU_LIMITS", scores.Limits(1, 1, 1))
        blocks = list(Problem(q, k, k, Scoring(key_ranges=key_ranges, **windows)).blocks())
    assert sum(b.row1 - b.row0 for b in blocks) == q_len
    return sum((b.row1 - b.row0) * (b.col1 - b.col0) for b in blocks)


def test_work_follows_the_keys_that_are_seen():
    length, part = 1024, 64
    documents = KeyRanges.from_cu_seqlens(torch.arange(0, length + 1, part), q_len=length).tensor
    assert columns(documents, length) == length * part
    # A block of 16 rows sees up to its last row.
    causal = sum(16 * n for n in range(16, part + 1, 16)) * length // part
    assert columns(documents, length, window_right=0) == causal
    nothing = KeyRanges.from_lengths(torch.tensor([0]), length).tensor
    assert columns(nothing, length) == 0
    padded = KeyRanges.from_lengths(torch.tensor([40]), length, starts=torch.tensor([900])).tensor
    assert columns(padded, length) == 40 * length


def test_memory_is_linear_in_the_length():
    """No tensor of L x S elements per head, as the profiler sees it."""
    length = 4096
    case = Case(length, length, 16, num_heads=1, ranges="documents", alibi="head")
    operands = case.operands()
    with torch.profiler.profile(profile_memory=True) as profile:
        run(case, *operands, impl="auto")
    largest = max(event.cpu_memory_usage for event in profile.events())
    block = scores.CPU_LIMITS.elements * 8  # the distances of ALiBi are integers
    assert block < length * length * 4 / 2  # else this test could not fail
    assert largest <= block + length * 16 * 8


# ---- under transforms ---------------------------------------------------------------------------


def packed_loss(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    ranges = KeyRanges.from_document_ids(ids)
    return orchard_ops.flash_attn(q, k, v, is_causal=True, key_ranges=ranges).square()


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_whole(dynamic: bool):
    torch._dynamo.reset()
    compiled = torch.compile(packed_loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (12, 17):
        leaves = [torch.randn(2, 3, length, 8, requires_grad=True) for _ in range(3)]
        ids = torch.arange(length) // 5 + torch.zeros(2, 1, dtype=torch.int64)
        found, expected = compiled(*leaves, ids), packed_loss(*leaves, ids)
        torch.testing.assert_close(found, expected)
        for x, y in zip(
            torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
        ):
            torch.testing.assert_close(x, y)


def test_a_descriptor_passes_into_compiled_code():
    torch._dynamo.reset()

    def attention(q: Tensor, ranges: KeyRanges) -> Tensor:
        return orchard_ops.flash_attn(q, q, q, key_ranges=ranges)

    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    q = torch.randn(1, 2, 9, 8)
    for ranges in (KeyRanges.chunked(4, 9), KeyRanges.chunked(2, 9)):
        torch.testing.assert_close(compiled(q, ranges), attention(q, ranges))


@pytest.mark.parametrize("shape", ((1, 1), (2, 1), (1, 4), (2, 4)), ids=str)
@pytest.mark.parametrize("mapped", (False, True))
def test_vmap_and_grad(mapped: bool, shape: tuple[int, int]):
    q, k, v = (torch.randn(3, 2, h, n, 8) for h, n in ((4, 10), (2, 12), (2, 12)))
    samples = [
        Case(10, 12, batch=2, num_heads=4, ranges="any", seed=n).scoring().key_ranges
        for n in range(3)
    ]
    ranges = torch.stack(samples)[:, : shape[0], : shape[1]]
    ranges = ranges if mapped else ranges[0]

    def loss(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> Tensor:
        out = torch.ops.orchard.flash_attn(q, k, v, enable_gqa=True, key_ranges=ranges)
        return out.square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    found = torch.vmap(gradient, in_dims=(0, 0, 0, 0 if mapped else None))(q, k, v, ranges)
    for n in range(3):
        expected = gradient(q[n], k[n], v[n], ranges[n] if mapped else ranges)
        for x, y in zip(found, expected):
            torch.testing.assert_close(x[n], y)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_and_checkpoint(device: str):
    q = torch.randn(2, 3, 20, 16, device=device, requires_grad=True)
    ranges = KeyRanges.from_lengths(torch.tensor([5, 20], device=device), 20)

    def attention(q: Tensor) -> Tensor:
        return orchard_ops.flash_attn(q, q, q, dropout_p=0.2, key_ranges=ranges)

    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(1)
        with torch.autocast(device, dtype=torch.bfloat16):
            if checkpoint:
                out = torch.utils.checkpoint.checkpoint(attention, q, use_reentrant=False)
            else:
                out = attention(q)
        assert out.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(out.float().square().sum(), q)[0].cpu())
    assert torch.equal(*gradients)


def test_opcheck():
    case = Case(9, 11, 8, batch=2, num_heads=4, num_kv_heads=2, ranges="any")
    q, k, v, do = case.operands()
    scoring = case.scoring()._replace(dropout_seed=None)
    op = torch.ops.orchard
    torch.library.opcheck(op.flash_attn_fwd, (q, k, v, *scoring))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    keywords = {"key_ranges": scoring.key_ranges, "enable_gqa": True}
    torch.library.opcheck(op.flash_attn, (q, k, v), keywords)
    out, row_stats = op.flash_attn_fwd(q, k, v, *scoring)
    tensors = (x.detach() for x in (do, q, k, v, out, row_stats))
    do, q, k, v, out, row_stats = tensors
    arguments = (do, None, q, k, v, out, row_stats, *scoring, False)
    torch.library.opcheck(op.flash_attn_bwd, arguments)


def test_dropout_counts_in_the_coordinates_of_the_tensors():
    """The mask of dropout is that of the same call without ranges."""
    case = Case(40, 50, 16, ranges="documents", dropout_p=0.4, dtype=torch.float64)
    operands = case.operands()
    ref = case.math(torch.float64, *operands)
    found = run(case, *operands, impl="auto")
    assert_attention_close(found, ref, ref)


# ---- what is refused ----------------------------------------------------------------------------


RIGHT = KeyRanges.chunked(4, 8).tensor
LOWER = causal_lower_right(8, 9)
REFUSED = {
    "kind": ({"key_ranges": 3}, "key_ranges must be a tensor or None; got a int"),
    "dtype": ({"key_ranges": RIGHT.long()}, "key_ranges must be int32; got torch.int64"),
    "rank": ({"key_ranges": RIGHT[0]}, r"key_ranges must have shape \(1 or batch, 1 or heads"),
    "last": ({"key_ranges": RIGHT[..., :2]}, r"\(begin, end, position, prefix\); got shape"),
    "batch": ({"key_ranges": RIGHT.expand(3, 1, 8, 4)}, r"\(1 or 2, 1 or 4, 8, 4\): batch, heads"),
    "heads": ({"key_ranges": RIGHT.expand(1, 2, 8, 4)}, r"got shape \(1, 2, 8, 4\)"),
    "rows": ({"key_ranges": RIGHT[:, :, :7]}, r"got shape \(1, 1, 7, 4\)"),
    "device": ({"key_ranges": RIGHT.to("meta")}, "key_ranges must be on query's device cpu; got m"),
    "diagonal": ({"key_ranges": RIGHT, "attn_mask": LOWER}, "diagonal must be 0 with key_ranges"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    arguments, message = REFUSED[name]
    q, k = torch.randn(2, 4, 8, 16), torch.randn(2, 4, 9, 16)
    with pytest.raises((ValueError, TypeError), match=message) as error:
        orchard_ops.flash_attn(q, k, k, **arguments)
    assert str(error.value).startswith("orchard::flash_attn: ")
    if name not in ("kind", "diagonal"):
        with pytest.raises((ValueError, TypeError), match=message):
            torch.ops.orchard.flash_attn(q, k, k, **arguments)
