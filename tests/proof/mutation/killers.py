"""The tests that mutants must not survive; test_mutation_tool.py runs every one of them too.

A killer is one fast test: a kernel on one problem, or a property of the plan. It has a name, the
kernel `family` that it needs (None: only the plan), and `run(sources)`, which raises.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import mmap
import re
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attention_cases import SEED, Case, far_scores, uneven_scores
from simulator import engine
from torch import Tensor

from orchard_ops import dropout
from orchard_ops.testing import MathResult, assert_attention_close

from .harness import (
    BUFFERS,
    DELTA,
    DKV,
    DKV_PAIRS,
    DQ,
    DQ_FROM_DS,
    DTYPE_NUMBERS,
    FAMILIES,
    FORWARD,
    Guarded,
    Params,
    Sources,
    launch,
    place,
    request,
    with_seed,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
KEYS_SIDE = (DKV, DKV_PAIRS)  # the same arguments; the plan's choice is by the width


# ---- one kernel on one problem


@dataclass(frozen=True)
class Reference:
    """Operands of a case, its results, and what the forward hands to the backward kernels."""

    operands: tuple[Tensor, ...]
    dlse: Tensor | None
    ref: MathResult
    eager: MathResult
    out: Tensor
    lse: Tensor
    delta: Tensor
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
    row = torch.arange(case.q_len)[:, None] + case.diagonal
    key = torch.arange(case.kv_len)
    left, right = (w if w >= 0 else 1 << 30 for w in (case.window_left, case.window_right))
    visible = (key >= row - left) & (key <= row + right)
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
    lse = ref.lse.float()
    return Reference((q, k, v, do), dlse, ref, eager, out, lse, delta, ds, rounding, visible)


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
        lse = Guarded.like(given.lse[None], "dense")
        delta = Guarded.like(given.delta.float()[None], "dense")
        stats = Guarded((1, *given.lse.shape), _dense((1, *given.lse.shape)), F32)
        key, value, dout = ({name: x[name]} for name in ("key", "value", "dout"))
        if self.family == FORWARD:
            inputs = {"query": x["query"]} | key | value
            results = {"out": _empty(q, self.layouts[3]), "lse": stats}
        elif self.family == DELTA:
            dlse = lse if given.dlse is None else Guarded.like(given.dlse[None], "dense")
            inputs = {"out": x["out"], "dlse": dlse} | dout
            results = {"delta": stats}
        elif self.family == DQ:
            inputs = {"query": x["query"], "lse": lse, "delta": delta} | key | value | dout
            results = {"dq": _empty(q, self.layouts[0])}
        elif self.family in KEYS_SIDE:
            inputs = {"query": x["query"], "lse": lse, "delta": delta} | key | value | dout
            results = {"dk": _empty(k, self.layouts[1]), "dv": _empty(v, self.layouts[2])}
            if self.store_ds:
                shape = ds_tiles(given.ds.flatten(0, 1)[self._query_heads()]).shape
                results["ds"] = Guarded(shape, _dense(shape), F32)
        else:
            inputs = {"ds": self._stored_ds(given)} | key
            results = {"dq": _empty(q, self.layouts[0])}
        strides = {
            name: tuple(results[name].tensor.stride())
            for name in ("out", "dq", "dk", "dv")
            if name in results
        }
        first = self.kv_heads[0] if self.kv_heads else 0
        block = with_seed(
            params, has_dlse=int(self.dlse), first_kv_head=first, key_end=self.case.kv_len,
            **strides,
        )  # fmt: skip
        counters = launch(
            library, kernel, sources.buffers, block, inputs, results,
            seed=self.schedule, workers=1,
        )  # fmt: skip
        self._compare(given, {name: y.tensor for name, y in results.items()})
        assert counters.mma == self._products(kernel), "not the expected number of matrix products"
        if not self.check:  # which leaves gaps
            assert counters.threadgroup_memory == self._staged(kernel), "threadgroup memory"

    def _query_heads(self) -> slice:
        """Of batch * num_heads, those whose key/value heads run."""
        group = self.case.num_heads // self.case.num_kv_heads
        first, last = self.kv_heads or (0, self.case.batch * self.case.num_kv_heads)
        return slice(first * group, last * group)

    def _stored_ds(self, given: Reference) -> Guarded:
        """dS as the key's side leaves it: NaN in tiles that nobody sees."""
        tiles = ds_tiles(given.ds.flatten(0, 1)[self._query_heads()]).float()
        seen = ds_tiles(given.visible.double()).flatten(-2).any(-1)
        tiles = torch.where(seen[..., None, None], tiles, math.nan)
        stored = Guarded(tiles.shape, _dense(tiles.shape), F32)
        stored.tensor.copy_(tiles)
        return stored

    def plan(self, sources: Sources) -> tuple[dict, Params]:
        """The kernel that runs, and its parameters."""
        return self._plan(sources, self._operands())

    def _operands(self) -> dict[str, Guarded]:
        given = reference(self.case, self.dlse, self.shifts)
        q, k, v, do = given.operands
        tensors = {"query": q, "key": k, "value": v, "out": given.out, "dout": do}
        return {
            name: Guarded.like(tensor, layout)
            for (name, tensor), layout in zip(tensors.items(), self.layouts)
        }

    def _plan(self, sources: Sources, x: dict[str, Guarded]) -> tuple[dict, Params]:
        case = self.case
        scale = case.head_dim**-0.5 if case.scale is None else case.scale
        short = {"q": "query", "k": "key", "v": "value", "out": "out", "dout": "dout"}
        plan, params = sources.plan(
            request(
                {name: place(x[full]) for name, full in short.items()},
                DTYPE_NUMBERS[case.dtype], self.family != FORWARD, dropout_p=case.dropout_p,
                scale=scale, window_left=case.window_left, window_right=case.window_right,
                diagonal=case.diagonal,
                scratch_bytes=(self.store_ds or self.family == DQ_FROM_DS) << 40,
            )
        )  # fmt: skip
        assert not plan["refusal"], plan["refusal"]
        kernel = kernel_of(plan, self.family, case.kv_len)
        if self.tile:
            self._retile(kernel)
        if self.kv_heads:
            heads = self._query_heads() if self.family == DQ_FROM_DS else slice(*self.kv_heads)
            kernel["groups"][0] = heads.stop - heads.start
        return kernel, params

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

    def _compare(self, given: Reference, results: dict[str, Tensor]) -> None:
        if self.kv_heads:
            results = self._only_those_heads(given, results)
        for name, x in results.items():
            if name == "ds":
                self._compare_ds(given, x)
                continue
            if name == "delta":
                size = (given.operands[3].double() * given.out.double()).abs().sum(-1)
                size = size + (0 if given.dlse is None else given.dlse.abs())
                error = (x[0].double() - given.delta).abs()
                assert (error <= 16 * torch.finfo(F32).eps * size.max()).all(), "delta"
                continue
            named = {**dict.fromkeys(("out", "lse", "dq", "dk", "dv")), name: x}
            if name == "lse":
                named[name] = x[0]
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

    def _compare_ds(self, given: Reference, x: Tensor) -> None:
        """Exact to float32's sums where anything is seen, zero or untouched elsewhere."""
        heads = self._query_heads()
        expected = ds_tiles(given.ds.flatten(0, 1)[heads])
        seen = ds_tiles(given.visible.double()).bool().expand(expected.shape)
        error = (x.double() - expected).abs()
        assert (error[seen] <= given.ds_rounding).all(), "dS"
        tiles = seen.flatten(-2).any(-1, keepdim=True)[..., None].expand(expected.shape)
        assert (x[tiles & ~seen] == 0).all(), "dS of what is not seen"
        rest = x[~tiles]
        assert (rest.isnan() | (rest == 0)).all(), "dS of tiles that nobody sees"

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


