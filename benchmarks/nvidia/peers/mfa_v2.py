"""MFA v2 (metal-flash-attention as ccv has it): forward, dQ and dK/dV, seven products.

The text is what mlx-mfa's port of the generator writes (csrc/mfa of its sdist); grid, parameters
and buffers are those of csrc/mfa_attention.cpp (the ccv paths of MFAttention, MFABackwardQuery and
MFABackwardKeyValue), blocks those of resolve_block_config in csrc/mfa_shader_gen.cpp. mlx-mfa runs
it for float32 only; its backward takes as many key/value heads as query heads. dQ's kernel
computes delta, too. lse is in powers of two.

The engine takes the text with four changes: a fragment holds a lane's two elements instead of
Apple's opaque 64, products go through simdgroup_matrix, the threadgroup's memory is aligned, and
the smallest float, a name that the engine lacks, is a number. The compiler is told how many threads
a threadgroup has. Asynchronous copies are off, as in mlx-mfa itself.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Iterator

from . import generators
from .launches import Entrant, Step, Text, blocks
from .packages import MLX_MFA
from .problems import Problem

_uint32 = ctypes.c_uint32
_SIMD = """#pragma once
namespace simd {
template <class T, int N> using vector = T __attribute__((ext_vector_type(N)));
using uchar4 = vector<unsigned char, 4>;
using ushort2 = vector<unsigned short, 2>;
using ushort3 = vector<unsigned short, 3>;
using ushort4 = vector<unsigned short, 4>;
using uint2 = vector<unsigned, 2>;
}
template <class T> bool simd_all(T x) { return x[0] && x[1] && x[2]; }
inline simd::ushort4 simd_make_ushort4(simd::ushort3 x, unsigned short w) {
  return {x[0], x[1], x[2], w};
}
"""
_PROGRAM = """#include <cstdio>
#include <cstdlib>
#include "mfa_shader_gen.hpp"
int main(int, char** a) {
  using namespace mlx_mfa;
  ShaderCache::KernelKey key{};
  key.type = static_cast<ShaderCache::KernelKey::KernelType>(std::atoi(a[1]));
  key.head_dim = std::atoi(a[2]);
  key.causal = std::atoi(a[3]);
  key.is_m3_plus = std::atoi(a[4]);
  key.dtype = 2;
  const auto blocks = resolve_block_config(key.head_dim, key.is_m3_plus, false, false);
  key.block_q = blocks.block_q;
  key.block_k = blocks.block_k;
  key.block_d = blocks.block_d;
  std::fputs(generate_attention_source(key).c_str(), stdout);
}
"""
_SOURCES = (
    "mfa_shader_gen.cpp",
    "mfa/AttentionKernel.cpp",
    "mfa/AttentionKernelDescriptor.cpp",
    "mfa/CodeWriter.cpp",
    "mfa/GEMMHeaders.cpp",
)
_PRODUCT = (
    "t = __metal_simdgroup_matrix_8x8_multiply_accumulate"
    "(a.t, b.t, t, typename simdgroup_matrix_storage<T>::storage_type());"
)
_CHANGES = {
    "typedef vec<T, 64> storage_type;": "typedef vec<T, 2> storage_type;",
    _PRODUCT: (
        "simdgroup_matrix<U, 8, 8> left; simdgroup_matrix<V, 8, 8> right; "
        "simdgroup_matrix<T, 8, 8> sum; left.thread_elements() = a.t; "
        "right.thread_elements() = b.t; sum.thread_elements() = t; "
        "simdgroup_multiply_accumulate(sum, left, right, sum); t = sum.thread_elements();"
    ),
    "threadgroup uchar threadgroup_block[": "threadgroup float4 threadgroup_words[1 + ",
    "ushort2 morton_offset = morton_order(lane_id);": (
        "threadgroup uchar* threadgroup_block = (threadgroup uchar*)threadgroup_words; "
        "ushort2 morton_offset = morton_order(lane_id);"
    ),
}
_SMALLEST = ("numeric_limits<float>::denorm_min()", "1.40129846e-45f")
_HEAD = "kernel void attention("
#: part -> its number among mlx-mfa's kernels, buffers, results
_PARTS = {
    "forward": (0, {0: "q", 1: "k", 2: "v", 3: "out", 4: "lse_log2"}, ("out", "lse_log2")),
    "dq": (
        1,
        {0: "q", 1: "k", 2: "v", 3: "out", 4: "lse_log2", 5: "delta", 6: "dout", 9: "dq"},
        ("dq", "delta"),
    ),
    "dkv": (
        2,
        {0: "q", 1: "k", 2: "v", 3: "out", 4: "lse_log2", 5: "delta", 6: "dout", 7: "dv", 8: "dk"},
        ("dv", "dk"),
    ),
}
_PARAMS = 10
_ROWS = {"M1": 32, "M3": 16}
"""Rows of a block, eight to a simdgroup, at head dims 64 and 128 in float32."""


class Params(ctypes.Structure):
    """MFAParams of csrc/mfa_attention.cpp"""

    _fields_ = [
        *[(name, _uint32) for name in ("q_len", "kv_len", "num_heads", "group")],
        ("scale_log2", ctypes.c_float),
        ("causal", _uint32),
        *[(name, _uint32) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")],
    ]


def _text(problem: Problem, part: str, generation: str, name: str) -> Text:
    number, _, _ = _PARTS[part]
    built = generators.program(MLX_MFA, "mfa_v2", _PROGRAM, _SOURCES, {"simd/simd.h": _SIMD})
    numbers = (number, problem.head_dim, int(problem.causal), int(generation == "M3"))
    threads = _ROWS[generation] // 8 * 32
    head = f"[[kernel, max_total_threads_per_threadgroup({threads})]] void {name}("
    text = generators.text(built, numbers, _HEAD, head)
    for old, new in _CHANGES.items():
        if old not in text:
            raise ValueError(f"mlx-mfa {MLX_MFA.version}: MFA v2's text has no {old!r}")
        text = text.replace(old, new)
    text = re.sub(r"(threadgroup_words\[1 \+ )(\d+)", r"\1\2 / 16", text).replace(*_SMALLEST)
    return Text("#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\n" + text)


def _step(problem: Problem, part: str, generation: str) -> Step:
    batch, heads, length, head_dim = problem.sizes()
    of_q = heads * length * head_dim
    of_k = problem.num_kv_heads * length * head_dim
    params = Params(
        *(length, length, heads, problem.group, problem.scale * math.log2(math.e)),
        *(int(problem.causal), of_q, of_k, of_k, of_q, of_q, of_q, of_k, of_k),
    )
    _, buffers, writes = _PARTS[part]
    name = f"mfa_v2_{part}_{problem.dtype}_d{head_dim}_{generation.lower()}"
    return Step(
        part,
        name,
        (blocks(length, _ROWS[generation]) * heads * batch, 1, 1),
        (_ROWS[generation] // 8 * 32,),
        buffers,
        writes,
        (_PARAMS, params),
        lambda: _text(problem, part, generation, name),
    )


def entrants(problem: Problem) -> Iterator[Entrant]:
    if problem.dtype != "float32" or not problem.backward or problem.window:
        return
    for generation in _ROWS:
        forward = (_step(problem, "forward", generation),)
        yield Entrant("ccv/MFA", generation, False, forward)
        if problem.group == 1:
            backward = tuple(_step(problem, part, generation) for part in ("dq", "dkv"))
            yield Entrant("ccv/MFA", generation, True, backward)
