"""Packed sequences: each is what it is alone, and one call reads them where they lie."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from bottom_right import mathematics
from conftest import SIMULATED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import orchard_ops
from orchard_ops import (
    KeyRanges,
    flash_attn_func,
    flash_attn_varlen,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

SUITE = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
if SIMULATED:
    import simulator

DEVICES = ("cpu", "mps")


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def spans(cu_seqlens: Tensor) -> list[slice]:
    return [slice(begin, end) for begin, end in itertools.pairwise(cu_seqlens.tolist())]


@st.composite
def problems(draw: st.DrawFn) -> dict:
    side = st.one_of(st.just(-1), st.integers(0, 12))
    length = st.one_of(st.just(0), st.integers(0, 14))
    return {
        "lengths": draw(st.lists(st.tuples(length, length), min_size=0, max_size=5)),
        "heads": draw(st.sampled_from(((2, 2), (4, 2), (3, 1)))),
        "widths": draw(st.sampled_from(((8, 8), (4, 12)))),
        "rest": draw(st.integers(0, 2)),  # tokens of no sequence
        "is_causal": draw(st.booleans()),
        "window": (draw(side), draw(side)),
        "softcap": draw(st.sampled_from((0.0, 1.5))),
        "scale": draw(st.sampled_from((None, 0.7))),
        "alibi": draw(st.sampled_from(("", "head", "sequence"))),
        "sinks": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def operands(problem: dict) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v as float64 leaves, and the cumulative lengths."""
    generator = torch.Generator().manual_seed(problem["seed"])
    of_query, of_key = (cumulative([pair[n] for pair in problem["lengths"]]) for n in (0, 1))
    (heads, kv_heads), (width, value_width) = problem["heads"], problem["widths"]
    total_q, total_k = (int(x[-1]) + problem["rest"] for x in (of_query, of_key))
    leaves = [
        torch.randn(n, h, d, generator=generator, dtype=torch.float64, requires_grad=True)
        for n, h, d in (
            (total_q, heads, width),
            (total_k, kv_heads, width),
            (total_k, kv_heads, value_width),
        )
    ]
    return leaves, of_query, of_key


def slopes_of(problem: dict) -> Tensor | None:
    """(Hq), or (sequences, Hq)."""
    if not problem["alibi"]:
        return None
    heads = (problem["heads"][0],)
    return torch.rand(
        (len(problem["lengths"]), *heads) if problem["alibi"] == "sequence" else heads
    )


def compare(found: tuple, expected: tuple, leaves: list[Tensor], rtol: float = 1e-9) -> None:
    """out, lse and all gradients."""
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol)
    grads = [torch.randn_like(x) for x in expected]
    zero = 0.0 * sum(x.sum() for x in leaves)  # without sequences nothing has a gradient
    expected = tuple(x + zero for x in expected)
    options = {"allow_unused": True, "materialize_grads": True}
    for x, y in zip(
        torch.autograd.grad(found, leaves, grads, **options),
        torch.autograd.grad(expected, leaves, grads, **options),
    ):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol)


