"""mlx-train-perf's attention: forward, D, dQ and dK/dV (seven products), one simdgroup each.

The bodies come from attention/kernel/source.py of its wheel, which only writes text; grids, names
of arguments and the table of slabs from launch.py and dispatch.py beside it. A slab is how many
columns of an accumulator are held at once. Its table takes 32 at head dim 64 and 128 at 128; 64
stands beside it, in its favour. It splits long problems against the watchdog of macOS; here each
kernel is one launch. dk and dv are sums in float32 from zeros, cast at the end: zeros and casts are
launches, too, here by PyTorch's kernels. It takes bfloat16 and float32, causal only. A threadgroup
has 32 threads, as there, and the compiler is told so.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import types
from collections.abc import Iterator

from .launches import Entrant, Step, Text, blocks
from .packages import MLX_TRAIN_PERF
from .problems import Problem

_ELEMENTS = {"float16": "half", "bfloat16": "bfloat", "float32": "float"}
_ROWS = 32
_int32 = ctypes.c_int32

#: part -> its arguments in order: name there, operand here, type in Metal ("T": of the operands)
_ARGUMENTS = {
    "forward": (
        ("q", "q", "T"), ("k", "k", "T"), ("v", "v", "T"), ("qoffs", "rows", "constant uint"),
        ("scale_in", "", "constant float"), ("q_shape", "q_sizes", "constant int"),
        ("k_shape", "k_sizes", "constant int"), ("o_out", "out", "T"), ("l_out", "lse", "float"),
    ),
    "delta": (
        ("d_o", "dout", "T"), ("o", "out", "T"), ("d_o_shape", "", "constant int"),
        ("d_out", "delta", "float"),
    ),
    "dq": (
        ("q", "q", "T"), ("k", "k", "T"), ("v", "v", "T"), ("d_o", "dout", "T"),
        ("lse", "lse", "float"), ("d_arr", "delta", "float"), ("qoffs", "rows", "constant uint"),
        ("scale_in", "", "constant float"), ("q_shape", "q_sizes", "constant int"),
        ("k_shape", "k_sizes", "constant int"), ("dq_out", "dq", "T"),
    ),
    "dkv": (
        ("q", "q", "T"), ("k", "k", "T"), ("v", "v", "T"), ("d_o", "dout", "T"),
        ("lse", "lse", "float"), ("d_arr", "delta", "float"), ("dk_in", "dk_zeros", "float"),
        ("dv_in", "dv_zeros", "float"), ("qoffs", "rows", "constant uint"),
        ("scale_in", "", "constant float"), ("q_shape", "q_sizes", "constant int"),
        ("k_shape", "k_sizes", "constant int"), ("dk_out", "dk", "float"),
        ("dv_out", "dv", "float"),
    ),
}  # fmt: skip
_WRITES = {"forward": ("out", "lse"), "delta": ("delta",), "dq": ("dq",), "dkv": ("dk", "dv")}
_POSITIONS = (
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
)
_SOURCE = """#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
typedef {element} T;
[[kernel, max_total_threads_per_threadgroup(32)]] void {name}({arguments}) {{
{body}
}}
"""


class Scale(ctypes.Structure):
    _fields_ = [("scale", ctypes.c_float)]


class Sizes(ctypes.Structure):
    _fields_ = [("sizes", _int32 * 4)]


@functools.cache
def _builders() -> types.ModuleType:
    """Its source.py, which imports nothing."""
    path = MLX_TRAIN_PERF.file("mlx_train_perf/attention/kernel/source.py")
    spec = importlib.util.spec_from_file_location("mlx_train_perf_source", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def slabs(head_dim: int) -> tuple[int, ...]:
    """What its table takes, and another."""
    return (32, 64) if head_dim == 64 else (128, 64)


def _body(problem: Problem, part: str, slab: int) -> str:
    builders = _builders()
    if part == "delta":
        return str(builders.build_bwd_D_source(problem.head_dim))
    build = {
        "forward": builders.build_fwd_mma_source,
        "dq": builders.build_bwd_dq_mma_source,
        "dkv": builders.build_bwd_dkv_mma_source,
    }[part]
    return str(build(problem.head_dim, causal=True, d_slab=slab))


def _text(problem: Problem, part: str, slab: int, name: str) -> Text:
    arguments = []
    for index, (argument, operand, kind) in enumerate(_ARGUMENTS[part]):
        const = "" if operand in _WRITES[part] else "const "
        space = kind if kind.startswith("constant") else f"device {kind}"
        arguments.append(f"{const}{space}* {argument} [[buffer({index})]]")
    arguments += [f"uint3 {position} [[{position}]]" for position in _POSITIONS]
    source = _SOURCE.format(
        element=_ELEMENTS[problem.dtype],
        name=name,
        arguments=", ".join(arguments),
        body=_body(problem, part, slab),
    )
    return Text(source.encode("ascii", "ignore").decode())  # others stand in comments only


def step(problem: Problem, part: str, slab: int) -> Step:
    batch, heads, length, head_dim = problem.sizes()
    name = f"mlx_train_perf_{part}_{problem.dtype}_d{head_dim}"
    groups = (blocks(length, _ROWS), batch * heads, 1)
    params: ctypes.Structure = Scale(problem.scale)
    if part == "delta":
        groups = (1, length, batch * heads)
        params = Sizes((_int32 * 4)(*problem.sizes()))
    else:
        name += f"_s{slab}"
    if part == "dkv":
        groups = (groups[0], batch * problem.num_kv_heads, 1)
    operands = [operand for _, operand, _ in _ARGUMENTS[part]]
    buffers = {index: operand for index, operand in enumerate(operands) if operand}
    by_value = (operands.index(""), params)
    return Step(
        part,
        name,
        groups,
        (_ROWS,),
        buffers,
        _WRITES[part],
        by_value,
        lambda: _text(problem, part, slab, name),
    )


def entrants(problem: Problem) -> Iterator[Entrant]:
    if not problem.causal or not problem.backward or problem.window:
        return
    offered = problem.dtype != "float16"
    delta = step(problem, "delta", 0)
    for slab in slabs(problem.head_dim):
        variant = f"slab {slab}"
        forward = (step(problem, "forward", slab),)
        yield Entrant("mlx-train-perf", variant, False, forward, offered)
        backward = (delta, step(problem, "dq", slab), step(problem, "dkv", slab))
        yield Entrant("mlx-train-perf", variant, True, backward, offered, wide=("dk", "dv"))
