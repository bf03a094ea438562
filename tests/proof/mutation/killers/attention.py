"""A kernel on one problem, against float64 and the exact number of its products."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from attention_cases import SEED, Case
from simulator import engine
from torch import Tensor

from orchard_ops import dropout
from orchard_ops.testing import MathResult, assert_attention_close

from ..harness import (
    DELTA,
    DKV,
    DKV_PAIRS,
    DQ,
    DQ_FROM_DS,
    DTYPE_NUMBERS,
    FORWARD,
    Guarded,
    Params,
    Sources,
    launch,
    place,
    request,
    with_seed,
)
from .compiled import compile_kernel, template_arguments

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
KEYS_SIDE = (DKV, DKV_PAIRS)  # the same arguments; the plan's choice is by the width


@dataclass(frozen=True)
class Reference:
    """Operands of a case, its results, and what the forward hands to the backward kernels."""

    operands: tuple[Tensor, ...]
    dlse: Tensor | None
    ref: MathResult
    eager: MathResult
    out: Tensor
    delta: Tensor
    weights: Tensor  # float64, before dropout
    ds: Tensor  # gradient of the scores, float64
    ds_rounding: float  # what float32 makes of it at most
    visible: Tensor  # (q_len, kv_len)


@functools.cache
def reference(case: Case, with_dlse: bool, shifts: tuple[float, float]) -> Reference:
    q, k, v, do = case.operands()
    q, k = q + shifts[0], k + shifts[1]
    dlse = None
    if with_dlse:
        generator = torch.Generator().manual_seed(2)
        dlse = torch.randn(q.shape[:3], generator=generator)
    ref, eager = (case.math(t, q, k, v, do, dlse=dlse) for t in (torch.float64, case.dtype))
    out = ref.out.to(case.dtype)
    delta = (do.double() * out.double()).sum(-1)
    if dlse is not None:
        delta -= dlse.double()
    visible = window_of(case)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    group = case.num_heads // case.num_kv_heads
    k64, v64 = (x.double().repeat_interleave(group, 1) for x in (k, v))
    score = scale * q.double() @ k64.mT
    p = torch.where(visible, torch.exp(score - ref.lse[..., None]), 0.0)
    dp = do.double() @ v64.mT
    if case.dropout_p:
        shape = (case.batch, case.num_heads, case.q_len, case.kv_len)
        kept = dropout.dropout_mask(SEED, case.dropout_p, shape)
        dp = torch.where(kept, dp * dropout.rescale(case.dropout_p), 0.0)
    ds = p * (dp - delta[..., None])
    size = (p * (dp.abs() + delta.abs()[..., None])).max() * (4 + score.abs().max())
    rounding = 4 * torch.finfo(F32).eps * size.item()
    return Reference((q, k, v, do), dlse, ref, eager, out, delta, p, ds, rounding, visible)


def window_of(case: Case) -> Tensor:
    """(L, S), what the window lets through."""
    row = torch.arange(case.q_len)[:, None] + case.diagonal
    key = torch.arange(case.kv_len)
    left, right = (w if w >= 0 else 1 << 30 for w in (case.window_left, case.window_right))
    return (key >= row - left) & (key <= row + right)


@functools.cache
def forward_results(case: Case, shifts: tuple[float, float] = (0.0, 0.0)) -> tuple[Tensor, Tensor]:
    """out and row_stats of the repository's forward: the backward takes its very scores."""
    sources, forward = repository(), Attention("", FORWARD, case, shifts=shifts)
    x = forward._operands()
    kernel, params = forward._plan(sources, x)
    shape = (*x["query"].tensor.shape[:3], 2)
    stats, out = Guarded(shape, dense(shape), F32), empty(x["out"].tensor, "padded")
    launch(
        _forward_library(kernel["instantiation"]), kernel, sources.buffers,
        with_seed(params, key_end=case.kv_len, out=tuple(out.tensor.stride())),
        {name: x[name] for name in ("query", "key", "value")}, {"out": out, "row_stats": stats},
        workers=1,
    )  # fmt: skip
    return out.tensor.clone(), stats.tensor.clone()


@functools.cache
def repository() -> Sources:
    """Its plan is compiled once."""
    return Sources()


