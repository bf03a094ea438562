"""Attention whose scores are functions: what native/flex.cpp does on a Mac, on a CUDA tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.planner import Plan

from .attention import KEYS_SIDE, Guarded, lse_of, parts_of_sums
from .driver import Kernels, Launch
from .flex_plans import FlexParams, FlexPlanner, Mods

SCRATCH = 256 << 20


@dataclass(frozen=True)
class Call:
    """Operands (B, H, length, D) and what makes scores of their products."""

    q: Tensor
    k: Tensor
    v: Tensor
    mods: Mods
    scale: float
    scratch_bytes: int = SCRATCH

    def lse(self, row_stats: Tensor) -> Tensor:
        return lse_of(row_stats, plain=not self.mods.score)


class FlexAttention:
    """Remembers which kernels ran, in ``ran``. ``disturb`` may spoil the parameters of a call."""

    outputs: type[Guarded] = Guarded

    def __init__(self, kernels: Kernels, planner: FlexPlanner):
        self._kernels = kernels
        self._planner = planner
        self.ran: dict[str, int] = {}
        self.disturb: Callable[[FlexParams], None] | None = None

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """out and row_stats"""
        guarded = self.outputs()
        out, row_stats = (
            guarded.in_order_of(call.q, call.v.shape[3]),
            guarded.row_stats(call.q),
        )
        self.run(self.prepare_forward(call, out, row_stats))
        guarded.assert_margins_untouched()
        return out, row_stats

    def backward(
        self, call: Call, dout: Tensor, dlse: Tensor | None, out: Tensor, row_stats: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv"""
        guarded = self.outputs()
        dq, dk, dv = (guarded.in_order_of(x) for x in (call.q, call.k, call.v))
        delta = guarded.rows(call.q)
        elements = self.ds_elements(call, out, dout)
        ds = guarded.empty([elements], [1], torch.float32) if elements else delta
        self.run(self.prepare_backward(call, dout, dlse, out, row_stats, delta, ds, dq, dk, dv))
        guarded.assert_margins_untouched()
        return dq, dk, dv

    def ds_elements(self, call: Call, out: Tensor, dout: Tensor) -> int:
        return self._plan(call, out, dout).ds_elements

    def prepare_forward(self, call: Call, out: Tensor, row_stats: Tensor) -> list[Launch]:
        """The kernels of the plan in order; they write out and row_stats."""
        plan = self._plan(call, out)
        # sinks: a stand-in, as there
        return self._prepare(plan, call, out=out, row_stats=row_stats, sinks=row_stats)

    def prepare_backward(
        self,
        call: Call,
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        row_stats: Tensor,
        delta: Tensor,
        ds: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> list[Launch]:
        """The kernels of the plan in order; they write delta, ds, dq, dk and dv."""
        plan = self._plan(call, out, dout)
        for name, x in (("dq", dq), ("dk", dk), ("dv", dv)):
            getattr(plan.params, name)[:] = x.stride()
        plan.params.has_dlse = dlse is not None
        return self._prepare(
            plan,
            call,
            out=out,
            row_stats=row_stats,
            dout=dout,
            dlse=row_stats if dlse is None else dlse,
            delta=delta,
            ds=ds,
            dq=dq,
            dk=dk,
            dv=dv,
        )

    def run(self, launches: list[Launch]) -> None:
        for launch in launches:
            launch.start()
            self.ran[launch.name] = self.ran.get(launch.name, 0) + 1

    def _plan(self, call: Call, out: Tensor, dout: Tensor | None = None) -> Plan:
        return self._planner.plan(
            call.mods, call.scale, call.scratch_bytes, call.q, call.k, call.v, out, dout
        )

    def _prepare(self, plan: Plan, call: Call, **tensors: Tensor) -> list[Launch]:
        """Every tensor is bound to every kernel, which takes those it declares."""
        mods = call.mods
        tensors |= {"q": call.q, "k": call.k, "v": call.v}
        tensors |= {f"capture{n}": x for n, x in enumerate(mods.captures)}
        if mods.has_map:
            tensors["mask"] = call.q if mods.states is None else mods.states
            tensors["mask_map"] = torch.full(
                (2 * plan.map_elements,), -7, dtype=torch.int32, device=call.q.device
            )
        short = {"q": "query", "k": "key", "v": "value"}
        index = self._planner.buffers
        parts: Tensor | None = None
        if plan.dkv_part_elements:
            parts = parts_of_sums(plan.dkv_part_elements, call.q)
        buffers = {index[short.get(name, name)]: x for name, x in tensors.items()}
        has_mods = mods.has_map or bool(mods.score)
        launches = []
        for launch in plan.launches:
            kernel = plan.kernels[launch.kernel]
            params = mods.params(plan.params)
            launch.set(params.attention)
            if self.disturb is not None:
                self.disturb(params)
            own = dict(buffers)
            if parts is not None and kernel.family.removesuffix("_flex") in KEYS_SIDE:
                own[index["dk"]] = own[index["dv"]] = parts
            elif parts is not None and kernel.family == "attention_backward_dkv_sums":
                own[index["dkv_parts"]] = parts  # a number that captures have in other kernels
            # Ordinary kernels read the first of the fields.
            of_params = (index["params"], params if has_mods else params.attention)
            launches.append(
                self._kernels.prepare(kernel.name, launch.groups, (kernel.threads,), own, of_params)
            )
        return launches


# ---- what is right ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Functions:
    """The mods as Python has them, for reference.attention: on blocks of scores and places."""

    score: Callable[..., Tensor] | None
    mask: Callable[..., Tensor] | None
    states: Tensor | None
    block_q: int
    block_kv: int
    sizes: tuple[int, int, int, int]  # B, Hq, L, S
    first_head: int = 0  # of those of the operands

    def __call__(self, scores: Tensor, row0: int, row1: int) -> tuple[Tensor, Tensor | None]:
        """The scores, -inf where they are hidden, and their derivatives."""
        b, h, rows, keys = self._places(row0, row1, scores.device)
        derivative = None
        if self.score is not None:
            with torch.enable_grad():
                products = scores.detach().requires_grad_()
                found = self.score(products, b, h, rows, keys).to(scores.dtype)
                derivative = torch.zeros_like(scores)
                if found.requires_grad:
                    (derivative,) = torch.autograd.grad(found.sum(), products)
            scores = found.detach().expand(scores.shape)
        seen = self.seen(row0, row1, scores.device)
        if seen is None:
            return scores, derivative
        if derivative is not None:
            derivative = torch.where(seen, derivative, 0.0)
        return torch.where(seen, scores, -math.inf), derivative

    def seen(self, row0: int, row1: int, device: torch.device) -> Tensor | None:
        """Broadcastable to (B, Hq, rows, S)."""
        b, h, rows, keys = self._places(row0, row1, device)
        seen = None if self.mask is None else self.mask(b, h, rows, keys)
        if self.states is None:
            return seen
        of_rows = rows.flatten() // self.block_q
        states = self.states[:, :, of_rows][..., keys.flatten() // self.block_kv]
        if states.shape[1] > 1:
            states = states[:, self.first_head : self.first_head + self.sizes[1]]
        if seen is None:
            return states > 0
        return (states == 2) | ((states == 1) & seen)

    def _places(self, row0: int, row1: int, device: torch.device) -> tuple[Tensor, ...]:
        batch, heads, _, kv_len = self.sizes
        first = self.first_head
        ranges = ((0, batch), (first, first + heads), (row0, row1), (0, kv_len))
        return tuple(
            torch.arange(*ends, dtype=torch.int32, device=device).view(
                [-1 if d == at else 1 for d in range(4)]
            )
            for at, ends in enumerate(ranges)
        )
