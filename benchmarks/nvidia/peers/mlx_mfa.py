"""mlx-mfa's STEEL backward, dQ and dK/dV: seven products, from the generator in its sdist.

Grids, parameters and buffers: MFASteelBwdDQ::eval_gpu and MFASteelBwdDKV::eval_gpu of
csrc/mfa_attention.cpp; tiles: select_steel_block_config of csrc/mfa_steel_fwd.cpp. mlx-mfa runs
them if backend="mfa" is asked for; its automatic choice may be MLX's own backward, and its forward
is MLX's. It computes delta by several MLX operations, for which our one kernel stands in. It needs
lse in powers of two.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from . import generators
from .launches import Entrant, Step, Text, blocks
from .mlx import strides
from .packages import MLX_MFA
from .problems import Problem

_DTYPES = ("float16", "bfloat16")  # the numbers of its KernelKey
_LOG2_E = 1.4426950408889634
_int32, _int64 = ctypes.c_int32, ctypes.c_int64


class Params(ctypes.Structure):
    """MFASteelBackwardParams of csrc/mfa_steel_bwd.hpp"""

    _fields_ = [
        *[(name, _int32) for name in ("batch", "num_heads", "head_dim", "q_len", "kv_len")],
        ("group", _int32),
        ("scale", ctypes.c_float),
        ("scale_log2", ctypes.c_float),
        *[(name, _int32) for name in ("q_blocks", "k_blocks", "whole_q", "whole_k")],
        *[(name, _int32) for name in ("q_rest", "k_rest", "q_offset")],
        *[(name, _int64 * 3) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")],
        ("lse", _int64 * 2),
    ]


def generations(head_dim: int) -> tuple[str, ...]:
    """Tiles of M1 and M2, and of M3 and M4, where they differ."""
    return ("M1",) if head_dim == 64 else ("M1", "M3")


_PROGRAM = """#include <cstdio>
#include <cstdlib>
#include "mfa_steel_bwd.hpp"
int main(int, char** a) {
  using namespace mlx_mfa;
  ShaderCache::KernelKey key{};
  const bool dq = std::atoi(a[1]);
  key.type = dq ? ShaderCache::KernelKey::KernelType::SteelBackwardDQ
                : ShaderCache::KernelKey::KernelType::SteelBackwardDKV;
  key.head_dim = std::atoi(a[2]);
  key.causal = std::atoi(a[3]);
  key.is_m3_plus = std::atoi(a[4]);
  key.dtype = std::atoi(a[5]);
  key.gqa_factor = std::atoi(a[6]);
  const auto text = dq ? generate_steel_backward_dq_source(key)
                       : generate_steel_backward_dkv_source(key);
  std::fputs(text.c_str(), stdout);
}
"""


_SOURCES = ("mfa_steel_bwd.cpp", "mfa_steel_fwd.cpp")


def _text(problem: Problem, part: str, generation: str, name: str) -> Text:
    numbers = (
        int(part == "dq"),
        problem.head_dim,
        int(problem.causal),
        int(generation == "M3"),
        _DTYPES.index(problem.dtype),
        problem.group,
    )
    built = generators.program(MLX_MFA, "steel", _PROGRAM, _SOURCES, {})
    head = f"void mlx_mfa_bwd_{part}("
    return Text(generators.text(built, numbers, head, f"void {name}("))


def _params(problem: Problem, bq: int, bk: int) -> Params:
    batch, heads, length, head_dim = problem.sizes()
    of_q, of_k = strides(problem.sizes()), strides(problem.sizes(of_keys=True))
    scale = problem.scale
    return Params(
        *(batch, heads, head_dim, length, length, problem.group, scale, scale * _LOG2_E),
        *(blocks(length, bq), blocks(length, bk), length // bq, length // bk),
        *(length % bq, length % bk, 0),
        *(of_q, of_k, of_k, of_q, of_q, of_q, of_k, of_k),
        (_int64 * 2)(heads * length, length),
    )


def entrants(problem: Problem) -> Iterator[Entrant]:
    if problem.dtype not in _DTYPES or not problem.backward or problem.window:
        return
    batch, heads, length, head_dim = problem.sizes()
    bq, narrow = 32, 32 if head_dim == 64 else 16
    group = f"_g{problem.group}" * (problem.group > 1)

    def name(part: str, generation: str) -> str:
        where = f"{problem.dtype}_d{head_dim}_{generation.lower()}_{problem.mask}{group}"
        return f"mlx_mfa_{part}_{where}"

    def step(part: str, generation: str, own: int, bk: int, buffers: dict[int, str]) -> Step:
        kernel = name(part, generation)
        size, of = (bq, heads) if part == "dq" else (bk, problem.num_kv_heads)
        return Step(
            part,
            kernel,
            (blocks(length, size), of, batch),
            (own,),
            buffers,
            ("dq",) if part == "dq" else ("dk", "dv"),
            (max(buffers) + 1, _params(problem, bq, bk)),
            lambda: _text(problem, part, generation, kernel),
        )

    read = {0: "q", 1: "k", 2: "v", 3: "out", 4: "lse_log2"}
    for generation in generations(head_dim):
        wide = 32 if generation == "M3" else narrow
        of_dq = read | {5: "dout", 6: "delta", 7: "dq"}
        of_dkv = read | {5: "delta", 6: "dout", 7: "dk", 8: "dv"}
        steps = (
            step("dq", generation, 128, wide, of_dq),
            step("dkv", "M1", 32, narrow, of_dkv),  # one tile for all generations
        )
        variant = generation if len(generations(head_dim)) > 1 else ""
        yield Entrant("mlx-mfa", variant, True, steps, borrows_delta=True)
