"""What the plan must say."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.planner import BUFFERS
from orchard_ops import dropout

from ..harness import (
    BOOL,
    DELTA,
    DKV,
    DKV_PAIRS,
    DQ,
    DQ_FROM_DS,
    DTYPE_NUMBERS,
    FORWARD,
    Sources,
    request,
)
from .attention import BF16, F16, F32, KEYS_SIDE, dense, keys_of_group
from .compiled import template_arguments
from .properties import Property

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


def _layouts(b: int = 2, h: int = 4, hk: int = 2, l: int = 40, s: int = 70, d: int = 64,
                   dv: int | None = None) -> dict[str, tuple]:  # fmt: skip
    dv = d if dv is None else dv
    shapes = {"q": (b, h, l, d), "k": (b, hk, s, d), "v": (b, hk, s, dv), "out": (b, h, l, dv),
              "dout": (b, h, l, dv)}  # fmt: skip
    return {name: (shape, dense(shape), 0) for name, shape in shapes.items()}


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
    switches = (str(word in flags).lower() for word in ("chunks", "dropout"))
    arguments += ["4", f"Variant<{', '.join(switches)}, PlainScore, false>"]
    arguments += ["NoSinks"] * (family == DELTA)
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
        layouts = _layouts(d=d)
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
                kernel.pop("role")
            # All of dS: 2 groups of 2 heads in each batch, 5 x 9 tiles of 8 x 8.
            stored = 4 * 2 * 5 * 9 * 256 if kernels is storing and width >= 64 else 0
            assert plan == {
                "refusal": "", "detail": "", "advice": "" if chunks else _ADVICE,
                "kernels": kernels,
                "scratch_bytes": stored,
                "map_elements": 0, "hull_elements": 0, "dmask_part_elements": 0,
                "dkv_part_elements": 0,
                "forward_part_elements": 0,
                "launches": [
                    [n, *kernel["groups"], 0, 0, 70] for n, kernel in enumerate(kernels)
                ],
            }, (plan, kernels)  # fmt: skip


def plan_of_buffers(sources: Sources) -> None:
    """Several tensors are bound to each kernel."""
    apart = [sources.buffers[name] for name in BUFFERS if name != "forward_parts"]
    assert len(set(apart)) == len(apart)
    assert sources.buffers["forward_parts"] == sources.buffers["ds"]  # which no forward has


def plan_of_scratch(sources: Sources) -> None:
    """Whole groups of query heads, in turns as even as can be; none where not one fits."""
    layouts = _layouts(b=3, h=10, hk=5, l=41, s=70)  # a group takes 2 * 6 * 9 tiles
    group = 2 * 6 * 9 * 64 * 4
    for scratch, at_once in (
        (0, 0), (group - 1, 0), (group, 1), (2 * group - 1, 1), (7 * group, 5), (15 * group, 15),
        (99 * group, 15),
    ):  # fmt: skip
        plan, _ = sources.plan(request(layouts, 0, True, scratch_bytes=scratch, stores_ds=True))
        assert plan["scratch_bytes"] == at_once * group
        step = at_once or 15
        delta, dkv, dq = (kernel["groups"] for kernel in plan["kernels"])
        expected = [[0, *delta, 0, 0, 70]]
        for first in range(0, 15, step):
            heads = min(step, 15 - first)
            expected += [[1, heads, dkv[1], 2 * first, 0, 70],
                         [2, 2 * heads, dq[1], 2 * first, 0, 70]]  # fmt: skip
        assert plan["launches"] == expected
        last = plan["kernels"][-1]["family"]
        assert last == (DQ_FROM_DS if at_once else DQ)
    for keys in (70, 1):
        layouts = _layouts(b=1, h=6, hk=1, s=keys)
        plan, _ = sources.plan(request(layouts, 0, True, scratch_bytes=1 << 20))
        assert [launch[1] for launch in plan["launches"]] == [6, 1, 6]
    for sizes in ({"l": 0}, {"s": 0}, {"d": 63}, {"b": 0}):
        layouts = _layouts(**{"d": 64, **sizes})
        plan, _ = sources.plan(request(layouts, 0, True, scratch_bytes=1 << 20))
        stored = sizes == {"d": 63}
        assert (plan["scratch_bytes"] > 0) == stored
        assert plan["kernels"][-1]["family"] == (DQ_FROM_DS if stored else DQ)
    plan, _ = sources.plan(request(_layouts(d=48), 0, True, scratch_bytes=1 << 30))
    assert plan["scratch_bytes"] == 0


def plan_of_large_sums(sources: Sources) -> None:
    """dq's sums behind dS have more than 2^32 elements; dS has 2^32 rows."""
    layouts = _layouts(b=1, h=16, hk=1, l=1 << 28, s=64)
    plan, _ = sources.plan(request(layouts, 0, True, scratch_bytes=1 << 60))
    assert plan["scratch_bytes"] == 4 * 16 * (1 << 28) * 64
    q_len, keys = 1 << 25, 8192
    layouts = _layouts(b=1, h=1, hk=1, l=q_len, s=1 << 20, d=128)
    tiles, sums = q_len * keys, q_len * 128
    plan, params = sources.plan(request(layouts, 0, True, scratch_bytes=4 * (tiles + sums)))
    assert plan["scratch_bytes"] == 4 * (tiles + sums) and params.dq_sums == tiles
    assert [launch[4:] for launch in plan["launches"][1:5]] == [
        [0, keys], [0, keys], [keys, 2 * keys], [keys, 2 * keys],
    ]  # fmt: skip


