"""The plans of the ops for caches: names, grids, params and refusals."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ..harness import DTYPE_NUMBERS, Sources
from .attention import BF16, F16, F32, dense

_TYPES = {
    F16: ("float16", "half", "half"),
    BF16: ("bfloat16", "bfloat", "float"),
    F32: ("float32", "float", "float"),
}


def layout_of(*shape: int, offset: int = 0, strides: tuple[int, ...] | None = None) -> tuple:
    return shape, strides or dense(shape), offset


def padded_width(sources: Sources, width: int) -> int:
    """Of the kernel for such rows."""
    return min(n for n in sources.head_dims() if n >= width)


def plan_of(sources: Sources, dtype: torch.dtype = F16, batch: int = 2,
          heads: tuple[int, int] = (8, 2), q_len: int = 1, widths: tuple[int, int] = (64, 64),
          keys: int = 300, entries: int = 0,
          cache: dict[str, int] | None = None, changed: dict[str, tuple] | None = None,
          **fields: float) -> Any:  # fmt: skip
    entries = entries or batch
    layouts = {
        "q": layout_of(batch, heads[0], q_len, widths[0]),
        "k": layout_of(entries, heads[1], keys, widths[0]),
        "v": layout_of(entries, heads[1], keys, widths[1]),
        "out": layout_of(batch, heads[0], q_len, widths[1]),
        **(changed or {}),
    }
    numbers = {"page_size": keys, "entries": entries, **(cache or {})}
    return sources.decode(layouts, DTYPE_NUMBERS[dtype], numbers, **{"scale": 1.0, **fields})


def _expect(plan: Any, name: str, arguments: str, groups: tuple[int, int], rows: int) -> None:
    assert not plan.refusal, plan.refusal
    kernel = plan.kernels[0]
    call = f"attention_decode<{arguments}>"
    assert kernel.name == f"attention_decode_{name}", kernel.name
    assert kernel.instantiation == (
        f'template [[host_name("attention_decode_{name}")]] [[kernel]] decltype({call}) {call};\n'
    ), kernel.instantiation
    assert (kernel.groups, kernel.threads) == (groups, 128), kernel
    assert kernel.tile == f"{groups[0]} x {groups[1]} threadgroups of 128 threads", kernel.tile
    assert plan.part_rows == rows, plan.part_rows


def decode_variants(sources: Sources) -> None:
    for (dtype, names), (width, value) in itertools.product(
        _TYPES.items(), ((64, 64), (1, 128), (65, 129), (128, 128), (129, 72), (192, 256), (256, 8))
    ):
        torch_name, metal, operand = names
        bd, vd = (padded_width(sources, n) for n in (width, value))
        chunk = 16 // dtype.itemsize
        chunks = width % chunk == 0 and value % chunk == 0
        for paged, softcap, alibi in itertools.product((0, 1), repeat=3):
            plan = plan_of(
                sources, dtype, widths=(width, value), keys=16 if paged else 300, entries=9,
                cache={"paged": paged, "pages": 5, "table_row": 5, "has_entries": 1},
                softcap=2.0 * softcap, has_alibi=alibi,
            )  # fmt: skip
            words = [torch_name, f"d{bd}", f"v{vd}", "r1", "chunks" if chunks else "elements"]
            words += ["paged"] * paged + ["softcap"] * softcap + ["alibi"] * alibi
            flags = [str(bool(n)).lower() for n in (chunks, paged, softcap, alibi)]
            arguments = [metal, operand, str(bd), str(vd), "1", "4", *flags, "NoMask", "false"]
            groups = (4, 1 if paged else 2)
            rows = 4 * groups[1] * 8
            _expect(plan, "_".join(words), ", ".join(arguments), groups, rows)
            assert plan.params.part_stride == vd
            merge = plan.kernels[1]
            assert merge.name == f"attention_decode_merge_{torch_name}"
            assert f"attention_decode_merge<{metal}, 4>)" in merge.instantiation
            assert merge.groups == (16, -(-vd // 64)) and merge.threads == 128


def decode_rows(sources: Sources) -> None:
    """Rows of a threadgroup: 8, or 16 where there are more and the head dims allow it."""
    for heads, q_len, widths, block_rows, blocks in (
        ((8, 1), 1, (128, 128), 8, 1), ((9, 1), 1, (128, 128), 16, 1),
        ((8, 2), 4, (128, 128), 16, 1), ((8, 2), 5, (128, 128), 16, 2),
        ((9, 1), 1, (129, 64), 8, 2), ((9, 1), 1, (64, 129), 8, 2), ((24, 1), 1, (256, 256), 8, 3),
        ((1, 1), 1, (64, 64), 8, 1), ((2, 2), 16, (64, 64), 16, 1), ((2, 2), 17, (64, 64), 16, 2),
    ):  # fmt: skip
        plan = plan_of(sources, heads=heads, q_len=q_len, widths=widths, keys=200)
        x = plan.params
        assert (x.block_rows, x.blocks, x.parts) == (block_rows, blocks, 1), (heads, q_len)
        assert plan.kernels[0].groups == (2 * heads[1] * blocks, 1)
        assert f"_r{block_rows // 8}_" in plan.kernels[0].name
        assert plan.part_rows == 2 * heads[1] * blocks * block_rows
        out_rows = 2 * heads[0] * q_len
        assert plan.kernels[1].groups == (out_rows, -(-widths[1] // 64))
    nothing = plan_of(sources, heads=(0, 0))
    assert [kernel.groups for kernel in nothing.kernels] == [(0, 2), (0, 1)]


def decode_parts(sources: Sources) -> None:
    """By the capacity, at most 32 threadgroups for all rows of a head, but 1 for each block.

    Of 1024 keys there may be up to 64, the more, the fewer bytes a key and its value have, or up
    to 48 where a threadgroup has 16 rows.
    """
    for keys, groups in ((33791, 32), (33792, 33), (65535, 63), (65536, 64), (1 << 28, 64)):
        for case, most, blocks in (
            ({"heads": (1, 1)}, 64, 1), ({"heads": (8, 1)}, 64, 1), ({"batch": 3}, 64, 1),
            ({"heads": (4, 1), "q_len": 2}, 64, 1), ({"widths": (7, 33)}, 64, 1),
            ({"dtype": torch.bfloat16}, 64, 1), ({"heads": (9, 1)}, 48, 1),
            ({"heads": (4, 1), "q_len": 3}, 48, 1), ({"dtype": torch.float32}, 32, 1),
            ({"widths": (65, 64)}, 56, 1), ({"widths": (64, 65)}, 56, 1),
            ({"heads": (17, 1)}, 48, 2), ({"widths": (65, 48)}, 64, 1),
            ({"widths": (96, 32)}, 64, 1), ({"widths": (97, 32)}, 56, 1),
            ({"widths": (256, 256)}, 32, 1), ({"widths": (96, 96)}, 42, 1),
            ({"dtype": torch.float32, "widths": (32, 32)}, 64, 1),
            ({"dtype": torch.float32, "widths": (33, 32)}, 51, 1),
        ):  # fmt: skip
            plan = plan_of(sources, keys=keys, **{"dtype": torch.float16, "gpu_cores": 1, **case})
            own = min(groups, most) // blocks
            assert plan.params.parts == plan.kernels[0].groups[1] == own, (keys, case)
    for keys, groups in (
        (0, 1), (1, 1), (255, 1), (256, 1), (257, 2), (512, 2), (513, 3), (7936, 31), (7937, 32),
        (8192, 32), (8193, 32),
    ):  # fmt: skip
        for batch, heads in ((1, (1, 1)), (5, (8, 4))):
            plan = plan_of(sources, keys=keys, batch=batch, heads=heads, gpu_cores=1)
            assert plan.kernels[0].groups == (batch * heads[1], groups), keys
            assert plan.params.parts == groups
            assert plan.params.cache.capacity == plan.params.attention.kv_len == keys
    for rows, groups in ((17, 16), (33, 10), (48, 10), (49, 8), (257, 1), (512, 1), (513, 1)):
        for batch, kv_heads in ((1, 1), (3, 2)):
            heads = (rows * kv_heads, kv_heads)
            plan = plan_of(sources, keys=8192, batch=batch, heads=heads, gpu_cores=1)
            blocks = -(-rows // 16)
            assert plan.kernels[0].groups == (batch * kv_heads * blocks, groups), rows
            assert plan.part_rows == batch * kv_heads * blocks * groups * 16
            short = plan_of(sources, keys=300, batch=batch, heads=heads, gpu_cores=1)
            assert short.kernels[0].groups[1] == min(groups, 2)
    many = plan_of(sources, keys=8192, batch=3 << 12, heads=(1 << 10, 1 << 10))
    assert many.part_rows == (3 << 22) * 32 * 8
    plan = plan_of(sources, keys=48, entries=3, cache={"paged": 1, "pages": 6, "table_row": 6})
    assert plan.params.cache.capacity == 288 and plan.kernels[0].groups == (4, 2)


def decode_parts_of_rows(sources: Sources) -> None:
    """64 keys a row in 16 bits, 32 in float32, where a sequence has 64 threadgroups then."""
    for dtype, heads, keys, groups in (
        (F16, (64, 8), 8192, 16), (F16, (64, 8), 4608, 9), (F16, (64, 8), 4609, 10),
        (F16, (64, 8), 4096, 8), (F16, (64, 8), 2049, 8), (F16, (64, 8), 1793, 8),
        (F16, (64, 8), 1792, 7), (BF16, (64, 8), 8192, 16), (F32, (64, 8), 8192, 32),
        (F32, (128, 8), 8192, 16), (F16, (32, 8), 8192, 32), (F16, (40, 8), 8192, 26),
        (F16, (128, 8), 8192, 8), (F16, (128, 8), 9217, 10), (F16, (256, 16), 5120, 5),
        (F16, (136, 8), 8192, 8), (F16, (136, 8), 8193, 9),
        (F16, (136, 8), 4096, 4), (F16, (136, 8), 1025, 4),
        (F16, (56, 7), 4096, 10), (F16, (504, 63), 300, 2), (F16, (512, 64), 300, 1),
        (F16, (512, 64), 512, 1), (F16, (512, 64), 513, 2), (F16, (520, 65), 1 << 20, 32),
    ):  # fmt: skip
        for batch in (1, 3):
            plan = plan_of(sources, dtype, batch, heads, keys=keys, widths=(128, 128), gpu_cores=1)
            assert plan.params.parts == plan.kernels[0].groups[1] == groups, (heads, keys)


def decode_parts_in_rounds(sources: Sources) -> None:
    """About equally many threadgroups for each core, and no fewer in all than fill the GPU."""
    for heads, width, cores, groups in (
        ((64, 8), 128, 132, 33), ((64, 8), 128, 80, 30), ((64, 8), 128, 76, 28),
        ((64, 8), 128, 40, 30), ((64, 8), 128, 24, 33), ((64, 8), 128, 10, 32),
        ((64, 8), 64, 132, 66), ((64, 8), 64, 40, 65), ((8, 1), 128, 132, 132),
        ((8, 1), 128, 40, 40), ((8, 1), 128, 33, 33), ((8, 1), 128, 21, 42), ((8, 1), 128, 22, 32),
        ((8, 1), 64, 40, 80), ((512, 64), 128, 24, 31), ((512, 64), 128, 1 << 32, 512),
        ((32, 1), 128, 132, 66), ((160, 1), 128, 132, 14), ((160, 1), 128, 11, 4),
        ((8, 8), 16, 1, 64), ((8, 8), 16, 7, 63),
    ):  # fmt: skip
        for batch in (1, 3):
            plan = plan_of(
                sources, F16, batch, heads, keys=1 << 17, widths=(width, width), gpu_cores=cores
            )
            assert plan.params.parts == plan.kernels[0].groups[1] == groups, (heads, width, cores)


def decode_parts_in_rounds_of_few_keys(sources: Sources) -> None:
    """As long as that makes no fewer than fill the GPU, and no more than is cheap to join."""
    for heads, width, keys, cores, groups in (
        ((8, 8), 64, 2049, 7, 8), ((64, 8), 64, 4096, 24, 8), ((64, 8), 64, 4096, 38, 8),
        ((16, 4), 64, 9500, 76, 38),
    ):  # fmt: skip
        plan = plan_of(sources, F16, 1, heads, keys=keys, widths=(width, width), gpu_cores=cores)
        assert plan.params.parts == plan.kernels[0].groups[1] == groups, (heads, keys, cores)


def decode_parts_of_cores(sources: Sources) -> None:
    """A sequence has a threadgroup for each core of the GPU, and at least 64."""
    for cores, groups in (
        (0, 8), (1, 8), (10, 8), (40, 8), (48, 8), (64, 8), (65, 9), (76, 10), (132, 16),
        (1 << 32, 16),
    ):  # fmt: skip
        for batch in (1, 3):
            plan = plan_of(
                sources, batch=batch, heads=(64, 8), keys=4096, widths=(128, 128), gpu_cores=cores
            )
            assert plan.params.parts == plan.kernels[0].groups[1] == groups, cores


def decode_params(sources: Sources) -> None:
    numbers = {
        "page_size": 300, "entries": 7, "added": 4, "table_row": 11, "has_lengths": 1,
        "has_starts": 1, "has_entries": 1,
    }  # fmt: skip
    plan = plan_of(
        sources, cache=numbers, entries=7, window_left=5, window_right=3, softcap=2.5, scale=0.7,
        has_alibi=1, alibi_batch=8, alibi_head=1, has_sinks=1, q_len=3,
    )  # fmt: skip
    x, cache = plan.params.attention, plan.params.cache
    assert (x.batch, x.num_heads, x.num_kv_heads, x.q_len) == (2, 8, 2, 3)
    assert (x.head_dim, x.v_head_dim, x.window_left, x.window_right) == (64, 64, 5, 3)
    assert (x.alibi_batch, x.alibi_head, x.has_sinks) == (8, 1, 1)
    assert abs(x.scale - 0.7) < 1e-7 and x.softcap == 2.5
    assert list(x.out) == [8 * 3 * 64, 3 * 64, 64, 1]
    for name, value in numbers.items():
        assert getattr(cache, name) == value, name
    assert (cache.capacity, cache.paged) == (300, 0)
    assert not (plan.params.row_stats or plan.params.powers_of_2 or x.diagonal)
    none = plan_of(sources).params.cache
    assert not (none.has_lengths or none.has_starts or none.has_entries or none.added)
    paged = plan_of(sources, keys=16, entries=5, cache={"paged": 1, "pages": 4, "table_row": 4})
    assert (paged.params.cache.paged, paged.params.cache.page_size) == (1, 16)


def decode_loads(sources: Sources) -> None:
    """Chunks where keys and values allow them, whatever the query's layout is."""
    shape = (2, 2, 300, 64)
    strides = dense(shape)
    for name, place, chunks in (
        ("k", layout_of(*shape, offset=4), False), ("v", layout_of(*shape, offset=4), False),
        ("k", layout_of(*shape, offset=8), True), ("q", layout_of(2, 8, 1, 64, offset=1), True),
        ("k", (shape, (*strides[:2], 68, 1), 0), False),
        ("v", (shape, (*strides[:3], 2), 0), False),
    ):  # fmt: skip
        plan = plan_of(sources, changed={name: place})
        assert plan.kernels[0].name.endswith("_chunks" if chunks else "_elements"), name
        assert bool(plan.advice) != chunks


