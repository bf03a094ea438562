"""The plans of native/plan.cpp, through the library that build.py makes of it."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # orchard::DType
_int64 = ctypes.c_int64


@dataclass(frozen=True)
class Scoring:
    """What decides the scores besides the operands; as in orchard::flash_attn_fwd."""

    scale: float
    dropout_p: float = 0.0
    dropout_seed: int = 0
    window_left: int = -1
    window_right: int = -1
    diagonal: int = 0
    scratch_bytes: int = 256 << 20  # for dS; 0 is the low-memory mode
    tiles: str = ""  # instead of the plan's: "family=tile,..."


class _Layout(ctypes.Structure):
    """orchard::Layout"""

    _fields_ = [("sizes", _int64 * 4), ("strides", _int64 * 4), ("offset", _int64)]

    @classmethod
    def of(cls, x: Tensor) -> _Layout:
        return cls((_int64 * 4)(*x.shape), (_int64 * 4)(*x.stride()), x.storage_offset())


class _Call(ctypes.Structure):
    """BridgeCall"""

    _fields_ = [
        ("dtype", _int64),
        *[(name, _Layout) for name in ("q", "k", "v", "out", "dout")],
        ("dropout_p", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("window_left", _int64),
        ("window_right", _int64),
        ("diagonal", _int64),
        ("scratch_bytes", _int64),
        ("tiles", ctypes.c_char * 128),
    ]


class Params(ctypes.Structure):
    """AttentionParams of shaders/params.h"""

    _fields_ = [
        *[(name, _int64 * 4) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")],
        ("dq_sums", _int64),
        *[(name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "q_len", "kv_len")],
        *[(name, ctypes.c_int32) for name in ("head_dim", "diagonal")],
        *[(name, ctypes.c_int32) for name in ("window_left", "window_right")],
        ("scale", ctypes.c_float),
        ("scale_log2", ctypes.c_float),
        ("dropout_seed", ctypes.c_uint32 * 2),
        ("dropout_threshold", ctypes.c_uint32),
        ("dropout_rescale", ctypes.c_float),
        ("has_dlse", ctypes.c_int32),
        *[(name, ctypes.c_int32) for name in ("first_kv_head", "key_begin", "key_end")],
    ]

    def set_strides(self, name: str, x: Tensor) -> None:
        getattr(self, name)[:] = x.stride()


class _Kernel(ctypes.Structure):
    """BridgeKernel"""

    _fields_ = [
        ("family", ctypes.c_char * 64),
        ("name", ctypes.c_char * 128),
        ("instantiation", ctypes.c_char * 512),
        ("groups", ctypes.c_uint64 * 2),
        ("threads", ctypes.c_uint64),
    ]


class _Launch(ctypes.Structure):
    """BridgeLaunch"""

    _fields_ = [
        ("kernel", _int64),
        ("groups", ctypes.c_uint64 * 2),
        ("first_kv_head", _int64),
        ("key_begin", _int64),
        ("key_end", _int64),
    ]


class _Plan(ctypes.Structure):
    """BridgePlan"""

    _fields_ = [
        ("refusal", ctypes.c_char * 256),
        ("params", Params),
        ("kernel_count", _int64),
        ("kernels", _Kernel * 8),
        ("launch_count", _int64),
        ("launches", _Launch * 1024),
        ("ds_elements", _int64),
    ]


@dataclass(frozen=True)
class Kernel:
    """orchard::KernelPlan in one of its launches"""

    family: str
    name: str
    instantiation: str
    groups: tuple[int, int]
    threads: int
    first_kv_head: int
    key_begin: int
    key_end: int

    def set(self, params: Params) -> None:
        """As orchard::KernelLaunch::set."""
        params.first_kv_head = self.first_kv_head
        params.key_begin, params.key_end = self.key_begin, self.key_end


@dataclass(frozen=True)
class Plan:
    """orchard::Plan; kernels in the order of their launches"""

    kernels: list[Kernel]
    params: Params
    ds_elements: int


class Planner:
    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self._library.bridge_size_of_plan.restype = ctypes.c_uint64
        if self._library.bridge_size_of_plan() != ctypes.sizeof(_Plan):
            raise RuntimeError("plans.py and plan_bridge.cpp disagree on BridgePlan")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scoring: Scoring) -> Plan:
        return self._plan(self._library.bridge_plan_forward, (q, k, v, out, out), scoring)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, scoring: Scoring
    ) -> Plan:
        return self._plan(self._library.bridge_plan_backward, (q, k, v, out, dout), scoring)

    def _plan(self, function, tensors: Sequence[Tensor], s: Scoring) -> Plan:
        call = _Call(
            _DTYPES[tensors[0].dtype], *map(_Layout.of, tensors), s.dropout_p, s.scale,
            s.window_left, s.window_right, s.diagonal, s.scratch_bytes, s.tiles.encode(),
        )  # fmt: skip
        plan = _Plan()
        function(ctypes.byref(call), ctypes.byref(plan))
        if plan.refusal:
            raise ValueError(f"the plan refuses: {plan.refusal.decode()}")
        kernels = []
        for launch in plan.launches[: plan.launch_count]:
            kernel = plan.kernels[launch.kernel]
            kernels.append(
                Kernel(
                    kernel.family.decode(),
                    kernel.name.decode(),
                    kernel.instantiation.decode(),
                    tuple(launch.groups),
                    kernel.threads,
                    launch.first_kv_head,
                    launch.key_begin,
                    launch.key_end,
                )
            )
        return Plan(kernels, plan.params, plan.ds_elements)


def every_variant(planner: Planner) -> dict[str, Kernel]:
    """Every kernel that the plan can name, by name."""
    variants = {}
    for dtype in _DTYPES:
        for head_dim in range(1, 257):
            for alignment in (8, 1):
                # Rows of whole 16-byte chunks, or rows that are not.
                row = -(-head_dim // alignment) * alignment + (alignment == 1)
                x = torch.empty_strided(
                    (1, 1, 1, head_dim), (row, row, row, 1), dtype=dtype, device="meta"
                )
                for dropout_p, scratch_bytes in itertools.product((0.0, 0.5), (0, 1 << 20)):
                    scoring = Scoring(1.0, dropout_p, scratch_bytes=scratch_bytes)
                    forward = planner.forward(x, x, x, x, scoring).kernels
                    backward = planner.backward(x, x, x, x, x, scoring).kernels
                    variants |= {kernel.name: kernel for kernel in [*forward, *backward]}
    return variants