@SUITE
@given(problem=problems())
def test_each_sequence_is_what_it_is_alone(problem: dict):
    """Different lengths, empty ones, windows, causal from the bottom right, every score."""
    leaves, of_query, of_key = operands(problem)
    q, k, v = leaves
    heads, (left, right) = problem["heads"][0], problem["window"]
    slopes = slopes_of(problem)
    sinks = None
    if problem["sinks"]:
        sinks = torch.randn(heads, dtype=torch.float64, requires_grad=True)
        leaves.append(sinks)
    scores = {"softcap": problem["softcap"], "alibi_slopes": slopes, "sinks": sinks}
    scores |= {"scale": problem["scale"], "return_lse": True}
    windows = {"window_left": left, "window_right": right, "is_causal": problem["is_causal"]}
    found = flash_attn_varlen(q, k, v, of_query, of_key, **windows, **scores)

    out = q.new_zeros(q.shape[0], heads, v.shape[2])
    lse = q.new_full((heads, q.shape[0]), -math.inf)
    if sinks is not None:  # a query of no sequence sees its sink
        lse = sinks.unsqueeze(1).expand(heads, q.shape[0]).clone()
    for n, (rows, cols) in enumerate(zip(spans(of_query), spans(of_key))):
        q_len, kv_len = rows.stop - rows.start, cols.stop - cols.start
        alone = (x.transpose(0, 1).unsqueeze(0) for x in (q[rows], k[cols], v[cols]))
        # The positions of the bottom right, in a mask and a bias: another way to the same.
        ahead = torch.arange(kv_len) - torch.arange(q_len).unsqueeze(1) - (kv_len - q_len)
        hidden = torch.zeros(q_len, kv_len, dtype=torch.bool)
        hidden |= (ahead < -left) if left >= 0 else False
        hidden |= (
            (ahead > (0 if problem["is_causal"] else right))
            if (right >= 0 or problem["is_causal"])
            else False
        )
        bias = torch.zeros(heads, q_len, kv_len, dtype=torch.float64)
        if slopes is not None:
            own = slopes[n] if slopes.dim() == 2 else slopes
            bias = -own.double().view(-1, 1, 1) * ahead.abs()
        one = scores | {"alibi_slopes": None}
        o, s = orchard_ops.flash_attn(
            *alone, bias.masked_fill(hidden, -math.inf), enable_gqa=True, **one
        )
        out = out.slice_scatter(o[0].transpose(0, 1), 0, rows.start, rows.stop)
        lse = lse.slice_scatter(s[0], 1, rows.start, rows.stop)
    compare(found, (out, lse), leaves)


@SUITE
@given(problem=problems(), open_side=st.booleans())
def test_flash_attention_names(problem: dict, open_side: bool):
    """The three varlen functions against the mathematics of FlashAttention-2's documentation."""
    leaves, of_query, of_key = operands(problem)
    q, k, v = leaves
    lengths = problem["lengths"]
    longest = [max([0, *(pair[n] for pair in lengths)]) for n in (0, 1)]
    window = (longest[1] + 1, longest[1]) if open_side else problem["window"]
    options = {
        "softmax_scale": problem["scale"],
        "causal": problem["is_causal"],
        "softcap": problem["softcap"],
        "alibi_slopes": slopes_of(problem),
    }
    out, lse, s_dmask = flash_attn_varlen_func(
        q, k, v, of_query, of_key, *longest,
        window_size=window, return_attn_probs=True, **options,
    )  # fmt: skip
    assert s_dmask.shape == (0,)
    expected_out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    expected_lse = q.new_full((q.shape[1], q.shape[0]), -math.inf)
    # A side of at least the longest sequence is open, whatever a shorter one's length is.
    sides = tuple(-1 if side >= longest[1] else side for side in window)
    slopes = options["alibi_slopes"]
    for n, (rows, cols) in enumerate(zip(spans(of_query), spans(of_key))):
        if rows.start == rows.stop:
            continue
        own = slopes[n] if problem["alibi"] == "sequence" else slopes
        one = mathematics(
            *(x.unsqueeze(0) for x in (q[rows], k[cols], v[cols])),
            **options | {"alibi_slopes": own}, window_size=sides, longest_key=longest[1],
        )  # fmt: skip
        expected_out = expected_out.slice_scatter(one[0][0], 0, rows.start, rows.stop)
        expected_lse = expected_lse.slice_scatter(one[1][0], 1, rows.start, rows.stop)
    compare((out, lse), (expected_out, expected_lse), leaves)
    options["window_size"] = window
    if problem["widths"][0] == problem["widths"][1]:
        kv = torch.stack((k, v), 1)
        found = flash_attn_varlen_kvpacked_func(q, kv, of_query, of_key, *longest, **options)
        assert torch.equal(found, out)


