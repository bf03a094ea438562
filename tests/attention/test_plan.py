"""The native plan: the variants it can name, explain(), and what the sources must agree on."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import DTYPES, Case

import orchard_ops
from orchard_ops.plan import WIDEST_HEAD_DIM, head_dims

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "native"))
import embed_shaders  # noqa: E402


def explain(case: Case, **options: object) -> orchard_ops.Explanation:
    q, k, v, _ = (x.to("mps") for x in case.operands())
    return orchard_ops.explain(q, k, v, enable_gqa=case.num_heads != case.num_kv_heads, **options)


@pytest.mark.parametrize("head_dim", range(1, 257))
def test_head_dims_are_padded_to_the_next_variant(head_dim: int):
    padded = min(d for d in head_dims() if d >= head_dim)
    explanation = explain(Case(3, 4, head_dim))
    assert explanation.path == "metal" and len(explanation.kernels) == 4
    assert all(f"_d{padded}_" in name for name in explanation.kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (16, 64, 80, 128, 160, 256))
def test_threadgroup_memory_fits(head_dim: int, dtype: torch.dtype):
    """Staged blocks of padded rows take at most 32 KiB, computed here from the kernel's name."""
    size = 2 if dtype == torch.float16 else 4
    row = head_dim * size + 16
    for name in explain(Case(3, 4, head_dim, dtype=dtype)).kernels:
        if "delta" in name:
            continue
        tile = re.search(r"_d\d+_(.*)_chunks", name)[1]
        sizes = {part[0]: int(part[1:]) for part in tile.removesuffix("_ds").split("_")}
        if "q" in sizes:  # dk, dv: two blocks, and P handed over from one of a pair to the other
            handed_over = 2 * 32 * 8 * sizes["q"] // 8 if "pairs" in name else 0
            assert 2 * sizes["q"] * row + handed_over <= 32 * 1024
        else:
            blocks = sizes.get("b", 1 if "from_ds" in name else 2)
            assert blocks * sizes["k"] * row <= 32 * 1024


def test_explain_takes_the_arguments_of_the_attention():
    parameters = [
        dict(inspect.signature(function, eval_str=True).parameters)
        for function in (orchard_ops.flash_attn, orchard_ops.explain)
    ]
    assert parameters[0].pop("return_lse").default is False
    assert parameters[0] == parameters[1]
    x = torch.randn(1, 1, 2, 8)
    with pytest.raises(TypeError, match=r"^orchard_ops\.explain: .* argument 'return_lse'$"):
        orchard_ops.explain(x, x, x, return_lse=True)


def test_scratch_is_explained(monkeypatch: pytest.MonkeyPatch):
    case = Case(100, 200, 64, num_heads=4, num_kv_heads=4)
    explanation = explain(case)
    assert explanation.scratch_bytes == 4 * 13 * 25 * 256
    assert "backward: five products: dS of all heads at once" in str(explanation)
    assert "scratch: 325.0 KiB for a backward" in str(explanation)
    assert "scratch: 1.2 MiB for a backward" in str(explain(case.but(q_len=400, num_kv_heads=4)))
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "0")
    low = explain(case)
    assert low.scratch_bytes == 0 and "scratch:" not in str(low)
    assert low.products.startswith("seven products: dS is computed twice, since it may take no")
    assert any("backward_dq_f" in name for name in low.kernels)
    for wrong in ("x", "-1", "1.5", "9999999999999999"):
        monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", wrong)
        with pytest.raises(RuntimeError, match=f"ORCHARD_BACKWARD_SCRATCH_MB .*got '{wrong}'"):
            explain(case)


def test_scratch_of_key_ranges_is_explained(monkeypatch: pytest.MonkeyPatch):
    """dS of one head takes 2 MiB."""
    case = Case(512, 1024, 64, num_kv_heads=2)
    ranges = orchard_ops.KeyRanges.from_lengths(torch.tensor([900], device="mps"), 512)
    for megabytes, products in (
        (1, "seven products: dS is computed twice, since not one query head fits into 1 MiB"),
        (2, "five products: dS of 1 of 2 heads at a time"),
    ):
        monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", str(megabytes))
        assert explain(case, key_ranges=ranges).products.startswith(products)


