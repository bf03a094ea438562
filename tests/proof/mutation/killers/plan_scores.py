"""What the plan must say of scores that are not plain, of masks and of sinks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from benchmarks.planner import DTYPES, MaskPlace

from ..harness import (
    BOOL,
    DELTA,
    DKV,
    DKV_PAIRS,
    DMASK,
    DMASK_FROM_DS,
    DMASK_ROWS,
    DMASK_SUM,
    DMASK_SUM_KEYS,
    DQ,
    DQ_FROM_DS,
    DSINKS,
    FORWARD,
    MASK_MAP,
    Params,
    Sources,
    request,
)
from .plan import _layouts
from .properties import Property

_METAL = {"float16": "half", "bfloat16": "bfloat", "float32": "float", "bool": "uchar"}
_ROLES = {
    MASK_MAP: 0, DELTA: 1, DKV: 2, DKV_PAIRS: 2, FORWARD: 4, DQ: 4, DQ_FROM_DS: 4, DMASK: 5,
    DMASK_FROM_DS: 5, DMASK_ROWS: 5, DMASK_SUM: 6, DMASK_SUM_KEYS: 6, DSINKS: 7,
}  # fmt: skip
_FULL = (1, 2, 4, 40, 70)  # (outer, inner, Hq, L, S) of _layouts


def _dense(sizes: tuple[int, ...]) -> tuple[int, ...]:
    strides, size = [], 1
    for n in reversed(sizes):
        strides.append(size)
        size *= n
    return tuple(reversed(strides))


def _mask(sizes: tuple[int, ...] = _FULL, strides: tuple[int, ...] | None = None, offset: int = 0,
          inner: int = 2, dtype: int = BOOL) -> MaskPlace:  # fmt: skip
    return MaskPlace(sizes, strides or _dense(sizes), offset, inner, dtype)


def _names(sources: Sources, **fields: object) -> dict[str, tuple[str, str]]:
    """By family: the name behind the loads, and the Variant with what follows it."""
    found = {}
    for backward, scratch in ((False, 0), (True, 0), (True, 1 << 30)):
        plan, _ = sources.plan(
            request(_layouts(), backward=backward, scratch_bytes=scratch, **fields)
        )
        assert not plan["refusal"], plan["refusal"]
        for kernel in plan["kernels"]:
            family = kernel["family"]
            assert kernel["role"] == _ROLES[family], family
            if family in (MASK_MAP, DSINKS):
                continue
            _, _, suffix = kernel["name"].rpartition("_chunks")
            text = kernel["instantiation"]
            found[family] = suffix, text[text.rindex("Variant<") : text.rindex(">;")]
    return found


def plan_of_scores(sources: Sources) -> None:
    """Names and types, for every kind of score; no two kinds have a name in common."""
    by_name: dict[tuple[str, str], str] = {}
    kinds = itertools.product(
        range(3), (0.0, 2.5, 0.25), (False, True), (False, True), (0.0, 0.5), (False, True),
        (None, *((of_mask, pairs) for of_mask in (BOOL, 0, 1, 2) for pairs in (False, True))),
    )  # fmt: skip
    for dtype, softcap, alibi, sinks, dropout_p, ranges, mask in kinds:
        if mask and mask[0] not in (BOOL, 2, dtype):
            continue
        fields: dict = {"softcap": softcap, "has_alibi": alibi, "has_sinks": sinks,
                        "has_key_ranges": ranges}  # fmt: skip
        of_mask, suffix = "NoMask", ""
        if mask:
            element, pairs = DTYPES[mask[0]], mask[1]
            fields["mask"] = _mask(offset=0 if pairs else 1, dtype=mask[0])
            of_mask = f"Mask<{_METAL[element]}, {str(pairs).lower()}>"
            suffix = f"_mask_{element}{'_pairs' * pairs}"
        cap, slope = (str(bool(x)).lower() for x in (softcap, alibi))
        plain = not (softcap or alibi or mask or sinks)
        score = "PlainScore" if plain else f"Score<{cap}, {slope}, {of_mask}>"
        parts = f"{'_softcap' * bool(softcap)}{'_alibi' * alibi}{suffix}"
        parts = parts or "_natural" * sinks
        drop, listed = "_dropout" * bool(dropout_p), "_ranges" * ranges
        last = str(ranges).lower()
        hides = "Score<false, false, Mask<uchar, false>>" if mask else "PlainScore"
        visible = f"Variant<true, false, {hides}, {last}>"
        type_of_all = f"Variant<true, {str(bool(drop)).lower()}, {score}, {last}>"
        full = drop + parts + listed, type_of_all
        found = _names(sources, dtype=dtype, dropout_p=dropout_p, **fields)
        expected = {
            FORWARD: full, DKV: full, DQ: full,
            DQ_FROM_DS: ("_mask" * bool(mask) + listed, visible),
            DELTA: ("_mask" * bool(mask) + listed + "_sinks" * sinks,
                    f"{visible}, {'Sinks' if sinks else 'NoSinks'}"),
        }  # fmt: skip
        assert found == expected, (found, expected)
        for family, (name, type_) in found.items():
            assert by_name.setdefault((family, name), type_) == type_, name


def plan_of_kernels_in_order(sources: Sources) -> None:
    """The map is first, the sums of sinks last."""
    for mask, sinks in itertools.product((None, _mask()), (False, True)):
        for backward, middle in ((False, [FORWARD]), (True, [DELTA, DKV, DQ])):
            plan, _ = sources.plan(request(_layouts(), 0, backward, mask=mask, has_sinks=sinks))
            expected = [MASK_MAP] * bool(mask) + middle + [DSINKS] * (sinks and backward)
            assert [kernel["family"] for kernel in plan["kernels"]] == expected
            assert [launch[0] for launch in plan["launches"]] == list(range(len(expected)))
            for launch, kernel in zip(plan["launches"], plan["kernels"]):
                assert launch[1:] == [*kernel["groups"], 0, 0, 70]
            if sinks and backward:
                last = plan["kernels"][-1]
                assert last["groups"] == [4, 1] and last["threads"] == 32
                assert last["name"] == DSINKS and last["instantiation"] == (
                    f'template [[host_name("{DSINKS}")]] [[kernel]] decltype({DSINKS}<1>) '
                    f"{DSINKS}<1>;\n"
                )
                assert last["tile"] == "a simdgroup for each of 4 query heads"
            assert bool(plan["map_elements"]) == bool(mask)


def plan_of_maps(sources: Sources) -> None:
    """A block for 32 queries and 32 keys of each of the mask's own heads; strides of 0 where it
    broadcasts, by a size of 1 or by a stride of 0."""
    sizes = {"b": 6, "h": 4, "l": 65, "s": 300}
    for own, expanded in (
        ((3, 2, 4, 65, 300), ()), ((1, 6, 4, 65, 300), (1,)), ((6, 1, 1, 1, 300), ()),
        ((1, 2, 1, 65, 300), ()), ((3, 1, 4, 65, 1), ()), ((1, 1, 1, 65, 300), (2,)),
        ((1, 1, 1, 1, 1), ()), ((1, 6, 4, 65, 300), (3, 4)), ((6, 1, 4, 32, 1), ()),
        ((6, 1, 1, 1, 300), (0,)),
    ):  # fmt: skip
        q_len = 32 if own[3] == 32 else 65
        strides = tuple(0 if d in expanded else s for d, s in enumerate(_dense(own)))
        for dtype in (BOOL, 0, 2):
            place = _mask(own, strides, inner=own[1], dtype=dtype)
            plan, params = sources.plan(
                request(_layouts(**{**sizes, "l": q_len}), 0, False, mask=place)
            )
            ends = [*own[:3], -(-own[3] // 32), -(-own[4] // 32)]
            ends = [1 if d in expanded else n for d, n in enumerate(ends)]
            of_map = [0 if n == 1 else s for n, s in zip(ends, _dense(tuple(ends)))]
            numbers = [list(getattr(params, name)) for name in ("mask", "dmask", "mask_map")]
            assert numbers[0] == [*(s if n > 1 else 0 for n, s in zip(own, strides)), own[1]]
            assert numbers[1] == [*(s if n > 1 else 0 for n, s in zip(own, _dense(own))), own[1]]
            assert numbers[2] == [*of_map, own[1]]
            heads, blocks = ends[0] * ends[1] * ends[2], ends[3] * -(-ends[4] // 4)
            assert plan["map_elements"] == heads * ends[3] * ends[4]
            kernel, element = plan["kernels"][0], DTYPES[dtype]
            assert kernel["groups"] == [heads, blocks] and kernel["threads"] == 128
            call = f"{MASK_MAP}<{_METAL[element]}, 4, false>"
            assert kernel["name"] == f"{MASK_MAP}_{element}" and kernel["instantiation"] == (
                f'template [[host_name("{MASK_MAP}_{element}")]] [[kernel]] decltype({call}) '
                f"{call};\n"
            )
            assert kernel["tile"] == (
                f"blocks of 32 queries and keys of the mask; {heads} x {blocks} threadgroups of "
                "128 threads"
            )


def plan_of_maps_with_ranges(sources: Sources) -> None:
    """Where rows of the mask differ, the map is one of its key ranges too, of both's own heads."""
    sizes = {"b": 6, "h": 4, "l": 65, "s": 300}
    for own, inner, ranges, ends in (  # of the mask, of ranges (B, Hq), of the map
        ((1, 1, 1, 65, 300), 1, (0, 0), (1, 1, 1, 3, 10)),
        ((1, 1, 1, 65, 300), 1, (9, 0), (6, 1, 1, 3, 10)),
        ((1, 1, 1, 65, 1), 1, (0, 9), (1, 1, 4, 3, 10)),
        ((3, 1, 1, 65, 300), 2, (0, 9), (3, 1, 4, 3, 10)),
        ((3, 1, 1, 65, 300), 2, (9, 0), (3, 2, 1, 3, 10)),
        ((1, 2, 4, 65, 1), 2, (9, 9), (3, 2, 4, 3, 10)),
        ((6, 1, 4, 1, 300), 1, (9, 9), None), ((1, 2, 1, 1, 1), 2, (9, 9), None),
    ):  # fmt: skip
        for strides in (_dense(own), tuple(0 if d == 3 else n for d, n in enumerate(_dense(own)))):
            fields = {"has_key_ranges": True, "ranges_batch": ranges[0], "ranges_head": ranges[1]}
            plan, params = sources.plan(
                request(_layouts(**sizes), 0, mask=_mask(own, strides, inner=inner), **fields)
            )
            kernel = plan["kernels"][0]
            listed = ends is not None and strides[3] != 0
            assert kernel["name"] == f"{MASK_MAP}_bool{'_ranges' * listed}"
            call = f"{MASK_MAP}<uchar, 4, {str(listed).lower()}>"
            assert f"decltype({call}) {call};" in kernel["instantiation"]
            if listed:
                assert ends is not None
                heads, blocks = ends[0] * ends[1] * ends[2], ends[3] * -(-ends[4] // 4)
                assert kernel["groups"] == [heads, blocks]
                assert plan["map_elements"] == heads * ends[3] * ends[4]
                of_map = [0 if n == 1 else s for n, s in zip(ends, _dense(ends))]
                assert list(params.mask_map) == [*of_map, inner]
            else:
                whole = [-(-n // 32) if d > 2 else n for d, n in enumerate(own)]
                whole[3] = 1
                assert plan["map_elements"] == math.prod(whole)


def plan_of_pairs(sources: Sources) -> None:
    """Elements load in pairs where those of an even key and the next one are aligned to both."""
    full = (1, 2, 4, 40, 70)
    dense = _dense(full)

    def pairs(sizes: tuple[int, ...] = full, strides: tuple[int, ...] = dense, offset: int = 0,
              s: int = 70) -> bool:  # fmt: skip
        plan, _ = sources.plan(
            request(_layouts(s=s), 0, mask=_mask(sizes, strides, offset, inner=2))
        )
        return plan["kernels"][1]["name"].endswith("_pairs")

    assert pairs() and pairs(offset=2) and not pairs(offset=1)
    odd = (1, 2, 4, 40, 71)
    assert not pairs(odd, (*tuple(2 * n for n in dense[:4]), 1), s=71)
    assert not pairs(strides=(*dense[:4], 2)) and not pairs(strides=(*dense[:4], 0))
    for d in range(1, 4):
        other = tuple(n + (i == d) for i, n in enumerate(dense))
        assert not pairs(strides=other), d
        one = tuple(1 if i == d else n for i, n in enumerate(full))
        assert pairs(one, other), d  # what is not walked does not matter
    assert pairs((1, 2, 4, 40, 2), _dense((1, 2, 4, 40, 2)), s=2)
    two = tuple(2 if d == 0 else n for d, n in enumerate(full))
    assert not pairs(two, tuple(n + (d == 0) for d, n in enumerate(dense)))
    assert not pairs((1, 2, 4, 40, 1), (320, 160, 40, 2, 1))


def plan_of_slopes(sources: Sources) -> None:
    for batch, head in ((0, 1), (7, 3), (1 << 33, 1 << 34)):
        _, params = sources.plan(
            request(_layouts(), 0, has_alibi=1, alibi_batch=batch, alibi_head=head)
        )
        assert (params.alibi_batch, params.alibi_head) == (batch, head)
    for sinks in (0, 1):
        _, params = sources.plan(request(_layouts(), 0, has_sinks=sinks, softcap=0.3))
        assert params.has_sinks == sinks and abs(params.softcap - 0.3) < 1e-7


def plan_of_mask_gradients(sources: Sources) -> None:
    """Which kernels form it, who shares a tile of it, and what they leave for those that add up."""
    names = {0: "half", 1: "bfloat", 2: "float"}

    def plan_of(own: tuple[int, ...], dtype: int = 2, grad: bool = True, b: int = 6,
                layouts: dict | None = None, **fields: object) -> tuple[dict, Params]:  # fmt: skip
        sizes = {"b": b, "h": 4, "l": 300, "s": 150} | (layouts or {})
        place = _mask(own, inner=own[1], dtype=dtype)
        dtype = 2 if dtype == BOOL else dtype
        plan, params = sources.plan(
            request(_layouts(**sizes), dtype, True, mask=place, mask_grad=grad, **fields)
        )
        assert not plan["refusal"], plan["refusal"]
        for kernel in plan["kernels"]:
            assert kernel["role"] == _ROLES[kernel["family"]], kernel["family"]
        kernels = [kernel for kernel in plan["kernels"] if kernel["role"] in (5, 6)]
        for kernel in kernels:
            element, family = names[dtype], kernel["family"]
            listed = bool(fields.get("has_key_ranges"))
            if family == DMASK:
                element = "float" if params.dmask_parts > 1 else element
                last = f"{str(listed).lower()}>, {element}>"
                call = f"PlainScore, {last}"
                assert "Mask<" in kernel["instantiation"] or call in kernel["instantiation"]
                assert kernel["instantiation"].endswith(f", {last};\n")
                assert kernel["name"].endswith("_parts") == (params.dmask_parts > 1)
                continue
            x, y = kernel["groups"]
            if family == DMASK_FROM_DS:
                of_parts = params.dmask_parts > 1
                element = "float" if of_parts else element
                assert kernel["name"] == (
                    f"{family}_{DTYPES[dtype]}{'_parts' * of_parts}{'_ranges' * listed}"
                )
                call = f"{family}<{element}, 4, {str(listed).lower()}>"
                assert f"decltype({call}) {call};" in kernel["instantiation"]
                assert kernel["tile"] == (
                    f"blocks of 32 queries and keys of the mask; {x} x {y} threadgroups of 128 "
                    "threads"
                )
                continue
            assert kernel["tile"] == f"{x} x {y} threadgroups of 128 threads"
            assert kernel["name"] == f"{family}_{DTYPES[dtype]}"
            assert f"decltype({family}<{element}, 4>)" in kernel["instantiation"]
        found = [(kernel["family"], kernel["groups"]) for kernel in kernels]
        return {"kernels": found, "elements": plan["dmask_part_elements"]}, params

    for own in ((6, 1, 4, 300, 150), (1, 1, 1, 1, 150), (1, 1, 1, 300, 1)):
        for dtype, grad in ((BOOL, True), (2, False)):
            plan, params = plan_of(own, dtype, grad)
            assert plan == {"kernels": [], "elements": 0} and not params.has_key_sums
    cases = (  # the mask's sizes; kernels and grids; elements of parts; parts
        ((6, 1, 4, 300, 150), [(DMASK, [24, 10 * 5])], 0, 1),
        ((1, 6, 1, 300, 150), [(DMASK, [6 * 2, 10 * 5]), (DMASK_SUM, [2110, 1])], 540000, 2),
        ((1, 1, 4, 300, 150), [(DMASK, [4 * 3, 10 * 5]), (DMASK_SUM, [1407, 1])], 540000, 3),
        ((3, 1, 1, 1, 150), [(DMASK_SUM_KEYS, [3, 2])], 6 * 4 * 150, 1),
        ((1, 2, 4, 300, 1), [(DMASK_ROWS, [8, 3])], 0, 1),
        ((1, 2, 4, 1, 1), [(DMASK_ROWS, [8, 1])], 0, 1),
    )
    for own, kernels, elements, parts in cases:
        for dtype in (0, 1, 2):
            plan, params = plan_of(own, dtype)
            assert plan == {"kernels": kernels, "elements": elements}, (own, plan)
            size = own[0] * own[1] * own[2] * own[3] * own[4]
            assert (params.dmask_elements, params.dmask_parts) == (size, parts)
            assert params.has_key_sums == (own[3:] == (1, 150))
    of_all = 4 * (24 * 304 * 152)  # bytes of dS
    stored: tuple[tuple, ...] = (
        ((6, 1, 4, 300, 150), [(DMASK_FROM_DS, [24, 10 * 5])], 1),
        ((1, 6, 1, 300, 150), [(DMASK_FROM_DS, [6 * 2, 10 * 5]), (DMASK_SUM, [2110, 1])], 2),
    )
    for own, kernels, parts in stored:
        for dtype, ranges in itertools.product((0, 1, 2), (False, True)):
            fields = {"layouts": {"d": 64}, "has_key_ranges": ranges, "scratch_bytes": of_all}
            plan, params = plan_of(own, dtype, **fields)
            assert plan["kernels"] == kernels and params.dmask_parts == parts
            assert bool(plan["elements"]) == (parts > 1)
    for change in (
        {"scratch_bytes": of_all - 4}, {"softcap": 1.0}, {"layouts": {"d": 32}},
        {"has_key_ranges": True, "key_span": 1},  # dS of a span of keys
    ):  # fmt: skip
        fields = {"layouts": {"d": 64}, "scratch_bytes": of_all} | change
        assert plan_of((6, 1, 4, 300, 150), **fields)[0]["kernels"][0][0] == DMASK
    one_head = {"b": 1, "h": 1, "hk": 1, "l": 64, "s": 6400, "d": 64}
    for keys, family in ((6400, DMASK_FROM_DS), (4096, DMASK)):  # divided
        scratch = 4 * (64 * 64 * (keys < 6400) + 64 * keys)
        plan, _ = plan_of((1, 1, 1, 64, 6400), b=1, layouts=one_head, scratch_bytes=scratch)
        assert plan["kernels"][0][0] == family
    for d, softcap, sums in ((64, 1.5, True), (128, 0.0, True), (128, 1.5, False)):
        plan, params = plan_of((1, 1, 1, 1, 150), layouts={"d": d}, softcap=softcap)
        assert params.has_key_sums == sums
        assert [family for family, _ in plan["kernels"]] == (
            [DMASK_SUM_KEYS] if sums else [DMASK, DMASK_SUM]
        )
        less = plan_of((1, 1, 1, 1, 150), layouts={"d": d}, softcap=softcap / 6)[1]
        assert less.has_key_sums == sums
    for own, grids in (((1, 1, 1, 1, 2), [1, 1]), ((1, 1, 1, 1, 1), [1, 1])):
        kernels = plan_of(own, layouts={"s": own[4]})[0]["kernels"]
        assert kernels == [(DMASK_SUM_KEYS if own[4] > 1 else DMASK_ROWS, grids)]
    apart = _mask((3, 1, 1, 1, 150), (1200, 1200, 1200, 600, 2), inner=1, dtype=2)
    asked = request(_layouts(b=6, h=4, l=300, s=150), 2, True, mask=apart, mask_grad=True)
    plan = sources.plan(asked)[0]
    assert plan["kernels"][-1]["groups"] == [3, 2] and plan["dmask_part_elements"] == 3600
    # A threadgroup for each term, but no more than fill a GPU; rows of their own are no terms.
    for b, l, s, parts in ((600, 32, 32, 512), (1, 1100, 32, 1)):
        few = {"h": 1, "hk": 1, "l": l, "s": s}
        assert plan_of((1, 1, 1, l, s), b=b, layouts=few)[1].dmask_parts == parts
    without, _ = sources.plan(request(_layouts(), 2, True, mask_grad=True, mask_dtype=2))
    assert [kernel["family"] for kernel in without["kernels"]] == [DELTA, DKV, DQ]
    for sizes in ({"s": 0}, {"l": 0}):
        assert not plan_of((6, 1, 4, sizes.get("l", 300), sizes.get("s", 150)),
                           layouts=sizes)[0]["kernels"]  # fmt: skip
    assert plan_of((6, 1, 4, 300, 150), layouts={"hk": 0})[0]["kernels"][0][0] == DMASK
    for l, parts in ((1024, 24), (1025, 48)):
        capped = {"layouts": {"d": 128, "l": l}, "softcap": 1.5}
        assert plan_of((1, 1, 1, 1, 150), **capped)[1].dmask_parts == parts
    nothing = plan_of((1, 1, 4, 300, 150), b=0)[0]
    assert nothing == {"kernels": [], "elements": 0}


_MASK_GRADIENT_TILES = {  # by operand size, up to a padded head dim
    2: {128: "r1_k32", 256: "r1_k16"}, 4: {64: "r1_k32", 128: "r1_k16", 256: "r1_k8"},
}  # fmt: skip


def plan_of_tiles_of_mask_gradients(sources: Sources) -> None:
    widths = (16, 32, 33, 64, 65, 80, 81, 96, 97, 128, 129, 256)
    for dtype, d in itertools.product(range(3), widths):
        tiles = _MASK_GRADIENT_TILES[2 if dtype == 0 else 4]
        tile = next(name for limit, name in tiles.items() if d <= limit)
        plan, _ = sources.plan(
            request(_layouts(d=d), dtype, True, mask=_mask(dtype=2), mask_grad=True)
        )
        kernel = next(kernel for kernel in plan["kernels"] if kernel["family"] == DMASK)
        rows, keys = (int(number) for number in tile[1:].split("_k"))
        assert kernel["tile_name"] == tile and f"_{tile}_" in kernel["name"]
        assert f", {rows}, {keys}, 4, Variant<" in kernel["instantiation"]
        types = ("half, half", "bfloat, float", "float, float")[dtype]
        assert f"decltype({DMASK}<{types}, " in kernel["instantiation"]
        assert kernel["groups"] == [8, 2 * -(-70 // keys)]


def plan_of_large_masks(sources: Sources) -> None:
    """2^44 elements for each head: neither they nor their blocks can be counted by int."""
    size, blocks = 1 << 22, 1 << 17
    layouts = _layouts(b=1, h=2, hk=2, l=size, s=size)
    mask = _mask((1, 1, 2, size, size), inner=1, dtype=2)
    for scratch, family in ((0, DMASK), (1 << 60, DMASK_FROM_DS)):
        plan, params = sources.plan(
            request(layouts, 2, True, mask=mask, mask_grad=True, scratch_bytes=scratch)
        )
        of_map, of_mask = plan["kernels"][0], plan["kernels"][-1]
        assert of_map["family"] == MASK_MAP and of_map["groups"] == [2, blocks * blocks // 4]
        assert plan["map_elements"] == 2 * blocks * blocks
        assert of_mask["family"] == family and of_mask["groups"] == [2, blocks * blocks]
        assert (params.dmask_elements, params.dmask_parts) == (2 * size * size, 1)
        assert list(params.mask_map) == [0, 0, blocks * blocks, blocks, 1, 1]
        assert list(params.mask) == list(params.dmask) == [0, 0, size * size, size, 1, 1]
    # 2^38 parts of rows for the 10 tiles of a mask.
    layouts = _layouts(b=1 << 20, h=1, hk=1, l=1 << 28, s=150, d=128)
    mask = _mask((1, 1, 1, 1, 150), inner=1, dtype=2)
    asked = request(layouts, 2, True, mask=mask, mask_grad=True, softcap=1.5)
    assert sources.plan(asked)[1].dmask_parts == -(-512 // 10)


def plan_of_ranges_beside_divided_keys(sources: Sources) -> None:
    """Keys are not divided where ranges leave a row few of them."""
    row, sums = 4 * 2 * 6 * 8, 4 * 2 * 41 * 64
    layouts = _layouts(b=1, h=4, hk=2, l=41, s=9000)
    for ranges in (False, True):
        asked = request(layouts, 0, True, has_key_ranges=ranges, stores_ds=True,
                        scratch_bytes=8000 * row + sums)  # fmt: skip
        plan, params = sources.plan(asked)
        assert bool(plan["scratch_bytes"]) == (not ranges) == bool(params.dq_sums)
        families = [kernel["family"] for kernel in plan["kernels"]]
        assert families == [DELTA, DKV, DQ if ranges else DQ_FROM_DS]
        assert (plan["launches"][1][4:] == [0, 9000]) == ranges


def plan_of_key_ranges(sources: Sources) -> None:
    """Hulls of 8 queries each; the window goes to the ranges, whose map of a mask has none."""
    for batch, head, count in ((0, 0, 1), (480, 0, 2), (0, 160, 4), (640, 160, 8)):
        for mask in (None, _mask()):
            ranges = {"has_key_ranges": True, "ranges_batch": batch, "ranges_head": head}
            plan, params = sources.plan(
                request(_layouts(l=41 if mask is None else 40), 0, True, mask=mask, window_left=7,
                        window_right=1 << 40, **ranges)
            )  # fmt: skip
            assert plan["hull_elements"] == count * (6 if mask is None else 5) * 6
            of_params = params.ranges
            assert (of_params.batch, of_params.head) == (batch, head)
            assert (of_params.left, of_params.right) == (7, 1 << 30)
            assert (params.window_left, params.window_right) == (1 << 30, 1 << 30)
    far = {"has_key_ranges": True, "ranges_batch": 1 << 33, "ranges_head": 1 << 34}
    _, params = sources.plan(request(_layouts(), 0, **far))
    assert (params.ranges.batch, params.ranges.head) == (1 << 33, 1 << 34)
    one_key = _mask((1, 2, 4, 40, 1))
    for ranges in (False, True):
        plan, params = sources.plan(
            request(_layouts(), 0, mask=one_key, window_left=7, has_key_ranges=ranges)
        )
        assert plan["map_elements"] == 8 * 2 * 3
        assert params.window_left == (1 << 30 if ranges else 7) and not plan["hull_elements"]


def plan_of_maps_with_windows(sources: Sources) -> None:
    """Rows of a mask that all keys share: a window tells the keys apart, in blocks of their own."""
    for own, rows in (((1, 2, 4, 40, 1), 2), ((1, 2, 1, 40, 1), 2), ((1, 2, 4, 2, 1), 1),
                      ((1, 2, 4, 1, 1), None)):  # fmt: skip
        for window in ({}, {"window_left": 0}, {"window_right": 0}, {"window_right": 5}):
            asked = request(_layouts(l=2 if own[3] == 2 else 40), 0, mask=_mask(own), **window)
            heads = own[0] * own[1] * own[2]
            cols = 3 if window and rows else 1
            assert sources.plan(asked)[0]["map_elements"] == heads * (rows or 1) * cols
    ranges = {"has_key_ranges": True, "window_left": 7, "window_right": 9}
    plan, params = sources.plan(request(_layouts(l=2), 0, mask=_mask((1, 1, 1, 2, 70)), **ranges))
    assert plan["kernels"][0]["name"].endswith("_ranges") and plan["map_elements"] == 3
    assert (params.window_left, params.window_right) == (1 << 30, 1 << 30)
    assert (params.ranges.left, params.ranges.right) == (7, 9)
    assert params.ds_keys == params.ds_partial == 0
    empty = _mask((1, 0, 4, 40, 70), inner=0)
    plan, _ = sources.plan(request(_layouts(b=0), 0, mask=empty, ranges_batch=9, **ranges))
    assert not plan["map_elements"]


def plan_of_key_spans(sources: Sources) -> None:
    """dS of a span of keys, where it is known and shorter than all, and the kernel for the rest."""
    row = 4 * 2 * 8 * 6  # bytes of one key's dS: two query heads, 41 queries
    for kv_len, span, keys in (
        (990, 0, 992), (990, -1, 992), (990, 1, 64), (990, 57, 64), (990, 58, 128), (990, 121, 128),
        (990, 890, 960), (990, 953, 960), (990, 954, 992), (990, 991, 992), (990, 1 << 62, 992),
        (990, (1 << 32) + 1, 992),
        (64, 1, 64), (72, 1, 64), (65, 1, 64),
    ):  # fmt: skip
        partial = keys < kv_len
        for fits in (0, 1, 2, 3, 1 << 20):
            asked = request(
                _layouts(b=1, h=4, hk=2, l=41, s=kv_len, d=64), 0, True, key_span=span,
                has_key_ranges=True, scratch_bytes=fits * keys * row + row - 1,
            )  # fmt: skip
            plan, params = sources.plan(asked)
            at_once = min(fits, 2)
            assert plan["scratch_bytes"] == at_once * keys * row
            expected = [0] if not fits else [keys, partial]
            assert [params.ds_keys, params.ds_partial][: len(expected)] == expected
            families = [kernel["family"] for kernel in plan["kernels"]]
            of_query = [DQ_FROM_DS, *[DQ] * partial] if fits else [DQ]
            assert families == [DELTA, DKV, *of_query]
            turns = [] if not fits else [[1, 2]] * (2 // at_once)
            kernels = sum(turns, [0]) + [3] * partial if fits else [0, 1, 2]
            assert [launch[0] for launch in plan["launches"]] == kernels
            last = plan["launches"][-1]
            if fits and partial:
                assert last[1:] == [*plan["kernels"][3]["groups"], 0, 0, kv_len]
                assert plan["kernels"][3]["role"] == _ROLES[DQ] and last[1] == 4
    # The kernel for the rest is the one that there is without dS.
    of_all = _layouts(b=1, h=4, hk=2, l=100, s=990, d=64)
    spans = {"has_key_ranges": True, "key_span": 1}
    both, alone = (
        sources.plan(request(of_all, 1, True, scratch_bytes=n, **spans))[0]["kernels"]
        for n in (1 << 30, 0)
    )
    assert len(both) == 4 and both[3] == alone[2]
    layouts = _layouts(b=1, h=4, hk=2, l=41, s=990, d=64)
    without = request(layouts, 0, True, key_span=1, scratch_bytes=1 << 30)
    plan, params = sources.plan(without)
    assert plan["scratch_bytes"] == 2 * 992 * row
    assert (params.ds_keys, params.ds_partial) == (992, 0)


def plan_of_value_widths(sources: Sources) -> None:
    """The wider of the two decides; both row lengths decide on chunks."""
    for d, dv, width in ((64, 40, 64), (40, 64, 64), (192, 128, 192), (24, 136, 160)):
        for backward in (False, True):
            layouts = _layouts(d=d, dv=dv)
            plan, params = sources.plan(request(layouts, 0, backward))
            assert (params.head_dim, params.v_head_dim) == (d, dv)
            assert all(f"_d{width}_" in kernel["name"] for kernel in plan["kernels"])
            assert all("_chunks" in kernel["name"] for kernel in plan["kernels"])
            for kernel in plan["kernels"]:
                own = (d, dv) == (192, 128) and kernel["family"] != DQ_FROM_DS
                assert ("_v128" in kernel["name"]) == own
                assert (", false, 128>" in kernel["instantiation"]) == own
    for d, dv, own in (
        (192, 1, True), (161, 128, True), (192, 129, False), (160, 128, False), (193, 128, False),
        (128, 192, False),
    ):  # fmt: skip
        for scratch, families in ((0, 4), (1 << 40, 3)):
            names = []
            for backward in (False, True):
                asked = request(_layouts(d=d, dv=dv), 2, backward, scratch_bytes=scratch)
                names += [kernel["name"] for kernel in sources.plan(asked)[0]["kernels"]]
            assert sum(name.endswith("_v128") for name in names) == own * families, names
    plan, _ = sources.plan(request(_layouts(d=192, dv=128), 0, has_key_ranges=True))
    assert plan["kernels"][0]["name"].endswith("_ranges_v128")
    for d, dv in ((64, 41), (41, 64)):
        plan, _ = sources.plan(request(_layouts(d=d, dv=dv), 0))
        assert "_elements" in plan["kernels"][0]["name"]


def plan_of_tiles_beside_masks(sources: Sources) -> None:
    """Operands read directly cannot be read as zero where no row sees a key."""
    for mask in (None, _mask()):
        plan, _ = sources.plan(request(_layouts(), 0, mask=mask))
        names = plan["kernels"][-1]["alternatives"]
        assert any("_b0" in name for name in names) == (mask is None) and len(names) in (24, 36)


def properties() -> Iterator[Property]:
    for test in (
        plan_of_scores, plan_of_kernels_in_order, plan_of_maps, plan_of_maps_with_ranges,
        plan_of_maps_with_windows, plan_of_pairs, plan_of_slopes, plan_of_mask_gradients,
        plan_of_tiles_of_mask_gradients, plan_of_large_masks, plan_of_ranges_beside_divided_keys,
        plan_of_key_ranges, plan_of_key_spans, plan_of_value_widths, plan_of_tiles_beside_masks,
    ):  # fmt: skip
        name = test.__name__.removeprefix("plan_of_").replace("_", " ")
        yield Property(f"plan: {name}", None, test)
