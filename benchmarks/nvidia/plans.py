"""The plans of native/plan.cpp, through the library that build.py makes of it."""

from __future__ import annotations

import ctypes
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
    ]


class Params(ctypes.Structure):
    """AttentionParams of shaders/params.h"""

    _fields_ = [
        *[(name, _int64 * 4) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")],
        *[(name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "q_len", "kv_len")],
        *[(name, ctypes.c_int32) for name in ("head_dim", "diagonal")],
        *[(name, ctypes.c_int32) for name in ("window_left", "window_right")],
        ("scale", ctypes.c_float),
        ("scale_log2", ctypes.c_float),
        ("dropout_seed", ctypes.c_uint32 * 2),
        ("dropout_threshold", ctypes.c_uint32),
        ("dropout_rescale", ctypes.c_float),
        ("has_dlse", ctypes.c_int32),
        ("padding", ctypes.c_int32),
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


class _Plan(ctypes.Structure):
    """BridgePlan"""

    _fields_ = [
        ("refusal", ctypes.c_char * 256),
        ("params", Params),
        ("kernel_count", _int64),
        ("kernels", _Kernel * 8),
    ]


@dataclass(frozen=True)
class Kernel:
    """orchard::KernelPlan"""

    family: str
    name: str
    instantiation: str
    groups: tuple[int, int]
    threads: int


class Planner:
    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self._library.bridge_size_of_plan.restype = ctypes.c_uint64
        if self._library.bridge_size_of_plan() != ctypes.sizeof(_Plan):
            raise RuntimeError("plans.py and plan_bridge.cpp disagree on BridgePlan")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scoring: Scoring
    ) -> tuple[list[Kernel], Params]:
        return self._plan(self._library.bridge_plan_forward, (q, k, v, out, out), scoring)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, scoring: Scoring
    ) -> tuple[list[Kernel], Params]:
        return self._plan(self._library.bridge_plan_backward, (q, k, v, out, dout), scoring)

    def _plan(self, function, tensors: Sequence[Tensor], s: Scoring) -> tuple[list[Kernel], Params]:
        call = _Call(
            _DTYPES[tensors[0].dtype], *map(_Layout.of, tensors),
            s.dropout_p, s.scale, s.window_left, s.window_right, s.diagonal,
        )  # fmt: skip
        plan = _Plan()
        function(ctypes.byref(call), ctypes.byref(plan))
        if plan.refusal:
            raise ValueError(f"the plan refuses: {plan.refusal.decode()}")
        kernels = [
            Kernel(
                kernel.family.decode(),
                kernel.name.decode(),
                kernel.instantiation.decode(),
                tuple(kernel.groups),
                kernel.threads,
            )
            for kernel in plan.kernels[: plan.kernel_count]
        ]
        return kernels, plan.params


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
                for dropout_p in (0.0, 0.5):
                    scoring = Scoring(1.0, dropout_p)
                    forward, _ = planner.forward(x, x, x, x, scoring)
                    backward, _ = planner.backward(x, x, x, x, x, scoring)
                    variants |= {kernel.name: kernel for kernel in [*forward, *backward]}
    return variants
