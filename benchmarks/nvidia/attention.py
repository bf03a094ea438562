"""Attention by the Metal kernels: what native/attention.cpp does on a Mac, on a CUDA tensor."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch
from torch import Tensor

from orchard_ops.layout import empty_in_order_of
from orchard_ops.ops.schema import public_lse

from .driver import Kernels, Launch
from .plans import Params, Plan, Planner, Scoring, set_strides

_MARGIN = 1024
_UNTOUCHED = 7.0


class Guarded:
    """Outputs full of NaN between margins that nobody may write."""

    device = "cuda"

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def empty(self, sizes: list[int], strides: list[int], dtype: torch.dtype) -> Tensor:
        count = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides))
        buffer = torch.full((count + 2 * _MARGIN,), torch.nan, dtype=dtype, device=self.device)
        buffer[:_MARGIN] = buffer[-_MARGIN:] = _UNTOUCHED
        self._buffers.append(buffer)
        return buffer.as_strided(sizes, strides, _MARGIN)

    def in_order_of(self, like: Tensor, width: int | None = None) -> Tensor:
        """Uninitialised, with like's order of dimensions; `width` instead of its last size."""
        meta = torch.empty_strided(like.shape, like.stride(), device="meta")
        if width is not None:
            meta = meta[..., :1].expand(*like.shape[:3], width)
        return self.empty(list(meta.shape), list(empty_in_order_of(meta).stride()), like.dtype)

    def dense(self, sizes: list[int], dtype: torch.dtype) -> Tensor:
        strides = torch.empty(sizes, device="meta").stride()
        return self.empty(sizes, list(strides), dtype)

    def rows(self, q: Tensor) -> Tensor:
        b, h, l = q.shape[:3]
        return self.empty([b, h, l], [h * l, l, 1], torch.float32)

    def row_stats(self, q: Tensor) -> Tensor:
        b, h, l = q.shape[:3]
        return self.empty([b, h, l, 2], [2 * h * l, 2 * l, 2, 1], torch.float32)

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
        self._index = planner.buffers
        self.ran: dict[str, int] = {}
        self.disturb: Callable[[Params], None] | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, s: Scoring) -> tuple[Tensor, Tensor]:
        """out, row_stats"""
        guarded = self.outputs()
        out, row_stats = guarded.in_order_of(q, v.shape[3]), guarded.row_stats(q)
        self.run(self.prepare_forward(q, k, v, out, row_stats, s))
        guarded.assert_margins_untouched()
        return out, row_stats

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        row_stats: Tensor,
        s: Scoring,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv"""
        return self.backward_of_all(dout, dlse, q, k, v, out, row_stats, s)[:3]

    def backward_of_all(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        row_stats: Tensor,
        s: Scoring,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """dq, dk, dv, dmask, dsinks"""
        guarded = self.outputs()
        dq, dk, dv = (guarded.in_order_of(x) for x in (q, k, v))
        delta = guarded.rows(q)
        elements = self.ds_elements(q, k, v, out, dout, s)
        ds = guarded.empty([elements], [1], torch.float32) if elements else delta
        dmask = dsinks = None
        more: dict[str, Tensor] = {}
        if s.sinks is not None:
            dsinks = more["dsinks"] = guarded.dense([q.shape[1]], torch.float32)
            parts = [*q.shape[:2], -(-q.shape[2] // 8)]
            more["sink_parts"] = guarded.dense(parts, torch.float32)
        if s.mask_grad and s.mask is not None:
            dmask = guarded.dense(list(s.mask.shape), s.mask.dtype)
            elements = self._planner.backward(q, k, v, out, dout, s).dmask_part_elements
            more["dmask"] = dmask
            if elements:
                more["dmask_parts"] = guarded.dense([elements], torch.float32)
        self.run(
            self.prepare_backward(
                dout, dlse, q, k, v, out, row_stats, delta, ds, dq, dk, dv, s, more
            )
        )
        guarded.assert_margins_untouched()
        return dq, dk, dv, dmask, dsinks

    def prepare_forward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, row_stats: Tensor, s: Scoring
    ) -> list[Launch]:
        """The kernels of the plan in order; they write out and row_stats."""
        plan = self._planner.forward(q, k, v, out, s)
        _set_seed(plan.params, s.dropout_seed)
        return self._prepare(plan, s, q=q, k=k, v=v, out=out, row_stats=row_stats)

    def ds_elements(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, s: Scoring
    ) -> int:
        """Length of the float32 buffer for dS; where it is 0, no kernel reads what is bound."""
        return self._planner.backward(q, k, v, out, dout, s).ds_elements

    def prepare_backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        row_stats: Tensor,
        delta: Tensor,
        ds: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        s: Scoring,
        more: dict[str, Tensor] | None = None,
    ) -> list[Launch]:
        """The kernels of the plan in order; they write delta, ds, dq, dk, dv and `more`."""
        plan = self._planner.backward(q, k, v, out, dout, s)
        params = plan.params
        _set_seed(params, s.dropout_seed)
        for name, x in (("dq", dq), ("dk", dk), ("dv", dv)):
            set_strides(params, name, x)
        params.has_dlse = dlse is not None
        return self._prepare(
            plan,
            s,
            q=q,
            k=k,
            v=v,
            out=out,
            row_stats=row_stats,
            dout=dout,
            dlse=row_stats if dlse is None else dlse,
            delta=delta,
            ds=ds,
            dq=dq,
            dk=dk,
            dv=dv,
            **(more or {}),
        )

    def run(self, launches: list[Launch]) -> None:
        for launch in launches:
            launch.start()
            self.ran[launch.name] = self.ran.get(launch.name, 0) + 1

    def _prepare(self, plan: Plan, s: Scoring, **tensors: Tensor) -> list[Launch]:
        """Every tensor is bound to every kernel, which takes those it declares.

        Where several threadgroups share dmask, its kernel writes to dmask_parts, as on a Mac, and
        where they share a group of query heads, dk and dv are bound as bind_key_gradients does.
        """
        for name in ("mask", "alibi_slopes", "sinks", "key_ranges"):
            if getattr(s, name) is not None:
                tensors[name] = getattr(s, name)
        written = {"mask_map": 2 * plan.map_elements, "range_hulls": plan.hull_elements}
        written["forward_parts"] = plan.forward_part_elements
        for name, elements in written.items():
            if elements:
                tensors[name] = torch.full(
                    (elements,), -7, dtype=torch.int32, device=tensors["q"].device
                )
        if plan.dkv_part_elements:
            tensors["dkv_parts"] = parts_of_sums(plan.dkv_part_elements, tensors["q"])
        if self.disturb is not None:
            self.disturb(plan.params)
        buffers = {self._index[name]: tensor for name, tensor in tensors.items()}
        launches = []
        for x in plan.kernels:
            own = dict(buffers)
            in_parts = ("attention_backward_dmask", "attention_backward_dmask_from_ds")
            if x.family in in_parts and "dmask_parts" in tensors:
                own[self._index["dmask"]] = tensors["dmask_parts"]
            if x.family in KEYS_SIDE and "dkv_parts" in tensors:
                own[self._index["dk"]] = own[self._index["dv"]] = tensors["dkv_parts"]
            params = Params.from_buffer_copy(plan.params)
            x.set(params)
            of_params = (self._index["params"], params)
            launches.append(self._kernels.prepare(x.name, x.groups, (x.threads,), own, of_params))
        return launches


KEYS_SIDE = ("attention_backward_dkv", "attention_backward_dkv_pairs")


def parts_of_sums(elements: int, like: Tensor) -> Tensor:
    """The buffer for parts of dk and dv."""
    return torch.full((elements,), torch.nan, device=like.device)


def _set_seed(params: Params, seed: int) -> None:
    params.dropout_seed[:] = (ctypes.c_uint32(seed).value, ctypes.c_uint32(seed >> 32).value)


def lse_of(row_stats: Tensor, plain: bool = True) -> Tensor:
    """The natural logarithm of the softmax's denominator; plain scores' units are powers of two."""
    return public_lse(row_stats, math.log(2) if plain else 1.0)
