"""MLX's steel attention, a forward: headers of the mlx-metal wheel.

Tile and grid are those of GPUs before the M5 (mlx/backend/metal/scaled_dot_product_attention.cpp,
sdpa_full_self_attention_metal), lengths are whole blocks, and it writes lse, as for training.
MLX's own backward is not a kernel text of that wheel. ``function_constant`` on four parameters is
dropped: Metal leaves such an argument out, here it is a null pointer that nobody reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from .launches import Entrant, Step, Text, blocks
from .packages import MLX
from .problems import Problem

HEAD_DIMS = (64, 80, 128)
_ROOT = "mlx/include"
_HEADER = "mlx/backend/metal/kernels/steel/attn/kernels/steel_attention.h"
_ELEMENTS = {"float16": "half", "bfloat16": "bfloat", "float32": "float"}
_int32, _int64 = ctypes.c_int32, ctypes.c_int64
_SIMDGROUPS = 4

_SOURCE = """#include <metal_stdlib>
typedef half float16_t;
template <typename U> struct Limits {{
  static constexpr constant U finite_min = -metal::numeric_limits<U>::max();
}};
#include "{header}"
template [[host_name("{name}")]] [[kernel]] decltype({kernel}) {kernel};
"""


class Params(ctypes.Structure):
    """mlx::steel::AttnParams"""

    _fields_ = [
        *[(name, _int32) for name in ("batch", "num_heads", "head_dim", "q_len", "kv_len")],
        ("group", _int32),
        ("scale", ctypes.c_float),
        *[(name, _int32) for name in ("q_blocks", "k_blocks", "whole_q", "whole_k")],
        *[(name, _int32) for name in ("q_rest", "k_rest", "q_offset")],
        *[(name, _int64 * 3) for name in ("q", "k", "v", "out")],
    ]


def _tile(head_dim: int) -> tuple[int, int]:
    """Queries and keys of a block."""
    return 32, 32 if head_dim < 128 else 16


def strides(sizes: tuple[int, int, int, int]) -> ctypes.Array[_int64]:
    """Of batch, head and row, in elements."""
    _, heads, length, head_dim = sizes
    return (_int64 * 3)(heads * length * head_dim, length * head_dim, head_dim)


def _text(problem: Problem, name: str) -> Text:
    bq, bk = _tile(problem.head_dim)
    element, d = _ELEMENTS[problem.dtype], problem.head_dim
    kernel = f"attention<{element}, {bq}, {bk}, {d}, {d}, {_SIMDGROUPS}, 1, {element}, float>"
    conditions = ("has_mask", "has_sinks", "save_lse")
    edited = MLX.edited(_ROOT, _HEADER, {f", function_constant({x})": "" for x in conditions})
    constants = {200: True, 201: True, 300: False, 301: problem.causal, 302: False, 303: True}
    return Text(
        _SOURCE.format(header=_HEADER, name=name, kernel=kernel),
        {
            "include_dirs": [edited, MLX.file(_ROOT)],
            "defines": ["__METAL_MAYBE_FAST_MATH__=1"],
            "function_constants": constants,
        },
    )


def entrants(problem: Problem) -> Iterator[Entrant]:
    bq, bk = _tile(problem.head_dim)
    length = problem.length
    if problem.head_dim not in HEAD_DIMS or problem.window or length % bq or length % bk:
        return
    of_q, of_k = strides(problem.sizes()), strides(problem.sizes(of_keys=True))
    batch, heads, _, head_dim = problem.sizes()
    params = Params(
        *(batch, heads, head_dim, length, length, problem.group, problem.scale),
        *(length // bq, length // bk, length // bq, length // bk, 0, 0, 0),
        *(of_q, of_k, of_k, of_q),
    )
    name = f"mlx_attention_{problem.dtype}_d{head_dim}_{problem.mask}"
    step = Step(
        "forward",
        name,
        (blocks(length, bq), heads, batch),
        (32, _SIMDGROUPS),
        {0: "q", 1: "k", 2: "v", 3: "out", 8: "lse"},
        ("out", "lse"),
        (4, params),
        lambda: _text(problem, name),
    )
    yield Entrant("MLX", "", False, (step,))
