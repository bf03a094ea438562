"""Kernels on problems whose scores are not plain: softcap, ALiBi, masks, sinks, value widths.

A problem runs once by the repository's kernels; then each kernel that a killer is about runs anew
from the sources under test, with what the others have left, and its results are judged by float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from attention_cases import SEED, Case
from simulator import engine
from torch import Tensor

from orchard_ops import dropout
from orchard_ops.testing import MathResult, assert_attention_close, math_attention

from ..harness import (
    BOOL,
    DELTA,
    DKV,
    DKV_PAIRS,
    DQ,
    DQ_FROM_DS,
    DSINKS,
    DTYPE_NUMBERS,
    FORWARD,
    MASK_MAP,
    Guarded,
    MaskPlace,
    Params,
    Sources,
    launch,
    request,
    with_seed,
)
from .attention import BF16, F16, F32, KEYS_SIDE, dense, ds_tiles, keys_of_group, repository
from .compiled import template_arguments

WRITTEN = {
    MASK_MAP: ("mask_map",), FORWARD: ("out", "row_stats"), DELTA: ("delta", "sink_parts"),
    DKV: ("dk", "dv", "ds"), DKV_PAIRS: ("dk", "dv", "ds"), DQ: ("dq",), DQ_FROM_DS: ("dq",),
    DSINKS: ("dsinks",),
}  # fmt: skip
_OPERANDS = {"q": "query", "k": "key", "v": "value", "out": "out", "dout": "dout"}


@dataclass(frozen=True)
class Scores:
    """A problem: a case, and how its mask lies in memory and what it hides."""

    case: Case
    hides: str = ""  # "": as the case draws it; "blocks", "padding", "rows"
    side_by_side: bool = False  # whether the mask's elements lie in pairs
    folded: tuple[int, int] = (0, 0)  # the mask's two batch dimensions, if it has two
    dlse: bool = True
    store_ds: bool = False

    def mask(self) -> Tensor | None:
        mask = self.case.scoring().attn_mask
        if mask is None:
            return None
        rows, keys = torch.arange(mask.shape[2])[:, None], torch.arange(mask.shape[3])
        hidden = {
            "": rows + keys < 0, "blocks": (rows // 32 + keys // 32) % 2 == 1,
            "padding": (keys >= 40) | (keys < 3), "rows": (rows % 5 == 2) | (keys % 3 == 1),
        }[self.hides]  # fmt: skip
        hidden = hidden.expand(mask.shape)
        if mask.dtype == torch.bool:
            return mask & ~hidden
        return mask.masked_fill(hidden, -math.inf)


@dataclass(frozen=True)
class Given:
    """A problem's tensors by the names of their buffers, and what its results must be."""

    tensors: dict[str, Tensor]
    mask: MaskPlace | None
    ref: MathResult
    eager: MathResult
    seen: Tensor  # (B, Hq, L, S)
    within: Tensor  # (L, S), what the windows leave
    ds: Tensor  # float64
    fields: dict[str, Any] = field(default_factory=dict)


def _five(x: Tensor, folded: tuple[int, int]) -> Tensor:
    return x.unflatten(0, folded) if folded != (0, 0) else x[:, None]


