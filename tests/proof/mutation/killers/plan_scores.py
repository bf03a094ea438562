"""What the plan must say of scores that are not plain, of masks and of sinks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from benchmarks.planner import DTYPES, MaskPlace

from ..harness import (
    BOOL,
    DELTA,
    DKV,
    DKV_PAIRS,
    DQ,
    DQ_FROM_DS,
    DSINKS,
    FORWARD,
    MASK_MAP,
    Sources,
    request,
)
from .plan import _layouts
from .properties import Property

_METAL = {"float16": "half", "bfloat16": "bfloat", "float32": "float", "bool": "uchar"}
_ROLES = {MASK_MAP: 0, DELTA: 1, DKV: 2, DKV_PAIRS: 2, FORWARD: 3, DQ: 3, DQ_FROM_DS: 3, DSINKS: 5}
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
        range(3), (0.0, 2.5, 0.25), (False, True), (False, True), (0.0, 0.5),
        (None, *((of_mask, pairs) for of_mask in (BOOL, 0, 1, 2) for pairs in (False, True))),
    )  # fmt: skip
    for dtype, softcap, alibi, sinks, dropout_p, mask in kinds:
        if mask and mask[0] not in (BOOL, 2, dtype):
            continue
        fields: dict = {"softcap": softcap, "has_alibi": alibi, "has_sinks": sinks}
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
        drop = "_dropout" * bool(dropout_p)
        hides = "Score<false, false, Mask<uchar, false>>" if mask else "PlainScore"
        visible = f"Variant<true, false, {hides}>"
        full = drop + parts, f"Variant<true, {str(bool(drop)).lower()}, {score}>"
        found = _names(sources, dtype=dtype, dropout_p=dropout_p, **fields)
        expected = {
            FORWARD: full, DKV: full, DQ: full, DQ_FROM_DS: ("_mask" * bool(mask), visible),
            DELTA: ("_mask" * bool(mask) + "_sinks" * sinks,
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
            call = f"{MASK_MAP}<{_METAL[element]}, 4>"
            assert kernel["name"] == f"{MASK_MAP}_{element}" and kernel["instantiation"] == (
                f'template [[host_name("{MASK_MAP}_{element}")]] [[kernel]] decltype({call}) '
                f"{call};\n"
            )
            assert kernel["tile"] == (
                f"blocks of 32 queries and keys of the mask; {heads} x {blocks} threadgroups of "
                "128 threads"
            )


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


def plan_of_value_widths(sources: Sources) -> None:
    """The wider of the two decides; both row lengths decide on chunks."""
    for d, dv, width in ((64, 40, 64), (40, 64, 64), (192, 128, 192), (24, 136, 160)):
        for backward in (False, True):
            layouts = _layouts(d=d, dv=dv)
            plan, params = sources.plan(request(layouts, 0, backward))
            assert (params.head_dim, params.v_head_dim) == (d, dv)
            assert all(f"_d{width}_" in kernel["name"] for kernel in plan["kernels"])
            assert all("_chunks" in kernel["name"] for kernel in plan["kernels"])
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
        plan_of_scores, plan_of_kernels_in_order, plan_of_maps, plan_of_pairs, plan_of_slopes,
        plan_of_value_widths, plan_of_tiles_beside_masks,
    ):  # fmt: skip
        name = test.__name__.removeprefix("plan_of_").replace("_", " ")
        yield Property(f"plan: {name}", None, test)