@pytest.mark.parametrize("options", ({}, {"causal": True, "window_size": (4, 0)}), ids=str)
def test_packed_operands(options: dict):
    """As the separate ones, bit for bit, and their gradient is one packed tensor."""
    qkv = torch.randn(17, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    cu_seqlens = cumulative([5, 0, 9, 3])
    parts = [x.detach().clone().requires_grad_() for x in qkv.unbind(1)]
    ends = (cu_seqlens, cu_seqlens, 9, 9)
    apart = flash_attn_varlen_func(*parts, *ends, **options, return_attn_probs=True)
    packed = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 9, **options, return_attn_probs=True)
    assert apart[0].is_contiguous()
    for x, y in zip(packed, apart):
        assert torch.equal(x, y)
    grads = [torch.randn_like(x) for x in apart[:2]]
    (found,) = torch.autograd.grad(packed[:2], qkv, grads)
    assert torch.equal(found, torch.stack(torch.autograd.grad(apart[:2], parts, grads), 1))
    kv = qkv.detach()[:, 1:]
    found = flash_attn_varlen_kvpacked_func(parts[0], kv, *ends, **options)
    assert torch.equal(found, apart[0])


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_a_sequence_does_not_depend_on_its_neighbours(device: str, dtype: torch.dtype):
    """Bitwise: out, lse and gradients of one sequence, whatever stands in the others."""
    cu_seqlens = cumulative([21, 40, 13])
    middle, others = slice(21, 61), [slice(0, 21), slice(61, 74)]
    tensors = [torch.randn(74, 2, 16).to(dtype) for _ in range(4)]

    def results(tensors: list[Tensor]) -> list[Tensor]:
        q, k, v, dout = (x.to(device, copy=True) for x in tensors)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = flash_attn_varlen(
            *leaves, cu_seqlens.to(device), is_causal=True, softcap=3.0, return_lse=True
        )
        grads = torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse)))
        return [x.cpu()[middle] for x in (out, lse.T, *grads)]

    expected = results(tensors)
    for rows in others:
        for x in tensors:
            x[rows] = 100 * torch.randn_like(x[rows])
    for x, y in zip(results(tensors), expected):
        assert torch.equal(x, y)


