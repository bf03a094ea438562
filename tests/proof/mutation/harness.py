"""Runs the plan and the kernels of one copy of shaders/ and native/, without the native library.

`Sources` is such a copy: the repository's own, or a mutated one. The plan is native/plan.cpp behind
plan_bridge.cpp, kernels go to the Metal engine as the text that would be embedded. Tensors
lie between guard zones of NaN bytes, and gaps between their rows hold NaN as well.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from attention_cases import SEED
from simulator import engine
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
FORWARD, DELTA, DKV, DKV_PAIRS, DQ, DQ_FROM_DS = FAMILIES = (
    "attention_forward", "attention_backward_delta", "attention_backward_dkv",
    "attention_backward_dkv_pairs",
    "attention_backward_dq", "attention_backward_dq_from_ds",
)  # fmt: skip
DTYPE_NUMBERS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
BUFFERS = (
    "query", "key", "value", "out", "row_stats", "dout", "dlse", "delta", "dq", "dk", "dv", "ds",
    "params",
)  # fmt: skip
GUARD_BYTES = 4096
_int64, _double = ctypes.c_int64, ctypes.c_double


class _Layout(ctypes.Structure):
    _fields_ = [("sizes", _int64 * 4), ("strides", _int64 * 4), ("offset", _int64)]


class _Request(ctypes.Structure):
    _fields_ = [
        *((name, _Layout) for name in ("q", "k", "v", "out", "dout")),
        *((name, _int64) for name in (
            "dtype", "has_mask", "has_alibi", "has_sinks",
            "window_left", "window_right", "diagonal", "backward", "scratch_bytes",
        )),
        *((name, _double) for name in ("dropout_p", "scale", "softcap")),
        ("tiles", ctypes.c_char * 128),
    ]  # fmt: skip


class Params(ctypes.Structure):
    """AttentionParams of shaders/params.h."""

    _fields_ = [
        *((name, _int64 * 4) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        ("dq_sums", _int64),
        *((name, ctypes.c_int32) for name in (
            "num_heads", "num_kv_heads", "q_len", "kv_len", "head_dim",
            "diagonal", "window_left", "window_right",
        )),
        ("scale", ctypes.c_float), ("scale_log2", ctypes.c_float),
        ("dropout_seed", ctypes.c_uint32 * 2), ("dropout_threshold", ctypes.c_uint32),
        ("dropout_rescale", ctypes.c_float), ("has_dlse", ctypes.c_int32),
        *((name, ctypes.c_int32) for name in ("first_kv_head", "key_begin", "key_end")),
    ]  # fmt: skip


# ---- tensors


class Guarded:
    """A tensor in the middle of NaN: in front, behind, and in the gaps of its strides."""

    def __init__(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype,
                 offset: int = 0):  # fmt: skip
        bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        guard = GUARD_BYTES // dtype.itemsize
        self.extent = sum((n - 1) * s for n, s in zip(shape, strides)) + 1
        storage = torch.full((2 * guard + offset + self.extent,), -1, dtype=bits)
        place = (tuple(shape), tuple(strides), guard + offset)
        self.bits = storage.as_strided(*place)
        self.tensor = storage.view(dtype).as_strided(*place)
        self.offset = offset
        self._storage = storage

    @classmethod
    def like(cls, x: Tensor, layout: str) -> Guarded:
        """x copied into one of the LAYOUTS."""
        self = cls(x.shape, *_strides_and_dtype(x, layout))
        self.tensor.copy_(x)
        return self

    def buffer(self, writable: bool) -> engine.Buffer:
        return engine.Buffer(
            self.tensor.data_ptr(), self.extent * self.tensor.element_size(), writable
        )

    def assert_untouched(self, name: str, before: Tensor | None) -> None:
        """All bytes as `before`; without it, all bytes outside of the tensor are still NaN's."""
        if before is not None:
            assert torch.equal(self._storage, before), f"{name} was written"
            return
        rest = self._storage.clone()
        rest.as_strided(self.bits.shape, self.bits.stride(), self.bits.storage_offset()).fill_(-1)
        assert bool((rest == -1).all()), f"{name} was written outside of its elements"

    def snapshot(self) -> Tensor:
        return self._storage.clone()


LAYOUTS = ("dense", "padded", "blhd", "columns", "odd", "rows_odd")