def plan_of_other_tiles(sources: Sources) -> None:
    """A forward's tile can be asked for by name, from the list that the plan gives."""
    for dtype, d in itertools.product(_TYPES, _WIDTHS):
        plan, _ = sources.plan(request(_layouts(d=d), DTYPE_NUMBERS[dtype]))
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
        layouts = _layouts(d=d, l=100)
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
        layouts = _layouts(3, 6, 2, l, s)
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
        for name, (sizes, _, _) in _layouts(2, 6, 3, 41, 73, 24, 20).items()
    }
    for backward in (False, True):
        _, params = sources.plan(request(
            layouts, 2, backward, dropout_p=0.3, scale=0.37, window_left=5, window_right=9,
            diagonal=-13,
        ))  # fmt: skip
        for name, expected in strides.items():
            if backward or name != "dout":
                assert tuple(getattr(params, name)) == expected, name
        got = [getattr(params, n) for n in ("batch", "num_heads", "num_kv_heads", "q_len", "kv_len",
               "head_dim", "v_head_dim", "diagonal", "window_left", "window_right", "has_sinks",
               "softcap")]  # fmt: skip
        assert got == [2, 6, 3, 41, 73, 24, 20, -13, 5, 9, 0, 0.0]
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
            _, params = sources.plan(request(_layouts(), 0, **{side: given}))
            other = {"window_left": "window_right", "window_right": "window_left"}[side]
            assert getattr(params, side) == expected and getattr(params, other) == open_


def plan_of_dropout(sources: Sources) -> None:
    for p, expected in (
        (0.0, 0), (2.0**-17, 0), (2.0**-16, 1), (1.5 * 2.0**-16, 2), (2.5 * 2.0**-16, 2),
        (0.5, 32768), (1 - 2.0**-16, 65535), (1 - 2.0**-20, 65535),
    ):  # fmt: skip
        plan, params = sources.plan(request(_layouts(), 0, dropout_p=p))
        assert params.dropout_threshold == expected == dropout.threshold(p)
        assert plan["kernels"][0]["name"].endswith("_dropout") == (expected > 0)
        assert params.dropout_rescale == torch.tensor(dropout.rescale(p), dtype=F32).item()


