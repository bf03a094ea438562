"""Forwards of few queries and many keys on the decode kernel, which no backward may follow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DTYPES, Case, lse_of
from representative import product
from torch import Tensor

import orchard_ops
from orchard_ops import flash_attn
from orchard_ops.cache import MOST_QUERIES
from orchard_ops.scoring import NO_BACKWARD
from orchard_ops.testing import assert_no_worse_than_math

pytestmark = pytest.mark.usefixtures("checked")

NAN = float("nan")
LEAST = 256
"""Keys of the shortest call that the plan gives to the decode kernel."""
OF_KEYS = {"mask_full": (True, False, False, True)}


def forward(case: Case, operands: tuple[Tensor, ...], **changed: Any) -> tuple[Tensor, Tensor]:
    """out and lse on mps."""
    scoring = case.scoring("mps")._replace(**{"key_span": NO_BACKWARD, **changed})
    on_mps = (x.to("mps") for x in operands)
    out, row_stats = torch.ops.orchard.flash_attn_fwd(*on_mps, *scoring, "metal")
    return out, lse_of(row_stats, scoring)


def check(case: Case, results: tuple[Tensor, Tensor], operands: tuple[Tensor, ...]) -> None:
    right, unfused = case.math(torch.float64, *operands), case.math(case.dtype, *operands)
    for name, x in zip(("out", "lse"), results):
        assert_no_worse_than_math(
            name,
            x,
            getattr(right, name),
            getattr(unfused, name),
            2.0,
            right.rounding(name, case.dtype),
            right.rounded_weights(name, case.dtype),
        )


def ran_on_decode() -> bool:
    """Whether every call since the stats were fresh did."""
    stats = orchard_ops.stats()
    decoded, others = (stats.metal.get(x, 0) for x in ("flash_attn_decode", "flash_attn_fwd"))
    assert stats.fallbacks == 0 and (decoded > 0) != (others > 0), stats
    return decoded > 0


CASES = {
    "one query": Case(1, 300),
    "plain, several queries": Case(5, 300, num_heads=6, num_kv_heads=2),
    "16 queries": Case(16, LEAST, num_heads=4, num_kv_heads=1),
    "causal at the bottom right": Case(3, 300, window_right=0, diagonal=297, num_heads=4),
    "causal at the top left": Case(7, 300, window_right=0),
    "queries behind the keys": Case(4, 280, window_left=40, window_right=0, diagonal=300),
    "window": Case(4, 400, window_left=30, window_right=5, diagonal=200),
    "softcap": Case(2, 300, softcap=2.0),
    "alibi": Case(3, 300, alibi="head", diagonal=297, window_right=0),
    "alibi by batch": Case(3, 300, alibi="batch", batch=2, diagonal=11),
    "sinks": Case(2, 300, sinks=True),
    "negative scale": Case(2, 300, scale=-0.3),
    "odd widths": Case(2, 300, 37, value_dim=5),
    "wide": Case(8, 300, 192, value_dim=128, num_heads=4),
    "bool mask": Case(1, 300, mask="bool", batch=2, **OF_KEYS),
    "bool mask for all": Case(2, 300, mask="bool", batch=2, mask_full=(False, False, False, True)),
    "mask of a dtype": Case(2, 300, mask="same", batch=2, **OF_KEYS),
    "mask of float32": Case(4, 300, mask="float32", batch=2, num_heads=8, **OF_KEYS),
    "mask of sequences": Case(2, 300, mask="bool", batch=3, mask_full=(True, False, False, False)),
    "key ranges": Case(1, 300, ranges="any", batch=3, ranges_full=(True, False), window_left=200),
    "key ranges for all": Case(1, 300, ranges="any", batch=3, ranges_full=(False, False)),
    "key ranges, prefix": Case(1, 300, ranges="prefix"),
    "key ranges, mask": Case(1, 300, ranges="padding", mask="bool", batch=3, **OF_KEYS),
    "all of them": Case(
        1, 600, 72, value_dim=40, batch=2, num_heads=6, num_kv_heads=2, softcap=3.0, alibi="batch",
        sinks=True, mask="float32", ranges="padding", window_left=400, window_right=0, **OF_KEYS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name, dtype", product(tuple(CASES), tuple(DTYPES)), ids=str)
def test_mathematics(dtype: torch.dtype, name: str, fresh_stats: None):
    case = CASES[name].but(dtype=dtype)
    operands = case.operands()
    check(case, forward(case, operands[:3]), operands)
    assert ran_on_decode()


LEFT_TO_THE_FORWARD = {
    "more queries": Case(MOST_QUERIES + 1, 300),
    "fewer keys": Case(1, LEAST - 1),
    "dropout": Case(1, 300, dropout_p=0.1),
    "a mask of rows": Case(2, 300, mask="bool"),
    "a mask of heads": Case(1, 300, mask="bool", mask_full=(False, True, False, True)),
    "ranges of rows": Case(2, 300, ranges="padding"),
    "ranges of heads": Case(1, 300, ranges="any", ranges_full=(False, True)),
    "more blocks of rows than heads": Case(9, 300, 256, num_heads=1),
}


@pytest.mark.parametrize("name", LEFT_TO_THE_FORWARD)
def test_what_is_left_to_the_forward(name: str, fresh_stats: None):
    case = LEFT_TO_THE_FORWARD[name]
    operands = case.operands()
    check(case, forward(case, operands[:3]), operands)
    assert not ran_on_decode()


def test_tiles_that_are_asked_for_are_the_forwards(
    monkeypatch: pytest.MonkeyPatch, fresh_stats: None
):
    case = CASES["one query"]
    monkeypatch.setenv("ORCHARD_TILES", "attention_forward=r1_k8_b1")
    forward(case, case.operands()[:3])
    assert not ran_on_decode()


@pytest.mark.parametrize("garbage", (NAN, math.inf, 6e4))
@pytest.mark.parametrize("kind", ("bool", "float32", "same"))
def test_keys_that_a_mask_hides_reach_nothing(kind: str, garbage: float):
    """Holes, whole blocks, the start and the end: as if the keys held zeros."""
    case = Case(2, 300, 64, batch=2, dtype=torch.float16, num_heads=4, num_kv_heads=2)
    q, k, v, _ = case.operands()
    seen = torch.rand(2, 1, 1, 300) > 0.4
    seen[0, ..., :70] = seen[1, ..., 130:] = False
    dtype = {"float32": torch.float32, "same": torch.float16, "bool": torch.bool}[kind]
    mask = seen
    if kind != "bool":
        mask = torch.randn(seen.shape).masked_fill(~seen, -math.inf).to(dtype)
    hidden = ~seen.view(2, 1, 300, 1)
    results = [
        forward(
            case,
            (q, k.masked_fill(hidden, number), v.masked_fill(hidden, number)),
            attn_mask=mask.to("mps"),
        )
        for number in (0.0, garbage)
    ]
    for x, y in zip(*results):
        assert torch.equal(x, y) and bool(x.isfinite().all())


def test_keys_outside_of_the_ranges_reach_nothing():
    """Between a prefix and a range, too."""
    case = Case(1, 400, 64, batch=2, dtype=torch.float16, num_heads=4, num_kv_heads=2)
    q, k, v, _ = case.operands()
    ranges = torch.tensor([[[[200, 310, 399, 37]]], [[[5, 90, 399, 0]]]], dtype=torch.int32)
    keys = torch.arange(400)
    begin, end, _, prefix = (x.view(2, 1) for x in ranges.view(2, 4).unbind(1))
    hidden = ~((keys < prefix) | ((keys >= begin) & (keys < end))).view(2, 1, 400, 1)
    results = [
        forward(
            case,
            (q, k.masked_fill(hidden, number), v.masked_fill(hidden, number)),
            key_ranges=ranges.to("mps"),
        )
        for number in (0.0, NAN)
    ]
    for x, y in zip(*results):
        assert torch.equal(x, y) and bool(x.isfinite().all())


@pytest.mark.parametrize("dropout_p", (NAN, -0.5, 1.0, 1e-7))
def test_dropout_is_checked_as_for_the_forward(dropout_p: float):
    """The last is rounded to none, and still has no seed."""
    case = Case(1, 300, 64)
    with pytest.raises(ValueError, match="orchard::flash_attn_fwd: dropout_p"):
        forward(case, case.operands()[:3], dropout_p=dropout_p, dropout_seed=None)


def test_rows_without_a_key():
    case = Case(2, 300, 64, batch=2)
    none = torch.zeros(2, 1, 1, 300, dtype=torch.bool)
    none[1, ..., 7] = True
    out, lse = (x.cpu() for x in forward(case, case.operands()[:3], attn_mask=none.to("mps")))
    assert not out[0].any() and bool((lse[0] == -math.inf).all())
    torch.testing.assert_close(out[1], case.operands()[2][1, :, 7:8].expand_as(out[1]))


def test_a_sink_of_infinity(fresh_stats: None):
    """Rows are NaN, as inf - inf is; the first sees no key, and is 0 with its sink for its lse."""
    case = Case(3, 300, 64, window_right=0, diagonal=-1, sinks=True)
    sinks = torch.tensor([math.inf, 0.5], device="mps")
    out, lse = (x.cpu() for x in forward(case, case.operands()[:3], sinks=sinks))
    assert ran_on_decode()
    assert not out[:, :, 0].any() and bool((lse[0, :, 0] == sinks.cpu()).all())
    assert bool(out[:, 0, 1:].isnan().all()) and bool(lse[:, 0, 1:].isnan().all())
    assert bool(out[:, 1].isfinite().all()) and bool(lse[:, 1].isfinite().all())


def test_operands_are_read_where_they_lie():
    """No copy: the cache of a model is (B, S, H, D) memory and longer than the keys that are."""
    import simulator

    cache = torch.randn(2, 2, 400, 2, 64, device="mps", dtype=torch.float16)
    k, v = (x[:, :300].transpose(1, 2) for x in cache)
    q = torch.randn(2, 4, 1, 64, device="mps", dtype=torch.float16)
    with simulator.recording() as launches:
        out = flash_attn(q, k, v, enable_gqa=True)
    assert [x.kernel.split("_float16")[0] for x in launches] == [
        "attention_decode",
        "attention_decode_merge",
    ]
    expected = F.scaled_dot_product_attention(
        q.cpu().double(), k.cpu().double(), v.cpu().double(), enable_gqa=True
    )
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-2, atol=1e-3)


def test_hidden_blocks_are_not_read():
    """Neither multiplied nor read: the mask is looked at before the keys."""
    import simulator

    case = Case(1, 4096, 64, dtype=torch.float16)
    masks = torch.zeros(2, 1, 1, 1, 4096, dtype=torch.bool, device="mps")
    masks[1, ..., 40:60] = True
    with simulator.checking(), simulator.recording() as launches:
        for mask in masks:
            forward(case, case.operands()[:3], attn_mask=mask)
    nothing, some = (launches[i].counters for i in (0, 2))
    assert nothing.mma == 0 and some.mma == 2 * 2 * (64 // 8) * 2  # two blocks of 16 keys
    assert some.device_bytes_read - nothing.device_bytes_read == 2 * 16 * 2 * 64 * 2


@pytest.mark.parametrize(
    "case",
    (
        Case(1, LEAST, 64, num_heads=4, num_kv_heads=4),
        Case(1, LEAST, 128, num_heads=8, num_kv_heads=1),
        Case(16, LEAST, 128, num_heads=2, num_kv_heads=2),
        Case(16, LEAST, 64, num_heads=8, num_kv_heads=2),
        Case(8, LEAST, 256, num_heads=2, num_kv_heads=1),
        Case(4, LEAST, 64, num_heads=4, mask="bool", **OF_KEYS),
    ),
    ids=str,
)
def test_it_costs_no_more_than_the_forward(case: Case):
    """The shortest calls that it takes: what the kernel that has the keys and values reads, and all
    products, by the simulator's counters."""
    import simulator

    operands = case.but(dtype=torch.float16).operands()[:3]
    read, products = [], []
    for span in (NO_BACKWARD, 0):
        with simulator.checking(), simulator.recording() as launches:
            forward(case, operands, key_span=span)
        assert ("decode" in launches[0].kernel) == (span == NO_BACKWARD)
        having_keys = [x for x in launches if "_merge_" not in x.kernel]
        read.append(sum(x.counters.device_bytes_read for x in having_keys))
        products.append(sum(x.counters.mma for x in launches))
    assert read[0] <= read[1] and 2 * products[0] <= products[1]