def decode_refusals(sources: Sources) -> None:
    for reason, detail, advice, plan in (
        ("the page size is not a multiple of 16", "got 24", "allocate pages",
         plan_of(sources, keys=24, entries=4, cache={"paged": 1, "pages": 2})),
        ("head_dim is above 256", "got 257", "F.scaled", plan_of(sources, widths=(257, 64))),
        ("head_dim is above 256", "got 257", "F.scaled",
         plan_of(sources, widths=(257, 64), keys=24, entries=4, cache={"paged": 1, "pages": 2})),
        ("head_dim is above 256", "got 257", "F.scaled", plan_of(sources, widths=(64, 257))),
        ("a length or the diagonal is above 2^28", f"got {(1 << 28) + 1}", "split",
         plan_of(sources, keys=(1 << 28) + 1)),
        ("a length or the diagonal is above 2^28", f"got {1 << 29}", "split",
         plan_of(sources, keys=1 << 28, entries=4, cache={"paged": 1, "pages": 2})),
        ("batch times heads times queries is above 16777215", f"got {1 << 24}", "split",
         plan_of(sources, batch=1 << 10, heads=(16, 2), q_len=1 << 10)),
        ("batch times heads times queries is above 16777215", f"got {1 << 32}", "split",
         plan_of(sources, batch=1 << 10, heads=(16, 2), q_len=1 << 18)),
        ("the cache has too many entries, or the call adds too many keys",
         f"got {1 << 31} entries and 0 keys", "split",
         plan_of(sources, keys=16, entries=1 << 31, cache={"paged": 1, "pages": 2})),
        ("the cache has too many entries, or the call adds too many keys",
         f"got 2 entries and {(1 << 28) + 1} keys", "split",
         plan_of(sources, cache={"added": (1 << 28) + 1})),
    ):  # fmt: skip
        assert (plan.refusal, plan.detail) == (reason, detail), (plan.refusal, plan.detail)
        assert plan.advice.startswith(advice), plan.advice
        assert not plan.kernels
    for plan in (
        plan_of(sources, keys=24),
        plan_of(sources, keys=16, entries=(1 << 31) - 1, cache={"paged": 1, "pages": 2}),
        plan_of(sources, cache={"added": 1 << 28}),
        plan_of(sources, batch=1, heads=(255, 255), q_len=65793),
    ):
        assert not plan.refusal, plan.refusal


