"""Malformed calls raise at once and say the op, what was wrong and what came; edge cases do not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case

import orchard_ops

OP = "orchard::flash_attn"


def randn(*shape: int, **options: object) -> torch.Tensor:
    return torch.randn(*shape, **options)


q, k, v = randn(2, 4, 8, 16), randn(2, 2, 9, 16), randn(2, 2, 9, 16)

MALFORMED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "rank 2": (
        lambda: orchard_ops.flash_attn(randn(8, 16), randn(8, 16), randn(8, 16)),
        ValueError,
        f"{OP}: query must have 3 or more dimensions, (..., heads, length, head_dim); "
        "got shape (8, 16)",
    ),
    "different ranks": (
        lambda: orchard_ops.flash_attn(q, k[0], v[0]),
        ValueError,
        f"{OP}: query, key and value must have the same number of dimensions; got 4, 3 and 3",
    ),
    "batch size": (
        lambda: orchard_ops.flash_attn(q, randn(3, 2, 9, 16), v),
        ValueError,
        f"{OP}: query, key and value must have the same batch dimensions; got (2,), (3,) and (2,)",
    ),
    "head_dim of key": (
        lambda: orchard_ops.flash_attn(q, randn(2, 2, 9, 24), v),
        ValueError,
        f"{OP}: key must have query's head_dim 16; got 24",
    ),
    "length of value": (
        lambda: orchard_ops.flash_attn(q, k, randn(2, 2, 10, 16)),
        ValueError,
        f"{OP}: value must have key's length 9; got 10",
    ),
    "heads of value": (
        lambda: orchard_ops.flash_attn(q, k, randn(2, 4, 9, 16)),
        ValueError,
        f"{OP}: value must have key's 2 heads; got 4",
    ),
    "heads do not divide": (
        lambda: orchard_ops.flash_attn(q, randn(2, 3, 9, 16), randn(2, 3, 9, 16)),
        ValueError,
        f"{OP}: the number of query heads must be a multiple of the number of key/value heads; "
        "got 4 and 3",
    ),
    "no key heads": (
        lambda: orchard_ops.flash_attn(q, randn(2, 0, 9, 16), randn(2, 0, 9, 16)),
        ValueError,
        f"{OP}: the number of query heads must be a multiple of the number of key/value heads; "
        "got 4 and 0",
    ),
    "head_dim 0": (
        lambda: orchard_ops.flash_attn(randn(2, 2, 8, 0), randn(2, 2, 9, 0), v),
        ValueError,
        f"{OP}: head_dim must be at least 1; got 0 for query and key and 16 for value",
    ),
    "mixed dtypes": (
        lambda: orchard_ops.flash_attn(q, k.half(), v),
        TypeError,
        f"{OP}: query, key and value must have the same dtype; "
        "got torch.float32, torch.float16 and torch.float32",
    ),
    "mixed devices": (
        lambda: orchard_ops.flash_attn(q, k.to("mps"), v),
        ValueError,
        f"{OP}: query, key and value must be on the same device; got cpu, mps:0 and cpu",
    ),
    "integers": (
        lambda: orchard_ops.flash_attn(q.int(), k.int(), v.int()),
        TypeError,
        f"{OP}: query must be float16, bfloat16, float32 or float64; got torch.int32",
    ),
    "not a tensor": (
        lambda: orchard_ops.flash_attn(q, [1.0], v),
        TypeError,
        f"{OP}: key must be a tensor; got list",
    ),
    "dropout_p 1": (
        lambda: orchard_ops.flash_attn(q, k, v, dropout_p=1.0),
        ValueError,
        f"{OP}: dropout_p must be in [0, 1); got 1.0",
    ),
    "dropout_p negative": (
        lambda: orchard_ops.flash_attn(q, k, v, dropout_p=-0.1),
        ValueError,
        f"{OP}: dropout_p must be in [0, 1); got -0.1",
    ),
    "dropout_p nan": (
        lambda: orchard_ops.flash_attn(q, k, v, dropout_p=math.nan),
        ValueError,
        f"{OP}: dropout_p must be in [0, 1); got nan",
    ),
    "softcap negative": (
        lambda: orchard_ops.flash_attn(q, k, v, softcap=-1.0),
        ValueError,
        f"{OP}: softcap must be 0 (none) or positive and finite; got -1.0",
    ),
    "softcap nan": (
        lambda: orchard_ops.flash_attn(q, k, v, softcap=math.nan),
        ValueError,
        f"{OP}: softcap must be 0 (none) or positive and finite; got nan",
    ),
    "window under is_causal": (
        lambda: orchard_ops.flash_attn(q, k, v, is_causal=True, window_right=-5),
        ValueError,
        f"{OP}: window_right must be -1 (open) or at least 0; got -5",
    ),
    "diagonal": (
        lambda: torch.ops.orchard.flash_attn_fwd(
            q, k, v, None, None, None, None, 0.0, 1.0, -1, 0, -(2**63), 0.0
        ),
        ValueError,
        f"orchard::flash_attn_fwd: diagonal must be within +-2^40; got {-(2**63)}",
    ),
    "window": (
        lambda: orchard_ops.flash_attn(q, k, v, window_left=-2),
        ValueError,
        f"{OP}: window_left must be -1 (open) or at least 0; got -2",
    ),
    "mask shape": (
        lambda: orchard_ops.flash_attn(q, k, v, torch.ones(8, 10, dtype=torch.bool)),
        ValueError,
        f"{OP}: attn_mask must broadcast to (2, 4, 8, 9); got shape (1, 1, 8, 10)",
    ),
    "mask rank": (
        lambda: orchard_ops.flash_attn(q, k, v, torch.ones(1, 1, 1, 8, 9, dtype=torch.bool)),
        ValueError,
        f"{OP}: attn_mask must have at most 4 dimensions for this query; got shape (1, 1, 1, 8, 9)",
    ),
    "mask dtype": (
        lambda: orchard_ops.flash_attn(q, k, v, torch.ones(8, 9, dtype=torch.int32)),
        TypeError,
        f"{OP}: attn_mask must be bool, float32 or query's torch.float32; got torch.int32",
    ),
    "mask device": (
        lambda: orchard_ops.flash_attn(q, k, v, torch.ones(8, 9, device="mps")),
        ValueError,
        f"{OP}: attn_mask must be on query's device cpu; got mps:0",
    ),
    "slopes shape": (
        lambda: orchard_ops.flash_attn(q, k, v, alibi_slopes=torch.ones(3)),
        ValueError,
        f"{OP}: alibi_slopes must have shape (4,) or (2, 4); got (3,)",
    ),
    "sinks shape": (
        lambda: orchard_ops.flash_attn(q, k, v, sinks=torch.ones(2)),
        ValueError,
        f"{OP}: sinks must have shape (4,); got (2,)",
    ),
    "sinks dtype": (
        lambda: orchard_ops.flash_attn(q, k, v, sinks=torch.ones(4, dtype=torch.int64)),
        TypeError,
        f"{OP}: sinks must be a floating point tensor; got torch.int64",
    ),
    "impl": (
        lambda: orchard_ops.flash_attn(q, k, v, impl="cuda"),
        ValueError,
        f"{OP}: impl must be one of auto, metal, reference; got 'cuda'",
    ),
    "metal on the cpu": (
        lambda: orchard_ops.flash_attn(q, k, v, impl="metal"),
        RuntimeError,
        "orchard::flash_attn_fwd: the Metal kernels cannot run this call: "
        "the tensors are on cpu, not on mps",
    ),
    "functional op without seed": (
        lambda: torch.ops.orchard.flash_attn_fwd(
            q, k, v, None, None, None, None, 0.5, 1.0, -1, -1, 0, 0.0
        ),
        ValueError,
        "orchard::flash_attn_fwd: dropout_p is 0.5 but dropout_seed is None",
    ),
    "functional op with 3-D": (
        lambda: torch.ops.orchard.flash_attn_fwd(
            q[0], k[0], v[0], None, None, None, None, 0.0, 1.0, -1, -1, 0, 0.0
        ),
        ValueError,
        "orchard::flash_attn_fwd: query must be (batch, heads, length, head_dim); "
        "got shape (4, 8, 16)",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_message(name: str):
    call, exception, message = MALFORMED[name]
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize("name", ["rank 2", "batch size", "heads do not divide", "mixed dtypes"])
def test_the_op_raises_as_the_function_does(name: str, monkeypatch: pytest.MonkeyPatch):
    call, exception, message = MALFORMED[name]
    monkeypatch.setattr(orchard_ops, "flash_attn", torch.ops.orchard.flash_attn)
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        call()


def test_wrong_gradient_shapes_are_refused():
    out, lse = torch.ops.orchard.flash_attn_fwd(
        q, k, v, None, None, None, None, 0.0, 1.0, -1, -1, 0, 0.0
    )
    with pytest.raises(
        ValueError,
        match=re.escape(
            "orchard::flash_attn_bwd: dout must have shape (2, 4, 8, 16); got (2, 4, 7, 16)"
        ),
    ):
        torch.ops.orchard.flash_attn_bwd(
            out[:, :, 1:], None, q, k, v, out, lse,
            None, None, None, None, 0.0, 1.0, -1, -1, 0, 0.0, False,
        )  # fmt: skip


NATIVE = {
    "batch": (
        (q, randn(3, 2, 9, 16), randn(3, 2, 9, 16)),
        "key must have query's batch size 2; got 3",
    ),
    "head_dim": ((q, randn(2, 2, 9, 8), v), "key must have query's head_dim 16; got 8"),
    "heads": (
        (q, randn(2, 3, 9, 16), randn(2, 3, 9, 16)),
        "the number of query heads must be a multiple of the number of key/value heads; "
        "got 4 and 3",
    ),
    "length": (
        (q, k, randn(2, 2, 7, 16)),
        "value must have key's length 9; got 7",
    ),
}


@pytest.mark.parametrize("name", NATIVE)
def test_direct_calls_of_the_mps_kernel_are_guarded(name: str):
    """The functional op called by hand must not read out of bounds on the GPU."""
    operands, message = NATIVE[name]
    with torch.inference_mode(), pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.orchard.flash_attn_fwd(
            *(x.to("mps") for x in operands), None, None, None, None, 0.0, 1.0, -1, -1, 0, 0.0
        )


PLAIN = (None, None, None, None, 0.0, 1.0, -1, -1, 0, 0.0)
MPS_FUNCTIONAL = {
    "impl": (PLAIN, "nonsense", "impl must be one of auto, metal, reference; got 'nonsense'"),
    "window": (
        (*PLAIN[:6], -5, *PLAIN[7:]),
        "auto",
        "window_left must be -1 (open) or at least 0; got -5",
    ),
    "softcap": ((*PLAIN[:9], -1.0), "auto", "softcap must be 0 (none) or positive and finite"),
    "diagonal": ((*PLAIN[:8], -(2**63), 0.0), "auto", "diagonal must be within +-2^40"),
    "sinks": (
        (None, None, torch.ones(8), *PLAIN[3:]),
        "auto",
        "sinks must have shape (4,); got (8,)",
    ),
    "mask": (
        (torch.ones(1, 1, 40, 60), *PLAIN[1:]),
        "auto",
        "attn_mask must broadcast to (2, 4, 8, 9); got shape (1, 1, 40, 60)",
    ),
    "mask on the cpu": (
        (torch.ones(1, 1, 8, 9), *PLAIN[1:]),
        "cpu mask",
        "attn_mask must be on query's device mps:0; got cpu",
    ),
}


@pytest.mark.parametrize("name", MPS_FUNCTIONAL)
def test_functional_ops_on_mps_check_every_argument(name: str, quiet_fallback: None):
    scoring, impl, message = MPS_FUNCTIONAL[name]
    if impl == "cpu mask":
        impl = "auto"
    else:
        scoring = [x.to("mps") if isinstance(x, torch.Tensor) else x for x in scoring]
    with torch.inference_mode(), pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.orchard.flash_attn_fwd(*(x.to("mps") for x in (q, k, v)), *scoring, impl)


@pytest.mark.parametrize("index, name", [(1, "key"), (2, "value")])
def test_functional_op_with_an_operand_on_the_cpu(index: int, name: str):
    operands = [x if i == index else x.to("mps") for i, x in enumerate((q, k, v))]
    with torch.inference_mode(), pytest.raises(RuntimeError, match="must be on the same device"):
        torch.ops.orchard.flash_attn_fwd(*operands, *PLAIN)


def test_alibi_slopes_have_no_gradient():
    slopes = torch.ones(4, requires_grad=True)
    out = orchard_ops.flash_attn(q, k, v, alibi_slopes=slopes)
    with pytest.raises(NotImplementedError, match="alibi_slopes has no gradient; detach it"):
        out.sum().backward()


# ---- edge cases that are no errors --------------------------------------------------------------


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("p", (0.0, 0.3))
@pytest.mark.parametrize("batch, q_len, kv_len", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)])
def test_empty_tensors(batch: int, q_len: int, kv_len: int, p: float, device: str):
    """Empty or zero results with zero gradients, and nothing is launched."""
    import simulator

    tensors = [
        randn(batch, 2, n, 16, device=device).requires_grad_() for n in (q_len, kv_len, kv_len)
    ]
    simulator.clear_launches()
    out, lse = orchard_ops.flash_attn(*tensors, dropout_p=p, return_lse=True)
    assert out.shape == (batch, 2, q_len, 16) and not out.any()
    assert lse.shape == (batch, 2, q_len) and torch.isneginf(lse).all()
    out.sum().backward()
    for x in tensors:
        assert x.grad.shape == x.shape and not x.grad.any()
    assert not simulator.launches()


@pytest.mark.parametrize("impl", ("metal", "reference"))
@pytest.mark.parametrize("window", (2**31 - 1, 2**62, 2**63 - 1))
def test_huge_windows_are_open(window: int, impl: str):
    x = randn(1, 2, 40, 16, device="mps")
    for left, right in ((3, window), (window, 2), (window, window)):
        out = orchard_ops.flash_attn(x, x, x, window_left=left, window_right=right, impl=impl)
        limited = [w if w < 100 else -1 for w in (left, right)]
        expected = orchard_ops.flash_attn(x, x, x, window_left=limited[0], window_right=limited[1])
        torch.testing.assert_close(out, expected)


def test_a_sink_without_weight_and_a_row_without_keys():
    """sinks = -inf is no sink; such a row stays 0, and so do all gradients through it."""
    mask = torch.ones(8, 9, dtype=torch.bool)
    mask[3] = False
    sinks = torch.full((4,), -math.inf, requires_grad=True)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = orchard_ops.flash_attn(*inputs, mask, sinks=sinks)
    expected = F.scaled_dot_product_attention(*inputs, mask, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.sum(), (*inputs, sinks))
    for x, y in zip(grads, torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(x, y)
    assert not grads[3].any()


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_causal_and_mask_both_apply(device: str, request: pytest.FixtureRequest):
    if device == "mps":  # masks run on the reference there, so far
        request.getfixturevalue("quiet_fallback")
    x, mask = randn(1, 2, 12, 16), torch.rand(12, 12) > 0.3
    out = orchard_ops.flash_attn(*(3 * (x.to(device),)), attn_mask=mask.to(device), is_causal=True)
    both = mask & torch.ones(12, 12, dtype=torch.bool).tril()
    torch.testing.assert_close(out.cpu(), F.scaled_dot_product_attention(x, x, x, both))


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf), ids=str)
@pytest.mark.parametrize("where", ("query", "key", "value", "all_keys"))
@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_nan_and_inf_propagate_as_in_sdpa(device: str, where: str, value: float):
    query, key, val = (randn(1, 2, 40, 32) for _ in range(3))
    if where == "all_keys":
        key[:] = value
    else:
        {"query": query, "key": key, "value": val}[where][0, 1, 17, 5] = value
    expected = F.scaled_dot_product_attention(query, key, val)
    out = orchard_ops.flash_attn(*(x.to(device) for x in (query, key, val))).cpu()
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ("query", "key", "value", "dout"))
@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_nan_reaches_the_gradients_that_sdpa_gives_it_to(device: str, where: str):
    names = ("query", "key", "value", "dout")
    tensors = {name: randn(1, 2, 40, 32) for name in names}
    tensors[where][0, 1, 17, 5] = math.nan
    results = []
    for attention, on in (
        (F.scaled_dot_product_attention, "cpu"),
        (torch.ops.orchard.flash_attn, device),
    ):
        *operands, dout = (tensors[name].to(on) for name in names)
        operands = [x.requires_grad_() for x in operands]
        results.append(torch.autograd.grad(attention(*operands), operands, dout))
    for expected, grad in zip(*results):
        torch.testing.assert_close(grad.cpu(), expected, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_nan_behind_the_window_stays_there():
    """Metal skips blocks that nobody sees, so NaN in them reaches only the rows that see it."""
    x = randn(1, 1, 200, 32)
    key = x.clone()
    key[:, :, 128:] = math.nan
    out = orchard_ops.flash_attn(*(t.to("mps") for t in (x, key, key)), is_causal=True)
    assert torch.isfinite(out[:, :, :96]).all()
    assert torch.isnan(out[:, :, 128:]).all()


def test_wide_heads_run_on_the_reference_with_the_reason(fresh_stats: None):
    case = Case(10, 12, 264)
    x, key, val, _ = (t.to("mps") for t in case.operands())
    reason = "head_dim is above 256"
    with pytest.warns(orchard_ops.OrchardFallbackWarning, match=re.escape(reason)):
        out = orchard_ops.flash_attn(x, key, val)
    torch.testing.assert_close(
        out.cpu(), F.scaled_dot_product_attention(x.cpu(), key.cpu(), val.cpu(), enable_gqa=True)
    )
    assert orchard_ops.stats().reference == {reason: {"flash_attn_fwd": 1}}
    assert orchard_ops.explain(x, key, val).reason == f"{reason} (got 264)"
