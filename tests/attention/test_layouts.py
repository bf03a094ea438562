"""Strided, offset and broadcast operands: read where they lie, without copies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import DTYPES, Case, run
from torch import Tensor

from orchard_ops.testing import assert_attention_close

pytestmark = pytest.mark.usefixtures("checked")


def _as_blhd(x: Tensor) -> Tensor:
    """(B, L, H, D) memory, as models that split heads by view make it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _packed(x: Tensor) -> Tensor:
    """A slice of a wider row, as from a fused qkv projection."""
    wide = torch.full((*x.shape[:3], 3 * x.shape[3]), float("nan"), dtype=x.dtype)
    wide[..., x.shape[3] : 2 * x.shape[3]] = x
    return wide[..., x.shape[3] : 2 * x.shape[3]]


def _sliced_cache(x: Tensor) -> Tensor:
    """The middle of a longer sequence whose other rows are loud."""
    cache = torch.full((x.shape[0], x.shape[1], x.shape[2] + 24, x.shape[3]), 1e4, dtype=x.dtype)
    cache[:, :, 8 : 8 + x.shape[2]] = x
    return cache[:, :, 8 : 8 + x.shape[2]]


def _odd_offset(x: Tensor) -> Tensor:
    """Starts one element into its storage: no 16-byte alignment."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)
    flat[1:] = x.reshape(-1)
    return flat[1:].view(x.shape)


def _transposed_columns(x: Tensor) -> Tensor:
    """stride(-1) != 1."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _every_other_column(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, float("nan"))), dim=-1)[..., 0]


LAYOUTS = {
    "blhd": _as_blhd,
    "packed": _packed,
    "sliced_cache": _sliced_cache,
    "odd_offset": _odd_offset,
    "transposed_columns": _transposed_columns,
    "every_other_column": _every_other_column,
}


def _on_mps(x: Tensor, layout: Callable[[Tensor], Tensor]) -> Tensor:
    """Keeps strides and offset: the whole storage travels, then the view is taken again."""
    strided = layout(x)
    storage = torch.empty(0, dtype=x.dtype).set_(strided.untyped_storage()).to("mps")
    view = storage.as_strided(strided.shape, strided.stride(), strided.storage_offset())
    assert view.stride() == strided.stride() and view.storage_offset() == strided.storage_offset()
    return view


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operand_layouts(layout: str, dtype: torch.dtype):
    case = Case(45, 70, 64, batch=2, num_heads=4, num_kv_heads=2, dtype=dtype, window_right=0)
    operands = case.operands()
    results = run(case, *(_on_mps(x, LAYOUTS[layout]) for x in operands))
    ref, eager = (case.math(t, *operands) for t in (torch.float64, dtype))
    assert_attention_close(results, ref, eager, f"{layout} ")


def test_each_operand_has_its_own_layout():
    case = Case(45, 70, 64, batch=2, num_heads=4, num_kv_heads=2, dropout_p=0.2)
    operands = case.operands()
    layouts = (_as_blhd, _odd_offset, _transposed_columns, _packed)
    results = run(case, *(_on_mps(x, layout) for x, layout in zip(operands, layouts)))
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
    q, k, v, do = (_on_mps(x, _as_blhd) for x in case.operands())
    out, _, dq, dk, dv = run(case, q, k, v, do)
    for x, like in ((out, q), (dq, q), (dk, k), (dv, v)):
        assert x.stride() == like.stride()
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize(
    "order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)], ids=str
)
def test_fake_strides_are_the_kernels_strides(order: tuple[int, ...], device: str):
    """torch.compile plans memory by the fake kernel: both must agree for every memory order."""
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
    q, k, v, do = (_on_mps(x, _transposed_columns) for x in case.operands())
    run(case, q, k, v, do)  # compiles
    simulator.reset_peak()
    before = simulator.memory().allocated
    kept = run(case, q, k, v, do)
    results = sum(x.numel() * x.element_size() for x in kept)
    delta = kept[1].numel() * 4
    assert simulator.memory().peak - before <= results + delta + 8 * 256  # allocation rounding
