"""Exact dynamic counts of kernels in the steady state, from the simulator's engine.

A kernel runs on one threadgroup with two lengths along its loop; the difference is what whole,
unmasked blocks cost, the rest is what a threadgroup does once. No clock is involved: the same text
and compiler give the same numbers.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .peers import prefill
from .structures import METAL

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "tests", "tests/proof")]

from mutation import harness  # noqa: E402
from simulator import engine  # noqa: E402
from simulator.engine import arrays  # noqa: E402

FORWARD, DELTA, DKV, DKV_PAIRS, DQ, DQ_FROM_DS = harness.FAMILIES
#: The mask's gradient: a block of the loop is a batch entry that shares the mask.
DMASK, DMASK_FROM_DS = MASK_GRADIENTS = harness.DMASK, harness.DMASK_FROM_DS
#: The key's side as it runs before DQ_FROM_DS: it stores dS. (DKV alone runs beside DQ.)
STORING = {name: f"{name} storing dS" for name in (DKV, DKV_PAIRS)}
DKV_STORING, DKV_PAIRS_STORING = STORING.values()
TEMPLATES = {stored: name for name, stored in STORING.items()}
PREFILL = "prefill_attention"
HEAD_DIMS = (32, 64, 80, 96, 128, 256)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHORT, LONG = 2, 4  #: blocks of the two launches
#: Key ranges of which each block is seen in part; in those that are called LISTED alone, whole.
LISTED, EDGES = "key ranges", "key ranges, edges"
#: What a score may have besides the product; masks have a full matrix, of which each block is seen
#: in part.
SCORES = (
    "softcap",
    "alibi",
    "bias",
    "bias, element by element",
    "bool mask",
    "sinks",
    LISTED,
    EDGES,
)


@dataclass(frozen=True)
class Variant:
    """A kernel of the plan."""

    family: str  #: of the template
    name: str
    instantiation: str
    bq: int
    bk: int
    threads: int
    params: bytes
    numbers: tuple[tuple[str, int], ...]  #: buffer indices

    @property
    def simdgroups(self) -> int:
        return self.threads // 32

    @property
    def arguments(self) -> list[str]:
        """Of the template."""
        inside = re.search(rf"decltype\({self.family}<([^<>]*)", self.instantiation)
        assert inside, self.instantiation
        return [x.strip() for x in inside[1].split(",")][:-1]  # the last one is the Variant


@dataclass(frozen=True)
class Counts:
    """Counts of one simdgroup: its products, the bytes of all lanes, other things for each lane.

    `steady` is for one block of the loop, `once` for a threadgroup's beginning and end."""

    simdgroups: int
    threadgroup_bytes: int
    steady: dict[str, float]
    once: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


# ---- from the engine's numbers


def _flatten(counters: engine.Counters, mix: dict[str, int]) -> dict[str, float]:
    """Instructions for each lane, products for each simdgroup, bytes of all lanes."""
    lanes = 32
    flat: dict[str, float] = {
        "mma_half": counters.mma_half,
        "mma_bfloat": counters.mma_bfloat,
        "mma_float": counters.mma_float,
        "exp2": counters.exps / lanes,
        "log2": counters.logs / lanes,
        "shuffle": counters.simd_ops / lanes,
        "barrier": counters.threadgroup_barriers / lanes,
        "simdgroup_barrier": counters.simd_barriers / lanes,
        "device_bytes_read": counters.device_bytes_read,
        "device_bytes_written": counters.device_bytes_written,
        "threadgroup_bytes_read": counters.threadgroup_bytes_read,
        "threadgroup_bytes_written": counters.threadgroup_bytes_written,
    }
    for name, number in mix.items():
        # Spills of this machine's compiler to a lane's stack say nothing about a GPU's.
        if name != "private":
            flat[name] = number / lanes
    return flat


def _counts(
    short: tuple[engine.Counters, dict],
    long: tuple[engine.Counters, dict],
    simdgroups: int,
    blocks: tuple[int, int],
) -> Counts:
    a, b = _flatten(*short), _flatten(*long)
    names = sorted(a.keys() | b.keys())
    extra = blocks[1] - blocks[0]
    steady = {x: (b.get(x, 0) - a.get(x, 0)) / extra for x in names}
    once = {x: a.get(x, 0) - blocks[0] * steady[x] for x in names}

    def per_simdgroup(values: dict[str, float]) -> dict[str, float]:
        return {x: round(n / simdgroups, 4) for x, n in values.items() if n}

    memory = long[0].threadgroup_memory
    return Counts(simdgroups, memory, per_simdgroup(steady), per_simdgroup(once))


