"""Kernels on problems whose scores are not plain: their plans, their buffers, their launches."""

from __future__ import annotations

import functools

import torch
from simulator import engine
from torch import Tensor

from ..harness import (
    DELTA,
    DKV,
    DKV_PAIRS,
    DMASK,
    DMASK_FROM_DS,
    DMASK_ROWS,
    DMASK_SUM,
    DMASK_SUM_KEYS,
    DQ,
    DQ_FROM_DS,
    DSINKS,
    DTYPE_NUMBERS,
    FORWARD,
    MASK_MAP,
    Guarded,
    Params,
    Sources,
    launch,
    request,
    with_seed,
)  # fmt: skip
from .attention import F32, DscoreRows, dense, repository
from .score_problems import Scores, given

WRITTEN = {
    MASK_MAP: ("mask_map",), FORWARD: ("out", "row_stats"),
    DELTA: ("delta", "sink_parts", "range_hulls"), DKV: ("dk", "dv", "ds", "dmask_parts"),
    DKV_PAIRS: ("dk", "dv", "ds", "dmask_parts"), DQ: ("dq",), DQ_FROM_DS: ("dq",),
    DMASK: ("dmask",), DMASK_FROM_DS: ("dmask",), DMASK_ROWS: ("dmask",), DMASK_SUM: ("dmask",),
    DMASK_SUM_KEYS: ("dmask",), DSINKS: ("dsinks",),
}  # fmt: skip
ALONE = {
    MASK_MAP: ("mask", "key_ranges"), DSINKS: ("sink_parts",), DMASK_SUM: ("dmask_parts",),
    DMASK_SUM_KEYS: ("dmask_parts",),
}  # fmt: skip
"""What is bound where it is not all that there is."""
IN_PARTS = (DMASK, DMASK_FROM_DS)
"""What threadgroups may share an element of dmask in, each with a part of its own."""
_OPERANDS = {"q": "query", "k": "key", "v": "value", "out": "out", "dout": "dout"}


def plan_of(problem: Scores, sources: Sources, out: Tensor, backward: bool) -> tuple[dict, Params]:
    x = given(problem)
    tensors = x.tensors | {"out": out}
    layouts = {
        short: (tensors[name].shape, tensors[name].stride(), 0) for short, name in _OPERANDS.items()
    }
    number = DTYPE_NUMBERS[problem.case.dtype]
    scratch = problem.store_ds << 40
    plan, params = sources.plan(
        request(
            layouts,
            number,
            backward,
            gpu_cores=int(backward),
            stores_ds=True,
            scratch_bytes=scratch,
            **x.fields,
        )
    )
    assert not plan["refusal"], plan["refusal"]
    for kernel in plan["kernels"]:
        if problem.parts and kernel["family"] in IN_PARTS:
            kernel["groups"][0] = kernel["groups"][0] // params.dmask_parts * problem.parts
            params.dmask_parts = problem.parts
    return plan, params


def _empty_out(problem: Scores) -> Tensor:
    x = given(problem).tensors
    return torch.empty((*x["query"].shape[:3], x["value"].shape[3]), dtype=problem.case.dtype)


def _flat(x: Tensor) -> Guarded:
    """Its memory, whatever its shape."""
    guarded = Guarded(tuple(x.shape), x.stride(), x.dtype)
    guarded.tensor.copy_(x)
    return guarded


def _shapes(
    problem: Scores, plan: dict, params: Params
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    x, case, mask = given(problem).tensors, problem.case, given(problem).mask
    ranges = x.get("key_ranges", torch.empty(1, 1, 1))
    rows = tuple(x["query"].shape[:3])
    return {
        "out": ((*rows, x["value"].shape[3]), case.dtype), "row_stats": ((*rows, 2), F32),
        "delta": (rows, F32), "sink_parts": ((*rows[:2], -(-rows[2] // 8)), F32),
        "dq": (tuple(x["query"].shape), case.dtype), "dk": (tuple(x["key"].shape), case.dtype),
        "dv": (tuple(x["value"].shape), case.dtype), "dsinks": ((rows[1],), F32),
        "mask_map": ((max(plan["map_elements"], 1), 2), torch.int32),
        "ds": (DscoreRows.of(params).shape(rows[0] * rows[1]), F32),
        "range_hulls": ((*ranges.shape[:2], -(-rows[2] // 8), 6), torch.int32),
        "dmask": (tuple(mask.sizes) if mask else (1,), x["mask"].dtype if mask else F32),
        "dmask_parts": (
            (*rows[:2], case.kv_len) if params.has_key_sums
            else (params.dmask_parts, params.dmask_elements), F32,
        ),
    }  # fmt: skip


def launched(
    problem: Scores, kernel: dict, plan: dict, params: Params, known: dict[str, Tensor],
    library: engine.Library, numbers: dict[str, int],
) -> tuple[dict[str, Tensor], engine.Counters]:  # fmt: skip
    family, shapes = kernel["family"], _shapes(problem, plan, params)
    written = set(WRITTEN[family])
    if not problem.store_ds:
        written.discard("ds")
    if "sinks" not in known:
        written.discard("sink_parts")
    if "key_ranges" not in known:
        written.discard("range_hulls")
    if not params.has_key_sums:
        written.discard("dmask_parts")
    if family in IN_PARTS and plan["dmask_part_elements"]:
        shapes["dmask"] = shapes["dmask_parts"]
    outputs = {name: Guarded(s, dense(s), t) for name, (s, t) in shapes.items() if name in written}
    inputs = {name: _flat(x) for name, x in known.items() if name not in written}
    if family in ALONE:
        inputs = {name: x for name, x in inputs.items() if name in ALONE[family]}
    place_of = given(problem).mask
    if place_of is not None and "mask" in inputs:  # as the host binds it, at its first element
        memory = inputs["mask"]
        size = memory.tensor.element_size()
        memory.extent -= place_of.offset
        first = memory.tensor.data_ptr() + place_of.offset * size
        memory.buffer = lambda writable, first=first, memory=memory: engine.Buffer(  # type: ignore[method-assign]
            first, memory.extent * memory.tensor.element_size(), writable
        )
    strides = {
        name: shaped.tensor.stride()
        for name, shaped in outputs.items()
        if name in ("out", "dq", "dk", "dv")
    }
    block = with_seed(
        params, has_dlse=int("dlse" in known), key_end=problem.case.kv_len,
        **{name: tuple(s) for name, s in strides.items()},
    )  # fmt: skip
    counters = launch(library, kernel, numbers, block, inputs, outputs, workers=1)
    return {name: x.tensor.clone() for name, x in outputs.items()}, counters


@functools.cache
def _library(line: str, family: str) -> engine.Library:
    return engine.compile(repository().text(family) + line)


@functools.cache
def left_by_the_repository(problem: Scores) -> dict[str, Tensor]:
    """Every buffer after a forward and a backward by the repository's kernels."""
    sources, known = repository(), dict(given(problem).tensors)
    out = torch.empty(
        (*known["query"].shape[:3], known["value"].shape[3]), dtype=problem.case.dtype
    )
    for backward in (False, True):
        plan, params = plan_of(problem, sources, out, backward)
        for kernel in plan["kernels"]:
            library = _library(kernel["instantiation"], kernel["family"])
            results, _ = launched(problem, kernel, plan, params, known, library, sources.buffers)
            if kernel["family"] in IN_PARTS and plan["dmask_part_elements"]:
                results = {"dmask_parts": results["dmask"]}
            known |= results
    return known
