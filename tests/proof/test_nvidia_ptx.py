"""The PTX backend of the engine: everything compiles, and NVIDIA's assembler takes it.

Whether the numbers are right is for benchmarks/nvidia/prove.py, on a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from representative import product
from simulator import engine
from simulator.engine import ptx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.nvidia import build, plans  # noqa: E402

INCLUDE = Path(torch.__file__).parent / "include"
PTXAS = shutil.which("ptxas")

PYTORCH = """
#include <c10/metal/utils.h>
#include <metal_simdgroup>
#include <metal_stdlib>
using namespace metal;
#include <ATen/native/mps/kernels/DecodeAttention.h>
#include <ATen/native/mps/kernels/PrefillAttention.h>
"""
PYTORCH_KERNELS = [
    "prefill_attention_float16_bq32_bk32_bd64_wm4_wn1_hm0_dc0_maskfloat16",
    "prefill_attention_float32_bq16_bk8_bd256_wm2_wn1_hm1_dc1_maskbool_",
    "sdpa_vector_bfloat_128_128_masknone",
    "sdpa_vector_2pass_1_half_64_64_maskbool",
    "sdpa_vector_2pass_2_float_96",
]


def assemble(text: str, folder: Path) -> None:
    if PTXAS is None:
        pytest.skip("ptxas is not installed: the PTX is made, but nothing reads it")
    path = folder / "kernel.ptx"
    path.write_text(text)
    command = [PTXAS, "-arch=sm_90", str(path), "-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, plans.Kernel]:
    return plans.every_variant(build.build_planner(tmp_path_factory.mktemp("planner") / "lib.so"))


NARROW, WIDE = (16, "_elements_dropout"), (256, "_chunks")
CHOSEN = {
    "attention_forward": (NARROW, WIDE),
    "attention_backward_delta": ((16, "elements"), (256, "chunks")),
    "attention_backward_dkv": (NARROW, (80, "_ds_chunks")),
    "attention_backward_dkv_pairs": ((112, "_elements_dropout"), (256, "_ds_chunks")),
    "attention_backward_dq": (NARROW, WIDE),
    "attention_backward_dq_from_ds": ((64, "_elements"), WIDE),
}
# dS is multiplied as float, and delta multiplies no matrices.
ON_TENSOR_CORES = set(CHOSEN) - {"attention_backward_delta", "attention_backward_dq_from_ds"}


@pytest.mark.parametrize(
    "family, dtype", product(tuple(CHOSEN), ("float16", "bfloat16", "float32"))
)
def test_our_kernels(family, dtype, variants, tmp_path):
    """A narrow variant with all features, and a wide one without dropout."""
    for head_dim, ending in CHOSEN[family]:
        pattern = rf"{family}_{dtype}_d{head_dim}_\w*{ending}"
        found = [k for name, k in variants.items() if re.fullmatch(pattern, name)]
        kernel = min(found, key=lambda k: len(k.name))
        text = ptx.compile(build.source_of(kernel))
        assert f".visible .entry {kernel.name}(" in text
        assert ".maxntid 128, 1, 1" in text
        assert ("mma.sync" in text) == (family in ON_TENSOR_CORES and dtype == "float16")
        assemble(text, tmp_path)


@pytest.mark.slow
def test_every_variant(variants, tmp_path):
    """There are 12 head dims, of which 9 may store dS; rows are read by chunks or elements, with
    dropout or without. A forward's keys may be divided; its parts are joined with dropout or
    without.
    """
    narrow, wide = 3, 9
    of_dtype = {
        "forward": 12 * 4,
        "forward of a part": 12 * 4,
        "joining": 2,
        "delta": 12 * 2,
        "dkv": (narrow + 2 * wide) * 4,
        "dq": 12 * 4,
        "dq from dS": wide * 2,
    }
    assert len(variants) == 3 * sum(of_dtype.values()) == 816
    for kernel in variants.values():
        assemble(ptx.compile(build.source_of(kernel)), tmp_path)


@pytest.mark.skipif(
    not (INCLUDE / "ATen/native/mps/kernels/PrefillAttention.h").exists(),
    reason="this torch has no Metal attention headers",
)
def test_kernels_of_pytorch(tmp_path):
    text = ptx.compile(PYTORCH, include_dirs=[INCLUDE], only=PYTORCH_KERNELS)
    assert sorted(re.findall(r"\.visible \.entry (\w+)\(", text)) == sorted(PYTORCH_KERNELS)
    assemble(text, tmp_path)


def test_equal_rate_uses_no_tensor_cores(variants, tmp_path):
    source = build.source_of(variants["attention_forward_float16_d64_r1_k32_b2_chunks"])
    text = ptx.compile(source, equal_rate=True)
    assert "mma.sync" not in text
    assert text.count("shfl.sync") > ptx.compile(source).count("shfl.sync")
    assemble(text, tmp_path)


FEATURES = """
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
constant int repeats [[function_constant(0)]];
inline uint length(constant const char* text) {
  uint n = 0;
  while (text[n] != 0) n++;
  return n;
}
[[max_total_threads_per_threadgroup(repeats * 32)]]
kernel void features(device float4* out [[buffer(0)]], constant float4& f [[buffer(1)]],
                     device atomic_uint* counter [[buffer(2)]],
                     device atomic_float* total [[buffer(3)]],
                     threadgroup float* dynamic [[threadgroup(1)]],
                     uint3 p [[thread_position_in_grid]],
                     uint t [[thread_index_in_threadgroup]]) {
  threadgroup atomic_int shared[1];
  atomic_fetch_max_explicit(shared, int(t), memory_order_relaxed);
  dynamic[t] = exp(f.x) + log(f.y) + tanh(f.z);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float x = simd_sum(dynamic[t ^ 33]) + quad_max(f.w) + simd_prefix_inclusive_sum(f.x);
  x += simd_broadcast_first(x) + float(simd_is_first()) + round(x);
  atomic_fetch_add_explicit(counter, popcount(uint(simd_ballot(x > 0))), memory_order_relaxed);
  atomic_fetch_add_explicit(total, x, memory_order_relaxed);
  simdgroup_bfloat8x8 a(1.0bf), b(2.0bf);
  simdgroup_float8x8 c(0.5f);
  simdgroup_multiply_accumulate(c, a, b, c);
  long2 wide = simd_shuffle(long2(p.x, p.y), 3);
  out[p.x] = float4(x, c.thread_elements()[0], float(wide.x), length("text"));
}
"""


def test_language(tmp_path):
    text = ptx.compile(FEATURES, function_constants={"repeats": 4})
    assert ".maxntid 128, 1, 1" in text
    assert "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32" in text
    assemble(text, tmp_path)


def test_errors_are_the_same_as_for_the_cpu():
    for body in ("double x = 1;", "o = 1;"):
        with pytest.raises(engine.CompileError, match="program_source:1"):
            ptx.compile(f"kernel void k(device float* o [[buffer(0)]]) {{ {body} }}")
