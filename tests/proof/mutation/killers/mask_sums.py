"""Long sums of the mask's gradient: what is summed up would lose its last bits in one chain."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..harness import (
    DMASK_FROM_DS,
    DMASK_SUM,
    Guarded,
    MaskPlace,
    Params,
    Sources,
    launch,
    request,
    with_seed,
)
from .attention import F32, dense
from .compiled import compile_kernel
from .properties import Property

_TERMS = 1 << 14
_TERM = 1 + 2.0**-11  # sums above 2^12 do not hold its last bit, sums of 64 of them do


def _plan(sources: Sources, batch: int, size: int, family: str) -> tuple[dict, Params]:
    shapes = {"q": 64, "k": 64, "v": 64, "out": 64, "dout": 64}
    layouts = {
        name: ((batch, 1, size, d), dense((batch, 1, size, d)), 0) for name, d in shapes.items()
    }
    mask = MaskPlace((1, 1, 1, size, size), (0, 0, 0, size, 1), 0, 1, 2)
    plan, params = sources.plan(
        request(layouts, 2, True, mask=mask, mask_grad=True, stores_ds=True, scratch_bytes=1 << 40)
    )
    return next(kernel for kernel in plan["kernels"] if kernel["family"] == family), params


def _guarded(x: Tensor) -> Guarded:
    shape = tuple(x.shape)
    y = Guarded(shape, dense(shape), x.dtype)
    y.tensor.copy_(x)
    return y


def _run(sources: Sources, note: Callable[[str], None], kernel: dict, params: Params,
         inputs: dict[str, Tensor], elements: int, check: bool) -> Tensor:  # fmt: skip
    library = compile_kernel(sources, kernel["family"], kernel, check)
    note("compiled")
    out = Guarded((elements,), (1,), F32)
    launch(library, kernel, sources.buffers, with_seed(params),
           {name: _guarded(x) for name, x in inputs.items()}, {"dmask": out},
           workers=1)  # fmt: skip
    return out.tensor


def long_sums_of_parts(
    sources: Sources, note: Callable[[str], None], terms: int, check: bool = False
) -> None:
    kernel, params = _plan(sources, 2, 6, DMASK_SUM)
    params.dmask_parts = terms
    parts = torch.full((terms, 36), _TERM)
    got = _run(sources, note, kernel, params, {"dmask_parts": parts}, 36, check)
    assert (got == terms * _TERM).all(), "sums of parts"


def long_sums_of_ds(
    sources: Sources, note: Callable[[str], None], terms: int, check: bool = False
) -> None:
    kernel, params = _plan(sources, terms, 8, DMASK_FROM_DS)
    kernel["groups"][0] = params.dmask_parts = 1
    params.key_end = 8
    ds = torch.full((terms, 8, 8), _TERM)
    passing = torch.tensor(((1, 1),), dtype=torch.int32)
    got = _run(sources, note, kernel, params, {"ds": ds, "mask_map": passing}, 64, check)
    assert (got == terms * _TERM).all(), "sums of dS"


def properties() -> Iterator[Property]:
    for family, test in ((DMASK_SUM, long_sums_of_parts), (DMASK_FROM_DS, long_sums_of_ds)):
        yield Property(f"{family}: long sums", family, functools.partial(test, terms=_TERMS))


def checked() -> Iterator[Property]:
    for family, test in ((DMASK_SUM, long_sums_of_parts), (DMASK_FROM_DS, long_sums_of_ds)):
        few = functools.partial(test, terms=200, check=True)
        yield Property(f"{family}: long sums, checked", family, few)
