"""What flex_speed.py times: functions beside the fixed kernels of the same scores, and block lists
beside the share of their blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.planner import Kernel

from . import feature_works
from .feature_works import PLAIN, ROOM, Comparison, Work
from .flex import Call, Functions
from .flex_mods import Function, Tables
from .flex_plans import FlexPlanner, Mods
from .flex_texts import texts_of
from .plans import Kernel as Launched
from .plans import Planner

BLOCK = 128
HEAD_DIMS = (64, 128)
LENGTH, HEADS = 8192, 16


def _noop(t: Tables) -> Function:
    return lambda score, b, h, q, kv: score


def _alibi(t: Tables) -> Function:
    slopes = t.keep("slopes", 2.0 ** -torch.arange(1.0, t.heads + 1))
    return lambda score, b, h, q, kv: score - slopes[h] * (q - kv).abs()


def _tanh(t: Tables) -> Function:
    return lambda score, b, h, q, kv: 50.0 * torch.tanh(score / 50.0)


SCORES = {"noop score_mod": _noop, "ALiBi as score_mod": _alibi, "softcap as score_mod": _tanh}
DENSITIES = {"blocks, 1 of 16": 1 / 16, "blocks, 1 of 4": 1 / 4, "blocks, 1 of 2": 1 / 2}
CAUSAL = "causal mask_mod and its blocks"


@dataclass(frozen=True)
class FlexWork(Work):
    """One call of the kernels whose scores are functions."""

    def tables(self, device: str) -> Tables:
        sizes = (self.batch, self.num_heads, self.length, self.length)
        return Tables(*sizes, "cpu" if device == "meta" else device)

    def functions(self, tables: Tables) -> Functions:
        score = SCORES[self.feature](tables) if self.feature in SCORES else None
        mask = (lambda b, h, q, kv: q >= kv) if self.feature == CAUSAL else None
        sizes = (self.batch, self.num_heads, self.length, self.length)
        return Functions(score, mask, self._states(tables.device), BLOCK, BLOCK, sizes)

    def _states(self, device: str) -> Tensor | None:
        """Each head its own blocks at random, or those of a causal mask; a row has one at least."""
        count = -(-self.length // BLOCK)
        places = torch.arange(count)
        if self.feature == CAUSAL:
            states = (places[:, None] > places) * 2 + (places[:, None] == places)
            return states[None, None].to(device, torch.uint8)
        if self.feature not in DENSITIES:
            return None
        generator = torch.Generator().manual_seed(3)
        drawn = torch.rand(1, self.num_heads, count, count, generator=generator)
        seen = (drawn < DENSITIES[self.feature]) | torch.eye(count, dtype=torch.bool)
        return (seen.to(torch.uint8) * 2).to(device)

    def mods(self, tables: Tables, functions: Functions) -> Mods:
        entry = TEXTS.get(self.feature) or texts_of(functions, tables)
        captures = tuple(tables.tensors[name] for name in entry["captures"])
        score, mask = (str(entry[name]) for name in ("score", "mask"))
        return Mods(score, mask, captures, functions.states, BLOCK, BLOCK)

    def call(self, device: str) -> tuple[Call, Functions, Tensor]:
        """The call, its functions, and dout."""
        q, k, v, dout = self.operands(device)
        tables = self.tables(device)
        functions = self.functions(tables)
        mods = self.mods(tables, functions)
        return Call(q, k, v, mods, self.head_dim**-0.5, self.scratch_bytes), functions, dout

    def kernels(self, planner: FlexPlanner, backward: bool) -> list[Kernel]:
        call, _, dout = self.call("meta")
        more = (dout,) if backward else ()
        plan = planner.plan(
            call.mods, call.scale, call.scratch_bytes, call.q, call.k, call.v, call.q, *more
        )
        return [plan.kernels[launch.kernel] for launch in plan.launches]


TEXTS: dict[str, dict[str, str | list[str]]] = {}
"""By feature, where build.py has written them down."""


def comparisons(
    head_dims: tuple[int, ...] = HEAD_DIMS, length: int = LENGTH, heads: int = HEADS
) -> Iterator[Comparison]:
    for head_dim in head_dims:
        plain = Work(PLAIN, head_dim, length, 1, heads, ROOM)
        own = FlexWork("noop score_mod", head_dim, length, 1, heads, ROOM)
        hiding = [replace(own, feature=x) for x in (*DENSITIES, CAUSAL)]
        yield Comparison(plain, (own, *hiding))
        for fixed, feature in (
            ("ALiBi", "ALiBi as score_mod"),
            ("softcap", "softcap as score_mod"),
        ):
            yield Comparison(replace(plain, feature=fixed), (replace(own, feature=feature),))


def texts() -> dict[str, dict[str, str | list[str]]]:
    """Those of all works, by feature."""
    found = {}
    for comparison in comparisons((64,)):
        for work in comparison.works:
            assert isinstance(work, FlexWork)
            tables = work.tables("cpu")
            found[work.feature] = texts_of(work.functions(tables), tables)
    return found


def kernels_of(work: Work, planner: FlexPlanner, backward: bool) -> list[Kernel | Launched]:
    """In the order of their launches."""
    if isinstance(work, FlexWork):
        return list(work.kernels(planner, backward))
    return list(work.plan(Planner(planner.library), backward))


def kernels(planner: FlexPlanner) -> dict[str, Kernel | Launched]:
    """What all comparisons run, by name."""
    found: dict[str, Kernel | Launched] = {}
    for comparison in comparisons():
        for work in (comparison.yardstick, *comparison.works):
            for backward in (False, True):
                used = kernels_of(work, planner, backward)
                found |= {kernel.name: kernel for kernel in used}
    return found


def share(work: Work, used: list[Kernel | Launched], device: str) -> float | None:
    """Of all pairs, those in blocks that are seen, by each kernel's own tile; None: all are."""
    if not isinstance(work, FlexWork):
        return None
    functions = work.functions(work.tables(device))
    seen = functions.seen(0, work.length, torch.device(device))
    if seen is None:
        return None
    products = total = 0.0
    for kernel in used:
        weight = feature_works.PRODUCTS.get(kernel.family.removesuffix("_flex"), 0)
        if weight:
            tile = feature_works.tile(kernel)  # type: ignore[arg-type]
            products += weight * feature_works.share_of_blocks(seen, *tile)
            total += weight
    return products / total
