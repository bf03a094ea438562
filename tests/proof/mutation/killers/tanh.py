"""The tanh of softcap, at single points against float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from simulator.engine import arrays

from ..harness import Sources
from .compiled import compile_kernel
from .properties import Property

_TEXT = """kernel void tanh_of_points(const device float2* x [[buffer(0)]],
    device float2* out [[buffer(1)]], uint gid [[thread_position_in_grid]]) {
  out[gid] = tanh_log2(tanh_unit() * x[gid]);
}
"""
_SPECIAL = (0.0, math.inf, math.nan, 1.0, 44.0, 60.0, 3e38, 1e-30)
UNITS = 3.5
"""In the last place. Over all floats those of tanh_log2 are at most 2.34, and its operand is
rounded, too."""


def _points() -> torch.Tensor:
    """In pairs of numbers that differ, as each of a pair has its own."""
    sizes = torch.cat((torch.tensor(_SPECIAL), torch.linspace(0, 20, 3000),
                       torch.logspace(-9, 1, 3000)))  # fmt: skip
    return torch.stack((sizes, -sizes.flip(0)), -1)


def at_points(sources: Sources, note: Callable[[str], None], family: str) -> None:
    x = _points()
    name = f"{family}_tanh_of_points"
    kernel = {"name": name, "instantiation": _TEXT.replace("tanh_of_points", name)}
    library = compile_kernel(sources, family, kernel)
    note("compiled")
    out = np.full(x.shape, 77, np.float32)
    arrays.launch(library, name, (len(x), 1, 1), (1, 1, 1), {0: x.numpy(), 1: out})
    found = torch.from_numpy(out)
    right = torch.tanh(x.double())
    assert torch.equal(found.isnan(), right.isnan()), "NaN elsewhere"
    assert torch.equal(found.signbit()[~right.isnan()], right.signbit()[~right.isnan()])
    unit = torch.ldexp(torch.ones_like(right), torch.frexp(right).exponent - 24)
    error = ((found.double() - right).abs() / unit).nan_to_num(0.0, posinf=0.0)
    worst = int(error.argmax())
    assert error.max() <= UNITS, f"of {x.flatten()[worst]}: {error.max()} units"


def killers(family: str) -> Iterator[Property]:
    test = functools.partial(at_points, family=family)
    yield Property("softcap's tanh at single points", family, test)
