"""Malformed calls raise at once; the message says the op, what was wrong and what it got. Edge
cases do not raise."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case

import orchard_ops
from orchard_ops.scoring import Scoring

OP = "orchard::flash_attn"
PLAIN = Scoring()


def randn(*shape: int, **options: object) -> torch.Tensor:
    return torch.randn(*shape, **options)


q, k, v = randn(2, 4, 8, 16), randn(2, 2, 9, 16), randn(2, 2, 9, 16)


def grouped(*args: object, **kwargs: object) -> object:
    return orchard_ops.flash_attn(*args, enable_gqa=True, **kwargs)


def functional(*operands: torch.Tensor, **scoring: object) -> object:
    return torch.ops.orchard.flash_attn_fwd(*operands, *PLAIN._replace(**scoring))


HEADS = "the number of query heads must be a multiple of the number of key/value heads; got 4 and"
NESTED = (
    "must be a dense tensor; got a nested one: pad it with torch.nested.to_padded_tensor and hide "
    "the padding by a mask"
)

MALFORMED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "rank 1": (
        lambda: orchard_ops.flash_attn(randn(8), randn(8), randn(8)),
        ValueError,
        "query must have 2 or more dimensions, (..., heads, length, head_dim); got shape (8,)",
    ),
    "batch size": (
        lambda: grouped(q, randn(3, 2, 9, 16), v),
        ValueError,
        "the batch dimensions of query, key and value must broadcast; got (2,), (3,) and (2,)",
    ),
    "head_dim of key": (
        lambda: grouped(q, randn(2, 2, 9, 24), v),
        ValueError,
        "key must have query's head_dim 16; got 24",
    ),
    "length of value": (
        lambda: grouped(q, k, randn(2, 2, 10, 16)),
        ValueError,
        "value must have key's length 9; got 10",
    ),
    "heads without enable_gqa": (
        lambda: orchard_ops.flash_attn(q, k, v),
        ValueError,
        "query, key and value must have the same number of heads, or enable_gqa=True where "
        "query heads share those of key and value; got 4, 2 and 2 heads "
        "(operands are (..., heads, length, head_dim))",
    ),
    "heads of value do not divide": (
        lambda: grouped(q, k, randn(2, 3, 9, 16)),
        ValueError,
        "the number of query heads must be a multiple of the number of value heads; got 4 and 3",
    ),
    "heads do not divide": (
        lambda: grouped(q, randn(2, 3, 9, 16), randn(2, 3, 9, 16)),
        ValueError,
        f"{HEADS} 3",
    ),
    "no key heads": (
        lambda: grouped(q, randn(2, 0, 9, 16), randn(2, 0, 9, 16)),
        ValueError,
        f"{HEADS} 0",
    ),
    "head_dim 0": (
        lambda: orchard_ops.flash_attn(randn(2, 2, 8, 0), randn(2, 2, 9, 0), v),
        ValueError,
        "head_dim must be at least 1; got 0 for query and key and 16 for value",
    ),
    "mixed dtypes": (
        lambda: grouped(q, k.half(), v),
        TypeError,
        "query, key and value must have the same dtype; "
        "got torch.float32, torch.float16 and torch.float32",
    ),
    "mixed devices": (
        lambda: grouped(q, k.to("mps"), v),
        ValueError,
        "query, key and value must be on the same device; got cpu, mps:0 and cpu",
    ),
    "integers": (
        lambda: orchard_ops.flash_attn(q.int(), k.int(), v.int()),
        TypeError,
        "query must be float16, bfloat16, float32 or float64; got torch.int32",
    ),
    "not a tensor": (lambda: grouped(q, [1.0], v), TypeError, "key must be a tensor; got list"),
    "nested query": (
        lambda: orchard_ops.flash_attn(torch.nested.nested_tensor([q[0], q[1]]), k, v),
        TypeError,
        f"query {NESTED}",
    ),
    "jagged key": (
        lambda: orchard_ops.flash_attn(
            q, torch.nested.nested_tensor([k[0], k[1]], layout=torch.jagged), v
        ),
        TypeError,
        f"key {NESTED}",
    ),
    "sparse value": (
        lambda: grouped(q, k, v.to_sparse()),
        TypeError,
        "value must be a dense tensor; got layout torch.sparse_coo: call .to_dense()",
    ),
    "mask device": (
        lambda: grouped(q, k, v, torch.ones(8, 9, device="mps")),
        ValueError,
        "attn_mask must be on query's device cpu; got mps:0",
    ),
    "metal on the cpu": (
        lambda: grouped(q, k, v, impl="metal"),
        RuntimeError,
        "the Metal kernels cannot run this call: the tensors are on cpu, not on mps",
    ),
    "functional op without seed": (
        lambda: functional(q, k, v, dropout_p=0.5),
        ValueError,
        "dropout_p above 0 needs a dropout_seed; got dropout_p 0.5 and dropout_seed None: "
        "pass a 0-dim int64 cpu tensor",
    ),
    "functional op with 3-D": (
        lambda: functional(q[0], k[0], v[0]),
        ValueError,
        "query must be (batch, heads, length, head_dim); got shape (4, 8, 16)",
    ),
    "functional op far from the diagonal": (
        lambda: functional(q, k, v, diagonal=-(2**63)),
        ValueError,
        f"diagonal must be within +-2^40; got {-(2**63)}",
    ),
}


def text_of(name: str) -> str:
    """The whole message of a malformed call, as a pattern."""
    by_functional_op = name.startswith("functional") or name == "metal on the cpu"
    op = "orchard::flash_attn_fwd" if by_functional_op else OP
    return f"^{re.escape(f'{op}: {MALFORMED[name][2]}')}$"


@pytest.mark.parametrize("name", MALFORMED)
def test_message(name: str):
    call, exception, _ = MALFORMED[name]
    with pytest.raises(exception, match=text_of(name)):
        call()


@pytest.mark.parametrize("name", ["rank 1", "batch size", "heads do not divide", "mixed dtypes"])
def test_the_op_raises_as_the_function_does(name: str, monkeypatch: pytest.MonkeyPatch):
    call, exception, _ = MALFORMED[name]
    monkeypatch.setattr(orchard_ops, "flash_attn", torch.ops.orchard.flash_attn)
    with pytest.raises(exception, match=text_of(name)):
        call()


WINDOW = "be -1 (open) or at least 0; got"
SOFTCAP = "be 0 (none) or positive and finite in float32; got"
NO_GRADIENT = "be a number; got a tensor that requires grad, which would get no gradient:"
MASK = "broadcast to (2, 4, 8, 9); got shape"

# (argument, value, exception, what the message says after "<argument> must")
OPTIONS: list[tuple[str, object, type[Exception], str]] = [
    ("is_causal", "False", TypeError, "be True or False; got 'False', a str"),
    ("dropout_p", 1.5, ValueError, "be in [0, 1]; got 1.5"),
    ("dropout_p", -0.1, ValueError, "be in [0, 1]; got -0.1"),
    ("dropout_p", math.nan, ValueError, "be in [0, 1]; got nan"),
    ("softcap", -1.0, ValueError, f"{SOFTCAP} -1.0"),
    ("softcap", math.nan, ValueError, f"{SOFTCAP} nan"),
    ("softcap", 1e300, ValueError, f"{SOFTCAP} 1e+300"),
    (
        "softcap",
        torch.tensor(2.0, requires_grad=True),
        TypeError,
        f"{NO_GRADIENT} pass a number, softcap.item(), if it is not to be trained",
    ),
    ("scale", math.nan, ValueError, "be finite in float32; got nan"),
    ("scale", 1e300, ValueError, "be finite in float32; got 1e+300"),
    ("scale", "1", TypeError, "be a number; got '1', a str"),
    (
        "scale",
        torch.nn.Parameter(torch.tensor(0.25)),
        TypeError,
        f"{NO_GRADIENT} multiply query by it and pass scale=1.0",
    ),
    ("window_left", -2, ValueError, f"{WINDOW} -2"),
    ("window_right", -5, ValueError, f"{WINDOW} -5"),
    ("window_left", 0.25, TypeError, "be an integer; got 0.25, a float"),
    ("window_right", True, TypeError, "be an integer; got True, a bool"),
    ("impl", "cuda", ValueError, "be one of auto, metal, reference; got 'cuda'"),
    ("attn_mask", torch.ones(8, 10), ValueError, f"{MASK} (8, 10)"),
    (
        "attn_mask",
        torch.ones(2, 9, dtype=torch.bool),
        ValueError,
        f"{MASK} (2, 9): a padding mask goes in as mask[:, None, None, :]",
    ),
    (
        "attn_mask",
        torch.ones(1, 1, 1, 8, 9),
        ValueError,
        "have at most 4 dimensions for this query; got shape (1, 1, 1, 8, 9)",
    ),
    (
        "attn_mask",
        torch.ones(8, 9, dtype=torch.int32),
        TypeError,
        "be bool, float32 or query's torch.float32; got torch.int32",
    ),
    ("attn_mask", 1.0, TypeError, "be a tensor or None; got a float"),
    ("alibi_slopes", [1.0] * 4, TypeError, "be a tensor or None; got a list"),
    ("alibi_slopes", torch.ones(3), ValueError, "have shape (4,) or (2, 4); got (3,)"),
    ("sinks", torch.ones(2), ValueError, "have shape (4,); got (2,)"),
    ("sinks", torch.ones(4).int(), TypeError, "be a floating point tensor; got torch.int32"),
]


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("argument, value, exception, message", OPTIONS)
def test_option(
    argument: str, value: object, exception: type[Exception], message: str, causal: bool
):
    with pytest.raises(exception, match=f"^{re.escape(f'{OP}: {argument} must {message}')}$"):
        grouped(q, k, v, **{"is_causal": causal, argument: value})


def test_wrong_gradient_shapes_are_refused():
    out, row_stats = torch.ops.orchard.flash_attn_fwd(q, k, v, *PLAIN)
    with pytest.raises(
        ValueError,
        match=re.escape(
            "orchard::flash_attn_bwd: dout must have shape (2, 4, 8, 16); got (2, 4, 7, 16)"
        ),
    ):
        torch.ops.orchard.flash_attn_bwd(
            out[:, :, 1:], None, q, k, v, out, row_stats, *PLAIN, False
        )


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
    with torch.inference_mode(), pytest.raises(ValueError, match=re.escape(message)):
        torch.ops.orchard.flash_attn_fwd(*(x.to("mps") for x in operands), *PLAIN)


MPS_FUNCTIONAL: dict[str, tuple[dict[str, object], str]] = {
    "impl": ({"impl": "nonsense"}, "impl must be one of auto, metal, reference; got 'nonsense'"),
    "window": ({"window_left": -5}, f"window_left must {WINDOW} -5"),
    "softcap": ({"softcap": -1.0}, f"softcap must {SOFTCAP} -1"),
    "diagonal": (
        {"diagonal": -(2**63)},
        "diagonal must be within +-2^40; got -9223372036854775808",
    ),
    "sinks": ({"sinks": torch.ones(8)}, "sinks must have shape (4,); got (8,)"),
    "mask": (
        {"attn_mask": torch.ones(1, 1, 40, 60)},
        f"attn_mask must {MASK} (1, 1, 40, 60)",
    ),
}


@pytest.mark.parametrize("name", MPS_FUNCTIONAL)
def test_functional_ops_on_mps_check_every_argument(name: str, quiet_fallback: None):
    arguments, message = MPS_FUNCTIONAL[name]
    arguments = {"impl": "auto"} | {
        name: x.to("mps") if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
    }
    impl = arguments.pop("impl")
    scoring = PLAIN._replace(**arguments)
    with torch.inference_mode(), pytest.raises(ValueError, match=re.escape(message)):
        torch.ops.orchard.flash_attn_fwd(*(x.to("mps") for x in (q, k, v)), *scoring, impl)


def test_functional_op_with_a_mask_on_the_cpu(quiet_fallback: None):
    message = "attn_mask must be on query's device mps:0; got cpu"
    with torch.inference_mode(), pytest.raises(ValueError, match=re.escape(message)):
        functional(*(x.to("mps") for x in (q, k, v)), attn_mask=torch.ones(1, 1, 8, 9))


@pytest.mark.parametrize("index, name", [(1, "key"), (2, "value")])
def test_functional_op_with_an_operand_on_the_cpu(index: int, name: str):
    operands = [x if i == index else x.to("mps") for i, x in enumerate((q, k, v))]
    with torch.inference_mode(), pytest.raises(ValueError, match="must be on the same device"):
        torch.ops.orchard.flash_attn_fwd(*operands, *PLAIN)


def test_alibi_slopes_have_no_gradient():
    slopes = torch.ones(4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="alibi_slopes has no gradient; got slopes"):
        grouped(q, k, v, alibi_slopes=slopes)
    with torch.no_grad():
        grouped(q, k, v, alibi_slopes=slopes)


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
    with simulator.recording() as launches:
        out, lse = orchard_ops.flash_attn(*tensors, dropout_p=p, return_lse=True)
        out.sum().backward()
    assert out.shape == (batch, 2, q_len, 16) and not out.any()
    assert lse.shape == (batch, 2, q_len) and torch.isneginf(lse).all()
    for x in tensors:
        assert x.grad.shape == x.shape and not x.grad.any()
    assert not launches


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
    out = grouped(*inputs, mask, sinks=sinks)
    expected = F.scaled_dot_product_attention(*inputs, mask, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.sum(), (*inputs, sinks))
    for x, y in zip(grads, torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(x, y)
    assert not grads[3].any()


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_causal_and_mask_both_apply(device: str, request: pytest.FixtureRequest):
    if device == "mps":  # masks run on the reference on mps
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
        out = grouped(x, key, val)
    torch.testing.assert_close(
        out.cpu(), F.scaled_dot_product_attention(x.cpu(), key.cpu(), val.cpu(), enable_gqa=True)
    )
    assert orchard_ops.stats().reference == {reason: {"flash_attn_fwd": 1}}
    assert orchard_ops.explain(x, key, val, enable_gqa=True).reason == f"{reason} (got 264)"
