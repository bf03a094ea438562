"""The ops for caches: parts that are written by hand, rows apart, and numbers beyond 32 bits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from cached_cases import Cached
from simulator import engine
from torch import Tensor

from ..harness import DECODE, DECODE_MERGE, DTYPE_NUMBERS, MaskPlace, Sources
from .attention import F16, F32, dense
from .cache_plans import layout_of
from .caches import Filled, parts_of
from .compiled import compile_kernel
from .positions import Sparse
from .properties import Property

_F32 = DTYPE_NUMBERS[F32]
_TOPS = (0.375, 1000.0, -777.25, 12345.625, 30000.5, 55.5, -250000.25, 8.125)
"""Origins of rows, far from each other: none will do for another row."""


def _forward_plan(sources: Sources, heads: tuple[int, int], q_len: int, width: int, keys: int,
                  key_strides: tuple[int, ...] = (), batch: int = 1,
                  **fields: Any) -> Any:  # fmt: skip
    def of_keys(n: int) -> tuple:
        return layout_of(batch, heads[1], keys, n, strides=key_strides or None)

    layouts = {
        "q": layout_of(batch, heads[0], q_len, 64), "k": of_keys(64), "v": of_keys(width),
        "out": layout_of(batch, heads[0], q_len, width),
    }  # fmt: skip
    return sources.forward_as_decode(layouts, _F32, scale=1.0, **fields)


def _launch(sources: Sources, note: Callable[[str], None], kernel: Any, params: Any,
            x: dict[str, Sparse], groups: tuple[int, int] | None = None,
            check: bool = False, count: bool = False) -> Any:  # fmt: skip
    """count: gives the engine's counters and its instructions by class."""
    library = compile_kernel(sources, kernel.family, vars(kernel), check or count)
    note("compiled")
    block = torch.frombuffer(bytearray(bytes(params)), dtype=torch.uint8).clone()
    buffers = {sources.buffers[name]: tensor.buffer for name, tensor in x.items()}
    buffers[sources.buffers["params"]] = engine.Buffer(block.data_ptr(), len(block), False)
    wide, high = groups or kernel.groups
    grid = (wide * kernel.threads, high, 1)
    launch = library.instruction_mix if count else library.launch
    return launch(kernel.name, grid, (kernel.threads, 1, 1), buffers, workers=1)


