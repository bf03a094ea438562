"""Kernels whose scores are functions written by hand, against float64; the map bit for bit."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from flex_cases import HEADS, SCORES, FlexCase
from torch import Tensor

from ..harness import (
    BOOL,
    DTYPE_NUMBERS,
    MAP_BLOCK,
    MAP_RUN,
    Guarded,
    MaskPlace,
    Sources,
    launch,
    place,
    request,
    with_seed,
)
from . import flex_far, flex_functions
from .attention import F16, F32, dense, ds_tiles
from .compiled import compile_kernel
from .properties import Property

FLEX_MAP = "attention_flex_map"
ORDINARY = ("attention_forward", "attention_backward_dkv", "attention_backward_dkv_pairs",
            "attention_backward_dq")  # fmt: skip
FORWARD, DKV, DKV_PAIRS, DQ = (f"{family}_flex" for family in ORDINARY)
MASKED, MAP = "Score<false, false, Mask<uchar, false>>", "Mask<uchar, false>"
FIRST_CAPTURE = 23  # shaders/flex_params.h
TOLERANCE = {F32: 1e-5, F16: 5e-3}
STEEP = 1e-2
"""Beside a derivative that grows without bound, which rounding errors grow by."""


def _guarded(x: Tensor) -> Guarded:
    """With the strides that it has."""
    strides = x.stride()
    if x.dtype == torch.int64:  # as halves
        strides = (*(2 * n for n in strides), 1)
        x = x.contiguous().unsqueeze(-1).view(torch.int32)
    guarded = Guarded(x.shape, strides, x.dtype)
    once = tuple(slice(0, 1) if n == 0 else slice(None) for n in strides)
    guarded.tensor[once].copy_(x[once])
    return guarded


def _shapes(captures: list[Tensor]) -> bytes:
    block = b""
    for x in captures:
        rest = 4 - x.dim()
        block += struct.pack("8i", *x.shape, *(1,) * rest, *x.stride(), *(0,) * rest)
    return block + bytes(32 * (8 - len(captures)))


def _states(case: FlexCase) -> bytes:
    if case.states is None:
        return struct.pack("3q6i", *(0,) * 8, 1)
    batches, heads, rows, cols = case.states.shape
    whole = case.block_q % MAP_BLOCK == 0 and case.block_kv % MAP_BLOCK == 0
    return struct.pack(
        "3q6i", rows * cols * heads * (batches > 1), rows * cols * (heads > 1), cols,
        case.block_q, case.block_kv, rows, cols, 1, whole,
    )  # fmt: skip


def map_of(case: FlexCase) -> Tensor:
    """(B, Hq, blocks, blocks, 2): the keys that a query sees, and whether all see all."""
    seen = case.seen()
    rows, cols = (-(-n // MAP_BLOCK) for n in (case.q_len, case.kv_len))
    some = torch.zeros(*seen.shape[:2], rows * MAP_BLOCK, cols * MAP_BLOCK, dtype=torch.bool)
    every = torch.ones_like(some)
    some[:, :, : case.q_len, : case.kv_len] = seen
    every[:, :, : case.q_len, : case.kv_len] = seen
    some, every = (
        x.unflatten(3, (cols, MAP_BLOCK)).unflatten(2, (rows, MAP_BLOCK)) for x in (some, every)
    )
    bits = (some.any(3) * 2 ** torch.arange(MAP_BLOCK)).sum(-1)
    bits = torch.where(bits >= 2**31, bits - 2**32, bits)
    return torch.stack((bits, every.all(5).all(3).long()), -1).int()


def expected(case: FlexCase) -> dict[str, Tensor]:
    """Results in float64, and what the backward's kernels read."""
    q, k, v, do, dlse = case.operands()
    ref = case.math(torch.float64, q, k, v, do, dlse)
    scores = torch.matmul(q.double(), k.double().repeat_interleave(2, 1).mT) * case.own_scale
    mod = SCORES[case.score]
    scores = scores if mod is None else mod.function(scores, *case.places())
    scores = scores.masked_fill(~case.seen(), -torch.inf)
    unit = 1.0 if case.score != "none" else math.log(2.0)
    origin = scores.amax(-1).clamp_min(torch.finfo(F32).min)
    log_sum = torch.exp(scores - origin[..., None]).sum(-1).log()
    delta = ((do.double() * ref.out).sum(-1) - dlse).masked_fill(log_sum == -torch.inf, 0.0)
    stats = torch.stack((origin / unit, log_sum / unit), -1).float()
    return dict(out=ref.out, lse=ref.lse, dq=ref.dq, dk=ref.dk, dv=ref.dv, delta=delta.float(),
                row_stats=stats)  # fmt: skip


