"""Variants of every kernel: all that plain scores have, and what scores may have beside."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from mutation.harness import (
    BOOL,
    CACHE_FAMILIES,
    DTYPE_NUMBERS,
    FAMILIES,
    OTHER_FAMILIES,
    MaskPlace,
    Sources,
    request,
)

from benchmarks.planner import Kernel

_LENGTH = 64
_MANY = 256


@functools.cache
def variants() -> dict[str, list[dict]]:
    """By family: the plan's kernels for each dtype and head dim, each way of loading, dropout.

    Scores of every kind have both loads of one narrow and one wide head dim.
    """
    sources = Sources()
    head_dims = sources.head_dims()
    found: dict[str, dict[str, dict]] = {family: {} for family in (*FAMILIES, *OTHER_FAMILIES)}
    for dtype in DTYPE_NUMBERS.values():
        for head_dim in (*head_dims, *(d - 1 for d in head_dims), 168):
            shape = (1, 2, _LENGTH, head_dim)
            layout = (shape, torch.empty(shape, device="meta").stride(), 0)
            layouts = dict.fromkeys(("q", "k", "v", "out", "dout"), layout)
            scores = scores_of(dtype) if head_dim in (64, 127) else ({},)
            if head_dim in (168, 191):  # beside narrower values
                shape = (1, 2, _LENGTH, 128)
                layout = (shape, torch.empty(shape, device="meta").stride(), 0)
                layouts |= dict.fromkeys(("v", "out", "dout"), layout)
            for backward, dropout_p, scratch_bytes, score in itertools.product(
                (False, True), (0.0, 0.5), (0, 1 << 20), scores
            ):
                numbers = {"dropout_p": dropout_p, "scratch_bytes": scratch_bytes}
                wanted = score | {"mask_grad": backward and "mask" in score}
                plan, _ = sources.plan(request(layouts, dtype, backward, **numbers, **wanted))
                for kernel in plan["kernels"]:
                    found[kernel["family"]][kernel["name"]] = kernel
        for kernel in _of_divided_groups(sources, dtype):
            found[kernel["family"]][kernel["name"]] = kernel
    every = {family: list(kernels.values()) for family, kernels in found.items()}
    return every | _of_caches(sources)


def _of_divided_groups(sources: Sources, dtype: int) -> Iterator[dict]:
    """Of a backward that divides a group of 8 query heads."""
    for head_dim, dropout_p in itertools.product((16, 64, 80, 127, 256), (0.0, 0.5)):
        shapes = {"q": (1, 8, _LENGTH, head_dim), "k": (1, 1, _LENGTH, head_dim)}
        shapes |= {"v": shapes["k"], "out": shapes["q"], "dout": shapes["q"]}
        layouts = {
            name: (shape, torch.empty(shape, device="meta").stride(), 0)
            for name, shape in shapes.items()
        }
        asked = request(layouts, dtype, True, dropout_p=dropout_p, scratch_bytes=1 << 24)
        plan, params = sources.plan(asked)
        assert params.dkv_parts == 2
        yield from plan["kernels"]


def _of_caches(sources: Sources) -> dict[str, list[dict]]:
    """Of the ops for caches: every dtype, width, number of rows, way of loading, kind of score."""
    found: dict[str, dict[str, dict]] = {family: {} for family in CACHE_FAMILIES}
    widths = (64, 63, 128, 192, 256)
    for dtype, width, value, heads, paged, softcap, alibi in itertools.product(
        DTYPE_NUMBERS.values(), widths, widths, (8, 16), (0, 1), (0.0, 2.0), (False, True)
    ):
        shapes = {
            "q": (2, heads, 1, width),
            "k": (2, 1, _LENGTH, width),
            "v": (2, 1, _LENGTH, value),
            "out": (2, heads, 1, value),
        }
        layouts = {
            name: (shape, torch.empty(shape, device="meta").stride(), 0)
            for name, shape in shapes.items()
        }
        cache = {"page_size": _LENGTH, "entries": 2, "paged": paged, "pages": 1, "table_row": 1}
        plan = sources.decode(layouts, dtype, cache, softcap=softcap, has_alibi=alibi)
        append = sources.append(layouts["k"], layouts["k"], dtype, {})
        kernels = [*plan.kernels, *append.kernels]
        if width == value and width in (63, 64, 256) and not paged:
            kernels += _of_few_queries(sources, layouts, dtype, softcap=softcap, has_alibi=alibi)
        for kernel in kernels:
            found[kernel.family][kernel.name] = vars(kernel)
    return {family: list(kernels.values()) for family, kernels in found.items()}


def _of_few_queries(
    sources: Sources, layouts: dict[str, tuple], dtype: int, **score: float
) -> Iterator[Kernel]:
    """Of forwards on the decode kernel: every kind of mask, with and without key ranges."""
    many = dict(layouts)
    for name in ("k", "v"):
        batch, heads, _, width = layouts[name][0]
        shape = (batch, heads, _MANY, width)
        many[name] = (shape, torch.empty(shape, device="meta").stride(), 0)
    masks: list[dict] = [{}]
    for of_mask in sorted({BOOL, dtype, DTYPE_NUMBERS[torch.float32]}):
        sizes, strides = (1, 1, 1, 1, _MANY), (_MANY,) * 4 + (1,)
        masks.append({"mask": MaskPlace(sizes, strides, 0, 1, of_mask)})
    for ranges, mask in itertools.product((False, True), masks):
        plan = sources.forward_as_decode(many, dtype, has_key_ranges=ranges, **score, **mask)
        assert plan is not None
        yield from plan.kernels


def scores_of(dtype: int) -> tuple[dict, ...]:
    """Fields of a request: every kind of score for operands of a dtype."""
    full = _LENGTH * _LENGTH
    masks: list[dict] = [{}]
    for of_mask, offset in itertools.product({BOOL, dtype, DTYPE_NUMBERS[torch.float32]}, (0, 1)):
        sizes, strides = (1, 1, 1, _LENGTH, _LENGTH), (full, full, full, _LENGTH, 1)
        masks.append({"mask": MaskPlace(sizes, strides, offset, 1, of_mask)})
    for sizes in ((1, 1, 1, 1, _LENGTH), (1, 1, 1, _LENGTH, 1)):  # of keys, of rows
        strides = (_LENGTH, _LENGTH, _LENGTH, 1 if sizes[4] == 1 else _LENGTH, 1)
        masks.append({"mask": MaskPlace(sizes, strides, 0, 1, dtype)})
    return tuple(
        {"softcap": softcap, "has_alibi": alibi, "has_sinks": sinks, **mask}
        for mask, softcap, alibi, sinks in itertools.product(
            masks, (0.0, 2.0), (False, True), (False, True)
        )
    )
