"""Positions beyond 32 bits."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from simulator import engine
from torch import Tensor

from ..harness import DELTA, DQ, DQ_FROM_DS, FORWARD, Sources, request, with_seed
from .attention import F32, KEYS_SIDE, kernel_of
from .compiled import compile_kernel
from .properties import Property

_FAR = 1 << 28  # ORCHARD_MAX_LENGTH
_MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on


class Sparse:
    """float32 numbers in memory that exists only where it is touched."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], behind: int = 0):
        length = sum((n - 1) * s for n, s in zip(shape, strides)) + 1 + behind
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._memory = mmap.mmap(-1, 4 * length, flags=flags)
        self.flat = torch.frombuffer(self._memory, dtype=F32)
        self.tensor = self.flat.as_strided(shape, strides)
        self.buffer = engine.Buffer(self.flat.data_ptr(), 4 * length)

    def as_integers(self) -> Tensor:
        """The tensor's bits."""
        x = self.tensor
        return self.flat.view(torch.int32).as_strided(x.shape, x.stride())


def _far_results(sources: Sources, note: Callable[[str], None], family: str, q_len: int,
                 strides: tuple[int, ...], kv_heads: int = 1, heads: int = 12,
                 sinks: bool = False) -> dict[str, Tensor]:  # fmt: skip
    """Heads of q_len queries, of which 32 run, and two keys of width 2, these strides apart.

    The keys' gradients have adjacent columns, whatever the keys have.
    """
    keys = (1, kv_heads, 2, 2)
    generator = torch.Generator().manual_seed(3)
    rows, stats = (1, heads, 32, 2), (heads, 32)
    sizes = {"query": rows, "key": keys, "value": keys, "out": rows, "dout": rows,
             "row_stats": (*stats, 2), "dlse": stats, "delta": stats, "dq": rows,
             "dk": keys, "dv": keys}  # fmt: skip
    packed = {"key": strides, "value": strides}
    if strides[-1] == 1:
        packed |= {"dk": strides, "dv": strides}
    x = {}
    for name, shape in sizes.items():
        place_ = packed.get(name, (0, 70, 2, 1)) if len(shape) == 4 else (q_len, 1)
        place_ = (2 * q_len, 2, 1) if name == "row_stats" else place_
        x[name] = Sparse(shape, place_)
        x[name].tensor.copy_(torch.randn(shape, generator=generator))
    if sinks:
        x["sinks"] = Sparse((heads,), (1,))
        x["sinks"].tensor.copy_(torch.randn(heads, generator=generator))
        x["sink_parts"] = Sparse((heads, 4), (q_len // 8, 1))
    layouts = {
        short: ((1, t.shape[1], length, 2), tuple(t.stride()), 0)
        for short, t, length in (
            ("q", x["query"].tensor, q_len), ("k", x["key"].tensor, 2),
            ("v", x["value"].tensor, 2), ("out", x["out"].tensor, q_len),
            ("dout", x["dout"].tensor, q_len),
        )
    }  # fmt: skip
    plan, params = sources.plan(request(
        layouts, 2, family != FORWARD, scale=1.0, window_left=8, window_right=8, has_sinks=sinks
    ))  # fmt: skip
    kernel = kernel_of(plan, family, 2)
    library = compile_kernel(sources, family, kernel)
    note("compiled")
    own = {name: tuple(x[name].tensor.stride()) for name in ("out", "dq", "dk", "dv")}
    block = torch.frombuffer(bytearray(with_seed(params, has_dlse=1, **own)), dtype=torch.uint8)
    block = block.clone()
    numbers = sources.buffers
    buffers = {numbers[name]: tensor.buffer for name, tensor in x.items()}
    buffers[numbers["params"]] = engine.Buffer(block.data_ptr(), len(block), False)
    groups = (kernel["groups"][0] * kernel["threads"], 1, 1)
    library.launch(kernel["name"], groups, (kernel["threads"], 1, 1), buffers, workers=1)
    wanted = {FORWARD: ("out", "row_stats"), DELTA: ("delta",), DQ: ("dq",)}
    if sinks:
        wanted = {DELTA: ("sink_parts",)}
    return {name: x[name].tensor.clone() for name in wanted.get(family, ("dk", "dv"))}


def positions_beyond_32_bits(
    sources: Sources, note: Callable[[str], None], family: str, q_len: int,
    strides: tuple[int, ...], **heads: Any,
) -> None:  # fmt: skip
    """Far apart in memory, the same numbers give the same results."""
    near = _far_results(sources, note, family, 32, (0, 6, 3, 1), **heads)
    far = _far_results(sources, note, family, q_len, strides, **heads)
    for name in near:
        assert torch.equal(near[name], far[name]), name


def _far_ds(
    sources: Sources, note: Callable[[str], None], family: str, q_len: int, kv_len: int = 16
) -> dict[str, Tensor]:
    """Two heads, q_len queries of which 64 run; dS has q_len / 8 columns. The first 64 keys."""
    generator = torch.Generator().manual_seed(4)
    rows, keys, stats = (1, 2, 64, 64), (1, 2, kv_len, 64), (2, 64)
    key_end = min(kv_len, 64)
    x = {}
    for name in ("query", "dout", "dq", "key", "value", "dk", "dv", "row_stats", "delta"):
        shape = {"key": keys, "value": keys, "dk": keys, "dv": keys}.get(name, rows)
        shape = {"row_stats": (*stats, 2), "delta": stats}.get(name, shape)
        place_ = {3: (2 * q_len, 2, 1), 2: (q_len, 1)}.get(len(shape), (0, 70 * 64, 64, 1))
        x[name] = Sparse(shape, place_)
        x[name].tensor.copy_(torch.randn(shape, generator=generator))
    blocks = -(-q_len // 8)
    key_blocks = key_end // 8
    ds = (2, key_blocks, 8, 8, 8)  # head, key block, query block, key, query
    tiles = 2 * key_blocks * blocks * 64
    behind = 2 * q_len * 64 if kv_len > key_end else 0  # dq's sums
    x["ds"] = Sparse(ds, (key_blocks * blocks * 64, blocks * 64, 64, 8, 1), behind)
    if family == DQ_FROM_DS:
        x["ds"].tensor.copy_(torch.randn(ds, generator=generator))
    layouts = {
        short: ((1, 2, length, 64), tuple(x[name].tensor.stride()), 0)
        for short, name, length in (
            ("q", "query", q_len), ("k", "key", kv_len), ("v", "value", kv_len),
            ("out", "dout", q_len),
            ("dout", "dout", q_len),
        )
    }  # fmt: skip
    plan, params = sources.plan(request(
        layouts, 2, True, scale=1.0, window_left=8, window_right=8, stores_ds=True,
        scratch_bytes=1 << 60,
    ))  # fmt: skip
    kernel = kernel_of(plan, family, key_end)
    library = compile_kernel(sources, family, kernel)
    note("compiled")
    own = {name: tuple(x[name].tensor.stride()) for name in ("dq", "dk", "dv")}
    block = torch.frombuffer(
        bytearray(
            with_seed(
                params,
                key_end=key_end,
                ds_keys=key_end,
                ds_row=blocks,
                ds_folded=0,
                dq_sums=tiles,
                **own,
            )
        ),
        dtype=torch.uint8,
    ).clone()
    numbers = sources.buffers
    buffers = {numbers[name]: y.buffer for name, y in x.items()}
    buffers[numbers["params"]] = engine.Buffer(block.data_ptr(), len(block), False)
    threads = kernel["threads"]
    rows = kernel["groups"][1] if family in KEYS_SIDE else 1  # the first rows alone see a key
    groups = (kernel["groups"][0] * threads, rows, 1)
    library.launch(kernel["name"], groups, (threads, 1, 1), buffers, workers=1)
    if behind:
        sums = x["ds"].flat[tiles:].as_strided((2, 64, 64), (q_len * 64, 64, 1))
        return {"sums": sums.clone()}
    wanted = ("dk", "dv", "ds") if family in KEYS_SIDE else ("dq",)
    return {name: x[name].tensor.clone() for name in wanted}


def ds_beyond_32_bits(
    sources: Sources, note: Callable[[str], None], family: str, kv_len: int
) -> None:
    near, far = (_far_ds(sources, note, family, q_len, kv_len) for q_len in (64, _FAR))
    for name in near:
        assert torch.equal(near[name], far[name]), name


def properties() -> Iterator[Property]:
    for name, q_len, strides in (
        ("row statistics", _FAR, (0, 0, 3, 1)),
        ("rows", 32, (0, 0, (1 << 31) + 6, 1)),
        ("columns", 32, (0, 0, 1, (1 << 31) + 6)),
    ):
        for family in (FORWARD, DELTA, *KEYS_SIDE, DQ):
            test = functools.partial(
                positions_beyond_32_bits, family=family, q_len=q_len, strides=strides
            )
            yield Property(f"{family}: {name} beyond 32 bits", family, test)
    for family in KEYS_SIDE:  # whose threadgroups begin beyond 32 bits
        test = functools.partial(
            positions_beyond_32_bits, family=family, q_len=_FAR, strides=(0, 6, 3, 1), kv_heads=12
        )
        yield Property(f"{family}: row statistics of a group beyond 32 bits", family, test)
    test = functools.partial(
        positions_beyond_32_bits, family=DELTA, q_len=_FAR, strides=(0, 6, 3, 1), heads=66,
        sinks=True,
    )  # fmt: skip
    yield Property(f"{DELTA}: parts of sinks beyond 32 bits", DELTA, test)
    for family in (*KEYS_SIDE, DQ_FROM_DS):
        test = functools.partial(ds_beyond_32_bits, family=family, kv_len=16)
        yield Property(f"{family}: dS beyond 32 bits", family, test)
    test = functools.partial(ds_beyond_32_bits, family=DQ_FROM_DS, kv_len=80)
    yield Property(f"{DQ_FROM_DS}: sums of dq beyond 32 bits", DQ_FROM_DS, test)
