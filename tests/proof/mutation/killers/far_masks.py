"""Masks, their gradients and key ranges whose elements lie beyond 32 bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from simulator import engine
from torch import Tensor

from ..harness import (
    DELTA,
    DKV,
    DMASK,
    DMASK_FROM_DS,
    DMASK_ROWS,
    DMASK_SUM,
    DMASK_SUM_KEYS,
    DQ,
    DQ_FROM_DS,
    DTYPE_NUMBERS,
    FORWARD,
    MASK_MAP,
    MaskPlace,
    Sources,
    request,
    with_seed,
)  # fmt: skip
from .attention import F32
from .compiled import compile_kernel
from .positions import Sparse
from .properties import Property

_FAR = 1 << 28  # ORCHARD_MAX_LENGTH
_HEADS, _NEAR = 12, 64  # the rows, and keys, that have numbers
_WRITTEN = {
    MASK_MAP: ("mask_map",), FORWARD: ("out",), DELTA: ("delta", "range_hulls"), DQ: ("dq",),
    DKV: ("dk", "dv", "dmask_parts"), DQ_FROM_DS: ("dq",), DMASK_SUM: ("dmask",),
    DMASK_SUM_KEYS: ("dmask",), DMASK_ROWS: ("dmask",), DMASK: ("dmask",),
    DMASK_FROM_DS: ("dmask",),
}  # fmt: skip


def _dense(*sizes: int) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)


@dataclass(frozen=True)
class _Apart:
    """A problem's lengths, and how far apart its elements lie."""

    q_len: int = _NEAR
    kv_len: int = _NEAR
    mask: tuple[bool, bool] = (True, True)  # whether it has rows and keys of its own
    strides: tuple[int, ...] = ()  # of the mask's heads, rows and keys; (): dense
    ranges: bool = False  # key ranges instead of a mask
    elements: int = _NEAR  # of a part of the mask's gradient

    def mask_sizes(self) -> tuple[int, int]:
        return self.q_len if self.mask[0] else 1, self.kv_len if self.mask[1] else 1

    def near(self) -> _Apart:
        return _Apart(mask=self.mask, ranges=self.ranges)