# ---- our kernels


@cache
def _sources() -> harness.Sources:
    return harness.Sources().compile_plan()


def _request(
    dtype: str,
    head_dim: int,
    q_len: int,
    kv_len: int,
    backward: bool,
    scratch_bytes: int = 0,
    score: str = "",
    batch: int = 1,
    value_dim: int = 0,
) -> Any:
    """One head of each batch entry. Where these are several, the mask's gradient is asked for. No
    forward divides its keys, as on a full GPU."""

    def dense(length: int, width: int) -> tuple[Sequence[int], Sequence[int], int]:
        size = length * width
        return (batch, 1, length, width), (size, size, width, 1), 0

    layouts = {x: dense(q_len, value_dim or head_dim) for x in ("out", "dout")}
    layouts |= {"q": dense(q_len, head_dim), "k": dense(kv_len, head_dim)}
    layouts |= {"v": dense(kv_len, value_dim or head_dim)}
    number = harness.DTYPE_NUMBERS[DTYPES[dtype]]
    fields: dict[str, Any] = dict(scale=head_dim**-0.5, scratch_bytes=scratch_bytes)
    cores = 1 if backward else 0  # kUndivided of native/plan/problem.h
    fields |= dict(gpu_cores=cores, stores_ds=scratch_bytes > 0)
    fields |= dict(softcap=20.0 * (score == "softcap"), has_alibi=score == "alibi")
    fields |= dict(has_sinks=score == "sinks", has_key_ranges=score in (LISTED, EDGES))
    fields |= dict(mask_grad=batch > 1)
    if "bias" in score or "mask" in score:
        of_mask = harness.BOOL if score == "bool mask" else number
        odd = score == "bias, element by element"
        fields["mask"] = harness.MaskPlace(
            (1, 1, 1, q_len, kv_len), (0, 0, 0, kv_len, 1), int(odd), 1, of_mask
        )
    return harness.request(layouts, number, backward, **fields)


@dataclass(frozen=True)
class Launch:
    """A dispatch of the plan."""

    family: str
    heads: int  #: key/value heads, or query heads on the query's side
    blocks: int  #: threadgroups of a head
    key_begin: int
    key_end: int


@cache
def backward_launches(
    dtype: str, head_dim: int, length: int, heads: int, scratch_bytes: int, gpu_cores: int
) -> tuple[Launch, ...]:
    """What the plan launches for a dense self-attention, in order."""
    size = length * head_dim
    layout = ((1, heads, length, head_dim), (heads * size, size, head_dim, 1), 0)
    layouts = dict.fromkeys(("q", "k", "v", "out", "dout"), layout)
    number = harness.DTYPE_NUMBERS[DTYPES[dtype]]
    request = harness.request(
        layouts, number, True, scale=1.0, scratch_bytes=scratch_bytes, gpu_cores=gpu_cores
    )
    plan, _ = _sources().plan(request)
    names = [kernel["family"] for kernel in plan["kernels"]]
    if DQ_FROM_DS in names:
        names = [STORING.get(name, name) for name in names]
    return tuple(
        Launch(names[kernel], groups_x, groups_y, key_begin, key_end)
        for kernel, groups_x, groups_y, _, key_begin, key_end in plan["launches"]
    )


class NoVariant(LookupError):
    """The plan has no such kernel for this head_dim: dS is never stored there, or the key's side
    has its other form."""