@functools.cache
def _forward_library(line: str) -> engine.Library:
    """Of the repository's forward: many problems share a kernel."""
    return engine.compile(repository().text(FORWARD) + line)


def ds_tiles(ds: Tensor) -> Tensor:
    """dS (..., q_len, kv_len) as DscoreTiles lays it out, ragged tiles filled up with zeros."""
    *heads, q_len, kv_len = ds.shape
    blocks = -(-q_len // 8), -(-kv_len // 8)
    full = ds.new_zeros(*heads, blocks[0] * 8, blocks[1] * 8)
    full[..., :q_len, :kv_len] = ds
    return (
        full.unflatten(-1, (blocks[1], 8))
        .unflatten(-3, (blocks[0], 8))
        .permute(*range(len(heads)), -2, -4, -1, -3)
    )  # fmt: skip  (..., key block, query block, key, query)


def tiles_of_pairs(pairs: Tensor) -> Tensor:
    """(..., key block, query block), whether a tile holds any of them."""
    return ds_tiles(pairs.double()).flatten(-2).any(-1)


class DscoreRows(NamedTuple):
    """Where dS of a head lies, as the params have it."""

    keys: int
    tiles: int
    folded: int

    @staticmethod
    def of(params: Params) -> DscoreRows:
        return DscoreRows(params.ds_keys, params.ds_row, params.ds_folded)

    def shape(self, heads: int) -> tuple[int, ...]:
        return heads, self.keys // 8, self.tiles, 8, 8

    def first(self, key: int, queries: int) -> int:
        """The tile of the first of so many blocks of queries, in the row of a block of keys."""
        if self.folded and key >= self.keys // 8:
            return self.folded - key * (self.tiles + 1)
        return key % (self.keys // 8) * self.tiles + self.tiles - queries


def in_places(tiles: Tensor, stored: Tensor, rows: DscoreRows) -> Tensor:
    """Tiles of dS where they lie. What is not `stored` (heads, key blocks, query blocks) is NaN."""
    heads, keys, queries = tiles.shape[:3]
    placed = tiles.new_full(rows.shape(heads), math.nan)
    for head, key in itertools.product(range(heads), range(keys)):
        mine = stored[head, key].nonzero()[:, 0]
        places = rows.first(key, queries) + mine
        in_head = placed[head].flatten(0, 1)
        assert (places >= 0).all(), "a tile before the buffer"
        assert in_head[places].isnan().all(), "two tiles in a place"
        in_head[places] = tiles[head, key, mine]
    return placed


@dataclass(frozen=True)
class Attention:
    """A kernel on one problem, by the tolerance rule, with the exact number of matrix products."""

    name: str
    family: str
    case: Case
    layouts: tuple[str, ...] = ("padded",) * 5  # of q, k, v, out and dout
    dlse: bool = False
    check: bool = False
    tile: tuple[int, ...] = ()  # instead of the plan's: (R, BK), or (BQ,)
    shifts: tuple[float, float] = (0.0, 0.0)  # added to all of q, to all of k
    schedule: int | None = None  # seed of a random order of threads
    store_ds: bool = False  # of DKV: also leaves dS
    kv_heads: tuple[int, int] | None = None  # only those, of batch * num_kv_heads

    def run(self, sources: Sources, note: Callable[[str], None] = lambda _: None) -> None:
        given = reference(self.case, self.dlse, self.shifts)
        q, k, v, _ = given.operands
        x = self._operands()
        kernel, params = self._plan(sources, x)
        library = compile_kernel(sources, self.family, kernel, self.check)
        note("compiled")
        delta = self._delta(given)
        rows = (1, *given.delta.shape)
        key, value, dout = ({name: x[name]} for name in ("key", "value", "dout"))
        if self.family == FORWARD:
            inputs = {"query": x["query"]} | key | value
            shape = (*given.delta.shape, 2)
            stats = Guarded(shape, dense(shape), F32)
            results = {"out": empty(q, self.layouts[3]), "row_stats": stats}
        elif self.family == DELTA:
            inputs = {"out": x["out"]} | dout
            if given.dlse is not None:
                inputs["dlse"] = Guarded.like(given.dlse[None], "dense")
                inputs["dlse"].tensor[..., ~given.visible.any(1)] = math.nan
            results = {"delta": Guarded(rows, dense(rows), F32)}
        elif self.family == DQ:
            inputs = (
                {"query": x["query"], "row_stats": self._row_stats(), "delta": delta}
                | key
                | value
                | dout
            )
            results = {"dq": empty(q, self.layouts[0])}
        elif self.family in KEYS_SIDE:
            inputs = (
                {"query": x["query"], "row_stats": self._row_stats(), "delta": delta}
                | key
                | value
                | dout
            )
            results = {"dk": empty(k, self.layouts[1]), "dv": empty(v, self.layouts[2])}
            if self.store_ds:
                results["ds"] = self._empty_ds(params)
        else:
            inputs = {"ds": self._stored_ds(given, DscoreRows.of(params))} | key
            results = {"dq": empty(q, self.layouts[0])}
        strides = {
            name: tuple(results[name].tensor.stride())
            for name in ("out", "dq", "dk", "dv")
            if name in results
        }
        block = with_seed(
            params, has_dlse=int(self.dlse), first_head=self._query_heads().start,
            key_end=self.case.kv_len, **strides,
        )  # fmt: skip
        counters = launch(
            library, kernel, sources.buffers, block, inputs, results,
            seed=self.schedule, workers=1,
        )  # fmt: skip
        found = {name: y.tensor for name, y in results.items()}
        self._compare(given, found, DscoreRows.of(params))
        assert counters.mma == self._products(kernel), "not the expected number of matrix products"
        if self.check:  # which counts accesses, and leaves gaps in threadgroup memory
            staged = self.family != DQ_FROM_DS or not counters.mma
            assert staged or counters.threadgroup_bytes_written, "K is not staged"
        else:
            assert counters.threadgroup_memory == self._staged(kernel), "threadgroup memory"

    def _delta(self, given: Reference) -> Guarded:
        delta = given.delta
        if self.family in (DQ, *KEYS_SIDE):
            delta = delta + self._rounding_of_delta(given)
        return Guarded.like(delta.float()[None], "dense")

    def _rounding_of_delta(self, given: Reference) -> Tensor:
        """As the weights are the forward's, so is the output that delta is made of."""
        out = forward_results(self.case, self.shifts)[0].double()
        return (given.operands[3].double() * (out - given.out.double())).sum(-1)

    def _query_heads(self) -> slice:
        """Of batch * num_heads, those whose key/value heads run."""
        group = self.case.num_heads // self.case.num_kv_heads
        first, last = self.kv_heads or (0, self.case.batch * self.case.num_kv_heads)
        return slice(first * group, last * group)

    def _row_stats(self) -> Guarded:
        return Guarded.like(forward_results(self.case, self.shifts)[1], "dense")

    def _empty_ds(self, params: Params) -> Guarded:
        heads = self._query_heads()
        shape = DscoreRows.of(params).shape(heads.stop - heads.start)
        return Guarded(shape, dense(shape), F32)

    def _stored_ds(self, given: Reference, rows: DscoreRows) -> Guarded:
        """dS as the key's side leaves it: NaN in tiles that nobody sees."""
        tiles = ds_tiles(given.ds.flatten(0, 1)[self._query_heads()]).float()
        tiles = in_places(tiles, tiles_of_pairs(given.visible).expand(tiles.shape[:3]), rows)
        stored = Guarded(tiles.shape, dense(tiles.shape), F32)
        stored.tensor.copy_(tiles)
        return stored

    def plan(self, sources: Sources) -> tuple[dict, Params]:
        """The kernel that runs, and its parameters."""
        return self._plan(sources, self._operands())

    def _operands(self) -> dict[str, Guarded]:
        """Numbers that take no part in the problem are NaN: no result may show it."""
        given = reference(self.case, self.dlse, self.shifts)
        q, k, v, do = given.operands
        tensors = {"query": q, "key": k, "value": v, "out": given.out, "dout": do}
        placed = {
            name: Guarded.like(tensor, layout)
            for (name, tensor), layout in zip(tensors.items(), self.layouts)
        }
        for name, x in placed.items():
            takes_part = given.visible.any(0 if name in ("key", "value") else 1)
            x.tensor[:, :, ~takes_part] = math.nan
        return placed

    def _plan(self, sources: Sources, x: dict[str, Guarded]) -> tuple[dict, Params]:
        plan, params = self._whole_plan(
            sources,
            x,
            stores_ds=True,
            scratch_bytes=(self.store_ds or self.family == DQ_FROM_DS) << 40,
        )
        kernel = kernel_of(plan, self.family, self.case.kv_len)
        if self.tile:
            self._retile(kernel)
        if self.kv_heads:
            heads = self._query_heads() if self.family == DQ_FROM_DS else slice(*self.kv_heads)
            kernel["groups"][0] = heads.stop - heads.start
        return kernel, params

    def _whole_plan(
        self, sources: Sources, x: dict[str, Guarded], **fields: int
    ) -> tuple[dict, Params]:
        case = self.case
        scale = case.head_dim**-0.5 if case.scale is None else case.scale
        short = {"q": "query", "k": "key", "v": "value", "out": "out", "dout": "dout"}
        plan, params = sources.plan(
            request(
                {name: place(x[full]) for name, full in short.items()},
                DTYPE_NUMBERS[case.dtype], self.family != FORWARD, dropout_p=case.dropout_p,
                scale=scale, window_left=case.window_left, window_right=case.window_right,
                diagonal=case.diagonal, **fields,
            )
        )  # fmt: skip
        assert not plan["refusal"], plan["refusal"]
        return plan, params

    def _retile(self, kernel: dict) -> None:
        arguments = template_arguments(kernel)
        arguments[3 : 3 + len(self.tile)] = [str(n) for n in self.tile]
        old = re.search(r"decltype\((.*)\)", kernel["instantiation"])[1]
        new = f"{self.family}<{', '.join(arguments)}>"
        line = kernel["instantiation"].replace(old, new)
        name = f"{kernel['name']}_tile_{'_'.join(map(str, self.tile))}"
        kernel["instantiation"] = line.replace(kernel["name"], name)
        kernel["name"] = name
        if self.family not in KEYS_SIDE:
            kernel["groups"][1] = -(-self.case.q_len // (32 * self.tile[0]))

    def _compare(self, given: Reference, results: dict[str, Tensor], rows: DscoreRows) -> None:
        if self.kv_heads:
            results = self._only_those_heads(given, results)
        for name, x in results.items():
            if name == "ds":
                self._compare_ds(given, x, rows)
                continue
            if name == "delta":
                size = (given.operands[3].double() * given.out.double()).abs().sum(-1)
                size = size + (0 if given.dlse is None else given.dlse.abs())
                expected = torch.where(given.visible.any(1), given.delta, 0.0)
                error = (x[0].double() - expected).abs()
                assert (error <= 16 * torch.finfo(F32).eps * size.max()).all(), "delta"
                continue
            named = dict.fromkeys(("out", "lse", "dq", "dk", "dv"))
            if name == "row_stats":
                alone = ~given.visible.any(1)
                assert (x[..., alone, 0] == torch.finfo(F32).min).all(), "origin without a key"
                assert (x[..., alone, 1] == -math.inf).all(), "log_sum without a key"
                named["lse"] = lse_of(x)
            else:
                named[name] = x
            assert_attention_close(list(named.values()), given.ref, given.eager)

    def _only_those_heads(self, given: Reference, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """The other heads must be untouched; they get the right values, to be compared at once."""
        whole = {}
        for name, x in results.items():
            if name == "ds":
                whole[name] = x
                continue
            ran = self._query_heads() if name == "dq" else slice(*self.kv_heads or ())
            right = getattr(given.ref, name).to(x.dtype).flatten(0, 1)
            mine = x.flatten(0, 1)
            assert mine[: ran.start].isnan().all() and mine[ran.stop :].isnan().all(), name
            right[ran] = mine[ran]
            whole[name] = right.view(x.shape)
        return whole

    def _compare_ds(self, given: Reference, x: Tensor, rows: DscoreRows) -> None:
        """Exact to float32's sums where anything is seen; tiles that nobody sees are untouched."""
        heads = self._query_heads()
        ds = given.ds - given.weights * self._rounding_of_delta(given)[..., None]
        expected = ds_tiles(ds.flatten(0, 1)[heads])
        stored = tiles_of_pairs(given.visible).expand(expected.shape[:3])
        seen = ds_tiles(given.visible.double()).expand(expected.shape)
        expected, seen = (in_places(y, stored, rows) for y in (expected, seen))
        assert torch.equal(x.isnan(), expected.isnan()), "the tiles of dS that are stored"
        error = (x.double() - expected).abs()
        assert (error[seen == 1] <= given.ds_rounding).all(), "dS"
        assert (x[seen == 0] == 0).all(), "dS of what is not seen"

    def _products(self, kernel: dict) -> int:
        """8 x 8 x 8 products if exactly the blocks between the first and last visible one run."""
        case, arguments = self.case, template_arguments(kernel)
        if self.family == DELTA:
            return 0
        seen = reference(case, self.dlse, self.shifts).visible
        width = int(arguments[2]) // 8
        if self.family in KEYS_SIDE:
            block, keys = int(arguments[3]), keys_of_group(self.family)
            blocks = sum(_span(part.any(1), block) for part in seen.split(keys, dim=1))
            products = 4 * (block // 8) * width * keys // 32
        else:
            r, block = int(arguments[3]), int(arguments[4])
            blocks = sum(_span(part.any(0), block) for part in seen.split(32 * r))
            of_family = {FORWARD: 2, DQ: 3, DQ_FROM_DS: 1}
            products = of_family[self.family] * r * (block // 8) * width
        heads = self._query_heads()
        return (heads.stop - heads.start) * blocks * 4 * products

    def _staged(self, kernel: dict) -> int:
        """Bytes of staged rows, each with 16 bytes of padding, and of exchanged partial tiles."""
        arguments = template_arguments(kernel)
        if self.family == DELTA:
            return 0
        row = int(arguments[2]) * (2 if arguments[1] == "half" else 4) + 16
        if self.family in KEYS_SIDE:
            rows = int(arguments[3])
            handed_over = 2 * (rows // 8) * 32 * 8 if self.family == DKV_PAIRS else 0
            return 2 * rows * row + handed_over
        buffers = {FORWARD: int(arguments[5]), DQ: 2, DQ_FROM_DS: 1}[self.family]
        return max(buffers * int(arguments[4]) * row, 16)


def keys_of_group(family: str) -> int:
    return {DKV: 32, DKV_PAIRS: 16}[family]


def lse_of(row_stats: Tensor) -> Tensor:
    """The public lse: a natural logarithm."""
    return (row_stats.double().sum(-1) * math.log(2)).float()


def kernel_of(plan: dict, family: str, kv_len: int) -> dict:
    """The plan's kernel of the family; of the two for the key's side, either can be made of the
    other."""
    if family not in KEYS_SIDE:
        (kernel,) = (k for k in plan["kernels"] if k["family"] == family)
        return dict(kernel)
    (kernel,) = (k for k in plan["kernels"] if k["family"] in KEYS_SIDE)
    for name in ("name", "instantiation"):
        text = kernel[name].replace(DKV_PAIRS, DKV)
        kernel = kernel | {name: text.replace(DKV, family)}
    groups = [kernel["groups"][0], -(-kv_len // keys_of_group(family))]
    return kernel | {"family": family, "groups": groups}


def _span(seen: Tensor, block: int) -> int:
    """Blocks from the first to the last seen position."""
    places = seen.nonzero()
    return int(places.max()) // block - int(places.min()) // block + 1 if len(places) else 0


def empty(like: Tensor, layout: str) -> Guarded:
    """An output: all NaN; the kernels write adjacent columns and pairs of them."""
    _, h, n, d = like.shape
    chunk = 16 // like.element_size()
    wide = -(-d // chunk) * chunk + chunk
    strides = {
        "padded": (h * (n + 1) * wide, (n + 1) * wide, wide, 1),
        "blhd": (h * n * d, d, h * d, 1),
    }.get(layout, (h * n * d, n * d, d, 1))
    return Guarded(like.shape, strides, like.dtype)


def dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