def _places(x: _Apart, width: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes and strides of what has numbers, by the names of the buffers."""
    rows, keys = x.mask_sizes()
    near_rows, near_keys = min(rows, _NEAR), min(keys, _NEAR)
    q_blocks, key_blocks = x.q_len // 8, x.kv_len // 8
    of_rows = ((1, _HEADS, _NEAR, width), _dense(1, _HEADS, x.q_len, width))
    of_keys = ((1, 1, _NEAR, width), (0, 0, width, 1))
    of_mask = (_HEADS, near_rows, near_keys)
    places = {name: of_rows for name in ("query", "out", "dout", "dq")}
    places |= {name: of_keys for name in ("key", "value", "dk", "dv")}
    places |= {name: ((_HEADS, _NEAR), (x.q_len, 1)) for name in ("dlse", "delta")}
    return places | {
        "row_stats": ((_HEADS, _NEAR, 2), _dense(_HEADS, x.q_len, 2)),
        "mask": (of_mask, x.strides or _dense(_HEADS, rows, keys)),
        "mask_map": ((_HEADS, -(-near_rows // 32), -(-near_keys // 32), 2),
                     _dense(_HEADS, -(-rows // 32), -(-keys // 32), 2)),
        "dmask": (of_mask, _dense(_HEADS, rows, keys)),
        "dmask_parts": ((_HEADS, _NEAR), (x.kv_len, 1)),
        "ds": ((_HEADS, 8, 8, 8, 8), _dense(_HEADS, key_blocks, q_blocks, 8, 8)),
        "key_ranges": ((_HEADS, _NEAR, 4), _dense(_HEADS, x.q_len, 4)),
        "range_hulls": ((_HEADS, 8, 6), _dense(_HEADS, q_blocks, 6)),
    }  # fmt: skip


def _results(
    sources: Sources, note: Callable[[str], None], family: str, apart: _Apart
) -> dict[str, Tensor]:
    """What the first threadgroup of each head makes."""
    width = 64 if family in (DQ_FROM_DS, DMASK_FROM_DS) else 2
    q_len, kv_len, ranges = apart.q_len, apart.kv_len, apart.ranges
    places = _places(apart, width)
    if family == DMASK_SUM:
        places |= {"dmask": ((_NEAR,), (1,)), "dmask_parts": ((2, _NEAR), (apart.elements, 1))}
    used = set(places) - {"ds", "key_ranges", "range_hulls"}
    used |= {"ds"} if width == 64 else set()
    used |= {"key_ranges", "range_hulls"} if ranges else set()
    generator = torch.Generator().manual_seed(6)
    x = {}
    for name in sorted(used):
        x[name] = Sparse(*places[name])
        x[name].tensor.copy_(torch.randn(places[name][0], generator=generator))
    whole = {"mask_map": (-1, 1), "key_ranges": (3, 30, 5, 0), "range_hulls": (3, 30, 3, 30, 0, 0)}
    for name, numbers in whole.items():  # every key, or those of one range
        if name in x and name not in _WRITTEN[family]:
            x[name].as_integers().copy_(torch.tensor(numbers, dtype=torch.int32))
    for name in _WRITTEN[family]:
        if name in x:
            x[name].tensor.zero_()
    layouts = {
        short: ((1, x[name].tensor.shape[1], length, width), tuple(x[name].tensor.stride()), 0)
        for short, name, length in (
            ("q", "query", q_len), ("k", "key", kv_len), ("v", "value", kv_len),
            ("out", "out", q_len), ("dout", "dout", q_len),
        )
    }  # fmt: skip
    heads = 1 if family == DMASK_SUM else _HEADS
    sizes, strides = (1, 1, heads, *apart.mask_sizes()), (0, 0, *places["mask"][1])
    place = MaskPlace(sizes, strides, 0, 1, DTYPE_NUMBERS[F32])
    fields = {"mask": place, "mask_grad": True, "scale": 1.0}
    if ranges:
        fields = {"has_key_ranges": True, "ranges_head": 4 * q_len, "scale": 1.0}
        for name in ("mask", "mask_map", "dmask", "dmask_parts"):
            del x[name]
    backward = family not in (FORWARD, MASK_MAP)
    scratch = 1 << 60 if width == 64 else 0
    plan, params = sources.plan(
        request(
            layouts, DTYPE_NUMBERS[F32], backward, stores_ds=True, scratch_bytes=scratch, **fields
        )
    )
    kernel = next(dict(k) for k in plan["kernels"] if k["family"] == family)
    if family == DMASK_SUM:
        params.dmask_elements, params.dmask_parts = apart.elements, 2
    library = compile_kernel(sources, family, kernel)
    note("compiled")
    own = {name: tuple(x[name].tensor.stride()) for name in ("out", "dq", "dk", "dv")}
    data = bytearray(with_seed(params, has_dlse=1, key_end=kv_len, **own))
    block = torch.frombuffer(data, dtype=torch.uint8).clone()
    buffers = {sources.buffers[name]: y.buffer for name, y in x.items()}
    buffers[sources.buffers["params"]] = engine.Buffer(block.data_ptr(), len(block), False)
    heads = 1 if family in (DKV, DMASK_SUM) else _HEADS
    threads = kernel["threads"]
    library.launch(kernel["name"], (heads * threads, 1, 1), (threads, 1, 1), buffers, workers=1)
    found = {name: x[name] for name in _WRITTEN[family] if name in x}
    integers = ("mask_map", "range_hulls")
    return {n: (y.as_integers() if n in integers else y.tensor).clone() for n, y in found.items()}


def beyond_32_bits(
    sources: Sources, note: Callable[[str], None], family: str, apart: _Apart
) -> None:
    """Far apart in memory, the same numbers give the same results."""
    near, far = (_results(sources, note, family, x) for x in (apart.near(), apart))
    for name in near:
        written = name != "dmask_parts" or not apart.mask[0]
        assert near[name].bool().any() == written, f"{name} is written where it should be"
        assert torch.equal(near[name], far[name]), name
    if family in (DMASK, DMASK_FROM_DS):
        others = near["dmask"][:, 32:], near["dmask"][..., 32:]
        assert not any(x.any() for x in others), "dmask of other threadgroups"


def properties() -> Iterator[Property]:
    apart = (1 << 39, 1 << 33, (1 << 31) + 6)
    columns, rows = (False, True), (True, False)
    for what, families, x in (
        ("elements of a mask", (MASK_MAP, FORWARD, DKV, DQ, DMASK), _Apart(strides=apart)),
        ("rows of a mask", (MASK_MAP, DMASK), _Apart(q_len=_FAR)),
        ("blocks of a map", (MASK_MAP,), _Apart(q_len=1 << 10, kv_len=_FAR)),
        ("keys of a mask", (DMASK, DMASK_FROM_DS), _Apart(kv_len=_FAR)),
        ("sums of keys", (DKV, DMASK_SUM_KEYS), _Apart(kv_len=_FAR, mask=columns)),
        ("sums of rows", (DMASK_ROWS,), _Apart(q_len=_FAR, mask=rows)),
        ("parts of a mask's gradient", (DMASK_SUM,), _Apart(elements=(1 << 31) + 64)),
        ("hulls of key ranges", (DELTA, DQ_FROM_DS), _Apart(q_len=_FAR, ranges=True)),
    ):
        for family in families:
            test = functools.partial(beyond_32_bits, family=family, apart=x)
            yield Property(f"{family}: {what} beyond 32 bits", family, test)