def _merged(sources: Sources, note: Callable[[str], None], heads: tuple[int, int], q_len: int,
            width: int, keys: int, blocks: int = 0, check: bool = False,
            rising: bool = False, parts: int = 0) -> None:  # fmt: skip
    """Parts of known sums, whose origins are exact: each a quarter below the one before.

    rising: or 100 above it;
    blocks: from one key/value head to the next, and parts: of a row, in place of the plan's number.
    """
    plan = _forward_plan(sources, heads, q_len, width, keys)
    params = plan.params
    params.parts = parts or params.parts
    group = heads[0] // heads[1]
    parts, block_rows, stride = params.parts, params.block_rows, params.part_stride
    apart = params.blocks = blocks or params.blocks
    rows = ((heads[1] - 1) * apart - (-group * q_len // block_rows)) * parts * block_rows
    sums, stats = Sparse((rows, stride), (stride, 1)), Sparse((rows, 2), (2, 1))
    out = Sparse((1, heads[0], q_len, width), dense((1, heads[0], q_len, width)))
    row_stats = Sparse((heads[0], q_len, 2), (2 * q_len, 2, 1))
    generator = torch.Generator().manual_seed(5)
    right, known = torch.empty(out.tensor.shape, dtype=torch.float64), []
    steps = torch.arange(parts, dtype=torch.float64)
    totals = 1 + steps / 8
    below = 100 * steps.flip(0) if rising else steps / 4
    weights = torch.exp(-below)
    for head in range(heads[0]):
        for query in range(q_len):
            row = query * group + head % group
            top = _TOPS[(row + head // group) % len(_TOPS)]
            block = head // group * apart + row // block_rows
            at = block * parts * block_rows + row % block_rows + torch.arange(parts) * block_rows
            values = torch.randn(parts, stride, generator=generator)
            sums.tensor[at] = values
            stats.tensor[at] = torch.stack([top - below, totals], 1).float()
            total = float((totals * weights).sum())
            right[0, head, query] = (values.double() * weights[:, None]).sum(0)[:width] / total
            known.append((top * math.log2(math.e), math.log2(total)))
    x = {"parts": sums, "part_sums": stats, "out": out, "row_stats": row_stats}
    params.attention.out[:] = list(out.tensor.stride())
    _launch(sources, note, plan.kernels[1], params, x, check=check)
    found = row_stats.tensor.double().reshape(-1, 2)
    origin, log = torch.tensor(known, dtype=torch.float64).unbind(1)
    assert bool(((found[:, 0] - origin).abs() <= origin.abs() * 2.0**-22).all()), found[:, 0]
    wrong = found.sum(1) - (origin + log)
    assert float(wrong.abs().max()) < 2e-6, wrong
    assert float((out.tensor - right).abs().max()) < 1e-5


def merged_parts(sources: Sources, note: Callable[[str], None], check: bool = False) -> None:
    """Rows of far-apart origins. What an origin loses to powers of two is among its logarithm."""
    _merged(sources, note, (8, 1), 1, 200, 300, check=check)
    _merged(sources, note, (16, 2), 3, 72, 8192, check=check)
    _merged(sources, note, (2, 2), 16, 64, 700, check=check)


def merged_in_two_turns(sources: Sources, note: Callable[[str], None]) -> None:
    """A simdgroup reads 16 parts at once, and one more. Behind the last one memory ends, in which
    most lanes of the second 64 columns have none."""
    _merged(sources, note, (16, 2), 2, 72, 8192, check=True, parts=68)


def merged_and_rising(sources: Sources, note: Callable[[str], None]) -> None:
    """The last part has nearly all of a row's weight."""
    for keys in (300, 1024, 8192):
        _merged(sources, note, (8, 1), 1, 200, keys, rising=True)


def merged_beyond_32_bits(sources: Sources, note: Callable[[str], None]) -> None:
    _merged(sources, note, (16, 2), 1, 64, 256, blocks=(1 << 22) + 1)


def _far_parts(sources: Sources, note: Callable[[str], None], strides: tuple[int, ...] = (),
               mask_stride: int = 0, parts: int = 0, batch: int = 1) -> list[Tensor]:  # fmt: skip
    """What the parts of 2 heads of 256 keys come to, of one sequence or of a batch of two.

    strides: of keys and values; parts: from one head to the next, of which the first one has keys.
    """
    heads = 2 // batch
    place = strides or dense((batch, heads, 256, 64))
    fields: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(6)
    x = {"query": Sparse((batch, heads, 1, 64), dense((batch, heads, 1, 64)))}
    x |= {name: Sparse((batch, heads, 256, 64), place) for name in ("key", "value")}
    for tensor in x.values():
        tensor.tensor.copy_(torch.randn(tensor.tensor.shape, generator=generator))
    if mask_stride:
        x["mask"] = Sparse((256,), (mask_stride,))
        x["mask"].tensor.copy_(torch.randn(256, generator=generator))
        strides_of_mask = (0, 0, 0, 0, mask_stride)
        fields["mask"] = MaskPlace((1, 1, 1, 1, 256), strides_of_mask, 0, 1, _F32)
    plan = _forward_plan(sources, (heads, heads), 1, 64, 256, place, batch, **fields)
    params = plan.params
    assert params.parts == 1
    params.parts = parts or 1
    rows = params.parts * 8 + 8
    x["parts"] = Sparse((rows, 64), (64, 1))
    x["part_sums"] = Sparse((rows, 2), (2, 1))
    _launch(sources, note, plan.kernels[0], params, x, (2, 1))
    return [x[name].tensor[:: params.parts * 8].clone() for name in ("parts", "part_sums")]


def far_parts(sources: Sources, note: Callable[[str], None], **changed: Any) -> None:
    """Far apart in memory, the same numbers give the same sums."""
    near = _far_parts(
        sources, note, mask_stride=int("mask_stride" in changed), batch=changed.get("batch", 1)
    )
    far = _far_parts(sources, note, **changed)
    assert bool(near[1][:, 1].all())
    for left, right in zip(near, far):
        assert torch.equal(left, right)


_ENDS: tuple[tuple[int, int, dict[str, int]], ...] = (
    (1, 0, {}), (65, 0, {}), (79, 0, {}), (73, 1, {}), (77, 41, {}), (88, 8, {}), (96, 79, {}),
    (130, 59, {"window_left": 70}),
)  # fmt: skip
"""Keys, the first one that is seen, and options: parts whose blocks have keys of no part."""


def infinite_ends(sources: Sources, note: Callable[[str], None], **changed: Any) -> None:
    """The first and the last key of a sequence have values of inf; what is beside them has none."""
    for length, first, options in _ENDS:
        starts = None if options or not first else (first,)
        problem = Cached((length,), starts, options=options, **{"heads": (1, 1), **changed})
        filled = Filled("", problem)
        call = filled.call()
        out, lse, _, _ = filled.results(call, sources, note)
        problem.check(out, lse)
        value = call.value.clone()
        value[0, 0, first, [0, -2]], value[0, 0, length - 1, [5, -1]] = math.inf, -math.inf
        found = filled.results(call._replace(value=value), sources, note)[0]
        out[..., [0, -2]], out[..., [5, -1]] = math.inf, -math.inf
        assert torch.equal(found, out), (length, first)


def _counts_of_blocks(sources: Sources, note: Callable[[str], None], heads: tuple[int, int],
                      q_len: int, dtype: torch.dtype, blocks: int) -> tuple[Any, dict]:  # fmt: skip
    """Of one threadgroup, whose simdgroups have so many blocks of 16 keys each."""
    keys = 4 * 16 * blocks
    x = {
        name: Sparse((1, n, length, 64), dense((1, n, length, 64)))
        for name, n, length in (
            ("query", heads[0], q_len), ("key", heads[1], keys), ("value", heads[1], keys)
        )
    }  # fmt: skip
    layouts = {
        "q": layout_of(1, heads[0], q_len, 64), "k": layout_of(1, heads[1], keys, 64),
        "v": layout_of(1, heads[1], keys, 64), "out": layout_of(1, heads[0], q_len, 64),
    }  # fmt: skip
    plan = sources.forward_as_decode(layouts, DTYPE_NUMBERS[dtype], scale=1.0)
    plan.params.parts = 1
    x |= {"parts": Sparse((16, 64), (64, 1)), "part_sums": Sparse((16, 2), (2, 1))}
    return _launch(sources, note, plan.kernels[0], plan.params, x, (1, 1), count=True)


def whole_blocks(sources: Sources, note: Callable[[str], None], heads: tuple[int, int],
                 q_len: int, dtype: torch.dtype) -> None:  # fmt: skip
    """A block that all queries see costs no clamp and no mask, and rows of no query no store."""
    few, many = (_counts_of_blocks(sources, note, heads, q_len, dtype, n) for n in (4, 8))
    steady = {name: (n - few[1].get(name, 0)) / (4 * 128) for name, n in many[1].items()}
    for name, most in (("select", 1), ("imul", 3), ("branch", 6)):
        assert steady.get(name, 0) <= most, f"{steady[name]} times {name} for each block"
    rows = heads[0] // heads[1] * q_len
    block_rows = 16 if rows > 8 else 8
    assert many[0].device_bytes_written == rows * 64 * 4 + block_rows * 8


def evenly_divided(sources: Sources, note: Callable[[str], None]) -> None:
    """A query of zeros has as large a sum of weights as its threadgroup has keys."""
    for length, start, groups in (
        (2048, 0, 3), (2049, 0, 3), (2047, 0, 3), (2033, 0, 5), (2032, 15, 5), (2030, 16, 7),
        (2031, 17, 7), (1040, 0, 4), (1024, 0, 4), (1023, 0, 4), (1000, 900, 4),
    ):  # fmt: skip
        problem = Cached((length,), (start,), heads=(1, 1), capacity=2064)
        filled = Filled("", problem, groups=groups)
        call = filled.call()
        query = torch.zeros_like(call.query)
        weights = filled.results(call._replace(query=query), sources, note)[3]
        found = weights.view(groups, 8)[:, 0].tolist()
        of_parts = [max(end - begin, 0) for begin, end in parts_of(start, length, 4 * groups)]
        assert found == [sum(of_parts[4 * n : 4 * n + 4]) for n in range(groups)], length


def rows_behind_the_last_query(sources: Sources, note: Callable[[str], None]) -> None:
    """A block has 8 rows. Those behind 3 queries see nothing: what only they would see is NaN."""
    x = {n: Sparse((1, 1, rows, 64), dense((1, 1, rows, 64)))
         for n, rows in (("query", 3), ("key", 300), ("value", 300))}  # fmt: skip
    generator = torch.Generator().manual_seed(8)
    for tensor in x.values():
        tensor.tensor.copy_(torch.randn(tensor.tensor.shape, generator=generator))
    x["value"].tensor[:, :, 3:] = math.nan
    plan = _forward_plan(sources, (1, 1), 3, 64, 300, window_right=0)
    rows = plan.part_rows
    x |= {"parts": Sparse((rows, 64), (64, 1)), "part_sums": Sparse((rows, 2), (2, 1))}
    _launch(sources, note, plan.kernels[0], plan.params, x)
    has_keys = x["part_sums"].tensor[:, 1] != 0
    assert int(has_keys.sum()) == 3
    assert bool(x["parts"].tensor[has_keys].isfinite().all())


def infinite_and_masked(sources: Sources, note: Callable[[str], None], width: int) -> None:
    """Likewise of the last of 321 keys, alone in its part, where a mask hides some others."""
    query, key, value = (
        Sparse((1, 1, n, width), dense((1, 1, n, width))) for n in (1, 321, 321)
    )  # fmt: skip
    mask = Sparse((321,), (1,))
    generator = torch.Generator().manual_seed(7)
    for x in (query, key, value):
        x.tensor.copy_(torch.randn(x.tensor.shape, generator=generator))
    mask.tensor[3::7] = -math.inf
    value.tensor[0, 0, 3::7] = math.nan
    place = MaskPlace((1, 1, 1, 1, 321), (0, 0, 0, 0, 1), 0, 1, _F32)
    layouts = {name: layout_of(1, 1, n, width) for name, n in (("q", 1), ("k", 321), ("v", 321))}
    layouts["out"] = layouts["q"]
    plan = sources.forward_as_decode(layouts, _F32, scale=0.1, mask=place)
    found = []
    for number in (1.0, math.inf):
        value.tensor[0, 0, 320, 2] = number
        sums, stats = Sparse((16, width), (width, 1)), Sparse((16, 2), (2, 1))
        x = {
            "query": query, "key": key, "value": value, "mask": mask, "parts": sums,
            "part_sums": stats,
        }  # fmt: skip
        _launch(sources, note, plan.kernels[0], plan.params, x)
        found.append(sums.tensor[::8].clone())
    finite, infinite = found
    assert bool(finite.isfinite().all()) and bool((infinite[1, 2] == math.inf).all())
    infinite[1, 2] = finite[1, 2]
    assert torch.equal(finite, infinite)


def origins_of_zero(sources: Sources, note: Callable[[str], None]) -> None:
    """A query of zeros sees all keys alike."""
    filled = Filled("", Cached((70,), heads=(1, 1)))
    call = filled.call()
    query = torch.zeros_like(call.query)
    out, lse, _, _ = filled.results(call._replace(query=query), sources, note)
    right = call.value[:, :, :70].double().mean(2, keepdim=True)
    assert float((out - right).abs().max()) < 1e-6
    assert abs(float(lse) - math.log(70)) < 1e-6


@functools.cache
def killers() -> tuple[Property, ...]:
    dense_rows = {
        "heads": (0, 1 << 31, 64, 1), "rows": (0, 1, 20 << 24, 2), "columns": (0, 1, 2, 35 << 20),
        "a column": (0, 1, 2, (1 << 31) + 1024),
    }  # fmt: skip
    of_decode = [
        Property(
            f"decode: {name} beyond 32 bits", DECODE, functools.partial(far_parts, strides=strides)
        )
        for name, strides in dense_rows.items()
    ]
    return (
        Property("merge: parts by hand", DECODE_MERGE, merged_parts),
        Property(
            "merge: parts by hand, checked", DECODE_MERGE,
            functools.partial(merged_parts, check=True),
        ),
        Property("merge: parts in two turns, checked", DECODE_MERGE, merged_in_two_turns),
        Property("merge: parts that rise", DECODE_MERGE, merged_and_rising),
        Property("merge: parts beyond 32 bits", DECODE_MERGE, merged_beyond_32_bits),
        *of_decode,
        Property(
            "decode: sequences beyond 32 bits", DECODE,
            functools.partial(far_parts, strides=(1 << 31, 1 << 31, 64, 1), batch=2),
        ),
        Property(
            "decode: a mask beyond 32 bits", DECODE,
            functools.partial(far_parts, mask_stride=9 << 20),
        ),
        Property(
            "decode: sums beyond 32 bits", DECODE, functools.partial(far_parts, parts=1 << 22)
        ),
        *(
            Property(
                f"decode: ends of inf, {name}", DECODE,
                functools.partial(infinite_ends, dtype=dtype, **changed), (DECODE_MERGE,),
            )
            for name, dtype, changed in (
                ("half", F16, {}), ("wide", F16, {"widths": (256, 256)}), ("float", F32, {}),
                ("rows", F16, {"widths": (128, 128), "heads": (9, 1)}),
                ("values alone", F32, {"widths": (128, 128)}),
            )
        ),
        *(
            Property(
                f"decode: a last key of inf, masked, {width}", DECODE,
                functools.partial(infinite_and_masked, width=width),
            )
            for width in (64, 256)
        ),
        *(
            Property(
                f"decode: whole blocks, {dtype}, {heads[0]} heads, {q_len}".replace("torch.", ""),
                DECODE,
                functools.partial(whole_blocks, heads=heads, q_len=q_len, dtype=dtype),
            )
            for heads, q_len, dtype in (((4, 1), 1, F16), ((8, 1), 1, F32), ((3, 1), 4, F16))
        ),
        Property("decode: evenly divided", DECODE, evenly_divided, (DECODE_MERGE,)),
        Property("decode: rows behind the last query", DECODE, rows_behind_the_last_query),
        Property("decode: origins of zero", DECODE, origins_of_zero, (DECODE_MERGE,)),
    )  # fmt: skip