def _placed(mask: Tensor, problem: Scores) -> tuple[Tensor, MaskPlace, Tensor]:
    """The mask's memory, its place in it, and what it means, with four dimensions."""
    folded, case = problem.folded, problem.case
    if folded != (0, 0):
        mask = mask[: math.prod(folded)]
    five = _five(mask, folded)
    pad = 2 if problem.side_by_side else 1 + five.shape[4] % 2
    wide = five.new_ones((*five.shape[:4], five.shape[4] + pad))
    offset = pad if five.shape[4] > 1 else 0
    view = wide[..., offset:] if offset else wide[..., :1]
    view.copy_(five)
    outer, inner = five.shape[:2]
    inner_size = inner if inner > 1 else case.batch // outer
    number = BOOL if mask.dtype == torch.bool else DTYPE_NUMBERS[mask.dtype]
    place = MaskPlace(tuple(view.shape), view.stride(), view.storage_offset(), inner_size, number)
    if folded == (0, 0):
        return wide, place, mask
    batches = (case.batch // inner_size, inner_size)
    meaning = five.expand(*batches, *five.shape[2:]).flatten(0, 1)
    return wide, place, meaning


@functools.cache
def given(problem: Scores) -> Given:
    case = problem.case
    q, k, v, dout = case.operands()
    scoring, mask = case.scoring(), problem.mask()
    tensors = {"query": q, "key": k, "value": v, "dout": dout}
    mask_place = None
    if mask is not None:
        memory, mask_place, mask = _placed(mask, problem)
        tensors["mask"] = memory.view(torch.uint8) if memory.dtype == torch.bool else memory
    for name, x in (("alibi_slopes", scoring.alibi_slopes), ("sinks", scoring.sinks)):
        if x is not None:
            tensors[name] = x
    dlse = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(2))
    if problem.dlse:
        tensors["dlse"] = dlse
    scoring = scoring._replace(attn_mask=mask)
    arguments = scoring._asdict() | {"dropout_seed": SEED}
    ref, eager = (
        math_attention(q, k, v, dout, dlse if problem.dlse else None, dtype=t, **arguments)
        for t in (torch.float64, case.dtype)
    )
    row = torch.arange(case.q_len)[:, None] + case.diagonal
    key = torch.arange(case.kv_len)
    left, right = (w if w >= 0 else 1 << 30 for w in (case.window_left, case.window_right))
    within = (key >= row - left) & (key <= row + right)
    seen = within.expand(case.batch, case.num_heads, -1, -1)
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask != -math.inf)
    slopes = scoring.alibi_slopes
    fields = {
        "scale": scoring.scale, "dropout_p": case.dropout_p, "diagonal": case.diagonal,
        "window_left": case.window_left, "window_right": case.window_right,
        "softcap": case.softcap, "has_alibi": slopes is not None,
        "has_sinks": scoring.sinks is not None,
    }  # fmt: skip
    if slopes is not None:
        fields |= {"alibi_batch": slopes.stride(0) if slopes.dim() == 2 else 0, "alibi_head": 1}
    if mask_place is not None:
        fields["mask"] = mask_place
    ds = _ds(case, (q, k, v, dout), dlse * problem.dlse, mask, seen)
    return Given(tensors, mask_place, ref, eager, seen, within, ds, fields)


def _ds(case: Case, operands: tuple[Tensor, ...], dlse: Tensor, mask: Tensor | None,
        seen: Tensor) -> Tensor:  # fmt: skip
    """Gradient of scale * q k^T, in float64."""
    q, k, v, dout = (x.double() for x in operands)
    group, scoring = case.num_heads // case.num_kv_heads, case.scoring()
    product = (scoring.scale * q @ k.repeat_interleave(group, 1).mT).requires_grad_()
    score = product
    if case.softcap:
        score = case.softcap * torch.tanh(score / case.softcap)
    if scoring.alibi_slopes is not None:
        distance = torch.arange(case.q_len)[:, None] + case.diagonal - torch.arange(case.kv_len)
        slopes = scoring.alibi_slopes.double().view(-1, case.num_heads, 1, 1)
        score = score - slopes * distance.abs()
    if mask is not None and mask.dtype != torch.bool:
        score = score + mask.double()
    score = score.masked_fill(~seen, -1e30)
    logits = score
    if scoring.sinks is not None:
        sink = scoring.sinks.double().view(1, -1, 1, 1).expand(*score.shape[:3], 1)
        logits = torch.cat((score, sink), -1)
    weights = torch.softmax(logits, -1)[..., : case.kv_len] * seen
    if case.dropout_p:
        kept = dropout.dropout_mask(SEED, case.dropout_p, tuple(score.shape))
        weights = weights * kept * dropout.rescale(case.dropout_p)
    out = weights @ v.repeat_interleave(group, 1)
    lse = torch.logsumexp(logits, -1).masked_fill(~seen.any(-1) & (logits is score), 0.0)
    loss = (out * dout).sum() + (lse * dlse.double()).sum()
    return torch.autograd.grad(loss, product)[0]


