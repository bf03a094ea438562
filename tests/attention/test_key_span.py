"""dS of packed sequences in memory for a span of keys: five products in place of seven.

The span is the caller's word (max_seqlen, chunk sizes, windows). The kernels look at each block of
queries, so that a number that does not hold costs time and never the result.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch._dynamo.testing
from attention_cases import SEED, Case, run
from hypothesis import given, settings
from hypothesis import strategies as st
from representative import product
from torch import Tensor

from orchard_ops import KeyRanges, flash_attn, flash_attn_varlen, flash_attn_varlen_func
from orchard_ops.scoring import Scoring
from orchard_ops.testing import assert_attention_close, math_attention

if sys.platform != "linux":
    pytest.skip("launches are recorded on the simulated device", allow_module_level=True)

import simulator

FROM_DS, ANEW = "attention_backward_dq_from_ds", "attention_backward_dq"


def cumulative(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def products(launches: list) -> dict[str, int]:
    """Of the kernels that form dq, by family."""
    found = {}
    for launch in launches:
        family = launch.kernel.partition("_float")[0].partition("_bfloat")[0]
        if "backward_dq" in family:
            found[family] = found.get(family, 0) + launch.counters.mma
    return found


# Lengths, the longest that is stated, and the window. Blocks of queries end within sequences.
CASES: dict[str, tuple[tuple[int, ...], int, int, int]] = {
    "causal": ((150, 7, 0, 99, 64, 1, 130), 150, -1, 0),
    "both sides": ((70, 60, 0, 1, 66, 70, 70), 70, -1, -1),
    "a window": ((200, 31, 150), 200, 40, 3),
    "one is longer than stated": ((64, 230, 64, 50), 64, -1, 0),
    "all are longer than stated": ((230, 220), 8, -1, -1),
    "a rest": ((100, 90, 80), 100, -1, 0),
}


def results(
    name: str, dtype: torch.dtype, head_dim: int, **changes: object
) -> tuple[Case, Scoring, tuple[Tensor, ...]]:
    lengths, longest, left, right = CASES[name]
    rest = 33 if name == "a rest" else 0
    total = sum(lengths) + rest
    case = Case(
        total, total, head_dim, num_heads=4, num_kv_heads=2, dtype=dtype,
        window_left=left, window_right=right,
    ).but(**changes)  # fmt: skip
    ends = cumulative(*lengths)
    ranges = KeyRanges.from_cu_seqlens(ends, q_len=total, max_length=longest)
    span = ranges.key_span(left, right)
    assert 0 < span < total
    scoring = case.scoring()._replace(key_ranges=ranges.tensor, key_span=span)
    on_device = case.scoring("mps")._replace(key_ranges=ranges.tensor.to("mps"), key_span=span)
    return case, scoring, run(case, *(x.to("mps") for x in case.operands()), scoring=on_device)


KERNELS = ((torch.float16, 64), (torch.float32, 64), (torch.bfloat16, 128))


@pytest.mark.parametrize("name, kernel", product(tuple(CASES), KERNELS), ids=str)
@pytest.mark.usefixtures("checked")
def test_obeys_the_tolerance_rule(name: str, kernel: tuple[torch.dtype, int]):
    dtype, head_dim = kernel
    with simulator.recording() as launches:
        case, scoring, found = results(name, dtype, head_dim, dropout_p=0.1)
    done = products(launches)
    assert set(done) == {FROM_DS, ANEW}
    assert (done[FROM_DS] > 0, done[ANEW] > 0) == {
        "one is longer than stated": (True, True),
        "all are longer than stated": (False, True),
    }.get(name, (True, False))
    arguments = scoring._asdict() | {"dropout_seed": SEED}
    ref, eager = (
        math_attention(*case.operands(), dtype=d, **arguments) for d in (torch.float64, dtype)
    )
    assert_attention_close(found, ref, eager)


@pytest.mark.parametrize("name", ("causal", "both sides", "a window", "a rest"))
def test_a_span_that_holds_changes_no_bit(name: str):
    """As with dS of all keys in memory."""
    case, scoring, found = results(name, torch.float16, 64)
    whole = scoring._replace(key_span=0, key_ranges=scoring.key_ranges.to("mps"))
    with simulator.recording() as launches:
        expected = run(case, *(x.to("mps") for x in case.operands()), scoring=whole)
    assert set(products(launches)) == {FROM_DS}
    for x, y in zip(found, expected):
        assert torch.equal(x, y)


def test_the_gradient_of_a_mask_beside_a_known_span():
    """dS of a span has no place for all pairs, so that the mask's gradient is formed anew."""
    case = Case(300, 300, 64, dtype=torch.float32)
    ranges = KeyRanges.from_cu_seqlens(cumulative(60, 50, 70, 70, 50), q_len=300, max_length=70)
    mask = torch.randn(1, 1, 300, 300, generator=torch.Generator().manual_seed(2))
    *operands, dout = case.operands()
    found = []
    for known in (ranges.to("mps"), KeyRanges(ranges.tensor.to("mps"))):
        leaves = [x.to("mps").requires_grad_() for x in (*operands[:3], mask)]
        with simulator.recording() as launches:
            out = flash_attn(*leaves[:3], attn_mask=leaves[3], key_ranges=known)
            found.append(torch.autograd.grad(out, leaves, dout.to("mps")))
        families = " ".join(launch.kernel for launch in launches)
        assert ("dmask_from_ds" in families) == (known.key_span(-1, -1) == 0), families
    for x, y in zip(*found):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert found[0][3].abs().max() > 0.01