@pytest.mark.parametrize("slopes", (torch.rand(4), torch.rand(4, 4)), ids=("heads", "sequences"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_runs_on_metal(dtype: torch.dtype, slopes: Tensor, fresh_stats: None, recording):
    """Ragged and empty sequences, and tokens of none: one launch of each kernel, without a wait."""
    of_query = cumulative([21, 0, 40, 13])
    of_key = cumulative([30, 7, 40, 0])
    q, k, v = (torch.randn(n, h, 64).to(dtype) for n, h in ((77, 4), (80, 2), (80, 2)))
    dout, dlse = torch.randn(77, 4, 64).to(dtype), torch.randn(4, 77)
    sinks = torch.randn(4)

    def results(device: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        leaves.append(sinks.to(device, torch.promote_types(dtype, torch.float32)).requires_grad_())
        lengths = [x.to(device) for x in (of_query, of_key)]
        moved = slopes.to(device)
        upstream = (dout.to(device, dtype), dlse.to(device, leaves[3].dtype))
        waits = simulator.waits().total if device == "mps" and SIMULATED else 0
        out, lse = flash_attn_varlen(
            *leaves[:3], *lengths, is_causal=True, window_left=25, softcap=4.0,
            alibi_slopes=moved, sinks=leaves[3], return_lse=True,
        )  # fmt: skip
        grads = torch.autograd.grad((out, lse), leaves, upstream)
        if device == "mps" and SIMULATED:
            assert simulator.waits().total == waits
        return [x.detach().cpu().double() for x in (out, lse, *grads)]

    with recording() as launches:
        found = results("mps", dtype)
    assert orchard_ops.stats().metal == {"flash_attn_fwd": 1, "flash_attn_bwd": 1}
    if launches is not None:
        families = [launch.kernel.partition(f"_{str(dtype)[6:]}")[0] for launch in launches]
        for family in ("forward", "backward_delta", "backward_dkv"):
            assert families.count(f"attention_{family}") == 1
        assert sum(name.startswith("attention_backward_dq") for name in families) == 1
    unit = torch.finfo(dtype).eps
    for x, y in zip(found, results("cpu", torch.float64), strict=True):
        torch.testing.assert_close(x, y, rtol=8 * unit, atol=8 * unit * y[y.isfinite()].abs().max())


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_counts_in_the_packed_tensors(device: str):
    """One mask over all queries and keys, that of a single batch of (H, total_q, total_k)."""
    of_query, of_key = cumulative([7, 0, 12]), cumulative([9, 4, 11])
    q, k, v = (torch.randn(n, 2, 16, device=device) for n in (19, 24, 24))
    torch.manual_seed(5)
    found = flash_attn_varlen(
        q, k, v, of_query.to(device), of_key.to(device), dropout_p=0.3, is_causal=True
    )
    seen = KeyRanges.from_cu_seqlens(of_query, of_key, q_len=19).dense(24, window_right=0)
    torch.manual_seed(5)
    expected = orchard_ops.flash_attn(
        *(x.cpu().transpose(0, 1).unsqueeze(0) for x in (q, k, v)), seen, dropout_p=0.3
    )
    torch.testing.assert_close(found.cpu(), expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


class Operands(TorchDispatchMode):
    """The functional op's calls: where they find q, k and v."""

    def __enter__(self) -> Operands:
        self.places: list[list[int]] = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.orchard.flash_attn_fwd.default:
            self.places.append([x.untyped_storage().data_ptr() for x in args[:3]])
        return func(*args, **(kwargs or {}))


def test_one_call_reads_operands_where_they_lie():
    cu_seqlens = cumulative([5, 0, 9, 3])
    qkv, kv, q, k, v = (torch.randn(17, *shape) for shape in ((3, 2, 8), (2, 2, 8), *[(2, 8)] * 3))
    for function, arguments, holders in (
        (flash_attn_varlen, (q, k, v, cu_seqlens), (q, k, v)),
        (flash_attn_varlen_func, (q, k, v, cu_seqlens, cu_seqlens, 9, 9), (q, k, v)),
        (flash_attn_varlen_qkvpacked_func, (qkv, cu_seqlens, 9), (qkv, qkv, qkv)),
        (flash_attn_varlen_kvpacked_func, (q, kv, *[cu_seqlens] * 2, 9, 9), (q, kv, kv)),
    ):
        with Operands() as seen:
            assert function(*arguments).is_contiguous()
        assert seen.places == [[x.untyped_storage().data_ptr() for x in holders]]


def test_waits_for_nothing():
    """Fake tensors have no numbers to look at."""
    with FakeTensorMode():
        q, k, v = (torch.empty(n, 2, 8, requires_grad=True) for n in (17, 20, 20))
        of_query = torch.empty(4, dtype=torch.int32)
        of_key = torch.empty(4, dtype=torch.int64)
        out, lse = flash_attn_varlen(q, k, v, of_query, of_key, is_causal=True, return_lse=True)
        assert (out.shape, lse.shape) == ((17, 2, 8), (2, 17))
        assert torch.autograd.grad(out.sum(), k)[0].shape == (20, 2, 8)


@pytest.mark.parametrize("function", ("ours", "theirs"))
def test_compiles_whole(function: str):
    torch._dynamo.reset()

    def attention(q: Tensor, cu_seqlens: Tensor) -> Tensor:
        if function == "ours":
            return flash_attn_varlen(q, q, q, cu_seqlens, is_causal=True, window_left=3)
        ends = (cu_seqlens, cu_seqlens, 9, 9)
        return flash_attn_varlen_func(q, q, q, *ends, causal=True, window_size=(3, 0))

    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for lengths in ([5, 9, 3], [1, 0, 4, 7], [20]):
        q = torch.randn(sum(lengths), 2, 8)
        cu_seqlens = cumulative(lengths)
        torch.testing.assert_close(compiled(q, cu_seqlens), attention(q, cu_seqlens))


def test_one_sequence_is_the_dense_function():
    q, k, v = (torch.randn(1, n, 2, 8) for n in (9, 14, 14))
    of_query, of_key = cumulative([9]), cumulative([14])
    slopes = torch.rand(1, 2)
    options = {"causal": True, "alibi_slopes": slopes, "window_size": (5, -1)}
    found = flash_attn_varlen_func(q[0], k[0], v[0], of_query, of_key, 9, 14, **options)
    torch.testing.assert_close(found, flash_attn_func(q, k, v, **options)[0])


# ---- what is refused ----------------------------------------------------------------------------


X = torch.randn(7, 2, 8)
CU = torch.tensor([0, 3, 7])
OURS = {
    "dimensions": ((X[None], X, X, CU), {}, r"query must be \(total, heads, head_dim\); got shap"),
    "dtypes": ((X, X.half(), X, CU), {}, "query, key and value must have the same dtype; got torc"),
    "heads": ((torch.randn(7, 3, 8), X, X, CU), {}, "heads of query must be a multiple of"),
    "lengths": ((X, X, X[:6], CU), {}, "key and value must have the same length and heads"),
    "cu_kind": ((X, X, X, [0, 7]), {}, "cu_seqlens_q must be a tensor of integers; got a list"),
    "cu_dtype": ((X, X, X, CU.float()), {}, "cu_seqlens_q must be a tensor of integers; got torch"),
    "cu_length": ((X, X, X, CU, CU[:2]), {}, "the same length, sequences . 1; got 3 and 2"),
    "cu_device": ((X, X, X, CU.to("meta")), {}, "must be on the device of the operands, cpu; got"),
    "option": ((X, X, X, CU), {"window_left": -2}, "window_left must be -1 .open. or at least 0"),
    "dropout": ((X, X, X, CU), {"dropout_p": 2.0}, r"dropout_p must be in \[0, 1\]; got 2.0"),
    "slopes": ((X, X, X, CU), {"alibi_slopes": torch.ones(3)}, "alibi_slopes must have shape"),
}  # fmt: skip
THEIRS = {
    "slopes": ({"alibi_slopes": torch.ones(3, 2)}, r"must have shape \(2,\) or \(2, 2\)"),
    "slopes_shape": ({"alibi_slopes": torch.ones(3)}, r"must have shape \(2,\) or \(2, 2\)"),
    "pages": ({"block_table": CU}, r"k must be \(pages, .* beside a block_table; got shape"),
    "used": ({"seqused_k": torch.ones(3).int()}, r"seqused_k must have shape \(2,\); got \(3,\)"),
    "padding": ({"leftpad_k": CU.float()}, "leftpad_k must be int32 or int64; got torch.float32"),
    "window": ({"window_size": 3}, "window_size must be two integers"),
    "longest": ({"max_seqlen_k": 7.0}, "longest sequence must be an integer; got 7.0"),
    "cu": ({"cu_seqlens_k": CU[:2]}, "must have the same length, sequences . 1; got 3 and 2"),
}


@pytest.mark.parametrize("name", OURS)
def test_refused(name: str):
    arguments, options, message = OURS[name]
    with pytest.raises((ValueError, TypeError), match=message) as error:
        flash_attn_varlen(*arguments, **options)
    assert str(error.value).startswith("orchard_ops.flash_attn_varlen: ")


@pytest.mark.parametrize("name", THEIRS)
def test_flash_attention_names_refuse(name: str):
    options, message = THEIRS[name]
    arguments = {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 4, "max_seqlen_k": 4}
    errors = (ValueError, TypeError, NotImplementedError)
    with pytest.raises(errors, match=message) as error:
        flash_attn_varlen_func(X, X, X, **(arguments | options))
    assert str(error.value).startswith("orchard_ops.flash_attn_varlen_func: ")
