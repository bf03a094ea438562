"""A group's query heads divided between threadgroups of the key's side, and the parts' sums."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from attention_cases import Case

from ..harness import (
    DKV,
    DKV_PAIRS,
    DKV_SUMS,
    DQ_FROM_DS,
    Guarded,
    Sources,
    launch,
    request,
    with_seed,
)
from .attention import (
    BF16,
    F16,
    F32,
    KEYS_SIDE,
    Attention,
    DscoreRows,
    dense,
    empty,
    kernel_of,
    reference,
)
from .compiled import compile_kernel
from .properties import Property

_MANY = 1 << 20  # cores: as many parts as can be
_LAYOUTS = ("padded", "blhd", "rows_odd", "dense", "odd")  # no two tensors have the same strides


@dataclass(frozen=True)
class Divided(Attention):
    """The two kernels one after the other, for key/value heads `kv_heads` of all batches; in turns,
    for one of them."""

    parts: int = 3
    turns: int = 1

    def run(self, sources: Sources, note: Callable[[str], None] = lambda _: None) -> None:
        given, case = reference(self.case, self.dlse, self.shifts), self.case
        x = self._operands()
        plan, params = self._whole_plan(
            sources, x, stores_ds=True, scratch_bytes=1 << 40, gpu_cores=_MANY
        )
        assert params.dkv_parts == self.parts
        heads = slice(*self.kv_heads or (0, case.batch * case.num_kv_heads))
        count, sums = heads.stop - heads.start, self.parts // self.turns
        assert self.turns == 1 or count == 1
        width = case.head_dim + given.operands[2].shape[3]
        shape = (1, count * sums, case.kv_len, width)
        parts = Guarded(shape, dense(shape), F32)
        _, k, v, _ = given.operands
        results = {"dk": empty(k, self.layouts[1]), "dv": empty(v, self.layouts[2])}
        written = {"dk": parts, "dv": parts}
        if self.store_ds:
            written["ds"] = self._empty_ds(params)
        inputs = {name: x[name] for name in ("query", "key", "value", "dout")}
        inputs |= {"row_stats": self._row_stats(), "delta": self._delta(given)}
        own = {name: tuple(y.tensor.stride()) for name, y in results.items()}
        first, of_turn = (
            self._query_heads().start,
            case.num_heads // case.num_kv_heads // self.turns,
        )
        for family, taken, left, begin in (
            *((self.family, inputs, written, first + t * of_turn) for t in range(self.turns)),
            (DKV_SUMS, {"dkv_parts": parts}, results, first),
        ):
            block = with_seed(
                params, first_head=begin, key_end=case.kv_len, dkv_sums=sums, **own
            )  # fmt: skip
            kernel = kernel_of(plan, family, case.kv_len)
            kernel["groups"][0] = count * (sums if family == self.family else 1)
            library = compile_kernel(sources, family, kernel, self.check)
            note("compiled")
            launch(library, kernel, sources.buffers, block, taken, left, workers=1)
        found = {name: y.tensor for name, y in results.items()}
        if self.store_ds:
            found["ds"] = written["ds"].tensor
        self._compare(given, found, DscoreRows.of(params))


def sums_of_parts(
    sources: Sources, note: Callable[[str], None], dtype: torch.dtype, check: bool = False
) -> None:
    """Bit for bit what an addition in order gives, for key/value heads 1 and 2 of 4."""
    heads, parts, sums, kv_len, d, dv = 4, 4, 3, 6, 40, 33
    layouts = {
        name: (shape, dense(shape), 0)
        for name, shape in (
            ("q", (2, 8, 256, d)), ("k", (2, 2, kv_len, d)), ("v", (2, 2, kv_len, dv)),
            ("out", (2, 8, 256, dv)), ("dout", (2, 8, 256, dv)),
        )
    }  # fmt: skip
    number = {F16: 0, BF16: 1, F32: 2}[dtype]
    asked = request(layouts, number, True, scratch_bytes=1 << 30, gpu_cores=_MANY)
    plan, params = sources.plan(asked)
    assert params.dkv_parts == params.dkv_sums == parts
    kernel = kernel_of(plan, DKV_SUMS, kv_len)
    assert kernel["groups"] == [heads, 4]  # 6 x 73 elements
    kernel["groups"][0] = 2
    shape = (2, sums, kv_len, d + dv)
    given = Guarded(shape, dense(shape), F32)
    given.tensor.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(3)))
    results = {
        "dk": Guarded((2, 2, kv_len, d), (2000, 600, 48, 1), dtype),
        "dv": Guarded((2, 2, kv_len, dv), (1500, 40, 90, 1), dtype),
    }
    own = {name: tuple(y.tensor.stride()) for name, y in results.items()}
    library = compile_kernel(sources, DKV_SUMS, kernel, check)
    note("compiled")
    block = with_seed(params, first_head=4, key_end=kv_len, dkv_sums=sums, **own)
    launch(library, kernel, sources.buffers, block, {"dkv_parts": given}, results, workers=1)
    expected = torch.zeros(2, kv_len, d + dv)
    for part in range(sums):
        expected = expected + given.tensor[:, part]
    for name, columns in (("dk", slice(0, d)), ("dv", slice(d, None))):
        found = results[name].tensor.flatten(0, 1)
        assert torch.equal(found[1:3], expected[..., columns].to(dtype)), name
        assert found[0].isnan().all() and found[3].isnan().all(), name


def _cases() -> Iterator[Divided]:
    """Three parts of two heads, values wider than keys; parts of one; the sums of a part in parts
    of their own."""
    narrow = Case(
        129, 41, 15, batch=2, num_heads=12, num_kv_heads=2, dtype=F32, dropout_p=0.3,
        window_left=70, window_right=6, diagonal=-40,
    )  # fmt: skip
    wide = Case(128, 40, 64, num_heads=12, num_kv_heads=2, dtype=F16, window_right=0)
    values = Case(129, 41, 15, num_heads=12, num_kv_heads=2, dtype=F32, value_dim=21)
    halves = Case(256, 40, 48, num_heads=8, num_kv_heads=2, dtype=F16, dropout_p=0.3)
    alone = Case(257, 33, 15, num_heads=3, num_kv_heads=1, dtype=F32, dropout_p=0.3)
    long = Case(1040, 20, 15, num_heads=2, num_kv_heads=1, dtype=F32, dropout_p=0.3)
    for family in KEYS_SIDE:
        yield Divided(f"{family}: parts of groups, elements", family, narrow, layouts=_LAYOUTS)
        yield Divided(f"{family}: parts of heads 1 to 3", family, narrow, kv_heads=(1, 3))
        yield Divided(f"{family}: parts of groups, storing", family, wide, store_ds=True)
        yield Divided(f"{family}: parts of groups, wide values", family, values)
        yield Divided(f"{family}: parts of a head each", family, alone)
        yield Divided(f"{family}: sums in parts of parts", family, long, parts=2)
        yield Divided(f"{family}: sums in turns", family, narrow, kv_heads=(2, 3), turns=3)
        yield Divided(f"{family}: sums of halves in turns", family, halves, kv_heads=(1, 2),
                      parts=4, turns=2)  # fmt: skip
        yield Divided(f"{family}: sums in parts and turns", family, long, parts=2, turns=2)


def _plan(sources: Sources, scratch: int, cores: int, number: int = 0, **sizes: int) -> tuple:
    """The plan and its params; dS is stored, where it fits, if d is given."""
    x = {"b": 1, "h": 12, "hk": 1, "l": 1024, "s": 64, "d": 16, "dv": sizes.get("d", 16)} | sizes
    shapes = {"q": (x["b"], x["h"], x["l"], x["d"]), "k": (x["b"], x["hk"], x["s"], x["d"]),
              "v": (x["b"], x["hk"], x["s"], x["dv"]),
              "out": (x["b"], x["h"], x["l"], x["dv"])}  # fmt: skip
    shapes["dout"] = shapes["out"]
    layouts = {name: (shape, dense(shape), 0) for name, shape in shapes.items()}
    asked = request(layouts, number, True, scratch_bytes=scratch, gpu_cores=cores, stores_ds=True)
    return sources.plan(asked)


def plan_of_parts(sources: Sources) -> None:
    """As few equal parts as fill the cores, of enough queries each, with sums that fit."""
    for parts, cores, sizes in (
        (1, 1, {"s": 8 * 32}), (2, 1, {"s": 7 * 32}), (2, 1, {"s": 6 * 32 + 1}), (3, 1, {"s": 96}),
        (4, 1, {"s": 64}), (4, 1, {"s": 33}), (12, 1, {"s": 32}), (6, 1, {"s": 64, "h": 6}),
        (2, 4, {"s": 5 * 32, "hk": 6}), (1, 4, {"s": 6 * 32, "hk": 6}), (2, 4, {"b": 8}),
        (7, 1, {"h": 14, "hk": 2}), (1, 1, {"h": 1}), (1, 1, {"h": 4, "hk": 4}),
        # 256 queries of a part
        (1, 9, {"h": 4, "l": 127}), (2, 9, {"h": 4, "l": 128}), (2, 9, {"h": 4, "l": 255}),
        (4, 9, {"h": 4, "l": 256}), (3, 9, {"h": 6, "l": 256, "hk": 2}),
        (1, 9, {"h": 6, "l": 255, "hk": 2}),
        # pairs of simdgroups take 16 keys
        (2, 1, {"s": 7 * 16, "d": 160}), (1, 1, {"s": 8 * 16, "d": 160}),
    ):  # fmt: skip
        plan, params = _plan(sources, 1 << 32, cores, **sizes)
        assert params.dkv_parts == parts, (params.dkv_parts, parts, cores, sizes)
        of_one = sizes.get("b", 1) * sizes.get("hk", 1) * sizes.get("s", 64)
        elements = parts * of_one * 2 * sizes.get("d", 16) if parts > 1 else 0
        assert plan["dkv_part_elements"] == elements
    of_one = 4 * 2 * 3 * 100 * (24 + 40)  # bytes of a part, of 2 x 3 key/value heads
    for parts, scratch in (
        (1, 0), (1, 8 * 2 * of_one - 1), (2, 8 * 2 * of_one), (2, 8 * 3 * of_one - 1),
        (3, 8 * 3 * of_one), (6, 8 * 6 * of_one),
    ):  # fmt: skip
        sizes = {"b": 2, "hk": 3, "h": 18, "s": 100, "d": 24, "dv": 40}
        plan, params = _plan(sources, scratch, _MANY, **sizes)
        assert params.dkv_parts == parts, (params.dkv_parts, parts)
        assert plan["dkv_part_elements"] * 4 == (parts * of_one if parts > 1 else 0)
        assert parts == 1 or plan["kernels"][-1]["groups"] == [6, 100 * (24 + 40) // 128]
    for parts, s in ((2, 1 << 22), (1, (1 << 22) + 1)):  # 1 GiB
        assert _plan(sources, 1 << 60, _MANY, s=s)[1].dkv_parts == parts
    assert _plan(sources, 1 << 60, _MANY, s=(1 << 27) + 1)[1].dkv_parts == 1  # 2^34 bytes of a part
    # Many queries, many cores, many threadgroups
    assert _plan(sources, 1 << 40, 1 << 40, l=1 << 28, h=24)[1].dkv_parts == 24
    assert _plan(sources, 1 << 40, 1 << 29, b=1 << 12, s=1 << 10, h=2, d=1)[1].dkv_parts == 2
    for empty_size in ({"b": 0}, {"h": 0}, {"s": 0}, {"d": 0, "dv": 0}, {"hk": 0}, {"l": 0}):
        plan, params = _plan(sources, 1 << 40, _MANY, **empty_size)
        assert params.dkv_parts == params.dkv_sums == 1, empty_size
        assert not plan["dkv_part_elements"], empty_size
    shape = (1, 12, 1024, 16)
    layouts = dict.fromkeys(("q", "k", "v", "out"), (shape, dense(shape), 0))
    assert sources.plan(request(layouts, 0, gpu_cores=_MANY))[0]["dkv_part_elements"] == 0


def plan_of_divided_launches(sources: Sources) -> None:
    """Names, grids, and sums behind each launch of the key's side."""
    for number, (dtype, metal) in enumerate(
        (("float16", "half"), ("bfloat16", "bfloat"), ("float32", "float"))
    ):
        for d, family, keys in ((64, DKV, 32), (160, DKV_PAIRS, 16)):
            # dS of two of four key/value heads at once, 2 x 2 x 4096 x 70 floats, and the sums
            stored = 4 * 2 * 2 * 4096 * 72
            sizes = {"h": 8, "hk": 4, "l": 4096, "s": 70, "d": d}
            plan, params = _plan(sources, stored * 8 // 7 + 8, 64, number, **sizes)
            assert params.dkv_parts == 2 and plan["scratch_bytes"] == stored
            assert plan["dkv_part_elements"] == 2 * 2 * 70 * 2 * d
            dkv, dq, sums = plan["kernels"][1:]
            assert (dkv["family"], sums["family"]) == (family, DKV_SUMS)
            assert (dkv["role"], sums["role"]) == (2, 3)
            blocks, of_sums = -(-70 // keys), 70 * d // 64
            assert dkv["groups"] == [8, blocks] and f"; 8 x {blocks} threadgroups" in dkv["tile"]
            assert dkv["name"].endswith("_ds_chunks_parts")
            assert ", PlainScore, false>, PartOfGroup>) attention" in dkv["instantiation"]
            call = f"{DKV_SUMS}<{metal}, 4>"
            sums.pop("alternatives")
            assert sums == {
                "family": DKV_SUMS, "name": f"{DKV_SUMS}_{dtype}", "role": 3,
                "instantiation": f'template [[host_name("{DKV_SUMS}_{dtype}")]] [[kernel]] '
                                 f"decltype({call}) {call};\n",
                "tile": f"4 x {of_sums} threadgroups of 128 threads",
                "tile_name": "", "groups": [4, of_sums], "threads": 128,
            }, sums  # fmt: skip
            of_dq = dq["groups"][1]
            assert plan["launches"][1:] == [
                [1, 4, blocks, 0, 0, 70], [2, 4, of_dq, 0, 0, 70], [3, 2, of_sums, 0, 0, 70],
                [1, 4, blocks, 4, 0, 70], [2, 4, of_dq, 4, 0, 70], [3, 2, of_sums, 4, 0, 70],
            ]  # fmt: skip
    # Keys of one head in turns: the sums of its parts are added up behind the last ones.
    keys, end, budget = 2048, 4072, 8 * 4096 * 3136
    plan, params = _plan(sources, budget, 64, h=4, hk=2, l=4096, s=end, d=64)
    assert params.dkv_parts == 2 and params.dq_sums == 2 * 4096 * keys
    of_dq = plan["kernels"][2]["groups"][1]
    assert plan["launches"][1:] == [
        launch
        for head in (0, 2)
        for launch in (
            [1, 2, 64, head, 0, keys], [2, 2, of_dq, head, 0, keys],
            [1, 2, 64, head, keys, end], [2, 2, of_dq, head, keys, end],
            [3, 1, end, head, 0, end],
        )
    ]  # fmt: skip
    whole, _ = _plan(sources, 2 * budget, 1, h=4, hk=2, l=4096, s=end, d=64)
    assert [kernel["family"] for kernel in whole["kernels"][1:]] == [DKV, DQ_FROM_DS]
    assert "_parts" not in whole["kernels"][1]["name"]
    assert "Group" not in whole["kernels"][1]["instantiation"]


def _property(case: Divided, family: str) -> Property:
    def test(sources: Sources, note: Callable[[str], None]) -> None:
        case.run(sources, note)

    return Property(case.name.replace(case.family, family), family, test, (case.family, DKV_SUMS))


def properties() -> Iterator[Property]:
    for of_plan in (plan_of_parts, plan_of_divided_launches):
        name = of_plan.__name__.removeprefix("plan_of_").replace("_", " ")
        yield Property(f"plan: {name}", None, of_plan)
    for dtype in (F32, F16):
        name = f"{DKV_SUMS}: sums of {str(dtype).removeprefix('torch.')}"
        yield Property(name, DKV_SUMS, functools.partial(sums_of_parts, dtype=dtype))
    for case in _cases():
        yield _property(case, case.family)


def checked() -> Iterator[Property]:
    test = functools.partial(sums_of_parts, dtype=BF16, check=True)
    yield Property(f"{DKV_SUMS}: sums, checked", DKV_SUMS, test)
    for family in (DKV, DKV_PAIRS):
        case = Case(129, 17, 15, batch=2, num_heads=12, num_kv_heads=2, dtype=F32)
        yield _property(
            Divided(f"{family}: parts of groups, checked", family, case, check=True,
                    kv_heads=(1, 4)), family,
        )  # fmt: skip
