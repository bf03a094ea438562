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
_TANH = "METAL_FUNC float flex_tanh(float x) { return precise::tanh(x); }"
KERNEL = """
kernel void evaluate_NUMBER(device float* values [[buffer(0)]], device float* slopes [[buffer(1)]],
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


def source(mods: Sequence[Mod]) -> str:
    """A Metal source with the texts and a kernel for each that evaluates it."""
    parts = [(SHADERS / "flex_arithmetic.h").read_text(), CAPTURES, _TANH]
    for number, mod in enumerate(mods):
        kind = re.match(r"struct (\w+)", mod.text)[1]
        count = range(len(mod.captures))
        names = [f"const device uchar* c{n} [[buffer({10 + n})]]," for n in count]
        assignments = [f"mod.captures.tensors[{n}] = c{n};" for n in count]
        kernel = KERNEL.replace("CAPTURES", " ".join(names)).replace("MOD", f"{kind}{number}")
        kernel = kernel.replace("ASSIGNMENTS", "\n  ".join(assignments))
        kernel = kernel.replace("CALL", _CALLS[kind]).replace("NUMBER", str(number))
        parts += [mod.text.replace(f"struct {kind}", f"struct {kind}{number}"), kernel]
    return "".join(parts)


def evaluate(mods: Sequence[Mod], at: Points) -> list[tuple[Tensor, Tensor]]:
    """What each text gives at each point: (score, derivative), of a mask_mod (1 or 0, nothing).

    One compilation serves all texts.
    """
    library = engine.compile(source(mods), check=True)
    return [_launch(library, number, mod, at) for number, mod in enumerate(mods)]


def _launch(library: engine.Library, number: int, mod: Mod, at: Points) -> tuple[Tensor, Tensor]:
    count = len(at.score)
    values, slopes = np.zeros(count, np.float32), np.zeros(count, np.float32)
    places = torch.stack(at.indices, -1).contiguous().numpy()
    shapes = np.zeros((8, 8), np.int32)
    arguments = {0: values, 1: slopes, 2: at.score.contiguous().numpy(), 3: places, 4: shapes}
    for n, x in enumerate(mod.captures):
        shapes[n, : x.dim()], shapes[n, 4 : 4 + x.dim()] = x.shape, x.stride()
        flat = torch.empty(0, dtype=x.dtype).set_(x.detach().untyped_storage())
        arguments[10 + n] = flat[x.storage_offset() :].view(torch.uint8).numpy()
    group = (min(count, 64), 1, 1)
    arrays.launch(library, f"evaluate_{number}", (count, 1, 1), group, arguments)
    return torch.from_numpy(values), torch.from_numpy(slopes)


def score_text(score_mod: Callable) -> Mod:
    return lower(trace(score_mod, SCORE))


def mask_text(mask_mod: Callable) -> Mod:
    return lower(trace(mask_mod, MASK))


def torch_scores(score_mod: Callable, at: Points, dtype: torch.dtype = torch.float64) -> tuple:
    """PyTorch's (score, derivative) at each point, by vmap as its FlexAttention does."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    score = at.score.detach().clone().to(dtype).requires_grad_()
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


# ---- how far float32 arithmetic may be from the exact result ------------------------------------

_EXACT = frozenset(
    (
        *("where", "index", "neg", "abs", "maximum", "minimum", "fmax", "fmin", "clamp", "full"),
        *("full_like", "scalar_tensor", "clone", "alias", "_to_copy", "detach", "relu", "floor"),
        *("ceil", "round", "trunc", "sign", "zeros_like", "ones_like", "view", "expand", "copy"),
    )
)
_ARITHMETIC = frozenset(("add", "sub", "mul", "div", "reciprocal"))
_RUNS, _MARGIN, _ULPS = 6, 8.0, 8.0
_LARGEST = 1e35


class _Noisy(torch.fx.Interpreter):
    """A graph in float64, each float made wrong by about what float32 would: one rounding of
    arithmetic, _ULPS of a function. It remembers which points leave float32's range."""

    def __init__(self, graph: torch.fx.GraphModule, like: Tensor) -> None:
        super().__init__(graph)
        self.left_range = torch.zeros_like(like, dtype=torch.bool)

    def run_node(self, n: torch.fx.Node) -> object:
        found = super().run_node(n)
        if n.op != "call_function" or not isinstance(found, Tensor):
            return found
        if not found.is_floating_point():
            return found
        name = n.target.overloadpacket.__name__
        size = 0.0 if name in _EXACT else 1.0 if name in _ARITHMETIC else _ULPS
        if found.shape == self.left_range.shape:
            far = (found.abs() > _LARGEST) & ~found.isinf()
            self.left_range |= far | ((found != 0) & (found.abs() < 1 / _LARGEST))
        return found * (1 + size * 2**-24 * (2 * torch.rand_like(found) - 1))

    def call_function(self, target: object, args: tuple, kwargs: dict) -> object:
        wide = {torch.float32: torch.float64}
        args = tuple(wide.get(x, x) if isinstance(x, torch.dtype) else x for x in args)
        kwargs = {k: wide.get(x, x) if k == "dtype" else x for k, x in kwargs.items()}
        return super().call_function(target, args, kwargs)


class Exact(NamedTuple):
    value: Tensor
    slope: Tensor
    value_bound: Tensor
    """How far float32 arithmetic may be from it. Where rounding decides between two branches, the
    difference between them is in it."""
    slope_bound: Tensor
    counts: Tensor
    """Where every intermediate number is in float32's range."""


def exact(score_mod: Callable, at: Points) -> Exact:
    """float64 autograd of the function itself, and bounds from its graph, made noisy a few times.

    A random walk of n roundings is shorter than their sum by up to sqrt(3 n): hence the margin.
    """
    value, slope = torch_scores(score_mod, at)
    traced = trace(score_mod, SCORE)
    captures = [x.double() if x.dtype == torch.float32 else x for x in traced.captures]
    bounds = [torch.zeros_like(value), torch.zeros_like(value)]
    counts = value.isfinite() & slope.isfinite()
    for _ in range(_RUNS):
        run = _Noisy(traced.joint, value)
        found = run.run(at.score.double(), *at.indices, *captures)
        counts = counts & ~run.left_range
        for n, (x, true) in enumerate(zip(found, (value, slope))):
            bounds[n] = torch.maximum(bounds[n], (x - true).abs().nan_to_num(torch.inf))
    ulps = [_MARGIN * b + 2**-23 * x.abs() for b, x in zip(bounds, (value, slope))]
    return Exact(value, slope, *ulps, counts)


def check(name: str, found: tuple[Tensor, Tensor], true: Exact) -> None:
    """That a text's results are float64's, as far as float32 can."""
    assert true.counts.any(), f"{name}: no point counts"
    for what, x, y, bound in (
        ("score", found[0], true.value, true.value_bound),
        ("derivative", found[1], true.slope, true.slope_bound),
    ):
        error = torch.where(true.counts, (x.double() - y).abs(), 0.0)
        worst = (error - bound).argmax()
        assert error[worst] <= bound[worst], (
            f"{name}: {what} {x[worst].item()!r}, exactly {y[worst].item()!r}, "
            f"allowed {bound[worst].item():.3g}"
        )