def _plan(problem: Scores, sources: Sources, out: Tensor, backward: bool) -> tuple[dict, Params]:
    x = given(problem)
    tensors = x.tensors | {"out": out}
    layouts = {
        short: (tensors[name].shape, tensors[name].stride(), 0) for short, name in _OPERANDS.items()
    }
    number = DTYPE_NUMBERS[problem.case.dtype]
    scratch = problem.store_ds << 40
    plan, params = sources.plan(
        request(layouts, number, backward, scratch_bytes=scratch, **x.fields)
    )
    assert not plan["refusal"], plan["refusal"]
    return plan, params


def _empty_out(problem: Scores) -> Tensor:
    x = given(problem).tensors
    return torch.empty((*x["query"].shape[:3], x["value"].shape[3]), dtype=problem.case.dtype)


def _flat(x: Tensor) -> Guarded:
    """Its memory, whatever its shape."""
    guarded = Guarded(tuple(x.shape), dense(tuple(x.shape)), x.dtype)
    guarded.tensor.copy_(x)
    return guarded


def _shapes(problem: Scores, plan: dict) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    x, case = given(problem).tensors, problem.case
    rows = tuple(x["query"].shape[:3])
    blocks = -(-case.kv_len // 8), -(-case.q_len // 8)
    return {
        "out": ((*rows, x["value"].shape[3]), case.dtype), "row_stats": ((*rows, 2), F32),
        "delta": (rows, F32), "sink_parts": ((*rows[:2], -(-rows[2] // 8)), F32),
        "dq": (tuple(x["query"].shape), case.dtype), "dk": (tuple(x["key"].shape), case.dtype),
        "dv": (tuple(x["value"].shape), case.dtype), "dsinks": ((rows[1],), F32),
        "mask_map": ((max(plan["map_elements"], 1), 2), torch.int32),
        "ds": ((rows[0] * rows[1], *blocks, 8, 8), F32),
    }  # fmt: skip


def _launch(
    problem: Scores, kernel: dict, plan: dict, params: Params, known: dict[str, Tensor],
    library: engine.Library, numbers: dict[str, int],
) -> tuple[dict[str, Tensor], engine.Counters]:  # fmt: skip
    family, shapes = kernel["family"], _shapes(problem, plan)
    written = set(WRITTEN[family])
    if not problem.store_ds:
        written.discard("ds")
    if "sinks" not in known:
        written.discard("sink_parts")
    outputs = {name: Guarded(s, dense(s), t) for name, (s, t) in shapes.items() if name in written}
    inputs = {name: _flat(x) for name, x in known.items() if name not in written}
    if family == MASK_MAP:
        inputs = {"mask": inputs["mask"]}
    elif family == DSINKS:
        inputs = {"sink_parts": inputs["sink_parts"]}
    place_of = given(problem).mask
    if place_of is not None and "mask" in inputs:  # as the host binds it, at its first element
        memory = inputs["mask"]
        size = memory.tensor.element_size()
        memory.extent -= place_of.offset
        first = memory.tensor.data_ptr() + place_of.offset * size
        memory.buffer = lambda writable, first=first, memory=memory: engine.Buffer(  # type: ignore[method-assign]
            first, memory.extent * memory.tensor.element_size(), writable
        )
    strides = {
        name: shaped.tensor.stride()
        for name, shaped in outputs.items()
        if name in ("out", "dq", "dk", "dv")
    }
    block = with_seed(
        params, has_dlse=int("dlse" in known), key_end=problem.case.kv_len,
        **{name: tuple(s) for name, s in strides.items()},
    )  # fmt: skip
    counters = launch(library, kernel, numbers, block, inputs, outputs, workers=1)
    return {name: x.tensor.clone() for name, x in outputs.items()}, counters


@functools.cache
def _library(line: str, family: str) -> engine.Library:
    return engine.compile(repository().text(family) + line)


@functools.cache
def left_by_the_repository(problem: Scores) -> dict[str, Tensor]:
    """Every buffer after a forward and a backward by the repository's kernels."""
    sources, known = repository(), dict(given(problem).tensors)
    out = torch.empty(
        (*known["query"].shape[:3], known["value"].shape[3]), dtype=problem.case.dtype
    )
    for backward in (False, True):
        plan, params = _plan(problem, sources, out, backward)
        for kernel in plan["kernels"]:
            library = _library(kernel["instantiation"], kernel["family"])
            results, _ = _launch(problem, kernel, plan, params, known, library, sources.buffers)
            known |= results
    return known


_compiled: dict[tuple, engine.Library] = {}


@dataclass(frozen=True)
class Scored:
    """A kernel on a problem whose scores are not plain."""

    name: str
    family: str
    problem: Scores
    check: bool = False

    def run(self, sources: Sources, note: Callable[[str], None] = lambda _: None) -> None:
        problem, family = self.problem, self.family
        known = dict(left_by_the_repository(problem))
        plan, params = _plan(problem, sources, known["out"], family != FORWARD)
        kernel = next(dict(k) for k in plan["kernels"] if k["family"] == family)
        key = (sources.root, kernel["name"], self.check)
        if key not in _compiled:
            text = sources.text(family) + kernel["instantiation"]
            _compiled[key] = engine.compile(text, check=self.check)
        note("compiled")
        results, counters = _launch(
            problem, kernel, plan, params, known, _compiled[key], sources.buffers
        )
        self._compare(results)
        expected = self._products(kernel)
        assert counters.mma == expected, f"{counters.mma} matrix products, not {expected}"

    def _compare(self, results: dict[str, Tensor]) -> None:
        x = given(self.problem)
        named: dict[str, Tensor | None] = dict.fromkeys(
            ("out", "lse", "dq", "dk", "dv", "dmask", "dsinks")
        )
        for name, got in results.items():
            if name == "row_stats":
                named["lse"] = (got.double().sum(-1) * self.problem.case.scoring().unit).float()
                self._compare_stats(got)
            elif name in ("delta", "sink_parts"):
                self._compare_rows(name, got)
            elif name == "ds":
                self._compare_ds(got)
            elif name == "mask_map":
                assert torch.equal(got, self._map()), "mask_map"
            else:
                named[name] = got
        assert_attention_close(list(named.values()), x.ref, x.eager)

    def _compare_stats(self, got: Tensor) -> None:
        sees = given(self.problem).seen.any(-1)
        log_sum = got[..., 1]
        without = torch.signbit(log_sum) == ~sees
        assert without.all(), "the sign that tells rows without a key"

    def _compare_rows(self, name: str, got: Tensor) -> None:
        x, known = given(self.problem), left_by_the_repository(self.problem)
        delta = (x.tensors["dout"].double() * known["out"].double()).sum(-1)
        size = (x.tensors["dout"].double() * known["out"].double()).abs().sum(-1).max()
        sees = x.seen.any(-1)
        delta = torch.where(sees, delta, 0.0)
        if "dlse" in x.tensors:
            delta = delta - x.tensors["dlse"].double()
            size = size + x.tensors["dlse"].abs().max()
        if name == "delta":
            expected = torch.where(sees, delta, 0.0)
        else:
            sinks = x.tensors["sinks"].double().view(1, -1, 1)
            weights = torch.exp(sinks - x.ref.lse)
            rows = torch.nn.functional.pad(-weights * delta, (0, -delta.shape[2] % 8))
            expected = rows.unflatten(2, (-1, 8)).sum(-1)
            size = 8 * size
        assert ((got.double() - expected).abs() <= 64 * torch.finfo(F32).eps * size).all(), name

    def _compare_ds(self, got: Tensor) -> None:
        x = given(self.problem)
        expected = ds_tiles(x.ds.flatten(0, 1))
        seen = ds_tiles(x.seen.flatten(0, 1).double()) > 0
        error = (got.double() - expected).abs()
        eps = torch.finfo(self.problem.case.dtype).eps
        assert (error[seen] <= 32 * eps * x.ds.abs().max()).all(), "dS"
        tiles = seen.flatten(-2).any(-1)
        hidden = got[tiles][~seen[tiles]]
        assert (hidden == 0).all(), "dS of what is not seen"

    def _map(self) -> Tensor:
        """As masks.h describes it, by torch."""
        x, case = given(self.problem), self.problem.case
        assert x.mask is not None
        plan, _ = _plan(self.problem, repository(), left_by_the_repository(self.problem)["out"],
                        False)  # fmt: skip
        memory = x.tensors["mask"].view(-1)
        mask = memory.as_strided(x.mask.sizes, x.mask.strides, x.mask.offset)
        passes = mask != 0 if x.mask.dtype == BOOL else mask != -math.inf
        windowed = case.window_left >= 0 or case.window_right >= 0
        any_seen = passes
        if passes.shape[3] > 1 and windowed:
            passes = passes.expand(*passes.shape[:4], case.kv_len)
            any_seen = passes & x.within
        blocks = []
        for seen, all_of in ((any_seen, False), (passes, True)):
            rows, keys = seen.shape[3], seen.shape[4]
            if keys == 1 and case.kv_len > 1:
                seen = seen.expand(*seen.shape[:4], 32)
            fill = (0, -seen.shape[4] % 32, 0, -rows % 32 if rows > 1 else 0)
            whole = torch.nn.functional.pad(seen.float(), fill, value=float(all_of)) > 0
            whole = whole.unflatten(4, (-1, 32))
            whole = whole.unflatten(3, (-1, 32 if rows > 1 else 1))
            blocks.append(whole.all(4).all(-1) if all_of else whole.any(4))
        bits = (blocks[0].long() << torch.arange(32)).sum(-1)
        bits = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int()
        found = torch.stack((bits, blocks[1].int()), -1).flatten(0, -2)
        assert len(found) == plan["map_elements"]
        return found

    def _products(self, kernel: dict) -> int:
        """8 x 8 x 8 products if exactly the blocks run in which something is seen."""
        if self.family in (MASK_MAP, DELTA, DSINKS):
            return 0
        x, case = given(self.problem), self.problem.case
        arguments = template_arguments(kernel)
        width, has_mask = int(arguments[2]) // 8, x.mask is not None
        seen = x.seen.flatten(0, 1)
        total = 0
        if self.family in KEYS_SIDE:
            block, keys = int(arguments[3]), keys_of_group(self.family)
            for head in seen:
                for key in range(0, case.kv_len, keys):
                    for row in _span(x.within[:, key : key + keys].any(1), block):
                        part = head[row // 32 * 32 :, key // 32 * 32 :][:32, :32]
                        total += bool(part.any()) or not has_mask
            return total * 4 * 4 * (block // 8) * width * keys // 32
        r, block = int(arguments[3]), int(arguments[4])
        for head in seen:
            for row in range(0, case.q_len, 32 * r):
                rows = slice(row, row + 32 * r)
                for key in _span(x.within[rows].any(0), block):
                    total += bool(head[rows, key : key + block].any()) or not has_mask
        of_family = {FORWARD: 2, DQ: 3, DQ_FROM_DS: 1}[self.family]
        return total * 4 * of_family * r * (block // 8) * width


def _span(seen: Tensor, block: int) -> range:
    """Where the blocks begin, from the first to the last seen position."""
    places = seen.nonzero()
    if not len(places):
        return range(0)
    return range(int(places.min()) // block * block, int(places.max()) + 1, block)


_BASE = Case(41, 70, 16, batch=2, num_heads=4, num_kv_heads=2, dtype=F32)
_WIDE = _BASE.but(head_dim=64, num_heads=2, num_kv_heads=1)
_ALL = _BASE.but(
    softcap=1.5, alibi="batch", mask="float32", sinks=True, window_left=40, window_right=21,
    diagonal=9, dropout_p=0.2, value_dim=13,
)  # fmt: skip
PROBLEMS: dict[str, Scores] = {
    "all together": Scores(_ALL, "rows"),
    "all together, half": Scores(_ALL.but(dtype=F16, mask="same", value_dim=8, kv_len=66), "rows"),
    "softcap": Scores(_BASE.but(softcap=0.7, scale=1.0), dlse=False),
    "softcap, half": Scores(_BASE.but(softcap=0.7, scale=1.0, dtype=F16)),
    "softcap, far": Scores(_BASE.but(softcap=3.0, scale=60.0, dtype=F16)),
    "ALiBi by head": Scores(_BASE.but(alibi="head", diagonal=-7)),
    "sinks, alone": Scores(_BASE.but(sinks=True, window_right=0, diagonal=-10)),
    "blocks of a mask": Scores(_BASE.but(mask="bool", q_len=75, kv_len=100), "blocks"),
    "pairs of a mask": Scores(_BASE.but(mask="bool", kv_len=98), "blocks", side_by_side=True),
    "padding": Scores(_BASE.but(mask="bool", mask_full=(True, False, False, True), sinks=True),
                      "padding"),
    "rows of a mask": Scores(_BASE.but(mask="bool", mask_full=(True, True, True, False), q_len=75,
                                       window_left=20, window_right=9, diagonal=5)),
    "one for all": Scores(_BASE.but(mask="float32", mask_full=(False, False, False, True),
                                    kv_len=66), side_by_side=True),
    "outer batches": Scores(_BASE.but(batch=4, mask="bool"), "rows", folded=(2, 1)),
    "inner batches": Scores(_BASE.but(batch=4, mask="same", kv_len=66), "rows", folded=(1, 2),
                            side_by_side=True),
    "narrow values": Scores(_BASE.but(head_dim=24, value_dim=9)),
    "wide values": Scores(_BASE.but(head_dim=9, value_dim=24)),
    "stored": Scores(_WIDE.but(softcap=1.5, mask="bool", value_dim=40, window_left=50), "blocks",
                     store_ds=True),
    "stored, tall": Scores(_WIDE.but(alibi="head", mask="float32", q_len=75, dropout_p=0.2),
                           "blocks", store_ds=True),
    "pairs": Scores(_WIDE.but(head_dim=96, q_len=75, softcap=1.5, alibi="head", mask="float32"),
                    "blocks"),
    "pairs, stored": Scores(_WIDE.but(head_dim=96, value_dim=50, mask="bool", softcap=2.0,
                                      sinks=True), "rows", store_ds=True),
    "bfloat16": Scores(_BASE.but(dtype=BF16, mask="same", kv_len=66, alibi="head"), "padding",
                       side_by_side=True),
}  # fmt: skip


@functools.cache
def killers() -> tuple[Scored, ...]:
    return tuple(
        Scored(f"{family}: scores, {name}", family, problem)
        for name, problem in PROBLEMS.items()
        for family in _families(problem)
    )


@functools.cache
def checked() -> tuple[Scored, ...]:
    return tuple(
        Scored(f"{family}: scores, {name}, checked", family, PROBLEMS[name], check=True)
        for name in ("all together", "blocks of a mask", "pairs, stored", "inner batches")
        for family in _families(PROBLEMS[name])
    )


def _families(problem: Scores) -> list[str]:
    """Those that its plans have. Nothing is computed to know them: workers are forked later."""
    case = problem.case
    alone = 96 if case.dtype == F16 else 80
    keys_side = DKV if max(case.head_dim, case.value_dim or 0) <= alone else DKV_PAIRS
    return [
        *[MASK_MAP] * bool(case.mask), FORWARD, DELTA, keys_side,
        DQ_FROM_DS if problem.store_ds else DQ, *[DSINKS] * case.sinks,
    ]  # fmt: skip