def variant(
    family: str,
    dtype: str,
    head_dim: int,
    q_len: int = 64,
    kv_len: int = 64,
    score: str = "",
    batch: int = SHORT,
    value_dim: int = 0,
) -> Variant:
    """The kernel that the plan chooses for a dense problem, with one of SCORES. MASK_GRADIENTS
    alone have a batch. A `value_dim` of 0 is that of the queries."""
    storing = family in (*TEMPLATES, DQ_FROM_DS, DMASK_FROM_DS)
    batch = batch if family in MASK_GRADIENTS else 1
    backward, scratch = family != FORWARD, (1 << 40) * storing
    request = _request(dtype, head_dim, q_len, kv_len, backward, scratch, score, batch, value_dim)
    plan, params = _sources().plan(request)
    template = TEMPLATES.get(family, family)
    kernels = {k["family"]: k for k in plan["kernels"]}
    if template not in kernels or (storing and DQ_FROM_DS not in kernels):
        raise NoVariant(f"{family} {dtype} head_dim {head_dim}")
    kernel = kernels[template]
    threads = kernel["threads"]
    tile = {name: int(n) for name, n in re.findall(r"\b(BQ|BK) (\d+)", kernel["tile"])}
    if family == DELTA:
        tile = dict(BQ=threads // 32 * 8, BK=0)
    elif family == DMASK_FROM_DS:
        tile = dict(BQ=harness.MAP_BLOCK, BK=harness.MAP_BLOCK)
    return Variant(
        template,
        kernel["name"],
        kernel["instantiation"],
        tile["BQ"],
        tile["BK"],
        threads,
        harness.with_seed(params, key_end=kv_len, dmask_parts=1),
        tuple(_sources().buffers.items()),
    )


def has(family: str, dtype: str, head_dim: int) -> bool:
    """Whether the plan ever takes this kernel."""
    if family == PREFILL:
        return True
    try:
        variant(family, dtype, head_dim)
    except NoVariant:
        return False
    return True


def _program(v: Variant) -> str:
    return _sources().text(v.family) + v.instantiation


def _listed_keys(q_len: int, kv_len: int, edges: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """key_ranges of all keys, where there are `edges` of the first one alone for every other query,
    and the hulls of 8 queries each (shaders/ranges.h)."""
    ranges = torch.zeros(q_len, 4, dtype=torch.int32)
    ranges[:, 1] = kv_len
    ranges[:, 2] = torch.arange(q_len)
    if edges:
        ranges[1::2, 1] = 1
    of_all = 1 if edges else kv_len
    hull = torch.tensor((0, kv_len, 0, of_all, 0, 0), dtype=torch.int32)
    return ranges, hull.repeat(-(-q_len // 8))


def _launch(
    v: Variant,
    dtype: str,
    head_dim: int,
    q_len: int,
    kv_len: int,
    score: str,
    batch: int,
    value_dim: int,
    more: Mapping[int, torch.Tensor] | None = None,
) -> tuple:
    """One threadgroup. `more` are tensors by the index of their buffer."""
    library = engine.compile(_program(v), check=True)
    numbers = dict(v.numbers)
    generator = torch.Generator().manual_seed(0)
    batch = batch if v.family in MASK_GRADIENTS else 1

    def draw(length: int, width: int) -> torch.Tensor:
        shape = (batch, 1, length, width)
        return torch.randn(shape, generator=generator).to(DTYPES[dtype])

    q, dq = (draw(q_len, head_dim) for _ in range(2))
    out, dout = (draw(q_len, value_dim or head_dim) for _ in range(2))
    k, dk = (draw(kv_len, head_dim) for _ in range(2))
    v_, dv = (draw(kv_len, value_dim or head_dim) for _ in range(2))
    delta, dlse = (torch.zeros(batch, 1, q_len) for _ in range(2))
    row_stats = torch.zeros(batch, 1, q_len, 2)
    ds = torch.zeros(batch * -(-q_len // 8) * -(-kv_len // 8) * 64)
    mask = torch.ones(q_len * kv_len + 1)
    blocks = -(-q_len // 32) * -(-kv_len // 32)
    mask_map = torch.tensor((-1, 0), dtype=torch.int32).repeat(blocks)  # keys seen, not by all
    per_head = torch.ones(1)
    key_ranges, range_hulls = _listed_keys(q_len, kv_len, score == EDGES)
    tensors = dict(
        query=q,
        key=k,
        value=v_,
        out=out,
        row_stats=row_stats,
        dout=dout,
        dlse=dlse,
        delta=delta,
        dq=dq,
        dk=dk,
        dv=dv,
        ds=ds,
        mask=mask,
        mask_map=mask_map,
        alibi_slopes=per_head,
        sinks=per_head,
        sink_parts=torch.zeros(q_len),
        dmask=torch.zeros(q_len, kv_len),
        key_ranges=key_ranges,
        range_hulls=range_hulls,
    )
    block = torch.frombuffer(bytearray(v.params), dtype=torch.uint8).clone()
    bound = {numbers[name]: x for name, x in tensors.items()} | dict(more or {})
    buffers = {
        number: engine.Buffer(x.data_ptr(), x.numel() * x.element_size())
        for number, x in bound.items()
    }
    buffers[numbers["params"]] = engine.Buffer(block.data_ptr(), len(v.params), False)
    grid = (v.threads, 1, 1)
    return library.instruction_mix(v.name, grid, (v.threads, 1, 1), buffers, workers=1)


@cache
def count(family: str, dtype: str, head_dim: int, score: str = "", value_dim: int = 0) -> Counts:
    """A kernel of ours, or PyTorch's prefill kernel (causal, as published). What has no loop
    (DELTA) is all `once`."""
    if family == PREFILL:
        return _count_prefill(dtype, head_dim)
    v = variant(family, dtype, head_dim, score=score, value_dim=value_dim)

    def launch(q_len: int, kv_len: int, batch: int = 1) -> tuple:
        sized = variant(family, dtype, head_dim, q_len, kv_len, score, batch, value_dim)
        return _launch(sized, dtype, head_dim, q_len, kv_len, score, batch, value_dim)

    if family == DELTA:
        only = launch(v.bq, v.bq)
        return _counts(only, only, v.simdgroups, (0, 1))
    results = []
    for blocks in (SHORT, LONG):
        if family in MASK_GRADIENTS:
            results.append(launch(v.bq, v.bk, blocks))
            continue
        lengths = (v.bq * blocks, v.bk) if v.family in STORING else (v.bq, v.bk * blocks)
        results.append(launch(*lengths))
    return _counts(*results, v.simdgroups, (SHORT, LONG))


def compile_all(cases: Sequence[tuple[str, str, int, str]], jobs: int = 2) -> None:
    """Fills the engine's cache from several processes."""
    ours = [_program(variant(*case, score=score)) for *case, score in cases if case[0] != PREFILL]
    for error in engine.compile_many(ours, check=True, jobs=jobs):
        if error:
            raise error


# ---- PyTorch's kernel, from the wheel

INCLUDE = Path(torch.__file__).parent / "include"
PREFILL_HEADER = INCLUDE / "ATen" / "native" / "mps" / "kernels" / "PrefillAttention.h"
PREFILL_SOURCE = """
#include <c10/metal/utils.h>
#include <metal_simdgroup>
#include <metal_stdlib>
using namespace metal;
#include <ATen/native/mps/kernels/PrefillAttention.h>
"""


def _prefill_name(dtype: str, head_dim: int) -> str:
    tile = prefill(METAL[dtype], head_dim)
    return (
        f"prefill_attention_{dtype}_bq{tile.bq}_bk{tile.bk}_bd{head_dim}_wm{tile.simdgroups}_wn1"
        f"_hm0_dc1_mask{dtype}"
    )


def _count_prefill(dtype: str, head_dim: int) -> Counts:
    """Causal: a threadgroup of the i-th BQ rows takes (i + 1) BQ / BK blocks, so two threadgroups
    less twice the first one leave BQ / BK blocks."""
    tile = prefill(METAL[dtype], head_dim)
    name = _prefill_name(dtype, head_dim)
    library = engine.compile(PREFILL_SOURCE, check=True, include_dirs=[INCLUDE], only=[name])
    results = []
    for groups in (1, 2):
        n = groups * tile.bq
        rng = np.random.default_rng(0)
        kind = np.float32 if dtype == "float32" else np.uint16
        q, k, v, out = (
            (rng.standard_normal((n, head_dim)).astype(np.float16).view(np.uint16))
            if kind is np.uint16
            else rng.standard_normal((n, head_dim)).astype(kind)
            for _ in range(4)
        )
        strides = [n * head_dim, n * head_dim, head_dim] * 4
        parameters = struct.pack("6i2f12i", 1, 1, head_dim, n, n, 1, head_dim**-0.5, 1.0, *strides)
        arguments = {0: q, 1: k, 2: v, 3: out, 4: parameters}
        grid, group = (groups * 32, tile.simdgroups, 1), (32, tile.simdgroups, 1)
        results.append(arrays.launch(library, name, grid, group, arguments, writable=[3], mix=True))
    a, b = (_flatten(*r) for r in results)
    per_row_block = tile.bq // tile.bk
    names = sorted(a.keys() | b.keys())
    steady = {x: (b.get(x, 0) - 2 * a.get(x, 0)) / per_row_block for x in names}
    once = {x: a.get(x, 0) - per_row_block * steady[x] for x in names}

    def per_simdgroup(values: dict[str, float]) -> dict[str, float]:
        return {x: round(n / tile.simdgroups, 4) for x, n in values.items() if n}

    memory = results[0][0].threadgroup_memory
    return Counts(tile.simdgroups, memory, per_simdgroup(steady), per_simdgroup(once))
