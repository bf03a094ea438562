"""Strided, offset and broadcast operands are read where they lie, without copies."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DTYPES, Case, run

from orchard_ops.testing import LAYOUTS, assert_attention_close, with_strides

pytestmark = pytest.mark.usefixtures("checked")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operand_layouts(layout: str, dtype: torch.dtype):
    case = Case(45, 70, 64, batch=2, num_heads=4, num_kv_heads=2, dtype=dtype, window_right=0)
    operands = case.operands()
    results = run(case, *(with_strides(x, layout, "mps") for x in operands))
    ref, eager = (case.math(t, *operands) for t in (torch.float64, dtype))
    assert_attention_close(results, ref, eager, f"{layout} ")


def test_each_operand_has_its_own_layout():
    case = Case(45, 70, 64, batch=2, num_heads=4, num_kv_heads=2, dropout_p=0.2)
    operands = case.operands()
    layouts = ("blhd", "odd_offset", "transposed_columns", "packed")
    results = run(case, *(with_strides(x, layout, "mps") for x, layout in zip(operands, layouts)))
    ref, eager = (case.math(t, *operands) for t in (torch.float64, torch.float32))
    assert_attention_close(results, ref, eager)


def test_expanded_gradient_as_sum_makes_it():
    case = Case(40, 50, 32)
    q, k, v, _ = case.operands()
    do = torch.ones(()).expand(q.shape)
    results = run(
        case, q.to("mps"), k.to("mps"), v.to("mps"), torch.ones((), device="mps").expand(q.shape)
    )
    ref, eager = (case.math(t, q, k, v, do) for t in (torch.float64, torch.float32))
    assert_attention_close(results, ref, eager)


def test_expanded_batch_of_keys():
    case = Case(40, 50, 32, batch=3)
    q, k, v, do = case.operands()
    k, v = k[:1].expand_as(k), v[:1].expand_as(v)
    on_mps = [x[:1].contiguous().to("mps").expand_as(x) for x in (k, v)]
    assert on_mps[0].stride(0) == 0
    results = run(case, q.to("mps"), *on_mps, do.to("mps"))
    ref, eager = (case.math(t, q, k, v, do) for t in (torch.float64, torch.float32))
    assert_attention_close(results, ref, eager)


def test_outputs_keep_the_stride_order():
    case = Case(20, 30, 32, batch=2, num_heads=4, num_kv_heads=2)
    q, k, v, do = (with_strides(x, "blhd", "mps") for x in case.operands())
    out, _, dq, dk, dv = run(case, q, k, v, do)
    for x, like in ((out, q), (dq, q), (dk, k), (dv, v)):
        assert x.stride() == like.stride()
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize(
    "order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)], ids=str
)
def test_fake_strides_are_the_kernels_strides(order: tuple[int, ...], device: str):
    """torch.compile plans memory by the fake kernel, so it must agree with the real one for every
    memory order."""
    case = Case(5, 6, 16, batch=3, num_heads=4, num_kv_heads=2)
    inverse = [order.index(d) for d in range(3)]
    q, k, v, do = (
        x.permute(*order, 3).contiguous().permute(*inverse, 3).to(device) for x in case.operands()
    )
    meta = [torch.empty_strided(x.shape, x.stride(), device="meta") for x in (q, k, v, do)]
    impl = "metal" if device == "mps" else "auto"
    for real, fake in zip(run(case, q, k, v, do, impl=impl), run(case, *meta)):
        assert real.stride() == fake.stride() and real.shape == fake.shape


def test_no_copies_are_made(monkeypatch: pytest.MonkeyPatch):
    """Only the results and the row statistics are allocated, whatever the strides."""
    import simulator

    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "0")
    case = Case(64, 64, 64, batch=2, num_heads=4, num_kv_heads=2, dtype=torch.float16)
    q, k, v, do = (with_strides(x, "transposed_columns", "mps") for x in case.operands())
    ops, scoring = torch.ops.orchard, case.scoring("mps")

    def pair() -> tuple[torch.Tensor, ...]:
        out, row_stats = ops.flash_attn_fwd(q, k, v, *scoring, "metal")
        grads = ops.flash_attn_bwd(do, None, q, k, v, out, row_stats, *scoring, False, "metal")
        return (out, row_stats, *grads)

    pair()  # compiles
    simulator.reset_peak()
    before = simulator.memory().allocated
    kept = pair()
    results = sum(x.numel() * x.element_size() for x in kept)
    delta = kept[1].numel() // 2 * 4
    assert simulator.memory().peak - before <= results + delta + 8 * 256  # allocation rounding