@pytest.mark.parametrize(
    "tiles", ("r2_k32_b2", "forward=r2_k32_b2", "attention_forward=r1_k8_b0,x")
)
def test_tiles_of_no_family_are_refused(tiles: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ORCHARD_TILES", tiles)
    message = f"ORCHARD_TILES must be attention_forward=TILE; got '{tiles}'"
    with pytest.raises(RuntimeError, match=message):
        explain(Case(3, 4, 64))


def test_loads_follow_the_layout():
    case = Case(40, 50, 64, dtype=torch.float16)
    q, k, v, _ = (x.to("mps") for x in case.operands())
    assert all(n.endswith("_chunks") for n in orchard_ops.explain(q, k, v).kernels)
    strided = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    explanation = orchard_ops.explain(q, strided, v)
    assert all(n.endswith("_elements") for n in explanation.kernels)
    assert "16 bytes" in explanation.advice
    assert explanation.path == "metal"


def test_dropout_is_a_variant_and_a_tiny_p_is_none():
    case = Case(40, 50, 64)
    names = explain(case, dropout_p=0.1).kernels
    assert [n.split("_float32")[0] for n in names if not n.endswith("_dropout")] == [
        "attention_backward_delta",
        "attention_backward_dq_from_ds",
    ]
    assert not any(n.endswith("_dropout") for n in explain(case, dropout_p=1e-6).kernels)


def test_causality_and_lengths_are_no_variants():
    """A training run compiles four kernels, whatever its lengths and windows."""
    names = {
        explain(Case(q_len, kv_len, 64, num_kv_heads=2), is_causal=causal, window_left=left).kernels
        for q_len, kv_len in ((1, 1), (33, 100), (500, 20))
        for causal in (False, True)
        for left in (-1, 5)
    }
    assert len(names) == 1


def test_the_kernels_launched_are_the_kernels_explained():
    import simulator

    case = Case(40, 50, 96, dtype=torch.bfloat16)
    q, k, v, _ = (x.to("mps").requires_grad_() for x in case.operands())
    with simulator.recording() as launches:
        orchard_ops.flash_attn(q, k, v, dropout_p=0.1).square().sum().backward()
    assert tuple(x.kernel for x in launches) == orchard_ops.explain(q, k, v, dropout_p=0.1).kernels


def test_explain_on_the_cpu_and_as_text():
    x = torch.randn(1, 2, 5, 16)
    explanation = orchard_ops.explain(x, x, x)
    assert explanation.path == "reference"
    assert str(explanation) == (
        'path: reference\nreason: the tensors are on cpu, not on mps\nadvice: move them to "mps"'
    )


def test_shader_text_is_ascii_and_self_contained():
    for header in embed_shaders.FAMILIES.values():
        text = embed_shaders.flatten(header)
        assert text.isascii()
        assert '#include "' not in text and "#pragma once" not in text
        assert text.count("struct AttentionParams {") == 1


def test_diagnostics_point_into_the_shaders():
    """A mistake in a flattened source is reported with the shader's own file and line."""
    from simulator import engine

    text = embed_shaders.flatten("forward.h").replace("zero(o);", "zero(oh);")
    line = (ROOT / "shaders" / "forward.h").read_text().split("zero(o);")[0].count("\n") + 1
    with pytest.raises(engine.CompileError, match=rf"forward\.h:{line}"):
        engine.compile(text + instantiation())


def instantiation() -> str:
    arguments = "attention_forward<float, float, 16, 1, 16, 2, 4, Variant<true, false, PlainScore>>"
    return f'\ntemplate [[host_name("f")]] [[kernel]] decltype({arguments}) {arguments};\n'


def test_python_and_native_agree_on_dropout_rounding():
    """The kernel's name tells whether the native threshold is 0; Python must agree at the edge."""
    from orchard_ops import dropout

    for p in (0.49 * 2**-16, 0.5 * 2**-16, 0.51 * 2**-16, 1.5 * 2**-16):
        named = explain(Case(4, 4, 16), dropout_p=p).kernels[0].endswith("_dropout")
        assert named == (dropout.threshold(p) > 0)


def test_python_and_native_agree_on_the_widest_head():
    assert max(head_dims()) == WIDEST_HEAD_DIM
