"""Sums of so many terms that their rounding shows whether they are made in parts (long_sum.h)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from ..harness import (
    DMASK_FROM_DS,
    DMASK_SUM,
    DTYPE_NUMBERS,
    Guarded,
    MaskPlace,
    Sources,
    launch,
    request,
    with_seed,
)  # fmt: skip
from .attention import F32, dense
from .compiled import compile_kernel
from .properties import Property

_TERMS, _ROWS, _WIDTH = 10_000, 8, 64
_SQUARE = (_ROWS, _ROWS)


def _dense(*shape: int) -> Guarded:
    return Guarded(shape, dense(shape), F32)


def sums_in_parts(sources: Sources, note: Callable[[str], None], family: str) -> None:
    """10,000 times 0.1: one sum would be wrong by 800 roundings, that in parts is by 11."""
    shape = (_TERMS, 1, _ROWS, _WIDTH)
    layouts = {name: (shape, dense(shape), 0) for name in ("q", "k", "v", "out", "dout")}
    number = DTYPE_NUMBERS[F32]
    place = MaskPlace((1, 1, 1, *_SQUARE), (0, 0, 0, _ROWS, 1), 0, _TERMS, number)
    scratch = 1 << 40 if family == DMASK_FROM_DS else 0
    plan, params = sources.plan(
        request(
            layouts, number, True, stores_ds=True, scratch_bytes=scratch, mask=place, mask_grad=True
        )
    )
    kernel = next(dict(k) for k in plan["kernels"] if k["family"] == family)
    kernel["groups"] = (1, 1)
    library = compile_kernel(sources, family, kernel)
    note("compiled")
    if family == DMASK_SUM:
        params.dmask_parts = _TERMS
        inputs = {"dmask_parts": _dense(_TERMS, *_SQUARE)}
    else:
        params.dmask_parts = 1
        inputs = {"ds": _dense(_TERMS, 1, 1, *_SQUARE), "mask_map": _dense(1, 2)}
        inputs["mask_map"].tensor.view(torch.int32).copy_(torch.tensor((-1, 1)))
    terms = inputs.get("dmask_parts") or inputs["ds"]
    terms.tensor.fill_(0.1)
    outputs = {"dmask": _dense(*_SQUARE)}
    launch(library, kernel, sources.buffers, with_seed(params), inputs, outputs, workers=1)
    expected = _TERMS * terms.tensor.double().flatten()[0]
    error = (outputs["dmask"].tensor.double() - expected).abs().max()
    assert error <= 100 * torch.finfo(F32).eps * expected, f"wrong by {error}"


def properties() -> Iterator[Property]:
    for family in (DMASK_SUM, DMASK_FROM_DS):
        test = functools.partial(sums_in_parts, family=family)
        yield Property(f"{family}: a sum of many terms in parts", family, test)