def dscores(case: FlexCase) -> Tensor:
    """dS in float64 (B, Hq, L, S), of a case in which all is seen."""
    q, k, v, do, dlse = (x.double() for x in case.operands())
    scores = torch.matmul(q, k.repeat_interleave(2, 1).mT) * case.own_scale
    scores.requires_grad_()
    mod = SCORES[case.score]
    assert mod is not None and case.mask == "none" and case.states is None
    of_scores = mod.function(scores, *case.places())
    out = torch.matmul(torch.softmax(of_scores, -1), v.repeat_interleave(2, 1))
    loss = (out * do).sum() + (torch.logsumexp(of_scores, -1) * dlse).sum()
    return torch.autograd.grad(loss, scores)[0]


@dataclass(frozen=True)
class Flexed:
    """One kernel on one problem."""

    name: str
    family: str
    case: FlexCase
    check: bool = False
    shared: tuple[bool, bool] = (False, False)  # whether a map is the same for batches, heads
    stores: bool = False  # dS, which other kernels read
    beside: tuple[str, ...] = ()

    def kernel(self, sources: Sources) -> tuple[dict[str, Any], bytes]:
        """As native/flex_plan.cpp makes it of the ordinary one, and its params."""
        case = self.case
        has_map = case.mask != "none" or case.states is not None
        q, k, v, do, _ = case.operands()
        layouts = dict(zip(("q", "k", "v", "out", "dout"), map(Guarded.like, (q, k, v, do, do),
                                                                ("dense",) * 5)))  # fmt: skip
        fields: dict[str, Any] = dict(
            scale=case.own_scale, stores_ds=True, scratch_bytes=self.stores << 30
        )
        if has_map:
            batch, heads = (1 if one else n for one, n in zip(self.shared, (case.batch, HEADS)))
            sizes = (batch, 1, heads, case.q_len, case.kv_len)
            fields["mask"] = MaskPlace(sizes, (1,) * 5, 1, 1, BOOL)
        backward = self.family in (DKV, DKV_PAIRS, DQ)
        places = {name: place(x) for name, x in layouts.items()}
        plan, params = sources.plan(request(places, DTYPE_NUMBERS[case.dtype], backward, **fields))
        ordinary = self.family.removesuffix("_flex")
        wanted = "attention_mask_map" if self.family == FLEX_MAP else ordinary
        kernel = next(x for x in plan["kernels"] if x["family"] == wanted)
        scoring = case.scoring("cpu")
        mask_mod = "MaskMod" if scoring.mask else "NoMaskMod"
        name = f"{kernel['name']}_{case.score}_{case.mask}"
        if self.family == FLEX_MAP:
            call = f"{FLEX_MAP}<{mask_mod}, 4>"
            line = f'template [[host_name("{name}")]] [[kernel]] decltype({call}) {call};\n'
            rows, cols = (-(-n // MAP_BLOCK) for n in (case.q_len, case.kv_len))
            groups = [kernel["groups"][0], rows * -(-cols // (4 * MAP_RUN))]
            own = {"name": name, "instantiation": scoring.mask + line, "groups": groups}
            return kernel | own, params
        score = f"FlexScore<{'ScoreMod' if scoring.score else 'NoScoreMod'}, {mask_mod}, " + (
            f"{MAP}>" if has_map else "NoMask>"
        )
        line = kernel["instantiation"].replace(kernel["name"], name)
        line = line.replace(MASKED if has_map else "PlainScore", score)
        text = scoring.score + scoring.mask + line
        return kernel | {"name": name, "instantiation": text}, params

    def map(self) -> Tensor:
        batches, heads = (slice(1 if one else None) for one in self.shared)
        return map_of(self.case)[batches, heads].contiguous()

    def run(self, sources: Sources, note: Callable[[str], None] = lambda _: None) -> None:
        case = self.case
        kernel, params = self.kernel(sources)
        library = compile_kernel(sources, self.family, kernel, self.check)
        note("compiled")
        right = expected(case)
        scoring = case.scoring("cpu")
        captures = [x.to(torch.uint8) if x.dtype == torch.bool else x for x in scoring.captures]
        q, k, v, do = (Guarded.like(x, "dense") for x in case.operands()[:4])
        inputs = dict(query=q, key=k, value=v)
        numbers = dict(sources.buffers)
        for n, x in enumerate(captures):
            numbers[f"capture{n}"] = FIRST_CAPTURE + n
            inputs[f"capture{n}"] = _guarded(x)
        states = case.states if case.states is not None else torch.zeros(1, dtype=torch.uint8)
        found = {}
        if case.mask != "none" or case.states is not None:
            inputs["mask"] = _guarded(states)
        if self.family == FLEX_MAP:
            shape = self.map().shape
            outputs = {"mask_map": Guarded(shape, dense(tuple(shape)), torch.int32)}
            inputs = {n: x for n, x in inputs.items() if n not in ("query", "key", "value")}
        else:
            inputs["mask_map"] = _guarded(self.map())
            outputs = {}
            strides = {}
            results = {FORWARD: ("out", "row_stats"), DQ: ("dq",)}.get(self.family, ("dk", "dv"))
            for n in results:
                dtype = F32 if n == "row_stats" else case.dtype
                outputs[n] = Guarded(right[n].shape, dense(tuple(right[n].shape)), dtype)
                if n != "row_stats":
                    strides[n] = dense(tuple(right[n].shape))
            if self.stores:
                shape = ds_tiles(dscores(case).flatten(0, 1)).shape
                outputs["ds"] = Guarded(shape, dense(tuple(shape)), F32)
            if self.family == FORWARD:
                params.out[:] = strides.pop("out")
                inputs["sinks"] = _guarded(torch.full((HEADS,), torch.nan))
            else:
                inputs |= dict(dout=do, delta=_guarded(right["delta"]),
                               row_stats=_guarded(right["row_stats"]))  # fmt: skip
            params = with_seed(params, key_end=case.kv_len, **strides)
        block = bytes(params) + _shapes(captures) + _states(case)
        launch(library, kernel, numbers, block, inputs, outputs, workers=1)
        found = {n: x.tensor.clone() for n, x in outputs.items()}
        if self.family == FLEX_MAP:
            assert torch.equal(found["mask_map"], self.map()), "the map is another"
            return
        if self.stores:
            right["ds"] = ds_tiles(dscores(case).flatten(0, 1))
            beyond = ds_tiles(torch.ones_like(dscores(case)).flatten(0, 1)) == 0
            assert not found["ds"][beyond].any(), "dS of what there is not"
        for n, x in found.items():
            y = right[n]
            if n == "row_stats":
                unit = 1.0 if scoring.score else math.log(2.0)
                x, y = x.double().sum(-1) * unit, right["lse"]
                assert torch.equal(x < -1e30, y == -torch.inf), "rows that see nothing"
                x, y = (t.masked_fill(y == -torch.inf, 0.0) for t in (x, y))
            error = (x.double() - y).abs().max() / y.abs().max()
            allowed = STEEP if case.score == "beyond" else TOLERANCE[case.dtype]
            assert error <= allowed, f"{n}: {error:.1e}"


def _random_states(rows: int, cols: int, batches: int, heads: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(0, 3, (batches, heads, rows, cols), generator=generator).byte()


def _blocks(case: FlexCase, block_q: int, block_kv: int, batches: int, heads: int) -> FlexCase:
    rows, cols = -(-case.q_len // block_q), -(-case.kv_len // block_kv)
    states = _random_states(rows, cols, batches, heads)
    return replace(case, states=states, block_q=block_q, block_kv=block_kv)


@functools.cache
def killers() -> tuple[Flexed | Property, ...]:
    """In order of cost."""
    of_map = FlexCase(75, 150, 16, "none", "pairs")
    maps = {
        "every pair asked": FlexCase(75, 150, 16, "none", "document"),
        "heads": FlexCase(33, 64, 16, "none", "heads"),
        "whole blocks": _blocks(of_map, 32, 64, 2, HEADS),
        "other blocks": _blocks(of_map, 20, 48, 1, HEADS),
        "states alone": _blocks(replace(of_map, mask="none"), 64, 32, 2, 1),
        "as many blocks as simdgroups": replace(of_map, kv_len=128),
        "blocks that end with the keys": _blocks(of_map, 25, 30, 1, 1),
        "one block": _blocks(of_map, 1 << 30, 1 << 30, 1, 1),
        "one more than whole blocks": replace(of_map, q_len=65, kv_len=129),
        "captures": replace(of_map, mask="eight"),
        "captures of a query": FlexCase(33, 150, 16, "none", "eight"),  # the 33rd is by itself
        "twice as many blocks as simdgroups": replace(of_map, kv_len=250),
        **{  # of 8 blocks for a simdgroup, and 4 simdgroups
            f"{blocks} blocks of keys": FlexCase(40, 32 * blocks, 16, "none", "heads")
            for blocks in (9, 31, 32, 33, 34)
        },
    }
    alike = {  # maps that are the same for batches, or for heads
        "of batches": (FlexCase(75, 90, 16, "none", "batches"), (False, True)),
        "of heads": (FlexCase(75, 90, 16, "none", "heads"), (True, False)),
        "of all": (FlexCase(75, 90, 16, "none", "pairs"), (True, True)),
    }
    tiles = {
        "score and mask": FlexCase(75, 90, 16, "where", "document"),
        "states": _blocks(FlexCase(75, 90, 16, "none", "pairs"), 32, 32, 2, HEADS),
        "other states": _blocks(FlexCase(75, 90, 16, "softcap", "pairs"), 12, 20, 1, HEADS),
        "states that end": _blocks(FlexCase(75, 90, 16, "softcap", "pairs"), 25, 30, 2, 1),
        "states to the last byte": _blocks(
            FlexCase(75, 90, 16, "softcap", "pairs"), 20, 30, 2, HEADS
        ),
        "states of odd blocks": _blocks(FlexCase(75, 90, 16, "softcap", "pairs"), 15, 25, 1, 1),
        "number": FlexCase(33, 75, 16, "number", "none"),
        "captures": FlexCase(75, 90, 16, "eight", "heads"),
        "captures of a mask": FlexCase(75, 90, 16, "none", "eight"),
        "steps": FlexCase(33, 75, 16, "steps", "none"),
        "outside": FlexCase(75, 90, 16, "outside", "none"),
        "no derivative beyond": FlexCase(75, 75, 16, "beyond", "none"),
        **{
            f"no derivative beyond {q_len}, {kv_len}": FlexCase(q_len, kv_len, 16, "beyond", "none")
            for q_len, kv_len in (
                (95, 96),
                (96, 95),
                (63, 64),
                (64, 63),
                (67, 64),
                (64, 67),
                (71, 128),
                (128, 71),
                (33, 160),
                (160, 33),
                (66, 64),
                (64, 66),
                (70, 128),
                (128, 70),
            )
        },
        "half": FlexCase(75, 75, 16, "softcap", "hidden", F16),
        "half, by the tanh of texts": FlexCase(75, 75, 16, "capped", "hidden", F16),
        "the tanh of texts": FlexCase(75, 75, 16, "capped", "none"),
    }
    wide = {name: replace(case, head_dim=96) for name, case in tiles.items()
            if case.dtype == F32
            and name not in ("steps", "captures", "outside", "number")}  # fmt: skip
    return (
        *flex_functions.killers(),
        *(
            Flexed(f"flex {family}: dS, {case.q_len}, {case.kv_len}", family, case, stores=True)
            for family, width in ((DKV, 64), (DKV_PAIRS, 96))
            for case in (FlexCase(n, m, width, "beyond", "none")
                         for n, m in ((75, 75), (64, 66), (64, 71), (67, 64), (33, 60)))
        ),
        *(Flexed(f"flex map: {name}", FLEX_MAP, case) for name, case in maps.items()),
        *(Flexed(f"flex {family}: {name}", f"{family}_flex", case)
          for family in (ORDINARY[0], ORDINARY[3], ORDINARY[1]) for name, case in tiles.items()),
        *(Flexed(f"flex pairs: {name}", DKV_PAIRS, case) for name, case in wide.items()),
        *(Flexed(f"flex map: alike {name}", FLEX_MAP, case, shared=shared)
          for name, (case, shared) in alike.items()),
        *(Flexed(f"flex {family}: alike {name}", f"{family}_flex", case, shared=shared)
          for family in (ORDINARY[0], ORDINARY[3], ORDINARY[1])
          for name, (case, shared) in alike.items()),
        *flex_far.killers(),
        *(Flexed(f"flex map, checked: {name}", FLEX_MAP, case, True)
          for name, case in maps.items()),
        *(Flexed(f"flex {family}, checked: {name}", f"{family}_flex", tiles[name], True)
          for family in (ORDINARY[0], ORDINARY[3], ORDINARY[1])
          for name in ("captures", "states", "states that end", "states to the last byte",
                       "steps", "outside")),
    )  # fmt: skip