# ---- the public functions -----------------------------------------------------------------------


def gradients(
    tensors: list[Tensor], cu_seqlens: Tensor, max_seqlen: int | None, **options: object
) -> tuple[list[Tensor], set[str]]:
    """out, dq, dk, dv of flash_attn_varlen, and the kernels that form dq."""
    leaves = [x.to("mps").requires_grad_() for x in tensors[:3]]
    ends = cu_seqlens.to("mps")
    with simulator.recording() as launches:
        out = flash_attn_varlen(*leaves, ends, max_seqlen_q=max_seqlen, **options)
        found = [out, *torch.autograd.grad(out, leaves, tensors[3].to("mps"))]
    return [x.detach().cpu() for x in found], set(products(launches))


def test_a_sequence_does_not_depend_on_its_neighbours():
    """Bitwise, whatever stands in the others, and however long they are within the bound."""
    tensors = [torch.randn(400, 2, 64).half() for _ in range(4)]
    middle = slice(137, 210)  # begins and ends within blocks of queries

    def of_middle(*lengths: int) -> list[Tensor]:
        found, kernels = gradients(tensors, cumulative(*lengths), 130, is_causal=True)
        assert kernels == {FROM_DS, ANEW}
        return [x[middle] for x in found]

    expected = of_middle(130, 7, 73, 60, 130)
    for x in tensors:
        for rows in (slice(0, 137), slice(210, 400)):
            x[rows] = 100 * torch.randn_like(x[rows])
    for lengths in ((130, 7, 73, 60, 130), (7, 0, 130, 73, 130), (70, 67, 73, 1, 1, 1)):
        for x, y in zip(of_middle(*lengths), expected):
            assert torch.equal(x, y)


@pytest.mark.parametrize("max_seqlen", (0, -3, 1, 99, 1 << 40))
def test_a_wrong_bound_is_no_wrong_result(max_seqlen: int):
    tensors = [torch.randn(300, 2, 64) for _ in range(4)]
    ends = cumulative(100, 33, 150)  # and 17 tokens of no sequence
    expected, kernels = gradients(tensors, ends, None)
    assert kernels == {FROM_DS}
    found, _ = gradients(tensors, ends, max_seqlen)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert not found[0][283:].any()


