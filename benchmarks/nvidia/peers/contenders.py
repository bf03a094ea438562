"""Ours and the peers' kernels, made ready to run on one problem's operands."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..attention import Attention, lse_of
from ..driver import Launch
from ..plans import Scoring
from .launches import RESULTS, Entrant, result, small_operands
from .problems import Problem

Work = Callable[[], None]
OURS = "ours"


class Archive(Protocol):
    """driver.Kernels, or what stands in for it without a GPU."""

    def prepare(self, name, groups, threads, buffers, params) -> Launch: ...  # type: ignore[no-untyped-def]


@dataclass
class Contender:
    """All launches of one forward or backward in their true order, and what they write."""

    name: str
    mode: str  # native, equal-rate, or both where they have the same code
    backward: bool
    order: list[tuple[str, Work]]  # (part, launch)
    results: dict[str, Tensor]
    kernels: list[str] = field(default_factory=list)
    rounded_query: bool = False
    offered: bool = True

    def start(self) -> None:
        for _, work in self.order:
            work()


class Operands:
    """The tensors that kernels read. A backward reads our out and lse, whoever runs it."""

    def __init__(self, problem: Problem, device: str):
        self.problem, self.device = problem, device
        self.tensors = problem.operands(device) | small_operands(problem, device)

    def nan(self, name: str, wide: bool = False) -> Tensor:
        return result(self.problem, name, self.device, wide)

    def take(self, out: Tensor, row_stats: Tensor) -> None:
        """What the backwards of others start from."""
        lse = lse_of(row_stats)
        dout = self.tensors["dout"]
        self.row_stats = row_stats
        self.tensors |= {
            "out": out,
            "lse": lse,
            "lse_log2": lse / math.log(2),
            "delta": (dout.float() * out.float()).sum(-1),
        }


def part_of(kernel: str) -> str:
    """What a kernel of ours is for: forward, delta, dkv, dq or another."""
    words = kernel.removeprefix("attention_").removeprefix("backward_").split("_")
    return words[0]


def ours_forward(attention: Attention, x: Operands, mode: str, name: str = OURS) -> Contender:
    out = x.nan("out")
    row_stats = torch.full((*out.shape[:3], 2), torch.nan, device=x.device)
    q, k, v = (x.tensors[n] for n in "qkv")
    launches = attention.prepare_forward(q, k, v, out, row_stats, x.problem.scoring())
    results = {"out": out, "row_stats": row_stats}
    return _ours(name, mode, False, launches, results)


def ours_backward(
    attention: Attention, x: Operands, mode: str, scoring: Scoring, name: str = OURS
) -> Contender:
    q, k, v, out, dout = (x.tensors[n] for n in ("q", "k", "v", "out", "dout"))
    results = {n: x.nan(n) for n in RESULTS[True]}
    elements = attention.ds_elements(q, k, v, out, dout, scoring)
    ds = torch.full((max(1, elements),), torch.nan, device=x.device)
    launches = attention.prepare_backward(
        dout, None, q, k, v, out, x.row_stats, x.nan("delta"), ds, *results.values(), scoring
    )
    return _ours(name, mode, True, launches, results)


def _ours(
    name: str, mode: str, backward: bool, launches: list[Launch], results: dict[str, Tensor]
) -> Contender:
    order = [(part_of(launch.name), launch.start) for launch in launches]
    kernels = list(dict.fromkeys(launch.name for launch in launches))
    return Contender(name, mode, backward, order, results, kernels)


def of_entrant(
    archive: Archive, x: Operands, entrant: Entrant, mode: str, delta: Contender | None
) -> Contender:
    """``delta``: a backward of ours, whose delta kernel a peer may borrow."""
    own: dict[str, Tensor] = {}
    order: list[tuple[str, Work]] = []
    if entrant.borrows_delta and delta is not None:
        order += [(part, work) for part, work in delta.order if part == "delta"]
    for step in entrant.steps:
        bound = {}
        for index, name in step.buffers.items():
            if name in step.writes:
                own[name] = x.nan(name, name in entrant.wide)
            elif name.endswith("_zeros"):
                own[name] = x.nan(name.removesuffix("_zeros"), wide=True)
                order.append(("zeros", own[name].zero_))
            bound[index] = own[name] if name in own else x.tensors[name]
        launch = archive.prepare(step.kernel, step.groups, step.threads, bound, step.params)
        order.append((step.part, launch.start))
    for name in entrant.wide:
        sums = own[name]
        if sums.dtype != x.tensors["q"].dtype:
            own[name] = x.nan(name)
            order.append(("casts", functools.partial(own[name].copy_, sums)))
    written = [name for name in RESULTS[entrant.backward] if name in own]
    return Contender(
        entrant.name,
        mode,
        entrant.backward,
        order,
        {name: own[name] for name in written},
        [step.kernel for step in entrant.steps],
        entrant.rounded_query,
        entrant.offered,
    )


def public(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """With lse in place of our row_stats."""
    found = dict(results)
    if "row_stats" in found:
        found["lse"] = lse_of(found.pop("row_stats"))
    return found