# ---- who chooses -------------------------------------------------------------------------------


def _operands(grad: bool = False, q_len: int = 1) -> list[Tensor]:
    shapes = ((2, 4, q_len, 64), (2, 2, 300, 64), (2, 2, 300, 64))
    return [torch.randn(x, device="mps").requires_grad_(grad) for x in shapes]


FREE_OF_GRADIENTS = {
    "no operand requires grad": (False, lambda: torch.enable_grad()),
    "no_grad": (True, lambda: torch.no_grad()),
    "inference_mode": (True, lambda: torch.inference_mode()),
}
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"window_right": 0},
    "slopes": {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
    "mask": {"attn_mask": torch.arange(300).view(1, 1, 1, 300) > 40},
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("way", FREE_OF_GRADIENTS)
def test_a_call_without_gradients_decodes(way: str, extra: str, fresh_stats: None):
    grad, mode = FREE_OF_GRADIENTS[way]
    operands = _operands(grad)
    options = {k: x.to("mps") if isinstance(x, Tensor) else x for k, x in EXTRAS[extra].items()}
    with mode():
        out, lse = flash_attn(*operands, enable_gqa=True, return_lse=True, **options)
    assert ran_on_decode()
    right = flash_attn(*operands, enable_gqa=True, return_lse=True, impl="reference", **options)
    for x, y in zip((out, lse), right):
        torch.testing.assert_close(x, y.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", range(3))
def test_a_call_with_a_gradient_does_not(place: int, fresh_stats: None):
    operands = _operands()
    operands[place].requires_grad_()
    flash_attn(*operands, enable_gqa=True).sum().backward()
    assert not ran_on_decode()


def test_a_sink_that_requires_a_gradient_is_one(fresh_stats: None):
    sinks = torch.zeros(4, device="mps", requires_grad=True)
    flash_attn(*_operands(), enable_gqa=True, sinks=sinks).sum().backward()
    assert not ran_on_decode()


def test_gradients_of_transforms_are_the_forwards(fresh_stats: None):
    """A level of torch.func that records nothing does not speak for the others."""
    q, k, v = _operands()

    def loss(q: Tensor) -> Tensor:
        with torch.no_grad():
            constant = flash_attn(q, k, v, enable_gqa=True)
        return (flash_attn(q, k, v, enable_gqa=True) * constant).sum()

    found = torch.func.grad(loss)(q)
    q = q.clone().requires_grad_()
    expected = torch.autograd.grad(loss(q), q)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_compiled_without_gradients(fresh_stats: None):
    operands = _operands()
    attend = torch.compile(
        lambda q, k, v: flash_attn(q, k, v, enable_gqa=True), backend="aot_eager", fullgraph=True
    )
    with torch.no_grad():
        out = attend(*operands)
    assert ran_on_decode()
    assert torch.equal(out, flash_attn(*operands, enable_gqa=True))


@pytest.mark.parametrize("mask", (None, "bool", "float"))
def test_sdpa_taken_over(mask: str | None, fresh_stats: None):
    operands = _operands()
    given = None
    if mask is not None:
        given = torch.rand(2, 1, 1, 300, device="mps") > 0.3
    if mask == "float":
        given = torch.zeros(2, 1, 1, 300, device="mps").masked_fill(~given, -math.inf)
    with orchard_ops.sdpa(), torch.no_grad():
        out = F.scaled_dot_product_attention(*operands, attn_mask=given, enable_gqa=True)
    assert ran_on_decode()
    expected = F.scaled_dot_product_attention(
        *(x.cpu() for x in operands),
        attn_mask=None if given is None else given.cpu(),
        enable_gqa=True,
    )
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_explain_and_report_say_so():
    operands = _operands()
    found = orchard_ops.explain(*operands, enable_gqa=True)
    assert [x.split("_float32")[0] for x in found.kernels] == [
        "attention_decode",
        "attention_decode_merge",
    ]
    with orchard_ops.report(show=False) as report:
        flash_attn(*operands, enable_gqa=True)
        flash_attn(operands[0].clone().requires_grad_(), *operands[1:], enable_gqa=True)
    alone, recorded = report.calls
    assert alone.kernels == found.kernels and "key_span" not in alone.arguments
    assert recorded.kernels and recorded.kernels[0].startswith("attention_forward")