def test_who_knows_a_span():
    """Lengths of queries and keys that are one tensor; chunks, windows and documents."""
    q = torch.randn(400, 2, 64, device="mps", requires_grad=True)
    ends = cumulative(100, 100, 100, 100).to("mps")

    def kernels(out: Tensor) -> set[str]:
        with simulator.recording() as launches:
            out.sum().backward()
        return set(products(launches))

    packed = (q, q, q)
    both = {FROM_DS, ANEW}
    assert kernels(flash_attn_varlen_func(*packed, ends, ends, 100, 100, causal=True)) == both
    assert kernels(flash_attn_varlen(*packed, ends, max_seqlen_k=100)) == both
    assert kernels(flash_attn_varlen(*packed, ends, ends.clone(), 100, 100)) == {FROM_DS}
    assert kernels(flash_attn_varlen(*packed, ends, window_left=50, is_causal=True)) == both
    assert kernels(flash_attn_varlen(*packed, ends, is_causal=True)) == {FROM_DS}
    dense = tuple(x.transpose(0, 1).unsqueeze(0) for x in packed)
    ids = torch.arange(400, device="mps") // 100
    for ranges, expected in (
        (KeyRanges.chunked(100, 400, device="mps"), both),
        (KeyRanges.sliding_window(70, 0, 400, device="mps"), both),
        (KeyRanges.sliding_window(70, 0, 400, prefix=3, device="mps"), {FROM_DS}),
        (KeyRanges.from_document_ids(ids, max_length=100), both),
        (KeyRanges.from_document_ids(ids), {FROM_DS}),
    ):
        assert kernels(flash_attn(*dense, key_ranges=ranges)) == expected
        if expected == both:  # a bare tensor says nothing
            assert kernels(flash_attn(*dense, key_ranges=ranges.tensor)) == {FROM_DS}


def test_equal_lengths_are_a_dense_batch():
    """The view that docs/packed-batches.md shows."""
    tensors = [torch.randn(4 * 75, 2, 64) for _ in range(4)]
    expected, _ = gradients(tensors, cumulative(75, 75, 75, 75), 75, is_causal=True)
    leaves = [x.to("mps").requires_grad_() for x in tensors[:3]]
    dense = (x.unflatten(0, (4, -1)).transpose(1, 2) for x in leaves)
    with simulator.recording() as launches:
        out = flash_attn(*dense, is_causal=True).transpose(1, 2).flatten(0, 1)
        found = [out, *torch.autograd.grad(out, leaves, tensors[3].to("mps"))]
    assert set(products(launches)) == {FROM_DS}
    for x, y in zip(found, expected):
        torch.testing.assert_close(x.detach().cpu(), y, rtol=1e-5, atol=1e-5)


# ---- KeyRanges.key_span -------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    left=st.integers(-1, 9),
    right=st.integers(-1, 9),
    chunk=st.integers(1, 9),
    kind=st.sampled_from(("cu_seqlens", "ids", "positions", "chunked", "window", "both")),
)
def test_the_span_holds(lengths: list[int], left: int, right: int, chunk: int, kind: str):
    total, longest = sum(lengths), max(lengths)
    ends = cumulative(*lengths)
    documents = KeyRanges.from_cu_seqlens(ends, q_len=total, max_length=longest)
    if kind in ("ids", "positions"):
        ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).long()
        places = torch.cat([torch.arange(n) for n in lengths])
        documents = (
            KeyRanges.from_document_ids(ids, max_length=longest)
            if kind == "ids"
            else KeyRanges.from_position_ids(places, max_length=longest)
        )
    ranges = {
        "chunked": KeyRanges.chunked(chunk, total),
        "window": KeyRanges.sliding_window(left, right, total),
        "both": documents & KeyRanges.chunked(chunk, total),
    }.get(kind, documents)
    span = ranges.key_span(left, right)
    assert (span == 0) == (kind == "window" and min(left, right) < 0)
    seen = ranges.dense(total, window_left=left, window_right=right)[0, 0]
    for row in range(total):
        keys = seen[row : row + 8].any(0).nonzero()
        if span and len(keys):
            assert keys[-1] - keys[0] < span
    assert ranges.to("cpu").key_span(left, right) == span


