"""Infinite operands, mask elements, slopes and sinks: what they make NaN, and what not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DTYPES, Case, run
from representative import product

import orchard_ops
from orchard_ops.scoring import Scoring

pytestmark = pytest.mark.usefixtures("checked")

INFINITE = {  # the case, the argument, which of its numbers is infinite
    "sink": (Case(40, 70, 32, num_heads=4, sinks=True), "sinks", 1),
    "sink of a divided forward": (Case(33, 513, 80, sinks=True), "sinks", 1),
    "sink, mask of rows without a key": (
        Case(40, 70, 32, sinks=True, mask="bool", window_left=0, diagonal=20), "sinks", 1,
    ),
    "sink, windows without a key": (
        Case(40, 40, 32, sinks=True, window_right=0, diagonal=-8), "sinks", 1,
    ),
    "sink of a head without a key": (
        Case(40, 40, 32, sinks=True, window_right=0, diagonal=-64), "sinks", 1,
    ),
    "sink of a divided head without a key": (
        Case(33, 513, 80, sinks=True, window_right=0, diagonal=-64), "sinks", 1,
    ),
    "sink, ranges without a key": (Case(40, 70, 32, sinks=True, ranges="any"), "sinks", 1),
    "sinks, ranges, divided": (Case(60, 700, 32, ranges="any", sinks=True), "sinks", 1),
    "sink of rows that store dS": (
        Case(70, 90, 64, num_heads=4, num_kv_heads=2, sinks=True), "sinks", 1,
    ),
    "mask": (Case(40, 70, 32, mask="same"), "attn_mask", (0, 1, 17, 5)),
    "mask, pairs": (Case(40, 70, 128, mask="same"), "attn_mask", (0, 1, 17, 5)),
    "mask of float32": (Case(70, 90, 64, mask="float32"), "attn_mask", (0, 1, 17, 5)),
    "mask of keys": (
        Case(40, 70, 32, mask="same", mask_full=(True, False, False, True)),
        "attn_mask", (0, 0, 0, 5),
    ),
    "mask of rows": (
        Case(40, 70, 32, mask="same", mask_full=(True, True, True, False), sinks=True),
        "attn_mask", (0, 1, 17, 0),
    ),
    "mask of rows, no sinks": (
        Case(40, 70, 32, mask="same", mask_full=(True, True, True, False)),
        "attn_mask", (0, 1, 17, 0),
    ),
    "mask of heads": (
        Case(40, 70, 32, mask="same", mask_full=(True, True, False, False)),
        "attn_mask", (0, 1, 0, 0),
    ),
    "query, mask of rows": (
        Case(40, 70, 32, mask="same", mask_full=(True, True, True, False)), "query", (0, 1, 17, 5),
    ),
    "value, mask of rows": (
        Case(40, 70, 32, mask="same", mask_full=(True, True, True, False)), "value", (0, 0, 17, 5),
    ),
    "dout, mask of rows": (
        Case(40, 70, 32, mask="same", mask_full=(True, True, True, False)), "dout", (0, 1, 17, 5),
    ),
    "dout, mask of rows, sinks": (
        Case(40, 70, 32, mask="same", mask_full=(True, True, True, False), sinks=True),
        "dout", (0, 1, 17, 5),
    ),
    "value, sinks": (Case(40, 70, 32, sinks=True), "value", (0, 0, 17, 5)),
    "mask, divided": (Case(33, 777, 64, mask="same"), "attn_mask", (0, 1, 17, 5)),
    "mask, softcap": (Case(40, 70, 32, mask="same", softcap=5.0), "attn_mask", (0, 1, 17, 5)),
    "query": (Case(40, 70, 32), "query", (0, 1, 17, 5)),
    "key": (Case(40, 70, 32), "key", (0, 0, 17, 5)),
    "key, boolean mask": (Case(40, 70, 32, mask="bool"), "key", (0, 0, 17, 5)),
    "key, divided": (Case(33, 777, 64), "key", (0, 0, 17, 5)),
    "query, softcap": (Case(40, 70, 32, softcap=5.0), "query", (0, 1, 17, 5)),
    "key, softcap": (Case(40, 70, 32, softcap=5.0), "key", (0, 0, 17, 5)),
    "key, softcap, pairs": (Case(40, 70, 128, softcap=5.0), "key", (0, 0, 17, 5)),
    "slope": (Case(40, 70, 32, alibi="head"), "alibi_slopes", 1),
}  # fmt: skip


SIGNED = (*((dtype, math.inf) for dtype in DTYPES), (torch.float32, -math.inf))


@pytest.mark.parametrize("name, infinity", product(tuple(INFINITE), SIGNED), ids=str)
def test_infinity_reaches_what_it_reaches_in_the_reference(
    name: str, infinity: tuple[torch.dtype, float]
):
    """Forward and backward on Metal. A sink of +inf makes rows NaN, but for those that see no key.
    How near the finite numbers are is for other tests."""
    (dtype, value), (case, argument, place) = infinity, INFINITE[name]
    case = case.but(dtype=dtype)
    operands = dict(zip(("query", "key", "value", "dout"), case.operands()))
    results = []
    for device, impl in (("mps", "metal"), ("cpu", "reference")):
        scoring = case.scoring("cpu")
        changed = operands.get(argument, getattr(scoring, argument, None)).clone()
        changed[place] = value
        if argument not in operands:
            scoring = scoring._replace(**{argument: changed})
        scoring = Scoring(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in scoring))
        tensors = (operands | {argument: changed} if argument in operands else operands).values()
        on_device = (x.to(device) for x in tensors)
        results.append(run(case, *on_device, impl=impl, scoring=scoring))
    names = ("out", "lse", "dq", "dk", "dv", "dmask", "dsinks")
    for found, expected, result in zip(*results, names):
        if expected is not None:
            torch.testing.assert_close(
                found.cpu(), expected, equal_nan=True, rtol=0.05, atol=0.05,
                msg=lambda text, result=result: f"{result}: {text}",
            )  # fmt: skip


@pytest.mark.parametrize("shape", ((1, 2, 40, 70), (1, 1, 1, 70)), ids=str)
@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_an_infinite_element_of_a_mask_is_that_of_sdpa(device: str, shape: tuple[int, ...]):
    """NaN in its rows of out and dq, in all of dk and dv of its heads, and in its rows of dmask."""
    mask = torch.randn(*shape)
    mask[..., -1, 5] = math.inf
    results = []
    for attention, on in (
        (F.scaled_dot_product_attention, "cpu"),
        (orchard_ops.flash_attn, device),
    ):
        torch.manual_seed(1)
        tensors = [torch.randn(1, 2, n, 32) for n in (40, 70, 70)]
        leaves = [x.to(on).requires_grad_() for x in (*tensors, mask)]
        out = attention(*leaves[:3], attn_mask=leaves[3])
        results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    for expected, found in zip(*results):
        torch.testing.assert_close(found.cpu(), expected, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert results[0][0].isnan().any()
