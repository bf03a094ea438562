"""Sinks and operands of +inf: what they make NaN, and what they must not reach."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..harness import (
    DELTA,
    DKV,
    DKV_PAIRS,
    DMASK_ROWS,
    DQ,
    FORWARD,
    Guarded,
    MaskPlace,
    Sources,
    launch,
    request,
    with_seed,
)
from .attention import F32, dense, kernel_of
from .compiled import compile_kernel
from .properties import Property

_LENGTH, _WIDTH = 20, 16
_WITH_STRIDES = ("out", "dq", "dk", "dv")


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
    results: dict[str, tuple[int, ...]], **fields: Any,
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
    strides = {name: dense(of) for name, of in results.items() if name in _WITH_STRIDES}
    block = with_seed(params, key_end=_LENGTH, has_dlse=int("dlse" in inputs), **strides)
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


def sink_of_rows_without_a_key(sources: Sources, note: Callable[[str], None]) -> None:
    """The lse of 8 rows is their sink, +inf, whose gradient is theirs."""
    inputs = {"dout": _operands()["dout"], "out": torch.zeros(1, 2, _LENGTH, _WIDTH)}
    inputs["row_stats"] = torch.tensor((0.0, 3.0)).expand(1, 2, _LENGTH, 2).contiguous()
    inputs["row_stats"][0, 0, :8] = torch.tensor((math.inf, -0.0))
    inputs["dlse"] = torch.zeros(2, _LENGTH)
    inputs["dlse"][0, :8] = 2.0
    inputs["sinks"] = torch.tensor((math.inf, 0.5))
    shapes = {"delta": (2, _LENGTH), "sink_parts": (2, 3)}
    window = {"window_right": 0, "diagonal": -8}
    got = _run(sources, note, DELTA, inputs, shapes, has_sinks=True, **window)
    assert got["sink_parts"][0, 0] == 8 * 2.0
    assert (got["sink_parts"][1] == 0).all()


def rows_of_a_mask(sources: Sources, note: Callable[[str], None]) -> None:
    """The gradient of what all keys of a row add: that of its lse, though it be infinite, and NaN
    where the row is, or its output's gradient."""
    of_out, of_lse = torch.zeros(2, _LENGTH), torch.full((2, _LENGTH), 0.5)
    stats = torch.tensor((0.0, 3.0)).repeat(1, 2, _LENGTH, 1)
    of_out[0, 1], of_lse[0, 1] = -math.inf, math.inf
    of_out[0, 2] = math.inf
    of_out[1, 3] = math.nan
    stats[0, 0, 4] = torch.tensor((math.nan, 0.0))
    expected = of_lse.clone()
    expected[0, 2] = expected[0, 4] = expected[1, 3] = math.nan
    sizes = (1, 1, 2, _LENGTH, 1)
    got = _run(
        sources, note, DMASK_ROWS, {"row_stats": stats, "delta": of_out, "dlse": of_lse},
        {"dmask": (2, _LENGTH)}, mask=MaskPlace(sizes, dense(sizes), 0, 1, 2), mask_grad=True,
    )  # fmt: skip
    torch.testing.assert_close(got["dmask"], expected, rtol=0.0, atol=0.0, equal_nan=True)


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
    for family, test in ((FORWARD, sink), (DELTA, sink_of_rows_without_a_key)):
        yield Property(f"{family}: a sink of infinity", family, test)
    yield Property(f"{DMASK_ROWS}: infinite gradients", DMASK_ROWS, rows_of_a_mask)
    for family in (DQ, DKV, DKV_PAIRS):
        test = functools.partial(capped, family=family)
        yield Property(f"{family}: a capped score of infinity", family, test)
