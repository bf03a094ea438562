"""FlashAttention-2's names: bottom-right masks, (B, S, H, D), against a mathematics of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bottom_right import mathematics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import orchard_ops
from orchard_ops import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)

SUITE = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@st.composite
def problems(draw: st.DrawFn) -> dict:
    side = st.one_of(st.just(-1), st.integers(0, 25))
    return {
        "batch": draw(st.integers(1, 2)),
        "heads": draw(st.sampled_from(((2, 2), (4, 2), (3, 1)))),
        "lengths": (draw(st.integers(1, 20)), draw(st.integers(1, 20))),
        "widths": draw(st.sampled_from(((8, 8), (4, 12)))),
        "causal": draw(st.booleans()),
        "window_size": (draw(side), draw(side)),
        "softcap": draw(st.sampled_from((0.0, 1.5, -1.0))),
        "softmax_scale": draw(st.sampled_from((None, 0.7, -0.2))),
        "alibi": draw(st.sampled_from(("", "head", "batch"))),
        "seed": draw(st.integers(0, 2**31)),
    }


def operands(problem: dict) -> tuple[list[Tensor], dict]:
    """q, k, v as float64 leaves, and the options."""
    generator = torch.Generator().manual_seed(problem["seed"])
    (heads, kv_heads), (width, value_width) = problem["heads"], problem["widths"]
    q_len, kv_len = problem["lengths"]
    leaves = [
        torch.randn(
            problem["batch"], n, h, d, generator=generator, dtype=torch.float64, requires_grad=True
        )
        for n, h, d in (
            (q_len, heads, width),
            (kv_len, kv_heads, width),
            (kv_len, kv_heads, value_width),
        )
    ]
    slopes = torch.rand(problem["batch"], heads, generator=generator)
    return leaves, {
        "softmax_scale": problem["softmax_scale"],
        "causal": problem["causal"],
        "window_size": problem["window_size"],
        "softcap": problem["softcap"],
        "alibi_slopes": {"": None, "head": slopes[0], "batch": slopes}[problem["alibi"]],
    }


def check(found: tuple, leaves: list[Tensor], expected: tuple) -> None:
    """out, lse and the gradients of both."""
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    grads = [torch.randn_like(x) for x in expected]
    for x, y in zip(
        torch.autograd.grad(found, leaves, grads), torch.autograd.grad(expected, leaves, grads)
    ):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


@SUITE
@given(problem=problems())
def test_is_the_documented_mathematics(problem: dict):
    """Lengths that differ, windows, causal, softcap, ALiBi, grouped heads; all gradients."""
    leaves, options = operands(problem)
    out, lse, s_dmask = flash_attn_func(*leaves, **options, return_attn_probs=True)
    assert s_dmask.shape == (0,)
    check((out, lse), leaves, mathematics(*leaves, **options))
    assert torch.equal(flash_attn_func(*leaves, **options), out)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_dropout_keeps_the_mask_of_its_seed(device: str, causal: bool):
    """The weights that `dropout_mask` keeps for the seed that torch's generator gives."""
    q, k, v = (torch.randn(2, n, 2, 16, device=device) for n in (20, 33, 33))
    torch.manual_seed(7)
    out = flash_attn_func(q, k, v, dropout_p=0.25, causal=causal)
    torch.manual_seed(7)
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
    keep = orchard_ops.dropout_mask(seed, 0.25, (2, 2, 20, 33)) / 0.75
    expected, _ = mathematics(
        *(x.cpu().double() for x in (q, k, v)), causal=causal, keep=keep.double()
    )
    torch.testing.assert_close(out.cpu(), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_runs_on_metal(dtype: torch.dtype, fresh_stats: None):
    """Bottom-right causal with windows and grouped heads needs no fallback, nor a copy."""
    q, k, v = (
        torch.randn(2, n, h, 64, device="mps", dtype=dtype, requires_grad=True)
        for n, h in ((40, 4), (70, 2), (70, 2))
    )
    out = flash_attn_func(q, k, v, causal=True, window_size=(30, 5))
    assert out.is_contiguous()
    dout = torch.randn_like(out)
    found = (out, *torch.autograd.grad(out, (q, k, v), dout))
    assert orchard_ops.stats().fallbacks == 0
    leaves = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    expected, _ = mathematics(*leaves, causal=True, window_size=(30, 5))
    expected = (expected, *torch.autograd.grad(expected, leaves, dout.cpu().double()))
    for x, y in zip(found, expected):
        tolerance = 8 * torch.finfo(dtype).eps * y.abs().max().item()
        torch.testing.assert_close(x.cpu().double(), y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", ({}, {"causal": True, "window_size": (4, 0)}), ids=str)
def test_packed_operands(options: dict):
    """As the separate ones, bit for bit, and their gradient is one packed tensor."""
    qkv = torch.randn(2, 12, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(2, 17, 2, 2, 8, dtype=torch.float64, requires_grad=True)
    q = torch.randn(2, 12, 4, 8, dtype=torch.float64, requires_grad=True)
    packed = flash_attn_qkvpacked_func(qkv, **options, return_attn_probs=True)
    parts = [x.detach().clone().requires_grad_() for x in qkv.unbind(2)]
    apart = flash_attn_func(*parts, **options, return_attn_probs=True)
    grads = [torch.randn_like(x) for x in apart[:2]]
    for x, y in zip(packed, apart):
        assert torch.equal(x, y)
    (dqkv,) = torch.autograd.grad(packed[:2], qkv, grads)
    assert torch.equal(dqkv, torch.stack(torch.autograd.grad(apart[:2], parts, grads), 2))

    packed = flash_attn_kvpacked_func(q, kv, **options, return_attn_probs=True)
    parts = [q.detach().clone().requires_grad_()]
    parts += [x.detach().clone().requires_grad_() for x in kv.unbind(2)]
    apart = flash_attn_func(*parts, **options, return_attn_probs=True)
    grads = [torch.randn_like(x) for x in apart[:2]]
    for x, y in zip(packed, apart):
        assert torch.equal(x, y)
    dq, dkv = torch.autograd.grad(packed[:2], (q, kv), grads)
    expected = torch.autograd.grad(apart[:2], parts, grads)
    assert torch.equal(dq, expected[0])
    assert torch.equal(dkv, torch.stack(expected[1:], 2))


class Operands(TorchDispatchMode):
    """Where the functional op finds q, k and v."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.orchard.flash_attn_fwd.default:
            self.places = [x.untyped_storage().data_ptr() for x in args[:3]]
        return func(*args, **(kwargs or {}))


def test_operands_are_read_where_they_lie():
    qkv, kv = torch.randn(1, 9, 3, 2, 8), torch.randn(1, 9, 2, 2, 8)
    q, k, v = tensors(*[(1, 9, 2, 8)] * 3)
    for function, arguments, holders in (
        (flash_attn_func, (q, k, v), (q, k, v)),
        (flash_attn_qkvpacked_func, (qkv,), (qkv, qkv, qkv)),
        (flash_attn_kvpacked_func, (q, kv), (q, kv, kv)),
    ):
        with Operands() as seen:
            assert function(*arguments, causal=True).is_contiguous()
        assert seen.places == [x.untyped_storage().data_ptr() for x in holders]


@pytest.mark.parametrize("lengths", ((9, 9), (5, 12)), ids=str)
def test_compiles_whole(lengths: tuple[int, int]):
    q_len, kv_len = lengths
    q, k, v = (torch.randn(2, n, 2, 8) for n in (q_len, kv_len, kv_len))
    options = {"causal": True, "window_size": (3, 0), "alibi_slopes": torch.rand(2)}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, **options)

    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
    mapped = torch.vmap(attention)(*(x.unsqueeze(0) for x in (q, k, v)))
    torch.testing.assert_close(mapped[0], attention(q, k, v))


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


Q, KV = (1, 4, 2, 8), (1, 6, 2, 8)
REFUSED = {  # the operands' shapes, the options, what the error says
    "q_dim": (((4, 2, 8), KV, KV), {}, r"q must be \(batch, seqlen, heads, head_dim\)"),
    "batch": (((2, 4, 2, 8), KV, KV), {}, "same batch size; got 2, 1 and 1"),
    "head_dim": (((1, 4, 2, 4), KV, KV), {}, "q and k must have the same head_dim; got 4 and 8"),
    "no_head_dim": (((1, 4, 2, 0), (1, 6, 2, 0), KV), {}, "head_dim of q must be at least 1"),
    "lengths": ((Q, KV, (1, 5, 2, 8)), {}, "k and v must have the same length and heads"),
    "heads": (((1, 4, 3, 8), KV, KV), {}, "heads of q must be a multiple .* got 3 and 2"),
    "dropout": ((Q, KV, KV), {"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\]; got 1.5"),
    "scale": ((Q, KV, KV), {"softmax_scale": 1e39}, "softmax_scale must be finite"),
    "scale_kind": ((Q, KV, KV), {"softmax_scale": torch.ones(())}, "softmax_scale must be a num"),
    "softcap": ((Q, KV, KV), {"softcap": math.inf}, "softcap must be positive and finite"),
    "softcap_kind": ((Q, KV, KV), {"softcap": True}, "softcap must be a number; got a bool"),
    "causal": ((Q, KV, KV), {"causal": 1}, "causal must be True or False; got 1"),
    "probs": ((Q, KV, KV), {"return_attn_probs": None}, "return_attn_probs must be True or Fa"),
    "window": ((Q, KV, KV), {"window_size": 3}, "window_size must be two integers.* got 3"),
    "window_one": ((Q, KV, KV), {"window_size": (3,)}, "window_size must be two integers"),
    "window_kind": ((Q, KV, KV), {"window_size": (3, 0.0)}, "window_size must be two integers"),
    "slopes": ((Q, KV, KV), {"alibi_slopes": torch.ones(3)}, r"must have shape \(2,\) or \(1, 2"),
    "slopes_dtype": ((Q, KV, KV), {"alibi_slopes": torch.ones(2).half()}, "must be float32; got"),
    "slopes_device": (
        (Q, KV, KV),
        {"alibi_slopes": torch.ones(2, device="meta")},
        "must be on the device of q, cpu; got meta",
    ),
    "slopes_kind": ((Q, KV, KV), {"alibi_slopes": 0.5}, "alibi_slopes must be a tensor; got float"),
    "slopes_grad": (
        (Q, KV, KV),
        {"alibi_slopes": torch.ones(2, requires_grad=True)},
        "alibi_slopes have no gradient",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    shapes, options, message = REFUSED[name]
    errors = (ValueError, TypeError, NotImplementedError)
    with pytest.raises(errors, match=message) as error:
        flash_attn_func(*tensors(*shapes), **options)
    assert str(error.value).startswith("orchard_ops.flash_attn_func: ")


def test_refused_dtypes_and_devices():
    q, k, v = tensors(Q, KV, KV)
    for operands, message in (
        ((q, k.half(), v), "q, k and v must have the same dtype; got torch.float32, torch.float16"),
        ((q, k, v.to("meta")), "q, k and v must be on the same device; got cpu, cpu, meta"),
        ((q.long(), k, v), "q must be float16, bfloat16, float32 or float64; got torch.int64"),
        ((q.to_sparse(), k, v), "q must be a dense tensor"),
        ((None, k, v), "q must be a tensor; got NoneType"),
    ):
        with pytest.raises((ValueError, TypeError), match=message) as error:
            flash_attn_func(*operands)
        assert str(error.value).startswith("orchard_ops.flash_attn_func: ")


def test_refused_packed_operands():
    for function, operands, message in (
        (flash_attn_qkvpacked_func, tensors((1, 4, 2, 2, 8)), r"qkv must be .*, 3, heads, head_d"),
        (flash_attn_qkvpacked_func, tensors((4, 3, 2, 8)), "qkv must be"),
        (flash_attn_qkvpacked_func, [None], "qkv must be a tensor"),
        (flash_attn_qkvpacked_func, tensors((1, 4, 3, 2, 0)), "head_dim of q must be at least"),
        (flash_attn_kvpacked_func, tensors(Q, (1, 4, 3, 2, 8)), r"kv must be .*, 2, heads, head_"),
        (flash_attn_kvpacked_func, tensors(Q, (1, 4, 2, 3, 8)), "got 2 and 3"),
    ):
        with pytest.raises((ValueError, TypeError), match=message) as error:
            function(*operands)
        assert str(error.value).startswith(f"orchard_ops.{function.__name__}: ")


def test_keys_of_many_lengths_are_one_graph():
    """Causal masks and windows stand at the bottom right, wherever that is."""
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(flash_attn_func, backend=backend, fullgraph=True, dynamic=True)
    for length in (31, 40, 57, 6):
        q, k, v = (torch.randn(2, n, 4, 16) for n in (5, length, length))
        options: dict[str, Any] = {"causal": True, "window_size": (3, 0)}
        assert torch.equal(compiled(q, k, v, **options), flash_attn_func(q, k, v, **options))
    assert len(graphs) == 1