def append_plans(sources: Sources) -> None:
    shape = (3, 2, 5, 64)
    cache = (7, 2, 32, 64)
    for dtype, width, offset, type_ in (
        (F16, 64, 0, "uint4"), (F16, 64, 8, "uint4"), (F16, 64, 4, "ushort"),
        (F16, 60, 0, "ushort"), (F32, 64, 0, "uint4"), (F32, 62, 0, "uint"), (BF16, 8, 0, "uint4"),
    ):  # fmt: skip
        for places in itertools.product((0, offset), repeat=2):
            added, into = (
                layout_of(*x[:3], width, offset=n) for x, n in zip((shape, cache), places)
            )
            element = type_ if offset in places else type_.replace("ushort", "uint4")
            element = type_ if width % (16 // dtype.itemsize) else element
            plan = sources.append(
                added, into, DTYPE_NUMBERS[dtype],
                {"paged": 1, "pages": 4, "table_row": 9, "offset": 6, "has_lengths": 1},
            )  # fmt: skip
            kernel, x, at = plan.kernels[0], plan.params.attention, plan.params.cache
            assert kernel.name == f"attention_append_{element}", (kernel.name, element)
            assert f"decltype(attention_append<{element}, 4>)" in kernel.instantiation
            chunk = 16 // dtype.itemsize if element == "uint4" else 1
            elements = 3 * 2 * 5 * width // chunk
            assert kernel.groups == (-(-elements // 128), 1)
            assert (x.batch, x.num_kv_heads, x.q_len, x.head_dim) == (3, 2, 5, width // chunk)
            for strides, of in ((x.k, dense(added[0])), (x.out, dense(into[0]))):
                assert list(strides) == [*(n // chunk for n in of[:3]), 1]
            assert (at.entries, at.page_size, at.capacity) == (7, 32, 128)
            assert (at.added, at.table_row, at.paged) == (6, 9, 1)
            assert (at.has_lengths, at.has_entries) == (1, 0)
    transposed = (cache, (2 * 32 * 64, 32 * 64, 1, 32), 0)
    plan = sources.append(layout_of(*shape), transposed, 0, {"has_entries": 1})
    assert list(plan.params.attention.out) == [4096, 2048, 1, 32]
    assert (plan.params.cache.capacity, plan.params.cache.has_entries) == (32, 1)


def append_refusals(sources: Sources) -> None:
    far = (1 << 28) + 1
    one = layout_of(1, 1, 1, 8)
    for added, into, dtype, numbers, reason in (
        (one, one, 4, {}, "the dtype is not"), (one, one, 3, {}, "the dtype is not"),
        (one, layout_of(1, 1, far, 8), 0, {}, "a length"),
        (one, layout_of(1, 1, 1 << 27, 8), 0, {"paged": 1, "pages": 3}, "a length"),
        (one, one, 0, {"offset": far}, "a length"),
        (layout_of(1, 1, far, 1), one, 0, {}, "a length"),
        (layout_of(1 << 11, 1, 1 << 20, 8), one, 0, {}, "a length"),
        (one, layout_of((1 << 31) - 128, 1, 1, 8), 0, {}, "a length"),
    ):  # fmt: skip
        plan = sources.append(added, into, dtype, numbers)
        assert plan.refusal.startswith(reason) and not plan.kernels, (plan.refusal, reason)
    wide = sources.append(one, layout_of(1, 1, far, 8), 0, {})
    assert wide.detail == f"got {far} and 1", wide.detail
    assert wide.advice == "append the keys in several calls"
    of_dtype = sources.append(one, one, 4, {})
    assert (of_dtype.detail, of_dtype.advice) == ("", "keep the cache in one of these")
    for added, into, numbers in (
        (one, layout_of(1, 1, far - 1, 8), {"offset": far - 1}),
        (one, layout_of((1 << 31) - 129, 1, 1, 8), {}),
        (layout_of((1 << 11) - 1, 1, 1 << 20, 8), one, {}),
    ):
        assert not sources.append(added, into, 0, numbers).refusal


PLANS = (
    decode_variants, decode_rows, decode_parts, decode_parts_of_rows,
    decode_parts_in_rounds, decode_parts_in_rounds_of_few_keys, decode_parts_of_cores,
    decode_params, decode_loads, decode_refusals, append_plans, append_refusals,
)  # fmt: skip
