"""Attention by the Metal kernels: what native/attention.cpp does on a Mac, on a CUDA tensor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from orchard_ops.layout import empty_in_order_of

from .driver import Kernels, Launch
from .plans import Kernel, Params, Planner, Scoring

# AttentionBuffer of shaders/params.h
_BUFFERS = ("q", "k", "v", "out", "lse", "dout", "dlse", "delta", "dq", "dk", "dv", "params")
_INDEX = {name: index for index, name in enumerate(_BUFFERS)}
_MARGIN = 1024
_UNTOUCHED = 7.0


class Guarded:
    """Outputs full of NaN between margins that nobody may write."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def empty(self, sizes: list[int], strides: list[int], dtype: torch.dtype) -> Tensor:
        count = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides))
        buffer = torch.full((count + 2 * _MARGIN,), torch.nan, dtype=dtype, device="cuda")
        buffer[:_MARGIN] = buffer[-_MARGIN:] = _UNTOUCHED
        self._buffers.append(buffer)
        return buffer.as_strided(sizes, strides, _MARGIN)

    def in_order_of(self, like: Tensor) -> Tensor:
        meta = torch.empty_strided(like.shape, like.stride(), device="meta")
        return self.empty(list(like.shape), list(empty_in_order_of(meta).stride()), like.dtype)

    def row_stats(self, q: Tensor) -> Tensor:
        b, h, l = q.shape[:3]
        return self.empty([b, h, l], [h * l, l, 1], torch.float32)

    def assert_margins_untouched(self) -> None:
        for buffer in self._buffers:
            for margin in (buffer[:_MARGIN], buffer[-_MARGIN:]):
                if not (margin == _UNTOUCHED).all():
                    raise AssertionError("a kernel wrote outside of its output")


class Attention:
    """Remembers which kernels ran, in ``ran``. ``disturb`` may spoil the parameters of a call."""

    outputs: type[Guarded] = Guarded
    """Allocates what a call writes."""

    def __init__(self, kernels: Kernels, planner: Planner):
        self._kernels = kernels
        self._planner = planner
        self.ran: dict[str, int] = {}
        self.disturb: Callable[[Params], None] | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, s: Scoring) -> tuple[Tensor, Tensor]:
        """out, lse"""
        guarded = self.outputs()
        out, lse = guarded.in_order_of(q), guarded.row_stats(q)
        self.run(self.prepare_forward(q, k, v, out, lse, s))
        guarded.assert_margins_untouched()
        return out, lse

    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
        lse: Tensor, s: Scoring,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dq, dk, dv"""
        guarded = self.outputs()
        dq, dk, dv = (guarded.in_order_of(x) for x in (q, k, v))
        delta = guarded.row_stats(q)
        self.run(self.prepare_backward(dout, dlse, q, k, v, out, lse, delta, dq, dk, dv, s))
        guarded.assert_margins_untouched()
        return dq, dk, dv

    def prepare_forward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: Scoring
    ) -> list[Launch]:
        """The kernels of the plan in order; they write out and lse."""
        kernels, params = self._planner.forward(q, k, v, out, s)
        _set_seed(params, s.dropout_seed)
        return self._prepare(kernels, params, q=q, k=k, v=v, out=out, lse=lse)

    def prepare_backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
        lse: Tensor, delta: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, s: Scoring,
    ) -> list[Launch]:  # fmt: skip
        """The kernels of the plan in order; they write delta, dq, dk and dv."""
        kernels, params = self._planner.backward(q, k, v, out, dout, s)
        _set_seed(params, s.dropout_seed)
        for name, x in (("dq", dq), ("dk", dk), ("dv", dv)):
            params.set_strides(name, x)
        params.has_dlse = dlse is not None
        return self._prepare(
            kernels, params, q=q, k=k, v=v, out=out, lse=lse, dout=dout,
            dlse=lse if dlse is None else dlse, delta=delta, dq=dq, dk=dk, dv=dv,
        )  # fmt: skip

    def run(self, launches: list[Launch]) -> None:
        for launch in launches:
            launch.start()
            self.ran[launch.name] = self.ran.get(launch.name, 0) + 1

    def _prepare(self, kernels: list[Kernel], params: Params, **tensors: Tensor) -> list[Launch]:
        """Every tensor is bound to every kernel, which takes those it declares."""
        if self.disturb is not None:
            self.disturb(params)
        buffers = {_INDEX[name]: tensor for name, tensor in tensors.items()}
        at = _INDEX["params"]
        return [
            self._kernels.prepare(x.name, x.groups, (x.threads,), buffers, (at, params))
            for x in kernels
        ]


def _set_seed(params: Params, seed: int) -> None:
    params.dropout_seed[:] = (ctypes.c_uint32(seed).value, ctypes.c_uint32(seed >> 32).value)