def _strides_and_dtype(x: Tensor, layout: str) -> tuple[tuple[int, ...], torch.dtype, int]:
    _, h, n, d = x.shape
    chunk = 16 // x.element_size()
    wide = -(-d // chunk) * chunk + chunk  # rows with a gap of at least a chunk, aligned
    strides, offset = {
        "dense": ((h * n * d, n * d, d, 1), 0),
        "padded": ((h * (n + 2) * wide + chunk, (n + 2) * wide, wide, 1), chunk),
        "blhd": ((h * n * wide, wide, h * wide, 1), 0),
        "columns": ((h * n * d + 5, n * d, 1, n), 0),
        "odd": ((h * n * wide, n * wide, wide, 1), 1),
        "rows_odd": ((h * n * (wide + 1), n * (wide + 1), wide + 1, 1), 0),
    }[layout]
    return strides, x.dtype, offset


# ---- sources


@dataclass
class Sources:
    """A folder that holds shaders/ and native/. Its plan is compiled unless one is given."""

    root: Path = ROOT
    plan_of: Sources | None = None

    def text(self, family: str) -> str:
        """The family's Metal text as native/embed_shaders.py makes it."""
        return self._embed.flatten(self._embed.FAMILIES[family]) + "\n"

    @cached_property
    def _embed(self) -> ModuleType:
        """native/embed_shaders.py of this copy."""
        path = self.root / "native" / "embed_shaders.py"
        spec = importlib.util.spec_from_file_location("embed_shaders", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def compile_plan(self) -> Sources:
        """Does now what the first use of the plan would do."""
        assert self._bridge is not None
        return self

    @cached_property
    def _bridge(self) -> ctypes.CDLL:
        if self.plan_of is not None:
            return self.plan_of._bridge
        with tempfile.TemporaryDirectory() as folder:
            output = f"{folder}/plan.so"
            compiler = os.environ.get("CXX", "c++")
            command = [
                compiler, "-std=c++17", "-O0", "-w", "-fPIC", "-shared", f"-I{self.root}",
                str(Path(__file__).with_name("plan_bridge.cpp")),
                str(self.root / "native" / "plan.cpp"), "-o", output,
            ]  # fmt: skip
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise engine.CompileError(result.stderr)
            return ctypes.CDLL(output)

    @cached_property
    def buffers(self) -> dict[str, int]:
        numbers = (ctypes.c_int32 * len(BUFFERS))()
        self._bridge.orchard_test_buffers(numbers)
        return dict(zip(BUFFERS, numbers))

    def strides_in_order_of(self, like: Sequence[int], sizes: Sequence[int]) -> list[int]:
        strides = (_int64 * 4)()
        self._bridge.orchard_test_strides((_int64 * 4)(*like), (_int64 * 4)(*sizes), strides)
        return list(strides)

    def plan(self, request: _Request) -> tuple[dict, Params]:
        """The plan's JSON with each kernel's groups and threads added, and its params."""
        text = ctypes.create_string_buffer(1 << 14)
        params = Params()
        geometry = (ctypes.c_uint64 * 12)()
        self._bridge.orchard_test_plan(
            ctypes.byref(request), text, ctypes.c_uint64(len(text)), ctypes.byref(params), geometry
        )
        plan = json.loads(text.value)
        for i, kernel in enumerate(plan["kernels"]):
            kernel["groups"], kernel["threads"] = (
                list(geometry[3 * i : 3 * i + 2]),
                geometry[3 * i + 2],
            )
        return plan, params


def request(layouts: dict[str, tuple[Sequence[int], Sequence[int], int]], dtype: int,
            backward: bool = False, **fields: object) -> _Request:  # fmt: skip
    """A request for Sources.plan; layouts are (sizes, strides, offset) of q, k, v, out and dout."""
    result = _Request(dtype=dtype, backward=backward)
    result.window_left = result.window_right = -1
    result.scale = 1.0
    for name, (sizes, strides, offset) in layouts.items():
        flat = getattr(result, name)
        flat.sizes[:], flat.strides[:], flat.offset = sizes, strides, offset
    for name, value in fields.items():
        setattr(result, name, value)
    return result


def place(x: Guarded) -> tuple[Sequence[int], Sequence[int], int]:
    return x.tensor.shape, x.tensor.stride(), x.offset


# ---- launches


def with_seed(params: Params, **fields: object) -> bytes:
    """What the host adds to the plan's params before a launch."""
    params.dropout_seed[:] = struct.unpack("<2I", struct.pack("<Q", SEED))
    for name, value in fields.items():
        if isinstance(value, tuple):
            getattr(params, name)[:] = value
        else:
            setattr(params, name, value)
    return bytes(params)


def launch(
    library: engine.Library, kernel: dict, numbers: dict[str, int], params: bytes,
    inputs: dict[str, Guarded], outputs: dict[str, Guarded], **options: Any,
) -> engine.Counters:  # fmt: skip
    """One dispatch; fails if anything but the outputs' elements was written."""
    before = {name: x.snapshot() for name, x in inputs.items()}
    block = torch.frombuffer(bytearray(params), dtype=torch.uint8).clone()  # 64-byte aligned
    buffers = {numbers["params"]: engine.Buffer(block.data_ptr(), len(params), False)}
    for name, x in inputs.items():
        buffers[numbers[name]] = x.buffer(False)
    for name, x in outputs.items():
        buffers[numbers[name]] = x.buffer(True)
    groups, threads = kernel["groups"], kernel["threads"]
    grid = (groups[0] * threads, groups[1], 1)
    counters = library.launch(kernel["name"], grid, (threads, 1, 1), buffers, **options)
    for name, x in inputs.items():
        x.assert_untouched(name, before[name])
    for name, x in outputs.items():
        x.assert_untouched(name, None)
    return counters
