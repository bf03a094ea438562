"""Attention to caches by the Metal kernels: what native/cache.cpp does, on CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import planner
from benchmarks.planner import CachePlan, DecodeParams, Kernel, Place

from .attention import Guarded
from .driver import Kernels, Launch
from .plans import Scoring


@dataclass(frozen=True)
class Places:
    """What says where the sequences of a cache lie, as in flash_attn_with_kvcache; all int32."""

    lengths: Tensor | None = None
    starts: Tensor | None = None
    entries: Tensor | None = None
    table: Tensor | None = None

    def sequence(self, b: int) -> Places:
        """Those of one sequence."""
        return Places(*(None if x is None else x[b : b + 1] for x in vars(self).values()))

    def buffers(self) -> dict[str, Tensor]:
        named = {
            "cache_lengths": self.lengths,
            "cache_starts": self.starts,
            "cache_entries": self.entries,
            "block_table": self.table,
        }
        return {name: x for name, x in named.items() if x is not None}

    def numbers(self) -> dict[str, int]:
        """What the plan has to know of them."""
        pages = 0 if self.table is None else self.table.shape[1]
        return {
            "paged": self.table is not None,
            "pages": pages,
            "table_row": pages,
            "has_lengths": self.lengths is not None,
            "has_entries": self.entries is not None,
        }


@dataclass(frozen=True)
class Decode:
    """One call: q (B, Hq, L, D), k and v (entries, Hkv, keys of an entry, D or Dv)."""

    q: Tensor
    k: Tensor
    v: Tensor
    places: Places
    scoring: Scoring
    added: int = 0
    parts: int = 0  # threadgroups that share the keys of a sequence, in place of the plan's number

    def sequence(self, b: int) -> Decode:
        """The same of one sequence alone, with the same cache."""
        places = self.places.sequence(b)
        k, v = self.k, self.v
        if places.table is None and places.entries is None:
            k, v = k[b : b + 1], v[b : b + 1]
        slopes = self.scoring.alibi_slopes
        slopes = slopes[b : b + 1] if slopes is not None else None
        scoring = replace(self.scoring, alibi_slopes=slopes)
        return replace(self, q=self.q[b : b + 1], k=k, v=v, places=places, scoring=scoring)


@dataclass(frozen=True)
class Append:
    """New keys, or values, (B, Hkv, L, width), and the cache that they go to."""

    added: Tensor
    cache: Tensor
    places: Places
    offset: int = 0  # from what the lengths say to where the first one goes


@dataclass(frozen=True)
class Forward:
    """A forward that no backward follows, of few queries: q, k and v as flash_attn has them."""

    q: Tensor
    k: Tensor
    v: Tensor
    scoring: Scoring


def _place(x: Tensor) -> Place:
    return (tuple(x.shape), x.stride(), int(x.storage_offset()))


def _dtype(x: Tensor) -> int:
    return planner.DTYPES.index(str(x.dtype).removeprefix("torch."))


class CachePlanner:
    """The plans of native/plan/decode.cpp for tensors, through a library of build.py."""

    def __init__(self, library: Path):
        self._planner = planner.Planner(library)
        self.buffers = {**self._planner.buffers(), **planner.CACHE_BUFFERS}
        """The index of each kernel argument."""

    def decode(self, call: Decode, out: Tensor) -> CachePlan:
        layouts = {"q": call.q, "k": call.k, "v": call.v, "out": out}
        numbers = {
            **call.places.numbers(),
            "page_size": call.k.shape[2],
            "entries": call.k.shape[0],
            "added": call.added,
            "has_starts": call.places.starts is not None,
        }
        fields = call.scoring.fields()
        for name in ("mask_grad", "tiles", "scratch_bytes"):
            del fields[name]
        places = {name: _place(x) for name, x in layouts.items()}
        plan = _accepted(self._planner.decode(places, _dtype(call.q), numbers, **fields))
        return _with_parts(plan, call.parts) if call.parts else plan

    def forward(self, call: Forward, out: Tensor) -> CachePlan:
        """Raises ValueError where the plan leaves the call to the forward's own kernel."""
        layouts = {"q": call.q, "k": call.k, "v": call.v, "out": out}
        places = {name: _place(x) for name, x in layouts.items()}
        fields = call.scoring.fields()
        plan = self._planner.forward_as_decode(places, _dtype(call.q), **fields)
        if plan is None:
            raise ValueError("the plan has no decode kernel for this forward")
        return _accepted(plan)

    def append(self, call: Append) -> CachePlan:
        numbers = {**call.places.numbers(), "offset": call.offset}
        places = (_place(call.added), _place(call.cache))
        return _accepted(self._planner.append(*places, _dtype(call.added), numbers))


