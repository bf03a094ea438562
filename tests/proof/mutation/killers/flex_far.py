"""A map of a function's mask, and block states, whose elements lie beyond 32 bits."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable

import torch
from simulator import engine

from ..harness import BOOL, DTYPE_NUMBERS, MAP_RUN, MaskPlace, Sources, request, with_seed
from .attention import F32
from .compiled import compile_kernel
from .positions import Sparse
from .properties import Property

_FAMILY = "attention_flex_map"
_HEADS, _Q_LEN = 12, 1 << 10
_ROWS = _Q_LEN // 32  # of blocks, of which two are written
_FAR = 1 << 28  # ORCHARD_MAX_LENGTH


class _Bytes:
    """Block states in memory that exists only where it is touched."""

    def __init__(self, strides: tuple[int, int, int]):
        batch, head, row = strides
        length = batch + (_HEADS - 1) * head + row + 4
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        self._memory = mmap.mmap(-1, length, flags=flags)
        flat = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.tensor = flat.as_strided((2, _HEADS, 2, 2), (batch, head, row, 1))
        self.buffer = engine.Buffer(flat.data_ptr(), length, False)


def _map(
    sources: Sources, note: Callable[[str], None], kv_len: int, strides: tuple[int, int, int]
) -> torch.Tensor:
    """What the first threadgroup of each head writes, by states of blocks of 32."""
    like = ((2, _HEADS, _Q_LEN, 16), (16 * _HEADS * _Q_LEN, 16 * _Q_LEN, 16, 1), 0)
    keys = ((2, 1, kv_len, 16), (16 * kv_len, 16 * kv_len, 16, 1), 0)
    layouts = {"q": like, "k": keys, "v": keys, "out": like}
    mask = MaskPlace((2, 1, _HEADS, _Q_LEN, kv_len), (1,) * 5, 1, 1, BOOL)
    plan, params = sources.plan(request(layouts, DTYPE_NUMBERS[F32], mask=mask, scale=1.0))
    kernel = next(dict(k) for k in plan["kernels"] if k["family"] == "attention_mask_map")
    call = f"{_FAMILY}<NoMaskMod, 4>"
    line = f'template [[host_name("{_FAMILY}_far")]] [[kernel]] decltype({call}) {call};\n'
    kernel |= {"name": f"{_FAMILY}_far", "instantiation": line}
    library = compile_kernel(sources, _FAMILY, kernel)
    note("compiled")
    states = _Bytes(strides)
    generator = torch.Generator().manual_seed(8)
    states.tensor.copy_(torch.randint(0, 3, states.tensor.shape, generator=generator))
    cols = kv_len // 32
    found = Sparse((2, _HEADS, 2, 4), (2 * _HEADS * _ROWS * cols, 2 * _ROWS * cols, 2 * cols, 1))
    block = with_seed(params) + bytes(256) + struct.pack(
        "3q6i", *strides, 32, 32, 2, 2, 1, 1
    )  # fmt: skip
    data = torch.frombuffer(bytearray(block), dtype=torch.uint8).clone()
    buffers = {
        sources.buffers["mask"]: states.buffer,
        sources.buffers["mask_map"]: found.buffer,
        sources.buffers["params"]: engine.Buffer(data.data_ptr(), len(block), False),
    }
    groups = -(-cols // (4 * MAP_RUN))  # of threadgroups for a row of blocks
    grid = (2 * _HEADS * 128, 1 if groups > 1 else 2, 1)
    library.launch(kernel["name"], grid, (128, 1, 1), buffers, workers=1)
    return found.as_integers()[:, :, : 1 if groups > 1 else 2].clone()


def _far_states(sources: Sources, note: Callable[[str], None]) -> None:
    near = _map(sources, note, 64, (4 * _HEADS, 4, 2))
    far = _map(sources, note, 64, (1 << 38, 1 << 33, (1 << 31) + 6))
    assert near.unique().numel() == 3 and torch.equal(near, far)


def _far_map(sources: Sources, note: Callable[[str], None]) -> None:
    near = _map(sources, note, 64, (4 * _HEADS, 4, 2))[:, :, :1]
    far = _map(sources, note, _FAR, (4 * _HEADS, 4, 2))
    assert torch.equal(near, far)


def killers() -> tuple[Property, ...]:
    return (
        Property("flex map: block states beyond 32 bits", _FAMILY, _far_states),
        Property("flex map: blocks beyond 32 bits", _FAMILY, _far_map),
    )
