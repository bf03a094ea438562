"""Sinks and operands of +inf: what they make NaN, and what they must not reach."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch

from ..harness import DKV, DKV_PAIRS, DQ, FORWARD, Guarded, Sources, launch, request, with_seed
from .attention import F32, dense, kernel_of
from .compiled import compile_kernel
from .properties import Property

_LENGTH, _WIDTH = 20, 16


def _operands() -> dict[str, torch.Tensor]:
    """Of two heads; all but the first columns are 0."""
    names = ("query", "key", "value", "dout")
    operands = {name: torch.zeros(1, 2, _LENGTH, _WIDTH) for name in names}
    operands["key"][..., 0] = -1.0
    operands["value"][..., 0] = 1.0
    operands["dout"][..., 1] = 1.0
    return operands


def _run(
    sources: Sources, note: Callable[[str], None], family: str, inputs: dict[str, torch.Tensor],
    results: dict[str, tuple[int, ...]], **fields: float,
) -> dict[str, torch.Tensor]:  # fmt: skip
    shape = (1, 2, _LENGTH, _WIDTH)
    layouts = dict.fromkeys(("q", "k", "v", "out", "dout"), (shape, dense(shape), 0))
    asked = request(layouts, 2, family != FORWARD, scale=1.0, **fields)
    plan, params = sources.plan(asked)
    kernel = kernel_of(plan, family, _LENGTH)
    library = compile_kernel(sources, family, kernel, False)
    note("compiled")
    given = {
        name: Guarded.like(
            x if x.dim() == 4 else x.view(1, *(1,) * (3 - x.dim()), *x.shape), "dense"
        )
        for name, x in inputs.items()
    }
    found = {name: Guarded(of, dense(of), F32) for name, of in results.items()}
    strides = {name: dense(of) for name, of in results.items() if name != "row_stats"}
    block = with_seed(params, key_end=_LENGTH, **strides)
    launch(library, kernel, sources.buffers, block, given, found, workers=1)
    return {name: x.tensor for name, x in found.items()}


def sink(sources: Sources, note: Callable[[str], None]) -> None:
    """Rows with a key are NaN, of the first head alone; without one their output is 0."""
    inputs = _operands()
    inputs = {name: inputs[name] for name in ("query", "key", "value")}
    inputs["sinks"] = torch.tensor((math.inf, 0.5))
    shapes = {"out": (1, 2, _LENGTH, _WIDTH), "row_stats": (1, 2, _LENGTH, 2)}
    got = _run(sources, note, FORWARD, inputs, shapes, has_sinks=True, window_right=0, diagonal=-6)
    out, (origin, log_sum) = got["out"][0], got["row_stats"][0].unbind(-1)
    assert (out[:, :6] == 0).all() and out[0, 6:].isnan().all() and out[1, 6:].isfinite().all()
    assert origin[0, 6:].isnan().all() and (log_sum[0, 6:] == 0).all()
    assert not log_sum[0, 6:].signbit().any()
    assert (origin[0, :6] == math.inf).all() and (log_sum[:, :6] == 0).all()
    assert log_sum[:, :6].signbit().all() and got["row_stats"][0, 1].isfinite().all()


def capped(sources: Sources, note: Callable[[str], None], family: str) -> None:
    """A score of -inf is capped. In rows and keys beyond the last inf * 0 is NaN: its weight is 0,
    and so is the cap's derivative."""
    inputs = _operands()
    if family == DQ:
        inputs["query"][..., 3, 0] = math.inf
    else:
        inputs["query"][..., 0] = -1.0
        inputs["key"][..., 5, 0] = math.inf
    inputs["row_stats"] = torch.tensor((0.0, 3.0)).expand(1, 2, _LENGTH, 2).contiguous()
    inputs["delta"] = torch.zeros(2, _LENGTH)
    names = ("dq",) if family == DQ else ("dk", "dv")
    shapes = dict.fromkeys(names, (1, 2, _LENGTH, _WIDTH))
    got = _run(sources, note, family, inputs, shapes, softcap=2.0)
    assert all(x.isfinite().all() for x in got.values()), family


def properties() -> Iterator[Property]:
    yield Property(f"{FORWARD}: a sink of infinity", FORWARD, sink)
    for family in (DQ, DKV, DKV_PAIRS):
        test = functools.partial(capped, family=family)
        yield Property(f"{family}: a capped score of infinity", family, test)