def plan_of_layouts(sources: Sources) -> None:
    """Chunks only where each row of each tensor starts at 16 bytes."""
    base = _layouts()
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
_FAR = 2**32 + 5  # 5 in 32 bits
_TOO_WIDE = "head_dim is above 256"
_TOO_LONG = "a length or the diagonal is above 2^28"
_MASK_DTYPE = "attn_mask is of another dtype than bool, float32 and query's"
_PER_HEAD_DTYPE = "alibi_slopes or sinks are not float32"
_CAP_FACTOR = "the scale divided by the softcap is no normal float32 number"
_REFUSALS: list[tuple[dict, dict, int, str, str]] = [
    *(({}, {}, dtype, "the dtype is not float16, bfloat16 or float32", "") for dtype in (BOOL, 4)),
    ({"d": 257}, {}, 0, _TOO_WIDE, "got 257"),
    ({"d": 2**32 + 64}, {}, 0, _TOO_WIDE, "got 4294967360"),
    ({"dv": 257}, {}, 0, _TOO_WIDE, "got 257"),
    ({"d": 300, "dv": 257}, {}, 0, _TOO_WIDE, "got 300"),
    *(({}, {"has_mask": 1, "mask_dtype": of_mask}, dtype, _MASK_DTYPE, "")
      for dtype, of_mask in ((0, 1), (0, 4), (1, 0), (2, 0), (2, 1), (2, 4))),
    *(({}, {name: 1, "per_head_float32": 0}, 0, _PER_HEAD_DTYPE, "")
      for name in ("has_alibi", "has_sinks")),
    *(({}, {"scale": scale, "softcap": softcap}, 0, _CAP_FACTOR, f"got {words}")
      for scale, softcap, words in (
          (1e10, 1e-30, "1e+10 and 1e-30"), (10.0, 8e-38, "10 and 8e-38"),
          (1e-20, 1e30, "1e-20 and 1e+30"), (-1.19e38, 1.0, "-1.19e+38 and 1"),
          (1.19e38, 1e30, "1.19e+38 and 1e+30"), (3e-39, 1e-3, "3e-39 and 0.001"))),
    ({"l": _LONG + 1}, {}, 0, _TOO_LONG, f"got {_LONG + 1}"),
    ({"l": _FAR}, {}, 0, _TOO_LONG, f"got {_FAR}"),
    ({"s": _FAR}, {}, 0, _TOO_LONG, f"got {_FAR}"),
    ({}, {"diagonal": -_FAR}, 0, _TOO_LONG, f"got {_FAR}"),
    ({"s": _LONG + 1}, {}, 0, _TOO_LONG, f"got {_LONG + 1}"),
    ({"s": _LONG + 2}, {"diagonal": _LONG + 1}, 0, _TOO_LONG, f"got {_LONG + 2}"),
    ({}, {"diagonal": _LONG + 1}, 0, _TOO_LONG, f"got {_LONG + 1}"),
    ({}, {"diagonal": -_LONG - 1}, 0, _TOO_LONG, f"got {_LONG + 1}"),
    ({"b": 2, "h": (_HEADS + 1) // 2}, {}, 0,
     f"batch times heads is above {_HEADS}", f"got {_HEADS + 1}"),
]  # fmt: skip


_ADVICE_OF = {
    "the dtype is not float16, bfloat16 or float32": "cast query, key and value to one of these",
    _TOO_WIDE: "F.scaled_dot_product_attention takes such heads and may be faster than the "
               "reference kernels",
    _MASK_DTYPE: "cast it to one of these",
    _PER_HEAD_DTYPE: "cast them to float32",
    _CAP_FACTOR: "multiply query by a part of the scale and pass the rest of it",
    _TOO_LONG: "split the queries into several calls: each row of the result stands alone",
    f"batch times heads is above {_HEADS}":
        "split the batch into several calls: each part of the result stands alone",
}  # fmt: skip


def plan_of_head_dims(sources: Sources) -> None:
    assert sources.head_dims() == _WIDTHS


def plan_of_no_key_heads(sources: Sources) -> None:
    """No key/value head: delta alone is launched."""
    plan, _ = sources.plan(request(_layouts(h=4, hk=0), 0, True, scratch_bytes=1 << 30))
    assert [launch[0] for launch in plan["launches"]] == [0] and not plan["scratch_bytes"]


def plan_of_refusals(sources: Sources) -> None:
    for sizes, fields, dtype, refusal, detail in _REFUSALS:
        for backward in (False, True):
            plan, _ = sources.plan(request(_layouts(**sizes), dtype, backward, **fields))
            assert plan.pop("advice") == _ADVICE_OF[refusal]
            assert plan == {
                "refusal": refusal, "detail": detail, "kernels": [], "scratch_bytes": 0,
                "launches": [], "map_elements": 0, "hull_elements": 0, "dmask_part_elements": 0,
                "dkv_part_elements": 0,
                "forward_part_elements": 0,
            }, plan  # fmt: skip
    for sizes, fields in (
        ({"d": 256}, {}), ({"l": _LONG}, {}), ({"s": _LONG}, {}), ({}, {"diagonal": _LONG}),
        ({}, {"diagonal": -_LONG}), ({"b": 1, "h": _HEADS}, {}), ({}, {"softcap": 0.0}),
        ({"dv": 256}, {}), ({}, {"per_head_float32": 0}), ({}, {"mask_dtype": 4}),
        *(({}, {"has_mask": 1, "mask_dtype": of_mask}) for of_mask in (0, 2, BOOL)),
        ({}, {"has_alibi": 1, "has_sinks": 1, "softcap": 9.0}),
        *(({}, {"scale": scale, "softcap": softcap}) for scale, softcap in (
            (0.0, 9.0), (1e-39, 0.0), (-10.0, 1e-37), (1.17e38, 1.0), (1e38, 1e30))),
    ):  # fmt: skip
        plan, _ = sources.plan(request(_layouts(**sizes), 0, **fields))
        assert not plan["refusal"], plan


def _parts_of(sources: Sources, **fields: Any) -> tuple[dict, int]:
    """The plan of a forward in float16 of head dim 64, 32 queries a threadgroup; and its parts."""
    sizes = {name: fields.pop(name) for name in ("b", "h", "hk", "l", "s", "d", "dv")
             if name in fields}  # fmt: skip
    sizes = {"b": 1, "h": 2, "hk": 1, "l": 64, "d": 64} | sizes
    plan, params = sources.plan(request(_layouts(**sizes), 0, **fields))
    divided = len(plan["kernels"]) > 1 and "merge" in plan["kernels"][-1]["name"]
    assert (params.forward_parts > 1) == divided == (plan["forward_part_elements"] > 0)
    parts = max(params.forward_parts, 1)
    groups = [sizes["b"] * sizes["h"], parts * -(-sizes["l"] // 32)]
    assert plan["kernels"][0]["groups"] == groups
    return plan, parts


def plan_of_forward_parts(sources: Sources) -> None:
    """Parts fill the GPU with 4 threadgroups a core, and have 256 keys at least; at most 32."""
    for fields, parts in (
        ({"s": 9000}, 8),  # 4 threadgroups, wanted 32
        ({"s": 9000, "l": 65}, 5),  # 6
        ({"s": 9000, "l": 500, "h": 1}, 2),  # 16
        ({"s": 9000, "l": 500}, 1),  # 32
        ({"s": 9000, "l": 481, "h": 1, "b": 2}, 1),
        ({"s": 9000, "l": 672, "h": 1}, 2),  # 21
        ({"s": 9000, "l": 673, "h": 1}, 1),
        ({"s": 9000, "l": 500, "gpu_cores": 12}, 2),
        ({"s": 9000, "l": 500, "gpu_cores": 11}, 1),
        ({"s": 9000, "l": 1, "h": 1}, 32),
        ({"s": 90_000, "l": 1, "h": 1, "gpu_cores": 80}, 32),
        ({"s": 90_000, "l": 33, "h": 1, "gpu_cores": 15}, 30),
        ({"s": 9000, "gpu_cores": 0}, 1),
        ({"s": 511}, 1), ({"s": 512}, 2), ({"s": 767}, 2), ({"s": 768}, 3), ({"s": 0}, 1),
        ({"s": 9000, "l": 0}, 1), ({"s": 9000, "b": 0}, 1),
        # keys that the window lets 32 queries see
        ({"s": 9000, "window_left": 300, "window_right": 179, "diagonal": 5000}, 1),
        ({"s": 9000, "window_left": 300, "window_right": 180, "diagonal": 5000}, 2),
        ({"s": 9000, "window_left": 735, "window_right": 0, "diagonal": 5000}, 2),
        ({"s": 9000, "window_left": 736, "window_right": 0, "diagonal": 5000}, 3),
        # keys that any query sees
        ({"s": 9000, "l": 511, "h": 1, "window_right": 0}, 1),
        ({"s": 9000, "l": 480, "h": 1, "window_right": 32}, 2),
        ({"s": 9000, "window_right": 447}, 1), ({"s": 9000, "window_right": 448}, 2),
        ({"s": 9000, "window_right": 0, "diagonal": 447}, 1),
        ({"s": 9000, "window_right": 0, "diagonal": 448}, 2),
        ({"s": 1000, "window_left": 0, "diagonal": 489}, 1),
        ({"s": 1000, "window_left": 0, "diagonal": 488}, 2),
        ({"s": 1000, "window_left": 100, "diagonal": 588}, 2),
        ({"s": 1000, "window_left": 100, "diagonal": 589}, 1),
        ({"s": 1000, "diagonal": 5000, "window_left": 100}, 1),
        # beyond 32 bits
        ({"s": 5400, "window_left": 1 << 40, "diagonal": 5000}, 8),
        ({"s": 9000, "window_right": 1 << 40}, 8),
        ({"s": 5400, "window_left": (1 << 63) - 1, "diagonal": 5000}, 8),
        ({"s": 9000, "window_right": (1 << 63) - 1}, 8),
        # 2^20 rows, whose sums fit into 2^28 floats
        ({"s": 9000, "h": 64, "l": 1 << 14, "dv": 62, "gpu_cores": 1 << 20}, 4),
        ({"s": 9000, "h": 64, "l": 1 << 14, "dv": 63, "gpu_cores": 1 << 20}, 3),
        ({"s": 9000, "h": 4096, "l": (1 << 25) + 1, "gpu_cores": 10_000}, 1),
        # of key ranges nothing is known
        ({"s": 9000, "window_left": 3, "window_right": 3, "has_key_ranges": True}, 8),
        ({"s": 511, "has_key_ranges": True}, 1),
    ):  # fmt: skip
        assert _parts_of(sources, **fields)[1] == parts, fields
    for fields, names in (
        ({}, ("", "")),
        ({"dropout_p": 0.5}, ("_dropout", "_dropout")),
        ({"dropout_p": 2.0**-16}, ("_dropout", "_dropout")),
        ({"has_sinks": True}, ("_natural", "_natural")),
        ({"softcap": 1.0, "dropout_p": 0.5}, ("_dropout_softcap", "_natural_dropout")),
    ):
        plan, parts = _parts_of(sources, s=9000, l=65, dv=33, **fields)
        first, last = plan["kernels"]
        assert first["name"] == f"attention_forward_float16_d64_r1_k32_b2_elements{names[0]}_part"
        assert first["instantiation"].count(", Part>") == 2
        assert first["groups"] == [2, 3 * parts]
        assert last["name"] == f"attention_forward_merge_float16{names[1]}"
        words = ("true" if word in names[1] else "false" for word in ("natural", "dropout"))
        assert f"<half, 4, {', '.join(words)}>" in last["instantiation"]
        assert last["groups"] == [-(-130 // 4), 1] and last["threads"] == 128
        assert plan["forward_part_elements"] == parts * 130 * 35
        assert f"keys in {parts} parts, {4 * parts * 130 * 35} bytes" in last["tile"]
        assert f"{last['groups'][0]} x 1 threadgroups of 128 threads" in last["tile"]
        assert [x[:3] for x in plan["launches"]] == [[0, 2, 3 * parts], [1, 33, 1]]
    for dtype, element in ((1, "bfloat"), (2, "float")):
        plan, _ = sources.plan(request(_layouts(s=9000, l=1), dtype))
        assert f"attention_forward_merge<{element}, 4" in plan["kernels"][1]["instantiation"]
    plan, _ = sources.plan(request(_layouts(s=9000, l=1), 0, True))
    assert plan["forward_part_elements"] == 0


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


def properties() -> Iterator[Property]:
    for test in (
        plan_of_every_width, plan_of_threadgroups, plan_of_params, plan_of_windows,
        plan_of_dropout, plan_of_layouts, plan_of_refusals, plan_of_strides,
        plan_of_scratch, plan_of_large_sums, plan_of_other_tiles,
        plan_of_forward_parts, plan_of_buffers, plan_of_head_dims, plan_of_no_key_heads,
    ):  # fmt: skip
        name = test.__name__.removeprefix("plan_of_").replace("_", " ")
        yield Property(f"plan: {name}", None, test)