def kernels_of(
    planner: CachePlanner, calls: Iterable[Decode | Forward | Append]
) -> dict[str, Kernel]:
    """What calls run, by name."""
    found = {}
    for call in calls:
        if isinstance(call, Append):
            plan = planner.append(call)
        else:
            out = call.q.new_empty(*call.q.shape[:3], call.v.shape[3])
            of_call = planner.forward if isinstance(call, Forward) else planner.decode
            plan = of_call(call, out)
        found |= {kernel.name: kernel for kernel in plan.kernels}
    return found


def _accepted(plan: CachePlan) -> CachePlan:
    if plan.refusal:
        raise ValueError(f"the plan refuses: {plan.refusal} ({plan.detail})")
    return plan


def _with_parts(plan: CachePlan, parts: int) -> CachePlan:
    """The plan with another number of threadgroups for the keys of a sequence."""
    decode, merge = plan.kernels
    params = DecodeParams.from_buffer_copy(plan.params)
    rows = plan.part_rows // params.parts * parts
    params.parts = parts
    decode = replace(decode, groups=(decode.groups[0], parts))
    return replace(plan, kernels=[decode, merge], params=params, part_rows=rows)


class Caches:
    """Remembers which kernels ran, in ``ran``. ``disturb`` may spoil the parameters of a call."""

    outputs: type[Guarded] = Guarded
    """Allocates what a call writes."""

    def __init__(self, kernels: Kernels, planner: CachePlanner):
        self._kernels = kernels
        self._planner = planner
        self.ran: dict[str, int] = {}
        self.disturb: Callable[[DecodeParams], None] | None = None

    def decode(self, call: Decode) -> tuple[Tensor, Tensor]:
        """out and lse"""
        guarded = self.outputs()
        out, lse = guarded.in_order_of(call.q, call.v.shape[3]), guarded.rows(call.q)
        self.run(self.prepare_decode(call, out, lse, guarded))
        guarded.assert_margins_untouched()
        return out, lse

    def forward(self, call: Forward) -> tuple[Tensor, Tensor]:
        """out and row_stats"""
        guarded = self.outputs()
        out, row_stats = guarded.in_order_of(call.q, call.v.shape[3]), guarded.row_stats(call.q)
        plan = self._planner.forward(call, out)
        self.run(self._prepare_rows(plan, call, out, row_stats, guarded))
        guarded.assert_margins_untouched()
        return out, row_stats

    def append(self, call: Append) -> None:
        """Fills the cache of the call."""
        self.run(self.prepare_append(call))

    def prepare_decode(
        self, call: Decode, out: Tensor, lse: Tensor, guarded: Guarded
    ) -> list[Launch]:
        """The kernels of the plan in order; they write out and lse, and scratch of `guarded`."""
        plan = self._planner.decode(call, out)
        return self._prepare_rows(plan, call, out, lse, guarded, **call.places.buffers())

    def _prepare_rows(
        self,
        plan: CachePlan,
        call: Decode | Forward,
        out: Tensor,
        stats: Tensor,
        guarded: Guarded,
        **tensors: Tensor,
    ) -> list[Launch]:
        """`stats` is lse or row_stats, as the plan says."""
        tensors |= {"query": call.q, "key": call.k, "value": call.v}
        tensors |= {"out": out, "row_stats": stats}
        for name in ("mask", "alibi_slopes", "sinks", "key_ranges"):
            x = getattr(call.scoring, name)
            if x is not None:
                tensors[name] = x
        tensors["parts"] = guarded.dense([plan.part_rows, plan.params.part_stride], torch.float32)
        tensors["part_sums"] = guarded.dense([plan.part_rows, 2], torch.float32)
        return self._prepare(plan, tensors)

    def prepare_append(self, call: Append) -> list[Launch]:
        plan = self._planner.append(call)
        tensors = {"key": call.added, "out": call.cache, **call.places.buffers()}
        return self._prepare(plan, tensors)

    def run(self, launches: list[Launch]) -> None:
        for launch in launches:
            launch.start()
            self.ran[launch.name] = self.ran.get(launch.name, 0) + 1

    def _prepare(self, plan: CachePlan, tensors: Mapping[str, Tensor]) -> list[Launch]:
        """Every tensor is bound to every kernel, which takes those it declares."""
        index = self._planner.buffers
        params = DecodeParams.from_buffer_copy(plan.params)
        if self.disturb is not None:
            self.disturb(params)
        buffers = {index[name]: x for name, x in tensors.items()}
        of_params = (index["params"], params)
        return [
            self._kernels.prepare(x.name, x.groups, (x.threads,), buffers, of_params)
            for x in plan.kernels
        ]