def _empty(like: Tensor, layout: str) -> Guarded:
    """An output: all NaN; the kernels write adjacent columns and pairs of them."""
    _, h, n, d = like.shape
    chunk = 16 // like.element_size()
    wide = -(-d // chunk) * chunk + chunk
    strides = {
        "padded": (h * (n + 1) * wide, (n + 1) * wide, wide, 1),
        "blhd": (h * n * d, d, h * d, 1),
    }.get(layout, (h * n * d, n * d, d, 1))
    return Guarded(like.shape, strides, like.dtype)


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def template_arguments(kernel: dict) -> list[str]:
    return re.search(r"<(.*?)>", kernel["instantiation"])[1].split(", ")


_libraries: dict[tuple[Path, str, bool], engine.Library] = {}  # of this process, by kernel name


def compile_kernel(
    sources: Sources, family: str, kernel: dict, check: bool = False
) -> engine.Library:
    """The first problem's kernel by itself, all others of a family at once: that is faster."""
    key = (sources.root, kernel["name"], check)
    if key not in _libraries:
        line = kernel["instantiation"]
        together = _compiled_together(family, check)
        lines = together if line in together else (line,)
        library = engine.compile(sources.text(family) + "".join(lines), check=check)
        for name in library.names:
            _libraries[(sources.root, name, check)] = library
    return _libraries[key]


@functools.cache
def _compiled_together(family: str, check: bool) -> tuple[str, ...]:
    sources, lines = Sources(), {}
    for killer in (*_attention(), *_edges()):
        if killer.family == family and killer.check == check and killer.case != _kitchen_sink:
            lines[killer.plan(sources)[0]["instantiation"]] = None
    return tuple(lines)


def machine_code() -> dict[str, str]:
    """A digest of the code of each kernel that this process has compiled."""
    return {
        f"{name} {check}": hashlib.sha256(_text_section(library.path)).hexdigest()[:16]
        for (_, name, check), library in _libraries.items()
    }


def _text_section(path: Path) -> bytes:
    elf = path.read_bytes()
    (sections,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<3H", elf, 58)
    table = [struct.unpack_from("<2I4Q", elf, sections + size * i) for i in range(count)]
    strings = table[names][4]
    for name, _, _, _, offset, length in table:
        if elf[strings + name :].startswith(b".text\0"):
            return elf[offset : offset + length]
    raise ValueError("no .text section")


def library_paths() -> set[Path]:
    """What this process has compiled, in the engine's cache."""
    return {library.path for library in _libraries.values()}


def forget_libraries(keep: Collection[str]) -> None:
    """Removes what this process has compiled from the engine's cache, but for `keep`."""
    for path in library_paths():
        if str(path) not in keep:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)


# ---- the problems

_kitchen_sink = Case(
    37, 51, 15, batch=2, num_heads=4, num_kv_heads=2, dropout_p=0.3, window_left=19,
    window_right=6, diagonal=3,
)  # fmt: skip
_causal = Case(
    45, 70, 32, num_heads=3, num_kv_heads=1, dtype=F16, dropout_p=0.1, window_right=0, diagonal=25
)
_open = Case(79, 95, 16, dtype=F32)  # one short of whole blocks
_wide = Case(35, 40, 160, batch=2, dtype=BF16, dropout_p=0.2, window_right=0)
_odd_tiles = Case(40, 49, 80, dtype=F32, dropout_p=0.4, window_left=20)
_keyless = Case(70, 20, 16, dtype=F32, window_right=0, diagonal=-41)
_tall = Case(150, 70, 24, dtype=F32, dropout_p=0.25, window_left=60, window_right=12)
_apart = ("padded", "blhd", "rows_odd", "dense", "odd")  # no two tensors have the same strides
_mixed = ("padded", "columns", "rows_odd", "dense", "odd")
_blhd = ("blhd",) * 5


def _attention() -> Iterator[Attention]:
    def each(name: str, case: Case, families: tuple[str, ...] = FAMILIES, **options: Any):
        for family in families:
            # The plan stores dS for wide heads only.
            wide = case.but(head_dim=case.head_dim + 48 * (case.head_dim < 64))
            if family != DQ_FROM_DS:
                yield Attention(f"{family}: {name}", family, case, **options)
            if family in KEYS_SIDE:
                yield Attention(f"{family}, storing: {name}", family, wide, store_ds=True,
                                **options)  # fmt: skip
            elif family == DQ_FROM_DS:
                yield Attention(f"{family}: {name}", family, wide, **options)

    # In order of cost: the first ones find most mutants and need one compilation each.
    first = {"dlse": True, "layouts": _apart}
    yield from each("windows, groups, dropout, elements", _kitchen_sink, **first)
    yield from each("causal, chunks", _causal)
    yield from each("causal, chunks, any order of threads", _causal, schedule=1)
    yield from each("no mask", _open)
    yield from each("one row, one key", Case(1, 1, 15, dtype=F32))
    yield from each("one beyond whole blocks", Case(41, 65, 16, num_heads=1, dtype=F32))
    # The keys that the first 64 rows may see end right before the first key.
    yield from each("keys begin later", Case(128, 64, 16, num_heads=1, dtype=F32, window_right=0,
                                             diagonal=-64))  # fmt: skip
    yield from each("rows and keys without a partner", _keyless)
    for diagonal in (200, -200):
        yield from each(f"nothing visible at {diagonal}", _keyless.but(
            window_left=3, window_right=2, diagonal=diagonal))  # fmt: skip
    # Windows that start or end at a block's first or last key or query, or one beside it.
    for left, right, diagonal in (
        (0, 0, 0), (0, 0, 1), (0, 0, -1), (16, 15, 17), (-1, 3, -32), (7, -1, 32), (31, 32, 1),
        (41, 35, 3), (40, 36, 3), (42, 34, 3), (-1, 40, -30), (40, -1, 30), (-1, 0, 16),
    ):  # fmt: skip
        yield from each(
            f"window {left}, {right} at {diagonal}",
            Case(64, 64, 16, num_heads=1, dtype=F32, window_left=left, window_right=right,
                 diagonal=diagonal),
        )  # fmt: skip
    ahead = Case(20, 64, 16, num_heads=1, dtype=F32, window_left=4, window_right=3, diagonal=30)
    yield from each("more keys than queries", ahead)
    behind = Case(64, 20, 16, num_heads=1, dtype=F32, window_left=3, window_right=4, diagonal=-30)
    yield from each("more queries than keys", behind)
    # Sums of 256 products of one sign, which one chain of additions would round too often.
    sums = Case(64, 64, 256, num_heads=1, dtype=F32, scale=1.0)
    yield Attention(f"{FORWARD}: long sums", FORWARD, sums, shifts=(2.0, 2.0))
    # Weights of rows that do not exist, exp(0 - lse), would be infinite.
    yield from each("very negative scores", Case(15, 32, 16, dtype=F32), shifts=(7.0, -7.0))
    yield from each("large scores", Case(40, 64, 16, dtype=F32, scale=30.0, window_right=4))
    yield from each("large scores, wide blocks", _causal.but(scale=6.0))
    yield from each("negative scale", Case(40, 64, 16, dtype=F32, scale=-0.7))
    yield from each("bfloat16, wide heads, dropout", _wide)
    yield from each("blocks of 8", _odd_tiles, layouts=_blhd)
    storing = {"store_ds": True}
    for family, tile, more in (
        (FORWARD, (4, 8, 2), {}), (FORWARD, (2, 32, 1), {}), (FORWARD, (1, 16, 0), {}),
        (DQ, (4, 32), {}), (DKV, (32, "false"), {}), (DKV_PAIRS, (16, "false"), {}),
        (DKV, (8, "true"), storing), (DKV_PAIRS, (32, "true"), storing), (DQ_FROM_DS, (1, 8), {}),
    ):  # fmt: skip
        case = _tall.but(head_dim=80 if more or family == DQ_FROM_DS else 24)
        label = f"{family}: tile {'_'.join(map(str, tile))}"
        larger = functools.partial(Attention, family=family, tile=tile, **more)
        yield larger(label, case=case)
        # Scores of one row say nothing about the next.
        yield larger(f"{label}, large scores", case=case.but(scale=40.0))
        yield larger(f"{label}, checked", case=case, check=True)
    for family, more in ((DKV, storing), (DKV_PAIRS, storing), (DQ_FROM_DS, {})):
        grouped = Case(40, 52, 64, batch=2, num_heads=6, num_kv_heads=3, dtype=F32, window_right=7)
        for heads in ((0, 2), (2, 5), (5, 6)):
            yield Attention(f"{family}: heads {heads[0]} to {heads[1]}", family, grouped,
                            kv_heads=heads, **more)  # fmt: skip
    # Tiles of dS end within the rows of a simdgroup.
    for q_len in (36, 40):
        yield Attention(f"{DQ_FROM_DS}: {q_len} queries, checked", DQ_FROM_DS,
                        Case(q_len, 64, 64, num_heads=1, dtype=F32), check=True)  # fmt: skip
    yield from each("every operand in its own layout", _causal.but(head_dim=30), layouts=_mixed)
    yield from each("kitchen sink, checked", _kitchen_sink, check=True, **first)
    yield from each("causal, checked", _causal, check=True)
    yield from each("blocks of 8, checked", _odd_tiles, check=True)
    yield from each("nothing visible, checked", _keyless.but(diagonal=-200), check=True)


# ---- further tests of kernels


@dataclass(frozen=True)
class Property:
    """A test that is written out below."""

    name: str
    family: str | None
    test: Callable[..., None]

    def run(self, sources: Sources, note: Callable[[str], None] = lambda _: None) -> None:
        self.test(sources, note) if self.family else self.test(sources)


@dataclass(frozen=True)
class Given(Attention):
    """As Attention with given operands; the test compares the results."""

    operands: tuple[Tensor, ...] = ()

    def results(self, sources: Sources, note: Callable[[str], None], inputs: dict[str, Tensor],
                out: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:  # fmt: skip
        x = {name: Guarded.like(t, "dense") for name, t in inputs.items() if t.dim() == 4}
        x.setdefault("out", x["query"])
        x.setdefault("dout", x["query"])
        kernel, params = self._plan(sources, x)
        library = compile_kernel(sources, self.family, kernel, self.check)
        note("compiled")
        x |= {name: Guarded.like(t[None], "dense") for name, t in inputs.items() if t.dim() == 3}
        results = {
            n: Guarded(s, _dense(s), F32 if n in ("lse", "delta") else self.case.dtype)
            for n, s in out.items()
        }
        strides = {
            n: _dense(s) for n, s in out.items() if len(s) == 4 and n not in ("lse", "delta")
        }
        block = with_seed(params, **strides)
        launch(library, kernel, sources.buffers, block, {n: x[n] for n in x if n not in out},
               results, workers=1)  # fmt: skip
        return {name: y.tensor for name, y in results.items()}


def forward_of(
    sources: Sources, note: Callable[[str], None], case: Case, q: Tensor, k: Tensor, v: Tensor,
    check: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """out and, with a dimension before the batch, lse."""
    inputs = {"query": q, "key": k, "value": v}
    shapes = {"out": tuple(q.shape), "lse": (1, *q.shape[:3])}
    return Given("", FORWARD, case, check=check).results(sources, note, inputs, shapes)


def lse_is_rounded_once(sources: Sources, note: Callable[[str], None]) -> None:
    """With one key, score m in powers of two: lse must be m ln(2), correctly rounded."""
    length = 640
    case = Case(length, 1, 16, num_heads=1, scale=math.log(2), dtype=F32)
    m = torch.arange(1, length + 1).float() * 1.5
    q = torch.zeros(1, 1, length, 16)
    q[0, 0, :, 0] = m
    k = torch.zeros(1, 1, 1, 16)
    k[..., 0] = 1.0
    lse = forward_of(sources, note, case, q, k, k)["lse"]
    assert torch.equal(lse.flatten(), (m.double() * math.log(2)).float())


def sums_in_chains(sources: Sources, note: Callable[[str], None]) -> None:
    """A score of 2^24 and 255 ones: a chain that begins with 2^24 loses all ones behind it, which
    may be the part of one of four chains (Chains in shaders/tile.h).
    """
    case = Case(8, 2, 256, num_heads=1, dtype=F32, scale=math.log(2) / 64)
    q, k, v = torch.ones(1, 1, 8, 256), torch.ones(1, 1, 2, 256), torch.zeros(1, 1, 2, 256)
    q[..., 0] = k[..., 0] = 2.0**12
    k[:, :, 1, 1:], v[:, :, 0] = 0.0, 1.0
    weight = forward_of(sources, note, case, q, k, v)["out"]
    # 1 / (1 + 2^-4) in exact arithmetic, 8/9 with four chains, 4/5 with two.
    assert (weight > 0.85).all(), f"weight {weight.min()}"


def origins_move(
    sources: Sources, note: Callable[[str], None], dtype: torch.dtype, head_dim: int,
    check: bool = False,
) -> None:  # fmt: skip
    """Rows whose origins of exponentials move at different keys, or not at all."""
    case, (q, k, v, _) = uneven_scores(dtype, head_dim)
    got = forward_of(sources, note, case, q, k, v, check)
    ref, eager = (case.math(t, q, k, v, q) for t in (torch.float64, dtype))
    none = (None, None, None)
    assert_attention_close([got["out"], got["lse"][0], *none], ref, eager)


def far_origins(sources: Sources, note: Callable[[str], None]) -> None:
    case, (q, k, v, _) = far_scores()
    got = forward_of(sources, note, case, q, k, v)
    expected = v[..., 32:, :].float().mean(-2, True).expand(q.shape)
    torch.testing.assert_close(got["out"].float(), expected, rtol=2e-3, atol=2e-3)


def rows_alone(sources: Sources, note: Callable[[str], None]) -> None:
    """A row whose largest score creeps up beside one that moves: the same bits as beside zeros."""
    case, (q, k, v, _) = uneven_scores(F32, 32)
    k[..., 7] = 0.02 * torch.arange(case.kv_len)
    found = []
    for neighbour in (torch.eye(32)[3], torch.zeros(32)):
        q[:] = neighbour
        q[:, :, 4:8] = torch.eye(32)[7]
        got = forward_of(sources, note, case, q, k, v)
        found.append((got["out"][:, :, 4:8], got["lse"][..., 4:8]))
    assert all(torch.equal(x, y) for x, y in zip(*found))


def divided_keys(
    sources: Sources, note: Callable[[str], None], keys_side: str, kv_len: int = 150,
    check: bool = False,
) -> None:  # fmt: skip
    """The two kernels in turn over 64 keys at a time, for one key/value head of two.

    The queries end in the second fragment of a simdgroup of two.
    """
    case = Case(78, kv_len, 64, num_heads=4, num_kv_heads=2, dtype=F32, dropout_p=0.2,
                window_left=90, window_right=60, diagonal=20)  # fmt: skip
    given = reference(case, False, (0.0, 0.0))
    names = ("query", "key", "value", "dout")
    x = {name: Guarded.like(t, "padded") for name, t in zip(names, given.operands)}
    layouts = {
        short: place(x[name])
        for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "query"),
                            ("dout", "dout"))
    }  # fmt: skip
    plan, params = sources.plan(request(
        layouts, 2, True, dropout_p=0.2, scale=0.125, window_left=90, window_right=60,
        diagonal=20, scratch_bytes=1 << 30,
    ))  # fmt: skip
    x["lse"] = Guarded.like(given.lse[None], "dense")
    x["delta"] = Guarded.like(given.delta.float()[None], "dense")
    tiles = 2 * 8 * 10 * 64  # heads, key blocks, query blocks
    shape = (1, 1, 1, tiles + 2 * 78 * 64)
    scratch = Guarded(shape, _dense(shape), F32)
    results = {
        name: _empty(like, "padded") for name, like in zip(("dq", "dk", "dv"), given.operands)
    }
    own = {name: tuple(y.tensor.stride()) for name, y in results.items()}
    for begin in range(0, kv_len, 64):
        end = min(begin + 64, kv_len)
        block = with_seed(
            params, first_kv_head=1, key_begin=begin, key_end=end, dq_sums=tiles, **own
        )
        for family, inputs, outputs in (
            (keys_side, ("query", "key", "value", "dout", "lse", "delta"), ("dk", "dv")),
            (DQ_FROM_DS, ("key",), ("dq",)),
        ):
            kernel = kernel_of(plan, family, end - begin)
            library = compile_kernel(sources, family, kernel, check)
            note("compiled")
            kernel["groups"][0] = 1 if family == keys_side else 2
            written = {name: results[name] for name in outputs} | {"ds": scratch}
            launch(library, kernel, sources.buffers, block, {n: x[n] for n in inputs}, written,
                   workers=1)  # fmt: skip
        if end < kv_len:
            assert results["dq"].tensor.isnan().all(), "dq before the last keys"
        assert results["dk"].tensor[:, 1, end:].isnan().all(), "keys of the next dispatch"
    named = dict.fromkeys(("out", "lse", "dq", "dk", "dv"))
    for name, y in results.items():
        mine = slice(2, 4) if name == "dq" else slice(1, 2)
        assert y.tensor[:, : mine.start].isnan().all(), name
        named[name] = getattr(given.ref, name).to(F32)
        named[name][:, mine] = y.tensor[:, mine]
    assert_attention_close(list(named.values()), given.ref, given.eager)


def _infinite_rows(dlse: bool = False) -> tuple[Case, dict[str, Tensor]]:
    """Every other query scores -inf with every key, without a mask."""
    case = Case(16, 32, 16, num_heads=1, dtype=F32, scale=1.0)
    q = torch.zeros(1, 1, 16, 16)
    q[:, :, ::2, 0] = math.inf
    k = torch.zeros(1, 1, 32, 16)
    k[..., 0] = -1.0
    lse = torch.full((1, 1, 16), math.log(32.0))
    lse[..., ::2] = -math.inf
    ones = torch.ones(1, 1, 16, 16)
    return case, {"query": q, "key": k, "value": torch.ones(1, 1, 32, 16), "dout": ones, "lse": lse,
                  "out": ones * (lse > -math.inf)[..., None]}  # fmt: skip


def infinite_scores_forward(sources: Sources, note: Callable[[str], None]) -> None:
    case, x = _infinite_rows()
    got = forward_of(sources, note, case, x["query"], x["key"], x["value"])
    torch.testing.assert_close(got["out"], x["out"])
    torch.testing.assert_close(got["lse"][0], x["lse"])


def infinite_scores_dq(sources: Sources, note: Callable[[str], None]) -> None:
    case, x = _infinite_rows()
    inputs = {name: x[name] for name in ("query", "key", "value", "dout", "lse")}
    inputs["delta"] = (x["dout"] * x["out"]).sum(-1)
    got = Given("", DQ, case).results(sources, note, inputs, {"dq": (1, 1, 16, 16)})
    assert got["dq"].abs().max() < 1e-4  # delta = dP in the others


def infinite_scores_dkv(sources: Sources, note: Callable[[str], None], family: str) -> None:
    case, x = _infinite_rows()
    shapes = {"dk": (1, 1, 32, 16), "dv": (1, 1, 32, 16)}
    delta = (x["dout"] * x["out"]).sum(-1)
    inputs = {name: x[name] for name in ("query", "key", "value", "dout", "lse")}
    got = Given("", family, case).results(sources, note, {**inputs, "delta": delta}, shapes)
    torch.testing.assert_close(got["dv"], torch.full((1, 1, 32, 16), 8 / 32))


def small_weights_dkv(sources: Sources, note: Callable[[str], None], family: str) -> None:
    """Weights of 2^-26, below half's smallest number, add up in dv."""
    case = Case(16, 32, 64, num_heads=1, dtype=F16)
    zeros = torch.zeros(1, 1, 32, 64, dtype=F16)
    inputs = {"query": zeros[:, :, :16], "key": zeros, "value": zeros,
              "dout": torch.full((1, 1, 16, 64), 1024.0, dtype=F16),
              "lse": torch.full((1, 1, 16), math.log(2.0**26)),
              "delta": torch.zeros(1, 1, 16)}  # fmt: skip
    shapes = {"dk": (1, 1, 32, 64), "dv": (1, 1, 32, 64)}
    dv = Given("", family, case).results(sources, note, inputs, shapes)["dv"]
    torch.testing.assert_close(
        dv.float(), torch.full(dv.shape, 16 * 1024 / 2.0**26), rtol=1e-3, atol=0.0
    )


@functools.cache
def _draws() -> Tensor:
    """The 16-bit draw of each weight of _edge_case."""
    words = dropout.philox_4x32(
        (
            torch.arange(16).view(1, 1, 1, 16), torch.arange(32).view(1, 1, 32, 1),
            torch.arange(2).view(1, 2, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.int64),
        ),
        SEED,
    )  # fmt: skip
    draws = torch.stack(words, -1)  # (1, head, row, column, word); each word holds two draws
    return torch.stack((draws & 0xFFFF, draws >> 16), -1).flatten(0, 4)


def _edge_probability() -> float:
    """A p whose threshold is one of the draws, both as a first and as a second element."""
    first, second = (set(_draws()[:, i].tolist()) for i in (0, 1))
    both = sorted(d for d in first & second if 10000 < d < 50000)
    return both[len(both) // 2] / 65536


def _edges() -> Iterator[Attention]:
    p = _edge_probability()
    for name, threshold in (("is a draw", p), ("is one above a draw", p + 2.0**-16)):
        case = Case(64, 64, 16, dtype=F32, dropout_p=threshold)
        for family in (FORWARD, *KEYS_SIDE, DQ):
            yield Attention(f"{family}: the threshold {name}", family, case)


# ---- 64-bit positions

_FAR = 1 << 28  # ORCHARD_MAX_LENGTH
_MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on


class _Sparse:
    """float32 numbers in memory that exists only where it is touched."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], behind: int = 0):
        length = sum((n - 1) * s for n, s in zip(shape, strides)) + 1 + behind
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._memory = mmap.mmap(-1, 4 * length, flags=flags)
        self.flat = torch.frombuffer(self._memory, dtype=F32)
        self.tensor = self.flat.as_strided(shape, strides)
        self.buffer = engine.Buffer(self.flat.data_ptr(), 4 * length)


def _far_results(sources: Sources, note: Callable[[str], None], family: str, q_len: int,
                 strides: tuple[int, ...]) -> dict[str, Tensor]:  # fmt: skip
    """Twelve heads of q_len queries, of which 32 run, and two keys of width 2, row_stride apart."""
    generator = torch.Generator().manual_seed(3)
    rows, stats = (1, 12, 32, 2), (12, 32)
    sizes = {"query": rows, "key": (1, 1, 2, 2), "value": (1, 1, 2, 2), "out": rows, "dout": rows,
             "lse": stats, "dlse": stats, "delta": stats, "dq": rows, "dk": (1, 1, 2, 2),
             "dv": (1, 1, 2, 2)}  # fmt: skip
    packed = {"key": strides, "value": strides}
    x = {}
    for name, shape in sizes.items():
        place_ = packed.get(name, (0, 70, 2, 1)) if len(shape) == 4 else (q_len, 1)
        x[name] = _Sparse(shape, place_)
        x[name].tensor.copy_(torch.randn(shape, generator=generator))
    layouts = {
        short: ((1, 12 if "q" in short or "o" in short else 1, length, 2), tuple(t.stride()), 0)
        for short, t, length in (
            ("q", x["query"].tensor, q_len), ("k", x["key"].tensor, 2),
            ("v", x["value"].tensor, 2), ("out", x["out"].tensor, q_len),
            ("dout", x["dout"].tensor, q_len),
        )
    }  # fmt: skip
    plan, params = sources.plan(request(
        layouts, 2, family != FORWARD, scale=1.0, window_left=8, window_right=8
    ))  # fmt: skip
    kernel = kernel_of(plan, family, 2)
    library = compile_kernel(sources, family, kernel)
    note("compiled")
    own = {name: tuple(x[name].tensor.stride()) for name in ("out", "dq", "dk", "dv")}
    block = torch.frombuffer(bytearray(with_seed(params, has_dlse=1, **own)), dtype=torch.uint8)
    block = block.clone()
    numbers = sources.buffers
    buffers = {numbers[name]: x[name].buffer for name in sizes}
    buffers[numbers["params"]] = engine.Buffer(block.data_ptr(), len(block), False)
    groups = (kernel["groups"][0] * kernel["threads"], 1, 1)
    library.launch(kernel["name"], groups, (kernel["threads"], 1, 1), buffers, workers=1)
    wanted = {FORWARD: ("out", "lse"), DELTA: ("delta",), DQ: ("dq",)}.get(family, ("dk", "dv"))
    return {name: x[name].tensor.clone() for name in wanted}


def positions_beyond_32_bits(
    sources: Sources, note: Callable[[str], None], family: str, q_len: int,
    strides: tuple[int, ...],
) -> None:  # fmt: skip
    """Far apart in memory, the same numbers give the same results."""
    near = _far_results(sources, note, family, 32, (0, 0, 3, 1))
    far = _far_results(sources, note, family, q_len, strides)
    for name in near:
        assert torch.equal(near[name], far[name]), name


def _far_ds(
    sources: Sources, note: Callable[[str], None], family: str, q_len: int, kv_len: int = 16
) -> dict[str, Tensor]:
    """Two heads, q_len queries of which 64 run; dS has q_len / 8 columns. The first 64 keys."""
    generator = torch.Generator().manual_seed(4)
    rows, keys, stats = (1, 2, 64, 64), (1, 2, kv_len, 64), (2, 64)
    key_end = min(kv_len, 64)
    x = {}
    for name in ("query", "dout", "dq", "key", "value", "dk", "dv", "lse", "delta"):
        shape = {"key": keys, "value": keys, "dk": keys, "dv": keys}.get(name, rows)
        shape = stats if name in ("lse", "delta") else shape
        x[name] = _Sparse(shape, (q_len, 1) if shape == stats else (0, 70 * 64, 64, 1))
        x[name].tensor.copy_(torch.randn(shape, generator=generator))
    blocks = -(-q_len // 8)
    key_blocks = key_end // 8
    ds = (2, key_blocks, 8, 8, 8)  # head, key block, query block, key, query
    tiles = 2 * key_blocks * blocks * 64
    behind = 2 * q_len * 64 if kv_len > key_end else 0  # dq's sums
    x["ds"] = _Sparse(ds, (key_blocks * blocks * 64, blocks * 64, 64, 8, 1), behind)
    if family == DQ_FROM_DS:
        x["ds"].tensor.copy_(torch.randn(ds, generator=generator))
    layouts = {
        short: ((1, 2, length, 64), tuple(x[name].tensor.stride()), 0)
        for short, name, length in (
            ("q", "query", q_len), ("k", "key", kv_len), ("v", "value", kv_len),
            ("out", "dout", q_len),
            ("dout", "dout", q_len),
        )
    }  # fmt: skip
    plan, params = sources.plan(request(
        layouts, 2, True, scale=1.0, window_left=8, window_right=8, scratch_bytes=1 << 60
    ))  # fmt: skip
    kernel = kernel_of(plan, family, key_end)
    library = compile_kernel(sources, family, kernel)
    note("compiled")
    own = {name: tuple(x[name].tensor.stride()) for name in ("dq", "dk", "dv")}
    block = torch.frombuffer(
        bytearray(with_seed(params, key_end=key_end, dq_sums=tiles, **own)), dtype=torch.uint8
    ).clone()
    numbers = sources.buffers
    buffers = {numbers[name]: y.buffer for name, y in x.items()}
    buffers[numbers["params"]] = engine.Buffer(block.data_ptr(), len(block), False)
    threads = kernel["threads"]
    rows = kernel["groups"][1] if family in KEYS_SIDE else 1  # the first rows alone see a key
    groups = (kernel["groups"][0] * threads, rows, 1)
    library.launch(kernel["name"], groups, (threads, 1, 1), buffers, workers=1)
    if behind:
        sums = x["ds"].flat[tiles:].as_strided((2, 64, 64), (q_len * 64, 64, 1))
        return {"sums": sums.clone()}
    wanted = ("dk", "dv", "ds") if family in KEYS_SIDE else ("dq",)
    return {name: x[name].tensor.clone() for name in wanted}


def ds_beyond_32_bits(
    sources: Sources, note: Callable[[str], None], family: str, kv_len: int
) -> None:
    near, far = (_far_ds(sources, note, family, q_len, kv_len) for q_len in (64, _FAR))
    for name in near:
        assert torch.equal(near[name], far[name]), name


def _far() -> Iterator[Property]:
    for name, q_len, strides in (
        ("row statistics", _FAR, (0, 0, 3, 1)),
        ("rows", 32, (0, 0, (1 << 31) + 6, 1)),
        ("columns", 32, (0, 0, 1, (1 << 31) + 6)),
    ):
        for family in (FORWARD, DELTA, *KEYS_SIDE, DQ):
            test = functools.partial(
                positions_beyond_32_bits, family=family, q_len=q_len, strides=strides
            )
            yield Property(f"{family}: {name} beyond 32 bits", family, test)
    for family in (*KEYS_SIDE, DQ_FROM_DS):
        test = functools.partial(ds_beyond_32_bits, family=family, kv_len=16)
        yield Property(f"{family}: dS beyond 32 bits", family, test)
    test = functools.partial(ds_beyond_32_bits, family=DQ_FROM_DS, kv_len=80)
    yield Property(f"{DQ_FROM_DS}: sums of dq beyond 32 bits", DQ_FROM_DS, test)


# ---- the plan

_TILES = {  # by operand size, up to a padded head dim: forward, dkv, dq, dq from dS
    2: {32: ("r2_k32_b2", "q32", "r1_k32", "r2_k32"),
        64: ("r1_k32_b2", "q16", "r1_k16", "r2_k32"),
        96: ("r1_k32_b1", "q16", "r1_k16", "r2_k32"),
        128: ("r1_k32_b1", "q16_pairs", "r1_k16", "r2_k16"),
        256: ("r1_k8_b2", "q8_pairs", "r1_k8", "r1_k8")},
    4: {32: ("r2_k32_b1", "q32", "r1_k32", "r2_k32"),
        64: ("r1_k32_b1", "q16", "r1_k16", "r2_k32"),
        80: ("r1_k32_b1", "q8", "r1_k16", "r2_k32"),
        96: ("r1_k32_b1", "q16_pairs", "r1_k16", "r2_k32"),
        128: ("r1_k16_b1", "q8_pairs", "r1_k8", "r2_k16"),
        256: ("r1_k8_b1", "q8_pairs", "r1_k8", "r1_k8")},
}  # fmt: skip
_WIDTHS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_TYPES = {
    F16: ("float16", "half", "half"),
    BF16: ("bfloat16", "bfloat", "float"),
    F32: ("float32", "float", "float"),
}


def _dense_layouts(b: int = 2, h: int = 4, hk: int = 2, l: int = 40, s: int = 70, d: int = 64,
                   dv: int | None = None) -> dict[str, tuple]:  # fmt: skip
    dv = d if dv is None else dv
    shapes = {"q": (b, h, l, d), "k": (b, hk, s, d), "v": (b, hk, s, dv), "out": (b, h, l, dv),
              "dout": (b, h, l, dv)}  # fmt: skip
    return {name: (shape, _dense(shape), 0) for name, shape in shapes.items()}


def _expected_kernel(family: str, dtype: torch.dtype, width: int, tile: str, flags: str,
                     groups: list[int]) -> dict:  # fmt: skip
    torch_name, metal, operand = _TYPES[dtype]
    operand = "float" if family == DQ_FROM_DS else operand
    with_dropout = family not in (DELTA, DQ_FROM_DS)
    if not with_dropout:
        flags = flags.removesuffix("_dropout")
    name = "_".join(filter(None, (family, torch_name, f"d{width}", tile, flags)))
    numbers = re.findall(r"\d+", tile)
    arguments = [metal, *([] if family == DELTA else [operand]), str(width), *numbers]
    if family in KEYS_SIDE:
        arguments.append(str(tile.endswith("_ds")).lower())
    arguments += ["4", str("chunks" in flags).lower()]
    arguments += [str("dropout" in flags).lower()] if with_dropout else []
    call = f"{family}<{', '.join(arguments)}>"
    sizes = ""
    if family in KEYS_SIDE:
        sizes = f"BK {keys_of_group(family)}, BQ {numbers[0]}"
        sizes += ", dS stored" if tile.endswith("_ds") else ""
    elif family != DELTA:
        sizes = f"BQ {32 * int(numbers[0])}, BK {numbers[1]}"
    if family == FORWARD:
        sizes += ", K and V staged " + {"1": "in turn", "2": "together"}[numbers[2]]
    sizes += ", " if sizes else ""
    return {
        "name": name, "family": family, "groups": groups, "threads": 128,
        "instantiation": f'template [[host_name("{name}")]] [[kernel]] decltype({call}) {call};\n',
        "tile": f"{sizes}head_dim padded to {width}; {groups[0]} x {groups[1]} threadgroups of "
                "128 threads",
        "tile_name": tile,
    }  # fmt: skip


_ADVICE = (
    "rows that start at multiples of 16 bytes with adjacent columns (and a head_dim of whole "
    "16-byte chunks) load faster than the element-wise loads this call needs"
)


def plan_of_every_width(sources: Sources) -> None:
    widths = {1, *_WIDTHS, *(w + 1 for w in _WIDTHS[:-1]), *(w - 1 for w in _WIDTHS)}
    for dtype, d in itertools.product(_TYPES, sorted(widths)):
        width = next(w for w in _WIDTHS if w >= d)
        sizes = _TILES[2 if dtype == F16 else 4]
        forward_tile, dkv, dq, dq_from_ds = next(
            tiles for limit, tiles in sizes.items() if width <= limit
        )
        p = 0.25 if d % 2 else 0.0
        chunks = d % (16 // dtype.itemsize) == 0
        flags = ("chunks" if chunks else "elements") + ("_dropout" if p else "")
        layouts = _dense_layouts(d=d)
        number = DTYPE_NUMBERS[dtype]
        keys_side = DKV_PAIRS if dkv.endswith("pairs") else DKV
        dkv = dkv.removesuffix("_pairs")
        keys = -(-70 // keys_of_group(keys_side))

        def expected(family: str, tile: str, groups: list[int]) -> dict:
            return _expected_kernel(family, dtype, width, tile, flags, groups)  # noqa: B023

        def rows_of(tile: str) -> int:  # 40 rows in blocks of 32 or 64
            return 2 if tile.startswith("r1") else 1

        delta = expected(DELTA, "", [8, 2])
        plain = [delta, expected(keys_side, dkv, [4, keys]), expected(DQ, dq, [8, 2])]
        storing = plain
        if width >= 64:
            storing = [delta, expected(keys_side, f"{dkv}_ds", [4, keys]),
                       expected(DQ_FROM_DS, dq_from_ds, [8, rows_of(dq_from_ds)])]  # fmt: skip
        for backward, scratch, kernels in (
            (False, 0, [expected(FORWARD, forward_tile, [8, rows_of(forward_tile)])]),
            (True, 0, plain),
            (True, 1 << 30, storing),
        ):
            plan, _ = sources.plan(
                request(layouts, number, backward, dropout_p=p, scratch_bytes=scratch)
            )
            for kernel in plan["kernels"]:
                kernel.pop("alternatives")
            # All of dS: 2 groups of 2 heads in each batch, 5 x 9 tiles of 8 x 8.
            stored = 4 * 2 * 5 * 9 * 256 if kernels is storing and width >= 64 else 0
            assert plan == {
                "refusal": "", "detail": "", "advice": "" if chunks else _ADVICE,
                "kernels": kernels,
                "scratch_bytes": stored,
                "launches": [
                    [n, *kernel["groups"], 0, 0, 70] for n, kernel in enumerate(kernels)
                ],
            }, (plan, kernels)  # fmt: skip


def plan_of_buffers(sources: Sources) -> None:
    """Several tensors are bound to each kernel."""
    assert len(set(sources.buffers.values())) == len(BUFFERS)


def plan_of_scratch(sources: Sources) -> None:
    """Whole groups of query heads, as many as fit; none where not one does."""
    layouts = _dense_layouts(b=3, h=10, hk=5, l=41, s=70)  # a group takes 2 * 6 * 9 tiles
    group = 2 * 6 * 9 * 64 * 4
    for scratch, at_once in (
        (0, 0), (group - 1, 0), (group, 1), (2 * group - 1, 1), (7 * group, 7), (15 * group, 15),
        (99 * group, 15),
    ):  # fmt: skip
        plan, _ = sources.plan(request(layouts, 0, True, scratch_bytes=scratch))
        assert plan["scratch_bytes"] == at_once * group
        step = at_once or 15
        delta, dkv, dq = (kernel["groups"] for kernel in plan["kernels"])
        expected = [[0, *delta, 0, 0, 70]]
        for first in range(0, 15, step):
            heads = min(step, 15 - first)
            expected += [[1, heads, dkv[1], first, 0, 70], [2, 2 * heads, dq[1], first, 0, 70]]
        assert plan["launches"] == expected
        last = plan["kernels"][-1]["family"]
        assert last == (DQ_FROM_DS if at_once else DQ)
    for keys in (70, 1):
        layouts = _dense_layouts(b=1, h=6, hk=1, s=keys)
        plan, _ = sources.plan(request(layouts, 0, True, scratch_bytes=1 << 20))
        assert [launch[1] for launch in plan["launches"]] == [6, 1, 6]
    for sizes in ({"l": 0}, {"s": 0}, {"d": 63}, {"b": 0}):
        layouts = _dense_layouts(**{"d": 64, **sizes})
        plan, _ = sources.plan(request(layouts, 0, True, scratch_bytes=1 << 20))
        stored = sizes == {"d": 63}
        assert (plan["scratch_bytes"] > 0) == stored
        assert plan["kernels"][-1]["family"] == (DQ_FROM_DS if stored else DQ)
    plan, _ = sources.plan(request(_dense_layouts(d=48), 0, True, scratch_bytes=1 << 30))
    assert plan["scratch_bytes"] == 0


def plan_of_divided_keys(sources: Sources) -> None:
    """Where one head's dS does not fit, chunks of its keys that fill a GPU, or nothing."""
    for d, split, dtype in ((64, 1, 0), (128, 2, 0), (64, 1, 2), (256, 2, 2)):
        layouts = _dense_layouts(b=1, h=4, hk=2, l=41, s=9000, d=d)
        row = 4 * 2 * 6 * 8  # bytes of one key's dS: two query heads, six blocks of rows
        sums = 4 * 2 * 41 * d
        least = 96 * 32 // split
        for keys in (least - 1, least, least + 63, least + 64, 8999, 9000):
            chunk = keys // 64 * 64
            plan, params = sources.plan(
                request(layouts, dtype, True, scratch_bytes=keys * row + sums)
            )
            fits = keys * row + sums >= 9000 // 8 * 8 * row
            if fits:
                assert plan["scratch_bytes"] == 9000 * row and params.dq_sums == 9000 * row // 4
                continue
            if chunk < least:
                assert plan["scratch_bytes"] == 0 and plan["launches"][1][1:] == [
                    4 // 2, -(-9000 // (32 // split)), 0, 0, 9000
                ]  # fmt: skip
                continue
            assert plan["scratch_bytes"] == chunk * row + sums
            assert params.dq_sums == chunk * row // 4
            expected = [[0, *plan["kernels"][0]["groups"], 0, 0, 9000]]
            for head in (0, 1):
                for begin in range(0, 9000, chunk):
                    end = min(begin + chunk, 9000)
                    groups = -(-(end - begin) // (32 // split))
                    expected += [
                        [1, 1, groups, head, begin, end],
                        [2, 2, plan["kernels"][2]["groups"][1], head, begin, end],
                    ]
            assert plan["launches"] == expected


def plan_of_large_sums(sources: Sources) -> None:
    """dq's sums behind dS have more than 2^32 elements."""
    q_len, keys = 1 << 24, 8192
    layouts = _dense_layouts(b=1, h=2, hk=1, l=q_len, s=1 << 20, d=128)
    tiles, sums = 2 * q_len * keys, 2 * q_len * 128
    plan, params = sources.plan(request(layouts, 0, True, scratch_bytes=4 * (tiles + sums)))
    assert plan["scratch_bytes"] == 4 * (tiles + sums) and params.dq_sums == tiles
    assert [launch[4:] for launch in plan["launches"][1:5]] == [
        [0, keys], [0, keys], [keys, 2 * keys], [keys, 2 * keys],
    ]  # fmt: skip


def plan_of_other_tiles(sources: Sources) -> None:
    """A forward's tile can be asked for by name, from the list that the plan gives."""
    for dtype, d in itertools.product(_TYPES, _WIDTHS):
        plan, _ = sources.plan(request(_dense_layouts(d=d), DTYPE_NUMBERS[dtype]))
        sizes = (("", 2), ("_float", 4)) if dtype == F16 else (("", 4),)
        assert plan["kernels"][0]["alternatives"] == [
            f"r{r}_k{k}_b{b}{ending}"
            for ending, size in sizes
            for r in (1, 2) for k in (8, 16, 32) for b in (0, 1, 2)
            if b * k * (d * size + 16) <= 32768
        ]  # fmt: skip
    for dtype, d, fits in (
        (F16, 64, lambda r, k, b, half: True),
        (F16, 256, lambda r, k, b, half: b * k * (528 if half else 1040) <= 32768),
        (F32, 128, lambda r, k, b, half: b * k * 528 <= 32768),
        (BF16, 256, lambda r, k, b, half: b * k * 1040 <= 32768),
    ):
        layouts = _dense_layouts(d=d, l=100)
        plan, _ = sources.plan(request(layouts, DTYPE_NUMBERS[dtype]))
        default = plan["kernels"][0]
        expected = [
            f"r{r}_k{k}_b{b}" + ("" if half else "_float")
            for half in ((True, False) if dtype == F16 else (True,))
            for r in (1, 2) for k in (8, 16, 32) for b in (0, 1, 2)
            if fits(r, k, b, half)
        ]  # fmt: skip
        assert default["alternatives"] == expected
        assert default["tile_name"] in expected and f"_{default['tile_name']}_" in default["name"]
        for name in expected:
            asked = f"attention_backward_dq=r9_k9,attention_forward={name}".encode()
            plan, _ = sources.plan(request(layouts, DTYPE_NUMBERS[dtype], tiles=asked))
            kernel = plan["kernels"][0]
            assert f"_d{d}_{name}_chunks" in kernel["name"] and kernel["tile_name"] == name
            numbers = re.findall(r"\d+", name)
            operand = "float" if name.endswith("float") or dtype != F16 else "half"
            arguments = template_arguments(kernel)
            assert arguments[1] == operand and arguments[3:6] == numbers
            assert kernel["groups"] == [8, -(-100 // (32 * int(numbers[0])))]
            staged = ("read directly", "staged in turn", "staged together")[int(numbers[2])]
            assert f"K and V {staged}, " in kernel["tile"]
        for wrong in ("r3_k8_b1", "r1_k8", "x"):
            asked = f"attention_forward={wrong}".encode()
            plan, _ = sources.plan(request(layouts, DTYPE_NUMBERS[dtype], tiles=asked))
            assert plan["refusal"].startswith("ORCHARD_TILES names a tile")
            assert plan["detail"] == f"got {wrong}" and "bench --tiles" in plan["advice"]
            assert plan["kernels"] == []


def plan_of_threadgroups(sources: Sources) -> None:
    for l, s in ((1, 1), (31, 33), (32, 32), (33, 31), (64, 65), (97, 300)):
        layouts = _dense_layouts(3, 6, 2, l, s)
        for backward, scratch in ((False, 0), (True, 0), (True, 1 << 30)):
            plan, _ = sources.plan(request(layouts, 0, backward, scratch_bytes=scratch))
            for kernel in plan["kernels"]:
                rows = 64 if kernel["family"] == DQ_FROM_DS else 32
                keys = kernel["family"] in KEYS_SIDE
                expected = [6, -(-s // 32)] if keys else [18, -(-l // rows)]
                assert kernel["groups"] == expected and kernel["threads"] == 128


def plan_of_params(sources: Sources) -> None:
    strides = {
        name: tuple(range(far + n, far + n + 4))
        for n, (name, far) in enumerate(
            (("q", 0), ("k", 1 << 40), ("v", 0), ("out", 1 << 41), ("dout", 0))
        )
    }
    layouts = {
        name: (sizes, strides[name], 0)
        for name, (sizes, _, _) in _dense_layouts(2, 6, 3, 41, 73, 24).items()
    }
    for backward in (False, True):
        _, params = sources.plan(request(
            layouts, 2, backward, dropout_p=0.3, scale=0.37, window_left=5, window_right=9,
            diagonal=-13,
        ))  # fmt: skip
        for name, expected in strides.items():
            if backward or name != "dout":
                assert tuple(getattr(params, name)) == expected, name
        got = [getattr(params, n) for n in ("num_heads", "num_kv_heads", "q_len", "kv_len",
               "head_dim", "diagonal", "window_left", "window_right")]  # fmt: skip
        assert got == [6, 3, 41, 73, 24, -13, 5, 9]
        threshold = round(0.3 * 65536)
        assert params.dropout_threshold == threshold
        floats = (params.scale, params.scale_log2, params.dropout_rescale)
        exact = (0.37, 0.37 / math.log(2), 65536 / (65536 - threshold))
        assert floats == tuple(torch.tensor(exact, dtype=F32).tolist())


def plan_of_windows(sources: Sources) -> None:
    open_ = 1 << 30
    for given, expected in (
        (-1, open_), (0, 0), (1, 1), (open_ - 1, open_ - 1), (open_ + 1, open_), (-7, open_),
        (1 << 40, open_),
    ):  # fmt: skip
        for side in ("window_left", "window_right"):
            _, params = sources.plan(request(_dense_layouts(), 0, **{side: given}))
            other = {"window_left": "window_right", "window_right": "window_left"}[side]
            assert getattr(params, side) == expected and getattr(params, other) == open_


def plan_of_dropout(sources: Sources) -> None:
    for p, expected in (
        (0.0, 0), (2.0**-17, 0), (2.0**-16, 1), (1.5 * 2.0**-16, 2), (2.5 * 2.0**-16, 2),
        (0.5, 32768), (1 - 2.0**-16, 65535), (1 - 2.0**-20, 65535),
    ):  # fmt: skip
        plan, params = sources.plan(request(_dense_layouts(), 0, dropout_p=p))
        assert params.dropout_threshold == expected == dropout.threshold(p)
        assert plan["kernels"][0]["name"].endswith("_dropout") == (expected > 0)
        assert params.dropout_rescale == torch.tensor(dropout.rescale(p), dtype=F32).item()


def plan_of_layouts(sources: Sources) -> None:
    """Chunks only where each row of each tensor starts at 16 bytes."""
    base = _dense_layouts()
    for dtype, chunk in ((0, 8), (1, 8), (2, 4)):
        cases: list[tuple[str, tuple, bool]] = []
        for name, (sizes, strides, _) in base.items():
            for d in range(3):
                for change, fits in ((chunk, True), (chunk // 2, False), (1, False)):
                    new = tuple(n + change * (i == d) for i, n in enumerate(strides))
                    cases.append((name, (sizes, new, 0), fits))
            cases.append((name, (sizes, (*strides[:3], 2), 0), False))
            cases.append((name, (sizes, (*strides[:3], 0), 0), False))
            cases += [(name, (sizes, strides, n), n % chunk == 0) for n in (chunk, 1, chunk // 2)]
        for name, layout, fits in cases:
            for backward in (False, True):
                used = backward or name != "dout"
                plan, _ = sources.plan(request({**base, name: layout}, dtype, backward))
                word = "_chunks" if fits or not used else "_elements"
                assert all(word in k["name"] for k in plan["kernels"]), (name, layout)
                assert plan["advice"] == ("" if word == "_chunks" else _ADVICE)
    # Strides of dimensions of one element do not matter.
    single = {name: ((1, 1, 1, 64), (7, 9, 11, 1), 0) for name in base}
    plan, _ = sources.plan(request(single, 0))
    assert "_chunks" in plan["kernels"][0]["name"]
    pair = {**single, "q": ((2, 1, 1, 64), (7, 9, 11, 1), 0)}
    plan, _ = sources.plan(request(pair, 0))
    assert "_elements" in plan["kernels"][0]["name"]


_LONG = 1 << 28
_HEADS = (2**31 - 1) // 128
_TOO_WIDE = "head_dim is above 256"
_TOO_LONG = "a length or the diagonal is above 2^28"
_REFUSALS: list[tuple[dict, dict, int, str, str]] = [
    ({}, {}, 3, "the dtype is not float16, bfloat16 or float32", ""),
    ({"d": 257}, {}, 0, _TOO_WIDE, "got 257"),
    ({"d": 2**32 + 64}, {}, 0, _TOO_WIDE, "got 4294967360"),
    ({"dv": 32}, {}, 0, "value's head_dim differs from query's", "got 32 and 64"),
    ({}, {"has_mask": 1}, 0, "attn_mask is given", ""),
    ({}, {"has_alibi": 1}, 0, "alibi_slopes are given", ""),
    ({}, {"has_sinks": 1}, 0, "sinks are given", ""),
    ({}, {"softcap": 2.5}, 0, "softcap is given", "got 2.5"),
    ({}, {"softcap": 0.25}, 0, "softcap is given", "got 0.25"),
    ({"l": _LONG + 1}, {}, 0, _TOO_LONG, f"got {_LONG + 1}"),
    ({"s": _LONG + 1}, {}, 0, _TOO_LONG, f"got {_LONG + 1}"),
    ({"s": _LONG + 2}, {"diagonal": _LONG + 1}, 0, _TOO_LONG, f"got {_LONG + 2}"),
    ({}, {"diagonal": _LONG + 1}, 0, _TOO_LONG, f"got {_LONG + 1}"),
    ({}, {"diagonal": -_LONG - 1}, 0, _TOO_LONG, f"got {_LONG + 1}"),
    ({"b": 2, "h": (_HEADS + 1) // 2}, {}, 0,
     f"batch times heads is above {_HEADS}", f"got {_HEADS + 1}"),
]  # fmt: skip


def plan_of_refusals(sources: Sources) -> None:
    for sizes, fields, dtype, refusal, detail in _REFUSALS:
        for backward in (False, True):
            plan, _ = sources.plan(request(_dense_layouts(**sizes), dtype, backward, **fields))
            assert plan.pop("advice")
            assert plan == {
                "refusal": refusal, "detail": detail, "kernels": [], "scratch_bytes": 0,
                "launches": [],
            }, plan  # fmt: skip
    for sizes, fields in (
        ({"d": 256}, {}), ({"l": _LONG}, {}), ({"s": _LONG}, {}), ({}, {"diagonal": _LONG}),
        ({}, {"diagonal": -_LONG}), ({"b": 1, "h": _HEADS}, {}), ({}, {"softcap": 0.0}),
    ):  # fmt: skip
        plan, _ = sources.plan(request(_dense_layouts(**sizes), 0, **fields))
        assert not plan["refusal"], plan


def plan_of_strides(sources: Sources) -> None:
    sizes = (2, 3, 5, 7)
    for order in itertools.permutations(range(3)):
        like, size = [0, 0, 0, 1], 7
        for d in reversed(order):
            like[d], size = size, size * sizes[d]
        assert sources.strides_in_order_of(like, sizes) == like
        wide = [n // 7 * 4 for n in like[:3]]
        assert sources.strides_in_order_of(like, (2, 3, 5, 4)) == [*wide, 1]
    assert sources.strides_in_order_of((4, 4, 4, 1), sizes) == [105, 35, 7, 1]  # ties keep order
    assert sources.strides_in_order_of((5, 6, 7, 1), sizes) == [7, 14, 42, 1]
    large = 1 << 33
    rows, columns = ((3, 2, 1, 1), (2, 3, large, 7)), ((3, 2, 1, 1), (2, 3, 5, large))
    assert sources.strides_in_order_of(*rows) == [21 * large, 7 * large, 7, 1]
    assert sources.strides_in_order_of(*columns) == [15 * large, 5 * large, large, 1]
    assert sources.strides_in_order_of((0, 0, 0, 0), (0, 0, 0, 0)) == [1, 1, 1, 1]
    assert sources.strides_in_order_of((9, 5, 1, 1), (2, 0, 5, 7)) == [35, 35, 7, 1]


# ---- the list


@functools.cache
def killers() -> tuple[Attention | Property, ...]:
    """All of them; for a kernel, in order of cost."""
    plan = [
        Property(f"plan: {test.__name__.removeprefix('plan_of_').replace('_', ' ')}", None, test)
        for test in (
            plan_of_every_width, plan_of_threadgroups, plan_of_params, plan_of_windows,
            plan_of_dropout, plan_of_layouts, plan_of_refusals, plan_of_strides,
            plan_of_scratch, plan_of_divided_keys, plan_of_large_sums, plan_of_other_tiles,
            plan_of_buffers,
        )
    ]  # fmt: skip
    plain = [k for k in _attention() if not k.check]
    checked: list[Any] = [k for k in _attention() if k.check]
    both = ((DKV, DKV), (DKV_PAIRS, DKV_PAIRS), (DQ_FROM_DS, DKV))
    properties: list[Any] = [
        Property(f"{FORWARD}: lse is rounded once", FORWARD, lse_is_rounded_once),
        *(
            Property(
                f"{FORWARD}: origins move, {_TYPES[dtype][0]}, head_dim {head_dim}",
                FORWARD,
                functools.partial(origins_move, dtype=dtype, head_dim=head_dim),
            )
            for dtype, head_dim in ((F32, 32), (F32, 64), (F16, 64))
        ),
        Property(f"{FORWARD}: sums in chains", FORWARD, sums_in_chains),
        Property(f"{FORWARD}: origins beyond 2^27", FORWARD, far_origins),
        Property(f"{FORWARD}: rows beside others that move", FORWARD, rows_alone),
        Property(f"{FORWARD}: scores of -inf", FORWARD, infinite_scores_forward),
        Property(f"{DQ}: scores of -inf", DQ, infinite_scores_dq),
        *(
            Property(
                f"{family}: scores of -inf",
                family,
                functools.partial(infinite_scores_dkv, family=family),
            )
            for family in KEYS_SIDE
        ),
        *(
            Property(
                f"{family}: small weights",
                family,
                functools.partial(small_weights_dkv, family=family),
            )
            for family in KEYS_SIDE
        ),
        *(
            Property(
                f"{family}: divided keys",
                family,
                functools.partial(divided_keys, keys_side=keys_side),
            )
            for family, keys_side in both
        ),
        Property(
            f"{DQ_FROM_DS}: one key in the last part",
            DQ_FROM_DS,
            functools.partial(divided_keys, keys_side=DKV, kv_len=129),
        ),
    ]
    checked += [
        Property(f"{FORWARD}: origins move, checked", FORWARD,
                 functools.partial(origins_move, dtype=F32, head_dim=32, check=True)),
        *(
            Property(f"{family}: divided keys, checked", family,
                     functools.partial(divided_keys, keys_side=keys_side, check=True))
            for family, keys_side in both
        ),
    ]  # fmt: skip
    return (*plan, *plain, *_edges(), *properties, *_far(), *checked)


def prepare() -> None:
    """Computes all references, so that processes forked later share them."""
    for killer in killers():
        if isinstance(killer, Attention):
            reference(killer.case, killer.dlse, killer.shifts)
    for family, check in itertools.product(FAMILIES, (False, True)):
        _compiled_together(family, check)
