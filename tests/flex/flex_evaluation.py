"""Runs the text of a score_mod or mask_mod at points (score, b, h, q, kv), and PyTorch's own.

The text's kernel here is one thread a point, with captures as the attention kernels give them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from simulator import engine
from simulator.engine import arrays
from torch import Tensor

from orchard_ops.flex.metal import lower
from orchard_ops.flex.mod import Mod
from orchard_ops.flex.trace import MASK, SCORE, trace

SHADERS = Path(__file__).resolve().parents[2] / "shaders"
CAPTURES = """
struct FlexCaptures {
  const device uchar* tensors[8];
  const device int* shapes;  // of each: four sizes, four strides

  template <typename T>
  METAL_FUNC T at(int n) const {
    return reinterpret_cast<const device T*>(tensors[n])[0];
  }
  template <typename T>
  METAL_FUNC T at(int n, int i) const {
    return reinterpret_cast<const device T*>(tensors[n])[place(n, 0, i)];
  }
  template <typename T>
  METAL_FUNC T at(int n, int i, int j) const {
    return reinterpret_cast<const device T*>(tensors[n])[place(n, 0, i) + place(n, 1, j)];
  }
  template <typename T>
  METAL_FUNC T at(int n, int i, int j, int k) const {
    return reinterpret_cast<const device T*>(
        tensors[n])[place(n, 0, i) + place(n, 1, j) + place(n, 2, k)];
  }
  template <typename T>
  METAL_FUNC T at(int n, int i, int j, int k, int l) const {
    return reinterpret_cast<const device T*>(
        tensors[n])[place(n, 0, i) + place(n, 1, j) + place(n, 2, k) + place(n, 3, l)];
  }
  METAL_FUNC int place(int n, int dim, int i) const {
    const int size = shapes[8 * n + dim];
    return clamp(i < 0 ? i + size : i, 0, size - 1) * shapes[8 * n + 4 + dim];
  }
};
"""
KERNEL = """
kernel void evaluate(device float* values [[buffer(0)]], device float* slopes [[buffer(1)]],
    const device float* s [[buffer(2)]], const device int* places [[buffer(3)]],
    const device int* shapes [[buffer(4)]], CAPTURES
    uint gid [[thread_position_in_grid]]) {
  MOD mod;
  ASSIGNMENTS
  mod.captures.shapes = shapes;
  const int b = places[4 * gid];
  const int h = places[4 * gid + 1];
  const int q = places[4 * gid + 2];
  const int kv = places[4 * gid + 3];
  CALL
}
"""
_CALLS = {
    "ScoreMod": "float slope = 0.0f;\n  values[gid] = mod.score(s[gid], b, h, q, kv, slope);\n"
    "  slopes[gid] = slope;",
    "MaskMod": "values[gid] = mod.sees(b, h, q, kv) ? 1.0f : 0.0f;",
}


class Points(NamedTuple):
    score: Tensor
    b: Tensor
    h: Tensor
    q: Tensor
    kv: Tensor

    @property
    def indices(self) -> tuple[Tensor, ...]:
        return tuple(self[1:])


def points(batch: int, heads: int, q_len: int, kv_len: int, scale: float = 3.0) -> Points:
    """Every place of an attention of that size, with scores around 0."""
    shape = (batch, heads, q_len, kv_len)
    indices = torch.meshgrid(*(torch.arange(n, dtype=torch.int32) for n in shape), indexing="ij")
    score = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    return Points(*(x.flatten() for x in (score, *indices)))


def source(text: str, captures: Sequence[Tensor] = ()) -> str:
    """A Metal source with the text and the kernel that evaluates it."""
    kind = re.match(r"struct (\w+)", text)[1]
    names = [f"const device uchar* c{n} [[buffer({10 + n})]]," for n in range(len(captures))]
    assignments = [f"mod.captures.tensors[{n}] = c{n};" for n in range(len(captures))]
    kernel = KERNEL.replace("CAPTURES", " ".join(names)).replace("MOD", kind)
    kernel = kernel.replace("ASSIGNMENTS", "\n  ".join(assignments)).replace("CALL", _CALLS[kind])
    arithmetic = (SHADERS / "flex_arithmetic.h").read_text()
    return f"{arithmetic}{CAPTURES}{text}{kernel}"


def evaluate(mod: Mod, at: Points) -> tuple[Tensor, Tensor]:
    """What the text gives at each point: (score, derivative), of a mask_mod (1 or 0, nothing)."""
    count = len(at.score)
    values, slopes = np.zeros(count, np.float32), np.zeros(count, np.float32)
    places = torch.stack(at.indices, -1).contiguous().numpy()
    shapes = np.zeros((8, 8), np.int32)
    arguments = {0: values, 1: slopes, 2: at.score.contiguous().numpy(), 3: places, 4: shapes}
    for n, x in enumerate(mod.captures):
        shapes[n, : x.dim()], shapes[n, 4 : 4 + x.dim()] = x.shape, x.stride()
        flat = torch.empty(0, dtype=x.dtype).set_(x.detach().untyped_storage())
        begin = x.storage_offset()
        arguments[10 + n] = flat[begin:].view(torch.uint8).numpy()
    library = engine.compile(source(mod.text, mod.captures), check=True)
    arrays.launch(library, "evaluate", (count, 1, 1), (min(count, 64), 1, 1), arguments)
    return torch.from_numpy(values), torch.from_numpy(slopes)


def score_text(score_mod: Callable) -> Mod:
    return lower(trace(score_mod, SCORE))


def mask_text(mask_mod: Callable) -> Mod:
    return lower(trace(mask_mod, MASK))


def torch_scores(score_mod: Callable, at: Points, dtype: torch.dtype = torch.float64) -> tuple:
    """PyTorch's (score, derivative) at each point, by vmap as its FlexAttention does."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    score = at.score.to(dtype).requires_grad_()
    with TransformGetItemToIndex():
        found = torch.vmap(score_mod)(score, *at.indices)
    slope = None
    if found.requires_grad:
        (slope,) = torch.autograd.grad(found.sum(), score, allow_unused=True)
    return found.detach(), torch.zeros_like(score) if slope is None else slope


def torch_seen(mask_mod: Callable, at: Points) -> Tensor:
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    with TransformGetItemToIndex():
        return torch.vmap(mask_mod)(*at.indices)