def test_unknown_spans():
    ends = cumulative(5, 4)
    of_keys = KeyRanges.from_cu_seqlens(ends, ends.clone(), q_len=9, max_length=5)
    assert of_keys.key_span(3, 3) == 0  # queries may stand anywhere
    assert KeyRanges(of_keys.tensor).key_span(3, 3) == 0
    assert KeyRanges.prefix_lm(torch.tensor([3]), 9).key_span() == 0
    assert KeyRanges.sliding_window(2, 2, 9, prefix=1).key_span(2, 2) == 0
    assert KeyRanges.sliding_window(2, 5, 9).key_span(-1, 1) == 5 + 1 + 8
    for wrong in (5.0, True, "5"):
        with pytest.raises(TypeError, match="max_length must be an integer or None"):
            KeyRanges.from_cu_seqlens(ends, q_len=9, max_length=wrong)
        with pytest.raises(TypeError, match="flash_attn_varlen: the longest sequence must be"):
            flash_attn_varlen(*[torch.zeros(9, 1, 8)] * 3, ends, max_seqlen_k=wrong)


FAR = 2**63 - 1


@pytest.mark.parametrize(
    "options",
    (
        {"max_seqlen_q": FAR},
        {"max_seqlen_k": torch.tensor(5)},  # a hint that would have to be waited for
        {"window_left": FAR, "is_causal": True},
        {"window_left": 2**62, "window_right": 2**62},
    ),
    ids=lambda options: " ".join(options),
)
def test_a_number_that_bounds_nothing_changes_nothing(options: dict):
    q, ends = torch.randn(9, 1, 8), cumulative(5, 4)
    plain = flash_attn_varlen(q, q, q, ends, is_causal="is_causal" in options)
    torch.testing.assert_close(flash_attn_varlen(q, q, q, ends, **options), plain)


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_a_bound_that_a_tensor_holds_compiles():
    @torch.compile(backend="eager", fullgraph=True)
    def attend(q: Tensor, ends: Tensor) -> Tensor:
        return flash_attn_varlen(q, q, q, ends, None, ends.diff().max().item(), is_causal=True)

    q, ends = torch.randn(9, 1, 8), cumulative(5, 4)
    torch.testing.assert_close(attend(q, ends), flash_attn_varlen(q, q, q, ends, is_causal=True))


def test_an_exported_program_takes_any_bound():
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, ends: Tensor, longest: int) -> Tensor:
            return flash_attn_varlen(q, q, q, ends, None, longest, is_causal=True)

    q, ends = torch.randn(9, 1, 8), cumulative(5, 4)
    shapes = {"q": None, "ends": None, "longest": torch.export.Dim.DYNAMIC}
    program = torch.export.export(Model(), (q, ends, 31), dynamic_shapes=shapes).module()
    for longest in (5, 31, 90, 1000):
        torch.testing.assert_close(program(q, ends, longest), Model()(q, ends, longest))


def test_a_compiled_call_serves_many_bounds():
    """Bounds are rounded up to powers of two, so that few are compiled."""
    compiled = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=compiled, fullgraph=True, dynamic=True)
    def attend(q: Tensor, ends: Tensor, longest: int) -> Tensor:
        return flash_attn_varlen(q, q, q, ends, None, longest, is_causal=True)

    for longest in (70, 90, 100, 77):
        q = torch.randn(2 * longest, 2, 8)
        ends = cumulative(longest, longest)
        expected = flash_attn_varlen(q, q, q, ends, is_causal=True)
        torch.testing.assert_close(attend(q, ends, longest), expected)
    assert compiled.frame_count == 1
    q = torch.randn(600, 2, 8)
    ends = cumulative(300, 300)
    expected = flash_attn_varlen(q, q, q, ends, is_causal=True)
    torch.testing.assert_close(attend(q, ends, 300), expected)
    assert compiled.frame_count == 2
